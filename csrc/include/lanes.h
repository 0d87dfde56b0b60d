// Lanes: the number types kernels are written in, and their elementary functions.
//
// A functor takes lanes of type V and says the formula once. V is
//   lane_f32        kLanes floats side by side (GCC/Clang vector extensions), the CPU's float arithmetic;
//   float, double   one number: CUDA's arithmetic, and double on the CPU.
// Operators, comparisons and `condition ? a : b` work on every V; what does not is spelled here. Files of ops name no intrinsic.
// Compiled with -ffp-contract=off and -fmad=false: a fused multiply-add happens only where fma() is written.
#pragma once
#include <stdint.h>
#include <string.h>

#include <cmath>

#ifdef __CUDACC__
#define GK_FN __host__ __device__ __forceinline__
#else
#define GK_FN inline __attribute__((always_inline))
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__AVX512F__)
#define GK_LANES 16
#elif defined(__AVX2__)
#define GK_LANES 8
#else
#define GK_LANES 4
#endif
#endif

namespace gk {

// ---- types: Lane<V> names the scalar, the integers of the same width, and how many numbers one V holds

template <class V>
struct Lane;
template <>
struct Lane<float> {
  using Scalar = float;
  using Int = int32_t;
  using Uint = uint32_t;
  static constexpr int kCount = 1;
};
template <>
struct Lane<double> {
  using Scalar = double;
  using Int = int64_t;
  using Uint = uint64_t;
  static constexpr int kCount = 1;
};

#ifndef __CUDACC__
constexpr int kLanes = GK_LANES;
typedef float lane_f32 __attribute__((vector_size(4 * GK_LANES)));
typedef int32_t lane_i32 __attribute__((vector_size(4 * GK_LANES)));
typedef uint32_t lane_u32 __attribute__((vector_size(4 * GK_LANES)));
typedef uint64_t lane_u64 __attribute__((vector_size(4 * GK_LANES)));  // kLanes / 2 words
template <>
struct Lane<lane_f32> {
  using Scalar = float;
  using Int = lane_i32;
  using Uint = lane_u32;
  static constexpr int kCount = kLanes;
};
#endif

template <class V>
using Scalar = typename Lane<V>::Scalar;

// ---- constants, bits, conversions

template <class V>
GK_FN V splat(double x) {
  if constexpr (Lane<V>::kCount == 1)
    return static_cast<V>(x);
  else
    return static_cast<Scalar<V>>(x) - V{};
}
template <class To, class From>
GK_FN To bitcast(From x) {
  static_assert(sizeof(To) == sizeof(From), "bitcast keeps the width");
  To to;
  memcpy(&to, &x, sizeof(To));
  return to;
}
template <class V>
GK_FN V to_float(typename Lane<V>::Int x) {
  if constexpr (Lane<V>::kCount == 1) return static_cast<V>(x);
#ifndef __CUDACC__
  else
    return __builtin_convertvector(x, V);
#endif
}
template <class V>
GK_FN typename Lane<V>::Int to_int(V x) {  // truncates
  if constexpr (Lane<V>::kCount == 1) return static_cast<typename Lane<V>::Int>(x);
#ifndef __CUDACC__
  else
    return __builtin_convertvector(x, typename Lane<V>::Int);
#endif
}

GK_FN float bfloat16_to_float(uint16_t x) { return bitcast<float>(static_cast<uint32_t>(x) << 16); }
GK_FN uint16_t float_to_bfloat16(float x) {  // nearest, ties to even; NaN stays NaN
  const uint32_t bits = bitcast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// ---- fused multiply-add, square root: the two that need the machine's own instruction

GK_FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
GK_FN double fma(double a, double b, double c) { return ::fma(a, b, c); }
GK_FN float sqrt(float x) { return ::sqrtf(x); }
GK_FN double sqrt(double x) { return ::sqrt(x); }
#ifndef __CUDACC__
GK_FN lane_f32 fma(lane_f32 a, lane_f32 b, lane_f32 c) {
#if defined(__AVX512F__)
  return (lane_f32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (lane_f32)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;  // baseline x86-64 has no such instruction
#endif
}
GK_FN lane_f32 sqrt(lane_f32 x) {
#if defined(__AVX512F__)
  return (lane_f32)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
  return (lane_f32)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (lane_f32)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; i++) x[i] = ::sqrtf(x[i]);
  return x;
#endif
}
#endif

// -|x|, and the greater, the smaller of x and a bound, each in one instruction; all keep NaN.
GK_FN float minus_magnitude(float x) { return -::fabsf(x); }
GK_FN double minus_magnitude(double x) { return -::fabs(x); }
GK_FN float not_below(float x, float low) { return x < low ? low : x; }
GK_FN double not_below(double x, double low) { return x < low ? low : x; }
#ifndef __CUDACC__
GK_FN lane_f32 minus_magnitude(lane_f32 x) { return bitcast<lane_f32>(bitcast<lane_u32>(x) | 0x80000000u); }
GK_FN lane_f32 not_below(lane_f32 x, float low) {
#if defined(__AVX512F__)
  return (lane_f32)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);  // the second operand where one is NaN
#else
  return x < low ? splat<lane_f32>(low) : x;
#endif
}
GK_FN lane_f32 not_above(lane_f32 x, float high) {
#if defined(__AVX512F__)
  return (lane_f32)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#else
  return x > high ? splat<lane_f32>(high) : x;
#endif
}
#endif

// a / b for finite b, rounded almost always as the division would be; the machine's division of 16 lanes takes as long as ten
// products.
GK_FN float divide(float a, float b) { return a / b; }
GK_FN double divide(double a, double b) { return a / b; }
#ifndef __CUDACC__
GK_FN lane_f32 divide(lane_f32 a, lane_f32 b) {
#if defined(__AVX512F__)
  const lane_f32 r = (lane_f32)_mm512_maskz_rcp14_ps(0xffff, (__m512)b), q = a * r;
  return fma(fma(-q, b, a), r, q);
#else
  return a / b;
#endif
}
#endif

// ---- polynomials, lowest degree first

template <class V>
GK_FN V horner(V, double c) {
  return splat<V>(c);
}
template <class V, class... Rest>
GK_FN V horner(V x, double c, Rest... rest) {  // plain multiply and add: the same bits everywhere
  return horner(x, rest...) * x + splat<V>(c);
}
template <class V>
GK_FN V horner_fma(V, double c) {
  return splat<V>(c);
}
template <class V, class... Rest>
GK_FN V horner_fma(V x, double c, Rest... rest) {
  return fma(horner_fma(x, rest...), x, splat<V>(c));
}

// ---- elementary functions: about 1e-7 relative in float; exp overflows to infinity, underflows to zero, keeps NaN

constexpr float kSmallExponent = 0.34657359f;  // ln(2) / 2: below it e^x needs no scaling by a power of two

template <class V>
GK_FN V exp_tail_polynomial(V x) {  // (e^x - 1 - x) / x^2 for |x| <= ln(2) / 2
  if constexpr (sizeof(Scalar<V>) == 4)
    return horner_fma(x, 0.5, 0.16666666, 0.041666463, 0.008333571, 0.0013935097, 0.00019739558);
  else
    return horner_fma(x, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800,
                      1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800.0);
}

GK_FN float exp(float x) { return ::expf(x); }
GK_FN double exp(double x) { return ::exp(x); }
GK_FN float exp_of_negative(float x) { return ::expf(x); }  // of numbers up to 0
GK_FN double exp_of_negative(double x) { return ::exp(x); }
#ifndef __CUDACC__
GK_FN lane_f32 exp_polynomial(lane_f32 x) {  // e^x for |x| <= ln(2) / 2, to 4e-9 before rounding
  return horner_fma(x, 1.0, 1.0, 0.499999934, 0.166665206, 0.041668388, 0.00836871689, 0.00138145985);
}
GK_FN lane_f32 exp_within(lane_f32 x) {                // -104 <= x <= 89: beyond, e^x is zero or infinity
  const lane_f32 magic = splat<lane_f32>(12582912.0);  // adding it rounds to an integer, ties to even
  const lane_f32 n = fma(x, splat<lane_f32>(1.44269504), magic) - magic;
  const lane_f32 r = fma(n, splat<lane_f32>(-1.4286068203e-6), fma(n, splat<lane_f32>(-0.693145751953125), x));
  const lane_f32 p = exp_polynomial(r);
#if defined(__AVX512F__)
  return (lane_f32)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const lane_i32 k = to_int(n), half = k >> 1;  // 2^k in two factors, so that subnormal results and overflow come out right
  return p * (lane_f32)((half + 127) << 23) * (lane_f32)((k - half + 127) << 23);
#endif
}
GK_FN lane_f32 exp(lane_f32 x) { return exp_within(not_above(not_below(x, -104), 89)); }
GK_FN lane_f32 exp_of_negative(lane_f32 x) { return exp_within(not_below(x, -104)); }
#endif

// e^x - 1 - x and e^x - 1 without cancellation near zero, from x and e^x.
template <class V>
GK_FN V expm1_tail(V x, V exp_x) {
  const V near = exp_tail_polynomial(x) * x * x, far = (exp_x - 1) - x;
  return (x < kSmallExponent && x > -kSmallExponent) ? near : far;
}
template <class V>
GK_FN V expm1(V x, V exp_x) {
  const V near = fma(exp_tail_polynomial(x), x * x, x), far = exp_x - 1;
  return (x < kSmallExponent && x > -kSmallExponent) ? near : far;
}
template <class V>
GK_FN V tanh(V x) {
  x = x > 20 ? splat<V>(20) : x;
  x = x < -20 ? splat<V>(-20) : x;
  const V e = expm1(x + x, exp(x + x));
  return e / (e + 2);
}

GK_FN float log(float x) { return ::logf(x); }
GK_FN double log(double x) { return ::log(x); }
GK_FN float log1p(float x) { return ::log1pf(x); }
GK_FN double log1p(double x) { return ::log1p(x); }
#ifndef __CUDACC__
GK_FN lane_f32 log(lane_f32 x) {  // x = 2^n m, m in [3/4, 3/2); log 0 is -infinity, of negative numbers NaN
  const lane_i32 tiny = x < 0x1p-126f;
  const lane_f32 scaled = tiny ? x * 0x1p23f : x;
  const lane_i32 bits = bitcast<lane_i32>(scaled), exponent = (bits - 0x3f400000) >> 23;
  const lane_f32 n = to_float<lane_f32>(exponent) - (tiny ? splat<lane_f32>(23) : lane_f32{});
  const lane_f32 f = bitcast<lane_f32>((lane_u32)bits - ((lane_u32)exponent << 23)) - 1.0f, z = f * f;
  lane_f32 y = horner_fma(f, 0.3333334, -0.25000164, 0.19999579, -0.16655323, 0.14276786, -0.12728232, 0.11697098, -0.091079414,
                          0.03762157) *
               f * z;
  y = fma(n, splat<lane_f32>(1.4286068203e-6), y);
  y = fma(z, splat<lane_f32>(-0.5), y);
  y = fma(n, splat<lane_f32>(0.693145751953125), f + y);
  y = x < __builtin_inff() ? y : x;  // keeps infinity and NaN
  y = x == 0.0f ? splat<lane_f32>(-__builtin_inff()) : y;
  return x < 0.0f ? splat<lane_f32>(__builtin_nanf("")) : y;
}
GK_FN lane_f32 log1p(lane_f32 x) {  // ln u + what rounding u = 1 + x lost, relative to u
  const lane_f32 u = x + 1.0f, y = log(u) + (x - (u - 1.0f)) / u;
  return x > -1.0f && x < __builtin_inff() ? y : log(u);
}
#endif

template <class V>
GK_FN V sigmoid(V x) {
  const V e = exp_of_negative(minus_magnitude(x));  // at most 1, so the quotient is of ordinary numbers
  return divide(x < 0 ? e : splat<V>(1), e + 1.0f);
}
// ln(1 + t) for 0 <= t <= 1: 2 atanh(t / (2 + t)).
GK_FN float log1p_of_unit(float t) { return log1p(t); }
GK_FN double log1p_of_unit(double t) { return log1p(t); }
#ifndef __CUDACC__
GK_FN lane_f32 log1p_of_unit(lane_f32 t) {
  const lane_f32 s = divide(t, t + 2.0f), not_tiny = s < 1e-15f ? splat<lane_f32>(1e-15) : s;  // subnormal squares would be slow
  const lane_f32 z = not_tiny * not_tiny;
  return fma(horner_fma(z, 0.66666317, 0.40024918, 0.27960467, 0.28179035) * z, s, s + s);
}
#endif
template <class V>
GK_FN V softplus(V x) {  // ln(1 + e^x); ln sigmoid(x) = -softplus(-x)
  return not_below(x, 0) + log1p_of_unit(exp_of_negative(minus_magnitude(x)));
}

// ---- memory (CPU): kCount numbers, or the first `count` of them with the rest zero

#ifndef __CUDACC__
template <class V>
GK_FN V load(const Scalar<V>* p) {
  V x;
  memcpy(&x, p, sizeof(V));
  return x;
}
template <class V>
GK_FN void store(Scalar<V>* p, V x) {
  memcpy(p, &x, sizeof(V));
}
// To an address that is a multiple of a vector's size, past the caches, which would read the place before it is written: for
// results larger than they are. streamed() before other threads may look.
GK_FN void stream(float* p, lane_f32 x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}
GK_FN void streamed() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}
GK_FN lane_i32 lane_indices() {
  lane_i32 index;
  for (int i = 0; i < kLanes; i++) index[i] = i;
  return index;
}
GK_FN bool any(lane_i32 condition) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)condition, (__m512i)condition) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes; i++) all |= condition[i];
  return all != 0;
#endif
}
GK_FN double load_first(const double* p, int count, double) { return count ? *p : 0.0; }
GK_FN void store_first(double* p, double x, int count) {
  if (count) *p = x;
}
GK_FN lane_f32 load_first(const float* p, int count, lane_f32) {
#if defined(__AVX512F__)
  return (lane_f32)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
#elif defined(__AVX2__)
  return (lane_f32)_mm256_maskload_ps(p, (__m256i)(lane_indices() < count));
#else
  lane_f32 x = {};
  for (int i = 0; i < count; i++) x[i] = p[i];
  return x;
#endif
}
GK_FN void store_first(float* p, lane_f32 x, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)(lane_indices() < count), (__m256)x);
#else
  for (int i = 0; i < count; i++) p[i] = x[i];
#endif
}
// Lanes begin ... begin + count - 1 of x from p + begin, the others as they are; the same lanes to p + begin.
GK_FN lane_f32 load_lanes(lane_f32 x, const float* p, int begin, int count) {
#if defined(__AVX512F__)
  return (lane_f32)_mm512_mask_loadu_ps((__m512)x, (__mmask16)(((1u << count) - 1) << begin), p);
#elif defined(__AVX2__)
  const lane_i32 index = lane_indices(), chosen = (index >= begin) & (index < begin + count);
  return chosen ? (lane_f32)_mm256_maskload_ps(p, (__m256i)chosen) : x;
#else
  for (int i = begin; i < begin + count; i++) x[i] = p[i];
  return x;
#endif
}
GK_FN void store_lanes(float* p, lane_f32 x, int begin, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)(((1u << count) - 1) << begin), (__m512)x);
#elif defined(__AVX2__)
  const lane_i32 index = lane_indices();
  _mm256_maskstore_ps(p, (__m256i)((index >= begin) & (index < begin + count)), (__m256)x);
#else
  for (int i = begin; i < begin + count; i++) p[i] = x[i];
#endif
}
GK_FN lane_f32 pick(lane_f32 x, lane_i32 index) {  // lane i gets x[index[i]]
#if defined(__AVX512F__)
  return (lane_f32)_mm512_permutexvar_ps((__m512i)index, (__m512)x);
#elif defined(__AVX2__)
  return (lane_f32)_mm256_permutevar8x32_ps((__m256)x, (__m256i)index);
#else
  lane_f32 y = {};
  for (int i = 0; i < kLanes; i++) y[i] = x[index[i] & (kLanes - 1)];
  return y;
#endif
}
GK_FN double sum_lanes(double x) { return x; }
GK_FN double sum_lanes(lane_f32 x) {  // fixed order
#if defined(__AVX512F__)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)),
                high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
#else
  double total = 0;
  for (int i = 0; i < kLanes; i++) total += static_cast<double>(x[i]);
  return total;
#endif
}
GK_FN lane_f32 keep_first(lane_f32 x, int count) {  // the others become zero
  return lane_indices() < count ? x : lane_f32{};
}
GK_FN double keep_first(double x, int count) { return count ? x : 0.0; }

// Four values of each of kLanes counters lie in x[0], ... x[3]; they become neighbours, counter after counter. Lane i holds counter
// counter_of_lane(i), in which order a transposition within 128 bits is all that is needed.
constexpr int counter_of_lane(int lane) { return lane % 4 * (kLanes / 4) + lane / 4; }
GK_FN void store_interleaved(float* out, const lane_f32 x[4]) {
#if defined(__AVX512F__)
  const __m512 p = _mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]), q = _mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]);
  const __m512 r = _mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]), t = _mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]);
  const __m512 g0 = (__m512)_mm512_unpacklo_pd((__m512d)p, (__m512d)r), g1 = (__m512)_mm512_unpackhi_pd((__m512d)p, (__m512d)r);
  const __m512 g2 = (__m512)_mm512_unpacklo_pd((__m512d)q, (__m512d)t), g3 = (__m512)_mm512_unpackhi_pd((__m512d)q, (__m512d)t);
  _mm512_storeu_ps(out, g0);
  _mm512_storeu_ps(out + 16, g1);
  _mm512_storeu_ps(out + 32, g2);
  _mm512_storeu_ps(out + 48, g3);
#elif defined(__AVX2__)
  const __m256 p = _mm256_unpacklo_ps((__m256)x[0], (__m256)x[1]), q = _mm256_unpackhi_ps((__m256)x[0], (__m256)x[1]);
  const __m256 r = _mm256_unpacklo_ps((__m256)x[2], (__m256)x[3]), t = _mm256_unpackhi_ps((__m256)x[2], (__m256)x[3]);
  const __m256 g0 = (__m256)_mm256_unpacklo_pd((__m256d)p, (__m256d)r), g1 = (__m256)_mm256_unpackhi_pd((__m256d)p, (__m256d)r);
  const __m256 g2 = (__m256)_mm256_unpacklo_pd((__m256d)q, (__m256d)t), g3 = (__m256)_mm256_unpackhi_pd((__m256d)q, (__m256d)t);
  _mm256_storeu_ps(out, g0);
  _mm256_storeu_ps(out + 8, g1);
  _mm256_storeu_ps(out + 16, g2);
  _mm256_storeu_ps(out + 24, g3);
#else
  for (int i = 0; i < kLanes; i++)
    for (int j = 0; j < 4; j++) out[4 * i + j] = x[j][i];
#endif
}
#endif

}  // namespace gk
