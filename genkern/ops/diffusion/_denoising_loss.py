"""denoising_loss: the training loss of a diffusion model per sample, without storing its target."""

import functools
import math

import torch
import torch.nn.functional as F

from genkern import random
from genkern.core import Op
from genkern.ops._common import check_choice, check_float, check_like, check_number, same_precision, working_type
from genkern.ops.diffusion import _q_sample
from genkern.ops.diffusion._q_sample import BENCH_SHAPES, SHAPES, TARGETS, per_sample
from genkern.testing._case import Case


def denoising_loss(
    prediction,
    x0,
    timesteps,
    table,
    *,
    key,
    target="eps",
    weighting=None,
    min_snr_gamma=5.0,
    p2_k=1.0,
    p2_gamma=1.0,
    sigma_data=0.5,
):
    """w_t times the mean squared error of a prediction of `target`, per sample: (N,). The target is that of
    q_sample(x0, timesteps, table, key=key, target=target): its noise is made again from the key, in the backward pass too.

    prediction      (N, ...), what the model makes of x_t
    x0, timesteps, table, key, target
                    as given to q_sample; key is required, because a new one would mean other noise
    weighting       None: w = 1. Otherwise a weight on the error of x0, with snr = alpha^2 / sigma^2, converted to that of the target
                    (alpha^2 and sigma^2 count as at least 1e-20, so no weight is NaN where there is no signal or no noise):
                    "min_snr": min(snr, min_snr_gamma) (Hang et al., 2023);
                    "p2": snr / (p2_k + snr)^p2_gamma, that is (p2_k + snr)^-p2_gamma on the error of eps (Choi et al., 2022);
                    "edm": snr + 1 / sigma_data^2 (Karras et al., 2022, table 1)

    float32, float64, bfloat16, float16, also mixed; computed in float32, the result is float32 (float64 if an input is). TypeError,
    ValueError on anything else. Differentiable in prediction and x0.
    """
    op = "denoising_loss"
    check_float(op, "x0", x0)
    check_like(op, "prediction", prediction, "x0", x0)
    check_choice(op, "target", target, TARGETS)
    check_choice(op, "weighting", weighting, (None, "min_snr", "p2", "edm"))
    for name, value in {"min_snr_gamma": min_snr_gamma, "p2_k": p2_k, "p2_gamma": p2_gamma, "sigma_data": sigma_data}.items():
        check_number(op, name, value)
    if key is None:
        raise TypeError(f"{op}: key must be the key that q_sample got, got None")
    prediction, x0 = same_precision((prediction, x0))
    alpha, sigma = _q_sample.coefficients(op, x0, timesteps, table)
    key = random.key_for(op, key, None, x0)
    weight = torch.ones_like(alpha)
    if weighting is not None:
        a2, s2 = alpha.square().clamp_min(1e-20), sigma.square().clamp_min(1e-20)
        snr = a2 / s2
        on_x0 = {
            "min_snr": lambda: snr.clamp_max(min_snr_gamma),
            "p2": lambda: snr / (p2_k + snr) ** p2_gamma,
            "edm": lambda: snr + 1 / sigma_data**2,
        }[weighting]()
        weight = on_x0 * {"eps": s2 / a2, "x0": torch.ones_like(s2), "v": s2, "flow": s2}[target]
    weight = weight / max(1, math.prod(x0.shape[1:]))
    return _op(prediction, x0, alpha, sigma, weight, key, list(TARGETS).index(target))


def _reference(prediction, x0, alpha, sigma, weight, key, target):
    dtype = working_type(prediction, x0)
    x = x0.to(dtype)
    eps = random.normal(key, x.shape, dtype=dtype, device=x.device)
    error = prediction.to(dtype) - _q_sample.target_of(x, eps, per_sample(alpha, x), per_sample(sigma, x), target)
    return (error.square() * per_sample(weight, x)).flatten(1).sum(1)


_op = Op(
    "denoising_loss",
    "(Tensor prediction, Tensor x0, Tensor alpha, Tensor sigma, Tensor weight, Tensor key, int target) -> Tensor",
    reference=_reference,
    fake=lambda prediction, x0, alpha, sigma, weight, key, target: prediction.new_empty(
        prediction.shape[:1], dtype=working_type(prediction, x0)
    ),
    differentiable=("prediction", "x0"),
)


@functools.wraps(denoising_loss)
def _with_a_key(*args, key=None, **options):
    """denoising_loss for the bench, which hands no key to either side."""
    return denoising_loss(*args, key=random.key(11) if key is None else key, **options)


_noise: dict = {}  # of the bench's last shape: what eager code has to keep


def _stored_noise(like):
    if like.shape not in _noise:
        _noise.clear()
        _noise[like.shape] = torch.randn(like.shape, dtype=like.dtype)
    return _noise[like.shape]


def _eager(prediction, x0, timesteps, table, key=None):  # target "v"
    abar = per_sample(table.to(x0.dtype)[timesteps], x0)
    target = abar.sqrt() * _stored_noise(x0) - (1 - abar).sqrt() * x0
    return F.mse_loss(prediction, target, reduction="none").flatten(1).mean(1)


def _arguments(make, shape):
    key = random.key(11, device=make.device)
    return {"prediction": make(shape), "x0": make(shape), **_q_sample.schedule(make, shape), "key": key}


def _key_per_sample(make, shape):
    return _arguments(make, shape) | {"key": random.split(random.key(11, device=make.device), shape[0])}


CASES = (
    Case(
        _with_a_key,
        _arguments,
        forms=(_key_per_sample,),
        shapes=SHAPES,
        variants=({"target": "v", "weighting": "min_snr"}, {}, {"target": "flow", "weighting": "p2"}),
        constants=("table",),
        eager=_eager,
        bytes=lambda shape, size: 2 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 4 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
        bench_variant={"target": "v"},
    ),
)
