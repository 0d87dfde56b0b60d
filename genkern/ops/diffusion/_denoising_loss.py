"""denoising_loss: the training loss of a diffusion model per sample, one pass each way."""

import functools
import math

import torch
import torch.nn.functional as F

from genkern import random
from genkern.core import Op
from genkern.ops._common import check_choice, check_float, check_like, check_number, same_precision, sum_per_sample, working_type
from genkern.ops.diffusion import _q_sample
from genkern.ops.diffusion._q_sample import BENCH_SHAPES, SHAPES, TARGETS, per_sample
from genkern.testing._case import Case


def denoising_loss(
    prediction,
    x0=None,
    timesteps=None,
    table=None,
    *,
    wanted=None,
    key=None,
    target="eps",
    weighting=None,
    min_snr_gamma=5.0,
    p2_k=1.0,
    p2_gamma=1.0,
    sigma_data=0.5,
):
    """w_t times the mean squared error of a prediction of `target`, per sample: (N,).

        x_t, wanted = q_sample(x0, timesteps, table, target="v")
        loss = denoising_loss(model(x_t, timesteps), wanted=wanted).mean()

    prediction      (N, ...), what the model makes of x_t
    wanted          (N, ...), the target, as q_sample returned it: read once forward and once backward. x0 and key are then not needed,
                    timesteps, table and target only for a weighting
    x0, timesteps, table, key, target
                    without `wanted`: as given to q_sample, and the target is made again from the key, in the backward pass too. That
                    costs the draw of its noise, several times the loss itself, and saves keeping `wanted`
    weighting       None: w = 1. Otherwise a weight on the error of x0, with snr = alpha^2 / sigma^2, converted to that of the target
                    (alpha^2 and sigma^2 count as at least 1e-20, so no weight is NaN where there is no signal or no noise):
                    "min_snr": min(snr, min_snr_gamma) (Hang et al., 2023);
                    "p2": snr / (p2_k + snr)^p2_gamma, that is (p2_k + snr)^-p2_gamma on the error of eps (Choi et al., 2022);
                    "edm": snr + 1 / sigma_data^2 (Karras et al., 2022, table 1)

    float32, float64, bfloat16, float16, also mixed; computed in float32, the result is float32 (float64 if an input is). TypeError,
    ValueError on anything else. Differentiable in prediction and in wanted or x0.
    """
    op = "denoising_loss"
    if wanted is None and (x0 is None or key is None):
        raise TypeError(f"{op}: give wanted, the target that q_sample returned, or x0, timesteps, table and the key that q_sample got")
    if wanted is not None and key is not None:
        raise ValueError(f"{op}: give wanted or key, not both")
    name, other = ("x0", x0) if wanted is None else ("wanted", wanted)
    check_float(op, name, other)
    check_like(op, "prediction", prediction, name, other)
    check_choice(op, "target", target, TARGETS)
    check_choice(op, "weighting", weighting, (None, "min_snr", "p2", "edm"))
    prediction, other = same_precision((prediction, other))
    if other.dim() < 1:
        raise ValueError(f"{op}: {name} must be (N, ...), got a scalar")
    alpha = sigma = None
    if weighting is not None:
        for argument, value in {"min_snr_gamma": min_snr_gamma, "p2_k": p2_k, "p2_gamma": p2_gamma, "sigma_data": sigma_data}.items():
            check_number(op, argument, value)
    if key is not None or weighting is not None:
        alpha, sigma = _q_sample.coefficients(op, other, timesteps, table)
    # A gradient of the target is written only where somebody needs it.
    pair = (other, None) if other.requires_grad else (None, other)
    noise = (None, None, None) if key is None else (alpha, sigma, random.key_for(op, key, None, other))
    loss = _op(prediction, *pair, *noise, 1 / max(1, math.prod(other.shape[1:])), list(TARGETS).index(target))
    if weighting is None:
        return loss
    a2, s2 = alpha.square().clamp_min(1e-20), sigma.square().clamp_min(1e-20)
    snr = a2 / s2
    on_x0 = {
        "min_snr": lambda: snr.clamp_max(min_snr_gamma),
        "p2": lambda: snr / (p2_k + snr) ** p2_gamma,
        "edm": lambda: snr + 1 / sigma_data**2,
    }[weighting]()
    return loss * (on_x0 * {"eps": s2 / a2, "x0": torch.ones_like(s2), "v": s2, "flow": s2}[target])


def _reference(prediction, other, fixed, alpha, sigma, key, scale, target):
    other = fixed if other is None else other
    dtype = working_type(prediction, other)
    x = other.to(dtype)
    if key is not None:
        eps = random.normal(key, x.shape, dtype=dtype, device=x.device)
        x = _q_sample.target_of(x, eps, per_sample(alpha, x), per_sample(sigma, x), target)
    return sum_per_sample((prediction.to(dtype) - x).square() * scale)


_op = Op(
    "denoising_loss",
    "(Tensor prediction, Tensor? other, Tensor? fixed, Tensor? alpha, Tensor? sigma, Tensor? key, float scale, int target) -> Tensor",
    reference=_reference,
    fake=lambda prediction, *rest: prediction.new_empty(prediction.shape[:1], dtype=working_type(prediction)),
    differentiable=("prediction", "other"),
)


@functools.wraps(denoising_loss)
def _of_case(prediction, timesteps, table, wanted=None, **options):
    """denoising_loss, its target given or made again, always with the table of a weighting."""
    return denoising_loss(prediction, timesteps=timesteps, table=table, wanted=wanted, **options)


def _eager(prediction, timesteps, table, wanted):
    return F.mse_loss(prediction, wanted, reduction="none").flatten(1).mean(1)


def _arguments(make, shape):
    return {"prediction": make(shape), "wanted": make(shape), **_q_sample.schedule(make, shape)}


def _made_again(make, shape):
    key = random.key(11, device=make.device)
    return {"prediction": make(shape), "x0": make(shape), **_q_sample.schedule(make, shape), "key": key}


def _key_per_sample(make, shape):
    return _made_again(make, shape) | {"key": random.split(random.key(11, device=make.device), shape[0])}


CASES = (
    Case(
        _of_case,
        _arguments,
        forms=(_made_again, _key_per_sample),
        shapes=SHAPES,
        variants=({"target": "v", "weighting": "min_snr"}, {}, {"target": "flow", "weighting": "p2"}),
        constants=("table", "wanted"),
        eager=_eager,
        bytes=lambda shape, size: 2 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 3 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
    ),
)
