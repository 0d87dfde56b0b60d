"""causal_conv1d: a convolution over time that sees no future; causal_conv1d_update: the same a few steps at a time."""

import math

import torch
import torch.nn.functional as F

from genkern.core import Op
from genkern.ops._common import (
    FLOATS,
    check_choice,
    check_device,
    check_float,
    check_int,
    check_shape,
    check_tensor,
    check_written,
    expanded,
    in_working_type,
    promoted,
    same_precision,
)
from genkern.ops.autoregressive._causal_conv1d_dense import behind, dense, dense_silu, for_kernel, gated, pays_dense, takes_kernels
from genkern.ops.autoregressive._gated_activation import gated_activation
from genkern.testing._case import Case


def causal_conv1d(
    x,
    weight,
    bias=None,
    *,
    dilation=1,
    groups=1,
    activation=None,
    initial_state=None,
    return_final_state=False,
    seq_idx=None,
    condition=None,
    out=None,
):
    """y[t] = act(bias + sum_k weight[k] x[t - (K - 1 - k) dilation]): the convolution of WaveNet (van den Oord et al., 2016, section
    2.1) and, with groups = C, the short convolution of state space models (Mamba, Gu & Dao, 2023, section 3.4).

    x               (N, C, L)
    weight          (C_out, C / groups, K) as in torch.nn.Conv1d; weight[..., K - 1] meets the present
    bias            (C_out,) or None
    dilation        distance of neighbouring taps
    groups          C with C_out = C: depthwise, one filter per channel. 1, or several groups of at least 4 outputs each: dense
                    kernels of the CPU, CUDA and Triton, whose gradients are torch's but on the CPU. On a GPU they serve float32 and
                    float64 outside autocast, without TF32; narrower types take them only under genkern.backend(...). The rest is
                    torch's own convolution, which follows autocast as torch.nn.Conv1d does: several groups of fewer than 4 outputs
                    (also a depthwise one with C_out a multiple of C), all but depthwise ones with seq_idx, and devices without kernels
    activation      None, "silu", or "gated": tanh(a) sigmoid(b) of the two halves of the C_out outputs, as gated_activation. In the
                    pass of the convolution: "silu" of a depthwise one, and of a dense one on the CPU where no gradient is asked
                    for; "gated" of groups=1 where none is
    condition       of "gated": None, or a tensor that broadcasts to (N, C_out, L), added before the gate
    initial_state   (N, C, (K - 1) dilation): the inputs before x; None: zeros
    return_final_state
                    also return the last (K - 1) dilation inputs (N, C, ...), the initial_state of what follows
    seq_idx         (N, L) int32: several sequences packed one behind the other. Taps do not cross to another index, outputs
                    at negative indices are zero, initial_state belongs to the first sequence and the final state holds the
                    last one alone
    out             where to write y: (N, C_out, L), of y's type; may be x itself. No gradient. Saves the fresh memory, as costly as
                    half of the work on large inputs, in the depthwise kernel on the CPU; elsewhere y is copied into it

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64), returned in the promoted type. TypeError,
    ValueError on anything else. Differentiable to any order, also in initial_state. Skipped taps are never read: an infinity or
    NaN in the future or in another sequence does not reach an output. In float32 the kernels' outputs have the same bits however x is
    cut into pieces that hand on their state, in any batch and, on the CPU, for any number of threads.
    """
    check_float("causal_conv1d", "x", x, 3)
    check_float("causal_conv1d", "weight", weight, 3)
    _check_filter("causal_conv1d", x, weight, bias, dilation, activation, (None, "silu", "gated"))
    fits = lambda channels: channels >= groups and channels % groups == 0
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1 or not fits(x.shape[1]) or not fits(weight.shape[0]):
        raise ValueError(
            f"causal_conv1d: groups must divide the channels of x and weight, got {groups} for {x.shape[1]} and {weight.shape[0]}"
        )
    if weight.shape[1] != x.shape[1] // groups:
        raise ValueError(
            f"causal_conv1d: weight must have shape (C_out, C / groups, K) = (..., {x.shape[1] // groups}, ...), "
            f"got {tuple(weight.shape)}"
        )
    past = (weight.shape[2] - 1) * dilation
    if initial_state is not None:
        check_float("causal_conv1d", "initial_state", initial_state)
        check_shape("causal_conv1d", "initial_state", initial_state, (*x.shape[:2], past), "(N, C, (K - 1) dilation)")
        check_device("causal_conv1d", "initial_state", initial_state, "x", x)
    if seq_idx is not None:
        check_tensor("causal_conv1d", "seq_idx", seq_idx, torch.int32)
        check_shape("causal_conv1d", "seq_idx", seq_idx, (x.shape[0], x.shape[2]), "(N, L)")
        check_device("causal_conv1d", "seq_idx", seq_idx, "x", x)
    if condition is not None and activation != "gated":
        raise ValueError(f'causal_conv1d: condition belongs to activation "gated", got {activation!r}')
    if activation == "gated" and weight.shape[0] % 2:
        raise ValueError(f'causal_conv1d: activation "gated" needs an even C_out, got {weight.shape[0]}')
    x, weight, bias, initial_state = same_precision((x, weight, bias, initial_state))
    if out is not None:
        _check_out(out, x, weight, bias, initial_state, seq_idx, condition, activation == "gated")
    final = _final_state(x, initial_state, seq_idx, past) if return_final_state else None  # first: out may be x
    if activation == "gated":
        y = _gated(x, weight, bias, initial_state, seq_idx, dilation, groups, condition)
    else:
        y = _convolved(x, weight, bias, initial_state, seq_idx, dilation, groups, activation == "silu", out)
    if out is not None:
        y = out if y is out else out.copy_(y)
    return (y, final) if return_final_state else y


def causal_conv1d_update(x, state, weight, bias=None, *, dilation=1, activation=None, state_indices=None):
    """One or several steps of a depthwise causal_conv1d, whose inputs so far are in `state`: it is shifted in place.

    x               (N, C) one step, or (N, C, T) several
    state           (S, C, P) with P >= (K - 1) dilation: the last P inputs, the newest last. S = N, or with state_indices any
                    number of slots. Any strides; with C innermost (a transposed (S, P, C) tensor) neighbouring channels are
                    read together. Quickest on the CPU: a contiguous one with P = 3 or 4 for four taps, one step a call
    weight, bias, dilation, activation
                    as in causal_conv1d, weight (C, 1, K) or (C, K)
    state_indices   (N,) int32: the slot of each request, no slot twice; a negative index is an empty request: zeros are returned

    Returns y of the shape of x, in the promoted type of x, weight and bias. In float32 on the CPU its bits are those of causal_conv1d
    at that position, in any batch and for any number of steps per call. float32, float64, bfloat16, float16, also mixed. TypeError,
    ValueError on anything else. There is no gradient (ValueError where one is asked for): use causal_conv1d with initial_state.
    """
    wide = state
    if state_indices is not None or not _is_plain_step(x, state, weight, bias, dilation, activation):
        x, wide, weight, bias, state_indices = _prepared_step(x, state, weight, bias, dilation, activation, state_indices)
    steps = x.unsqueeze(2) if x.dim() == 2 else x
    weight = weight.squeeze(1) if weight.dim() == 3 else weight
    y = _update(steps, wide, weight, bias, state_indices, dilation, activation == "silu")
    if wide is not state:
        state.copy_(wide)
    return y.squeeze(2) if x.dim() == 2 else y


def _is_plain_step(x, state, weight, bias, dilation, activation):
    """Whether _prepared_step, as slow as a small step itself, has nothing to refuse and nothing to change; of the CPU's tensors."""
    tensors = (x, state, weight) if bias is None else (x, state, weight, bias)
    dtype, grad = getattr(x, "dtype", None), torch.is_grad_enabled()
    for t in tensors:
        if not isinstance(t, torch.Tensor) or t.dtype is not dtype or not t.is_cpu or (grad and t.requires_grad):
            return False
    shape, held, filters = x.shape, state.shape, weight.shape
    if dtype not in FLOATS or not 2 <= len(shape) <= 3 or len(held) != 3 or not 2 <= len(filters) <= 3:
        return False
    samples, channels, taps = shape[0], shape[1], filters[-1]
    return (
        filters[0] == channels
        and (len(filters) == 2 or filters[1] == 1)
        and type(dilation) is int
        and held[0] == samples
        and held[1] == channels
        and held[2] >= (taps - 1) * dilation >= 0 < dilation
        and (bias is None or (bias.shape == (channels,) and bias.is_contiguous()))
        and (activation is None or activation == "silu")
        and state.is_contiguous()
        and weight.is_contiguous()
    )


def _prepared_step(x, state, weight, bias, dilation, activation, state_indices):
    op = "causal_conv1d_update"
    check_float(op, "x", x, (2, 3))
    check_float(op, "weight", weight, (2, 3))
    check_float(op, "state", state, 3)
    channels, taps = x.shape[1], weight.shape[-1]
    if weight.dim() == 3:
        check_shape(op, "weight", weight, (channels, 1, taps), "(C, 1, K)")
    else:
        check_shape(op, "weight", weight, (channels, taps), "(C, K)")
    _check_filter(op, x, weight, bias, dilation, activation, (None, "silu"))
    past = (taps - 1) * dilation
    slots = x.shape[0] if state_indices is None else state.shape[0]
    if state.shape[:2] != (slots, channels) or state.shape[2] < past:
        raise ValueError(
            f"{op}: state must have shape (slots, C, P >= (K - 1) dilation) = ({slots}, {channels}, >= {past}), "
            f"got {tuple(state.shape)}"
        )
    check_device(op, "state", state, "x", x)
    check_written(op, {"state": state})
    if state_indices is not None:
        check_tensor(op, "state_indices", state_indices, torch.int32)
        check_shape(op, "state_indices", state_indices, (x.shape[0],), "(N,)")
        check_device(op, "state_indices", state_indices, "x", x)
        readable = state_indices.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would synchronise
        if readable and state_indices.numel() and state_indices.max() >= slots:
            raise ValueError(f"{op}: state_indices must be below the number of slots {slots}, got {int(state_indices.max())}")
        state_indices = state_indices.contiguous()
    if _gradient_wanted(x, state, weight, bias):
        raise ValueError(f"{op}: has no gradient; call it under torch.no_grad(), or causal_conv1d with initial_state")
    weight, bias, x, wide = same_precision((weight.contiguous(), bias, x, state))
    return x, wide, weight, None if bias is None else bias.contiguous(), state_indices


def _check_filter(op, x, weight, bias, dilation, activation, activations):
    check_device(op, "weight", weight, "x", x)
    if weight.shape[-1] < 1:
        raise ValueError(f"{op}: weight must have at least one tap, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_float(op, "bias", bias)
        check_shape(op, "bias", bias, weight.shape[:1], "(C_out,)")
        check_device(op, "bias", bias, "x", x)
    check_int(op, "dilation", dilation)
    check_choice(op, "activation", activation, activations)


def _check_out(out, x, weight, bias, state, seq_idx, condition, gated):
    op, tensors = "causal_conv1d", (x, weight, bias, state, condition)
    if condition is not None:
        check_float(op, "condition", condition)
    check_tensor(op, "out", out, promoted(*tensors))
    check_shape(op, "out", out, (x.shape[0], weight.shape[0] // (2 if gated else 1), x.shape[2]), "(N, C_out, L)")
    check_device(op, "out", out, "x", x)
    if _gradient_wanted(*tensors, out):
        raise ValueError(f"{op}: out has no gradient, but an input requires one")
    check_written(op, {"out": out}, (*tensors, seq_idx))


def _gradient_wanted(*tensors):
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _padded_index(seq_idx, past):
    return torch.cat([seq_idx[:, :1].expand(-1, past), seq_idx], 1)


def _final_state(x, state, seq_idx, past):
    length = x.shape[2]
    tail = x[..., length - past :].clone() if length >= past else behind(x, state, past)[..., length:].clone()
    if seq_idx is None or length == 0:
        return tail
    index = _padded_index(seq_idx, past)[:, length:]
    return torch.where((index == seq_idx[:, -1:])[:, None], tail, 0)


def _convolved(x, weight, bias, state, seq_idx, dilation, groups, silu, out=None):
    """y, in `out` where a kernel writes there."""
    if not groups == x.shape[1] == weight.shape[0]:
        return _grouped(x, weight, bias, state, seq_idx, dilation, groups, silu)
    small = (None if t is None else t.contiguous() for t in (weight.reshape(weight.shape[0], -1), bias))
    arguments = (x, *small, state, None if seq_idx is None else seq_idx.contiguous(), dilation, silu)
    if out is None or _op.backend_of(x) not in ("cpu", "reference") or (out.stride(2) != 1 and out.shape[2] > 1):
        return _op(*arguments)
    _out_op(*arguments, out)
    torch.autograd.graph.increment_version(out)
    return out


def _grouped(x, weight, bias, state, seq_idx, dilation, groups, silu):
    """Any groups: a dense kernel, or torch's convolution, one for each tap where sequence indices forbid some."""
    dtype = promoted(x, weight, bias, state)
    if seq_idx is None and pays_dense(weight, groups) and takes_kernels(x, dtype):
        own_silu = silu and dense.backend_of(x) == "cpu"
        one_pass = own_silu and not _gradient_wanted(x, weight, bias, state)
        x, state, weight, bias = for_kernel(dense, x, state, weight, bias)
        y = (dense_silu if one_pass else dense)(x, state, weight, bias, None, dilation, groups)
        if own_silu and not one_pass:  # as a convolution of one tap, which has the bits of the one pass
            y = _op(y, y.new_ones(y.shape[1], 1), None, None, None, 1, True)
        return F.silu(y.to(dtype)) if silu and not own_silu else y.to(dtype)
    y = _by_torch(x, weight, bias, state, seq_idx, dilation, groups, dtype)
    return F.silu(y) if silu else y


def _by_torch(x, weight, bias, state, seq_idx, dilation, groups, dtype):
    past, length = (weight.shape[2] - 1) * dilation, x.shape[2]
    x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    padded = behind(x, state, past)
    if seq_idx is None:
        return F.conv1d(padded, weight, bias, dilation=dilation, groups=groups)
    index = _padded_index(seq_idx, past)
    y = 0 if bias is None else bias[:, None]
    for k in range(weight.shape[2]):
        window = slice(k * dilation, k * dilation + length)
        same = (index[:, window] == seq_idx)[:, None]
        y = y + F.conv1d(torch.where(same, padded[..., window], 0), weight[..., k : k + 1], groups=groups)
    return torch.where((seq_idx < 0)[:, None], 0, y)


def _gated(x, weight, bias, state, seq_idx, dilation, groups, condition):
    """One pass; two where gradients are wanted, since then the gate's inputs are needed again."""
    tensors = (x, weight, bias, state, condition)
    if _gradient_wanted(*tensors) or groups > 1 or seq_idx is not None or not takes_kernels(x, promoted(*tensors)):
        return gated_activation(_convolved(x, weight, bias, state, seq_idx, dilation, groups, False), condition)
    if condition is not None:
        check_float("causal_conv1d", "condition", condition)
        check_device("causal_conv1d", "condition", condition, "x", x)
        condition = expanded("causal_conv1d", "condition", condition, "the convolution", (x.shape[0], weight.shape[0], x.shape[2]))
    dtype = promoted(*tensors)
    x, state, weight, bias, condition = for_kernel(gated, x, state, weight, bias, condition)
    return gated(x, state, weight, bias, None, condition, dilation).to(dtype)


def _reference(x, weight, bias, state, seq_idx, dilation, silu):
    dtype = promoted(x, weight, bias, state)
    x, weight, bias, state = in_working_type(x, weight, bias, state)
    past, length = (weight.shape[1] - 1) * dilation, x.shape[2]
    padded = behind(x, state, past)
    index = None if seq_idx is None else _padded_index(seq_idx, past)
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
    for k in range(weight.shape[1]):
        window = slice(k * dilation, k * dilation + length)
        tap = padded[..., window]
        if index is not None:
            tap = torch.where((index[:, window] == seq_idx)[:, None], tap, 0)
        y = y + weight[:, k, None] * tap
    if silu:
        y = F.silu(y)
    if index is not None:
        y = torch.where((seq_idx < 0)[:, None], 0, y)
    return y.to(dtype)


def _reference_update(x, state, weight, bias, indices, dilation, silu):
    wanted = torch.arange(x.shape[0], device=x.device) if indices is None else indices.long()
    chosen = state[wanted.clamp(min=0)]
    past = (weight.shape[1] - 1) * dilation
    window = torch.cat([chosen.to(promoted(chosen, x)), x.to(promoted(chosen, x))], 2)
    y = _reference(x, weight, bias, chosen[..., state.shape[2] - past :], None, dilation, silu).to(promoted(x, weight, bias))
    kept = window[..., x.shape[2] :].to(state.dtype)
    if indices is None:
        state.copy_(kept)
        return y
    spare = torch.cat([state, kept[:1]])  # empty requests write behind the last slot
    spare[torch.where(wanted < 0, state.shape[0], wanted)] = kept
    state.copy_(spare[: state.shape[0]])
    return torch.where((wanted >= 0)[:, None, None], y, 0)


_op = Op(
    "causal_conv1d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx, int dilation, bool silu) -> Tensor",
    reference=_reference,
    fake=lambda x, weight, bias, state, seq_idx, dilation, silu: x.new_empty(x.shape, dtype=promoted(x, weight, bias, state)),
    differentiable=("x", "weight", "bias", "initial_state"),
)


def _reference_out(*args):
    args[-1].copy_(_reference(*args[:-1]))


_out_op = Op(
    "causal_conv1d_out",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? seq_idx, int dilation, bool silu, Tensor(a!) out) -> ()",
    reference=_reference_out,
    fake=lambda *args: None,
)


_update = Op(
    "causal_conv1d_update",
    "(Tensor x, Tensor(a!) state, Tensor weight, Tensor? bias, Tensor? state_indices, int dilation, bool silu) -> Tensor",
    reference=_reference_update,
    fake=lambda x, state, weight, bias, indices, dilation, silu: x.new_empty(x.shape, dtype=promoted(x, weight, bias)),
)


def _per_channel(x, weight, bias=None, initial_state=None, seq_idx=None, **options):
    return causal_conv1d(x, weight, bias, groups=x.shape[1], initial_state=initial_state, seq_idx=seq_idx, **options)


_per_channel.__name__ = "causal_conv1d"


def causal_conv1d_out(x, weight, bias=None, initial_state=None, seq_idx=None, out=None, **options):
    """causal_conv1d into memory that is there, for cases; without `out` of its own."""
    if out is None:
        out = torch.full(x.shape, math.nan, dtype=promoted(x, weight, bias, initial_state), device=x.device)
    return _per_channel(x, weight, bias, initial_state, seq_idx, out=out, **options)


def _several_channels(x, weight, bias=None, initial_state=None, dilation=3, **options):
    groups = x.shape[1] // weight.shape[1]
    return causal_conv1d(x, weight, bias, dilation=dilation, groups=groups, initial_state=initial_state, **options)


_several_channels.__name__ = "causal_conv1d_dense"


def _several_channels_with_silu(**arguments):
    return _several_channels(**arguments, activation="silu")


_several_channels_with_silu.__name__ = "causal_conv1d_dense_silu"


def _with_gate(x, weight, bias=None, condition=None, initial_state=None):
    return causal_conv1d(x, weight, bias, dilation=4, activation="gated", initial_state=initial_state, condition=condition)


_with_gate.__name__ = "causal_conv1d_gated"


def _on_a_copy(x, state, weight, bias=None, state_indices=None, in_place=False, **options):
    state = state if in_place else state.clone()
    return causal_conv1d_update(x, state, weight, bias, state_indices=state_indices, **options), state


_on_a_copy.__name__ = "causal_conv1d_update"


def _taps(taps):
    def arguments(make, shape):
        n, c, _ = shape = (*shape, 1, 1)[:3]
        return {"x": make(shape), "weight": make((c, 1, taps), 0.5), "bias": make((c,))}

    return arguments


def _dense_arguments(outputs, groups=1):
    def arguments(make, shape):
        n, c, _ = shape = (*shape, 1, 1)[:3]
        c = -(-c // groups) * groups
        weight = make((outputs or 2 * c, c // groups, 2), (c // groups) ** -0.5)
        return {"x": make((n, c, *shape[2:])), "weight": weight, "bias": make((weight.shape[0],))}

    return arguments


def _dense_with_state(make, shape):
    arguments = _dense_arguments(10, groups=2)(make, shape)
    return arguments | {"initial_state": make((*arguments["x"].shape[:2], 3))}


def _gated_arguments(make, shape):
    arguments = _dense_arguments(None)(make, shape)
    n, c, length = arguments["x"].shape
    return arguments | {"condition": make((n, 2 * c, length))}


def _gated_with_state(make, shape):
    arguments = _dense_arguments(10)(make, shape)
    n, c, length = arguments["x"].shape
    return arguments | {"condition": make((n, 10, 1)), "initial_state": make((n, c, 4))}


def _with_state(make, shape):
    arguments = _taps(3)(make, shape)
    n, c, _ = arguments["x"].shape
    return arguments | {"initial_state": make((n, c, 2))}


def _packed(make, shape):
    arguments = _with_state(make, shape)
    n, _, length = arguments["x"].shape
    index = torch.arange(length, device=make.device) // 5 - (torch.arange(length, device=make.device) % 5 == 3).int()
    return arguments | {"seq_idx": index.to(torch.int32).expand(n, -1)}


def _wide(make, shape):
    arguments = _taps(6)(make, shape)
    del arguments["bias"]
    return arguments


def _eager(x, weight, bias):
    taps = weight.shape[2]
    return F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), weight, bias, groups=x.shape[1]))


def _eager_out(x, weight, bias, out):
    """Has no way into `out`, but a fresh tensor less by working in place."""
    taps = weight.shape[2]
    return F.silu(F.conv1d(F.pad(x, (taps - 1, 0)), weight, bias, groups=x.shape[1]), inplace=True)


def _eager_dense(x, weight, bias):
    return F.conv1d(F.pad(x, (4, 0)), weight, bias, dilation=4)


def _eager_dense_silu(x, weight, bias):
    return F.silu(_eager_dense(x, weight, bias))


def _eager_gated(x, weight, bias, condition):
    a, b = (F.conv1d(F.pad(x, (4, 0)), weight, bias, dilation=4) + condition).chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


def _step_arguments(make, shape):
    arguments = _taps(4)(make, shape)
    n, c, _ = arguments["x"].shape
    return {"x": arguments["x"], "state": make((n, c, 3)), "weight": arguments["weight"], "bias": arguments["bias"]}


def _slots(make, shape):
    arguments = _step_arguments(make, shape)
    n, c, _ = arguments["x"].shape
    order = torch.arange(n, 0, -1, dtype=torch.int32, device=make.device)
    if n > 1:
        order[0] = -1
    return arguments | {"state": make((n + 2, c, 5)), "state_indices": order}


def _eager_step(x, state, weight, bias, in_place):
    window = torch.cat([state, x], 2)
    state.copy_(window[..., -state.shape[2] :])
    return F.silu(F.conv1d(window, weight, bias, groups=x.shape[1])), state


CASES = (
    Case(
        _per_channel,
        _taps(4),
        forms=(_with_state, _packed, _wide),
        shapes=((2, 3, 37), (1, 1, 1), (0, 2, 4), (2, 3, 0), (1, 5, 64)),
        small=(1, 2, 3),
        large=(3, 64, 1031),
        variants=({"activation": "silu"}, {"dilation": 1}),
        eager=_eager,
        bytes=lambda shape, size: 2 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 3 * size * math.prod(shape),
        bench_shapes=((2, 1024, 2048), (4, 2048, 512), (1, 256, 64), (2, 1024, 1)),
        bench_variant={"activation": "silu"},
    ),
    Case(
        causal_conv1d_out,
        _taps(4),
        forms=(_packed,),
        shapes=((2, 3, 37), (0, 2, 4)),
        large=(3, 64, 1031),
        variants=({"activation": "silu"},),
        dtypes=(torch.float32, torch.float64, torch.bfloat16),
        constants=None,
        eager=_eager_out,
        bytes=lambda shape, size: 2 * size * math.prod(shape),
        bench_shapes=((2, 1024, 2048), (4, 2048, 512)),
        bench_variant={"activation": "silu"},
        bench_arguments=lambda arguments: {"out": torch.empty_like(arguments["x"])},
    ),
    Case(
        _several_channels,
        _dense_arguments(None),
        forms=(_dense_with_state,),
        shapes=((2, 3, 53), (1, 1, 1), (0, 2, 4)),
        small=(1, 2, 5),
        large=(3, 32, 1031),
        eager=_eager_dense,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 6 * size * math.prod(shape),
        bench_shapes=((4, 64, 4096), (1, 128, 1024), (8, 32, 1024), (1, 64, 1)),
        bench_variant={"dilation": 4},
    ),
    Case(
        _several_channels_with_silu,
        _dense_arguments(None),
        forms=(_dense_with_state,),
        shapes=((2, 3, 53), (0, 2, 4)),
        large=(3, 32, 1031),
        constants=None,
        eager=_eager_dense_silu,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bench_shapes=((4, 64, 4096), (1, 128, 1024), (8, 32, 1024)),
        bench_variant={"dilation": 4},
    ),
    Case(
        _with_gate,
        _gated_arguments,
        forms=(_gated_with_state,),
        shapes=((2, 3, 53), (0, 2, 4)),
        large=(3, 32, 1024),
        eager=_eager_gated,
        constants=None,
        bytes=lambda shape, size: 4 * size * math.prod(shape),
        bench_shapes=((4, 64, 4096), (1, 128, 1024), (8, 32, 1024), (1, 64, 1)),
    ),
    Case(
        _on_a_copy,
        _step_arguments,
        forms=(_slots,),
        shapes=((2, 37, 3), (1, 1, 1), (0, 2, 1), (3, 16, 1)),
        large=(16, 1031, 2),
        variants=({"activation": "silu"}, {}),
        constants=None,
        eager=_eager_step,
        bytes=lambda shape, size: 2 * size * (math.prod(shape) + 3 * shape[0] * shape[1]),
        bench_shapes=((64, 2048, 1), (1, 2048, 1)),
        bench_variant={"activation": "silu"},
        bench_arguments=lambda arguments: {"in_place": True},
    ),
)
