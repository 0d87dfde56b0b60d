"""gaussian_kl: the divergence of a diagonal Gaussian from a standard or a learned Gaussian prior."""

import math

from genkern.core import Op
from genkern.ops._common import in_working_type, same_precision
from genkern.ops.vae import _latent
from genkern.testing._case import Case


def gaussian_kl(mu, log_var=None, prior_mu=None, prior_log_var=None, *, clamp=None, free_bits=0.0, reduction="sample"):
    """Kullback-Leibler divergence KL(N(mu, e^log_var) || prior) of a diagonal Gaussian latent, in nats.

    Per element 1/2 (mu^2 + e^log_var - 1 - log_var) to the standard normal (Kingma & Welling, 2014, appendix B), and with
    d = log_var - prior_log_var, 1/2 ((mu - prior_mu)^2 e^-prior_log_var + e^d - 1 - d) to a learned prior. Evaluated without
    cancellation near zero, summed in double precision.

    mu, log_var     (N, ...) mean and log-variance (twice the log standard deviation); or log_var=None and mu (N, 2C, ...) holding
                    both moments as halves of dimension 1, read in place
    prior_mu, prior_log_var
                    the same for a learned prior; None: the standard normal
    clamp           None; (low, high): log_var is clamped first, its gradient is zero outside; "soft5": 5 tanh(x / 5) on mu and on
                    the log standard deviation (NVAE, Vahdat & Kautz, 2020). The prior is not clamped
    free_bits       at least this many nats per element count, without gradient below (Kingma et al., 2016)
    reduction       "sample": (N,), "element": the shape of the latent, "total": one number

    float32, float64, bfloat16, float16, also mixed; the result is float32 (float64 if an input is). TypeError, ValueError on
    anything else. Differentiable to any order.
    """
    _latent.check_moments("gaussian_kl", mu, log_var)
    _latent.check_prior("gaussian_kl", mu, log_var, prior_mu, prior_log_var)
    low, high, soft = _latent.check_clamp("gaussian_kl", clamp)
    per_element = _latent.check_reduction("gaussian_kl", reduction, free_bits)
    tensors = same_precision((mu, log_var, prior_mu, prior_log_var))
    kl = _op(*tensors, low, high, soft, float(free_bits), per_element)
    return kl.sum() if reduction == "total" else kl


def _reference(mu, log_var, prior_mu, prior_log_var, low, high, soft, free_bits, per_element):
    mu, log_var = in_working_type(*_latent.moments(mu, log_var))
    mu, log_var = _latent.clamped(mu, log_var, low, high, soft)
    return _latent.divergence(mu, log_var, prior_mu, prior_log_var, free_bits, per_element)


_op = Op(
    "gaussian_kl",
    "(Tensor mu, Tensor? log_var, Tensor? prior_mu, Tensor? prior_log_var, float low, float high, bool soft, float free_bits, "
    "bool per_element) -> Tensor",
    reference=_reference,
    fake=lambda mu, log_var, prior_mu, prior_log_var, low, high, soft, free_bits, per_element: _latent.empty_kl(
        mu, log_var, per_element
    ),
    differentiable=("mu", "log_var", "prior_mu", "prior_log_var"),
)


def _eager(mu, log_var):
    return -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).flatten(1).sum(1)


SHAPES = ((5, 37), (1, 1), (0, 4), (3, 0), (2, 3, 5, 7), (3, 1031), (7, 16))
BENCH_SHAPES = ((8, 64), (128, 128), (8, 4, 128, 128), (256, 4096))
LATENT_VARIANTS = ({"clamp": (-0.5, 0.7)}, {"clamp": "soft5"})
KL_VARIANTS = ({}, {"free_bits": 0.3}, {"reduction": "element"}, {"reduction": "total"}, *LATENT_VARIANTS)


def _learned_prior(make, shape):
    return {name: make(shape) for name in ("mu", "log_var", "prior_mu", "prior_log_var")}


def combined_moments(make, shape):
    return {"mu": make((shape[0], 2 * shape[1], *shape[2:]))}


def _combined_moments_and_prior(make, shape):
    return combined_moments(make, shape) | {"prior_mu": combined_moments(make, shape)["mu"]}


KL_FORMS = (_learned_prior, combined_moments, _combined_moments_and_prior)

CASES = (
    Case(
        gaussian_kl,
        lambda make, shape: {"mu": make(shape), "log_var": make(shape)},
        forms=KL_FORMS,
        shapes=SHAPES,
        variants=KL_VARIANTS,
        eager=_eager,
        bytes=lambda shape, size: 2 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 4 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
    ),
)
