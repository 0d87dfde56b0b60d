"""log_importance_weight: the weight of a posterior sample, and the running sum of weights that the importance-weighted bound is."""

import math

import torch

from genkern.core import Op
from genkern.ops._common import check_device, check_float, check_shape, in_working_type, same_precision, sum_per_sample, working_type
from genkern.ops.vae import _latent
from genkern.ops.vae._gaussian_kl import BENCH_SHAPES, combined_moments
from genkern.testing._case import Case


def log_importance_weight(nll, z, mu, log_var=None, *, log_sum=None):
    """log w = log p(x|z) + log p(z) - log q(z|x) with p(z) = N(0, I) and q(z|x) = N(mu, e^log_var), added to a running sum.

    Without log_sum: log w. With the log of the sum of earlier weights: log(e^log_sum + w). So K samples need no stack of K:

        log_sum = None
        for key in random.split(key, K).unbind(-2):
            z = reparameterize(mu, log_var, key=key)
            log_sum = log_importance_weight(nll(x, z), z, mu, log_var, log_sum=log_sum)
        bound = log_sum - log(K)

    is the bound of Burda et al. (2016, equation 8), and its gradient weighs the samples by w / sum w (their equation 14). Per
    element log p(z) - log q(z|x) = 1/2 ((z - mu)^2 e^-log_var + log_var - z^2); ln 2 pi cancels.

    nll             (N,) -log p(x|z) in nats
    z               (N, ...) the sample
    mu, log_var     of the shape of z; or log_var=None and mu (N, 2C, ...) holding both moments as halves of dimension 1
    log_sum         (N,), or None; -inf is the log of no weight

    float32, float64, bfloat16, float16, also mixed. Returns (N,), float32 (float64 if an input is), differentiable in all arguments
    to any order. TypeError, ValueError on anything else.
    """
    op = "log_importance_weight"
    _latent.check_moments(op, mu, log_var)
    check_float(op, "z", z)
    shape = _latent.latent_shape(mu, log_var)
    check_shape(op, "z", z, shape, "that of mu")
    check_device(op, "z", z, "mu", mu)
    for name, x in (("nll", nll), ("log_sum", log_sum)):
        if x is not None or name == "nll":
            check_float(op, name, x)
            check_shape(op, name, x, shape[:1], "(N,)")
            check_device(op, name, x, "mu", mu)
    nll, z, mu, log_var, log_sum = same_precision((nll, z, mu, log_var, log_sum))
    return _op(nll, z, mu, log_var, log_sum)


def _reference(nll, z, mu, log_var, log_sum):
    nll, z, log_sum, mu, log_var = in_working_type(nll, z, log_sum, *_latent.moments(mu, log_var))
    ratio = 0.5 * ((z - mu).square() * torch.exp(-log_var) + log_var - z.square())
    log_w = sum_per_sample(ratio) - nll
    return log_w if log_sum is None else torch.logaddexp(log_sum, log_w)


_op = Op(
    "log_importance_weight",
    "(Tensor nll, Tensor z, Tensor mu, Tensor? log_var, Tensor? log_sum) -> Tensor",
    reference=_reference,
    fake=lambda nll, *rest: nll.new_empty(nll.shape, dtype=working_type(nll, *rest)),
    differentiable=("nll", "z", "mu", "log_var", "log_sum"),
)


def _eager(nll, z, mu, log_var, log_sum):
    log_prior = torch.distributions.Normal(0.0, 1.0, validate_args=False).log_prob(z).flatten(1).sum(1)
    log_posterior = torch.distributions.Normal(mu, (0.5 * log_var).exp(), validate_args=False).log_prob(z).flatten(1).sum(1)
    return torch.logaddexp(log_sum, log_prior - log_posterior - nll)


def _arguments(make, shape):
    size = math.prod(shape[1:])
    return {
        "nll": make(shape[:1]) + 0.1 * size,
        "z": make(shape),
        "mu": make(shape),
        "log_var": make(shape),
        "log_sum": make(shape[:1]),
    }


def _first_sample(make, shape):
    return _arguments(make, shape) | {"log_sum": None}


def _combined(make, shape):
    return {"nll": make(shape[:1]), "z": make(shape), **combined_moments(make, shape), "log_sum": make(shape[:1])}


CASES = (
    Case(
        log_importance_weight,
        _arguments,
        forms=(_first_sample, _combined),
        shapes=((5, 37), (1, 1), (0, 4), (3, 0), (2, 3, 5, 7), (3, 1031)),
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 6 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
    ),
)
