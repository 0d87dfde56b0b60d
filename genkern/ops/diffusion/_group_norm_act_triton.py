"""group_norm_act in Triton: the moments of chunks of each group, which every program that needs them merges in float64, then the map.

The backward pass adds up three numbers per channel; what follows from those for the parameters are a few operations on (N, C) numbers.
"""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops._common import promoted

_BLOCK = 1024


@triton.jit
def _values(x, x2, pre_bias, sample, first, at, mask, x_stride, x2_stride, border, pixels, channels, DTYPE: tl.constexpr):
    """u = x + pre_bias at elements `at` of the group whose first channel is `first`."""
    e = first * pixels + at
    if x2 is None:
        u = tl.load(x + sample * x_stride + e, mask=mask, other=0.0).to(DTYPE)
    else:
        u = tl.load(x + sample * x_stride + e, mask=mask & (e < border), other=0.0).to(DTYPE)
        u += tl.load(x2 + sample * x2_stride + e - border, mask=mask & (e >= border), other=0.0).to(DTYPE)
    if pre_bias is not None:
        u += tl.load(pre_bias + sample * channels + first + at // pixels, mask=mask, other=0.0).to(DTYPE)
    return u


@triton.jit
def _affine(weight, bias, scale, shift, row, channel, mask, like):
    """z = a xhat + b for channels (a tensor or one number); row counts channels of all samples."""
    a, b = tl.full(like.shape, 1.0, like.dtype), tl.zeros_like(like)
    if weight is not None:
        a = tl.load(weight + channel, mask=mask, other=0.0).to(like.dtype)
    if bias is not None:
        b = tl.load(bias + channel, mask=mask, other=0.0).to(like.dtype)
    if scale is not None:
        gain = tl.load(scale + row, mask=mask, other=0.0).to(like.dtype) + 1.0
        a, b = a * gain, b * gain
    if shift is not None:
        b += tl.load(shift + row, mask=mask, other=0.0).to(like.dtype)
    return a, b


@triton.jit
def _statistics(partial, group, chunks, size, eps, DTYPE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr):
    """centre, rstd, offset with xhat = (u - centre) rstd + offset (Chan et al., 1979, for all chunks at once)."""
    k = tl.arange(0, CHUNKS)
    there = k < chunks
    means = tl.load(partial + (group * chunks + k) * 2, mask=there, other=0.0)
    squares = tl.load(partial + (group * chunks + k) * 2 + 1, mask=there, other=0.0)
    counts = tl.where(there, tl.minimum(size - k * CHUNK, CHUNK), 0).to(tl.float64)
    mean = tl.sum(counts * means, 0) / size
    away = tl.where(there, means - mean, 0.0)
    centred = tl.sum(squares + counts * away * away, 0)
    variance = tl.where(centred < 0, 0.0, centred) / size
    rstd = 1.0 / tl.sqrt(variance + lanes.from_bits(eps, tl.float64))
    centre = mean.to(DTYPE)
    return centre, rstd.to(DTYPE), ((centre.to(tl.float64) - mean) * rstd).to(DTYPE)


@triton.jit
def statistics_kernel(
    x, x2, pre_bias, partial, x_stride, x2_stride, groups, per_group, pixels, channels, border, chunks, size,
    DTYPE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squares around it of each chunk: partial float64 (samples groups chunks, 2)."""
    program = tl.program_id(0).to(tl.int64)
    group, begin = program // chunks, (program % chunks).to(tl.int32) * CHUNK
    sample, first = group // groups, group % groups * per_group
    lane = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), DTYPE)
    for i in range(0, CHUNK, BLOCK):
        at = begin + i + lane
        total += _values(x, x2, pre_bias, sample, first, at, at < size, x_stride, x2_stride, border, pixels, channels, DTYPE)
    count = tl.minimum(size - begin, CHUNK).to(tl.float64)
    origin = (tl.sum(total.to(tl.float64), 0) / count).to(DTYPE)  # rounded; the rest corrects both moments
    rest, square = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for i in range(0, CHUNK, BLOCK):
        at = begin + i + lane
        u = _values(x, x2, pre_bias, sample, first, at, at < size, x_stride, x2_stride, border, pixels, channels, DTYPE)
        d = tl.where(at < size, u - origin, 0.0)
        rest += d
        square += d * d
    left = tl.sum(rest.to(tl.float64), 0)
    tl.store(partial + program * 2, origin.to(tl.float64) + left / count)
    tl.store(partial + program * 2 + 1, tl.sum(square.to(tl.float64), 0) - left * left / count)


@triton.jit(do_not_specialize=["eps"])
def apply_kernel(
    x, x2, pre_bias, weight, bias, scale, shift, partial, y, x_stride, x2_stride, y_stride, groups, per_group, pixels, channels, border,
    chunks, size, eps,
    SILU: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    group, begin = program // chunks, (program % chunks).to(tl.int32) * CHUNK
    sample, first = group // groups, group % groups * per_group
    centre, rstd, offset = _statistics(partial, group, chunks, size, eps, DTYPE, CHUNK, CHUNKS)
    for i in range(0, CHUNK, BLOCK):
        at = begin + i + tl.arange(0, BLOCK)
        mask = at < size
        u = _values(x, x2, pre_bias, sample, first, at, mask, x_stride, x2_stride, border, pixels, channels, DTYPE)
        channel = first + at // pixels
        a, b = _affine(weight, bias, scale, shift, sample * channels + channel, channel, mask, u)
        z = a * ((u - centre) * rstd + offset) + b
        if SILU:
            z = z * lanes.sigmoid(z)
        tl.store(y + sample * y_stride + first * pixels + at, z, mask=mask)


@triton.jit
def _dz(grad, z, at, mask, SILU: tl.constexpr):
    """The gradient before the activation."""
    dy = tl.load(grad + at, mask=mask, other=0.0).to(z.dtype)
    if SILU:
        s = lanes.sigmoid(z)
        dy = dy * s * (z * (1.0 - s) + 1.0)
    return dy


@triton.jit(do_not_specialize=["eps"])
def sums_kernel(
    grad, x, x2, pre_bias, weight, bias, scale, shift, partial, sums, grad_stride, x_stride, x2_stride, groups, per_group, pixels,
    channels, border, chunks, size, eps, rows,
    SILU: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """For each channel of each sample the sums of dz, dz xhat and xhat, and rstd: sums float64 (4, rows)."""
    row = tl.program_id(0).to(tl.int64)
    sample, channel = row // channels, row % channels
    in_group = (channel % per_group).to(tl.int32)
    first = channel - in_group
    centre, rstd, offset = _statistics(partial, sample * groups + first // per_group, chunks, size, eps, DTYPE, CHUNK, CHUNKS)
    of_dz, of_product, of_xhat = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for i in range(0, PIXELS, BLOCK):
        pixel = i + tl.arange(0, BLOCK)
        mask = pixel < pixels
        at = in_group * pixels + pixel
        u = _values(x, x2, pre_bias, sample, first, at, mask, x_stride, x2_stride, border, pixels, channels, DTYPE)
        xhat = tl.where(mask, (u - centre) * rstd + offset, 0.0)
        same = tl.zeros((BLOCK,), tl.int64)
        a, b = _affine(weight, bias, scale, shift, row + same, channel + same, mask, u)
        dz = _dz(grad, a * xhat + b, sample * grad_stride + first * pixels + at, mask, SILU)
        of_dz += dz
        of_product += dz * xhat
        of_xhat += xhat
    tl.store(sums + row, tl.sum(of_dz.to(tl.float64), 0))
    tl.store(sums + rows + row, tl.sum(of_product.to(tl.float64), 0))
    tl.store(sums + 2 * rows + row, tl.sum(of_xhat.to(tl.float64), 0))
    tl.store(sums + 3 * rows + row, rstd.to(tl.float64))


@triton.jit(do_not_specialize=["eps"])
def gradient_kernel(
    grad, x, x2, pre_bias, weight, bias, scale, shift, partial, means, grad_x, grad_x2, grad_stride, x_stride, x2_stride, groups,
    per_group, pixels, channels, border, chunks, size, eps,
    SILU: tl.constexpr, DTYPE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd (a dz - p - q xhat), (p, q) = means float64 (samples groups, 2) of a dz and a dz xhat over the group."""
    program = tl.program_id(0).to(tl.int64)
    group, begin = program // chunks, (program % chunks).to(tl.int32) * CHUNK
    sample, first = group // groups, group % groups * per_group
    centre, rstd, offset = _statistics(partial, group, chunks, size, eps, DTYPE, CHUNK, CHUNKS)
    p, q = tl.load(means + group * 2).to(DTYPE), tl.load(means + group * 2 + 1).to(DTYPE)
    for i in range(0, CHUNK, BLOCK):
        at = begin + i + tl.arange(0, BLOCK)
        mask = at < size
        u = _values(x, x2, pre_bias, sample, first, at, mask, x_stride, x2_stride, border, pixels, channels, DTYPE)
        channel = first + at // pixels
        a, b = _affine(weight, bias, scale, shift, sample * channels + channel, channel, mask, u)
        xhat, e = (u - centre) * rstd + offset, first * pixels + at
        dz = _dz(grad, a * xhat + b, sample * grad_stride + e, mask, SILU)
        dx = (a * dz - p - q * xhat) * rstd
        if grad_x2 is None:
            tl.store(grad_x + sample * (channels * pixels) + e, dx, mask=mask)
        else:
            tl.store(grad_x + sample * border + e, dx, mask=mask & (e < border))
            tl.store(grad_x2 + sample * (channels * pixels - border) + e - border, dx, mask=mask & (e >= border))


class _Call:
    """The arguments that all kernels of a call share."""

    def __init__(self, x, x2, weight, bias, pre_bias, scale, shift, groups, eps):
        self.n, of_x = x.shape[:2]
        self.channels = of_x + (0 if x2 is None else x2.shape[1])
        self.pixels = x.shape[2:].numel()
        self.groups, self.per_group = groups, self.channels // groups
        self.size = self.per_group * self.pixels
        if self.size >= 2**31 - 2**16:
            raise RuntimeError(f"group_norm_act: a group of {self.size} elements is too large for the triton backend")
        inputs = [None if t is None else lanes.as_rows(t) for t in (x, x2)]
        strides = [0 if t is None else t.stride(0) for t in inputs]
        parameters = [None if t is None else t.contiguous() for t in (pre_bias, weight, bias, scale, shift)]
        self.chunk = max(_BLOCK, min(2**16, triton.next_power_of_2(triton.cdiv(self.size, 64))))
        self.chunks = triton.cdiv(self.size, self.chunk)
        self.dtype = lanes.working_type(x)[1]
        self.like, self.data, self.strides = x, [*inputs, *parameters], strides
        self.sizes = [groups, self.per_group, self.pixels, self.channels, of_x * self.pixels, self.chunks, self.size]
        self.eps = lanes.real(eps)
        self.programs = self.n * groups * self.chunks
        self.partial = torch.empty(2 * self.programs, dtype=torch.float64, device=x.device)
        self.constants = {"DTYPE": self.dtype, "CHUNK": self.chunk, "num_warps": 4, "enable_fp_fusion": False}
        with torch.cuda.device_of(x):
            statistics_kernel[(self.programs,)](*self.data[:3], self.partial, *strides, *self.sizes, BLOCK=_BLOCK, **self.constants)
        self.constants["CHUNKS"] = triton.next_power_of_2(self.chunks)


@implements("triton", "group_norm_act_out")
def group_norm_act_out(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu, out):
    if out.numel() == 0:
        return
    call, y = _Call(x, x2, weight, bias, pre_bias, scale, shift, groups, eps), lanes.as_rows(out)
    with torch.cuda.device_of(x):
        apply_kernel[(call.programs,)](
            *call.data, call.partial, y, *call.strides, y.stride(0), *call.sizes, call.eps, SILU=silu, BLOCK=_BLOCK, **call.constants
        )


@implements("triton", "group_norm_act")
def group_norm_act(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu):
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    y = torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=promoted(x, x2), device=x.device)
    group_norm_act_out(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu, y)
    return y


def channel_gradients(sums, rstd, weight, bias, pre_bias, scale, shift, groups, pixels):
    """(means (2, N, C) of a dz and a dz xhat over the group of each channel, in float64; [gradients of the parameters that are there]).

    sums (3, N, C) of dz, dz xhat and xhat over the pixels, rstd (N, C).
    """
    dz, product, xhat = sums
    wide = lambda t, absent: torch.full((), absent, dtype=torch.float64, device=dz.device) if t is None else t.double()
    gain, w, b = 1 + wide(scale, 0.0), wide(weight, 1.0), wide(bias, 0.0)
    a, per_group = (gain * w).expand(dz.shape), dz.shape[1] // groups
    over_groups = lambda t: t.unflatten(1, (groups, per_group)).sum(-1).repeat_interleave(per_group, 1) / (per_group * pixels)
    means = torch.stack([over_groups(a * dz), over_groups(a * product)])
    gradients = (
        (weight, lambda: (gain * product).sum(0)),
        (bias, lambda: (gain * dz).sum(0)),
        (pre_bias, lambda: rstd * (a * dz - means[0] * pixels - means[1] * xhat)),
        (scale, lambda: w * product + b * dz),
        (shift, lambda: dz),
    )
    return means, [gradient().to(t.dtype) for t, gradient in gradients if t is not None]


@implements("triton", "group_norm_act_backward")
def group_norm_act_backward(grad, x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu):
    given = (x, x2, weight, bias, pre_bias, scale, shift)
    if grad.numel() == 0:
        return [torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in given if t is not None]
    call, dy = _Call(x, x2, weight, bias, pre_bias, scale, shift, groups, eps), lanes.as_rows(grad)
    rows = call.n * call.channels
    sums = torch.empty((4, call.n, call.channels), dtype=torch.float64, device=x.device)
    strides = [dy.stride(0), *call.strides]
    block = max(16, min(_BLOCK, triton.next_power_of_2(call.pixels)))
    with torch.cuda.device_of(x):
        sums_kernel[(rows,)](
            dy, *call.data, call.partial, sums, *strides, *call.sizes, call.eps, rows,
            SILU=silu, BLOCK=block, PIXELS=triton.cdiv(call.pixels, block) * block, **call.constants,
        )  # fmt: skip
    means, rest = channel_gradients(sums[:3], sums[3], weight, bias, pre_bias, scale, shift, groups, call.pixels)
    means = means.view(2, call.n, groups, -1)[..., 0].permute(1, 2, 0).contiguous()
    grads = [None if t is None else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, x2)]
    with torch.cuda.device_of(x):
        gradient_kernel[(call.programs,)](
            dy, *call.data, call.partial, means, *grads, *strides, *call.sizes, call.eps, SILU=silu, BLOCK=_BLOCK, **call.constants
        )
    return [g for g in grads if g is not None] + rest


from genkern.ops.diffusion import _group_norm_act_channels_last_triton  # noqa: E402, F401  # the other layout
