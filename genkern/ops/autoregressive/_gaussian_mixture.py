"""gaussian_mixture_nll: a mixture of normal distributions, as WaveNet vocoders end in; gaussian_mixture_sample: a draw from it.

Without a kernel: a value takes K exponentials, and the layers before it a million products; torch.compile fuses what is elementwise.
"""

import math

import torch

from genkern import random
from genkern.ops._common import check_device, check_float, check_int, check_number, check_shape, in_working_type, working_type


def gaussian_mixture_nll(x, params, *, min_log_scale=-7.0):
    """-log p(x) of a mixture of K normal densities for every value (Bishop, 1994, equation 22-23): (N,), nats.

    x               (N, C, ...); it has a gradient too
    params          (N, 3 K C, ...): K C logits, K C means, K C log standard deviations, the K of a channel neighbours
    min_log_scale   log standard deviations are clamped from below, without gradient there

    A density: with few mixtures on values of few levels it can exceed any bound, unlike discretized_mix_logistic_nll. float32, float64,
    bfloat16, float16, also mixed; the result is float32 (float64 if an input is). TypeError, ValueError on anything else. In plain
    torch on every device.
    """
    op = "gaussian_mixture_nll"
    check_float(op, "params", params)
    check_float(op, "x", x)
    check_device(op, "x", x, "params", params)
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(f"{op}: x must be (N, C, ...), got {tuple(x.shape)}")
    k = _mixtures(op, params, x.shape[1])
    check_shape(op, "params", params, (x.shape[0], params.shape[1], *x.shape[2:]))
    check_number(op, "min_log_scale", min_log_scale)
    x, params = in_working_type(x, params)
    logits, means, log_scales = _split(params, x.shape[1], k)
    log_scales = log_scales.clamp(min=min_log_scale)
    z = (x.unsqueeze(2) - means) * torch.exp(-log_scales)
    log_density = -0.5 * z * z - log_scales - 0.5 * math.log(2 * math.pi)
    return -torch.logsumexp(logits.log_softmax(2) + log_density, 2).flatten(1).sum(1)


def gaussian_mixture_sample(params, *, channels=1, temperature=1.0, min_log_scale=-7.0, key=None, generator=None, uniforms=None):
    """A draw from that mixture, not clamped: (N, channels, ...). The indicator by Gumbel noise, the value as mean + scale n.

    params, min_log_scale
                    as in gaussian_mixture_nll
    channels        C
    temperature     divides the logits and multiplies the standard deviations
    key             int64 (2,), or (N, 2) for one stream per sample. None: drawn from `generator` or torch's default generator
    uniforms        (N, channels (K + 1), ...) in [0, 1) instead: for each channel K for the indicator, then one for the value,
                    n = sqrt(2) erfinv(2 u - 1); u is clamped to [1e-5, 1 - 1e-5]

    float32, float64, bfloat16, float16. Returns the type of params; computed in float32 (float64). TypeError, ValueError on anything
    else. No gradient. In plain torch on every device.
    """
    op = "gaussian_mixture_sample"
    check_float(op, "params", params)
    for name, value in (("temperature", temperature), ("min_log_scale", min_log_scale)):
        check_number(op, name, value)
    check_int(op, "channels", channels)
    if not 0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature must be positive and finite, got {temperature}")
    k = _mixtures(op, params, channels)
    shape = (params.shape[0], channels * (k + 1), *params.shape[2:])
    if uniforms is None:
        uniforms = random.uniform(random.key_for(op, key, generator, params), shape, dtype=working_type(params), device=params.device)
    elif key is not None or generator is not None:
        raise ValueError(f"{op}: give one of key, generator and uniforms")
    check_float(op, "uniforms", uniforms)
    check_shape(op, "uniforms", uniforms, shape, "(N, channels (K + 1), ...)")
    check_device(op, "uniforms", uniforms, "params", params)
    u = uniforms.to(working_type(params)).clamp(1e-5, 1 - 1e-5).unflatten(1, (channels, k + 1))
    logits, means, log_scales = _split(in_working_type(params.detach(), u)[0], channels, k)
    chosen = (logits / temperature - torch.log(-torch.log(u[:, :, :k]))).argmax(2, keepdim=True)
    mean, log_scale = means.gather(2, chosen).squeeze(2), log_scales.gather(2, chosen).squeeze(2).clamp(min=min_log_scale)
    noise = math.sqrt(2) * torch.erfinv(2 * u[:, :, k] - 1)
    return (mean + temperature * torch.exp(log_scale) * noise).to(params.dtype)


def _mixtures(op, params, channels):
    if params.dim() < 2 or params.shape[1] == 0 or params.shape[1] % (3 * channels):
        raise ValueError(f"{op}: params must be (N, 3 K C, ...) for {channels} channel(s), got {tuple(params.shape)}")
    return params.shape[1] // (3 * channels)


def _split(params, channels, k):
    return params.unflatten(1, (3, channels, k)).unbind(1)
