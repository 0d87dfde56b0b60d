// tanh(a) sigmoid(b), the gate of WaveNet and Gated PixelCNN.
#pragma once
#include "lanes.h"

namespace gk {

template <class V>
GK_FN V gate(V a, V b) {
  return tanh(a) * sigmoid(b);
}

#ifndef __CUDACC__
struct ExpParts {  // e^x = power (1 + tail) for x <= 0; at least e^-87
  lane_f32 power, tail;
};
GK_FN ExpParts exp_parts(lane_f32 x) {
  const lane_f32 magic = splat<lane_f32>(12582912.0);
  x = not_below(x, -87);
  const lane_f32 near = fma(x, splat<lane_f32>(1.44269504), magic), n = near - magic;  // an integer, also in the last bits of near
  const lane_f32 r = fma(n, splat<lane_f32>(-1.4286068203e-6), fma(n, splat<lane_f32>(-0.693145751953125), x));
  return {bitcast<lane_f32>((bitcast<lane_u32>(near) << 23) + 0x3f800000u), fma(exp_tail_polynomial(r), r * r, r)};
}
// With u = e^-2|a| and s = e^-|b|: (1 - u) / (1 + u) times s or 1 over 1 + s, in one division of ordinary numbers.
GK_FN lane_f32 gate(lane_f32 a, lane_f32 b) {
  const ExpParts u = exp_parts(minus_magnitude(a + a)), s = exp_parts(minus_magnitude(b));
  const lane_f32 u_minus_1 = fma(u.power, u.tail, u.power - 1.0f), whole = fma(s.power, s.tail, s.power);
  const lane_f32 top = (b < 0 ? whole : splat<lane_f32>(1)) * u_minus_1,
                 quotient = divide(top, (u_minus_1 + 2.0f) * (whole + 1.0f));
  return bitcast<lane_f32>(bitcast<lane_u32>(quotient) ^ (~bitcast<lane_u32>(a) & 0x80000000u));  // it is negative, or zero
}
#endif

}  // namespace gk
