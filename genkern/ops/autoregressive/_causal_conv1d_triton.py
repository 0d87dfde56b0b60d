"""causal_conv1d, depthwise, in Triton: tiles of (channel rows, time); backward in three passes, sums in a fixed order."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops._common import promoted

_BLOCK = 1024  # positions that a sum takes at a time


@triton.jit
def _tap(
    x, state, seq, row, t, mask, time, channels, BACK: tl.constexpr, PAST: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """The input BACK before time t of a row (a channel of a sample); zero from another sequence and before the beginning."""
    source = t - BACK
    if SEQ:
        first = seq + row // channels * time
        here = tl.load(first + t, mask=mask, other=0)
        mask = mask & (here == tl.load(first + tl.where(source < 0, 0, source), mask=mask, other=0))
    value = tl.load(x + row * time + source, mask=mask & (source >= 0), other=0.0).to(DTYPE)
    if STATE:
        before = tl.load(state + row * PAST + (PAST + source), mask=mask & (source < 0), other=0.0).to(DTYPE)
        value = tl.where(source < 0, before, value)
    return value


@triton.jit
def _before_activation(
    x, state, seq, weight, bias, row, t, mask, time, channels, TAPS: tl.constexpr, DILATION: tl.constexpr, BIAS: tl.constexpr,
    STATE: tl.constexpr, SEQ: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    zero = tl.zeros(mask.shape, DTYPE)
    channel = row % channels + tl.zeros(mask.shape, tl.int64)
    a = zero
    if BIAS:
        a = tl.load(bias + channel, mask=mask, other=0.0).to(DTYPE)
    for k in tl.static_range(TAPS):
        value = _tap(x, state, seq, row, t, mask, time, channels, (TAPS - 1 - k) * DILATION, (TAPS - 1) * DILATION, STATE, SEQ, DTYPE)
        a = tl.fma(tl.load(weight + channel * TAPS + k, mask=mask, other=0.0).to(DTYPE), value, a)
    return a


@triton.jit
def conv_kernel(
    x, state, seq, weight, bias, y, channels, rows, width,
    TAPS: tl.constexpr, DILATION: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr, SILU: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, _, t, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    a = _before_activation(x, state, seq, weight, bias, row, t, mask, width, channels, TAPS, DILATION, BIAS, STATE, SEQ, DTYPE)
    if SILU:
        a = a * lanes.sigmoid(a)
    if SEQ:
        a = tl.where(tl.load(seq + row // channels * width + t, mask=mask, other=0) < 0, 0.0, a)
    tl.store(y + row * width + t, a, mask=mask)


@triton.jit
def activation_backward_kernel(
    grad, x, state, seq, weight, bias, h, channels, rows, width,
    TAPS: tl.constexpr, DILATION: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr, SILU: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """h: the gradient before the activation."""
    row, _, t, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    g = tl.load(grad + row * width + t, mask=mask, other=0.0).to(DTYPE)
    if SILU:
        a = _before_activation(x, state, seq, weight, bias, row, t, mask, width, channels, TAPS, DILATION, BIAS, STATE, SEQ, DTYPE)
        s = lanes.sigmoid(a)
        g = g * (s * tl.fma(a, 1.0 - s, tl.full(a.shape, 1.0, DTYPE)))
    if SEQ:
        g = tl.where(tl.load(seq + row // channels * width + t, mask=mask, other=0) < 0, 0.0, g)
    tl.store(h + row * width + t, g, mask=mask)


@triton.jit
def input_backward_kernel(
    h, seq, weight, d_x, d_state, time, channels, rows, width,
    TAPS: tl.constexpr, DILATION: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Of the state followed by x, which is `width` wide."""
    row, _, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    past: tl.constexpr = (TAPS - 1) * DILATION
    at = column - past
    channel = row % channels + tl.zeros(mask.shape, tl.int64)
    d = tl.zeros(mask.shape, DTYPE)
    first = row // channels * time
    own = tl.zeros(mask.shape, tl.int32)
    if SEQ:
        own = tl.load(seq + first + tl.where(at < 0, 0, at), mask=mask & (time > 0), other=0)
    for k in tl.static_range(TAPS):
        t = at + (TAPS - 1 - k) * DILATION
        live = mask & (t >= 0) & (t < time)
        if SEQ:
            live = live & (own == tl.load(seq + first + t, mask=live, other=0))
        value = tl.load(h + row * time + t, mask=live, other=0.0)
        d = tl.fma(tl.load(weight + channel * TAPS + k, mask=mask, other=0.0).to(DTYPE), value, d)
    tl.store(d_x + row * time + at, d, mask=mask & (at >= 0))
    if STATE:
        tl.store(d_state + row * past + column, d, mask=mask & (at < 0))


@triton.jit
def weight_backward_kernel(
    h, x, state, seq, partial, blocks, count, time, channels,
    TAPS: tl.constexpr, DILATION: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, SEQ: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums over one block of the count = samples * time positions of one channel: of the taps, then of the bias."""
    program = tl.program_id(0).to(tl.int64)
    channel, block = program // blocks, program % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < count
    row, t = i // time * channels + channel, i % time
    g = tl.load(h + row * time + t, mask=mask, other=0.0)
    for k in tl.static_range(TAPS):
        value = _tap(x, state, seq, row, t, mask, time, channels, (TAPS - 1 - k) * DILATION, (TAPS - 1) * DILATION, STATE, SEQ, DTYPE)
        tl.store(partial + program * (TAPS + 1) + k, tl.sum(g * value, 0))
    if BIAS:
        tl.store(partial + program * (TAPS + 1) + TAPS, tl.sum(g, 0))


@triton.jit
def update_kernel(
    x, state, weight, bias, indices, y,
    x_sample, x_channel, x_time, state_slot, state_channel, state_time, channels, rows, time, length,
    TAPS: tl.constexpr, DILATION: tl.constexpr, BIAS: tl.constexpr, INDICES: tl.constexpr, SILU: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All steps of some rows (a channel of a request), then the shift of their states, some columns at a time."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    mask = row < rows
    sample, channel = row // channels, row % channels
    slot = sample
    if INDICES:
        slot = tl.load(indices + sample, mask=mask, other=-1).to(tl.int64)
    live = mask & (slot >= 0)
    x += sample * x_sample + channel * x_channel
    state += slot * state_slot + channel * state_channel
    t = 0
    while t < time:  # range() of a number known at run time fails in the interpreter with numpy 2.4
        a = tl.zeros([ROWS, 1], DTYPE)
        if BIAS:
            a = tl.load(bias + channel, mask=live, other=0.0).to(DTYPE)
        for k in tl.static_range(TAPS):
            value = _behind(x, state, x_time, state_time, length - (TAPS - 1 - k) * DILATION + t, live, length, DTYPE)
            a = tl.fma(tl.load(weight + channel * TAPS + k, mask=live, other=0.0).to(DTYPE), value, a)
        if SILU:
            a = a * lanes.sigmoid(a)
        tl.store(y + row * time + t, a, mask=mask)  # of an empty request all loads were zero
        t += 1
    first = 0
    while first < length:
        column = first + tl.arange(0, COLUMNS)[None, :]
        shifted = live & (column < length)
        value = _behind(x, state, x_time, state_time, column + time, shifted, length, DTYPE)
        tl.debug_barrier()  # what one thread read another overwrites
        tl.store(state + column * state_time, value, mask=shifted)
        first += COLUMNS


@triton.jit
def _behind(x, state, x_time, state_time, at, mask, length, DTYPE: tl.constexpr):
    """Element `at` of the state followed by x."""
    before = tl.load(state + at * state_time, mask=mask & (at < length), other=0.0).to(DTYPE)
    new = tl.load(x + (at - length) * x_time, mask=mask & (at >= length), other=0.0).to(DTYPE)
    return tl.where(at < length, before, new)


def _constants(weight, bias, state, seq_idx, dilation, dtype):
    present = {"BIAS": bias is not None, "STATE": state is not None and state.numel() > 0, "SEQ": seq_idx is not None}
    return present | {"TAPS": weight.shape[1], "DILATION": dilation, "DTYPE": dtype}


@implements("triton", "causal_conv1d")
def causal_conv1d(x, weight, bias, state, seq_idx, dilation, silu):
    tensors = x, weight, bias, state
    y = x.new_empty(x.shape, dtype=promoted(*tensors))
    if y.numel():
        constants = _constants(weight, bias, state, seq_idx, dilation, lanes.working_type(*tensors)[1])
        rows, time = x.shape[0] * x.shape[1], x.shape[2]
        x, state = x.contiguous(), None if state is None else state.contiguous()
        lanes.launch(conv_kernel, x, rows, time, x, state, seq_idx, weight, bias, y, y.shape[1], SILU=silu, **constants)
    return y


@implements("triton", "causal_conv1d_backward")
def causal_conv1d_backward(grad, x, weight, bias, state, seq_idx, dilation, silu):
    d_x, d_weight, d_bias, d_state = (
        None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias, state)
    )
    dtype, compute = lanes.working_type(x, weight, bias, state)
    constants = _constants(weight, bias, state, seq_idx, dilation, compute)
    samples, channels, time = x.shape
    x, grad, state = x.contiguous(), grad.contiguous(), None if state is None else state.contiguous()
    h = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows, length = samples * channels, time + (weight.shape[1] - 1) * dilation
    if h.numel():
        inputs = x, state, seq_idx, weight, bias
        lanes.launch(activation_backward_kernel, x, rows, time, grad, *inputs, h, channels, SILU=silu, **constants)
    without_bias = {name: value for name, value in constants.items() if name != "BIAS"}
    if rows * length:
        lanes.launch(
            input_backward_kernel, x, rows, length, h, seq_idx, weight, d_x, d_state, time, channels, **without_bias
        )  # fmt: skip
    blocks = triton.cdiv(samples * time, _BLOCK)
    partial = torch.empty(channels, blocks, weight.shape[1] + 1, dtype=dtype, device=x.device)
    if partial.numel():
        with torch.cuda.device_of(x):
            weight_backward_kernel[(channels * blocks,)](
                h, x, state, seq_idx, partial, blocks, samples * time, time, channels,
                BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False, **constants,
            )  # fmt: skip
    d_weight.copy_(partial[..., :-1].sum(1))
    if bias is not None:
        d_bias.copy_(partial[..., -1].sum(1))
    return [d for d in (d_x, d_weight, d_bias, d_state) if d is not None]


@implements("triton", "causal_conv1d_update")
def causal_conv1d_update(x, state, weight, bias, indices, dilation, silu):
    y = torch.empty(x.shape, dtype=promoted(x, weight, bias), device=x.device)
    if y.numel() == 0:
        return y
    rows, columns = x.shape[0] * x.shape[1], min(16, triton.next_power_of_2(max(1, state.shape[2])))
    tile_rows = min(128, _BLOCK // columns)
    with torch.cuda.device_of(x):
        update_kernel[(triton.cdiv(rows, tile_rows),)](
            x, state, weight, bias, indices, y, *x.stride(), *state.stride(), x.shape[1], rows, x.shape[2], state.shape[2],
            TAPS=weight.shape[1], DILATION=dilation, BIAS=bias is not None, INDICES=indices is not None, SILU=silu,
            DTYPE=lanes.working_type(x, state)[1], ROWS=tile_rows, COLUMNS=columns, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y
