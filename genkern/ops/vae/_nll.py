"""bernoulli_nll and gaussian_nll: negative log-likelihoods of a decoder's output, per sample."""

import math

import torch
import torch.nn.functional as F

from genkern.core import Op
from genkern.ops._common import check_float, check_like, in_working_type, same_precision, working_type
from genkern.ops.vae import _latent
from genkern.testing._case import Case


def bernoulli_nll(logits, x):
    """Negative log-likelihood of x under independent Bernoulli(sigmoid(logits)), summed over each sample, in nats: (N,).

    Per element softplus(l) - x l = -x ln p - (1 - x) ln(1 - p) with p = sigmoid(l) (Kingma & Welling, 2014, appendix C.1),
    finite for every finite logit. A grey x in [0, 1] counts as the probability of a one; values are not looked at.

    logits, x   (N, ...) of one shape, float32, float64, bfloat16, float16, also mixed. x is data: it has no gradient

    The result is float32 (float64 if an input is). Differentiable to any order in logits. TypeError, ValueError on anything
    else.
    """
    _check("bernoulli_nll", "logits", logits, x)
    return _bernoulli(*same_precision((logits, x)))


def gaussian_nll(mu, log_var, x):
    """Negative log-likelihood of x under N(mu, e^log_var), summed over each sample, in nats, constant included: (N,).

    Per element 1/2 ((x - mu)^2 e^-log_var + log_var + ln 2 pi) (Kingma & Welling, 2014, appendix C.2). The variance is not
    bounded from below.

    mu, x       (N, ...) of one shape. x is data: it has no gradient
    log_var     log-variance of the shape of mu or one that expands to it, such as one learned number; None: unit variance

    float32, float64, bfloat16, float16, also mixed; the result is float32 (float64 if an input is). Differentiable to any order
    in mu and log_var. TypeError, ValueError on anything else.
    """
    _check("gaussian_nll", "mu", mu, x)
    if log_var is not None:
        check_float("gaussian_nll", "log_var", log_var)
        if log_var.shape != mu.shape:
            try:
                log_var = log_var.expand_as(mu)
            except RuntimeError:
                shapes = f"{tuple(mu.shape)} and {tuple(log_var.shape)}"
                raise ValueError(f"gaussian_nll: log_var must expand to the shape of mu, got {shapes}") from None
        check_like("gaussian_nll", "log_var", log_var, "mu", mu)
    return _gaussian(*same_precision((mu, log_var, x)))


def _check(op, name, parameter, x):
    if not _latent._plain_pair(parameter, x):  # the usual pair is seen at once: at small sizes the checks are a good part of the call
        check_float(op, name, parameter)
        check_like(op, "x", x, name, parameter)
    if parameter.dim() < 2:
        raise ValueError(f"{op}: {name} must be (N, ...) with at least 2 dimensions, got {tuple(parameter.shape)}")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: x is data and has no gradient here, got one that requires it; detach it")


def _bernoulli_reference(logits, x):
    logits, x = in_working_type(logits, x)
    return (F.relu(logits) - logits * x + torch.log1p(torch.exp(-logits.abs()))).flatten(1).sum(1)


def _gaussian_reference(mu, log_var, x):
    mu, log_var, x = in_working_type(mu, log_var, x)
    twice = (x - mu).square() + math.log(2 * math.pi)
    if log_var is not None:
        twice = (x - mu).square() * torch.exp(-log_var) + log_var + math.log(2 * math.pi)
    return 0.5 * twice.flatten(1).sum(1)


_bernoulli = Op(
    "bernoulli_nll",
    "(Tensor logits, Tensor x) -> Tensor",
    reference=_bernoulli_reference,
    fake=lambda logits, x: logits.new_empty(logits.shape[0], dtype=working_type(logits, x)),
    differentiable=("logits",),
)
_gaussian = Op(
    "gaussian_nll",
    "(Tensor mu, Tensor? log_var, Tensor x) -> Tensor",
    reference=_gaussian_reference,
    fake=lambda mu, log_var, x: mu.new_empty(mu.shape[0], dtype=working_type(mu, log_var, x)),
    differentiable=("mu", "log_var"),
)

SHAPES = ((5, 37), (0, 4), (3, 0), (2, 3, 5, 7), (3, 1031))
BENCH_SHAPES = ((8, 64), (128, 784), (256, 3, 32, 32))

CASES = (
    Case(
        bernoulli_nll,
        lambda make, shape: {"logits": make(shape, 3.0), "x": make(shape).sigmoid()},
        shapes=SHAPES,
        constants=("x",),
        eager=lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1),
        bytes=lambda shape, size: 2 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 3 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
    ),
    Case(
        gaussian_nll,
        lambda make, shape: {"mu": make(shape), "log_var": make(shape), "x": make(shape)},
        forms=(lambda make, shape: {"mu": make(shape), "log_var": None, "x": make(shape)},),
        shapes=SHAPES,
        constants=("x",),
        eager=lambda mu, log_var, x: 0.5 * ((x - mu) ** 2 * (-log_var).exp() + log_var + math.log(2 * math.pi)).flatten(1).sum(1),
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 5 * size * math.prod(shape),
        bench_shapes=BENCH_SHAPES,
    ),
)
