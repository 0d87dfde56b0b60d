"""The random stream in plain NumPy, written from its definition and independent of the package: what every backend must give.

Philox4x32-10 (Salmon et al., 2011): counter `offset + i` under `seed` gives four 32-bit words. A float32 value takes one word, a
float64 value two (the first is the high one). Functions take key = (seed, offset) and give the first n values of that stream;
normal, exponential, gumbel and logistic use only operations that IEEE 754 rounds correctly, so their bits can be compared.
"""

import math

import numpy as np

_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def words(key, n):
    """The first n words of the stream, uint32."""
    seed, offset = (int(k) % 2**64 for k in key)
    counter = np.arange((n + 3) // 4, dtype=np.uint64) + np.uint64(offset)  # wraps modulo 2^64
    c = [counter & _LOW, counter >> _32, np.zeros_like(counter), np.zeros_like(counter)]
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> _32) ^ c[1] ^ np.uint64(k0), p1 & _LOW, (p0 >> _32) ^ c[3] ^ np.uint64(k1), p0 & _LOW]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack(c, 1).astype(np.uint32).reshape(-1)[:n]


# ---- units: one number in (0, 1] from one word or from two


def _raw(key, n, dtype):
    """n words for float32, n words of 64 bits for float64."""
    if dtype == np.float32:
        return words(key, n)
    pairs = words(key, 2 * n).reshape(-1, 2).astype(np.uint64)
    return pairs[:, 0] << _32 | pairs[:, 1]


def _unit(r):
    if r.dtype == np.uint32:
        return r.astype(np.float32) * np.float32(2.0**-32) + np.float32(2.0**-33)
    return (r >> _32).astype(np.float64) * 2.0**-32 + ((r & _LOW).astype(np.float64) * 2.0**-64 + 2.0**-65)


def _half_unit(r):
    """min(u, 1 - u), and where it is 1 - u."""
    reflected = r >> r.dtype.type(8 * r.dtype.itemsize - 1) == 1
    return _unit(np.where(reflected, ~r, r)), reflected


# ---- elementary functions, plain multiplications and additions


def _polynomial(x, *coefficients):
    """Lowest degree first, evaluated from the highest."""
    total = np.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * x + x.dtype.type(c)
    return total


def _log(x):
    constant = x.dtype.type
    if x.dtype == np.float32:
        bits = x.view(np.int32)
        exponent = (bits - np.int32(0x3F400000)) >> np.int32(23)
        f = (bits - (exponent << np.int32(23))).view(np.float32) - constant(1)
        n, z = exponent.astype(np.float32), f * f
        y = _polynomial(f, 0.3333334, -0.25000164, 0.19999579, -0.16655323, 0.14276786, -0.12728232, 0.11697098,
                        -0.091079414, 0.03762157) * f * z  # fmt: skip
        y = n * constant(1.4286068203e-6) + y
        return n * constant(0.693145751953125) + (f + (z * constant(-0.5) + y))
    bits = x.view(np.int64)
    exponent = (bits - np.int64(0x3FE8000000000000)) >> np.int64(52)
    f = (bits - (exponent << np.int64(52))).view(np.float64) - 1.0
    n, s = exponent.astype(np.float64), f / (f + 2.0)
    z = s * s
    p = _polynomial(z, 0.6666666666666666, 0.4000000000000794, 0.2857142856727593, 0.2222222304835181, 0.18181737626289324,
                    0.1538886780605847, 0.13209708234660042, 0.13609030312095335) * z  # fmt: skip
    return n * 6.93147180369123816490e-01 + (f + (n * 1.90821492927058770e-10 - s * (f - p)))


def _sincos_turns(turns):
    constant = turns.dtype.type
    quarter = np.rint(turns * constant(4))  # ties to even
    x = (turns - quarter * constant(0.25)) * constant(6.283185307179586)
    z = x * x
    if x.dtype == np.float32:
        odd, even = (-0.16666655, 0.008332189, -0.00019518292), (0.041666646, -0.001388731, 2.4432327e-05)
    else:
        odd = (-0.16666666666666666, 0.008333333333330936, -0.00019841269836740532, 2.7557316093198383e-06,
               -2.505112989644632e-08, 1.5917988979169704e-10)  # fmt: skip
        even = (0.041666666666666664, -0.0013888888888887389, 2.480158729875436e-05, -2.755731726586314e-07,
                2.0876145046994267e-09, -1.1382544502902206e-11)  # fmt: skip
    s = _polynomial(z, *odd) * z * x + x
    c = _polynomial(z, *even) * z * z + (z * constant(-0.5) + constant(1))
    k = quarter.astype(np.int64)
    sine, cosine = np.where(k & 1, c, s), np.where(k & 1, s, c)
    return np.where(k & 2, -sine, sine), np.where((k + 1) & 2, -cosine, cosine)


def _minus_log_complement(w):
    """-ln(1 - w), with what rounding 1 - w lost added back."""
    one = w.dtype.type(1)
    u = one - w
    return (w - (one - u)) - _log(u)


# ---- distributions


def bits(key, n, dtype=np.int32):
    """int32: the words; int64: two words each."""
    raw = _raw(key, n, np.float32 if dtype == np.int32 else np.float64)
    return raw.view(dtype)


def uniform(key, n, dtype=np.float32, digits=None):
    """[0, 1): the low `digits` bits of each word. As many as the type holds: float32 24, float64 53; half 11, bfloat16 8."""
    digits = digits or {np.float32: 24, np.float64: 53}[dtype]
    raw = _raw(key, n, dtype)
    return (raw & raw.dtype.type(2**digits - 1)).astype(dtype) * dtype(2.0**-digits)


def bernoulli(key, n, dtype=np.float32, p=0.5):
    """1 where the (high) word is below p 2^32."""
    stride = 2 if dtype == np.float64 else 1
    return (words(key, stride * n)[::stride].astype(np.uint64) < np.uint64(int(p * 2.0**32 + 0.5))).astype(dtype)


def normal(key, n, dtype=np.float32):
    """Box-Muller on neighbouring units."""
    u = _unit(_raw(key, n + n % 2, dtype)).reshape(-1, 2)
    radius = np.sqrt(_log(u[:, 0].copy()) * dtype(-2))
    sine, cosine = _sincos_turns(u[:, 1].copy())
    return np.stack([radius * cosine, radius * sine], 1).reshape(-1)[:n]


def exponential(key, n, dtype=np.float32):
    w, reflected = _half_unit(_raw(key, n, dtype))
    return np.where(reflected, _minus_log_complement(w), -_log(w))


def gumbel(key, n, dtype=np.float32):
    return -_log(exponential(key, n, dtype))


def logistic(key, n, dtype=np.float32):
    w, reflected = _half_unit(_raw(key, n, dtype))
    x = _log(w) + _minus_log_complement(w)
    return np.where(reflected, -x, x)


def truncated_normal(key, n, low=-2.0, high=2.0):
    """float32 alone: the quantile of AS 241 (Wichura, 1988) at a uniform probability."""
    a, b = (math.erf(x / math.sqrt(2)) for x in (low, high))
    one = np.float32
    q = (uniform(key, n) * one(b - a) + one(a)) * one(0.5)
    r, x = np.sqrt(-_log(one(0.5) - np.abs(q))) - one(1.6), one(0.180625) - q * q
    middle = _polynomial(x, 3.3871327179, 50.434271938, 159.29113202, 59.109374720)
    middle = middle / _polynomial(x, 1.0, 17.895169469, 78.757757664, 67.187563600) * q
    outside = _polynomial(r, 1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103)
    outside = np.copysign(outside / _polynomial(r, 1.0, 0.73700164250, 0.12021132975), q)
    return np.clip(np.where(np.abs(q) <= one(0.425), middle, outside), one(low), one(high))
