// affine_coupling: y = x s + t (or (x + t) s) on the transformed channels or elements, the rest passed through, and its
// log-determinant per sample, in one pass. Shift t and the raw scale are halves of one tensor along dimension 1, read in place.
#include "rows.h"

namespace gk {
namespace {

// ---- scale maps: from the raw scale u to s, ln s and d ln s / du. The numbers are positions in SCALES of _affine_coupling.py

template <class V>
struct Scaled {
  V scale, log_scale, turn;
};

struct ExpScale {  // s = e^u
  double limit;
  template <class V>
  GK_FN Scaled<V> operator()(V u) const {
    return {exp(u), u, splat<V>(1)};
  }
};
struct SigmoidScale {  // s = sigmoid(u + 2)
  double limit;
  template <class V>
  GK_FN Scaled<V> operator()(V u) const {
    const V a = u + 2, e = exp(a < 0 ? a : -a), large = divide(splat<V>(1), e + 1), small = e * large;
    return {a < 0 ? small : large, (a < 0 ? a : V{}) - log1p_of_unit(e), a < 0 ? large : small};
  }
};
template <class V>
GK_FN Scaled<V> above(V s, V ds, double floor) {  // s + floor
  const V scale = s + splat<V>(floor);
  return {scale, log(scale), ds / scale};
}
struct SigmoidFloorScale {  // s = sigmoid(u + 2) + 1e-3
  double limit;
  template <class V>
  GK_FN Scaled<V> operator()(V u) const {
    const V a = u + 2, e = exp(a < 0 ? a : -a), large = divide(splat<V>(1), e + 1), small = e * large;
    return above(a < 0 ? small : large, small * large, 1e-3);
  }
};
struct SoftplusScale {  // s = softplus(u) + 1e-3
  double limit;
  template <class V>
  GK_FN Scaled<V> operator()(V u) const {
    const V e = exp(u < 0 ? u : -u), one = splat<V>(1);
    return above((u < 0 ? V{} : u) + log1p_of_unit(e), divide(u < 0 ? e : one, e + 1), 1e-3);
  }
};
struct TanhScale {  // ln s = limit tanh(u)
  double limit;
  template <class V>
  GK_FN Scaled<V> operator()(V u) const {
    const V e = exp(u < 0 ? u + u : -(u + u)), t = tanh(u), most = splat<V>(limit);
    return {exp(t * most), t * most, e * 4 / ((e + 1) * (e + 1)) * most};  // 1 - t^2 without cancellation
  }
};
struct SoftClipScale {  // ln s = u / (1 + |u| / limit)
  double limit;
  template <class V>
  GK_FN Scaled<V> operator()(V u) const {
    const V part = 1 / ((u < 0 ? -u : u) / splat<V>(limit) + 1), log_scale = u * part;
    return {exp(log_scale), log_scale, part * part};
  }
};

GK_FN double arctan(double x) { return ::atan(x); }
template <class V>
GK_FN V arctan(V x) {  // reduced to |r| <= tan(pi / 8) by atan(a) = pi/2 - atan(1/a) = pi/4 + atan((a - 1) / (a + 1))
  const V a = x < 0 ? -x : x, zero{};
  const V r = a > 2.4142135f ? -1 / a : a > 0.41421357f ? (a - 1) / (a + 1) : a, z = r * r;
  const V base = a > 2.4142135f ? splat<V>(1.5707963267948966) : a > 0.41421357f ? splat<V>(0.7853981633974483) : zero;
  const V y = base + fma(r * z, horner_fma(z, -0.333333152, 0.199984715, -0.142435333, 0.105938137, -0.0607822131), r);
  return x < 0 ? -y : y;
}
struct ArctanScale {  // ln s = limit arctan(u)
  double limit;
  template <class V>
  GK_FN Scaled<V> operator()(V u) const {
    const V most = splat<V>(limit), log_scale = arctan(u) * most;
    return {exp(log_scale), log_scale, most / fma(u, u, splat<V>(1))};
  }
};

// ---- rows: x, shift, raw scale, [gradient,] mask (the same for all rows, or absent) of the transformed elements; and, last, what
// is kept and copied, where that is as wide (else absent): a copy costs less between arithmetic than in a pass of its own

template <class Scale>
struct Coupling {
  static constexpr int kInputs = 5, kRowInputs = 0, kOutputs = 2, kSums = 1;
  NoNoise noise;
  Scale map;
  bool inverse, shift_first, masked;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V* out, V* term) const {
    const V x = in[0], t = in[1];
    const Scaled<V> s = map(in[2]);
    out[0] = inverse ? (shift_first ? x / s.scale - t : (x - t) / s.scale) : (shift_first ? (x + t) * s.scale : fma(x, s.scale, t));
    out[1] = in[4];
    term[0] = inverse ? -s.log_scale : s.log_scale;
    if (masked) out[0] = in[3] == 0 ? x : out[0], term[0] = in[3] == 0 ? V{} : term[0];
  }
};

template <class Scale>
struct CouplingBackward {
  static constexpr int kInputs = 6, kRowInputs = 1, kOutputs = 4, kSums = 0;
  NoNoise noise;
  Scale map;
  bool inverse, shift_first, masked;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    const V x = in[0], t = in[1], grad = in[3];
    const Scaled<V> s = map(in[2]);
    const V through = inverse ? grad / s.scale : grad * s.scale;
    const V moved = inverse == shift_first ? x : (inverse ? x - t : x + t);  // what is scaled
    const V to_log = fma(through, moved, row[0]);
    out[0] = through;
    out[1] = inverse ? (shift_first ? -grad : -through) : (shift_first ? through : grad);
    out[2] = (inverse ? -to_log : to_log) * s.turn;
    out[3] = in[5];
    if (masked) out[0] = in[4] == 0 ? grad : out[0], out[1] = in[4] == 0 ? V{} : out[1], out[2] = in[4] == 0 ? V{} : out[2];
  }
};

struct Copy {
  static constexpr int kInputs = 1, kRowInputs = 0, kOutputs = 1, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V* out, V*) const {
    out[0] = in[0];
  }
};

// ---- tensors

template <class Run>
void with_scale(int64_t scale, double limit, const Run& run) {
  switch (scale) {
    case 0:
      return run(ExpScale{limit});
    case 1:
      return run(SigmoidScale{limit});
    case 2:
      return run(SigmoidFloorScale{limit});
    case 3:
      return run(SoftplusScale{limit});
    case 4:
      return run(TanhScale{limit});
    case 5:
      return run(SoftClipScale{limit});
    default:
      return run(ArctanScale{limit});
  }
}

struct Halves {  // of the columns of params: shift and raw scale; x is transformed from column `kept` on
  RowShape shape;
  int64_t kept;
  bool scale_first;
  Halves(const Rows& x, const Rows& params, bool scale_first)
      : shape{x.shape().rows, params.shape().width / 2}, kept(x.shape().width - shape.width), scale_first(scale_first) {}
  Array shift(const Rows& params) const { return params.columns(scale_first ? shape.width : 0); }
  Array scale(const Rows& params) const { return params.columns(scale_first ? 0 : shape.width); }
  Array same(const Rows& x) const { return kept == shape.width ? x.array() : Array{}; }  // the kept half, where it is one
};

inline Array mask_of(const MaybeTensor& mask) {
  return mask ? Array{mask->data_ptr(), 0, storage_of(mask->scalar_type())} : Array{};
}

void copy_kept(const Rows& from, const Rows& to, const Halves& halves, const Tensor& like) {
  if (halves.kept && halves.kept != halves.shape.width)
    run_rows(Copy{}, {halves.shape.rows, halves.kept}, {from.array()}, {}, {to.array()}, {}, like);
}

Tensor transform(const Tensor& x, const Rows& x_rows, const Rows& y_rows, const Tensor& params, const MaybeTensor& mask,
                 const MaybeTensor& running, int64_t scale, bool scale_first, bool shift_first, bool inverse, double limit) {
  const ScalarType type = promote(x.scalar_type(), params.scalar_type());
  Tensor log_det = new_tensor(x, {x.size(0)}, sum_type(type));
  const MaybeTensor onto = running ? MaybeTensor(torch::stable::contiguous(*running)) : running;
  Array sum = per_row(log_det);
  if (onto) sum.onto = onto->data_ptr();
  const Rows param_rows(params);
  const Halves halves(x_rows, param_rows, scale_first);
  with_scale(scale, limit, [&](auto map) {
    const Coupling<decltype(map)> f{{}, map, inverse, shift_first, mask.has_value()};
    const bool fresh = y_rows.array().data != x_rows.array().data;
    const Arrays<5> in{x_rows.columns(halves.kept), halves.shift(param_rows), halves.scale(param_rows), mask_of(mask),
                       fresh ? halves.same(x_rows) : Array{}};
    run_rows(f, halves.shape, in, {}, {y_rows.columns(halves.kept), fresh ? halves.same(y_rows) : Array{}}, {sum}, x);
  });
  return log_det;
}

std::tuple<Tensor, Tensor> affine_coupling(Tensor x, Tensor params, MaybeTensor mask, MaybeTensor running, int64_t scale,
                                           bool scale_first, bool shift_first, bool inverse, double limit) {
  Tensor y = new_tensor(x, x.sizes(), promote(x.scalar_type(), params.scalar_type()));
  const Rows x_rows(x), y_rows(y);
  copy_kept(x_rows, y_rows, Halves(x_rows, Rows(params), scale_first), x);
  return {y, transform(x, x_rows, y_rows, params, mask, running, scale, scale_first, shift_first, inverse, limit)};
}

// The transformed elements are overwritten, the others not touched. x has dense rows, as Python has seen to.
Tensor affine_coupling_(Tensor x, Tensor params, MaybeTensor mask, MaybeTensor running, int64_t scale, bool scale_first,
                        bool shift_first, bool inverse, double limit) {
  const Rows rows(x);
  return transform(x, rows, rows, params, mask, running, scale, scale_first, shift_first, inverse, limit);
}

std::vector<Tensor> affine_coupling_backward(Tensor grad_y, Tensor grad_log_det, Tensor x, Tensor params, MaybeTensor mask,
                                             MaybeTensor running, int64_t scale, bool scale_first, bool shift_first, bool inverse,
                                             double limit) {
  Tensor d_x = new_tensor(x, x.sizes()), d_params = new_tensor(params, params.sizes());
  const Rows x_rows(x), param_rows(params), grad_rows(grad_y), d_x_rows(d_x), d_param_rows(d_params);
  const Halves halves(x_rows, param_rows, scale_first);
  copy_kept(grad_rows, d_x_rows, halves, x);
  with_scale(scale, limit, [&](auto map) {
    const CouplingBackward<decltype(map)> f{{}, map, inverse, shift_first, mask.has_value()};
    const Arrays<6> in{x_rows.columns(halves.kept),
                       halves.shift(param_rows),
                       halves.scale(param_rows),
                       grad_rows.columns(halves.kept),
                       mask_of(mask),
                       halves.same(grad_rows)};
    const Arrays<4> out{d_x_rows.columns(halves.kept), halves.shift(d_param_rows), halves.scale(d_param_rows),
                        halves.same(d_x_rows)};
    run_rows(f, halves.shape, in, {per_row(grad_log_det)}, out, {}, x);
  });
  std::vector<Tensor> gradients{d_x, d_params};
  if (running) {  // gets what log_det gets, as a tensor of its own
    gradients.push_back(new_tensor(*running, running->sizes()));
    torch::stable::copy_(gradients[2], grad_log_det);
  }
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_affine_coupling", TORCH_BOX(&affine_coupling));
  m.impl("_affine_coupling_", TORCH_BOX(&affine_coupling_));
  m.impl("_affine_coupling_backward", TORCH_BOX(&affine_coupling_backward));
}

}  // namespace gk
