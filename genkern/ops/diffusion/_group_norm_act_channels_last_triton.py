"""group_norm_act of channels_last images in Triton: tiles of pixels and neighbouring channels.

The moments of each channel over parts of the pixels become, in a program per group, what each channel is multiplied by; then the map.
The backward pass adds up three numbers per channel, as that of the other layout.
"""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops._common import promoted
from genkern.ops.diffusion._group_norm_act_triton import _affine, _dz, channel_gradients

_TILE, _MOST_PARTS = 1024, 64


@triton.jit
def _place(pixels, channels, parts, PART: tl.constexpr, CHANNELS: tl.constexpr):
    """(row of samples and parts, sample, first pixel, channel [1, CHANNELS]) of this program."""
    row, blocks = tl.program_id(0).to(tl.int64), tl.cdiv(channels, CHANNELS)
    block, row = row % blocks, row // blocks
    return row, row // parts, (row % parts).to(tl.int32) * PART, (block * CHANNELS + tl.arange(0, CHANNELS))[None, :]


@triton.jit
def _values(x, x2, pre_bias, sample, pixel, channel, mask, x_stride, x2_stride, of_x, channels, DTYPE: tl.constexpr):
    """u = x + pre_bias, of x and x2 as one."""
    if x2 is None:
        u = tl.load(x + sample * x_stride + pixel * channels + channel, mask=mask, other=0.0).to(DTYPE)
    else:
        rest = channels - of_x
        u = tl.load(x + sample * x_stride + pixel * of_x + channel, mask=mask & (channel < of_x), other=0.0).to(DTYPE)
        second = x2 + sample * x2_stride + pixel * rest + channel - of_x
        u += tl.load(second, mask=mask & (channel >= of_x), other=0.0).to(DTYPE)
    if pre_bias is not None:
        u += tl.load(pre_bias + sample * channels + channel, mask=mask, other=0.0).to(DTYPE)
    return u


@triton.jit
def moments_kernel(
    x, x2, pre_bias, partial, x_stride, x2_stride, of_x, channels, pixels, parts,
    DTYPE: tl.constexpr, PART: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares around it of each channel in each part: partial float64 (samples parts, channels, 2)."""
    row, sample, begin, channel = _place(pixels, channels, parts, PART, CHANNELS)
    total = tl.zeros((PIXELS, CHANNELS), DTYPE)
    for i in range(0, PART, PIXELS):
        pixel = (begin + i + tl.arange(0, PIXELS))[:, None].to(tl.int64)
        mask = (pixel < pixels) & (channel < channels)
        total += _values(x, x2, pre_bias, sample, pixel, channel, mask, x_stride, x2_stride, of_x, channels, DTYPE)
    count = tl.minimum(pixels - begin, PART).to(tl.float64)
    origin = (tl.sum(total.to(tl.float64), 0, keep_dims=True) / count).to(DTYPE)
    rest, square = tl.zeros((PIXELS, CHANNELS), DTYPE), tl.zeros((PIXELS, CHANNELS), DTYPE)
    for i in range(0, PART, PIXELS):
        pixel = (begin + i + tl.arange(0, PIXELS))[:, None].to(tl.int64)
        mask = (pixel < pixels) & (channel < channels)
        u = _values(x, x2, pre_bias, sample, pixel, channel, mask, x_stride, x2_stride, of_x, channels, DTYPE)
        d = tl.where(mask, u - origin, 0.0)
        rest += d
        square += d * d
    left = tl.sum(rest.to(tl.float64), 0, keep_dims=True)
    at = partial + (row * channels + channel) * 2
    tl.store(at, origin.to(tl.float64) + left / count, mask=channel < channels)
    tl.store(at + 1, tl.sum(square.to(tl.float64), 0, keep_dims=True) - left * left / count, mask=channel < channels)


@triton.jit(do_not_specialize=["eps"])
def coefficients_kernel(
    partial, weight, bias, scale, shift, coefficients, groups, per_group, channels, pixels, parts, rows, eps,
    DTYPE: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, PER_GROUP: tl.constexpr,
):  # fmt: skip
    """xhat = (u - centre) rstd + offset and z = a xhat + b: coefficients (centre, rstd, offset, a, b; rows)."""
    program = tl.program_id(0).to(tl.int64)
    sample, first = program // groups, program % groups * per_group
    part, k = tl.arange(0, PARTS)[:, None], tl.arange(0, PER_GROUP)[None, :]
    there = (part < parts) & (k < per_group)
    at = partial + ((sample * parts + part) * channels + first + k) * 2
    means, squares = tl.load(at, mask=there, other=0.0), tl.load(at + 1, mask=there, other=0.0)
    counts, size = tl.minimum(pixels - part * PART, PART).to(tl.float64), (per_group * pixels).to(tl.float64)
    counts = tl.where(there, counts, 0.0)
    mean = tl.sum(tl.sum(counts * means, 1), 0) / size
    away = tl.where(there, means - mean, 0.0)
    centred = tl.sum(tl.sum(squares + counts * away * away, 1), 0)
    variance = tl.where(centred < 0, 0.0, centred) / size
    rstd = 1.0 / tl.sqrt(variance + lanes.from_bits(eps, tl.float64))
    centre = mean.to(DTYPE)
    channel = tl.arange(0, PER_GROUP)
    mask, same = channel < per_group, tl.zeros((PER_GROUP,), DTYPE)
    row = sample * channels + first + channel
    a, b = _affine(weight, bias, scale, shift, row, first + channel, mask, same)
    tl.store(coefficients + row, same + centre, mask=mask)
    tl.store(coefficients + rows + row, same + rstd.to(DTYPE), mask=mask)
    tl.store(coefficients + 2 * rows + row, same + ((centre.to(tl.float64) - mean) * rstd).to(DTYPE), mask=mask)
    tl.store(coefficients + 3 * rows + row, a, mask=mask)
    tl.store(coefficients + 4 * rows + row, b, mask=mask)


@triton.jit
def _normalised(coefficients, u, sample, channel, channels, rows):
    """(xhat, a, b)"""
    at, mask = coefficients + sample * channels + channel, channel < channels
    centre, rstd = tl.load(at, mask=mask, other=0.0), tl.load(at + rows, mask=mask, other=0.0)
    xhat = (u - centre) * rstd + tl.load(at + 2 * rows, mask=mask, other=0.0)
    return xhat, tl.load(at + 3 * rows, mask=mask, other=0.0), tl.load(at + 4 * rows, mask=mask, other=0.0)


@triton.jit
def apply_kernel(
    x, x2, pre_bias, coefficients, y, x_stride, x2_stride, of_x, channels, pixels, parts, rows,
    SILU: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    _, sample, begin, channel = _place(pixels, channels, parts, PART, CHANNELS)
    for i in range(0, PART, PIXELS):
        pixel = (begin + i + tl.arange(0, PIXELS))[:, None].to(tl.int64)
        mask = (pixel < pixels) & (channel < channels)
        u = _values(x, x2, pre_bias, sample, pixel, channel, mask, x_stride, x2_stride, of_x, channels, DTYPE)
        xhat, a, b = _normalised(coefficients, u, sample, channel, channels, rows)
        z = a * xhat + b
        if SILU:
            z = z * lanes.sigmoid(z)
        tl.store(y + (sample * pixels + pixel) * channels + channel, z, mask=mask)


@triton.jit
def sums_kernel(
    grad, x, x2, pre_bias, coefficients, sums, grad_stride, x_stride, x2_stride, of_x, channels, pixels, parts, rows, all_rows,
    SILU: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """For each channel of each part the sums of dz, dz xhat and xhat: sums float64 (3, samples parts, channels)."""
    row, sample, begin, channel = _place(pixels, channels, parts, PART, CHANNELS)
    of_dz, of_product = tl.zeros((PIXELS, CHANNELS), DTYPE), tl.zeros((PIXELS, CHANNELS), DTYPE)
    of_xhat = tl.zeros((PIXELS, CHANNELS), DTYPE)
    for i in range(0, PART, PIXELS):
        pixel = (begin + i + tl.arange(0, PIXELS))[:, None].to(tl.int64)
        mask = (pixel < pixels) & (channel < channels)
        u = _values(x, x2, pre_bias, sample, pixel, channel, mask, x_stride, x2_stride, of_x, channels, DTYPE)
        xhat, a, b = _normalised(coefficients, u, sample, channel, channels, rows)
        xhat = tl.where(mask, xhat, 0.0)
        dz = _dz(grad, a * xhat + b, sample * grad_stride + pixel * channels + channel, mask, SILU)
        of_dz += dz
        of_product += dz * xhat
        of_xhat += xhat
    at, mask = sums + row * channels + channel, channel < channels
    tl.store(at, tl.sum(of_dz.to(tl.float64), 0, keep_dims=True), mask=mask)
    tl.store(at + all_rows, tl.sum(of_product.to(tl.float64), 0, keep_dims=True), mask=mask)
    tl.store(at + 2 * all_rows, tl.sum(of_xhat.to(tl.float64), 0, keep_dims=True), mask=mask)


@triton.jit
def gradient_kernel(
    grad, x, x2, pre_bias, coefficients, means, grad_x, grad_x2, grad_stride, x_stride, x2_stride, of_x, channels, pixels, parts, rows,
    SILU: tl.constexpr, DTYPE: tl.constexpr, PART: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx = rstd (a dz - p - q xhat), (p, q) = means (2, rows) of a dz and a dz xhat over the channel's group."""
    _, sample, begin, channel = _place(pixels, channels, parts, PART, CHANNELS)
    for i in range(0, PART, PIXELS):
        pixel = (begin + i + tl.arange(0, PIXELS))[:, None].to(tl.int64)
        there = channel < channels
        mask = (pixel < pixels) & there
        u = _values(x, x2, pre_bias, sample, pixel, channel, mask, x_stride, x2_stride, of_x, channels, DTYPE)
        xhat, a, b = _normalised(coefficients, u, sample, channel, channels, rows)
        dz = _dz(grad, a * xhat + b, sample * grad_stride + pixel * channels + channel, mask, SILU)
        of_channel = sample * channels + channel
        p, q = tl.load(means + of_channel, mask=there, other=0.0), tl.load(means + rows + of_channel, mask=there, other=0.0)
        dx = (a * dz - p - q * xhat) * tl.load(coefficients + rows + of_channel, mask=there, other=0.0)
        at = sample * pixels + pixel
        if grad_x2 is None:
            tl.store(grad_x + at * channels + channel, dx, mask=mask)
        else:
            tl.store(grad_x + at * of_x + channel, dx, mask=mask & (channel < of_x))
            tl.store(grad_x2 + at * (channels - of_x) + channel - of_x, dx, mask=mask & (channel >= of_x))


class _Call:
    """The arguments that all kernels of a call share."""

    def __init__(self, x, x2, weight, bias, pre_bias, scale, shift, groups, eps):
        self.n, self.pixels, of_x = x.shape
        self.channels = of_x + (0 if x2 is None else x2.shape[2])
        self.per_group, self.rows = self.channels // groups, self.n * self.channels
        inputs = [None if t is None else lanes.as_rows(t) for t in (x, x2)]
        parameters = [None if t is None else t.contiguous() for t in (weight, bias, scale, shift)]
        self.data = [*inputs, None if pre_bias is None else pre_bias.contiguous()]
        self.strides = [0 if t is None else t.stride(0) for t in inputs]
        block = min(128, triton.next_power_of_2(self.channels))
        tile = _TILE // block
        part = tile * max(4, triton.next_power_of_2(triton.cdiv(triton.cdiv(self.pixels, tile), _MOST_PARTS)))
        self.parts = triton.cdiv(self.pixels, part)
        self.programs = self.n * self.parts * triton.cdiv(self.channels, block)
        self.sizes = [of_x, self.channels, self.pixels, self.parts]
        common = {"DTYPE": lanes.working_type(x)[1], "PART": part, "num_warps": 4, "enable_fp_fusion": False}
        self.constants = {**common, "PIXELS": tile, "CHANNELS": block}
        partial = torch.empty((self.n * self.parts, self.channels, 2), dtype=torch.float64, device=x.device)
        self.coefficients = torch.empty((5, self.rows), dtype=lanes.working_type(x)[0], device=x.device)
        with torch.cuda.device_of(x):
            moments_kernel[(self.programs,)](*self.data, partial, *self.strides, *self.sizes, **self.constants)
            coefficients_kernel[(self.n * groups,)](
                partial, *parameters, self.coefficients, groups, self.per_group, self.channels, self.pixels, self.parts, self.rows,
                lanes.real(eps), PARTS=triton.next_power_of_2(self.parts), PER_GROUP=triton.next_power_of_2(self.per_group), **common,
            )  # fmt: skip


@implements("triton", "group_norm_act_channels_last_out")
def group_norm_act_channels_last_out(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu, out):
    if out.numel() == 0:
        return
    call = _Call(x, x2, weight, bias, pre_bias, scale, shift, groups, eps)
    with torch.cuda.device_of(x):
        apply_kernel[(call.programs,)](
            *call.data, call.coefficients, out, *call.strides, *call.sizes, call.rows, SILU=silu, **call.constants
        )


@implements("triton", "group_norm_act_channels_last")
def group_norm_act_channels_last(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu):
    channels = x.shape[2] + (0 if x2 is None else x2.shape[2])
    y = torch.empty((*x.shape[:2], channels), dtype=promoted(x, x2), device=x.device)
    group_norm_act_channels_last_out(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu, y)
    return y


@implements("triton", "group_norm_act_channels_last_backward")
def group_norm_act_channels_last_backward(grad, x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu):
    given = (x, x2, weight, bias, pre_bias, scale, shift)
    if grad.numel() == 0:
        return [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in given if t is not None]
    call, dy = _Call(x, x2, weight, bias, pre_bias, scale, shift, groups, eps), lanes.as_rows(grad)
    sums = torch.empty((3, call.n, call.parts, call.channels), dtype=torch.float64, device=x.device)
    strides, rows = [dy.stride(0), *call.strides], call.rows
    with torch.cuda.device_of(x):
        sums_kernel[(call.programs,)](
            dy, *call.data, call.coefficients, sums, *strides, *call.sizes, rows, rows * call.parts, SILU=silu, **call.constants
        )
    rstd = call.coefficients[1].view(call.n, call.channels).double()
    means, rest = channel_gradients(sums.sum(2), rstd, weight, bias, pre_bias, scale, shift, groups, call.pixels)
    grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, x2)]
    with torch.cuda.device_of(x):
        gradient_kernel[(call.programs,)](
            dy, *call.data, call.coefficients, means.to(call.coefficients.dtype), *grads, *strides, *call.sizes, rows,
            SILU=silu, **call.constants,
        )  # fmt: skip
    return [g for g in grads if g is not None] + rest
