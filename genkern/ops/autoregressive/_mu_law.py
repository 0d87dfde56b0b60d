"""mu_law_encode, mu_law_decode: audio to logarithmic levels and back (ITU-T G.711's law, without its 8-bit format).

Without a kernel: a few elementwise operations, once per clip when data is made ready or heard, which torch.compile fuses into one.
"""

import math

import torch

from genkern.ops._common import check_choice, check_float, check_int


def mu_law_encode(x, levels=256, *, rounding="nearest"):
    """Levels 0 .. levels - 1 (int64) of audio in [-1, 1]: with m = levels - 1 and y = sign(x) ln(1 + m |x|) / ln(1 + m),

    rounding "nearest": floor((y + 1) / 2 m + 1/2), as torchaudio and nv-wavenet do: 0 becomes 128 of 256 levels;
    rounding "floor":   floor((y + 1) / 2 m), as nnmnkwii and r9y9's WaveNet do, whose mu is m: 0 becomes 127 of 256 levels, and 128
                        of 257, their default mu = 256.

    Values outside [-1, 1] are clamped. float32 (float64) arithmetic. TypeError, ValueError on anything else.
    """
    check_float("mu_law_encode", "x", x)
    m = _mu("mu_law_encode", levels, rounding)
    x = x.detach().to(torch.float64 if x.dtype == torch.float64 else torch.float32).clamp(-1, 1)
    y = torch.sign(x) * torch.log1p(m * x.abs()) / math.log1p(m)
    return ((y + 1) / 2 * m + (0.5 if rounding == "nearest" else 0.0)).floor().to(torch.int64)


def mu_law_decode(index, levels=256, *, dtype=torch.float32):
    """Audio in [-1, 1] of levels: sign(y) ((1 + m)^|y| - 1) / m with y = 2 index / m - 1, the inverse of both encodings.

    index of any shape, integers 0 .. levels - 1 (not looked at); dtype, a floating-point type, is that of the result, which is computed
    in float32 (float64). TypeError, ValueError on anything else.
    """
    if not isinstance(index, torch.Tensor) or index.is_floating_point() or index.is_complex():
        raise TypeError(f"mu_law_decode: index must be an integer tensor, got {getattr(index, 'dtype', type(index).__name__)}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"mu_law_decode: dtype must be a floating-point type, got {dtype}")
    m = _mu("mu_law_decode", levels, "nearest")
    y = 2 * index.to(torch.float64 if dtype == torch.float64 else torch.float32) / m - 1
    return (torch.sign(y) * torch.expm1(y.abs() * math.log1p(m)) / m).to(dtype)


def _mu(op, levels, rounding):
    check_choice(op, "rounding", rounding, ("nearest", "floor"))
    check_int(op, "levels", levels, 2)
    return levels - 1
