// The random stream: Philox4x32-10 (Salmon et al., 2011) and the distributions made from its words.
//
// Element e of a float32, bfloat16 or half tensor takes word e % 4 of counter offset + e / 4; element e of a float64 tensor takes
// words 2 (e % 2) and 2 (e % 2) + 1 of counter offset + e / 2. A distribution is a functor from the four words of a counter to
// its four (float) or two (double) values; it uses only plain multiplication, addition, division, square root and integer
// operations, each correctly rounded, so its bits are the same on every backend. genkern/random.py holds the same formulas in
// torch.
#pragma once
#include "lanes.h"

namespace gk {

struct Key {
  uint64_t seed, offset;
};

// 32 x 32 -> 64 bit product of the low halves; the high halves of the arguments are ignored.
GK_FN uint64_t multiply_low_words(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>(static_cast<uint32_t>(a)) * static_cast<uint32_t>(b);
}
#ifndef __CUDACC__
GK_FN lane_u64 multiply_low_words(lane_u64 a, lane_u64 b) {
#if defined(__AVX512F__)
  return (lane_u64)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (lane_u64)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (lane_u64)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}
#endif

// Ten rounds on counters (low and high half of `counter`, 0, 0) held in 64-bit words W; only the low 32 bits of the results count.
template <class W>
GK_FN void philox(W counter, uint64_t seed, W c[4]) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const W m0 = 0xD2511F53ull - W{}, m1 = 0xCD9E8D57ull - W{}, first = multiply_low_words(m0, counter);
  c[0] = (counter >> 32) ^ static_cast<uint64_t>(k0), c[1] = W{};  // the first round, where one factor is zero
  c[2] = (first >> 32) ^ static_cast<uint64_t>(k1), c[3] = first;
  for (int round = 1; round < 10; round++) {
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    const W p0 = multiply_low_words(m0, c[0]), p1 = multiply_low_words(m1, c[2]);
    const W n0 = (p1 >> 32) ^ c[1] ^ static_cast<uint64_t>(k0), n2 = (p0 >> 32) ^ c[3] ^ static_cast<uint64_t>(k1);
    c[1] = p1, c[3] = p0, c[0] = n0, c[2] = n2;
  }
}

// The four words of counter key.offset + index. Float distributions take U = uint32_t.
GK_FN void philox_words(Key key, uint64_t index, uint32_t words[4]) {
  uint64_t c[4];
  philox(key.offset + index, key.seed, c);
  for (int j = 0; j < 4; j++) words[j] = static_cast<uint32_t>(c[j]);
}
#ifndef __CUDACC__
// The low words of a's lanes, each with that of b's lane beside it.
GK_FN lane_u32 low_words(lane_u64 a, lane_u64 b) {
#if defined(__AVX512F__)
  return (lane_u32)_mm512_mask_shuffle_epi32((__m512i)a, 0xaaaa, (__m512i)b, _MM_PERM_CCAA);
#else
  return (lane_u32)((a & 0xffffffffull) | (b << 32));
#endif
}
// Words of counters key.offset + index + counter_of_lane(0 ... kLanes - 1), one lane each.
GK_FN void philox_words(Key key, uint64_t index, lane_u32 words[4]) {
  lane_u64 even, a[4], b[4];
  for (int i = 0; i < kLanes / 2; i++) even[i] = static_cast<uint64_t>(counter_of_lane(2 * i));
  even = even + (key.offset + index);
  philox(even, key.seed, a);
  philox(even + static_cast<uint64_t>(kLanes / 4), key.seed, b);
  for (int j = 0; j < 4; j++) words[j] = low_words(a[j], b[j]);
}
#endif

// ---- pieces of the distributions

// Natural logarithm of a positive normal number: x = 2^n m with m in [3/4, 3/2).
template <class V>
GK_FN V exact_log(V x) {
  using Int = typename Lane<V>::Int;
  using Uint = typename Lane<V>::Uint;
  if constexpr (sizeof(Scalar<V>) == 4) {
    const Int bits = bitcast<Int>(x), exponent = (bits - 0x3f400000) >> 23;
    const V n = to_float<V>(exponent), f = bitcast<V>((Uint)bits - ((Uint)exponent << 23)) - 1.0f, z = f * f;
    V y =
        horner(f, 0.3333334, -0.25000164, 0.19999579, -0.16655323, 0.14276786, -0.12728232, 0.11697098, -0.091079414, 0.03762157) *
        f * z;
    y = n * 1.4286068203e-6f + y;
    y = z * -0.5f + y;
    return n * 0.693145751953125f + (f + y);
  } else {
    const Int bits = bitcast<Int>(x), exponent = (bits - 0x3fe8000000000000ll) >> 52;
    const V n = to_float<V>(exponent), f = bitcast<V>((Uint)bits - ((Uint)exponent << 52)) - 1.0;
    const V s = f / (f + 2.0), z = s * s;  // ln(1 + f) = 2 atanh(s) = f - s (f - z P(z))
    const V p = horner(z, 0.6666666666666666, 0.4000000000000794, 0.2857142856727593, 0.2222222304835181, 0.18181737626289324,
                       0.1538886780605847, 0.13209708234660042, 0.13609030312095335) *
                z;
    const V y = n * 1.90821492927058770e-10 - s * (f - p);
    return n * 6.93147180369123816490e-01 + (f + y);
  }
}

// sin and cos of 2 pi turns, 0 <= turns <= 1; the reduction to an eighth of a turn is exact.
template <class V>
GK_FN void sincos_turns(V turns, V* sine, V* cosine) {
  using Int = typename Lane<V>::Int;
  using Uint = typename Lane<V>::Uint;
  constexpr bool single = sizeof(Scalar<V>) == 4;
  const V magic = splat<V>(single ? 12582912.0 : 6755399441055744.0);  // adding it rounds to an integer, ties to even
  const V quarter = (turns * 4.0f + magic) - magic, r = turns - quarter * 0.25f, x = r * splat<V>(6.283185307179586), z = x * x;
  V s, c;
  if constexpr (single) {
    s = horner(z, -0.16666655, 0.008332189, -0.00019518292) * z * x + x;
    c = horner(z, 0.041666646, -0.001388731, 2.4432327e-05) * z * z + (z * -0.5f + 1.0f);
  } else {
    s = horner(z, -0.16666666666666666, 0.008333333333330936, -0.00019841269836740532, 2.7557316093198383e-06,
               -2.505112989644632e-08, 1.5917988979169704e-10) *
            z * x +
        x;
    c = horner(z, 0.041666666666666664, -0.0013888888888887389, 2.480158729875436e-05, -2.755731726586314e-07,
               2.0876145046994267e-09, -1.1382544502902206e-11) *
            z * z +
        (z * -0.5 + 1.0);
  }
  const Int k = to_int(quarter);
  const V a = (k & 1) != 0 ? c : s, b = (k & 1) != 0 ? s : c;
  constexpr int shift = single ? 30 : 62;  // bit 1 of k becomes the sign
  *sine = bitcast<V>(bitcast<Uint>(a) ^ (((Uint)k & 2) << shift));
  *cosine = bitcast<V>(bitcast<Uint>(b) ^ (((Uint)(k + 1) & 2) << shift));
}

// A word as a number in (0, 1]: r 2^-32 + 2^-33, rounded once; the product is exact.
GK_FN float to_unit(uint32_t r) { return static_cast<float>(r) * 0x1p-32f + 0x1p-33f; }
#ifndef __CUDACC__
GK_FN lane_f32 to_unit(lane_u32 r) {
#if defined(__AVX512F__)
  return __builtin_convertvector(r, lane_f32) * 0x1p-32f + 0x1p-33f;
#else  // high * 65536 is exact, so the sum is the one rounding of r to float
  const lane_f32 high = __builtin_convertvector((lane_i32)(r >> 16), lane_f32);
  const lane_f32 low = __builtin_convertvector((lane_i32)(r & 0xffff), lane_f32);
  return (high * 65536.0f + low) * 0x1p-32f + 0x1p-33f;
#endif
}
#endif
GK_FN double to_unit(uint32_t r, uint32_t low) { return r * 0x1p-32 + (low * 0x1p-64 + 0x1p-65); }

// -ln(1 - w) for 0 < w <= 1/2
template <class V>
GK_FN V minus_log_complement(V w) {
  const V u = 1.0f - w;
  return (w - (1.0f - u)) - exact_log(u);  // the first difference is what rounding 1 - w lost
}

template <class V>
using Mask = decltype(V{} < V{});

// min(u, 1 - u) of a uniform u, fine near zero; *reflected tells that it is 1 - u
template <class V, class U, class Mask>
GK_FN V half_unit(U r, Mask* reflected) {
  *reflected = r >= 0x80000000u;
  return to_unit((U)(r ^ -(r >> 31)));  // its complement where the sign is set
}
template <class V, class Mask>
GK_FN V half_unit(uint32_t high, uint32_t low, Mask* reflected) {
  *reflected = high >= 0x80000000u;
  return *reflected ? to_unit(~high, ~low) : to_unit(high, low);
}

// ---- distributions: operator()(words, values)

struct Normal {  // Box-Muller: sqrt(-2 ln u1) (cos, sin)(2 pi u2)
  template <class V>
  GK_FN void pair(V u1, V u2, V* out) const {
    V s, c;
    const V radius = sqrt(exact_log(u1) * -2.0f);
    sincos_turns(u2, &s, &c);
    out[0] = radius * c;
    out[1] = radius * s;
  }
  template <class U, class V>
  GK_FN void operator()(const U r[4], V* out) const {
    if constexpr (sizeof(Scalar<V>) == 4) {
      pair(to_unit(r[0]), to_unit(r[1]), out);
      pair(to_unit(r[2]), to_unit(r[3]), out + 2);
    } else {
      pair(to_unit(r[0], r[1]), to_unit(r[2], r[3]), out);
    }
  }
};

// Distributions that turn one unit of randomness into one value derive from this: value(r) in float, value(high, low) in double.
template <class Self>
struct PerElement {
  template <class U, class V>
  GK_FN void operator()(const U r[4], V* out) const {
    const Self& self = *static_cast<const Self*>(this);
    if constexpr (sizeof(Scalar<V>) == 4) {
      out[0] = self.template value<V>(r[0]);  // spelled out: of a loop GCC keeps a loop, with the lanes in memory
      out[1] = self.template value<V>(r[1]);
      out[2] = self.template value<V>(r[2]);
      out[3] = self.template value<V>(r[3]);
    } else {
      out[0] = self.template value<V>(r[0], r[1]);
      out[1] = self.template value<V>(r[2], r[3]);
    }
  }
};

struct Bits : PerElement<Bits> {  // the words themselves, carried in the bits of a float or a double
  template <class V, class U>
  GK_FN V value(U r) const {
    return bitcast<V>(r);
  }
  template <class V>
  GK_FN V value(uint32_t high, uint32_t low) const {
    return bitcast<V>(static_cast<uint64_t>(high) << 32 | low);
  }
};

struct Uniform : PerElement<Uniform> {  // [0, 1): the low `digits` bits, as many as the output type holds (24, 11, 8; double: 53)
  uint32_t mask = 0xffffff;
  float scale = 0x1p-24f;
  template <class V, class U>
  GK_FN V value(U r) const {
    return to_float<V>((typename Lane<V>::Int)(r & mask)) * scale;
  }
  template <class V>
  GK_FN V value(uint32_t high, uint32_t low) const {
    return static_cast<double>((static_cast<uint64_t>(high) << 32 | low) & 0x1fffffffffffffull) * 0x1p-53;
  }
};

struct Bernoulli : PerElement<Bernoulli> {  // 1 where the word is at most `last`, the word below p 2^32
  uint32_t last = 0;
  template <class V, class U>
  GK_FN V value(U r) const {
    return r <= last ? splat<V>(1) : V{};
  }
  template <class V>
  GK_FN V value(uint32_t high, uint32_t) const {
    return high <= last ? 1.0 : 0.0;
  }
};

struct Exponential : PerElement<Exponential> {  // -ln u, one logarithm for both ends
  template <class V, class... U>
  GK_FN V value(U... r) const {
    Mask<V> reflected;
    const V w = half_unit<V>(r..., &reflected), u = reflected ? 1.0f - w : w;
    const V lost = reflected ? w - (1.0f - u) : V{};
    return lost - exact_log(u);
  }
};

struct Gumbel : PerElement<Gumbel> {  // -ln(-ln u)
  template <class V, class... U>
  GK_FN V value(U... r) const {
    return -exact_log(Exponential().template value<V>(r...));
  }
};

struct Logistic : PerElement<Logistic> {  // ln(u / (1 - u)), odd around the middle word
  template <class V, class... U>
  GK_FN V value(U... r) const {
    Mask<V> reflected;
    const V w = half_unit<V>(r..., &reflected), x = exact_log(w) + minus_log_complement(w);
    return reflected ? -x : x;
  }
};

}  // namespace gk
