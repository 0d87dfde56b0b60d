"""What Triton kernels are written with: tiles of rows, the elementary functions of lanes.h and the random stream of philox.h.

Values are float32, or float64 where DTYPE says so. Launched with enable_fp_fusion=False, so that a multiplication and an addition
stay two roundings and the draws have the same bits as in C++; fused multiply-add is spelled tl.fma.
"""

import struct

import torch
import triton
import triton.language as tl

# ---- host side: rows, tiles, launch

_TILE = 1024  # elements of one program


def as_rows(x):
    """x (N, ...) as (N, width) with neighbouring elements in a row; a view wherever the rows are dense."""
    x = x.reshape(x.shape[0], -1)
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


def tile_shape(width):
    """(rows, columns) of the tile of one program."""
    columns = max(4, min(_TILE, triton.next_power_of_2(width)))
    return _TILE // columns, columns


def launch(kernel, like, rows, width, *args, **constants):
    """Run kernel(*args, rows, width, ...) over the tiles of (rows, width), on the device of tensor `like`."""
    tile_rows, columns = tile_shape(width)
    programs = triton.cdiv(rows, tile_rows) * triton.cdiv(width, columns)
    with torch.cuda.device_of(like):
        kernel[(programs,)](*args, rows, width, ROWS=tile_rows, COLUMNS=columns, num_warps=4, enable_fp_fusion=False, **constants)


def real(x):
    """A Python float as the integer that holds its bits: Triton would pass it in float32."""
    return struct.unpack("<q", struct.pack("<d", x))[0]


def working_type(*tensors):
    """float64 where a tensor is, else float32: (torch dtype, Triton dtype)."""
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return (torch.float64, tl.float64) if double else (torch.float32, tl.float32)


# ---- tiles


@triton.jit
def from_bits(x, DTYPE: tl.constexpr):
    return x.to(tl.int64).to(tl.float64, bitcast=True).to(DTYPE)


@triton.jit
def tile(rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(row [ROWS, 1], tile number in the row, column [1, COLUMNS], mask) of this program."""
    tiles = tl.cdiv(width, COLUMNS)
    program = tl.program_id(0).to(tl.int64)
    row = (program // tiles * ROWS + tl.arange(0, ROWS))[:, None]
    number = program % tiles
    column = (number * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, number, column, (row < rows) & (column < width)


@triton.jit
def load(x, stride, row, column, mask, DTYPE: tl.constexpr):
    return tl.load(x + row * stride + column, mask=mask, other=0.0).to(DTYPE)


# ---- elementary functions


@triton.jit
def _exp_tail_polynomial(x):
    """(e^x - 1 - x) / x^2 for |x| <= ln(2) / 2."""
    if x.dtype == tl.float64:
        p = x * (1.0 / 6227020800.0) + 1.0 / 479001600.0
        p = (((p * x + 1.0 / 39916800.0) * x + 1.0 / 3628800.0) * x + 1.0 / 362880.0) * x + 1.0 / 40320.0
        p = (((p * x + 1.0 / 5040.0) * x + 1.0 / 720.0) * x + 1.0 / 120.0) * x + 1.0 / 24.0
        return (p * x + 1.0 / 6.0) * x + 0.5
    else:
        p = tl.fma(x, 0.00019739558, 0.0013935097)
        p = tl.fma(tl.fma(p, x, 0.008333571), x, 0.041666463)
        return tl.fma(tl.fma(p, x, 0.16666666), x, 0.5)


@triton.jit
def exp(x):
    """Overflows to infinity, underflows to zero, keeps NaN; tl.exp is less precise in float32."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        x = tl.where(x < -104.0, -104.0, x)
        x = tl.where(x > 89.0, 89.0, x)
        n = (x * 1.44269504 + 12582912.0) - 12582912.0  # to the nearest integer
        r = tl.fma(n, -1.4286068203e-6, tl.fma(n, -0.693145751953125, x))
        p = tl.fma(_exp_tail_polynomial(r), r * r, r) + 1.0
        k = tl.where(x == x, n, 0.0).to(tl.int32)
        half = k >> 1  # 2^k in two factors, so that subnormal results and overflow come out right
        return p * ((half + 127) << 23).to(tl.float32, bitcast=True) * ((k - half + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def expm1_tail(x):
    """e^x - 1 - x without cancellation near zero."""
    near = _exp_tail_polynomial(x) * x * x
    return tl.where(tl.abs(x) < 0.34657359, near, (exp(x) - 1.0) - x)


@triton.jit
def expm1(x):
    return expm1_of(x, exp(x))


@triton.jit
def expm1_of(x, exp_x):
    near = tl.fma(_exp_tail_polynomial(x), x * x, x)
    return tl.where(tl.abs(x) < 0.34657359, near, exp_x - 1.0)


@triton.jit
def tanh(x):
    x = tl.where(x > 20.0, 20.0, x)
    x = tl.where(x < -20.0, -20.0, x)
    e = expm1(x + x)
    return divide(e, e + 2.0)


@triton.jit
def divide(x, y):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def _sqrt(x):
    """Correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def log(x):
    """log 0 is -infinity, of negative numbers NaN; keeps infinity and NaN."""
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        tiny = x < 1.1754943508222875e-38
        bits = tl.where(tiny, x * 8388608.0, x).to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F400000) >> 23
        n = exponent.to(tl.float32) - tl.where(tiny, 23.0, 0.0)
        f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
        z = f * f
        p = tl.fma(tl.fma(f, 0.03762157, -0.091079414), f, 0.11697098)
        p = tl.fma(tl.fma(tl.fma(p, f, -0.12728232), f, 0.14276786), f, -0.16655323)
        p = tl.fma(tl.fma(tl.fma(p, f, 0.19999579), f, -0.25000164), f, 0.3333334)
        y = tl.fma(z, -0.5, tl.fma(n, 1.4286068203e-6, p * f * z))
        y = tl.fma(n, 0.693145751953125, f + y)
        y = tl.where(x < float("inf"), y, x)
        y = tl.where(x == 0.0, float("-inf"), y)
        return tl.where(x < 0.0, float("nan"), y)


@triton.jit
def log1p(x):
    """ln u + what rounding u = 1 + x lost, relative to u."""
    u = x + 1.0
    y = log(u)
    return tl.where((x > -1.0) & (x < float("inf")), y + divide(x - (u - 1.0), u), y)


@triton.jit
def sigmoid(x):
    return divide(tl.full(x.shape, 1.0, x.dtype), exp(x * -1.0) + 1.0)


@triton.jit
def softplus(x):
    """ln(1 + e^x); ln sigmoid(x) = -softplus(-x)."""
    return tl.where(x < 0.0, 0.0, x) + log1p(exp(tl.where(x < 0.0, x, x * -1.0)))


@triton.jit
def exact_log(x):
    """Natural logarithm of a positive normal number x = 2^n m with m in [3/4, 3/2)."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE8000000000000) >> 52
        n = exponent.to(tl.float64)
        f = (bits - (exponent << 52)).to(tl.float64, bitcast=True) - 1.0
        s = f / (f + 2.0)
        z = s * s
        p = (z * 0.13609030312095335 + 0.13209708234660042) * z + 0.1538886780605847
        p = ((p * z + 0.18181737626289324) * z + 0.2222222304835181) * z + 0.2857142856727593
        p = ((p * z + 0.4000000000000794) * z + 0.6666666666666666) * z
        y = n * 1.90821492927058770e-10 - s * (f - p)
        return n * 6.93147180369123816490e-01 + (f + y)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F400000) >> 23
        n = exponent.to(tl.float32)
        f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
        z = f * f
        p = (f * 0.03762157 + -0.091079414) * f + 0.11697098
        p = ((p * f + -0.12728232) * f + 0.14276786) * f + -0.16655323
        p = ((p * f + 0.19999579) * f + -0.25000164) * f + 0.3333334
        y = n * 1.4286068203e-6 + p * f * z
        y = z * -0.5 + y
        return n * 0.693145751953125 + (f + y)


@triton.jit
def _flip_sign(x, k):
    """-x where bit 1 of k is set."""
    if x.dtype == tl.float64:
        return (x.to(tl.int64, bitcast=True) ^ ((k.to(tl.int64) & 2) << 62)).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.int32, bitcast=True) ^ ((k & 2) << 30)).to(tl.float32, bitcast=True)


@triton.jit
def sincos_turns(turns):
    """sin and cos of 2 pi turns, 0 <= turns <= 1; the reduction to an eighth of a turn is exact."""
    if turns.dtype == tl.float64:
        quarter = (turns * 4.0 + 6755399441055744.0) - 6755399441055744.0  # to the nearest integer, ties to even
        x = (turns - quarter * 0.25) * 6.283185307179586
        z = x * x
        s = (z * 1.5917988979169704e-10 + -2.505112989644632e-08) * z + 2.7557316093198383e-06
        s = (((s * z + -0.00019841269836740532) * z + 0.008333333333330936) * z + -0.16666666666666666) * z * x + x
        c = (z * -1.1382544502902206e-11 + 2.0876145046994267e-09) * z + -2.755731726586314e-07
        c = ((c * z + 2.480158729875436e-05) * z + -0.0013888888888887389) * z + 0.041666666666666664
    else:
        quarter = (turns * 4.0 + 12582912.0) - 12582912.0
        x = (turns - quarter * 0.25) * 6.283185307179586
        z = x * x
        s = ((z * -0.00019518292 + 0.008332189) * z + -0.16666655) * z * x + x
        c = (z * 2.4432327e-05 + -0.001388731) * z + 0.041666646
    c = c * z * z + (z * -0.5 + 1.0)
    k = quarter.to(tl.int32)
    odd = (k & 1) != 0
    return _flip_sign(tl.where(odd, c, s), k), _flip_sign(tl.where(odd, s, c), k + 1)


# ---- words of the stream. A value takes one word (float32), or two, the high one first (float64)


@triton.jit
def philox(seed, counter):
    """The four words of 64-bit counters under a 64-bit seed."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero)


@triton.jit
def stream(key, row, rows, KEY_STRIDE: tl.constexpr):
    """(seed, offset) [ROWS, 1] of the rows; KEY_STRIDE is 2 with one key per row, else 0."""
    seed = tl.load(key + row * KEY_STRIDE, mask=row < rows, other=0)
    return seed, tl.load(key + row * KEY_STRIDE + 1, mask=row < rows, other=0)


@triton.jit
def interleave4(a, b, c, d):
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def words(seed, offset, first, COLUMNS: tl.constexpr, DTYPE: tl.constexpr):
    """(high, low) words of elements first, ..., first + COLUMNS - 1, first on a counter's boundary; low counts in float64 only."""
    if tl.float64 == DTYPE:
        r0, r1, r2, r3 = philox(seed, offset + (first >> 1) + tl.arange(0, COLUMNS // 2)[None, :])
        return tl.interleave(r0, r2), tl.interleave(r1, r3)
    else:
        r0, r1, r2, r3 = philox(seed, offset + (first >> 2) + tl.arange(0, COLUMNS // 4)[None, :])
        high = interleave4(r0, r1, r2, r3)
        return high, high


# ---- distributions


@triton.jit
def to_unit(high, low, DTYPE: tl.constexpr):
    """A number in (0, 1]."""
    if tl.float64 == DTYPE:
        return high.to(tl.float64) * 2.0**-32 + (low.to(tl.float64) * 2.0**-64 + 2.0**-65)
    else:
        return high.to(tl.float32) * 2.0**-32 + 2.0**-33


@triton.jit
def _half_unit(high, low, DTYPE: tl.constexpr):
    """min(u, 1 - u) of a uniform u, fine near zero, and whether it is 1 - u."""
    reflected = (high >> 31) != 0
    return to_unit(tl.where(reflected, high ^ 0xFFFFFFFF, high), tl.where(reflected, low ^ 0xFFFFFFFF, low), DTYPE), reflected


@triton.jit
def box_muller(u1, u2):
    radius = _sqrt(exact_log(u1) * -2.0)
    sine, cosine = sincos_turns(u2)
    return radius * cosine, radius * sine


@triton.jit
def normals(seed, offset, first, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    """Elements first, ..., first + COLUMNS - 1 of the normal stream; ALIGNED: first is on a counter's boundary."""
    if not ALIGNED:  # every element computes its counter and takes what it needs
        element = first + tl.arange(0, COLUMNS)[None, :]
        if tl.float64 == DTYPE:
            r0, r1, r2, r3 = philox(seed, offset + (element >> 1))
            x, y = box_muller(to_unit(r0, r1, DTYPE), to_unit(r2, r3, DTYPE))
        else:
            r0, r1, r2, r3 = philox(seed, offset + (element >> 2))
            second = (element & 2) != 0
            u1, u2 = tl.where(second, r2, r0), tl.where(second, r3, r1)
            x, y = box_muller(to_unit(u1, u1, DTYPE), to_unit(u2, u2, DTYPE))
        return tl.where((element & 1) != 0, y, x)
    elif tl.float64 == DTYPE:
        r0, r1, r2, r3 = philox(seed, offset + (first >> 1) + tl.arange(0, COLUMNS // 2)[None, :])
        x, y = box_muller(to_unit(r0, r1, DTYPE), to_unit(r2, r3, DTYPE))
        return tl.interleave(x, y)
    else:
        r0, r1, r2, r3 = philox(seed, offset + (first >> 2) + tl.arange(0, COLUMNS // 4)[None, :])
        a, b = box_muller(to_unit(r0, r0, DTYPE), to_unit(r1, r1, DTYPE))
        c, d = box_muller(to_unit(r2, r2, DTYPE), to_unit(r3, r3, DTYPE))
        return interleave4(a, b, c, d)


@triton.jit
def uniform(high, low, DIGITS: tl.constexpr, DTYPE: tl.constexpr):
    """[0, 1): the low DIGITS bits."""
    if tl.float64 == DTYPE:
        return (((high.to(tl.int64) << 32) | low.to(tl.int64)) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 2.0**-53
    else:
        return (high & ((1 << DIGITS) - 1)).to(tl.int32).to(tl.float32) * 2.0**-DIGITS


@triton.jit
def exponential(high, low, DTYPE: tl.constexpr):
    """-ln u, one logarithm for both ends."""
    w, reflected = _half_unit(high, low, DTYPE)
    u = tl.where(reflected, 1.0 - w, w)
    lost = tl.where(reflected, w - (1.0 - u), 0.0)
    return lost - exact_log(u)


@triton.jit
def gumbel(high, low, DTYPE: tl.constexpr):
    """-ln(-ln u)"""
    return exact_log(exponential(high, low, DTYPE)) * -1.0


@triton.jit
def logistic(high, low, DTYPE: tl.constexpr):
    """ln(u / (1 - u)), odd around the middle word."""
    w, reflected = _half_unit(high, low, DTYPE)
    u = 1.0 - w
    x = exact_log(w) + ((w - (1.0 - u)) - exact_log(u))
    return tl.where(reflected, x * -1.0, x)
