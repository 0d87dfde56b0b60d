"""discretized_mix_logistic_nll and _sample in Triton: pixels in lanes, the mixtures in a loop. The formulas and their names are those
of csrc/autoregressive/discretized_mix_logistic.h. The backward pass goes over the parameters twice: first for the weights."""

import math

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes

_TILE = 256  # pixels of one program, one to a thread


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
def _component(
    at, i, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width,
    K: tl.constexpr, COLOURS: tl.constexpr, OPENAI: tl.constexpr, GRADIENT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Mixture i: (logit, ratio, exponent) and the derivatives to its means, log scales and coefficients."""
    KINDS: tl.constexpr = 3 if COLOURS == 3 else 2
    logit = tl.load(at + i * pixels, mask=mask, other=0.0).to(DTYPE)
    mean, raw = _channel(at, 0, 0, i, pixels, mask, K, KINDS, DTYPE), _channel(at, 0, 1, i, pixels, mask, K, KINDS, DTYPE)
    ratio, rest, mean0, scale0 = _bin(red, mean, raw, half_bin, edge, lowest, log_width, OPENAI, GRADIENT)
    exponent = logit + rest
    mean1, scale1, mean2, scale2, link0, link1, link2 = mean0, scale0, mean0, scale0, mean0, mean0, mean0
    if COLOURS == 3:
        link0 = lanes.tanh(_channel(at, 0, 2, i, pixels, mask, K, KINDS, DTYPE))
        link1 = lanes.tanh(_channel(at, 1, 2, i, pixels, mask, K, KINDS, DTYPE))
        link2 = lanes.tanh(_channel(at, 2, 2, i, pixels, mask, K, KINDS, DTYPE))
        mean = tl.fma(link0, red, _channel(at, 1, 0, i, pixels, mask, K, KINDS, DTYPE))
        raw = _channel(at, 1, 1, i, pixels, mask, K, KINDS, DTYPE)
        more, rest, mean1, scale1 = _bin(green, mean, raw, half_bin, edge, lowest, log_width, OPENAI, GRADIENT)
        ratio, exponent = ratio * more, exponent + rest
        mean = tl.fma(link2, green, tl.fma(link1, red, _channel(at, 2, 0, i, pixels, mask, K, KINDS, DTYPE)))
        raw = _channel(at, 2, 1, i, pixels, mask, K, KINDS, DTYPE)
        more, rest, mean2, scale2 = _bin(blue, mean, raw, half_bin, edge, lowest, log_width, OPENAI, GRADIENT)
        ratio, exponent = ratio * more, exponent + rest
        link0 = mean1 * red * (1.0 - link0 * link0)
        link1, link2 = mean2 * red * (1.0 - link1 * link1), mean2 * green * (1.0 - link2 * link2)
    return logit, ratio, exponent, mean0, scale0, mean1, scale1, mean2, scale2, link0, link1, link2


@triton.jit
def _add(top, total, ratio, exponent):
    """total e^top + ratio e^exponent."""
    d = exponent - top
    e = lanes.exp(tl.where(d < 0.0, d, d * -1.0))
    return tl.where(d > 0.0, exponent, top), tl.where(d > 0.0, total * e + ratio, total + ratio * e)


@triton.jit
def _sums(
    at, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width,
    K: tl.constexpr, COLOURS: tl.constexpr, OPENAI: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(top, total) of the sums of the weights and of weights times probabilities: total e^top."""
    prior_top, prior = tl.full(red.shape, -1e38, DTYPE), tl.zeros_like(red)
    joint_top, joint = prior_top, prior
    for i in range(K):
        logit, ratio, exponent, _, _, _, _, _, _, _, _, _ = _component(
            at, i, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width, K, COLOURS, OPENAI, False, DTYPE
        )
        prior_top, prior = _add(prior_top, prior, tl.full(red.shape, 1.0, DTYPE), logit)
        joint_top, joint = _add(joint_top, joint, ratio, exponent)
    return prior_top, prior, joint_top, joint


@triton.jit
def _colours(x, x_stride, row, column, pixels, mask, COLOURS: tl.constexpr, DTYPE: tl.constexpr):
    red = lanes.load(x, x_stride, row, column, mask, DTYPE)
    green, blue = red, red
    if COLOURS == 3:
        green = lanes.load(x + pixels, x_stride, row, column, mask, DTYPE)
        blue = lanes.load(x + 2 * pixels, x_stride, row, column, mask, DTYPE)
    return red, green, blue


@triton.jit(do_not_specialize=["half_bin", "edge", "lowest", "log_width"])
def nll_kernel(
    x, params, nll, x_stride, params_stride, nll_stride, half_bin, edge, lowest, log_width, rows, pixels,
    K: tl.constexpr, COLOURS: tl.constexpr, OPENAI: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, pixels, ROWS, COLUMNS)
    half_bin, edge = lanes.from_bits(half_bin, DTYPE), lanes.from_bits(edge, DTYPE)
    lowest, log_width = lanes.from_bits(lowest, DTYPE), lanes.from_bits(log_width, DTYPE)
    red, green, blue = _colours(x, x_stride, row, column, pixels, mask, COLOURS, DTYPE)
    prior_top, prior, joint_top, joint = _sums(
        params + row * params_stride + column, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width,
        K, COLOURS, OPENAI, DTYPE,
    )  # fmt: skip
    value = (prior_top + lanes.log(prior)) - (joint_top + lanes.log(joint))
    tl.store(nll + row * nll_stride + number, tl.sum(tl.where(mask, value, 0.0), 1)[:, None], mask=row < rows)


@triton.jit(do_not_specialize=["half_bin", "edge", "lowest", "log_width"])
def nll_backward_kernel(
    grad, x, params, d_params, grad_stride, x_stride, params_stride, d_params_stride, half_bin, edge, lowest, log_width, rows, pixels,
    K: tl.constexpr, COLOURS: tl.constexpr, OPENAI: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, pixels, ROWS, COLUMNS)
    half_bin, edge = lanes.from_bits(half_bin, DTYPE), lanes.from_bits(edge, DTYPE)
    lowest, log_width = lanes.from_bits(lowest, DTYPE), lanes.from_bits(log_width, DTYPE)
    red, green, blue = _colours(x, x_stride, row, column, pixels, mask, COLOURS, DTYPE)
    at, to = params + row * params_stride + column, d_params + row * d_params_stride + column
    prior_top, prior, joint_top, joint = _sums(
        at, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width, K, COLOURS, OPENAI, DTYPE
    )
    g = tl.load(grad + row * grad_stride, mask=row < rows, other=0.0).to(DTYPE)
    of_prior, of_joint = lanes.divide(g + tl.zeros_like(prior), prior), lanes.divide(g + tl.zeros_like(joint), joint)
    KINDS: tl.constexpr = 3 if COLOURS == 3 else 2
    for i in range(K):
        logit, ratio, exponent, mean0, scale0, mean1, scale1, mean2, scale2, link0, link1, link2 = _component(
            at, i, red, green, blue, pixels, mask, half_bin, edge, lowest, log_width, K, COLOURS, OPENAI, True, DTYPE
        )
        weight = of_joint * (ratio * lanes.exp(exponent - joint_top))
        tl.store(to + i * pixels, of_prior * lanes.exp(logit - prior_top) - weight, mask=mask)
        weight = weight * -1.0
        first = to + (K + i) * pixels  # of the first colour's means; channels of one kind are K pixels apart
        step = K * pixels
        tl.store(first, weight * mean0, mask=mask)
        tl.store(first + step, weight * scale0, mask=mask)
        if COLOURS == 3:
            tl.store(first + 2 * step, weight * link0, mask=mask)
            tl.store(first + KINDS * step, weight * mean1, mask=mask)
            tl.store(first + (KINDS + 1) * step, weight * scale1, mask=mask)
            tl.store(first + (KINDS + 2) * step, weight * link1, mask=mask)
            tl.store(first + 2 * KINDS * step, weight * mean2, mask=mask)
            tl.store(first + (2 * KINDS + 1) * step, weight * scale2, mask=mask)
            tl.store(first + (2 * KINDS + 2) * step, weight * link2, mask=mask)


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


def _launch(kernel, params, colours, tensors, scalars, **constants):
    rows, pixels = params.shape[0], params.shape[2:].numel()
    if params.shape[1] * pixels >= 2**31:
        raise RuntimeError(
            f"discretized_mix_logistic: {params.shape[1] * pixels} parameters a sample are too many for the triton backend"
        )
    tensors = [None if t is None else lanes.as_rows(t) for t in tensors]
    columns = _columns(pixels)
    tile_rows = _TILE // columns
    with torch.cuda.device_of(params):
        kernel[(triton.cdiv(rows, tile_rows) * triton.cdiv(pixels, columns),)](
            *tensors, *(0 if t is None else t.stride(0) for t in tensors), *map(lanes.real, scalars), rows, pixels,
            K=params.shape[1] // (10 if colours == 3 else 3), COLOURS=colours, ROWS=tile_rows, COLUMNS=columns,
            num_warps=8, enable_fp_fusion=False, **constants,
        )  # fmt: skip


def _columns(pixels):
    return max(4, min(_TILE, triton.next_power_of_2(pixels)))


def _rule(levels, min_log_scale):
    half = 1 / (levels - 1)
    return half, 1 - half / 4, min_log_scale, math.log(2 * half)


@implements("triton", "discretized_mix_logistic_nll")
def discretized_mix_logistic_nll(x, params, levels, min_log_scale, openai):
    work, dtype = lanes.working_type(x, params)
    rows, pixels = params.shape[0], params.shape[2:].numel()
    if rows * pixels == 0:
        return params.new_zeros(rows, dtype=work)
    sums = params.new_empty((rows, triton.cdiv(pixels, _columns(pixels))), dtype=work)
    _launch(nll_kernel, params, x.shape[1], (x, params, sums), _rule(levels, min_log_scale), OPENAI=openai, DTYPE=dtype)
    return sums.sum(1, dtype=torch.float64).to(work)


@implements("triton", "discretized_mix_logistic_nll_backward")
def discretized_mix_logistic_nll_backward(grad, x, params, levels, min_log_scale, openai):
    d_params = torch.empty_like(params, memory_format=torch.contiguous_format)
    if d_params.numel():
        tensors, dtype = (grad.unsqueeze(1), x, params, d_params), lanes.working_type(x, params)[1]
        _launch(nll_backward_kernel, params, x.shape[1], tensors, _rule(levels, min_log_scale), OPENAI=openai, DTYPE=dtype)
    return [d_params]


@implements("triton", "discretized_mix_logistic_sample")
def discretized_mix_logistic_sample(params, key, uniforms, channels, temperature, min_log_scale, levels):
    work, dtype = lanes.working_type(params)
    out = params.new_empty((params.shape[0], channels, *params.shape[2:]), dtype=work)
    if out.numel():
        key = None if key is None else key.to(out.device).contiguous()
        scalars = (
            temperature,
            1 / temperature,
            min_log_scale,
            (levels - 1) / 2 if levels else 0.0,
            2 / (levels - 1) if levels else 0.0,
        )
        stride = 2 if key is not None and key.dim() == 2 else 0
        _launch(sample_kernel, params, channels, (params, uniforms, out), scalars, key=key, KEY_STRIDE=stride, DTYPE=dtype)
    return out
