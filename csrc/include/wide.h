// Double where a float would lose the digits: Wide<V> holds as many doubles as V has floats.
#pragma once
#include <utility>

#include "lanes.h"

namespace gk {

template <class V>
struct WideOf {
  using type = double;
};
template <class V>
using Wide = typename WideOf<V>::type;

GK_FN double widen(float x) { return x; }
GK_FN double widen(double x) { return x; }
template <class V>
GK_FN V narrow(double x) {
  return static_cast<V>(x);
}
template <class T>
GK_FN T at_least(T a, T b, T yes, T no) {  // a >= b ? yes : no
  return a >= b ? yes : no;
}

GK_FN double exp_between(double x) { return exp(x); }
#ifndef __CUDACC__
typedef double half_f64 __attribute__((vector_size(4 * GK_LANES)));
typedef uint64_t half_u64 __attribute__((vector_size(4 * GK_LANES)));
typedef float half_f32 __attribute__((vector_size(2 * GK_LANES)));
struct lane_f64 {  // two native vectors: compilers take one of twice the width apart number by number
  half_f64 a, b;
};
template <>
struct WideOf<lane_f32> {
  using type = lane_f64;
};
#define GK_WIDE_OPERATOR(op)                                                                            \
  GK_FN lane_f64 operator op(const lane_f64& x, const lane_f64& y) { return {x.a op y.a, x.b op y.b}; } \
  GK_FN lane_f64 operator op(const lane_f64& x, double y) { return {x.a op y, x.b op y}; }              \
  GK_FN lane_f64 operator op(double x, const lane_f64& y) { return {x op y.a, x op y.b}; }
GK_WIDE_OPERATOR(+)
GK_WIDE_OPERATOR(-)
GK_WIDE_OPERATOR(*)
GK_WIDE_OPERATOR(/)
#undef GK_WIDE_OPERATOR
GK_FN half_f64 fma(half_f64 a, half_f64 b, half_f64 c) {
#if defined(__AVX512F__)
  return (half_f64)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  return (half_f64)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}
GK_FN half_f64 sqrt(half_f64 x) {
#if defined(__AVX512F__)
  return (half_f64)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (half_f64)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < kLanes / 2; i++) x[i] = ::sqrt(x[i]);
  return x;
#endif
}
GK_FN lane_f64 sqrt(const lane_f64& x) { return {sqrt(x.a), sqrt(x.b)}; }
GK_FN lane_f64 at_least(const lane_f64& a, const lane_f64& b, const lane_f64& yes, const lane_f64& no) {
  return {at_least(a.a, b.a, yes.a, no.a), at_least(a.b, b.b, yes.b, no.b)};
}
template <size_t... i>
GK_FN lane_f64 widen(lane_f32 x, std::index_sequence<i...>) {  // by shuffles: through memory the halves would wait for each other
  return {__builtin_convertvector(__builtin_shufflevector(x, x, i...), half_f64),
          __builtin_convertvector(__builtin_shufflevector(x, x, (kLanes / 2 + i)...), half_f64)};
}
GK_FN lane_f64 widen(lane_f32 x) { return widen(x, std::make_index_sequence<kLanes / 2>()); }
template <size_t... i>
GK_FN lane_f32 join(half_f32 a, half_f32 b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, i...);
}
template <class V>
GK_FN V narrow(const lane_f64& x) {
  const half_f32 a = __builtin_convertvector(x.a, half_f32), b = __builtin_convertvector(x.b, half_f32);
  return join(a, b, std::make_index_sequence<kLanes>());
}

// e^x for |x| <= 700: the digits a float has, and two more; keeps NaN.
GK_FN half_f64 exp_between(half_f64 x) {
  const half_f64 magic = half_f64{} + 6755399441055744.0;  // adding it rounds to an integer, left in the lowest bits
  const half_f64 log2_e = half_f64{} + 1.4426950408889634, t = fma(x, log2_e, magic), n = t - magic, f = fma(x, log2_e, -n);
  half_f64 p = half_f64{} + 0.00015345811121188828;
  for (const double c : {0.0013399931219209814, 0.009618488957436654, 0.055503287769655144, 0.2402264689063093, 0.693147205737269,
                         1.0000000005541683})
    p = fma(p, f, half_f64{} + c);
  return (half_f64)((half_u64)p + ((half_u64)t << 52));
}
GK_FN lane_f64 exp_between(const lane_f64& x) { return {exp_between(x.a), exp_between(x.b)}; }
#endif
template <class W>
GK_FN W wide_splat(double x) {
  return W{} + x;
}

}  // namespace gk
