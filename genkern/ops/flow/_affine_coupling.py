"""affine_coupling: scale and shift of one part of a tensor by functions of the other, with the log-determinant; additive_coupling."""

import math

import torch
import torch.nn.functional as F

from genkern.core import Op
from genkern.core._op import _row_dense
from genkern.ops._common import (
    check_choice,
    check_device,
    check_float,
    check_number,
    check_shape,
    check_written,
    in_working_type,
    promoted,
    same_precision,
    share_memory,
    working_type,
)
from genkern.testing._case import Case

SCALES = ("exp", "sigmoid", "sigmoid_floor", "softplus", "tanh", "soft_clip", "arctan")  # positions are the numbers of the raw op
LAYOUTS = ("shift_scale", "scale_shift", "interleaved")
_NAME = "affine_coupling"


def affine_coupling(
    x, params, *, scale="exp", layout="shift_scale", shift_first=False, inverse=False, limit=None, mask=None, log_det=None
):
    """(y, log_det): y = x s + t on the transformed part of x, the rest unchanged, and log |det dy/dx| per sample
    (RealNVP, Dinh et al., 2017, equations 7-8; Glow, Kingma & Dhariwal, 2018, table 1).

    x           (N, C, ...). Its last channels are transformed, as many as params has shifts; the first ones pass through
    params      (N, 2 C', ...), C' <= C: shifts t and raw scales u of the transformed channels, the output of the network
    scale       the map from u to s: "exp": e^u; "sigmoid": sigmoid(u + 2) (Glow); "sigmoid_floor": sigmoid(u + 2) + 1e-3 (nflows);
                "softplus": softplus(u) + 1e-3; "tanh": exp(limit tanh(u)), limit 2 unless given; "soft_clip":
                exp(u / (1 + |u| / limit)), limit -ln(1e-3) unless given (zuko); "arctan": exp(0.636 limit arctan(u)),
                limit 2 unless given (FrEIA)
    layout      of params along dimension 1: "shift_scale" or "scale_shift" halves, read in place; "interleaved": shift, scale,
                shift, scale ..., rearranged by a copy first
    shift_first y = (x + t) s instead (Glow)
    inverse     x from y: (x - t) / s, or x / s - t; log_det is that of this map
    mask        boolean, of the shape of one sample (C, ...) or one that broadcasts to it: True is transformed, such as a
                checkerboard. Then C' = C
    log_det     None, or (N,): a running log-determinant to which this one is added

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64). y has the promoted type of x and params, so a
    float32 stream takes bfloat16 params; log_det is float32 (float64 if an input is). TypeError, ValueError on anything else.
    Differentiable to any order; the backward pass starts from the inputs, nothing else is kept.
    """
    args = _arguments(_NAME, x, params, scale, layout, shift_first, inverse, limit, mask, log_det)
    y, total = _op(*args)
    return y, _with_wider(log_det, args[3], total)


def affine_coupling_(
    x, params, *, scale="exp", layout="shift_scale", shift_first=False, inverse=False, limit=None, mask=None, log_det=None
):
    """log_det of affine_coupling, whose y overwrites x: only the transformed elements are touched. For sampling and scoring: the
    gradient needs the old x, so x and params must not require one (ValueError).

    Arguments, types and errors as in affine_coupling; x must have the promoted type of x and params.
    """
    op = "affine_coupling_"
    old, *args = _arguments(op, x, params, scale, layout, shift_first, inverse, limit, mask, log_det)
    if torch.is_grad_enabled() and (x.requires_grad or params.requires_grad):
        raise ValueError(f"{op}: x is overwritten and the gradient would need it; use affine_coupling, or torch.no_grad()")
    check_written(op, {"x": x})
    if share_memory(x, params):
        raise ValueError(f"{op}: x and params must not share memory")
    if promoted(x, params) != x.dtype:
        raise TypeError(f"{op}: x must have the promoted type of x and params, got {x.dtype} and {params.dtype}")
    if log_det is not None and log_det.requires_grad and torch.is_grad_enabled():
        args[2] = None  # the op in place has no gradient
    if _row_dense(x):
        total = _in_place(old, *args)
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(x)
    else:
        y, total = _op(old, *args)
        x.copy_(y)
    return _with_wider(log_det, args[2], total)


def _with_wider(log_det, running, total):
    """total, with log_det where the op has not added it: float64 with narrower arguments, whose digits the sum keeps."""
    return total if log_det is None or running is not None else log_det + total


def _arguments(op, x, params, scale, layout, shift_first, inverse, limit, mask, log_det):
    """Those of the raw ops, checked."""
    check_float(op, "x", x)
    check_float(op, "params", params, x.dim())
    check_choice(op, "scale", scale, SCALES)
    check_choice(op, "layout", layout, LAYOUTS)
    check_device(op, "params", params, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be (N, C, ...), got shape {tuple(x.shape)}")
    channels = params.shape[1] // 2
    if channels > x.shape[1] or params.shape != (x.shape[0], 2 * channels, *x.shape[2:]):
        raise ValueError(f"{op}: params must have shape (N, 2 C', ...), C' <= C, got {tuple(params.shape)} for x {tuple(x.shape)}")
    _check_mask(op, mask, x, channels)
    if log_det is not None:
        check_float(op, "log_det", log_det)
        check_shape(op, "log_det", log_det, x.shape[:1], "(N,)")
        check_device(op, "log_det", log_det, "x", x)
    if limit is not None:
        check_number(op, "limit", limit)
    if limit is None:
        limit = -math.log(1e-3) if scale == "soft_clip" else 2.0
    elif scale not in ("tanh", "soft_clip", "arctan") or not 0 < limit < math.inf:
        raise ValueError(f'{op}: limit must be positive, and scale "tanh", "soft_clip" or "arctan", got {limit} with {scale!r}')
    limit = 0.636 * limit if scale == "arctan" else limit  # FrEIA's approximation of 2 / pi
    if layout == "interleaved":
        params = torch.cat([params[:, 0::2], params[:, 1::2]], 1)
    x, params = same_precision((x, params))
    work, running = working_type(x, params), None
    if log_det is not None and working_type(log_det, x) == work:
        running = log_det.to(work)
    if mask is not None:  # a number per element of a sample, which the kernels read like the other inputs
        mask = mask.expand(x.shape[1:]).to(x.device, work).contiguous()
    return x, params, mask, running, SCALES.index(scale), layout == "scale_shift", shift_first, inverse, float(limit)


def additive_coupling(x, shift, *, inverse=False, mask=None):
    """y = x + shift on the transformed part of x, the rest unchanged (NICE, Dinh et al., 2014, equation 9); log_det is zero.

    x           (N, C, ...). Its last channels are transformed, as many as shift has; the first ones pass through
    shift       (N, C', ...), C' <= C
    inverse     x from y: x - shift
    mask        as in affine_coupling, where then C' = C

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64) and returned in the promoted type. TypeError,
    ValueError on anything else. Differentiable to any order. Made of torch's operations.
    """
    op = "additive_coupling"
    check_float(op, "x", x)
    check_float(op, "shift", shift, x.dim())
    check_device(op, "shift", shift, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must be (N, C, ...), got shape {tuple(x.shape)}")
    channels = shift.shape[1]
    if channels > x.shape[1] or shift.shape != (x.shape[0], channels, *x.shape[2:]):
        raise ValueError(f"{op}: shift must have shape (N, C', ...), C' <= C, got {tuple(shift.shape)} for x {tuple(x.shape)}")
    _check_mask(op, mask, x, channels)
    dtype = promoted(x, shift)
    kept, old = x.split([x.shape[1] - channels, channels], 1) if channels < x.shape[1] else (None, x)
    if x.dtype != shift.dtype:
        old, shift = in_working_type(old, shift)
    y = old - shift if inverse else old + shift
    y = (y if mask is None else torch.where(mask.to(x.device), y, old)).to(dtype)
    return y if kept is None else torch.cat([kept.to(dtype), y], 1)


def _check_mask(op, mask, x, channels):
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be a boolean tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
    if mask.dim() > x.dim() - 1 or any(m not in (1, n) for m, n in zip(reversed(mask.shape), reversed(x.shape), strict=False)):
        raise ValueError(f"{op}: mask must broadcast to one sample {tuple(x.shape[1:])}, got shape {tuple(mask.shape)}")
    if mask.device.type == "meta" and x.device.type != "meta":
        check_device(op, "mask", mask, "x", x)
    if channels != x.shape[1]:
        raise ValueError(f"{op}: with a mask all {x.shape[1]} channels of x must have parameters, got those of {channels}")


def _scaled(u, scale, limit):
    """(s, ln s)"""
    if scale == "exp":
        return u.exp(), u
    if scale == "sigmoid":
        return torch.sigmoid(u + 2), F.logsigmoid(u + 2)
    if scale in ("sigmoid_floor", "softplus"):
        s = (torch.sigmoid(u + 2) if scale == "sigmoid_floor" else torch.logaddexp(u, torch.zeros_like(u))) + 1e-3
        return s, s.log()
    log_s = u / (1 + u.abs() / limit) if scale == "soft_clip" else limit * (u.tanh() if scale == "tanh" else u.atan())
    return log_s.exp(), log_s


def _reference(x, params, mask, running, scale, scale_first, shift_first, inverse, limit):
    dtype = promoted(x, params)
    x, params = in_working_type(x, params)
    shift, raw = params.chunk(2, 1) if params.shape[1] else (params, params)
    if scale_first:
        shift, raw = raw, shift
    kept, x = x.split([x.shape[1] - shift.shape[1], shift.shape[1]], 1)
    s, log_s = _scaled(raw, SCALES[scale], limit)
    if inverse:
        y, log_s = x / s - shift if shift_first else (x - shift) / s, -log_s
    else:
        y = (x + shift) * s if shift_first else x * s + shift
    if mask is not None:
        y, log_s = torch.where(mask != 0, y, x), torch.where(mask != 0, log_s, torch.zeros_like(log_s))
    log_det = log_s.flatten(1).sum(1)
    return torch.cat([kept, y], 1).to(dtype), log_det if running is None else running + log_det


_op = Op(
    _NAME,
    "(Tensor x, Tensor params, Tensor? mask, Tensor? running, int scale, bool scale_first, bool shift_first, bool inverse, "
    "float limit) -> (Tensor, Tensor)",
    reference=_reference,
    fake=lambda x, params, *_: (
        x.new_empty(x.shape, dtype=promoted(x, params)),
        x.new_empty(x.shape[:1], dtype=working_type(x, params)),
    ),
    differentiable=("x", "params", "running"),
)


def _reference_in_place(x, *args):
    y, log_det = _reference(x, *args)
    x.copy_(y)
    return log_det


_in_place = Op(
    "affine_coupling_",
    "(Tensor(a!) x, Tensor params, Tensor? mask, Tensor? running, int scale, bool scale_first, bool shift_first, bool inverse, "
    "float limit) -> Tensor",
    reference=_reference_in_place,
    fake=lambda x, params, *_: x.new_empty(x.shape[:1], dtype=working_type(x, params)),
)


def _eager(x, params):
    kept, x = x.chunk(2, 1)
    shift, raw = params.chunk(2, 1)
    s = torch.sigmoid(raw + 2)
    return torch.cat([kept, x * s + shift], 1), torch.log(s).flatten(1).sum(1)


def _masked(make, shape):
    mask = torch.arange(math.prod(shape[1:]), device=make.device).reshape(shape[1:]) % 2 == 0
    return {"x": make(shape), "params": make((shape[0], 2 * shape[1], *shape[2:])), "mask": mask, "log_det": make(shape[:1])}


def _on_a_copy(x, params, **settings):
    x = x.to(promoted(x, params), copy=True)
    return x, affine_coupling_(x, params, **settings)


_on_a_copy.__name__ = "affine_coupling_"

CASES = (
    Case(
        _on_a_copy,
        lambda make, shape: {"x": make(shape), "params": make((shape[0], shape[1] // 2 * 2, *shape[2:]))},
        forms=(_masked,),
        shapes=((3, 6, 5), (0, 4), (4, 3)),
        variants=({"scale": "sigmoid", "shift_first": True}, {"scale": "arctan", "inverse": True, "layout": "scale_shift"}),
        constants=None,
    ),
    Case(
        affine_coupling,
        lambda make, shape: {"x": make(shape), "params": make((shape[0], shape[1] // 2 * 2, *shape[2:]))},
        forms=(_masked,),
        shapes=((3, 6, 5), (1, 2), (0, 4), (4, 3), (2, 4, 17, 31)),
        variants=(
            {"scale": "sigmoid", "shift_first": True},
            {"scale": "sigmoid_floor", "inverse": True},
            {"scale": "tanh", "inverse": True, "shift_first": True, "layout": "scale_shift"},
            {"scale": "soft_clip"},
            {"scale": "softplus", "layout": "interleaved"},
            {"scale": "arctan"},
        ),
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 4 * size * math.prod(shape),
        bench_shapes=((4096, 16), (64, 12, 16, 16), (16, 12, 32, 32)),
        bench_variant={"scale": "sigmoid"},
    ),
)
