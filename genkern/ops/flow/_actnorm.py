"""actnorm: a scale and a shift per channel, with the log-determinant.

Without a kernel: torch's multiply-add is one pass already, and before a 1x1 convolution plu_weight folds even that into the weight.
"""

import torch

from genkern.ops._common import check_device, check_float, check_shape, in_working_type, promoted

_NAME = "actnorm"


def actnorm(x, log_scale, shift, *, inverse=False, log_det=None):
    """(y, log_det): y = x exp(log_scale) + shift for each channel, and log |det dy/dx| per sample, the number of positions times the
    sum of log_scale (Glow, Kingma & Dhariwal, 2018, section 3.1). The same for every sample, so it does not read x.

    x                   (N, C, ...)
    log_scale, shift    (C,)
    inverse             x from y: (x - shift) exp(-log_scale); log_det is that of this map
    log_det             None, or (N,): a running log-determinant to which this one is added

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64). y has the promoted type of x, log_scale and shift;
    log_det is float32 (float64 if an input is). TypeError, ValueError on anything else. Differentiable to any order. Made of torch's
    operations: it is one pass over x already, and none where `invertible_conv1x1` folds it into its weight. The first batch's
    statistics are a layer's work: genkern.nn.
    """
    check_float(_NAME, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{_NAME}: x must be (N, C, ...), got shape {tuple(x.shape)}")
    for name, tensor in (("log_scale", log_scale), ("shift", shift)):
        check_float(_NAME, name, tensor)
        check_shape(_NAME, name, tensor, x.shape[1:2], "(C,)")
        check_device(_NAME, name, tensor, "x", x)
    dtype = promoted(x, log_scale, shift)
    x, log_scale, shift = in_working_type(x, log_scale, shift)
    positions = -x.shape[2:].numel() if inverse else x.shape[2:].numel()
    own = log_scale.sum().expand(x.shape[0])
    if log_det is None:
        own = own * positions
    else:
        check_float(_NAME, "log_det", log_det)
        check_shape(_NAME, "log_det", log_det, x.shape[:1], "(N,)")
        check_device(_NAME, "log_det", log_det, "x", x)
        own = torch.add(log_det, own, alpha=positions)
    over_channels = (-1, *[1] * (x.dim() - 2))
    log_scale, shift = log_scale.view(over_channels), shift.view(over_channels)
    y = (x - shift) * torch.exp(-log_scale) if inverse else (x * torch.exp(log_scale)).add_(shift)
    return y.to(dtype), own
