"""rational_quadratic_spline in Triton: one element per lane, its bins walked in a loop, in double precision throughout: the knots of
narrow bins need the digits. The formulas and their names are those of csrc/flow/spline.h."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops._common import promoted, working_type

_BLOCK = 128


@triton.jit
def _raw(parameters, stride, element, k, mask):
    return tl.load(parameters + element * stride + k, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def _softmax(parameters, stride, element, mask, BINS: tl.constexpr):
    """(largest parameter, sum of the exponentials)."""
    top = _raw(parameters, stride, element, 0, mask)
    for k in range(1, BINS):
        raw = _raw(parameters, stride, element, k, mask)
        top = tl.where(raw > top, raw, top)
    total = tl.zeros_like(top)
    for k in range(BINS):
        total += tl.exp(_raw(parameters, stride, element, k, mask) - top)
    return top, total


@triton.jit
def _slope(parameters, stride, element, knot, mask, minimum, BINS: tl.constexpr, TAILS: tl.constexpr):
    """(slope at a knot, its derivative by the parameter)."""
    if TAILS == 0:
        position = knot
        free = mask
    elif TAILS == 1:
        position = knot - 1
        free = mask & (knot > 0) & (knot < BINS)
    else:
        position = tl.where(knot == BINS, 0, knot)
        free = mask
    raw = tl.load(parameters + element * stride + position, mask=free, other=0.0).to(tl.float64)
    slope = lanes.softplus(raw) + minimum
    if TAILS == 1:
        slope = tl.where((knot > 0) & (knot < BINS), slope, 1.0)
    return slope, lanes.sigmoid(raw)


@triton.jit
def _locate(
    z, widths, heights, slopes, widths_stride, heights_stride, slopes_stride, element, mask, bound, min_width, min_height, min_slope,
    BINS: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    top_x, sum_x = _softmax(widths, widths_stride, element, mask, BINS)
    top_y, sum_y = _softmax(heights, heights_stride, element, mask, BINS)
    scale_x, scale_y = (1.0 - min_width * BINS) * bound * 2.0 / sum_x, (1.0 - min_height * BINS) * bound * 2.0 / sum_y
    end_x, end_y = tl.zeros_like(z) - bound, tl.zeros_like(z) - bound
    left, lower, width, height = end_x, end_y, end_x, end_y
    walked_x, walked_y = tl.zeros_like(z), tl.zeros_like(z)
    below_x, below_y, weight_x, weight_y = walked_x, walked_y, walked_x, walked_y
    bin = tl.zeros(z.shape, tl.int32)
    for k in range(BINS):
        w = tl.exp(_raw(widths, widths_stride, element, k, mask) - top_x)
        h = tl.exp(_raw(heights, heights_stride, element, k, mask) - top_y)
        here = (z >= (end_y if INVERSE else end_x)) | (k == 0)
        size_x, size_y = w * scale_x + min_width * bound * 2.0, h * scale_y + min_height * bound * 2.0
        left, lower = tl.where(here, end_x, left), tl.where(here, end_y, lower)
        width, height = tl.where(here, size_x, width), tl.where(here, size_y, height)
        below_x, below_y = tl.where(here, walked_x, below_x), tl.where(here, walked_y, below_y)
        weight_x, weight_y = tl.where(here, w, weight_x), tl.where(here, h, weight_y)
        bin = tl.where(here, k, bin)
        end_x, end_y, walked_x, walked_y = end_x + size_x, end_y + size_y, walked_x + w, walked_y + h
    d0, turn0 = _slope(slopes, slopes_stride, element, bin, mask, min_slope, BINS, TAILS)
    d1, turn1 = _slope(slopes, slopes_stride, element, bin + 1, mask, min_slope, BINS, TAILS)
    s = height / width
    if INVERSE:
        v = (z - lower) / height
        v = tl.where(v < 0.0, 0.0, tl.where(v > 1.0, 1.0, v))
        q = d0 * (1.0 - v) - d1 * v
        product = s * s * v * (1.0 - v) * 4.0
        root = tl.sqrt(q * q + product)
        g = tl.where(q < 0.0, product / (root + tl.abs(q)), q + root)
        t, u = s * v * 2.0 / (s * v * 2.0 + g), g / (s * v * 2.0 + g)
    else:
        t = (z - left) / width
        t = tl.where(t < 0.0, 0.0, tl.where(t > 1.0, 1.0, t))
        u = 1.0 - t
    tu, tt, uu = t * u, t * t, u * u
    n, d = d1 * tt + s * tu * 2.0 + d0 * uu, s * (tt + uu) + (d0 + d1) * tu
    if not INVERSE:
        v = (s * tt + d0 * tu) / d
    return (bin, left, lower, width, height, s, t, u, v, n, d, d0, d1, turn0, turn1,
            top_x, sum_x, scale_x, below_x, weight_x, top_y, sum_y, scale_y, below_y, weight_y)  # fmt: skip


@triton.jit
def forward_kernel(
    x, widths, heights, slopes, y, log_det, widths_stride, heights_stride, slopes_stride,
    bound, min_width, min_height, min_slope, count,
    BINS: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < count
    bound, min_width = lanes.from_bits(bound, tl.float64), lanes.from_bits(min_width, tl.float64)
    min_height, min_slope = lanes.from_bits(min_height, tl.float64), lanes.from_bits(min_slope, tl.float64)
    narrow = tl.load(x + element, mask=mask, other=0.0).to(DTYPE)
    z, limit = narrow.to(tl.float64), bound.to(DTYPE).to(tl.float64)
    (bin, left, lower, width, height, s, t, u, v, n, d, d0, d1, turn0, turn1, top_x, sum_x, scale_x, below_x, weight_x,
     top_y, sum_y, scale_y, below_y, weight_y) = _locate(
        z, widths, heights, slopes, widths_stride, heights_stride, slopes_stride, element, mask,
        bound, min_width, min_height, min_slope, BINS, TAILS, INVERSE)  # fmt: skip
    log_slope = tl.log(s * s * n / (d * d))
    value = left + t * width if INVERSE else lower + v * height
    inside = (z >= limit * -1.0) & (z <= limit)
    value = tl.where(tl.abs(z) < limit, value, z)
    slope = tl.where(inside, log_slope * -1.0 if INVERSE else log_slope, tl.where(z == z, 0.0, z))
    if TAILS == 0:
        value, slope = tl.where(inside, value, float("nan")), tl.where(inside, slope, float("nan"))
    tl.store(y + element, value.to(DTYPE), mask=mask)
    tl.store(log_det + element, slope.to(DTYPE), mask=mask)


@triton.jit
def _store_axis(
    out,
    parameters,
    stride,
    element,
    mask,
    inside,
    bin,
    start,
    size,
    top,
    total,
    scale,
    below,
    weight,
    BINS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Gradients of the widths or heights from those of the chosen bin's start and size."""
    mean = (start * below + size * weight) / total
    for k in range(BINS):
        part = tl.where(bin > k, start, tl.where(bin == k, size, 0.0))
        weight_k = tl.exp(_raw(parameters, stride, element, k, mask) - top)
        tl.store(out + element * BINS + k, tl.where(inside, weight_k * scale * (part - mean), 0.0).to(DTYPE), mask=mask)


@triton.jit
def backward_kernel(
    x, widths, heights, slopes, to_y, to_log_det, d_x, d_widths, d_heights, d_slopes, widths_stride, heights_stride, slopes_stride,
    bound, min_width, min_height, min_slope, count,
    BINS: tl.constexpr, SLOPES: tl.constexpr, TAILS: tl.constexpr, INVERSE: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < count
    bound, min_width = lanes.from_bits(bound, tl.float64), lanes.from_bits(min_width, tl.float64)
    min_height, min_slope = lanes.from_bits(min_height, tl.float64), lanes.from_bits(min_slope, tl.float64)
    z = tl.load(x + element, mask=mask, other=0.0).to(DTYPE).to(tl.float64)
    limit = bound.to(DTYPE).to(tl.float64)
    (bin, left, lower, width, height, s, t, u, v, n, d, d0, d1, turn0, turn1, top_x, sum_x, scale_x, below_x, weight_x,
     top_y, sum_y, scale_y, below_y, weight_y) = _locate(
        z, widths, heights, slopes, widths_stride, heights_stride, slopes_stride, element, mask,
        bound, min_width, min_height, min_slope, BINS, TAILS, INVERSE)  # fmt: skip
    grad_out = tl.load(to_y + element, mask=mask, other=0.0).to(tl.float64)
    to_log = tl.load(to_log_det + element, mask=mask, other=0.0).to(tl.float64)
    tu, tt, uu = t * u, t * t, u * u
    l_d0, l_d1 = uu / n - tu * 2.0 / d, tt / n - tu * 2.0 / d
    l_s = 2.0 / s + tu * 2.0 / n - (tt + uu) * 2.0 / d
    l_t = (d1 * t - d0 * u + s * (u - t)) * 2.0 / n - (d0 + d1 - s * 2.0) * (u - t) * 2.0 / d
    inside = (z >= limit * -1.0) & (z <= limit)
    if INVERSE:
        grad_in = (grad_out - to_log * l_t / width) / (s * s * n / (d * d))
        to_v, to_log = grad_in * height * -1.0, to_log * -1.0
        to_t = grad_out * width * -1.0
    else:
        to_v = grad_out * height
        to_t = to_v * s * n / (d * d) + to_log * l_t
        grad_in = to_t / width
    to_s = to_v * tu * (tt * d1 - uu * d0) / (d * d) + to_log * l_s
    grad_in = tl.where(inside, grad_in, 0.0 if TAILS == 0 else grad_out)
    tl.store(d_x + element, grad_in.to(DTYPE), mask=mask)
    start_x, size_x = to_t / width * -1.0, (to_t * t + to_s * s) / width * -1.0
    start_y, size_y = to_v / height, to_v / height * v + to_s / width
    _store_axis(
        d_widths,
        widths,
        widths_stride,
        element,
        mask,
        inside,
        bin,
        start_x,
        size_x,
        top_x,
        sum_x,
        scale_x,
        below_x,
        weight_x,
        BINS,
        DTYPE,
    )
    _store_axis(
        d_heights,
        heights,
        heights_stride,
        element,
        mask,
        inside,
        bin,
        start_y,
        size_y,
        top_y,
        sum_y,
        scale_y,
        below_y,
        weight_y,
        BINS,
        DTYPE,
    )
    to_d0 = (to_v * tu * (1.0 - v) / d + to_log * l_d0) * turn0
    to_d1 = (to_log * l_d1 - to_v * tu * v / d) * turn1
    for k in range(SLOPES):
        knot = k + (1 if TAILS == 1 else 0)
        gradient = tl.where(bin == knot, to_d0, 0.0) + tl.where(bin == knot - 1, to_d1, 0.0)
        if TAILS == 2:
            gradient += tl.where((bin == BINS - 1) & (knot == 0), to_d1, 0.0)
        tl.store(d_slopes + element * SLOPES + k, tl.where(inside, gradient, 0.0).to(DTYPE), mask=mask)


# ---- launchers


def _rows(x):
    """(..., n) as (elements, n) with neighbouring numbers in a row; a view where the leading dimensions lie evenly."""
    x = x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.new_empty((x.shape[:-1].numel(), 1))
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def _launch(kernel, x, params, outputs, inverse, tails, bound, min_width, min_height, min_slope, **constants):
    count, bins = x.numel(), params[0].shape[-1]
    if count == 0:
        return
    rows = [_rows(p) for p in params]
    double = working_type(x, *params) == torch.float64
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(count, _BLOCK),)](
            x.contiguous(), *rows, *outputs, *(r.stride(0) for r in rows),
            *map(lanes.real, (bound, min_width, min_height, min_slope)), count,
            BINS=bins, TAILS=tails, INVERSE=inverse, DTYPE=tl.float64 if double else tl.float32, BLOCK=_BLOCK, **constants,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip


@implements("triton", "rational_quadratic_spline")
def rational_quadratic_spline(x, widths, heights, derivatives, inverse, tails, *numbers):
    params = widths, heights, derivatives
    y = x.new_empty(x.shape, dtype=promoted(x, *params))
    log_det = x.new_empty(x.shape, dtype=working_type(x, *params))
    _launch(forward_kernel, x, params, (y, log_det), inverse, tails, *numbers)
    return y, log_det


@implements("triton", "rational_quadratic_spline_backward")
def rational_quadratic_spline_backward(grad_y, grad_log_det, x, widths, heights, derivatives, inverse, tails, *numbers):
    params = widths, heights, derivatives
    gradients = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in (x, *params)]
    outputs = (grad_y.contiguous(), grad_log_det.contiguous(), *gradients)
    _launch(backward_kernel, x, params, outputs, inverse, tails, *numbers, SLOPES=derivatives.shape[-1])
    return gradients
