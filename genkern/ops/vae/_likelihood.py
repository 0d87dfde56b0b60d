"""Negative log-likelihoods of a decoder's distributions: bernoulli_nll, gaussian_nll, discretized_logistic_nll."""

import math

import torch
import torch.nn.functional as F

from genkern.core import Op, backend
from genkern.ops._common import (
    FLOATS,
    check_float,
    check_int,
    check_like,
    expanded,
    in_working_type,
    same_precision,
    sum_per_sample,
    working_type,
)
from genkern.testing._case import Case


def bernoulli_nll(logits, x):
    """-log p(x) of independent Bernoulli pixels with p = sigmoid(logits): the sum of softplus(l) - x l over each sample.

    The first term of the bound of Kingma & Welling (2014, appendix C.1). x between 0 and 1 counts as the probability of a one.

    logits, x       (N, ...) of one shape; x is data in [0, 1] (not looked at); where it requires a gradient, the reference serves

    float32, float64, bfloat16, float16, also mixed. Returns nats (N,), float32 (float64 if an input is), differentiable in logits
    to any order. TypeError, ValueError on anything else.
    """
    if not _alike(logits, x):
        _check("bernoulli_nll", x, logits=logits)
        logits, x = same_precision((logits, x))
    return _run(_bernoulli, x, logits, x)


def gaussian_nll(mu, log_var, x):
    """-log p(x) of independent Gaussian pixels: the sum of 1/2 ((x - mu)^2 e^-log_var + log_var + ln 2 pi) over each sample.

    mu, x           (N, ...) of one shape; where x, the data, requires a gradient, the reference serves
    log_var         of that shape, or a tensor that broadcasts to it such as one learned number (), or None: variance 1

    float32, float64, bfloat16, float16, also mixed. Returns nats (N,), float32 (float64 if an input is), differentiable in mu and
    log_var to any order. TypeError, ValueError on anything else. (Kingma & Welling, 2014, appendix C.2)
    """
    if _alike(mu, log_var, x):
        return _run(_gaussian, x, mu, log_var, x)
    _check("gaussian_nll", x, mu=mu)
    if log_var is not None:
        check_float("gaussian_nll", "log_var", log_var)
        log_var = expanded("gaussian_nll", "log_var", log_var, "mu", mu.shape)
        check_like("gaussian_nll", "log_var", log_var, "mu", mu)
    return _run(_gaussian, x, *same_precision((mu, log_var, x)))


def discretized_logistic_nll(mu, log_scale, x, *, levels=256):
    """-log P(x) of independent pixels on a grid of levels under a logistic distribution, summed over each sample.

    A level at x owns the bin (x - h, x + h), h = 1 / (levels - 1); the first and the last bin reach to infinity, so that the
    probabilities of all levels add up to one (Kingma et al., 2016, "Improved variational inference with inverse autoregressive
    flow", section 5.1; Salimans et al., 2017, equation 2). With a = (x + h - mu) / s, b = (x - h - mu) / s and d = a - b,

        sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - e^-d),

    so the logarithm needs no difference of neighbouring numbers: softplus(-a) + softplus(b) - ln(1 - e^-d), exact in both tails.

    mu, log_scale, x    (N, ...) of one shape; x is data on the grid -1, -1 + 2h, ..., 1 (not looked at); where it requires a
                        gradient, the reference serves
    levels              at least 2

    float32, float64, bfloat16, float16, also mixed. Returns nats (N,), float32 (float64 if an input is), differentiable in mu and
    log_scale to any order. TypeError, ValueError on anything else.
    """
    if not _alike(mu, log_scale, x):
        _check("discretized_logistic_nll", x, mu=mu, log_scale=log_scale)
        mu, log_scale, x = same_precision((mu, log_scale, x))
    check_int("discretized_logistic_nll", "levels", levels, 2)
    return _run(_discretized_logistic, x, mu, log_scale, x, levels)


def _check(op, x, **parameters):
    (name, first), *others = parameters.items()
    check_float(op, name, first)
    if first.dim() == 0:
        raise ValueError(f"{op}: {name} needs a batch dimension, got shape ()")
    for other, tensor in (*others, ("x", x)):
        check_like(op, other, tensor, name, first)


def _alike(first, *others):
    """The usual case, seen at once: at small sizes the checks are a good part of the call."""
    if not isinstance(first, torch.Tensor) or first.dtype not in FLOATS or first.dim() == 0:
        return False
    for x in others:
        if not isinstance(x, torch.Tensor) or x.dtype is not first.dtype or x.shape != first.shape or x.device != first.device:
            return False
    return True


def _run(op, x, *args):
    if not x.requires_grad:
        return op(*args)
    with backend("reference"):  # the kernels have no gradient to the data
        return op(*args)


def _bernoulli_reference(logits, x):
    logits, x = in_working_type(logits, x)
    return sum_per_sample(F.binary_cross_entropy_with_logits(logits, x, reduction="none"))


def _gaussian_reference(mu, log_var, x):
    mu, log_var, x = in_working_type(mu, log_var, x)
    twice = (x - mu).square() if log_var is None else (x - mu).square() * torch.exp(-log_var) + log_var
    return sum_per_sample(0.5 * (twice + math.log(2 * math.pi)))


def _discretized_logistic_reference(mu, log_scale, x, levels):
    mu, log_scale, x = in_working_type(mu, log_scale, x)
    h, inverse_scale = 1 / (levels - 1), torch.exp(-log_scale)
    below = -F.logsigmoid((x - mu + h) * inverse_scale)
    above = -F.logsigmoid((mu + h - x) * inverse_scale)
    inside = below + above - torch.log(-torch.expm1(-2 * h * inverse_scale))
    return sum_per_sample(torch.where(x < h - 1, below, torch.where(x > 1 - h, above, inside)))


def _fake(first, *rest):
    tensors = [t for t in (first, *rest) if isinstance(t, torch.Tensor)]
    return first.new_empty(first.shape[0], dtype=working_type(*tensors))


_bernoulli = Op(
    "bernoulli_nll",
    "(Tensor logits, Tensor x) -> Tensor",
    reference=_bernoulli_reference,
    fake=_fake,
    differentiable=("logits",),
)
_gaussian = Op(
    "gaussian_nll",
    "(Tensor mu, Tensor? log_var, Tensor x) -> Tensor",
    reference=_gaussian_reference,
    fake=_fake,
    differentiable=("mu", "log_var"),
)
_discretized_logistic = Op(
    "discretized_logistic_nll",
    "(Tensor mu, Tensor log_scale, Tensor x, int levels) -> Tensor",
    reference=_discretized_logistic_reference,
    fake=_fake,
    differentiable=("mu", "log_scale"),
)

# ---- cases


def _on_grid(x, levels=256):
    """Data in [-1, 1] on the grid of levels, both ends among them."""
    steps = (levels - 1) / 2
    return ((x / 2).clamp(-1, 1).add(1).mul(steps).round() / steps - 1).to(x.dtype)


def _eager_discretized_logistic(mu, log_scale, x):
    centered, inverse_scale = x - mu, torch.exp(-log_scale)
    plus, minus = inverse_scale * (centered + 1 / 255), inverse_scale * (centered - 1 / 255)
    inside = torch.log((torch.sigmoid(plus) - torch.sigmoid(minus)).clamp(min=1e-12))
    edges = torch.where(x > 0.999, -F.softplus(minus), inside)
    return -torch.where(x < -0.999, plus - F.softplus(plus), edges).flatten(1).sum(1)


_SHAPES = ((3, 37), (1, 1), (0, 4), (3, 0), (2, 3, 5, 7), (2, 1031))
_BENCH_SHAPES = ((8, 64), (128, 784), (256, 3, 32, 32))
_TRAFFIC = dict(bench_shapes=_BENCH_SHAPES, shapes=_SHAPES, constants=("x",))

CASES = (
    Case(
        bernoulli_nll,
        lambda make, shape: {"logits": make(shape, 3.0), "x": torch.sigmoid(make(shape))},
        eager=lambda logits, x: F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1),
        **_TRAFFIC,
    ),
    Case(
        gaussian_nll,
        lambda make, shape: {"mu": make(shape), "log_var": make(shape), "x": make(shape)},
        forms=(lambda make, shape: {"mu": make(shape), "log_var": None, "x": make(shape)},),
        eager=lambda mu, log_var, x: (0.5 * ((x - mu) ** 2 / log_var.exp() + log_var + math.log(2 * math.pi))).flatten(1).sum(1),
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 5 * size * math.prod(shape),
        **_TRAFFIC,
    ),
    Case(
        discretized_logistic_nll,
        lambda make, shape: {"mu": make(shape, 0.5), "log_scale": make(shape) - 2, "x": _on_grid(make(shape))},
        eager=_eager_discretized_logistic,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 5 * size * math.prod(shape),
        **_TRAFFIC,
    ),
)
