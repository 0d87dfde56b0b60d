"""gaussian_log_prob: the log-density of a diagonal Gaussian prior, per sample.

One C++ source serves the CPU and CUDA. It moves each byte once; a Triton twin would move as many, so there is none.
"""

import math

import torch

from genkern.core import Op
from genkern.ops._common import check_float, check_like, expanded, in_working_type, same_precision, sum_per_sample, working_type
from genkern.testing._case import Case

_NAME = "gaussian_log_prob"


def gaussian_log_prob(x, mean=None, log_std=None):
    """log N(x; mean, exp(log_std)^2) summed over each sample, in nats: the prior of a flow, -1/2 (((x - mean) e^-log_std)^2 + ln 2 pi)
    - log_std for each element.

    x               (N, ...)
    mean, log_std   that shape, or one that broadcasts to it, such as one sample's; None: zero, so both None is the standard normal

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64). Returns (N,), float32 (float64 if an input is).
    TypeError, ValueError on anything else. Differentiable to any order in all three.
    """
    check_float(_NAME, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{_NAME}: x needs a batch dimension, got shape ()")
    mean, log_std = (_expanded(name, tensor, x) for name, tensor in (("mean", mean), ("log_std", log_std)))
    return _op(*same_precision((x, mean, log_std)))


def _expanded(name, tensor, x):
    if tensor is None:
        return None
    check_float(_NAME, name, tensor)
    tensor = expanded(_NAME, name, tensor, "x", x.shape)
    check_like(_NAME, name, tensor, "x", x)
    return tensor


def _reference(x, mean, log_std):
    x, mean, log_std = in_working_type(x, mean, log_std)
    dtype = working_type(x, mean, log_std)
    z = x.to(dtype) if mean is None else x - mean
    z = z if log_std is None else z * torch.exp(-log_std)
    log_prob = -0.5 * (z * z + math.log(2 * math.pi))
    log_prob = log_prob if log_std is None else log_prob - log_std
    return sum_per_sample(log_prob)


_op = Op(
    _NAME,
    "(Tensor x, Tensor? mean, Tensor? log_std) -> Tensor",
    reference=_reference,
    fake=lambda x, mean, log_std: x.new_empty(x.shape[:1], dtype=working_type(x, mean, log_std)),
    differentiable=("x", "mean", "log_std"),
)

CASES = (
    Case(
        gaussian_log_prob,
        lambda make, shape: {"x": make(shape), "mean": make(shape), "log_std": make(shape, 0.5)},
        forms=(
            lambda make, shape: {"x": make(shape)},
            lambda make, shape: {"x": make(shape), "log_std": make(shape[1:])},
        ),
        shapes=((3, 37), (1, 1), (0, 4), (3, 0), (2, 3, 5, 7)),
        eager=lambda x, mean, log_std: torch.distributions.Normal(mean, log_std.exp()).log_prob(x).flatten(1).sum(1),
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 6 * size * math.prod(shape),
        bench_shapes=((64, 8), (128, 784), (256, 3, 32, 32)),
    ),
)
