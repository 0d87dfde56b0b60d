"""group_norm_act: group normalisation with its usual company in diffusion models, in one op."""

import functools
import math

import torch
import torch.nn.functional as F

from genkern.core import Op
from genkern.ops._common import (
    check_choice,
    check_device,
    check_float,
    check_shape,
    check_written,
    in_working_type,
    promoted,
    same_precision,
)
from genkern.testing._case import Case


def group_norm_act(x, groups, weight=None, bias=None, *, eps=1e-5, pre_bias=None, scale=None, shift=None, activation=None, out=None):
    """y = act((norm(x + pre_bias) * weight + bias) * (1 + scale) + shift), norm(u) = (u - mean) / sqrt(variance + eps).

    Mean and (biased) variance are over the elements of `groups` equal groups of neighbouring channels of each sample (Wu & He, 2018,
    equations 1-3, 7). pre_bias is the time embedding that residual blocks add before their second norm (Ho et al., 2020); scale and
    shift are adaptive group normalisation (Dhariwal & Nichol, 2021, section 3). The statistics survive a large mean: each tile's own
    mean is its origin, and tiles merge in double precision.

    x               (N, C, ...), for example (N, C, H, W) or (N, C, L); or a list [x1, x2] of two such tensors, normalised as their
                    concatenation along the channels, which is never written. Read in place where each sample is contiguous, or
                    all of x channels_last (channels_last_3d), as the result is then too; other layouts are copied first
    groups          number of groups, a divisor of C
    weight, bias    (C,)
    pre_bias, scale, shift
                    (N, C)
    activation      None or "silu"
    out             where to write the result, (N, C, ...) of any of the types, its samples contiguous or all of it channels_last
                    (x is copied first if it lies differently); may be x itself. No gradient

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64 if an input is), returned in the type of x.
    TypeError, ValueError on anything else. Differentiable to any order; only the inputs are kept for the backward pass.
    """
    if activation in (None, "silu") and _plain(x, groups, weight, bias, pre_bias, scale, shift, out):
        last = _is_channels_last(x if out is None else out)
        return _run(last, out, x, None, weight, bias, pre_bias, scale, shift, groups, float(eps), activation == "silu")
    op = "group_norm_act"
    inputs = list(x) if isinstance(x, (list, tuple)) else [x]
    if len(inputs) not in (1, 2):
        raise ValueError(f"{op}: x must be a tensor or a list of two, got {len(inputs)}")
    for tensor in inputs:
        check_float(op, "x", tensor)
        if tensor.dim() < 2:
            raise ValueError(f"{op}: x must be (N, C, ...), got shape {tuple(tensor.shape)}")
    x, x2 = inputs[0], inputs[1] if len(inputs) == 2 else None
    if x2 is not None:
        check_device(op, "x[1]", x2, "x[0]", x)
        if x2.dim() != x.dim() or x2.shape[0] != x.shape[0] or x2.shape[2:] != x.shape[2:]:
            raise ValueError(f"{op}: the two inputs may differ in their channels only, got {tuple(x.shape)} and {tuple(x2.shape)}")
    n, channels = x.shape[0], sum(tensor.shape[1] for tensor in inputs)
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or channels % groups:
        raise ValueError(f"{op}: groups must be a positive int that divides the {channels} channels, got {groups!r}")
    named = (("weight", weight), ("bias", bias), ("pre_bias", pre_bias), ("scale", scale), ("shift", shift))
    for name, tensor in named:
        if tensor is not None:
            check_float(op, name, tensor)
            shape, meaning = ((channels,), "(C,)") if name in ("weight", "bias") else ((n, channels), "(N, C)")
            check_shape(op, name, tensor, shape, meaning)
            check_device(op, name, tensor, "x", x)
    check_choice(op, "activation", activation, (None, "silu"))
    tensors = same_precision((x, x2, weight, bias, pre_bias, scale, shift))
    arguments = groups, float(eps), activation == "silu"
    if out is None:
        return _run(all(_is_channels_last(tensor) for tensor in inputs), None, *tensors, *arguments)
    check_float(op, "out", out)
    check_shape(op, "out", out, (n, channels, *x.shape[2:]))
    check_device(op, "out", out, "x", x)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*tensors, out)):
        raise ValueError(f"{op}: out has no gradient, but an input requires one")
    if (out.dtype == torch.float64) != (tensors[0].dtype == torch.float64):
        raise ValueError(f"{op}: float64 does not mix with narrower types: out is {out.dtype}, x is {tensors[0].dtype}")
    last = _is_channels_last(out)
    if not (last or out.is_contiguous() or (out.numel() and out[0].is_contiguous())):
        raise ValueError(f"{op}: the samples of out must be contiguous, or all of it channels_last")
    check_written(op, {"out": out}, (x, x2, weight, bias, pre_bias, scale, shift))
    if x2 is not None and any(out.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in (x, x2)):
        raise ValueError(f"{op}: out must not share memory with one of two inputs")
    return _run(last, out, *(None if t is None else t.detach() for t in tensors), *arguments)


def _run(channels_last, out, x, x2, *rest):
    """The op of the layout that the result has."""
    if channels_last:
        inputs = _pixels_first(x), None if x2 is None else _pixels_first(x2)
        if out is None:
            return _channels_last_op(*inputs, *rest).unflatten(1, x.shape[2:]).movedim(-1, 1)
        _channels_last_out_op(*inputs, *rest, _pixels_first(out))
    elif out is None:
        return _op(x, x2, *rest)
    else:
        _out_op(x, x2, *rest, out)
    torch.autograd.graph.increment_version([out])
    return out


def _pixels_first(x):
    """(N, C, ...) as (N, pixels, C): a view where x is channels_last."""
    return x.movedim(1, -1).flatten(1, -2)


_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _plain(x, groups, weight, bias, pre_bias, scale, shift, out):
    """Whether at a glance everything is as it must be: in a small call the checks take more time than the kernel.

    What this turns down goes through the checks that say what is wrong, and may well be accepted there.
    """
    if not (type(x) is torch.Tensor and type(groups) is int and x.dtype in _NARROW):
        return False
    shape, device = x.shape, x.device
    if not (len(shape) >= 2 and groups > 0 and shape[1] % groups == 0):
        return False
    for t in (weight, bias):
        if t is not None and not (isinstance(t, torch.Tensor) and t.shape == shape[1:2] and t.dtype in _NARROW and t.device == device):
            return False
    for t in (pre_bias, scale, shift):
        if t is not None and not (isinstance(t, torch.Tensor) and t.shape == shape[:2] and t.dtype in _NARROW and t.device == device):
            return False
    if out is None:
        return True
    if torch.compiler.is_compiling() or not (type(out) is torch.Tensor and out.shape == shape and out.dtype in _NARROW):
        return False
    if out.device != device or out.requires_grad or not (out.is_contiguous() or _is_channels_last(out)):
        return False
    begin, recording = out.data_ptr(), torch.is_grad_enabled()
    end = begin + out.nbytes
    for t in (x, weight, bias, pre_bias, scale, shift):
        if t is not None and t is not out:
            at = t.data_ptr()
            overlaps = at < end and begin < at + t.nbytes
            if (recording and t.requires_grad) or overlaps or not (t.is_contiguous() or _is_channels_last(t)):
                return False
    return True


def _is_channels_last(x):  # vmap answers no question about memory formats
    return not x.is_contiguous() and x.dim() > 2 and x.movedim(1, -1).is_contiguous()


def _reference(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu):
    dtype = promoted(x, x2)
    if x2 is not None:
        x = torch.cat([x.to(dtype), x2.to(dtype)], 1)
    x, weight, bias, pre_bias, scale, shift = in_working_type(x, weight, bias, pre_bias, scale, shift)
    per_pixel = lambda t: t.reshape(*t.shape, *(1 for _ in x.shape[2:]))  # (N, C) -> (N, C, 1, ...), (C,) -> (C, 1, ...)
    y = x if pre_bias is None else x + per_pixel(pre_bias)
    if x.numel():
        y = torch.group_norm(y.contiguous(), groups, weight, bias, eps)
    elif weight is not None and bias is not None:  # torch refuses empty groups, but the gradients are zero, not absent
        y = y * per_pixel(weight) + per_pixel(bias)
    if scale is not None:
        y = y * (1 + per_pixel(scale))
    if shift is not None:
        y = y + per_pixel(shift)
    return (F.silu(y) if silu else y).to(dtype)


def _reference_channels_last(x, x2, *rest):
    y = _reference(x.movedim(-1, 1), None if x2 is None else x2.movedim(-1, 1), *rest)
    return y.movedim(1, -1).contiguous()


def _ops(name, reference, channels):
    """The op that returns a new tensor and the one that writes into a given one; `channels` is their dimension."""

    def fake(x, x2, *rest):
        shape = list(x.shape)
        shape[channels] += 0 if x2 is None else x2.shape[channels]
        return x.new_empty(shape, dtype=promoted(x, x2))

    def reference_out(*args):
        args[-1].copy_(reference(*args[:-1]))

    inputs = (
        "Tensor x, Tensor? x2, Tensor? weight, Tensor? bias, Tensor? pre_bias, Tensor? scale, Tensor? shift, int groups, float eps, "
        "bool silu"
    )
    differentiable = ("x", "x2", "weight", "bias", "pre_bias", "scale", "shift")
    new = Op(name, f"({inputs}) -> Tensor", reference=reference, fake=fake, differentiable=differentiable)
    return new, Op(f"{name}_out", f"({inputs}, Tensor(a!) out) -> ()", reference=reference_out, fake=lambda *args: None)


_op, _out_op = _ops("group_norm_act", _reference, 1)
_channels_last_op, _channels_last_out_op = _ops("group_norm_act_channels_last", _reference_channels_last, 2)


def group_norm_act_out(x, groups, **options):
    """group_norm_act in place of a copy of x, for cases."""
    out = x.clone(memory_format=torch.contiguous_format)
    return group_norm_act(out, groups, out=out, **options)


@functools.wraps(group_norm_act)
def _of_one_or_two(x, groups, x2=None, **options):
    """group_norm_act with the second input as an argument of its own, so that cases can name it."""
    return group_norm_act(x if x2 is None else [x, x2], groups, **options)


def _to_channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def group_norm_act_channels_last(x, groups, x2=None, **options):
    """group_norm_act of images in that layout, for cases."""
    x, x2 = (t if t is None else _to_channels_last(t) for t in (x, x2))
    return group_norm_act(x if x2 is None else [x, x2], groups, **options)


def group_norm_act_channels_last_out(x, groups, **options):
    """group_norm_act of images in that layout in place of a copy of x, for cases."""
    out = x.clone(memory_format=torch.preserve_format)
    return group_norm_act(out, groups, out=out, **options)


def _eager(x, groups, weight, bias, **_):
    return F.silu(F.group_norm(x, groups, weight, bias))


def _arguments(make, shape):
    groups = 32 if shape[1] >= 128 else 2
    return {"x": make(shape), "groups": groups, "weight": make((shape[1],)), "bias": make((shape[1],))}


def _adaptive(make, shape):
    conditions = {name: make(shape[:2]) for name in ("pre_bias", "scale", "shift")}
    return _arguments(make, shape) | conditions


def _images(make, shape):
    arguments = _arguments(make, shape)
    return arguments | {"x": _to_channels_last(arguments["x"])}


def _images_and_conditions(make, shape):
    arguments = _adaptive(make, shape)
    return arguments | {"x": _to_channels_last(arguments["x"])}


def _two_inputs(make, shape):  # C + 2C channels in two groups, which x2 begins inside
    joint = (shape[0], 3 * shape[1], *shape[2:])
    return _adaptive(make, joint) | {"x": make(shape), "x2": make((shape[0], 2 * shape[1], *shape[2:]))}


CASES = (
    Case(
        _of_one_or_two,
        _arguments,
        forms=(_adaptive, _two_inputs),
        shapes=((2, 6, 5, 7), (0, 4, 3), (3, 4), (2, 4, 0), (1, 4, 521)),
        small=(2, 2, 3),
        large=(3, 8, 5003),
        variants=({"activation": "silu"}, {}),
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 6 * size * math.prod(shape),
        bench_shapes=((8, 32, 8, 8), (16, 64, 16, 16), (2, 320, 64, 64), (2, 640, 32, 32), (1, 128, 256, 256)),
        bench_variant={"activation": "silu"},
    ),
    Case(
        group_norm_act_channels_last,
        _images,
        forms=(_two_inputs,),
        shapes=((2, 6, 5, 7), (1, 4, 3, 521)),
        small=(1, 2, 3, 1),
        large=(3, 8, 61, 83),
        variants=({"activation": "silu"},),
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 6 * size * math.prod(shape),
        bench_shapes=((2, 320, 64, 64), (2, 640, 32, 32)),
        bench_variant={"activation": "silu"},
    ),
    Case(
        group_norm_act_out,
        _adaptive,
        shapes=((2, 6, 5, 7), (0, 4, 3), (1, 4, 521)),
        large=(3, 8, 5003),
        variants=({"activation": "silu"},),
        dtypes=(torch.float32, torch.bfloat16),
        constants=None,
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
    ),
    Case(
        group_norm_act_channels_last_out,
        _images_and_conditions,
        shapes=((2, 6, 5, 7), (1, 4, 3, 61)),
        large=(3, 8, 61, 83),
        variants=({"activation": "silu"},),
        dtypes=(torch.float32, torch.bfloat16),
        constants=None,
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
    ),
)
