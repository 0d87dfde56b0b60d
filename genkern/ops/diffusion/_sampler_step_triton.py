"""sampler_step in Triton: one kernel; its constants say which inputs and outputs there are."""

import math

import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes


@triton.jit
def _coefficient(table, at, row_mask, like):
    """One number per row, as wide as `like`, for tl.fma."""
    return tl.load(table + at, mask=row_mask, other=0.0).to(like.dtype) + tl.zeros_like(like)


@triton.jit
def _combination(table, at, row_mask, x, m, y, eps, h1, h2, h3, EPS: tl.constexpr, HISTORY: tl.constexpr):
    """The coefficients from table[at] on times x, m, y, eps, h1, h2, h3."""
    total = _coefficient(table, at + 2, row_mask, y) * y
    total = tl.fma(_coefficient(table, at + 1, row_mask, m), m, total)
    total = tl.fma(_coefficient(table, at, row_mask, x), x, total)
    if EPS:
        total = tl.fma(_coefficient(table, at + 3, row_mask, eps), eps, total)
    if HISTORY > 0:
        total = tl.fma(_coefficient(table, at + 4, row_mask, h1), h1, total)
    if HISTORY > 1:
        total = tl.fma(_coefficient(table, at + 5, row_mask, h2), h2, total)
    if HISTORY > 2:
        total = tl.fma(_coefficient(table, at + 6, row_mask, h3), h3, total)
    return total


@triton.jit
def _adaptive_weights(moments, row, row_mask, g, count, rescale, parallel, max_norm):
    """The factors of c and c - u, one per row."""
    at = moments + row * 5
    c = tl.load(at, mask=row_mask, other=0.0)
    d = tl.load(at + 1, mask=row_mask, other=0.0)
    dd = tl.load(at + 2, mask=row_mask, other=0.0)
    cd = tl.load(at + 3, mask=row_mask, other=0.0)
    cc = tl.load(at + 4, mask=row_mask, other=0.0)
    kept = max_norm / tl.sqrt(tl.maximum(dd, 1e-30))
    on_d = (g - 1) * tl.minimum(kept, 1.0)
    on_c = 1 - on_d * (1 - parallel) * cd / tl.maximum(cc, 1e-30)
    total = on_c * c + on_d * d
    of_c = tl.maximum(cc - c * c / count, 0.0)
    of_m = on_c * on_c * cc + on_d * (2 * on_c * cd + on_d * dd) - total * total / count
    factor = rescale * tl.sqrt(of_c / tl.maximum(of_m, 1e-30)) + (1 - rescale)
    return on_c * factor, on_d * factor


@triton.jit(do_not_specialize=["step", "clip", "rescale", "parallel", "max_norm"])
def step_kernel(
    x, u, c, h1, h2, h3, noise, v, out, history_out, input_u, input_c,
    x_stride, u_stride, c_stride, h1_stride, h2_stride, h3_stride, noise_stride, v_stride, out_stride, history_out_stride,
    input_u_stride, input_c_stride,
    table, steps, step, table_rows, key, moments, bound, clip, rescale, parallel, max_norm, rows, width,
    HISTORY: tl.constexpr, STEPS_STRIDE: tl.constexpr, DTYPE: tl.constexpr, KEY_STRIDE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    row_mask = row < rows
    if steps is None:
        at = row * 0 + step
    else:
        at = tl.load(steps + row * STEPS_STRIDE, mask=row_mask, other=0)
        at = tl.minimum(tl.maximum(at, 0), table_rows - 1)
    at = at * (13 + 2 * HISTORY + (2 if v is not None else 0))
    value = lanes.load(x, x_stride, row, column, mask, DTYPE)
    m = lanes.load(u, u_stride, row, column, mask, DTYPE)
    if c is not None:
        with_condition = lanes.load(c, c_stride, row, column, mask, DTYPE)
        if moments is None:
            m = _coefficient(table, at, row_mask, m) * m + _coefficient(table, at + 1, row_mask, m) * with_condition
        else:
            g = tl.load(table + at + 1, mask=row_mask, other=0.0)
            numbers = lanes.from_bits(rescale, DTYPE), lanes.from_bits(parallel, DTYPE), lanes.from_bits(max_norm, DTYPE)
            on_c, on_d = _adaptive_weights(moments, row, row_mask, g, width, numbers[0], numbers[1], numbers[2])
            m = on_c * with_condition + on_d * (with_condition - m)
    a, b, older, eps = value, value, value, value  # stand in for what is not given
    if HISTORY > 0:
        a = lanes.load(h1, h1_stride, row, column, mask, DTYPE)
    if HISTORY > 1:
        b = lanes.load(h2, h2_stride, row, column, mask, DTYPE)
    if HISTORY > 2:
        older = lanes.load(h3, h3_stride, row, column, mask, DTYPE)
    if noise is not None:
        eps = lanes.load(noise, noise_stride, row, column, mask, DTYPE)
    if key is not None:
        seed, offset = lanes.stream(key, row, rows, KEY_STRIDE)
        eps = lanes.normals(seed, offset, number * COLUMNS + (0 if KEY_STRIDE else row * width), COLUMNS, ALIGNED, DTYPE)
    if v is not None:
        low = _coefficient(table, at + 13 + 2 * HISTORY, row_mask, eps)
        high = _coefficient(table, at + 14 + 2 * HISTORY, row_mask, eps)
        part = (lanes.load(v, v_stride, row, column, mask, DTYPE) + 1) * 0.5
        eps = eps * tl.exp((part * (high - low) + low) * 0.5)
    y = _coefficient(table, at + 2, row_mask, value) * value + _coefficient(table, at + 3, row_mask, m) * m
    limit = lanes.from_bits(clip, DTYPE)
    y = tl.where(y < limit * -1.0, limit * -1.0, y)  # this order of operands keeps NaN
    y = tl.where(y > limit, limit, y)
    if bound is not None:
        limit = tl.load(bound + row, mask=row_mask, other=1.0).to(y.dtype) + tl.zeros_like(y)
        y = tl.where(y < -limit, -limit, y)
        y = tl.where(y > limit, limit, y) / limit
    EPS: tl.constexpr = (noise is not None) or (key is not None)
    new = _combination(table, at + 4, row_mask, value, m, y, eps, a, b, older, EPS, HISTORY)
    if history_out is not None:
        kept = _combination(table, at + 8 + HISTORY, row_mask, value, m, y, eps, a, b, older, EPS, HISTORY)
    tl.store(out + row * out_stride + column, new, mask=mask)
    if history_out is not None:
        tl.store(history_out + row * history_out_stride + column, kept, mask=mask)
    if input_u is not None:
        scaled = new * _coefficient(table, at + 12 + 2 * HISTORY, row_mask, new)
        tl.store(input_u + row * input_u_stride + column, scaled, mask=mask)
        if input_c is not None:
            tl.store(input_c + row * input_c_stride + column, scaled, mask=mask)


def _halves(t, x):
    """What is there for the samples of x: once (t, None), or twice, the halves of t."""
    return (t, None) if t is None or t.shape[0] == x.shape[0] else t.chunk(2)


def _limit(number):
    return lanes.real(math.inf if number is None else number)


@implements("triton", "sampler_step")
def sampler_step(
    x, model_output, table, step, h1, h2, h3, out, history_out, input_out, steps=None, noise=None, key=None, moments=None,
    bound=None, clip=None, rescale=0.0, parallel=1.0, max_norm=None, learned=False,
):  # fmt: skip
    if x.numel() == 0:
        return
    v = None
    if learned:
        model_output, v = model_output.chunk(2, 1)
        v = v[-x.shape[0] :]
    tensors = [x, *_halves(model_output, x), h1, h2, h3, noise, v, out, history_out, *_halves(input_out, x)]
    tensors = [None if t is None else lanes.as_rows(t) for t in tensors]
    rows, width = tensors[0].shape
    one_key = key is None or key.dim() == 1
    dtype = lanes.working_type(x)[1]
    lanes.launch(
        step_kernel, x, rows, width,
        *tensors, *(0 if t is None else t.stride(0) for t in tensors),
        table, steps, step, table.shape[0], None if key is None else key.to(x.device), moments, bound, _limit(clip),
        lanes.real(rescale), lanes.real(parallel), _limit(max_norm),
        HISTORY=(h1 is not None) + (h2 is not None) + (h3 is not None),
        STEPS_STRIDE=0 if steps is None or steps.dim() == 0 else 1, DTYPE=dtype,
        KEY_STRIDE=0 if one_key else 2,
        ALIGNED=not one_key or rows == 1 or width % (2 if dtype == tl.float64 else 4) == 0,
    )  # fmt: skip
