"""affine_coupling in Triton: one pass over the whole of x, whose first `kept` columns are copied, and a partial sum of the
log-determinant per tile. The formulas are those of csrc/flow/affine_coupling.cpp."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops._common import promoted


@triton.jit
def _arctan(x):
    """Reduced to |r| <= tan(pi / 8) by atan(a) = pi/2 - atan(1/a) = pi/4 + atan((a - 1) / (a + 1))."""
    a = tl.abs(x)
    a = tl.where(a > 1e16, 1e16, a)
    far, mid = a > 2.414213562373095, a > 0.4142135623730951
    r = tl.where(far, -1.0 / a, tl.where(mid, (a - 1.0) / (a + 1.0), a))
    z = r * r
    p = (((z * -0.0607822131 + 0.105938137) * z + -0.142435333) * z + 0.199984715) * z + -0.333333152
    base = tl.where(far, 1.5707963267948966, tl.where(mid, 0.7853981633974483, 0.0))
    y = base + (r + r * z * p)
    if x.dtype == tl.float64:  # one step from eight digits to all: atan(a) = y + atan((a - tan y) / (1 + a tan y))
        y += (a * tl.cos(y) - tl.sin(y)) / (tl.cos(y) + a * tl.sin(y))
    return tl.where(x < 0.0, y * -1.0, y)


@triton.jit
def _scaled(u, limit, SCALE: tl.constexpr):
    """(s, ln s, d ln s / du)"""
    if SCALE == 0:
        s, log_s, turn = lanes.exp(u), u, tl.full(u.shape, 1.0, u.dtype)
    elif SCALE == 1 or SCALE == 2:
        a = u + 2.0
        e = lanes.exp(tl.abs(a) * -1.0)
        small, large = e / (e + 1.0), 1.0 / (e + 1.0)
        s = tl.where(a < 0.0, small, large)
        if SCALE == 1:
            log_s = tl.where(a < 0.0, a, 0.0) - lanes.log1p(e)
            turn = tl.where(a < 0.0, large, small)
        else:
            s += 1e-3
            log_s, turn = lanes.log(s), small * large / s
    elif SCALE == 3:
        e = lanes.exp(tl.abs(u) * -1.0)
        s = tl.where(u < 0.0, 0.0, u) + lanes.log1p(e) + 1e-3
        log_s, turn = lanes.log(s), tl.where(u < 0.0, e, 1.0) / (e + 1.0) / s
    elif SCALE == 4:
        e = lanes.exp(tl.abs(u) * -2.0)
        log_s = lanes.tanh(u) * limit
        s, turn = lanes.exp(log_s), e * 4.0 / ((e + 1.0) * (e + 1.0)) * limit
    elif SCALE == 5:
        part = 1.0 / (tl.abs(u) / limit + 1.0)
        log_s = u * part
        s, turn = lanes.exp(log_s), part * part
    else:
        log_s = _arctan(u) * limit
        s, turn = lanes.exp(log_s), limit / (u * u + 1.0)
    return s, log_s, turn


@triton.jit
def forward_kernel(
    x, shift, raw, chosen, y, log_det, limit, x_stride, params_stride, y_stride, sums_stride, kept, rows, width,
    SCALE: tl.constexpr, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr, MASK: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    moved = mask & (column >= kept)
    old = lanes.load(x, x_stride, row, column, mask, DTYPE)
    t = lanes.load(shift, params_stride, row, column - kept, moved, DTYPE)
    u = lanes.load(raw, params_stride, row, column - kept, moved, DTYPE)
    s, log_s, _turn = _scaled(u, lanes.from_bits(limit, DTYPE), SCALE)
    if INVERSE:
        new = old / s - t if SHIFT_FIRST else (old - t) / s
        log_s = log_s * -1.0
    else:
        new = (old + t) * s if SHIFT_FIRST else tl.fma(old, s, t)
    if MASK:
        moved = moved & (tl.load(chosen + column + row * 0, mask=mask, other=0.0) != 0.0)
    tl.store(y + row * y_stride + column, tl.where(moved, new, old), mask=mask)
    total = tl.sum(tl.where(moved, log_s, 0.0), 1)[:, None]
    tl.store(log_det + row * sums_stride + number, total, mask=row < rows)


@triton.jit
def backward_kernel(
    grad, to_log_det, x, shift, raw, chosen, d_x, d_shift, d_raw, limit, grad_stride, to_log_det_stride, x_stride, params_stride,
    d_x_stride, d_params_stride, kept, rows, width,
    SCALE: tl.constexpr, SHIFT_FIRST: tl.constexpr, INVERSE: tl.constexpr, MASK: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    moved = mask & (column >= kept)
    g = lanes.load(grad, grad_stride, row, column, mask, DTYPE)
    to_log = tl.load(to_log_det + row * to_log_det_stride, mask=row < rows, other=0.0).to(DTYPE)
    old = lanes.load(x, x_stride, row, column, moved, DTYPE)
    t = lanes.load(shift, params_stride, row, column - kept, moved, DTYPE)
    u = lanes.load(raw, params_stride, row, column - kept, moved, DTYPE)
    s, _log_s, turn = _scaled(u, lanes.from_bits(limit, DTYPE), SCALE)
    through = g / s if INVERSE else g * s
    if INVERSE:
        scaled = old if SHIFT_FIRST else old - t
        d_t = g * -1.0 if SHIFT_FIRST else through * -1.0
    else:
        scaled = old + t if SHIFT_FIRST else old
        d_t = through if SHIFT_FIRST else g
    d_u = tl.fma(through, scaled, to_log + tl.zeros_like(g)) * turn
    d_u = d_u * -1.0 if INVERSE else d_u
    changed = moved
    if MASK:
        changed = moved & (tl.load(chosen + column + row * 0, mask=mask, other=0.0) != 0.0)
    tl.store(d_x + row * d_x_stride + column, tl.where(changed, through, g), mask=mask)
    tl.store(d_shift + row * d_params_stride + column - kept, tl.where(changed, d_t, 0.0), mask=moved)
    tl.store(d_raw + row * d_params_stride + column - kept, tl.where(changed, d_u, 0.0), mask=moved)


# ---- launchers


def _halves(params, scale_first):
    """(shift, raw scale) as rows."""
    rows = lanes.as_rows(params)
    half = rows.shape[1] // 2
    first, second = rows[:, :half], rows[:, half:]
    return (second, first) if scale_first else (first, second)


def _constants(mask, scale, shift_first, inverse, dtype):
    return dict(SCALE=scale, SHIFT_FIRST=shift_first, INVERSE=inverse, MASK=mask is not None, DTYPE=dtype)


@implements("triton", "affine_coupling")
def affine_coupling(x, params, *settings):
    y = torch.empty(x.shape, dtype=promoted(x, params), device=x.device)
    return y, _transform(x, y, params, *settings)


@implements("triton", "affine_coupling_")
def affine_coupling_(x, params, *settings):
    return _transform(x, x, params, *settings)


def _transform(x, y, params, mask, running, scale, scale_first, shift_first, inverse, limit):
    work, dtype = lanes.working_type(x, params)
    rows, width = x.shape[0], x[0:1].numel()
    if x.numel() == 0:
        return x.new_zeros(rows, dtype=work) if running is None else running.clone()
    sums = x.new_empty((rows, triton.cdiv(width, lanes.tile_shape(width)[1])), dtype=work)
    x_rows, y_rows, (shift, raw) = lanes.as_rows(x), lanes.as_rows(y), _halves(params, scale_first)
    strides = x_rows.stride(0), shift.stride(0), y_rows.stride(0), sums.stride(0)
    lanes.launch(
        forward_kernel, x, rows, width, x_rows, shift, raw, mask, y_rows, sums, lanes.real(limit), *strides, width - shift.shape[1],
        **_constants(mask, scale, shift_first, inverse, dtype),
    )  # fmt: skip
    total = sums.sum(1, dtype=torch.float64).to(work)
    return total if running is None else total.add_(running)


@implements("triton", "affine_coupling_backward")
def affine_coupling_backward(grad_y, grad_log_det, x, params, mask, running, scale, scale_first, shift_first, inverse, limit):
    _, dtype = lanes.working_type(x, params)
    d_x, d_params = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, params))
    d_running = [] if running is None else [grad_log_det.clone(memory_format=torch.contiguous_format)]
    rows, width = x.shape[0], x[0:1].numel()
    if x.numel() == 0:
        return [d_x, d_params.zero_(), *d_running]
    grad, x_rows, d_x_rows = lanes.as_rows(grad_y), lanes.as_rows(x), lanes.as_rows(d_x)
    (shift, raw), (d_shift, d_raw) = _halves(params, scale_first), _halves(d_params, scale_first)
    strides = grad.stride(0), grad_log_det.stride(0), x_rows.stride(0), shift.stride(0), d_x_rows.stride(0), d_shift.stride(0)
    lanes.launch(
        backward_kernel, x, rows, width, grad, grad_log_det, x_rows, shift, raw, mask, d_x_rows, d_shift, d_raw, lanes.real(limit),
        *strides, width - shift.shape[1], **_constants(mask, scale, shift_first, inverse, dtype),
    )  # fmt: skip
    return [d_x, d_params, *d_running]
