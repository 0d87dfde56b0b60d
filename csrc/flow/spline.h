// The monotonic rational-quadratic spline of one element, forward, inverse and their gradients (Durkan et al., 2019), on lanes.
//
// Inside bin k, with t = (x - left) / width, u = 1 - t, s = height / width and the slopes d0, d1 at its two knots:
//   v = (s t^2 + d0 t u) / D,  y = lower + height v,  D = s (t^2 + u^2) + (d0 + d1) t u,
//   dy/dx = s^2 N / D^2,       N = d1 t^2 + 2 s t u + d0 u^2.
// D and N are sums of positive terms. So is the discriminant of the inverse, q^2 + 4 s^2 v (1 - v) with q = d0 (1 - v) - d1 v.
#pragma once
#include "lanes.h"

namespace gk {

enum class Tails : int { kNone, kLinear, kCircular };

struct SplineShape {
  int bins;
  Tails tails;
  double bound, min_width, min_height, min_slope;
  GK_FN int slopes() const { return bins + (tails == Tails::kLinear ? -1 : tails == Tails::kNone ? 1 : 0); }
  GK_FN int slope_of_knot(int k) const {  // position of its parameter; -1: none, the slope is 1
    if (tails == Tails::kNone) return k;
    if (tails == Tails::kCircular) return k == bins ? 0 : k;
    return k == 0 || k == bins ? -1 : k - 1;
  }
};

// ---- double where a float would lose the digits that a narrow bin needs: as many doubles as V has floats

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
#ifndef __CUDACC__
typedef double half_f64 __attribute__((vector_size(4 * GK_LANES)));
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
GK_FN lane_f64 widen(lane_f32 x) {
  half_f32 half[2];
  memcpy(half, &x, sizeof(x));
  return {__builtin_convertvector(half[0], half_f64), __builtin_convertvector(half[1], half_f64)};
}
template <class V>
GK_FN V narrow(const lane_f64& x) {
  const half_f32 half[2] = {__builtin_convertvector(x.a, half_f32), __builtin_convertvector(x.b, half_f32)};
  V y;
  memcpy(&y, half, sizeof(y));
  return y;
}
#endif
template <class T>
GK_FN T select_negative(T q, T negative, T other) {
  return q < 0 ? negative : other;
}
#ifndef __CUDACC__
GK_FN lane_f64 select_negative(const lane_f64& q, const lane_f64& negative, const lane_f64& other) {
  return {select_negative(q.a, negative.a, other.a), select_negative(q.b, negative.b, other.b)};
}
#endif
template <class W>
GK_FN W clamp_unit(W t) {  // keeps NaN
  const W from_zero = select_negative(t, t * 0.0, t);
  return select_negative(1.0 - from_zero, t * 0.0 + 1.0, from_zero);
}
template <class V>
GK_FN Wide<V> wide_sqrt(Wide<V> x) {  // one Newton step from the narrow root
  const Wide<V> root = widen(sqrt(narrow<V>(x)));
  return (root + x / root) * 0.5;
}

template <class V>
struct Pair {  // high + low, low the smaller
  V high, low;
  GK_FN void add(const Pair& x) {
    const V sum = high + x.high, part = sum - high;
    low = low + ((high - (sum - part)) + (x.high - part)) + x.low;
    high = sum;
  }
  template <class Condition>
  GK_FN void take(Condition condition, const Pair& x) {
    high = condition ? x.high : high, low = condition ? x.low : low;
  }
  GK_FN Wide<V> wide() const { return widen(high) + widen(low); }
};

// e^(raw - top) for raw <= top, about 1e-8 relative where exp() has 1e-7; at least e^-80.
template <class V>
GK_FN Pair<V> exp_pair(V raw, V top) {
  V x = raw - top;
  if constexpr (sizeof(Scalar<V>) == 8) {
    return {exp(x), V{}};
  } else {
    const V part = x - raw;
    V lost = (raw - (x - part)) - (top + part);
    lost = x < -80.0f ? V{} : lost;
    x = x < -80.0f ? splat<V>(-80) : x;
    const V magic = splat<V>(12582912.0), n = (x * 1.44269504f + magic) - magic;  // an integer
    const V r0 = fma(n, splat<V>(-0.693145751953125), x), low_ln2 = splat<V>(-1.4286068203e-6), r = fma(n, low_ln2, r0);
    const V r_lost = fma(n, low_ln2, r0 - r) + lost, one_r = r + 1.0f;
    const V more = (r - (one_r - 1.0f)) + fma(r_lost, one_r, exp_tail_polynomial(r) * r * r);
    const V high = one_r + more, low = more - (high - one_r);
    const V scale = bitcast<V>((to_int(n == n ? n : V{}) + 127) << 23);
    return {high * scale, low * scale};
  }
}

// ---- where an element lies

// One axis, widths or heights: softmax of the parameters, and what belongs to the chosen bin.
template <class V>
struct Axis {
  V top, scale, smallest;  // size of a bin = smallest + weight * scale
  Pair<V> sum, walked;     // of the weights: all, and those of the bins walked so far
  Pair<V> below, weight;   // of the bins before the chosen one; of the chosen one
  Wide<V> start, size;     // of the chosen bin
  GK_FN void normalize(const SplineShape& shape, double min_size) {
    scale = splat<V>(2 * shape.bound * (1 - min_size * shape.bins)) / sum.high;
    smallest = splat<V>(2 * shape.bound * min_size);
    walked = below = weight = {V{}, V{}};
  }
  GK_FN V end(const SplineShape& shape, double min_size, int k) const {  // about where bin k begins
    return fma(walked.high, scale, splat<V>(2 * shape.bound * min_size * k - shape.bound));
  }
  GK_FN void place(const SplineShape& shape, double min_size, Wide<V> bin) {
    const Wide<V> unit = 2 * shape.bound * (1 - min_size * shape.bins) / sum.wide();
    start = below.wide() * unit + (bin * (2 * shape.bound * min_size) - shape.bound);
    size = weight.wide() * unit + 2 * shape.bound * min_size;
  }
  GK_FN Wide<V> fraction(V x) const {  // of the way through the chosen bin
    return clamp_unit((widen(x) - start) / size);
  }
  // Mean over the bins, by weight, of the gradients of their sizes: those of the chosen bin's start and size.
  GK_FN V mean(V to_start, V to_size) const { return (to_start * below.high + to_size * weight.high) / sum.high; }
};

template <class V>
struct Point {
  Axis<V> x, y;
  V bin, raw0, raw1;  // bin number; parameters of the slopes at its knots
  V d0, d1, s, t, u, v, n, d;
  V width, height, slope, out;  // out: y, or x of the inverse
};

// Raw gives the parameters: width(k), height(k), slope(k); weigh_x(k, top) = exp_pair(width(k), top) and weigh_y, which come first,
// and the same again as weight_x, weight_y.
template <class V, bool kInverse, class Raw>
GK_FN Point<V> locate(const SplineShape& shape, Raw& raw, V at) {
  using W = Wide<V>;
  Point<V> p;
  p.x.top = raw.width(0), p.y.top = raw.height(0);
  for (int k = 1; k < shape.bins; k++) {
    const V w = raw.width(k), h = raw.height(k);
    p.x.top = w > p.x.top ? w : p.x.top, p.y.top = h > p.y.top ? h : p.y.top;
  }
  p.x.sum = p.y.sum = {V{}, V{}};
  for (int k = 0; k < shape.bins; k++) p.x.sum.add(raw.weigh_x(k, p.x.top)), p.y.sum.add(raw.weigh_y(k, p.y.top));
  p.x.normalize(shape, shape.min_width), p.y.normalize(shape, shape.min_height);
  // The last bin that begins at or before the element: no search, no branch, never out of range.
  const auto knot = [&](int k) { return shape.slope_of_knot(k) < 0 ? V{} : raw.slope(shape.slope_of_knot(k)); };
  V after = knot(1);
  p.bin = V{}, p.raw0 = knot(0), p.raw1 = after;
  p.x.weight = raw.weight_x(0, p.x.top), p.y.weight = raw.weight_y(0, p.y.top);
  p.x.walked.add(p.x.weight), p.y.walked.add(p.y.weight);
  for (int k = 1; k < shape.bins; k++) {
    const V before = after;
    after = knot(k + 1);
    const Pair<V> w = raw.weight_x(k, p.x.top), h = raw.weight_y(k, p.y.top);
    const auto here = at >= (kInverse ? p.y.end(shape, shape.min_height, k) : p.x.end(shape, shape.min_width, k));
    p.x.below.take(here, p.x.walked), p.x.weight.take(here, w), p.y.below.take(here, p.y.walked), p.y.weight.take(here, h);
    p.bin = here ? splat<V>(k) : p.bin, p.raw0 = here ? before : p.raw0, p.raw1 = here ? after : p.raw1;
    p.x.walked.add(w), p.y.walked.add(h);
  }
  p.d0 = softplus(p.raw0) + splat<V>(shape.min_slope), p.d1 = softplus(p.raw1) + splat<V>(shape.min_slope);
  if (shape.tails == Tails::kLinear) {
    p.d0 = p.bin == 0 ? splat<V>(1) : p.d0;
    p.d1 = p.bin == splat<V>(shape.bins - 1) ? splat<V>(1) : p.d1;
  }
  p.x.place(shape, shape.min_width, widen(p.bin)), p.y.place(shape, shape.min_height, widen(p.bin));
  const W s = p.y.size / p.x.size, d0 = widen(p.d0), d1 = widen(p.d1);
  W t, u, v;
  if constexpr (kInverse) {
    v = p.y.fraction(at);
    const W rest = 1.0 - v, q = d0 * rest - d1 * v, product = s * s * v * rest * 4, root = wide_sqrt<V>(q * q + product);
    const W g = select_negative(q, product / (root - q), q + root), total = s * v * 2 + g;
    t = s * v * 2 / total, u = g / total;
  } else {
    t = p.x.fraction(at), u = 1.0 - t;
  }
  const W tu = t * u, tt = t * t, uu = u * u, n = d1 * tt + s * tu * 2 + d0 * uu, d = s * (tt + uu) + (d0 + d1) * tu;
  if constexpr (!kInverse) v = (s * tt + d0 * tu) / d;
  p.out = narrow<V>(kInverse ? p.x.start + t * p.x.size : p.y.start + v * p.y.size);
  p.slope = narrow<V>(s * s * n / (d * d));
  p.s = narrow<V>(s), p.t = narrow<V>(t), p.u = narrow<V>(u), p.v = narrow<V>(v), p.n = narrow<V>(n), p.d = narrow<V>(d);
  p.width = narrow<V>(p.x.size), p.height = narrow<V>(p.y.size);
  return p;
}

template <class V, bool kInverse, class Raw>
GK_FN void spline_forward(const SplineShape& shape, Raw& raw, V in, V* out, V* log_det) {
  const V bound = splat<V>(shape.bound), edge = splat<V>(shape.tails == Tails::kNone ? __builtin_nan("") : 0);
  const Point<V> p = locate<V, kInverse>(shape, raw, in);
  const V log_slope = log(p.slope);
  const auto inside = (in >= -bound) & (in <= bound), inner = (in > -bound) & (in < bound);
  *out = inside ? (inner ? p.out : in) : in + edge;  // both ends map to themselves exactly
  *log_det = inside ? (kInverse ? -log_slope : log_slope) : (in == in ? edge : in);
}

// Gradients of out and log_det to the input (returned) and the parameters: raw.put_x(k, gradient), put_y, put_slope.
template <class V, bool kInverse, class Raw>
GK_FN V spline_backward(const SplineShape& shape, Raw& raw, V in, V grad_out, V grad_log_det) {
  const V bound = splat<V>(shape.bound);
  const Point<V> p = locate<V, kInverse>(shape, raw, in);
  const V tu = p.t * p.u, tt = p.t * p.t, uu = p.u * p.u, turn = p.u - p.t;  // 1 - 2 t
  // Derivatives of log dy/dx at fixed t, and along t.
  const V l_d0 = uu / p.n - tu * 2 / p.d, l_d1 = tt / p.n - tu * 2 / p.d;
  const V l_s = 2 / p.s + tu * 2 / p.n - (tt + uu) * 2 / p.d;
  const V l_t = (p.d1 * p.t - p.d0 * p.u + p.s * turn) * 2 / p.n - (p.d0 + p.d1 - p.s * 2) * turn * 2 / p.d;
  V grad_in, to_y = grad_out, to_log = grad_log_det;  // gradients of y and log dy/dx as functions of x and the parameters
  if constexpr (kInverse) {                           // the implicit function theorem
    grad_in = (grad_out - grad_log_det * l_t / p.width) / p.slope;
    to_y = -grad_in, to_log = -grad_log_det;
  }
  const auto inside = (in >= -bound) & (in <= bound);
  to_y = inside ? to_y : V{}, to_log = inside ? to_log : V{};
  const V to_v = to_y * p.height, m = p.s * p.n / (p.d * p.d);
  const V to_t = kInverse ? (inside ? -grad_out * p.width : V{}) : to_v * m + to_log * l_t;  // inverse: what l_t adds cancels
  const V to_s = to_v * tu * (tt * p.d1 - uu * p.d0) / (p.d * p.d) + to_log * l_s;
  if constexpr (!kInverse) grad_in = to_t / p.width;
  const V start_x = -to_t / p.width, size_x = -(to_t * p.t + to_s * p.s) / p.width;
  const V start_y = to_y, size_y = to_y * p.v + to_s / p.width;
  const V mean_x = p.x.mean(start_x, size_x), mean_y = p.y.mean(start_y, size_y);
  for (int k = 0; k < shape.bins; k++) {
    const V number = splat<V>(k);
    const V x = p.bin > number ? start_x : (p.bin == number ? size_x : V{});
    const V y = p.bin > number ? start_y : (p.bin == number ? size_y : V{});
    raw.put_x(k, inside ? raw.weight_x(k, p.x.top).high * p.x.scale * (x - mean_x) : V{});
    raw.put_y(k, inside ? raw.weight_y(k, p.y.top).high * p.y.scale * (y - mean_y) : V{});
  }
  const V to_d0 = (to_v * tu * (1 - p.v) / p.d + to_log * l_d0) * sigmoid(p.raw0);
  const V to_d1 = (to_log * l_d1 - to_v * tu * p.v / p.d) * sigmoid(p.raw1);
  const int last = shape.bins - 1;
  for (int k = 0; k < shape.bins + (shape.tails == Tails::kNone); k++) {  // knots; circular: the last one is the first
    const int position = shape.slope_of_knot(k);
    if (position < 0) continue;
    V gradient = p.bin == splat<V>(k) ? to_d0 : V{};
    gradient = gradient + (p.bin == splat<V>(k - 1) ? to_d1 : V{});
    if (shape.tails == Tails::kCircular && k == 0) gradient = gradient + (p.bin == splat<V>(last) ? to_d1 : V{});
    raw.put_slope(position, inside ? gradient : V{});
  }
  return inside ? grad_in : (shape.tails == Tails::kNone ? V{} : grad_out);
}

}  // namespace gk
