"""invertible_conv1x1: a learned mixing of channels with its log-determinant, and the preparation of its weights.

Without a kernel: it is a product of matrices, and torch's runs at the machine's limit.
"""

import torch
import torch.nn.functional as F

from genkern.ops._common import check_device, check_float, check_shape, in_working_type, promoted, working_type

_NAME = "invertible_conv1x1"


def invertible_conv1x1(x, weight, bias=None, *, log_abs_det=None, inverse=False, log_det=None):
    """(y, log_det): y = W x + b at every position, and log |det dy/dx| per sample, the number of positions times log |det W|
    (Glow, Kingma & Dhariwal, 2018, section 3.2).

    x           (N, C, ...)
    weight      (C, C) W
    bias        (C,) b, or None: such as an actnorm folded in by `plu_weight`
    log_abs_det () log |det W| where it is known; None: computed by torch.linalg.slogdet; 0: counted elsewhere, log_det stays as it is
    inverse     x from y: W^-1 (y - b), W inverted once for all samples; log_det is that of this map
    log_det     None, or (N,): a running log-determinant to which this one is added

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64). y has the promoted type of the tensors, log_det is
    float32 (float64 if an input is). TypeError, ValueError on anything else. Differentiable to any order. A matrix product, which
    is torch's. A singular W has log_det -inf, and its inverse is an error of torch.linalg.
    """
    check_float(_NAME, "x", x)
    check_float(_NAME, "weight", weight, 2)
    if x.dim() < 2:
        raise ValueError(f"{_NAME}: x must be (N, C, ...), got shape {tuple(x.shape)}")
    check_shape(_NAME, "weight", weight, (x.shape[1], x.shape[1]), "(C, C)")
    check_device(_NAME, "weight", weight, "x", x)
    counted = not isinstance(log_abs_det, torch.Tensor) and log_abs_det == 0
    log_abs_det = None if counted else log_abs_det
    for name, tensor, shape, meaning in (
        ("bias", bias, x.shape[1:2], "(C,)"),
        ("log_abs_det", log_abs_det, (), "()"),
        ("log_det", log_det, x.shape[:1], "(N,)"),
    ):
        if tensor is not None:
            check_float(_NAME, name, tensor)
            check_shape(_NAME, name, tensor, shape, meaning)
            check_device(_NAME, name, tensor, "x", x)
    dtype = promoted(x, weight, bias)
    x, weight, bias, log_abs_det = in_working_type(x, weight, bias, log_abs_det)
    with torch.autocast(x.device.type, enabled=False):
        if log_abs_det is None and not counted:
            log_abs_det = torch.linalg.slogdet(weight)[1]
        if inverse:
            weight = torch.linalg.inv(weight)
            bias = None if bias is None else -(weight @ bias)
        n, channels, positions = x.shape[0], x.shape[1], x.shape[2:].numel()
        if x.dim() == 2:
            y = F.linear(x, weight, bias)
        elif channels > 4 * positions:  # whose gradient would be larger than x, if it were one matrix a sample
            y = weight @ x.flatten(2)
            y = y if bias is None else y + bias[:, None]
        elif bias is None:
            y = torch.bmm(weight.expand(n, -1, -1), x.flatten(2))
        else:
            y = torch.baddbmm(bias[:, None], weight.expand(n, -1, -1), x.flatten(2))
        if counted:
            return y.reshape(x.shape).to(dtype), x.new_zeros(n) if log_det is None else log_det
        own = log_abs_det.expand(n)
        positions = -positions if inverse else positions
        own = own * positions if log_det is None else torch.add(log_det, own, alpha=positions)
    return y.reshape(x.shape).to(dtype), own


def plu_weight(permutation, lower, upper, sign, log_diagonal, log_scale=None, shift=None, *, inverse=False):
    """(weight, bias, log_abs_det) of W = P L (U + diag(sign exp(log_diagonal))) (Glow, Kingma & Dhariwal, 2018, equation 10), for one
    convolution, or for all K of a level at once: one batch of small products instead of K, since they depend on parameters alone.

    permutation     (..., C, C) P
    lower, upper    (..., C, C): what lies below the diagonal of L, whose diagonal is one, and above that of U. The rest is not read
    sign            (..., C), 1 or -1
    log_diagonal    (..., C)
    log_scale, shift
                    (..., C) of an actnorm before the convolution, folded in: weight is W diag(exp(log_scale)), bias W shift and
                    log_abs_det includes the sum of log_scale. None: bias is None
    inverse         those of the inverse map: invertible_conv1x1(y, weight, bias, log_abs_det=...) gives x back without solving again

    weight (..., C, C), bias (..., C) or None and log_abs_det (...): the sum of log_diagonal, for one position. Computed in float32
    (float64 if an input is). TypeError, ValueError on bad arguments. Differentiable to any order.
    """
    op = "plu_weight"
    if (log_scale is None) != (shift is None):
        raise ValueError(f"{op}: log_scale and shift must be given together")
    check_float(op, "lower", lower)
    if lower.dim() < 2 or lower.shape[-1] != lower.shape[-2]:
        raise ValueError(f"{op}: lower must be (..., C, C), got shape {tuple(lower.shape)}")
    for name, tensor in (("permutation", permutation), ("upper", upper)):
        check_float(op, name, tensor)
        check_shape(op, name, tensor, lower.shape, "(..., C, C)")
        check_device(op, name, tensor, "lower", lower)
    for name, tensor in (("sign", sign), ("log_diagonal", log_diagonal), ("log_scale", log_scale), ("shift", shift)):
        if tensor is not None or name in ("sign", "log_diagonal"):
            check_float(op, name, tensor)
            check_shape(op, name, tensor, lower.shape[:-1], "(..., C)")
            check_device(op, name, tensor, "lower", lower)
    tensors = in_working_type(permutation, lower, upper, sign, log_diagonal, log_scale, shift)
    dtype = working_type(*tensors)
    permutation, lower, upper, sign, log_diagonal, log_scale, shift = (None if t is None else t.to(dtype) for t in tensors)
    identity = torch.eye(lower.shape[-1], dtype=dtype, device=lower.device)
    with torch.autocast(lower.device.type, enabled=False):
        left, right = lower.tril(-1) + identity, upper.triu(1) + torch.diag_embed(sign * torch.exp(log_diagonal))
        log_abs_det = log_diagonal.sum(-1) if log_scale is None else (log_diagonal + log_scale).sum(-1)
        if inverse:  # x = exp(-log_scale) (W^-1 y - shift)
            weight = torch.linalg.solve_triangular(left, permutation.mT, upper=False, unitriangular=True)
            weight = torch.linalg.solve_triangular(right, weight, upper=True)
            if log_scale is None:
                return weight, None, -log_abs_det
            factor = torch.exp(-log_scale)
            return weight * factor.unsqueeze(-1), -factor * shift, -log_abs_det
        weight = permutation @ (left @ right)
        if log_scale is None:
            return weight, None, log_abs_det
        bias = (weight @ shift.unsqueeze(-1)).squeeze(-1)
        return weight * torch.exp(log_scale).unsqueeze(-2), bias, log_abs_det


def plu_factors(weight):
    """(permutation, lower, upper, sign, log_diagonal) of an invertible weight (..., C, C), the arguments of `plu_weight`.

    float32 or float64, as torch.linalg.lu takes them. TypeError, ValueError on anything else.
    """
    check_float("plu_factors", "weight", weight)
    if weight.dim() < 2 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"plu_factors: weight must be (..., C, C), got shape {tuple(weight.shape)}")
    permutation, lower, upper = torch.linalg.lu(weight)
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    return permutation, lower.tril(-1), upper.triu(1), diagonal.sign(), diagonal.abs().log()
