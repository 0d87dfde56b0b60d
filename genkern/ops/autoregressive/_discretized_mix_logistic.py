"""discretized_mix_logistic_nll: the likelihood of PixelCNN++; _sample: a draw from it; _cdf: what an entropy coder needs."""

import math

import torch
import torch.nn.functional as F

from genkern import random
from genkern.core import Op
from genkern.ops._common import (
    check_choice,
    check_device,
    check_float,
    check_int,
    check_number,
    check_shape,
    in_working_type,
    same_precision,
    working_type,
)
from genkern.testing._case import Case


def discretized_mix_logistic_nll(x, params, *, mode="exact", levels=256, min_log_scale=-7.0):
    """-log p(x) of a mixture of K discretised logistic distributions (Salimans et al., 2017, section 2.1-2.2): (N,), nats.

    A value stands for the bin of half width h = 1 / (levels - 1) around it; with a = (x - m + h) / s and b = (x - m - h) / s its
    probability is sigmoid(a) - sigmoid(b); the lowest bin reaches to -infinity, the highest to +infinity. The three colours of a
    pixel share the mixture's indicator, and the means of green and blue depend linearly on the colours before them:
    m_G = mu_G + tanh(c0) x_R,  m_B = mu_B + tanh(c1) x_R + tanh(c2) x_G.

    x               (N, 3, ...), or (N, 1, ...) such as audio, where no colours couple; in [-1, 1], at 2 i / (levels - 1) - 1. Data:
                    it has no gradient
    params          (N, 10 K, ...), or (N, 3 K, ...) for one channel, in OpenAI's order: K logits, then for each colour K means, K log
                    scales and, with three colours, K coefficients (c0, c1, c2 belong to the first, second and third colour)
    mode            "exact": log p = log(1 - e^-(a - b)) - softplus(-a) - softplus(b), stable, and the probabilities of all levels sum
                    to one; "openai": the rule behind published numbers, which replaces bins of probability at most 1e-5 by the
                    density at their centre times their width
    levels          number of levels, such as 256, or 32 for 5-bit images
    min_log_scale   log scales are clamped from below, without gradient there

    bits per dimension = nats / (ln 2 * values per sample). float32, float64, bfloat16, float16, also mixed; the result is float32
    (float64 if an input is). TypeError, ValueError on anything else; values of x are not looked at. Log scales must lie below 80.
    """
    op = "discretized_mix_logistic_nll"
    check_float(op, "params", params)
    check_float(op, "x", x)
    check_device(op, "x", x, "params", params)
    if x.dim() < 2 or x.shape[1] not in (1, 3):
        raise ValueError(f"{op}: x must be (N, 3, ...) or (N, 1, ...), got {tuple(x.shape)}")
    _mixtures(op, params, x.shape[1])
    check_shape(op, "params", params, (x.shape[0], params.shape[1], *x.shape[2:]))
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: x is data and has no gradient: detach it")
    check_choice(op, "mode", mode, ("exact", "openai"))
    check_int(op, "levels", levels, 2)
    check_number(op, "min_log_scale", min_log_scale)
    x, params = same_precision((x, params))
    return _nll(x, params, levels, float(min_log_scale), mode == "openai")


def discretized_mix_logistic_sample(
    params, *, channels=3, temperature=1.0, min_log_scale=-7.0, levels=None, key=None, generator=None, uniforms=None
):
    """A draw from that mixture, in [-1, 1]: (N, channels, ...).

    The indicator is drawn by Gumbel noise, then each colour by the logistic quantile m + s (log u - log(1 - u)); a colour is clamped
    to [-1, 1] before the next depends on it. u is clamped to [1e-5, 1 - 1e-5], as published.

    params, min_log_scale
                    as in discretized_mix_logistic_nll; channels says whether params are of three colours or of one channel
    temperature     divides the mixture's logits and multiplies the scales
    levels          None: not rounded, as published. A number: each colour is rounded to one of so many levels before the next depends
                    on it, which makes the draw one of the discretised distribution itself
    key             int64 (2,), or (N, 2) for one stream per sample. None: drawn from `generator` or torch's default generator
    uniforms        (N, K + channels, ...) in [0, 1) instead: K for the indicator, then one for each colour

    Returns float32 (float64 if params are). A kernel's logarithms may differ from torch's in the last bit.
    """
    op = "discretized_mix_logistic_sample"
    check_float(op, "params", params)
    check_choice(op, "channels", channels, (1, 3))
    for name, value in (("temperature", temperature), ("min_log_scale", min_log_scale)):
        check_number(op, name, value)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")
    if levels is not None:
        check_int(op, "levels", levels, 2)
    k = _mixtures(op, params, channels)
    shape = (params.shape[0], k + channels, *params.shape[2:])
    if uniforms is None:
        key = random.key_for(op, key, generator, params)
    elif key is not None or generator is not None:
        raise ValueError(f"{op}: give one of key, generator and uniforms")
    else:
        check_float(op, "uniforms", uniforms)
        check_shape(op, "uniforms", uniforms, shape, "(N, K + channels, ...)")
        check_device(op, "uniforms", uniforms, "params", params)
        uniforms = uniforms.detach().to(working_type(params))
    return _sample(params.detach(), key, uniforms, channels, float(temperature), float(min_log_scale), levels or 0)


def discretized_mix_logistic_cdf(params, previous=None, *, channels=3, levels=256, min_log_scale=-7.0):
    """P(level <= i | the colours before) of that mixture, for an entropy coder: (N, levels, ...), never falling, 1 at the last level.

    params, channels
                    as in discretized_mix_logistic_sample
    previous        (N, c, ...) in [-1, 1]: the c colours of each pixel that are decided, for the distribution of colour number c. They
                    move its mean and, by Bayes' rule, the weights of the mixtures. None: of the first colour
    levels, min_log_scale
                    as in discretized_mix_logistic_nll; the differences are the probabilities of mode "exact"

    float32, float64, bfloat16, float16. Returns float32 (float64 if params or previous are). TypeError, ValueError on anything else.
    In plain torch on every device.
    """
    op = "discretized_mix_logistic_cdf"
    check_float(op, "params", params)
    check_choice(op, "channels", channels, (1, 3))
    check_int(op, "levels", levels, 2)
    check_number(op, "min_log_scale", min_log_scale)
    _mixtures(op, params, channels)
    if previous is None:
        previous = params.new_zeros(params.shape[0], 0, *params.shape[2:])
    check_float(op, "previous", previous)
    color = previous.shape[1] if previous.dim() > 1 else channels
    if color >= channels:
        raise ValueError(f"{op}: previous must hold at most {channels - 1} of {channels} channels, got {tuple(previous.shape)}")
    check_shape(op, "previous", previous, (params.shape[0], color, *params.shape[2:]))
    check_device(op, "previous", previous, "params", params)
    params, previous = in_working_type(params, previous)
    logits, *of_colors = _split(params, channels)
    of_colors = [None if t is None else t.unbind(1) for t in of_colors]
    logits = logits.log_softmax(1)
    for c in range(color):  # the mixtures' weights given the colour c
        logits = (logits + _log_bin(previous[:, c], *_of_color(c, previous, *of_colors, min_log_scale), levels)).log_softmax(1)
    mean, log_scale = _of_color(color, previous, *of_colors, min_log_scale)
    inverse = torch.exp(-log_scale)
    upper = (torch.arange(levels - 1, dtype=params.dtype, device=params.device) * 2 + 1) / (levels - 1) - 1  # of all bins but the last
    upper = upper.view(-1, 1, *[1] * (params.dim() - 2))  # against (N, 1, K, ...)
    below = (logits.exp().unsqueeze(1) * torch.sigmoid((upper - mean.unsqueeze(1)) * inverse.unsqueeze(1))).sum(2)
    return torch.cat([below.clamp(max=1).cummax(1).values, torch.ones_like(below[:, :1])], 1)


def _of_color(c, x, means, log_scales, coefficients, min_log_scale):
    """(means, log scales) of colour c, each (N, K, ...), given the colours of x before it."""
    mean = means[c]
    if c == 1:
        mean = mean + torch.tanh(coefficients[0]) * x[:, :1]
    elif c == 2:
        mean = mean + torch.tanh(coefficients[1]) * x[:, :1] + torch.tanh(coefficients[2]) * x[:, 1:2]
    return mean, log_scales[c].clamp(min=min_log_scale)


def _log_bin(x, mean, log_scale, levels, openai=False):
    """The log-probability of the bin around x (N, ...) under each mixture (N, K, ...)."""
    softplus, h, x = torch.nn.functional.softplus, 1 / (levels - 1), x.unsqueeze(1)
    inverse, edge = torch.exp(-log_scale), 1 - h / 4  # edge: between the last level and the one before
    a, b = inverse * (x - mean + h), inverse * (x - mean - h)
    inside = torch.log(-torch.expm1(-2 * h * inverse)) - softplus(-a) - softplus(b)
    if openai:
        middle = inverse * (x - mean)
        density = middle - log_scale - 2 * softplus(middle) + math.log(2 * h)
        inside = torch.where(inside > math.log(1e-5), inside, density)
    return torch.where(x < -edge, -softplus(-a), torch.where(x > edge, -softplus(b), inside))


def _per_mixture(channels):
    return 10 if channels == 3 else 3


def _mixtures(op, params, channels):
    per = _per_mixture(channels)
    if params.dim() < 2 or params.shape[1] == 0 or params.shape[1] % per:
        raise ValueError(f"{op}: params must be (N, {per} K, ...) for {channels} channel(s), got {tuple(params.shape)}")
    return params.shape[1] // per


def _split(params, channels):
    """logits (N, K, ...) and means, log scales, coefficients (N, channels, K, ...), the last None for one channel."""
    kinds, k = 3 if channels == 3 else 2, params.shape[1] // _per_mixture(channels)
    rest = params[:, k:].reshape(params.shape[0], channels, kinds, k, *params.shape[2:])
    return params[:, :k], rest[:, :, 0], rest[:, :, 1], rest[:, :, 2] if kinds == 3 else None


def _reference(x, params, levels, min_log_scale, openai):
    x, params = in_working_type(x, params)
    channels = x.shape[1]
    logits, *of_colors = _split(params, channels)
    of_colors = [None if t is None else t.unbind(1) for t in of_colors]
    log_probability = sum(_log_bin(x[:, c], *_of_color(c, x, *of_colors, min_log_scale), levels, openai) for c in range(channels))
    mixture = torch.logsumexp(logits + log_probability, 1) - torch.logsumexp(logits, 1)
    return -mixture.flatten(1).sum(1)


_nll = Op(
    "discretized_mix_logistic_nll",
    "(Tensor x, Tensor params, int levels, float min_log_scale, bool openai) -> Tensor",
    reference=_reference,
    fake=lambda x, params, levels, min_log_scale, openai: params.new_empty(params.shape[0], dtype=working_type(x, params)),
    differentiable=("params",),
    device_of=1,
)


def _reference_sample(params, key, uniforms, channels, temperature, min_log_scale, levels):
    params = params.to(working_type(params))
    logits, means, log_scales, coefficients = _split(params, channels)
    k = logits.shape[1]
    if uniforms is None:
        shape = (params.shape[0], k + channels, *params.shape[2:])
        uniforms = random.uniform(key, shape, dtype=params.dtype, device=params.device)
    u = uniforms.clamp(1e-5, 1 - 1e-5)
    chosen = (logits / temperature - torch.log(-torch.log(u[:, :k]))).argmax(1, keepdim=True)
    noise = torch.log(u[:, k:]) - torch.log(1 - u[:, k:])
    take = lambda values: values.gather(2, chosen.unsqueeze(1).expand(-1, values.shape[1], *([-1] * (values.dim() - 2)))).squeeze(2)
    mean, scale = take(means), temperature * torch.exp(take(log_scales).clamp(min=min_log_scale))
    x = []
    for c in range(channels):
        centre = mean[:, c]
        if c:
            link = torch.tanh(take(coefficients))
            centre = centre + (link[:, 0] * x[0] if c == 1 else link[:, 1] * x[0] + link[:, 2] * x[1])
        value = (centre + scale[:, c] * noise[:, c]).clamp(-1, 1)
        x.append(((value + 1) * ((levels - 1) / 2)).round() * (2 / (levels - 1)) - 1 if levels else value)
    return torch.stack(x, 1)


_sample = Op(
    "discretized_mix_logistic_sample",
    "(Tensor params, Tensor? key, Tensor? uniforms, int channels, float temperature, float min_log_scale, int levels) -> Tensor",
    reference=_reference_sample,
    fake=lambda params, key, uniforms, channels, temperature, min_log_scale, levels: params.new_empty(
        params.shape[0], channels, *params.shape[2:], dtype=working_type(params)
    ),
)


def _eager(x, params):
    """OpenAI's rule, after its TensorFlow code's formulas, as PyTorch ports write it."""
    x, k = x.permute(0, 2, 3, 1), params.shape[1] // 10
    softplus = torch.nn.functional.softplus
    params = params.permute(0, 2, 3, 1)
    logits, rest = params[..., :k], params[..., k:].reshape(*x.shape, 3 * k)
    means, log_scales, coefficients = rest[..., :k], rest[..., k : 2 * k].clamp(min=-7.0), torch.tanh(rest[..., 2 * k :])
    x = x.unsqueeze(-1).expand(*x.shape, k)
    green = means[..., 1, :] + coefficients[..., 0, :] * x[..., 0, :]
    blue = means[..., 2, :] + coefficients[..., 1, :] * x[..., 0, :] + coefficients[..., 2, :] * x[..., 1, :]
    centred = x - torch.stack([means[..., 0, :], green, blue], -2)
    inverse = torch.exp(-log_scales)
    plus, minus, middle = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255), inverse * centred
    delta = torch.sigmoid(plus) - torch.sigmoid(minus)
    density = middle - log_scales - 2 * softplus(middle) - math.log(127.5)
    inside = torch.where(delta > 1e-5, torch.log(delta.clamp(min=1e-12)), density)
    log_p = torch.where(x < -0.999, plus - softplus(plus), torch.where(x > 0.999, -softplus(minus), inside))
    return -torch.logsumexp(log_p.sum(3) + logits.log_softmax(-1), -1).flatten(1).sum(1)


def _eager_sample(params, uniforms=None):
    """OpenAI's sampler, after its TensorFlow code's formulas, as PyTorch ports write it."""
    params, k = params.permute(0, 2, 3, 1), params.shape[1] // 10
    logits, rest = params[..., :k], params[..., k:].reshape(*params.shape[:3], 3, 3 * k)
    gumbel = -torch.log(-torch.log(torch.empty_like(logits).uniform_(1e-5, 1 - 1e-5)))
    chosen = F.one_hot((logits + gumbel).argmax(3), k).to(params.dtype).unsqueeze(3)
    means = (rest[..., :k] * chosen).sum(4)
    log_scales = (rest[..., k : 2 * k] * chosen).sum(4).clamp(min=-7.0)
    coefficients = (torch.tanh(rest[..., 2 * k :]) * chosen).sum(4)
    u = torch.empty_like(means).uniform_(1e-5, 1 - 1e-5)
    x = means + torch.exp(log_scales) * (torch.log(u) - torch.log(1 - u))
    red = x[..., 0].clamp(-1, 1)
    green = (x[..., 1] + coefficients[..., 0] * red).clamp(-1, 1)
    blue = (x[..., 2] + coefficients[..., 1] * red + coefficients[..., 2] * green).clamp(-1, 1)
    return torch.stack([red, green, blue], 1)


def _sample_arguments(make, shape):
    n, k, *space = shape
    return {"params": make((n, 10 * k, *space), 0.7), "key": random.key(5, device=make.device)}


def _sample_one_channel(make, shape):
    """One channel, with a key for each sample."""
    n, k, *space = shape
    keys = random.split(random.key(5, device=make.device), n)
    return {"params": make((n, 3 * k, *space), 0.7), "key": keys, "channels": 1}


def _arguments(make, shape):
    n, k, *space = shape
    levels = (make((n, 3, *space)) * 100 + 127).clamp(0, 255).round()
    return {"x": levels / 127.5 - 1, "params": make((n, 10 * k, *space), 0.7)}


def _one_channel(make, shape):
    n, k, *space = shape
    levels = (make((n, 1, *space)) * 100 + 127).clamp(0, 255).round()
    return {"x": levels / 127.5 - 1, "params": make((n, 3 * k, *space), 0.7)}


CASES = (
    Case(
        discretized_mix_logistic_nll,
        _arguments,
        forms=(_one_channel,),
        shapes=((2, 2, 4, 5), (1, 1, 1, 1), (0, 2, 3, 3), (1, 1, 17, 19)),
        small=(1, 2, 1, 1),
        large=(3, 2, 19, 23),
        variants=({}, {"mode": "openai"}),
        constants=("x",),
        eager=_eager,
        bytes=lambda shape, size: size * shape[0] * (10 * shape[1] + 3) * math.prod(shape[2:]),
        bytes_backward=lambda shape, size: size * shape[0] * (20 * shape[1] + 3) * math.prod(shape[2:]),
        bench_shapes=((16, 10, 32, 32),),
    ),
    Case(
        discretized_mix_logistic_sample,
        _sample_arguments,
        forms=(_sample_one_channel,),
        shapes=((2, 3, 4, 5), (0, 2, 3, 3), (2, 2, 17, 19)),
        large=(3, 2, 19, 23),
        variants=({}, {"temperature": 0.7}),
        constants=None,
        eager=_eager_sample,
        bytes=lambda shape, size: size * shape[0] * (10 * shape[1] + 3) * math.prod(shape[2:]),
        bench_shapes=((16, 10, 32, 32), (64, 10, 1, 1)),
    ),
)
