"""rational_quadratic_spline_coupling: some features through splines and the others unchanged, in one pass over the rows."""

import torch

from genkern.core import Op
from genkern.core._op import transforming
from genkern.ops._common import (
    check_choice,
    check_device,
    check_float,
    check_int,
    check_number,
    check_shape,
    check_tensor,
    promoted,
    same_precision,
    working_type,
)
from genkern.ops.flow import _rational_quadratic_spline as spline
from genkern.testing._case import Case

TAILS = ("linear", "circular")
_NAME = "rational_quadratic_spline_coupling"


def rational_quadratic_spline_coupling(
    x,
    params,
    changed=None,
    *,
    bins,
    inverse=False,
    tails="linear",
    tail_bound=1.0,
    min_bin_width=1e-3,
    min_bin_height=1e-3,
    min_derivative=1e-3,
    logit_scale=1.0,
):
    """(y, log_det): M of the D features of each row of x through `rational_quadratic_spline`, the others as they are, and the sum of
    log |dy/dx| over a row: a spline coupling, or with M = D an autoregressive layer (Durkan et al., Neural Spline Flows, 2019).

    x           (N, D)
    params      (N, M P), the raw outputs of a network, those of a feature together: K widths, K heights, then K - 1 slopes for
                tails="linear" (P = 3 K - 1), K for "circular" (P = 3 K)
    changed     (M,) int64, the features with a spline, in increasing order; None: the last M
    bins        K
    logit_scale what widths and heights are multiplied by first, such as one over the square root of the network's width
    inverse, tails, tail_bound, min_bin_width, min_bin_height, min_derivative
                as in `rational_quadratic_spline`

    float32, float64, bfloat16, float16, also mixed; computed as there. y (N, D) has the promoted type, log_det (N,) is float32 (float64
    if an input is). TypeError, ValueError on anything else. Differentiable to any order; the backward pass starts from the inputs.
    One kernel on the CPU; elsewhere `rational_quadratic_spline` of the features.
    """
    _check(x, params, changed, bins, tails, tail_bound, min_bin_width, min_bin_height, min_derivative, logit_scale)
    x, params = same_precision((x, params))
    shape = (inverse, bins, spline.TAILS.index(tails), *map(float, (tail_bound, min_bin_width, min_bin_height, min_derivative)))
    if x.device.type == "cpu":
        return _op(x, params, changed, *shape, float(logit_scale))
    return _of_spline(spline._op, x, params, changed, *shape, float(logit_scale))


def _check(x, params, changed, bins, tails, tail_bound, min_bin_width, min_bin_height, min_derivative, logit_scale):
    check_float(_NAME, "x", x, 2)
    check_float(_NAME, "params", params, 2)
    check_device(_NAME, "params", params, "x", x)
    check_int(_NAME, "bins", bins)
    check_choice(_NAME, "tails", tails, TAILS)
    spline._check_numbers(_NAME, bins, tails, tail_bound, min_bin_width, min_bin_height, min_derivative)
    check_number(_NAME, "logit_scale", logit_scale)
    numbers = 3 * bins - (tails == "linear")
    features, left = divmod(params.shape[1], numbers)
    if len(params) != len(x) or left or features > x.shape[1]:
        wanted = f"(N, M {numbers}) with M up to {x.shape[1]} for x {tuple(x.shape)}, {bins} bins and tails={tails!r}"
        raise ValueError(f"{_NAME}: params must have shape {wanted}, got {tuple(params.shape)}")
    if changed is None:
        return
    check_tensor(_NAME, "changed", changed, torch.int64)
    check_device(_NAME, "changed", changed, "x", x)
    check_shape(_NAME, "changed", changed, (features,), "(M,)")
    if changed.is_cpu and not (torch.compiler.is_compiling() or transforming()):
        order = changed.tolist()
        if order and (order[0] < 0 or order[-1] >= x.shape[1] or any(a >= b for a, b in zip(order, order[1:], strict=False))):
            raise ValueError(f"{_NAME}: changed must be increasing positions in 0..{x.shape[1] - 1}, got {order}")


def _of_spline(function, x, params, changed, inverse, bins, tails, bound, min_width, min_height, min_derivative, logit_scale):
    """By a function of the raw arguments of rational_quadratic_spline."""
    numbers = 3 * bins - (spline.TAILS[tails] == "linear")
    features = params.shape[1] // numbers
    logits, slopes = params.unflatten(1, (features, numbers)).split([2 * bins, numbers - 2 * bins], -1)
    if logit_scale != 1:
        logits = logits.to(working_type(logits)) * logit_scale
    if changed is None:
        changed = torch.arange(x.shape[1] - features, x.shape[1], device=x.device)
    arguments = (*logits.split(bins, -1), slopes, inverse, tails, bound, min_width, min_height, min_derivative)
    y, log_det = function(x.index_select(1, changed), *arguments)
    dtype = promoted(x, params)
    return x.to(dtype).index_copy(1, changed, y.to(dtype)), log_det.sum(1)


def _reference(*args):
    return _of_spline(spline._reference, *args)


def _fake(x, params, *_):
    return x.new_empty(x.shape, dtype=promoted(x, params)), x.new_empty(x.shape[:1], dtype=working_type(x, params))


_op = Op(
    _NAME,
    "(Tensor x, Tensor params, Tensor? changed, bool inverse, int bins, int tails, float bound, float min_width, float min_height, "
    "float min_derivative, float logit_scale) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    differentiable=("x", "params"),
)


def _eager(x, params, changed, bins):
    widths, heights, slopes = params.unflatten(1, (len(changed), -1)).split([bins, bins, bins - 1], -1)
    y = torch.empty_like(x)
    y[:] = x
    y[:, changed], log_det = spline._eager(x[:, changed], widths, heights, slopes)
    return y, log_det.sum(1)


def _arguments(make, shape, bins=3):
    n, width = shape
    changed = torch.arange(0, width, 2)
    device = make.device
    return {"x": make(shape), "params": make((n, len(changed) * (3 * bins - 1))), "changed": changed.to(device), "bins": bins}


def _last(make, shape):
    n, width = shape
    return {"x": make(shape), "params": make((n, (width + 1) // 2 * 9)), "bins": 3, "tails": "circular"}


CASES = (
    Case(
        rational_quadratic_spline_coupling,
        _arguments,
        forms=(_last,),
        shapes=((5, 4), (0, 3), (37, 1)),
        small=(2, 2),
        large=(1031, 3),
        dtypes=(torch.float32, torch.bfloat16),  # float64: as of rational_quadratic_spline
        variants=({}, {"inverse": True, "tail_bound": 3.0, "logit_scale": 0.3}),
        eager=_eager,
        bytes=lambda shape, size: shape[0] * size * (2 * shape[1] + 1 + (shape[1] + 1) // 2 * 11),
        bytes_backward=lambda shape, size: shape[0] * size * (3 * shape[1] + 1 + (shape[1] + 1) // 2 * 22),
        bench_shapes=((200, 10), (1000, 10), (10000, 10)),
    ),
)
