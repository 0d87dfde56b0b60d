"""q_sample: noised data and the target of a diffusion model in one pass."""

import math

import torch

from genkern import random
from genkern.core import Op
from genkern.ops._common import check_choice, check_device, check_float, working_type
from genkern.testing._case import Case

# What a model predicts: (on_x0, sigma_on_x0, on_eps, alpha_on_eps) of
# target = (on_x0 + sigma_on_x0 sigma) x0 + (on_eps + alpha_on_eps alpha) eps. The order is that of csrc/diffusion/q_sample.h.
TARGETS = {
    "eps": (0, 0, 1, 0),
    "x0": (1, 0, 0, 0),
    "v": (0, -1, 0, 1),
    "flow": (-1, 0, 1, 0),
}


def q_sample(x0, timesteps, table, *, key=None, generator=None, target="eps"):
    """(x_t, target): x_t = alpha_t x0 + sigma_t eps with eps ~ N(0, 1), each sample at its own t (Ho et al., 2020, equation 4).

    target          "eps"; "x0"; "v": alpha eps - sigma x0 (Salimans & Ho, 2022, appendix D); "flow": eps - x0 (Lipman et al., 2023)
    x0              (N, ...)
    timesteps       int64 (N,), indices into the table
    table           alphas_cumprod (T,), then alpha = sqrt(alphas_cumprod), sigma = sqrt(1 - alphas_cumprod); or a pair
                    (alphas, sigmas), each (T,), for any other process, such as (1 - t, t) for flow matching
    key             int64 (2,), or (N, 2) for one stream per sample, which then does not depend on its batch. The same key gives the
                    same noise. None: drawn from `generator`, or from torch's default generator. Under torch.func.vmap pass it

    float32, float64, bfloat16, float16. The coefficients are float32 whatever the type of x0 (float64 if that is float64), so is the
    arithmetic; both results have the type of x0. TypeError, ValueError on anything else; IndexError for a timestep outside the table
    on the CPU. Differentiable in x0.
    """
    check_float("q_sample", "x0", x0)
    check_choice("q_sample", "target", target, TARGETS)
    alpha, sigma = coefficients("q_sample", x0, timesteps, table)
    key = random.key_for("q_sample", key, generator, x0)
    return _op(x0, alpha, sigma, key, list(TARGETS).index(target))


def coefficients(op, x0, timesteps, table):
    """alpha and sigma of each sample, (N,), in the working type of x0."""
    if x0.dim() < 1:
        raise ValueError(f"{op}: x0 must be (N, ...), got a scalar")
    if not isinstance(timesteps, torch.Tensor) or timesteps.dtype != torch.int64:
        raise TypeError(f"{op}: timesteps must be an int64 tensor, got {getattr(timesteps, 'dtype', type(timesteps).__name__)}")
    if tuple(timesteps.shape) != (x0.shape[0],):
        raise ValueError(f"{op}: timesteps must have shape (N,) = ({x0.shape[0]},), got {tuple(timesteps.shape)}")
    tables = table if isinstance(table, (tuple, list)) else (table,)
    if len(tables) not in (1, 2):
        raise ValueError(f"{op}: table must be alphas_cumprod or a pair (alphas, sigmas), got {len(tables)} tensors")
    for t in tables:
        check_float(op, "table", t, dims=1)
    for name, t in (("timesteps", timesteps), *(("table", t) for t in tables)):
        if t.device.type == "meta":
            check_device(op, name, t, "x0", x0)
    dtype, timesteps = working_type(x0), timesteps.to(x0.device)
    try:
        first, *second = [t.detach().to(x0.device, dtype).index_select(0, timesteps) for t in tables]
    except IndexError:
        length, low, high = min(map(len, tables)), int(timesteps.min()), int(timesteps.max())
        raise IndexError(f"{op}: timesteps must be in 0 .. {length - 1}, the table's length, got {low} .. {high}") from None
    return (first, second[0]) if second else (first.sqrt(), torch.rsub(first, 1).sqrt_())


def per_sample(t, like):
    """(N,) as (N, 1, ...), to go with a tensor (N, ...)."""
    return t.reshape(-1, *(1 for _ in like.shape[1:]))


def target_of(x0, eps, alpha, sigma, target):
    on_x0, sigma_on_x0, on_eps, alpha_on_eps = list(TARGETS.values())[target]
    return (on_x0 + sigma_on_x0 * sigma) * x0 + (on_eps + alpha_on_eps * alpha) * eps


def _reference(x0, alpha, sigma, key, target):
    dtype, x = x0.dtype, x0.to(working_type(x0))
    eps = random.normal(key, x.shape, dtype=x.dtype, device=x.device)
    alpha, sigma = per_sample(alpha, x), per_sample(sigma, x)
    return (alpha * x + sigma * eps).to(dtype), target_of(x, eps, alpha, sigma, target).to(dtype)


_op = Op(
    "q_sample",
    "(Tensor x0, Tensor alpha, Tensor sigma, Tensor key, int target) -> (Tensor, Tensor)",
    reference=_reference,
    fake=lambda x0, alpha, sigma, key, target: (x0.new_empty(x0.shape), x0.new_empty(x0.shape)),
    differentiable=("x0",),
)


def _eager(x0, timesteps, table, key=None):  # target "v"
    eps = torch.randn_like(x0)
    abar = per_sample(table.to(x0.dtype)[timesteps], x0)
    alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
    return alpha * x0 + sigma * eps, alpha * eps - sigma * x0


def schedule(make, shape):
    """Timesteps and alphas_cumprod of a case: eleven steps, the last one almost without signal."""
    table = torch.linspace(0.99, 0.01, 11, dtype=torch.float32, device=make.device)
    return {"timesteps": (7 * torch.arange(shape[0], device=make.device) + 3) % 11, "table": table}


def _arguments(make, shape):
    return {"x0": make(shape), **schedule(make, shape), "key": random.key(11, device=make.device)}


def _key_per_sample(make, shape):
    return _arguments(make, shape) | {"key": random.split(random.key(11, device=make.device), shape[0])}


SHAPES = ((5, 37), (0, 4), (3, 0), (2, 3, 5, 7), (3, 1031))
BENCH_SHAPES = ((8, 3, 32, 32), (128, 3, 32, 32), (8, 3, 256, 256))

CASES = (
    Case(
        q_sample,
        _arguments,
        forms=(_key_per_sample,),
        shapes=SHAPES,
        variants=({}, {"target": "v"}, {"target": "flow"}, {"target": "x0"}),
        constants=("table",),
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 3 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
        bench_variant={"target": "v"},
    ),
)
