"""Draws from the keyed random stream: formulas in torch, and the ops that fill a tensor on every backend.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). Element e of a float32, bfloat16 or half tensor
takes word e % 4 of counter offset + e // 4; element e of a float64 tensor takes words 2 (e % 2) and 2 (e % 2) + 1 of counter
offset + e // 2. Everything is plain multiplications, additions, divisions and square roots, each correctly rounded, so that
csrc/include/philox.h and the Triton kernels give the same bits. The public functions are in genkern.random.
"""

import torch

from genkern.core import Op

_MASK = 0xFFFFFFFF
STREAM_VERSION = 1  # the stream is a contract: it does not change within a major version


# ---- words


def words(key, counters):
    """The four 32-bit words (int64, 0 <= word < 2^32) of each counter.

    key (..., 2) int64, counters (n,) int64 added to its offset -> (..., n, 4). Products wrap modulo 2^64, so the bits are right.
    """
    seed, offset = key[..., 0:1], key[..., 1:2]
    counter = offset + counters
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return torch.stack([c0, c1, c2, c3], -1)


# ---- exactly rounded pieces, in float32 or float64


def _horner(x, *coefficients):
    result = torch.full_like(x, coefficients[-1])
    for c in coefficients[-2::-1]:
        result = result * x + c
    return result


def _log(x):
    """Natural logarithm of a positive normal number x = 2^n m, m in [3/4, 3/2)."""
    mantissa, exponent = torch.frexp(x)  # mantissa in [1/2, 1), both exact
    low = mantissa < 0.75
    n, f = (exponent - low.to(exponent.dtype)).to(x.dtype), torch.where(low, mantissa * 2.0, mantissa) - 1.0
    if x.dtype == torch.float32:
        z = f * f
        y = _horner(f, 0.3333334, -0.25000164, 0.19999579, -0.16655323, 0.14276786, -0.12728232, 0.11697098, -0.091079414,
                    0.03762157) * f * z  # fmt: skip
        y = n * 1.4286068203e-6 + y
        y = z * -0.5 + y
        return n * 0.693145751953125 + (f + y)
    s = f / (f + 2.0)
    z = s * s
    p = _horner(z, 0.6666666666666666, 0.4000000000000794, 0.2857142856727593, 0.2222222304835181, 0.18181737626289324,
                0.1538886780605847, 0.13209708234660042, 0.13609030312095335) * z  # fmt: skip
    y = n * 1.90821492927058770e-10 - s * (f - p)
    return n * 6.93147180369123816490e-01 + (f + y)


def _sincos_turns(turns):
    """sin and cos of 2 pi turns, 0 <= turns <= 1."""
    quarter = torch.round(turns * 4.0)  # ties to even
    x = (turns - quarter * 0.25) * 6.283185307179586
    z = x * x
    if x.dtype == torch.float32:
        s = _horner(z, -0.16666655, 0.008332189, -0.00019518292) * z * x + x
        c = _horner(z, 0.041666646, -0.001388731, 2.4432327e-05) * z * z + (z * -0.5 + 1.0)
    else:
        s = _horner(z, -0.16666666666666666, 0.008333333333330936, -0.00019841269836740532, 2.7557316093198383e-06,
                    -2.505112989644632e-08, 1.5917988979169704e-10) * z * x + x  # fmt: skip
        c = _horner(z, 0.041666666666666664, -0.0013888888888887389, 2.480158729875436e-05, -2.755731726586314e-07,
                    2.0876145046994267e-09, -1.1382544502902206e-11) * z * z + (z * -0.5 + 1.0)  # fmt: skip
    k = quarter.to(torch.int32)
    sine, cosine = torch.where(k & 1 != 0, c, s), torch.where(k & 1 != 0, s, c)
    return torch.where(k & 2 != 0, -sine, sine), torch.where((k + 1) & 2 != 0, -cosine, cosine)


def _sqrt(x):
    return x.double().sqrt().to(x.dtype)  # torch's float32 square root is not correctly rounded on every CPU


def _minus_log_complement(w):
    """-ln(1 - w) for 0 < w <= 1/2, with what rounding 1 - w lost added back."""
    u = 1.0 - w
    return (w - (1.0 - u)) - _log(u)


def normal_quantile(y):
    """x with P(|n| <= |x|) = |y| and the sign of y, for a standard normal n and -1 < y < 1 (to 4e-7 max(1, |x|); float64 1e-15).

    Wichura, "Algorithm AS 241: the percentage points of the normal distribution", 1988: its rational functions of 7 and 16 digits.
    """
    q = y * 0.5
    tail = 0.5 - q.abs()
    r = _sqrt(-_log(torch.where(tail > 0, tail, torch.full_like(tail, torch.finfo(tail.dtype).tiny))))
    centre, near, far = _QUANTILES[y.dtype]
    middle = _ratio(0.180625 - q * q, *centre) * q
    outside = torch.where(r <= 5.0, _ratio(r - 1.6, *near), _ratio(r - 5.0, *far))
    return torch.where(q.abs() <= 0.425, middle, torch.where(q < 0, -outside, outside))


def _ratio(x, above, below):
    return _horner(x, *above) / _horner(x, 1.0, *below)


_QUANTILES = {  # (numerator, denominator less its leading one) for |q| <= 0.425, r <= 5 and r > 5
    torch.float32: (
        ((3.3871327179, 50.434271938, 159.29113202, 59.109374720), (17.895169469, 78.757757664, 67.187563600)),
        ((1.4234372777, 2.7568153900, 1.3067284816, 0.17023821103), (0.73700164250, 0.12021132975)),
        ((6.6579051150, 3.0812263860, 0.42868294337, 0.017337203997), (0.24197894225, 0.012258202635)),
    ),
    torch.float64: (
        (
            (3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427, 13731.693765509461125, 45921.953931549871457,
             67265.770927008700853, 33430.575583588128105, 2509.0809287301226727),
            (42.313330701600911252, 687.18700749205790830, 5394.1960214247511077, 21213.794301586595867, 39307.895800092710610,
             28729.085735721942674, 5226.4952788528545610),
        ),
        (
            (1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550, 3.64784832476320460504, 1.27045825245236838258,
             0.241780725177450611770, 0.0227238449892691845833, 7.74545014278341407640e-4),
            (2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550, 0.148103976427480074590,
             0.0151986665636164571966, 5.47593808499534494600e-4, 1.05075007164441684324e-9),
        ),
        (
            (6.65790464350110377720, 5.46378491116411436990, 1.78482653991729133580, 0.296560571828504891230,
             0.0265321895265761230930, 1.24266094738807843860e-3, 2.71155556874348757815e-5, 2.01033439929228813265e-7),
            (0.599832206555887937690, 0.136929880922735805310, 0.0148753612908506148525, 7.86869131145613259100e-4,
             1.84631831751005468180e-5, 1.42151175831644588870e-7, 2.04426310338993978564e-15),
        ),
    ),
}  # fmt: skip


# ---- units: what one value is made of, (..., n) from words (..., counters, 4)


def _unit(r):
    """Words as numbers in (0, 1]: float32 from one word (r 2^-32 + 2^-33), float64 from a pair."""
    if r.shape[-1] == 1:
        return r[..., 0].to(torch.float32) * 2.0**-32 + 2.0**-33
    return r[..., 0].to(torch.float64) * 2.0**-32 + (r[..., 1].to(torch.float64) * 2.0**-64 + 2.0**-65)


def _half_unit(r):
    """min(u, 1 - u) of a uniform u, fine near zero, and whether it is the 1 - u."""
    reflected = r[..., 0] >= 0x80000000
    return _unit(torch.where(reflected.unsqueeze(-1), _MASK - r, r)), reflected


# ---- distributions: words (..., counters, 4) seen as (..., n, 1) or, for float64, (..., n, 2) -> values (..., n)


def _normal(r):
    """Box-Muller: sqrt(-2 ln u1) (cos, sin)(2 pi u2) of neighbouring units."""
    u = _unit(r).unflatten(-1, (-1, 2))
    radius = _sqrt(_log(u[..., 0]) * -2.0)
    sine, cosine = _sincos_turns(u[..., 1])
    return torch.stack([radius * cosine, radius * sine], -1).flatten(-2)


def _exponential(r):
    w, reflected = _half_unit(r)
    return torch.where(reflected, _minus_log_complement(w), -_log(w))


def _gumbel(r):
    return -_log(_exponential(r))


def _logistic(r):
    w, reflected = _half_unit(r)
    x = _log(w) + _minus_log_complement(w)
    return torch.where(reflected, -x, x)


def _uniform(r, dtype):
    if dtype == torch.float64:
        return ((r[..., 0] << 32 | r[..., 1]) & (2**53 - 1)).to(dtype) * 2.0**-53
    digits = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}[dtype]
    return (r[..., 0] & (2**digits - 1)).to(torch.float32) * 2.0**-digits


def _bits(r, dtype):
    if dtype == torch.int64:
        return r[..., 0] << 32 | r[..., 1]
    return (r[..., 0] - ((r[..., 0] & 0x80000000) << 1)).to(torch.int32)


def _bernoulli(r, p):
    below = int(p * 2.0**32 + 0.5)
    return r[..., 0] < below


def draw(distribution, key, shape, dtype, a=1.0, b=0.0):
    """Values of a distribution as a new tensor of `shape` on the key's device, in plain torch; key (2,) or (shape[0], 2)."""
    count = shape.numel() if key.dim() == 1 else torch.Size(shape[1:]).numel()
    per_counter = 2 if dtype in (torch.float64, torch.int64) else 4
    counters = torch.arange((count + per_counter - 1) // per_counter, device=key.device)
    r = words(key, counters).flatten(-2).unflatten(-1, (-1, 4 // per_counter))
    if distribution == "bits":
        values = _bits(r, dtype)
    elif distribution == "bernoulli":
        values = _bernoulli(r, a)
    else:
        values = _uniform(r, dtype) if distribution == "uniform" else _DISTRIBUTIONS[distribution](r)
        values = values * a + b
    return values[..., :count].reshape(shape).to(dtype)


_DISTRIBUTIONS = {"normal": _normal, "exponential": _exponential, "gumbel": _gumbel, "logistic": _logistic}


def _fill(distribution):
    def reference(key, out, a, b):
        values = draw(distribution, key.to("cpu" if out.device.type not in ("cpu", "cuda") else out.device), out.shape, out.dtype, a, b)
        out.copy_(values)

    return reference


# Each fills `out` (contiguous) with value * a + b; bits ignores them, bernoulli takes a = p.
FILL = {
    name: Op(
        f"random_{name}",
        "(Tensor key, Tensor(a!) out, float a, float b) -> ()",
        reference=_fill(name),
        fake=lambda key, out, a, b: None,
        device_of=1,
    )
    for name in ("bits", "uniform", "normal", "bernoulli", "exponential", "gumbel", "logistic")
}
