"""discretized_mix_logistic_nll and _sample in Triton. The likelihood takes a tile of mixtures by pixels, so that each parameter is read
once and each gradient written once; a draw walks over the mixtures. The formulas and their names are those of
csrc/autoregressive/discretized_mix_logistic.h."""

import math

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes

_TILE = 256  # of a program: mixtures times pixels of the likelihood, pixels of a draw


@triton.jit
def _bin(
    x, mean, raw_log_scale, half_bin, edge, lowest, log_width, OPENAI: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    """(ratio, rest) with probability ratio e^rest, and the derivatives of its logarithm to mean and log scale (or zeros)."""
    log_scale = tl.where(raw_log_scale < lowest, lowest, raw_log_scale)
    inverse = lanes.exp(log_scale * -1.0)
    m = inverse * (x - mean)
    distance, half = tl.where(m < 0.0, m * -1.0, m), inverse * half_bin
    d = half + half
    smaller = tl.where(distance < half, distance, half)
    shift = tl.where(smaller > 24.0, smaller - 24.0, 0.0)
    t, q = lanes.exp(shift - distance), lanes.exp(shift - half)
    q_less_one = lanes.expm1_of(shift - half, q)
    above, below = x > edge, x < edge * -1.0
    outer = above | below
    near_only, far_only = (below & (m >= 0.0)) | (above & (m < 0.0)), (below & (m < 0.0)) | (above & (m >= 0.0))
    width, qt = q_less_one * (q_less_one + 2.0) * -1.0, q * t
    top = tl.where(width < 1e-30, 1e-30, width)
    near, far, sa, sb, lost = qt + 1.0, t + q, qt, q, distance - shift
    with_log_width = (outer == 0) & (d < 1.0)
    whole = outer
    taken = tl.where(with_log_width, tl.where(d < 1e-30, 1e-30, d), 1.0)
    if OPENAI:
        thin = (outer == 0) & (top * t <= near * far * 1e-5)
        near, far = tl.where(thin, t + 1.0, near), tl.where(thin, t + 1.0, far)
        sa, sb, lost = tl.where(thin, t, sa), tl.where(thin, 1.0, sb), tl.where(thin, distance, lost)
        whole, with_log_width = whole | thin, with_log_width | thin
    near, far = tl.where(far_only, 1.0, near), tl.where(near_only, 1.0, far)
    product = near * far
    ratio = lanes.divide(tl.where(whole, 1.0, top), tl.where(whole, product, product * taken))
    rest = tl.where(with_log_width, log_width - log_scale, 0.0) - tl.where(near_only, 0.0, lost)
    d_mean, d_log_scale = tl.zeros_like(ratio), tl.zeros_like(ratio)
    if GRADIENT:
        inverse_product = lanes.divide(tl.full(product.shape, 1.0, product.dtype), product)
        sa = tl.where(far_only, 0.0, sa * far * inverse_product)
        sb = tl.where(near_only, 0.0, sb * near * inverse_product)
        to_distance = sa - sb
        to_half = half * (sa + sb) + tl.where(outer, 0.0, lanes.divide(d * (q * q), top))
        if OPENAI:
            to_half = tl.where(thin, 1.0, to_half)
        d_mean = inverse * tl.where(m < 0.0, to_distance, to_distance * -1.0)
        d_log_scale = tl.where(raw_log_scale < lowest, 0.0, (distance * to_distance + to_half) * -1.0)
    return ratio, rest, d_mean, d_log_scale


@triton.jit
def _channel(at, colour, kind, i, pixels, mask, K: tl.constexpr, KINDS: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(at + (K + (colour * KINDS + kind) * K + i) * pixels, mask=mask, other=0.0).to(DTYPE)


@triton.jit
def _components(
    at, i, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width,
    K: tl.constexpr, COLOURS: tl.constexpr, OPENAI: tl.constexpr, GRADIENT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of mixtures i [MIXTURES, 1]: (logit, ratio, exponent), the derivatives to the means, log scales and coefficients."""
    KINDS: tl.constexpr = 3 if COLOURS == 3 else 2
    logit = tl.where(i < K, tl.load(at + i * pixels, mask=mask, other=0.0).to(DTYPE), float("-inf"))
    mean, raw = _channel(at, 0, 0, i, pixels, mask, K, KINDS, DTYPE), _channel(at, 0, 1, i, pixels, mask, K, KINDS, DTYPE)
    ratio, rest, mean0, scale0 = _bin(red, mean, raw, half_bin, edge, lowest, log_width, OPENAI, GRADIENT)
    exponent = logit + rest
    mean1, scale1, mean2, scale2, link0, link1, link2 = mean0, scale0, mean0, scale0, mean0, mean0, mean0
    if COLOURS == 3:
        link0 = lanes.tanh(_channel(at, 0, 2, i, pixels, mask, K, KINDS, DTYPE))
        link1 = lanes.tanh(_channel(at, 1, 2, i, pixels, mask, K, KINDS, DTYPE))
        link2 = lanes.tanh(_channel(at, 2, 2, i, pixels, mask, K, KINDS, DTYPE))
        mean = link0 * red + _channel(at, 1, 0, i, pixels, mask, K, KINDS, DTYPE)
        raw = _channel(at, 1, 1, i, pixels, mask, K, KINDS, DTYPE)
        more, rest, mean1, scale1 = _bin(green, mean, raw, half_bin, edge, lowest, log_width, OPENAI, GRADIENT)
        ratio, exponent = ratio * more, exponent + rest
        mean = link2 * green + (link1 * red + _channel(at, 2, 0, i, pixels, mask, K, KINDS, DTYPE))
        raw = _channel(at, 2, 1, i, pixels, mask, K, KINDS, DTYPE)
        more, rest, mean2, scale2 = _bin(blue, mean, raw, half_bin, edge, lowest, log_width, OPENAI, GRADIENT)
        ratio, exponent = ratio * more, exponent + rest
        link0 = mean1 * red * (1.0 - link0 * link0)
        link1, link2 = mean2 * red * (1.0 - link1 * link1), mean2 * green * (1.0 - link2 * link2)
    return logit, ratio, exponent, mean0, scale0, mean1, scale1, mean2, scale2, link0, link1, link2


@triton.jit
def _top(x):
    """The largest of each column, [1, PIXELS]; finite, also where nothing is."""
    top = tl.max(x, 0)[None, :]
    return tl.where(top < -1e38, -1e38, top)


@triton.jit
def _place(element, pixels, count, x, x_stride, MIXTURES: tl.constexpr, K: tl.constexpr, COLOURS: tl.constexpr, DTYPE: tl.constexpr):
    """Of pixels `element` of all samples: mixture [MIXTURES, 1], row and pixel in it, mask, colours."""
    i = tl.arange(0, MIXTURES)[:, None]
    there = element < count
    row, pixel = element // pixels, element % pixels
    at = x + row * x_stride + pixel
    red = tl.load(at, mask=there, other=0.0).to(DTYPE)
    green, blue = red, red
    if COLOURS == 3:
        green = tl.load(at + pixels, mask=there, other=0.0).to(DTYPE)
        blue = tl.load(at + 2 * pixels, mask=there, other=0.0).to(DTYPE)
    return i, row, pixel, there & (i < K), red, green, blue


@triton.jit(do_not_specialize=["half_bin", "edge", "lowest", "log_width"])
def nll_kernel(
    x, params, nll, x_stride, params_stride, half_bin, edge, lowest, log_width, pixels, count,
    K: tl.constexpr, COLOURS: tl.constexpr, OPENAI: tl.constexpr, DTYPE: tl.constexpr, MIXTURES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    element = (tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS))[None, :]
    i, row, pixel, mask, red, green, blue = _place(element, pixels, count, x, x_stride, MIXTURES, K, COLOURS, DTYPE)
    half_bin, edge = lanes.from_bits(half_bin, DTYPE), lanes.from_bits(edge, DTYPE)
    lowest, log_width = lanes.from_bits(lowest, DTYPE), lanes.from_bits(log_width, DTYPE)
    logit, ratio, exponent, _, _, _, _, _, _, _, _, _ = _components(
        params + row * params_stride + pixel, i, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width,
        K, COLOURS, OPENAI, False, DTYPE,
    )  # fmt: skip
    top, joint_top = _top(logit), _top(exponent)
    prior, joint = tl.sum(lanes.exp(logit - top), 0)[None, :], tl.sum(ratio * lanes.exp(exponent - joint_top), 0)[None, :]
    tl.store(nll + element, (top + lanes.log(prior)) - (joint_top + lanes.log(joint)), mask=element < count)


@triton.jit(do_not_specialize=["half_bin", "edge", "lowest", "log_width"])
def nll_backward_kernel(
    grad, x, params, d_params, grad_stride, x_stride, params_stride, half_bin, edge, lowest, log_width, pixels, count,
    K: tl.constexpr, COLOURS: tl.constexpr, OPENAI: tl.constexpr, DTYPE: tl.constexpr, MIXTURES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    element = (tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS))[None, :]
    i, row, pixel, mask, red, green, blue = _place(element, pixels, count, x, x_stride, MIXTURES, K, COLOURS, DTYPE)
    half_bin, edge = lanes.from_bits(half_bin, DTYPE), lanes.from_bits(edge, DTYPE)
    lowest, log_width = lanes.from_bits(lowest, DTYPE), lanes.from_bits(log_width, DTYPE)
    logit, ratio, exponent, mean0, scale0, mean1, scale1, mean2, scale2, link0, link1, link2 = _components(
        params + row * params_stride + pixel, i, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width,
        K, COLOURS, OPENAI, True, DTYPE,
    )  # fmt: skip
    prior, joint = lanes.exp(logit - _top(logit)), ratio * lanes.exp(exponent - _top(exponent))
    g = tl.load(grad + row * grad_stride, mask=element < count, other=0.0).to(DTYPE)
    weight = joint * lanes.divide(g, tl.sum(joint, 0)[None, :])
    step = K * pixels  # of one kind's channels
    to = d_params + row * (step * (10 if COLOURS == 3 else 3)) + pixel + i * pixels
    tl.store(to, prior * lanes.divide(g, tl.sum(prior, 0)[None, :]) - weight, mask=mask)
    weight = weight * -1.0
    tl.store(to + step, weight * mean0, mask=mask)
    tl.store(to + 2 * step, weight * scale0, mask=mask)
    if COLOURS == 3:
        tl.store(to + 3 * step, weight * link0, mask=mask)
        tl.store(to + 4 * step, weight * mean1, mask=mask)
        tl.store(to + 5 * step, weight * scale1, mask=mask)
        tl.store(to + 6 * step, weight * link1, mask=mask)
        tl.store(to + 7 * step, weight * mean2, mask=mask)
        tl.store(to + 8 * step, weight * scale2, mask=mask)
        tl.store(to + 9 * step, weight * link2, mask=mask)


# ---- draws


@triton.jit
def _drawable(u):
    u = tl.where(u < 1e-5, 1e-5, u)
    return tl.where(u > 1 - 1e-5, 1 - 1e-5, u)


@triton.jit
def _noise(
    uniforms, seed, offset, uniforms_stride, row, c, column, draws, pixels, mask, KEY_STRIDE: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Channel c of the uniforms, given or element by element from the stream."""
    if uniforms is not None:
        u = lanes.load(uniforms + c * pixels, uniforms_stride, row, column, mask, DTYPE)
    else:
        element = c * pixels + column
        if KEY_STRIDE == 0:
            element += row * draws * pixels
        else:
            element += row * 0
        if tl.float64 == DTYPE:
            r0, r1, r2, r3 = lanes.philox(seed, offset + (element >> 1))
            odd = (element & 1) != 0
            u = lanes.uniform(tl.where(odd, r2, r0), tl.where(odd, r3, r1), 53, DTYPE)
        else:
            r0, r1, r2, r3 = lanes.philox(seed, offset + (element >> 2))
            odd, second = (element & 1) != 0, (element & 2) != 0
            word = tl.where(second, tl.where(odd, r3, r2), tl.where(odd, r1, r0))
            u = lanes.uniform(word, word, 24, DTYPE)
    return _drawable(u)


@triton.jit
def _value(centre, raw_log_scale, u, temperature, lowest, levels_per_unit, level_size, DTYPE: tl.constexpr):
    scale = temperature * lanes.exp(tl.where(raw_log_scale < lowest, lowest, raw_log_scale))
    value = centre + scale * (lanes.log(u) - lanes.log(1.0 - u))
    value = tl.where(value < -1.0, -1.0, value)
    value = tl.where(value > 1.0, 1.0, value)
    magic = 6755399441055744.0 if tl.float64 == DTYPE else 12582912.0  # adding it rounds, ties to even
    rounded = (((value + 1.0) * levels_per_unit + magic) - magic) * level_size - 1.0
    return tl.where(level_size > 0.0, rounded, value)


@triton.jit(do_not_specialize=["temperature", "inverse_temperature", "lowest", "levels_per_unit", "level_size"])
def sample_kernel(
    params, uniforms, out, params_stride, uniforms_stride, out_stride,
    temperature, inverse_temperature, lowest, levels_per_unit, level_size, rows, pixels, key,
    K: tl.constexpr, COLOURS: tl.constexpr, KEY_STRIDE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, pixels, ROWS, COLUMNS)
    temperature, inverse_temperature = lanes.from_bits(temperature, DTYPE), lanes.from_bits(inverse_temperature, DTYPE)
    lowest, level_size = lanes.from_bits(lowest, DTYPE), lanes.from_bits(level_size, DTYPE)
    levels_per_unit = lanes.from_bits(levels_per_unit, DTYPE)
    seed, offset = row, row  # unused where the uniforms are given
    if uniforms is None:
        seed, offset = lanes.stream(key, row, rows, KEY_STRIDE)
    draws: tl.constexpr = K + COLOURS
    KINDS: tl.constexpr = 3 if COLOURS == 3 else 2
    at = params + row * params_stride + column
    best, chosen = tl.zeros((ROWS, COLUMNS), DTYPE), tl.zeros((ROWS, COLUMNS), tl.int32)
    for i in range(K):
        u = _noise(uniforms, seed, offset, uniforms_stride, row, i, column, draws, pixels, mask, KEY_STRIDE, DTYPE)
        logit = tl.load(at + i * pixels, mask=mask, other=0.0).to(DTYPE)
        score = logit * inverse_temperature - lanes.log(lanes.log(u) * -1.0)
        keep = (score <= best) & (i > 0)
        best, chosen = tl.where(keep, best, score), tl.where(keep, chosen, i)
    to, before, first = out + row * out_stride + column, best, best
    for c in tl.static_range(COLOURS):
        u = _noise(uniforms, seed, offset, uniforms_stride, row, K + c, column, draws, pixels, mask, KEY_STRIDE, DTYPE)
        centre = _channel(at, c, 0, chosen, pixels, mask, K, KINDS, DTYPE)
        if c == 1:
            centre += lanes.tanh(_channel(at, 0, 2, chosen, pixels, mask, K, KINDS, DTYPE)) * first
        elif c == 2:
            of_first = lanes.tanh(_channel(at, 1, 2, chosen, pixels, mask, K, KINDS, DTYPE)) * first
            centre += of_first + lanes.tanh(_channel(at, 2, 2, chosen, pixels, mask, K, KINDS, DTYPE)) * before
        raw = _channel(at, c, 1, chosen, pixels, mask, K, KINDS, DTYPE)
        before = _value(centre, raw, u, temperature, lowest, levels_per_unit, level_size, DTYPE)
        if c == 0:
            first = before
        tl.store(to + c * pixels, before, mask=mask)


# ---- launchers


def _sizes(params, colours):
    """(samples, pixels, K)"""
    rows, channels, pixels = params.shape[0], params.shape[1], params.shape[2:].numel()
    if channels * pixels >= 2**31:
        raise RuntimeError(f"discretized_mix_logistic: {channels * pixels} parameters a sample are too many for the triton backend")
    return rows, pixels, channels // (10 if colours == 3 else 3)


def _launch_nll(kernel, x, params, before, out, levels, min_log_scale, openai):
    """before: tensors (N, 1) that come first; out: contiguous."""
    rows, pixels, k = _sizes(params, x.shape[1])
    inputs = [*before, lanes.as_rows(x), lanes.as_rows(params)]
    mixtures, half = triton.next_power_of_2(k), 1 / (levels - 1)
    tile = max(1, _TILE // mixtures)
    with torch.cuda.device_of(params):
        kernel[(triton.cdiv(rows * pixels, tile),)](
            *inputs, out, *(t.stride(0) for t in inputs), *map(lanes.real, (half, 1 - half / 4, min_log_scale, math.log(2 * half))),
            pixels, rows * pixels, K=k, COLOURS=x.shape[1], OPENAI=openai, DTYPE=lanes.working_type(x, params)[1],
            MIXTURES=mixtures, PIXELS=tile, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip


@implements("triton", "discretized_mix_logistic_nll")
def discretized_mix_logistic_nll(x, params, levels, min_log_scale, openai):
    work = lanes.working_type(x, params)[0]
    nll = params.new_empty((params.shape[0], params.shape[2:].numel()), dtype=work)
    if nll.numel():
        _launch_nll(nll_kernel, x, params, [], nll, levels, min_log_scale, openai)
    return nll.sum(1, dtype=torch.float64).to(work)


@implements("triton", "discretized_mix_logistic_nll_backward")
def discretized_mix_logistic_nll_backward(grad, x, params, levels, min_log_scale, openai):
    d_params = torch.empty_like(params, memory_format=torch.contiguous_format)
    if d_params.numel():
        _launch_nll(nll_backward_kernel, x, params, [grad.unsqueeze(1)], d_params, levels, min_log_scale, openai)
    return [d_params]


@implements("triton", "discretized_mix_logistic_sample")
def discretized_mix_logistic_sample(params, key, uniforms, channels, temperature, min_log_scale, levels):
    work, dtype = lanes.working_type(params)
    out = params.new_empty((params.shape[0], channels, *params.shape[2:]), dtype=work)
    if out.numel() == 0:
        return out
    rows, pixels, k = _sizes(params, channels)
    key = None if key is None else key.to(out.device).contiguous()
    tensors = [None if t is None else lanes.as_rows(t) for t in (params, uniforms, out)]
    scalars = (temperature, 1 / temperature, min_log_scale, (levels - 1) / 2 if levels else 0.0, 2 / (levels - 1) if levels else 0.0)
    columns = max(4, min(_TILE, triton.next_power_of_2(pixels)))
    with torch.cuda.device_of(params):
        sample_kernel[(triton.cdiv(rows, _TILE // columns) * triton.cdiv(pixels, columns),)](
            *tensors, *(0 if t is None else t.stride(0) for t in tensors), *map(lanes.real, scalars), rows, pixels, key,
            K=k, COLOURS=channels, KEY_STRIDE=2 if key is not None and key.dim() == 2 else 0, DTYPE=dtype,
            ROWS=_TILE // columns, COLUMNS=columns, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out
