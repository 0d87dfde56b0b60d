"""What the ops on a diagonal Gaussian latent share: argument checks, the clamp and the divergence in plain torch."""

import math

import torch

from genkern.ops._common import FLOATS, check_device, check_float, check_number, in_working_type, sum_per_sample, working_type

# ---- reference pieces


def moments(mu, log_var):
    """(mu, log_var) from two tensors, or from the two halves of one (N, 2C, ...) along dimension 1."""
    return mu.chunk(2, 1) if log_var is None else (mu, log_var)


def latent_shape(mu, log_var):
    return tuple(mu.shape) if log_var is not None else (mu.shape[0], mu.shape[1] // 2, *mu.shape[2:])


def clamped(mu, log_var, low, high, soft):
    if soft:
        return 5 * torch.tanh(mu / 5), 10 * torch.tanh(log_var / 10)
    unbounded = low == -math.inf and high == math.inf
    return mu, log_var if unbounded else _clamp(log_var, low, high)


def passes(log_var, low, high, soft):
    """Whether the gradient of z = mu + sigma eps is also that of mu: it is not clamped and no half of a tensor."""
    return log_var is not None and not soft and low == -math.inf and high == math.inf


def _clamp(x, low, high):
    """x.clamp(low, high) whose gradient at the bounds is one; torch's own is one or zero there, by version."""
    return torch.where(x < low, low, torch.where(x > high, high, x))


def divergence(mu, log_var, prior_mu, prior_log_var, free_bits, per_element):
    """Equation 10 of Kingma & Welling (2014), for any diagonal Gaussian prior: 1/2 (q + e^d - 1 - d)."""
    if prior_mu is None:
        kl = 0.5 * (mu.square() + (torch.expm1(log_var) - log_var))
    else:
        prior_mu, prior_log_var = in_working_type(*moments(prior_mu, prior_log_var), mu)[:2]
        d = log_var - prior_log_var
        kl = 0.5 * ((mu - prior_mu).square() * torch.exp(-prior_log_var) + (torch.expm1(d) - d))
    if free_bits > 0:
        kl = _clamp(kl, free_bits, math.inf)
    return kl if per_element else sum_per_sample(kl)


# ---- fakes


def empty_like_mu(mu, log_var, dtype):
    return mu.new_empty(latent_shape(mu, log_var), dtype=dtype)


def empty_kl(mu, log_var, per_element):
    dtype = working_type(mu, log_var)
    return empty_like_mu(mu, log_var, dtype) if per_element else mu.new_empty(mu.shape[0], dtype=dtype)


# ---- argument checks


def check_moments(op, mu, log_var, names=("mu", "log_var")):
    """Raise in words a user understands unless (mu, log_var) is a pair of moments, or mu holds both halves."""
    if plain_pair(mu, log_var):
        return
    for name, x in zip(names, (mu, log_var), strict=True):
        if x is None and name is names[1]:
            continue
        check_float(op, name, x)
        if x.dim() == 0:
            raise ValueError(f"{op}: {name} needs a batch dimension, got shape ()")
    if log_var is None:
        if mu.dim() < 2 or mu.shape[1] % 2:
            raise ValueError(f"{op}: without {names[1]}, {names[0]} must hold both moments as (N, 2C, ...), got {tuple(mu.shape)}")
    elif log_var.shape != mu.shape:
        raise ValueError(f"{op}: {names[1]} must have the shape of {names[0]}, got {tuple(mu.shape)} and {tuple(log_var.shape)}")
    else:
        check_device(op, names[1], log_var, names[0], mu)


def plain_pair(mu, log_var):
    """The usual case, seen at once: at small sizes the checks are a good part of the call."""
    if not isinstance(mu, torch.Tensor) or not isinstance(log_var, torch.Tensor) or mu.dtype is not log_var.dtype:
        return False
    return mu.dtype in FLOATS and mu.shape == log_var.shape != () and mu.device == log_var.device


def check_prior(op, mu, log_var, prior_mu, prior_log_var):
    if prior_mu is None:
        if prior_log_var is not None:
            raise ValueError(f"{op}: prior_log_var was given without prior_mu")
        return
    check_moments(op, prior_mu, prior_log_var, ("prior_mu", "prior_log_var"))
    shape, prior_shape = latent_shape(mu, log_var), latent_shape(prior_mu, prior_log_var)
    if shape != prior_shape:
        raise ValueError(f"{op}: the prior must have the shape of the posterior, got {shape} and {prior_shape}")
    check_device(op, "prior_mu", prior_mu, "mu", mu)


_UNBOUNDED = (-math.inf, math.inf, False)


def check_clamp(op, clamp):
    """(low, high, soft) of clamp=None | (low, high) | "soft5"."""
    if clamp is None:
        return _UNBOUNDED
    if clamp == "soft5":
        return (-math.inf, math.inf, True)
    numbers = isinstance(clamp, (tuple, list)) and len(clamp) == 2 and all(isinstance(bound, (int, float)) for bound in clamp)
    if numbers and clamp[0] <= clamp[1]:
        return (float(clamp[0]), float(clamp[1]), False)
    raise ValueError(f'{op}: clamp must be None, (low, high) with low <= high, or "soft5", got {clamp!r}')


def check_reduction(op, reduction, free_bits):
    if reduction not in ("sample", "element", "total"):
        raise ValueError(f'{op}: reduction must be "sample", "element" or "total", got {reduction!r}')
    check_number(op, "free_bits", free_bits)
    if not free_bits >= 0:
        raise ValueError(f"{op}: free_bits must be at least 0 nats, got {free_bits}")
    return reduction == "element"
