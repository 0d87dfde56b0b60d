// a sigmoid(a) (SiLU, Swish) and its derivative.
#pragma once
#include "lanes.h"

namespace gk {

// Below the bound both are those of the bound, next to nothing; from there on e^-a is an ordinary number.
GK_FN float silu_bounded(float a) { return a < -87 ? -87 : a; }
GK_FN double silu_bounded(double a) { return a < -700 ? -700 : a; }
GK_FN float logistic(float a) { return 1 / (1 + exp(-a)); }
GK_FN double logistic(double a) { return 1 / (1 + exp(-a)); }
#ifndef __CUDACC__
GK_FN lane_f32 silu_bounded(lane_f32 a) { return not_below(a, -87); }
GK_FN lane_f32 logistic(lane_f32 a) {  // in few instructions, since around SiLU they take about as long as the memory does
  const lane_f32 magic = splat<lane_f32>(12582912.0);  // the last bits of n + magic are n
  a = not_above(a, 87);
  const lane_f32 shifted = fma(a, splat<lane_f32>(-1.44269504), magic), n = shifted - magic;
  const lane_f32 r = kLanes > 4
                         ? fma(n, splat<lane_f32>(-0.693147180559945), -a)  // of one rounding; where fma has two, in two parts
                         : fma(n, splat<lane_f32>(-1.4286068203e-6), fma(n, splat<lane_f32>(-0.693145751953125), -a));
  const lane_f32 e = (lane_f32)((lane_i32)exp_polynomial(r) + ((lane_i32)shifted << 23));  // times 2^n
  return divide(splat<lane_f32>(1), e + 1.0f);
}
#endif

template <class V>
GK_FN V silu(V a) {
  a = silu_bounded(a);
  return a * logistic(a);
}
template <class V>
GK_FN V silu_derivative(V a) {
  a = silu_bounded(a);
  const V s = logistic(a);
  return s * fma(a, 1.0f - s, splat<V>(1));
}

}  // namespace gk
