"""reparameterize: a sample of a diagonal Gaussian latent with a gradient; reparameterize_kl: the same with its divergence."""

import math

import torch

from genkern import random
from genkern.core import Op
from genkern.ops._common import in_working_type, promoted, same_precision
from genkern.ops.vae import _latent
from genkern.ops.vae._gaussian_kl import BENCH_SHAPES, KL_FORMS, KL_VARIANTS, LATENT_VARIANTS, SHAPES, combined_moments
from genkern.testing._case import Case


def reparameterize(mu, log_var=None, *, key=None, generator=None, clamp=None):
    """z = mu + exp(log_var / 2) eps with eps ~ N(0, 1) (Kingma & Welling, 2014, section 2.4), differentiable in mu and log_var.

    mu, log_var     (N, ...) mean and log-variance (twice the log standard deviation); or log_var=None and mu (N, 2C, ...) holding
                    both moments as halves of dimension 1, read in place
    key             int64 (2,), or (N, 2) for one stream per sample, which then does not depend on its batch. The same key gives
                    the same noise. None: drawn from `generator`, or from torch's default generator (torch.manual_seed). Under
                    torch.func.vmap pass it
    clamp           None; (low, high): log_var is clamped first, its gradient is zero outside; "soft5": 5 tanh(x / 5) on mu and on
                    the log standard deviation (NVAE, Vahdat & Kautz, 2020)

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64), returned in the promoted type with the shape of
    the latent. TypeError, ValueError on anything else. The noise is regenerated in the backward pass: only the key is kept.
    """
    if not _latent.plain_pair(mu, log_var):
        _latent.check_moments("reparameterize", mu, log_var)
        mu, log_var = same_precision((mu, log_var))
    low, high, soft = _latent.check_clamp("reparameterize", clamp)
    key = random.key_for("reparameterize", key, generator, mu)
    return _reparameterize(mu, log_var, key, low, high, soft)


def reparameterize_kl(
    mu,
    log_var=None,
    prior_mu=None,
    prior_log_var=None,
    *,
    key=None,
    generator=None,
    clamp=None,
    free_bits=0.0,
    reduction="sample",
):
    """(z, kl) = (reparameterize(mu, log_var), gaussian_kl(mu, log_var, prior_mu, prior_log_var)) in one pass over memory.

    Arguments, types and errors as in those two; z has the promoted type of mu and log_var, kl is float32 (float64 if an input is).
    """
    _latent.check_moments("reparameterize_kl", mu, log_var)
    _latent.check_prior("reparameterize_kl", mu, log_var, prior_mu, prior_log_var)
    low, high, soft = _latent.check_clamp("reparameterize_kl", clamp)
    per_element = _latent.check_reduction("reparameterize_kl", reduction, free_bits)
    key = random.key_for("reparameterize_kl", key, generator, mu)
    tensors = same_precision((mu, log_var, prior_mu, prior_log_var))
    z, kl = _reparameterize_kl(*tensors, key, low, high, soft, float(free_bits), per_element)
    return z, kl.sum() if reduction == "total" else kl


def _sample(mu, log_var, key):
    eps = random.normal(key, mu.shape, dtype=mu.dtype, device=mu.device)
    return mu + torch.exp(0.5 * log_var) * eps


def _reference(mu, log_var, key, low, high, soft):
    mu, log_var = _latent.moments(mu, log_var)
    dtype = promoted(mu, log_var)
    mu, log_var = _latent.clamped(*in_working_type(mu, log_var), low, high, soft)
    return _sample(mu, log_var, key).to(dtype)


def _reference_kl(mu, log_var, prior_mu, prior_log_var, key, low, high, soft, free_bits, per_element):
    mu, log_var = _latent.moments(mu, log_var)
    dtype = promoted(mu, log_var)
    mu, log_var = _latent.clamped(*in_working_type(mu, log_var), low, high, soft)
    kl = _latent.divergence(mu, log_var, prior_mu, prior_log_var, free_bits, per_element)
    return _sample(mu, log_var, key).to(dtype), kl


_reparameterize = Op(
    "reparameterize",
    "(Tensor mu, Tensor? log_var, Tensor key, float low, float high, bool soft) -> Tensor",
    reference=_reference,
    fake=lambda mu, log_var, key, low, high, soft: _latent.empty_like_mu(mu, log_var, promoted(mu, log_var)),
    differentiable=("mu", "log_var"),
    passes=lambda mu, log_var, key, low, high, soft: _latent.passes(log_var, low, high, soft),
)

_reparameterize_kl = Op(
    "reparameterize_kl",
    "(Tensor mu, Tensor? log_var, Tensor? prior_mu, Tensor? prior_log_var, Tensor key, float low, float high, bool soft, "
    "float free_bits, bool per_element) -> (Tensor, Tensor)",
    reference=_reference_kl,
    fake=lambda mu, log_var, prior_mu, prior_log_var, key, low, high, soft, free_bits, per_element: (
        _latent.empty_like_mu(mu, log_var, promoted(mu, log_var)),
        _latent.empty_kl(mu, log_var, per_element),
    ),
    differentiable=("mu", "log_var", "prior_mu", "prior_log_var"),
)


def _eager(mu, log_var, key=None):
    return mu + torch.exp(0.5 * log_var) * torch.randn_like(mu)


def _eager_kl(mu, log_var, key=None):
    kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).flatten(1).sum(1)
    return _eager(mu, log_var, key), kl


def _arguments(make, shape):
    return {"mu": make(shape), "log_var": make(shape), "key": random.key(11, device=make.device)}


def _key_per_sample(make, shape):
    return _arguments(make, shape) | {"key": random.split(random.key(11, device=make.device), shape[0])}


def _keyed(form):
    return lambda make, shape: form(make, shape) | {"key": random.key(11, device=make.device)}


CASES = (
    Case(
        reparameterize,
        _arguments,
        forms=(_key_per_sample, _keyed(combined_moments)),
        shapes=SHAPES,
        variants=({}, *LATENT_VARIANTS),
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 5 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
    ),
    Case(
        reparameterize_kl,
        _arguments,
        forms=(_key_per_sample, *map(_keyed, KL_FORMS)),
        shapes=SHAPES,
        variants=KL_VARIANTS,
        eager=_eager_kl,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 5 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
    ),
)
