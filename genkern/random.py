"""Counter-based random numbers: the same key gives the same noise, on every backend and number of threads, by construction on every
device (the GPU kernels were so far compared in emulation and in Triton's interpreter only).

    key = genkern.random.key(42)
    x = genkern.random.normal(key, (256, 4096))                       # element e depends on the key and on e alone
    keys = genkern.random.split(key, 16)                              # one stream per sample
    z = genkern.random.normal(keys, (16, 3, 32, 32))                  # z[i] does not depend on the batch it is drawn in

A key is an int64 tensor (2,) = (seed, offset), or (N, 2) for one stream per row. Calling twice with one key gives the same numbers
twice: split() or fold_in() make new ones. A draw takes key, shape (with (N, 2) keys (N, ...)), dtype (float32, where it names no other;
float64, bfloat16, float16) and device (by default the key's), or instead of these three `out`, a contiguous tensor to fill.
TypeError, ValueError on anything else. No gradient.

Bits, uniforms and Bernoulli draws are equal bit for bit everywhere, and so are float32, bfloat16 and half normals, exponentials,
Gumbel, logistic and truncated normal draws; float64 ones are equal in C++, CUDA and NumPy and within a few units in the last place in
the torch reference. Formulas: genkern/ops/random/_random.py.
"""

import math

import torch
from torch.compiler import is_compiling

from genkern.core._op import transforming
from genkern.ops._common import FLOATS, check_device, check_int, check_number, check_tensor
from genkern.ops.random import _random
from genkern.ops.random._random import STREAM_VERSION

__all__ = [
    "STREAM_VERSION", "bernoulli", "bits", "draw_key", "exponential", "fold_in", "gumbel", "key", "logistic", "normal", "split",
    "truncated_normal", "uniform",
]  # fmt: skip

# ---- keys


def key(seed, *, device="cpu"):
    """The key (seed, 0): int64 (2,). seed: any Python int, taken modulo 2^64."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"key: seed must be an int, got {type(seed).__name__}")
    return torch.tensor([_signed(seed), 0], dtype=torch.int64, device=device)


def split(key, n):
    """n independent keys (n, 2) from one key (2,); split(key, n)[i] does not depend on n. From (N, 2): (N, n, 2)."""
    check_key("split", key)
    check_int("split", "n", n, 0)
    if transforming() or key.device.type not in ("cpu", "cuda"):
        return _keys_at(key, torch.arange(n, device=key.device))
    low = (bits(key, (*key.shape[:-1], 4 * n)).to(torch.int64) & 0xFFFFFFFF).unflatten(-1, (n, 4))  # the same words from the kernel
    return _keys_of(low)


def fold_in(key, data):
    """The key that split(key, data + 1)[data] would give: one key (2,) per int, for example per training step."""
    check_key("fold_in", key)
    if isinstance(data, torch.Tensor):
        if data.numel() != 1 or data.is_floating_point() or data.is_complex():
            raise ValueError(f"fold_in: data as a tensor must be one integer, got {data.dtype} {tuple(data.shape)}")
        return _keys_at(key, data.reshape(1).to(torch.int64))[..., 0, :]
    if isinstance(data, bool) or not isinstance(data, int) or data < 0:
        raise ValueError(f"fold_in: data must be a non-negative int or an integer tensor, got {data!r}")
    return _keys_at(key, torch.tensor([_signed(data)], device=key.device))[..., 0, :]


def draw_key(generator=None, device="cpu"):
    """A key (2,) drawn from a torch.Generator; by default from torch's default one of the device, so torch.manual_seed rules.

    On CUDA the draw stays on the device: no synchronisation, and a captured graph draws anew at each replay.
    """
    if device != _CPU:
        device = torch.device(device)
        device = device if device.type in ("cpu", "cuda") else _CPU
    if is_compiling():
        if generator is not None:
            raise ValueError("generator= works in eager mode only; under torch.compile pass key=")
        return torch.ops.genkern._draw_key.default(device)
    if generator is not None:
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {generator!r}; of a seed, pass key=genkern.random.key(seed)")
        device = generator.device
    return torch.empty(2, dtype=torch.int64, device=device).random_(generator=generator)


_CPU = torch.device("cpu")

# Opaque to torch.compile: Inductor would replace the draw by one of its own generator, with other values than eager mode.
_library = torch.library.Library("genkern", "FRAGMENT")
_library.define("_draw_key(Device device) -> Tensor", tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded))
_library.impl(
    "_draw_key",
    lambda device: torch.empty(2, dtype=torch.int64, device=device).random_(),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("genkern::_draw_key", lambda device: torch.empty(2, dtype=torch.int64, device=device), lib=_library)


def _signed(x):
    return (x + 2**63) % 2**64 - 2**63


def _keys_at(key, index):
    return _keys_of(_random.words(key, index))


def _keys_of(low):
    """Keys (..., 2) of the four words (..., 4) of a counter."""
    return torch.stack([low[..., 1] << 32 | low[..., 0], low[..., 3] << 32 | low[..., 2]], -1)


def check_key(name, key):
    if not isinstance(key, torch.Tensor):
        raise TypeError(f"{name}: key must be an int64 tensor (2,) or (N, 2), such as genkern.random.key(seed), got {key!r}")
    if key.dtype != torch.int64 or key.dim() not in (1, 2) or key.shape[-1] != 2:
        raise ValueError(f"{name}: key must be int64 of shape (2,) or (N, 2), got {key.dtype} {tuple(key.shape)}")


# ---- draws


def bits(key, shape=None, *, dtype=torch.int32, device=None, out=None):
    """Random bits. dtype int32 (one word a value) or int64 (two words, the first one high)."""
    return _draw("bits", key, shape, dtype, device, out, (torch.int32, torch.int64))


def uniform(key, shape=None, low=0.0, high=1.0, *, dtype=torch.float32, device=None, out=None):
    """low + (high - low) u, u uniform on [0, 1): as many bits as the dtype holds (24; half 11, bfloat16 8, float64 53)."""
    if not type(low) is type(high) is float:
        low, high = _numbers("uniform", low=low, high=high)
    return _draw("uniform", key, shape, dtype, device, out, FLOATS, high - low, low)


def normal(key, shape=None, mean=0.0, std=1.0, *, dtype=torch.float32, device=None, out=None):
    """mean + std n with n standard normal by Box-Muller (Box & Muller, 1958); in float32 |n| <= 6.77.

    key int64 (2,) or (shape[0], 2) on the CPU or the device of the result; device defaults to the key's. `out`: a contiguous
    tensor to fill instead of a new one, in its own dtype; shape is then that of out, or left out.
    """
    return _draw("normal", key, shape, dtype, device, out, FLOATS, std, mean)


def bernoulli(key, p, shape=None, *, dtype=torch.float32, device=None, out=None):
    """1 with probability p, else 0. p: a number (exact to 2^-32), or a tensor of probabilities whose shape is then the result's."""
    dtypes = (*FLOATS, torch.uint8, torch.bool)
    if isinstance(p, torch.Tensor):
        check_key("bernoulli", key)
        if not p.is_floating_point():
            raise TypeError(f"bernoulli: p must be a number or a floating-point tensor, got {p.dtype}")
        if shape is not None and torch.Size(shape) != p.shape:
            raise ValueError(f"bernoulli: shape must be that of p, {tuple(p.shape)}, or left out, got {tuple(shape)}")
        _check_result("bernoulli", key, p.shape, dtype, out, dtypes)
        if out is not None:
            check_device("bernoulli", "out", out, "p", p)
        draws = uniform(key, p.shape, device=p.device if device is None else device) < p
        return draws.to(dtype) if out is None else out.copy_(draws)
    (p,) = _numbers("bernoulli", p=p)
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"bernoulli: p must be in [0, 1], got {p}")
    if shape is None and out is None:
        raise TypeError("bernoulli: shape is required where p is a number and out is not given")
    return _draw("bernoulli", key, shape, dtype, device, out, dtypes, p)


def exponential(key, shape=None, rate=1.0, *, dtype=torch.float32, device=None, out=None):
    """-ln(u) / rate: density rate exp(-rate x)."""
    (rate,) = _numbers("exponential", rate=rate)
    if not rate > 0:
        raise ValueError(f"exponential: rate must be positive, got {rate}")
    return _draw("exponential", key, shape, dtype, device, out, FLOATS, 1.0 / rate)


def gumbel(key, shape=None, loc=0.0, scale=1.0, *, dtype=torch.float32, device=None, out=None):
    """loc - scale ln(-ln u): argmax(logits + gumbel) draws from softmax(logits) (Gumbel, 1954)."""
    return _draw("gumbel", key, shape, dtype, device, out, FLOATS, scale, loc)


def logistic(key, shape=None, loc=0.0, scale=1.0, *, dtype=torch.float32, device=None, out=None):
    """loc + scale ln(u / (1 - u))."""
    return _draw("logistic", key, shape, dtype, device, out, FLOATS, scale, loc)


def truncated_normal(key, shape=None, low=-2.0, high=2.0, *, dtype=torch.float32, device=None, out=None):
    """A standard normal conditioned on [low, high], by the inverse distribution function of a keyed uniform (no rejection).

    The quantile of a standard normal at a probability uniform between those of low and high, which has 24 bits (float64: 53).
    Bounds beyond 5 (float32) or 8 (float64) act as those.
    """
    low, high = _numbers("truncated_normal", low=low, high=high)
    if not low < high:
        raise ValueError(f"truncated_normal: low must be below high, got {low} and {high}")
    check_key("truncated_normal", key)
    shape = _size_of("truncated_normal", shape, out)
    _check_result("truncated_normal", key, shape, dtype, out, FLOATS)
    dtype = dtype if out is None else out.dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    limit = 8.0 if work == torch.float64 else 5.0
    a, b = (math.erf(max(-limit, min(limit, x)) / math.sqrt(2)) for x in (low, high))
    device = (key if out is None else out).device if device is None else torch.device(device)
    y = uniform(key, shape, a, b, dtype=work, device=device if device.type in ("cpu", "cuda") else "cpu")
    x = _random.normal_quantile(y).clamp(low, high).to(device, dtype)
    return x if out is None else out.copy_(x)


def _draw(name, key, shape, dtype, device, out, dtypes, a=1.0, b=0.0):
    check_key(name, key)
    if type(a) is not float or type(b) is not float:
        a, b = _numbers(name, scale=a, location=b)
    shape = _size_of(name, shape, out)
    _check_result(name, key, shape, dtype, out, dtypes)
    if out is None:
        device = key.device if device is None else torch.device(device)
        if transforming():
            return _random.draw(name, key, shape, dtype, a, b).to(device)
        out = torch.empty(shape, dtype=dtype, device=device)
        _random.FILL[name](beside(key, out), out, a, b)
        return out
    _random.FILL[name](beside(key, out), out, a, b)
    torch.autograd.graph.increment_version(out)
    return out


def _size_of(name, shape, out):
    if shape is None and isinstance(out, torch.Tensor):
        return out.shape
    return as_size(name, shape)


def as_size(name, shape):
    try:
        size = torch.Size((shape,) if isinstance(shape, int) else shape)
    except TypeError:
        raise TypeError(f"{name}: shape must be integers, got {shape!r}") from None
    if any(n < 0 for n in size):
        raise ValueError(f"{name}: shape must not be negative, got {tuple(size)}")
    return size


def _numbers(name, **values):
    for argument, value in values.items():
        check_number(name, argument, value)
    return [float(value) if isinstance(value, int) else value for value in values.values()]


def _check_result(name, key, shape, dtype, out, dtypes):
    if key.dim() == 2 and (not shape or shape[0] != key.shape[0]):
        raise ValueError(f"{name}: {key.shape[0]} keys need a shape that starts with {key.shape[0]}, got {tuple(shape)}")
    if out is None:
        if dtype not in dtypes:
            raise TypeError(f"{name}: dtype must be one of {dtypes}, got {dtype}")
        return
    check_tensor(name, "out", out)
    if out.dtype not in dtypes or out.shape != shape or not out.is_contiguous():
        raise ValueError(
            f"{name}: out must be contiguous of shape {tuple(shape)} and one of {dtypes}, got {out.dtype} {tuple(out.shape)}"
            + ("" if out.is_contiguous() else ", not contiguous")
        )
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: out requires grad; draws have no gradient")


def key_for(op, key, generator, x):
    """The key of an op on x (N, ...): as given, (2,) or one per sample (N, 2), where x's kernel can read it; None: drawn anew."""
    if key is None:
        return draw_key(generator, x.device)
    if generator is not None:
        raise ValueError(f"{op}: give key or generator, not both")
    check_key(op, key)
    if key.dim() == 2 and key.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: one key per sample needs key ({x.shape[0]}, 2), got {tuple(key.shape)}")
    return beside(key, x)


def beside(key, out):
    """The key where the kernel can read it: one key on the CPU goes along as two numbers, everything else lies on out's device."""
    if key.is_cpu and out.is_cpu:
        return key.contiguous()
    if key.device != out.device and not (key.device.type == "cpu" and (key.dim() == 1 or out.device.type != "cuda")):
        if key.device.type == "meta":
            raise ValueError(f"key must be on the CPU or on {out.device}, got a key on meta, which has no numbers")
        key = key.to(out.device if out.device.type in ("cpu", "cuda") else "cpu")
    return key.contiguous()
