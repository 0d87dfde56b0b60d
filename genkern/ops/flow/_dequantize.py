"""dequantize: whole numbers of an image into reals with keyed uniform noise, with the log-determinant.

One C++ source serves the CPU and CUDA. It moves each byte once; a Triton twin would move as many, so there is none.
"""

import math

import torch

from genkern import random
from genkern.core import Op
from genkern.ops._common import check_choice, check_number, sum_per_sample
from genkern.ops.flow._squeeze import squeeze as squeezed
from genkern.testing._case import Case

TRANSFORMS = ("unit", "center", "logit", "logit_symmetric")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)  # positions are the numbers of the raw op
_NAME = "dequantize"


def dequantize(x, *, levels=256, key=None, generator=None, transform="center", alpha=0.05, squeeze=False, dtype=torch.float32):
    """(y, log_det): y = f((x + u) / levels), u ~ U[0, 1) from the key, and log |det dy/dx| per sample (RealNVP, Dinh et al., 2017,
    section 4.1; Theis et al., 2016, section 3.1). The mean of log p(y) + log_det over u is a lower bound of log P(x) in nats, so
    -(log p(y) + log_det) / (ln 2 * elements) is an upper bound of the bits per dimension.

    x           (N, ...) uint8, 0 ... levels - 1 (not looked at)
    levels      2 ... 256
    key         int64 (2,), or (N, 2) for one stream per sample, which then does not depend on its batch. The same key gives the same
                noise. None: drawn from `generator`, or from torch's default generator
    transform   f: "unit": v; "center": v - 1/2 (Glow); "logit": logit(alpha + (1 - alpha) v) for v in [0, 1)
                (RealNVP: alpha 0.05); "logit_symmetric": logit(alpha + (1 - 2 alpha) v)
    alpha       of the logits, in (0, 1) and (0, 1/2)
    squeeze     x (N, C, H, W): also 2 x 2 squares into channels, as genkern.ops.squeeze. The noise is that of the unsqueezed image
    dtype       of y: float32, float64, bfloat16, float16. The noise is genkern.random.uniform of the key, its first 16 bits: then x + u
                is exact in float32, and its floor is x

    log_det is float32 (float64 for a float64 y). No gradient: x is data. TypeError, ValueError on anything else.
    """
    if not isinstance(x, torch.Tensor) or x.dtype != torch.uint8:
        raise TypeError(f"{_NAME}: x must be uint8, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0 or (squeeze and x.dim() != 4):
        raise ValueError(f"{_NAME}: x must be {'(N, C, H, W)' if squeeze else '(N, ...)'}, got shape {tuple(x.shape)}")
    if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 256:
        raise ValueError(f"{_NAME}: levels must be an int from 2 to 256, got {levels!r}")
    check_choice(_NAME, "transform", transform, TRANSFORMS)
    if dtype not in DTYPES:
        raise TypeError(f"{_NAME}: dtype must be a floating-point type, got {dtype}")
    check_number(_NAME, "alpha", alpha)
    if transform.startswith("logit") and not 0 < alpha < (1 if transform == "logit" else 0.5):
        raise ValueError(f"{_NAME}: alpha must lie between 0 and {1 if transform == 'logit' else 0.5}, got {alpha}")
    if squeeze and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"{_NAME}: to squeeze, height and width must be even, got shape {tuple(x.shape)}")
    key = random.key_for(_NAME, key, generator, x)
    span, low, high = {
        "unit": (1.0, 0.0, 0.0),
        "center": (1.0, -0.5, 0.0),
        "logit": (1 - alpha, float(alpha), 0.0),
        "logit_symmetric": (1 - 2 * alpha, float(alpha), float(alpha)),
    }[transform]
    logit = transform.startswith("logit")
    x = x.double() if dtype == torch.float64 else x
    y, log_det = _op(x, key, levels, span / levels, low, high, logit, DTYPES.index(dtype))
    return squeezed(y) if squeeze else y, log_det


def _reference(x, key, levels, scale, low, high, logit, dtype):
    work = _working_type(dtype)
    u = random.uniform(key, x.shape, dtype=work, device=x.device)
    v = x + torch.floor(u * 65536) / 65536  # exact, also in float32
    log_det = torch.full_like(v, math.log(scale))
    if logit:  # of scale v + low, whose complement must not be a difference of two numbers near 1
        log_v, log_rest = torch.log(v * scale + low), torch.log((levels - v) * scale + high)
        y, log_det = log_v - log_rest, log_det - log_v - log_rest
    else:
        y = v * scale + low
    return y.to(DTYPES[dtype]), sum_per_sample(log_det)


def _working_type(dtype):
    return torch.float64 if DTYPES[dtype] == torch.float64 else torch.float32


_op = Op(
    _NAME,
    "(Tensor x, Tensor key, int levels, float scale, float low, float high, bool logit, int dtype) -> (Tensor, Tensor)",
    reference=_reference,
    fake=lambda x, key, levels, scale, low, high, logit, dtype: (
        x.new_empty(x.shape, dtype=DTYPES[dtype]),
        x.new_empty(x.shape[:1], dtype=_working_type(dtype)),
    ),
)


def _pixels(make, shape):
    return (torch.sigmoid(make(shape).double()) * 256).to(torch.uint8)


def _eager(x, key=None):
    v = 0.05 + 0.95 * (x.float() + torch.rand(x.shape)) / 256
    log_det = (math.log(0.95 / 256) - torch.log(v) - torch.log(1 - v)).flatten(1).sum(1)
    return torch.log(v) - torch.log(1 - v), log_det


def _with_key(key_of):
    return lambda make, shape: {"x": _pixels(make, shape), "key": key_of(random.key(11, device=make.device), shape)}


CASES = (
    Case(
        dequantize,
        _with_key(lambda key, shape: key),
        forms=(_with_key(lambda key, shape: random.split(key, shape[0])),),
        shapes=((3, 37), (1, 1), (0, 4), (3, 0), (2, 3, 4, 6)),
        variants=({"transform": "logit"}, {}, {"levels": 32, "dtype": torch.bfloat16}, {"transform": "logit_symmetric", "alpha": 1e-3}),
        dtypes=(torch.float32,),
        constants=None,
        eager=_eager,
        bytes=lambda shape, size: (1 + size) * math.prod(shape),
        bench_shapes=((64, 1, 8, 8), (128, 784), (256, 3, 32, 32)),
        bench_variant={"transform": "logit"},
    ),
)
