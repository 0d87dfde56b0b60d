"""Dense and gated causal_conv1d in Triton: the product of the weights (outputs, depth) and of what the columns see (depth, columns).

The depth runs over channels and taps. All columns (n, t) are numbered through, so that tiles are full for short sequences of a batch
too. The order of a sum and the shape of a tile follow from the weights alone: an output has the same bits in any batch and however
x is cut into pieces. There is no backward kernel: see _dense_backward in _causal_conv1d_dense.py.
"""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.core._backends import INTERPRET
from genkern.ops._common import promoted

_NARROW = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def dense_kernel(
    x, state, weight, bias, condition, y, condition_sample, condition_channel, condition_time,
    outputs, groups, dilation, time, columns,
    CHANNELS: tl.constexpr, TAPS: tl.constexpr, GATED: tl.constexpr, DTYPE: tl.constexpr, FACTOR: tl.constexpr,
    OUTPUTS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """CHANNELS and outputs are of a group; x and state have one type, FACTOR is that of the factors. A gated output is made of rows o
    and o + outputs of the weight."""
    blocks = tl.cdiv(outputs, OUTPUTS)  # of a group; neighbouring programs share their columns
    program = tl.program_id(0).to(tl.int64)
    group = program // blocks % groups
    row = program % blocks * OUTPUTS + tl.arange(0, OUTPUTS)
    there = row < outputs
    output = group * outputs + row
    begin = program // (blocks * groups) * COLUMNS
    t = (begin % time).to(tl.int32) + tl.arange(0, COLUMNS)  # from the beginning of the first column's sample
    n, t = begin // time + t // time, t % time
    live = begin + tl.arange(0, COLUMNS) < columns

    depth: tl.constexpr = CHANNELS * TAPS
    past = (TAPS - 1) * dilation
    first = (n * groups + group) * CHANNELS  # row of x and of state
    x_at, state_at = x + (first * time + t), state
    if state is not None:
        state_at = state + (first * past + past + t)
    a = tl.zeros((OUTPUTS, COLUMNS), DTYPE)
    b = a
    if bias is not None:
        a += tl.load(bias + output, mask=there, other=0.0).to(DTYPE)[:, None]
        if GATED:
            b += tl.load(bias + output + outputs, mask=there, other=0.0).to(DTYPE)[:, None]
    for start in range(0, depth, DEPTH):
        d = start + tl.arange(0, DEPTH)
        c, back = (d // TAPS).to(tl.int64), (TAPS - 1 - d % TAPS) * dilation
        seen, now = (d < depth)[:, None] & live[None, :], t[None, :] >= back[:, None]
        at = x_at[None, :] + (c * time - back)[:, None]
        if state is None:
            seen = seen & now
        else:
            at = tl.where(now, at, state_at[None, :] + (c * past - back)[:, None])
        value = tl.load(at, mask=seen, other=0.0).to(FACTOR)
        given = there[:, None] & (d < depth)[None, :]
        w = tl.load(weight + output[:, None] * depth + d[None, :], mask=given, other=0.0).to(FACTOR)
        a = tl.dot(w, value, a, input_precision="ieee", out_dtype=DTYPE)
        if GATED:
            w = tl.load(weight + (output + outputs)[:, None] * depth + d[None, :], mask=given, other=0.0).to(FACTOR)
            b = tl.dot(w, value, b, input_precision="ieee", out_dtype=DTYPE)

    mask = there[:, None] & live[None, :]
    if GATED:
        if condition is not None:
            at = condition + n[None, :] * condition_sample + t[None, :] * condition_time
            a += tl.load(at + row[:, None] * condition_channel, mask=mask, other=0.0).to(DTYPE)
            b += tl.load(at + (row + outputs)[:, None] * condition_channel, mask=mask, other=0.0).to(DTYPE)
        a = lanes.tanh(a) * lanes.sigmoid(b)
    tl.store(y + (n[None, :] * (groups * outputs) + output[:, None]) * time + t[None, :], a, mask=mask)


def _convolve(x, state, weight, bias, condition, dilation, groups, gated):
    tensors = x, state, weight, bias, condition
    outputs, channels, taps = weight.shape
    y = x.new_empty((x.shape[0], outputs // (2 if gated else 1), x.shape[2]), dtype=promoted(*tensors))
    if y.numel() == 0:
        return y
    dtype = lanes.working_type(*tensors)[1]
    factor = _NARROW.get(promoted(x, state, weight), dtype)  # products of narrow numbers are exact in float32
    if state is not None:
        one_type = promoted(x, state)
        x, state = x.to(one_type), state.to(one_type).contiguous() if state.numel() else None
    x = x.contiguous()
    rows, columns = outputs // (2 if gated else groups), x.shape[0] * x.shape[2]
    tile = {"OUTPUTS": max(16, min(32 if gated else 64, triton.next_power_of_2(rows))), "DEPTH": 32, "COLUMNS": 64}
    programs = triton.cdiv(rows, tile["OUTPUTS"]) * groups * triton.cdiv(columns, tile["COLUMNS"])
    with torch.cuda.device_of(x):
        dense_kernel[(programs,)](
            x, state, weight, bias, condition, y, *((0, 0, 0) if condition is None else condition.stride()),
            rows, groups, dilation, x.shape[2], columns,
            CHANNELS=channels, TAPS=taps, GATED=gated, DTYPE=dtype, FACTOR=tl.float32 if INTERPRET and dtype != tl.float64 else factor,
            **tile, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return y


@implements("triton", "causal_conv1d_dense")
def causal_conv1d_dense(x, state, weight, bias, packed, dilation, groups):
    return _convolve(x, state, weight, bias, None, dilation, groups, False)


@implements("triton", "causal_conv1d_gated")
def causal_conv1d_gated(x, state, weight, bias, packed, condition, dilation):
    return _convolve(x, state, weight, bias, condition, dilation, 1, True)
