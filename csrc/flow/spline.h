// The monotonic rational-quadratic spline of one element, forward, inverse and their gradients (Durkan et al., 2019), on lanes.
//
// Inside bin k, with t = (x - left) / width, u = 1 - t, s = height / width and the slopes d0, d1 at its two knots:
//   v = (s t^2 + d0 t u) / D,  y = lower + height v,  D = s (t^2 + u^2) + (d0 + d1) t u,
//   dy/dx = s^2 N / D^2,       N = d1 t^2 + 2 s t u + d0 u^2.
// D and N are sums of positive terms. So is the discriminant of the inverse, q^2 + 4 s^2 v (1 - v) with q = d0 (1 - v) - d1 v.
#pragma once
#include "wide.h"

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

// ---- where an element lies

// One axis, widths or heights. The weights of its bins are the exponentials of their parameters, up to a common factor.
template <class V>
struct Axis {
  using W = Wide<V>;
  double smallest, rest;      // size of a bin = smallest + weight / sum * rest
  W sum, below, weight;       // of the weights: all, those of the bins before the chosen one, and that one
  W scaled, by_sum, by_size;  // size of the chosen bin, times sum; 1 / sum; 1 / size
  GK_FN Axis(const SplineShape& shape, double min_size)
      : smallest(2 * shape.bound * min_size), rest(2 * shape.bound * (1 - min_size * shape.bins)) {}
  GK_FN W size() const { return scaled * by_sum; }
  GK_FN W start(const SplineShape& shape, W bin) const { return below * by_sum * rest + (bin * smallest - shape.bound); }
  GK_FN W fraction(const SplineShape& shape, W bin, V at) const {  // of the way through the chosen bin
    const W zero = wide_splat<W>(0), one = wide_splat<W>(1);
    const W t = (widen(at) - start(shape, bin)) * by_size, from_zero = at_least(zero, t, zero, t);
    return at_least(from_zero, one, one, from_zero);  // keeps NaN
  }
  // Mean over the bins, by weight, of the gradients of their sizes: those of the chosen bin's start and size.
  GK_FN V mean(V to_start, V to_size) const { return to_start * narrow<V>(below * by_sum) + to_size * narrow<V>(weight * by_sum); }
};

template <class V>
struct Knot {
  V slope, turn;  // the slope and its derivative by the parameter
  GK_FN Knot(V raw, double min_slope) {
    const V e = exp(raw < 0 ? raw : -raw);
    slope = (raw < 0 ? V{} : raw) + log1p_of_unit(e) + splat<V>(min_slope);
    turn = divide(raw < 0 ? e : splat<V>(1), e + 1);
  }
};

template <class V>
struct Point {
  Axis<V> x, y;
  V bin, d0, d1, turn0, turn1;  // bin number; slopes at its knots and their derivatives by the parameters
  V s, t, u, v, n, by_d, width, height;
  V slope, out;  // dy/dx; y, or x of the inverse
};

// Raw gives the parameters: slope(k), and after open() the weights of bins, weight_x(k) and weight_y(k).
template <class V, bool kInverse, class Raw>
GK_FN Point<V> locate(const SplineShape& shape, Raw& raw, V at) {
  using W = Wide<V>;
  Point<V> p{Axis<V>(shape, shape.min_width), Axis<V>(shape, shape.min_height)};
  Axis<V>&x = p.x, &y = p.y, &searched = kInverse ? y : x;
  raw.open(shape);
  x.weight = x.sum = raw.weight_x(0), y.weight = y.sum = raw.weight_y(0);
  for (int k = 1; k < shape.bins; k++) x.sum = x.sum + raw.weight_x(k), y.sum = y.sum + raw.weight_y(k);
  // The last bin that begins at or before the element: no search, no branch, never out of range.
  W bin = wide_splat<W>(0), walked_x = x.weight, walked_y = y.weight;
  x.below = y.below = bin;
  const W target = (widen(at) + shape.bound) * searched.sum, step = searched.sum * searched.smallest;
  for (int k = 1; k < shape.bins; k++) {
    const W w = raw.weight_x(k), h = raw.weight_y(k), start = (kInverse ? walked_y : walked_x) * searched.rest + step * k;
    x.below = at_least(target, start, walked_x, x.below), x.weight = at_least(target, start, w, x.weight);
    y.below = at_least(target, start, walked_y, y.below), y.weight = at_least(target, start, h, y.weight);
    bin = at_least(target, start, wide_splat<W>(k), bin);
    walked_x = walked_x + w, walked_y = walked_y + h;
  }
  p.bin = narrow<V>(bin);
  const auto knot = [&](int k) { return shape.slope_of_knot(k) < 0 ? V{} : raw.slope(shape.slope_of_knot(k)); };
  V after = knot(1), raw0 = knot(0), raw1 = after;
  for (int k = 1; k < shape.bins; k++) {
    const V before = after;
    after = knot(k + 1);
    raw0 = p.bin >= splat<V>(k) ? before : raw0, raw1 = p.bin >= splat<V>(k) ? after : raw1;
  }
  const Knot<V> knot0(raw0, shape.min_slope), knot1(raw1, shape.min_slope);
  p.d0 = knot0.slope, p.d1 = knot1.slope, p.turn0 = knot0.turn, p.turn1 = knot1.turn;
  if (shape.tails == Tails::kLinear) {
    p.d0 = p.bin == 0 ? splat<V>(1) : p.d0;
    p.d1 = p.bin == splat<V>(shape.bins - 1) ? splat<V>(1) : p.d1;
  }
  x.scaled = x.weight * x.rest + x.sum * x.smallest, y.scaled = y.weight * y.rest + y.sum * y.smallest;
  const W x_x = x.scaled * x.sum, y_y = y.scaled * y.sum, by_all = 1.0 / (x_x * y_y);  // one division for four quotients
  const W by_x_x = by_all * y_y, by_y_y = by_all * x_x;
  x.by_sum = by_x_x * x.scaled, y.by_sum = by_y_y * y.scaled;
  x.by_size = by_x_x * (x.sum * x.sum), y.by_size = by_y_y * (y.sum * y.sum);
  const W s = y.size() * x.by_size;
  p.s = narrow<V>(s), p.width = narrow<V>(x.size()), p.height = narrow<V>(y.size());
  if constexpr (kInverse) {
    const W zero = wide_splat<W>(0), v = y.fraction(shape, bin, at), rest = 1.0 - v, d0 = widen(p.d0), d1 = widen(p.d1);
    const W q = d0 * rest - d1 * v, sv = s * v * 2, sr = s * rest * 2, root = sqrt(q * q + sv * sr);
    const W sum = root + at_least(q, zero, q, zero - q);  // t : u = sv : sum, or the same without cancellation
    const W a = at_least(q, zero, sv, sum), b = at_least(q, zero, sum, sr), by_both = 1.0 / (a + b);
    p.t = narrow<V>(a * by_both), p.u = narrow<V>(b * by_both), p.v = narrow<V>(v);
    p.out = narrow<V>(x.start(shape, bin) + a * by_both * x.size());
  } else {
    const W t = x.fraction(shape, bin, at);
    p.t = narrow<V>(t), p.u = narrow<V>(1.0 - t);
  }
  const V tu = p.t * p.u, tt = p.t * p.t, uu = p.u * p.u;
  p.n = fma(p.d1, tt, fma(p.d0, uu, p.s * tu * 2));
  p.by_d = divide(splat<V>(1), fma(p.s, tt + uu, (p.d0 + p.d1) * tu));
  if constexpr (!kInverse) {
    p.v = fma(p.s, tt, p.d0 * tu) * p.by_d;
    p.out = narrow<V>(y.start(shape, bin) + widen(p.v) * y.size());
  }
  p.slope = p.s * p.by_d * (p.s * p.by_d) * p.n;
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
  const V one = splat<V>(1), by_n = divide(one, p.n), by_s = divide(one, p.s), by_width = narrow<V>(p.x.by_size);
  const V tu = p.t * p.u, tt = p.t * p.t, uu = p.u * p.u, turn = p.u - p.t;  // 1 - 2 t
  // Derivatives of log dy/dx at fixed t, and along t.
  const V l_d0 = uu * by_n - tu * 2 * p.by_d, l_d1 = tt * by_n - tu * 2 * p.by_d;
  const V l_s = (by_s + tu * by_n - (tt + uu) * p.by_d) * 2;
  const V l_t = ((p.d1 * p.t - p.d0 * p.u + p.s * turn) * by_n - (p.d0 + p.d1 - p.s * 2) * turn * p.by_d) * 2;
  V grad_in, to_y = grad_out, to_log = grad_log_det;  // gradients of y and log dy/dx as functions of x and the parameters
  if constexpr (kInverse) {                           // the implicit function theorem
    grad_in = (grad_out - grad_log_det * l_t * by_width) / p.slope;
    to_y = -grad_in, to_log = -grad_log_det;
  }
  const auto inside = (in >= -bound) & (in <= bound);
  to_y = inside ? to_y : V{}, to_log = inside ? to_log : V{};
  const V to_v = to_y * p.height, m = p.s * p.n * p.by_d * p.by_d;
  const V to_t = kInverse ? (inside ? -grad_out * p.width : V{}) : to_v * m + to_log * l_t;  // inverse: what l_t adds cancels
  const V to_s = to_v * tu * (tt * p.d1 - uu * p.d0) * p.by_d * p.by_d + to_log * l_s;
  if constexpr (!kInverse) grad_in = to_t * by_width;
  const V start_x = -to_t * by_width, size_x = -(to_t * p.t + to_s * p.s) * by_width;
  const V start_y = to_y, size_y = to_y * p.v + to_s * by_width;
  const V mean_x = p.x.mean(start_x, size_x), mean_y = p.y.mean(start_y, size_y);
  for (int k = 0; k < shape.bins; k++) {
    const V number = splat<V>(k);
    const V x = p.bin > number ? start_x : (p.bin == number ? size_x : V{});
    const V y = p.bin > number ? start_y : (p.bin == number ? size_y : V{});
    const V part_x = narrow<V>(raw.weight_x(k) * p.x.by_sum), part_y = narrow<V>(raw.weight_y(k) * p.y.by_sum);
    raw.put_x(k, inside ? part_x * splat<V>(p.x.rest) * (x - mean_x) : V{});
    raw.put_y(k, inside ? part_y * splat<V>(p.y.rest) * (y - mean_y) : V{});
  }
  const V to_d0 = (to_v * tu * (1 - p.v) * p.by_d + to_log * l_d0) * p.turn0;
  const V to_d1 = (to_log * l_d1 - to_v * tu * p.v * p.by_d) * p.turn1;
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
