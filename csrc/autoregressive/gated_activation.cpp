// gated_activation: tanh(a) sigmoid(b) of the two halves of dimension 1, after adding those of a condition.
#include "gate.h"
#include "rows.h"

namespace gk {
namespace {

template <bool kCondition, class V>
GK_FN void gate_inputs(const V* in, V* a, V* b) {
  *a = in[0], *b = in[1];
  if constexpr (kCondition) *a = *a + in[2], *b = *b + in[3];
}

template <bool kCondition>
struct Gated {
  static constexpr int kInputs = kCondition ? 4 : 2, kRowInputs = 0, kOutputs = 1, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V* out, V*) const {
    V a, b;
    gate_inputs<kCondition>(in, &a, &b);
    out[0] = gate(a, b);
  }
};

template <bool kCondition>
struct GatedBackward {  // the last input is the gradient; x and the condition have equal gradients
  static constexpr int kInputs = kCondition ? 5 : 3, kRowInputs = 0, kOutputs = kCondition ? 4 : 2, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V* out, V*) const {
    V a, b;
    gate_inputs<kCondition>(in, &a, &b);
    const V t = tanh(a), s = sigmoid(b), grad = in[kInputs - 1];
    out[0] = grad * s * (1.0f - t * t);
    out[1] = grad * t * (s * (1.0f - s));
    if constexpr (kCondition) out[2] = out[0], out[3] = out[1];
  }
};

struct Halves {  // a tensor (N, 2C, ...) as two arrays of rows
  Rows rows;
  int64_t width;
  explicit Halves(const Tensor& x) : rows(x), width(rows.shape().width / 2) {}
  Array first() const { return rows.array(); }
  Array second() const { return rows.columns(width); }
  RowShape shape() const { return {rows.shape().rows, width}; }
};

Tensor gated_activation(Tensor x, MaybeTensor condition) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes[1] /= 2;
  Tensor y = new_tensor(x, sizes, condition ? promote(x.scalar_type(), condition->scalar_type()) : x.scalar_type());
  const Halves h(x);
  const Array out = Rows(y).array();
  if (condition) {
    const Halves c(*condition);
    run_rows(Gated<true>(), h.shape(), {h.first(), h.second(), c.first(), c.second()}, {}, {out}, {}, x);
  } else {
    run_rows(Gated<false>(), h.shape(), {h.first(), h.second()}, {}, {out}, {}, x);
  }
  return y;
}

std::vector<Tensor> gated_activation_backward(Tensor grad, Tensor x, MaybeTensor condition) {
  std::vector<Tensor> gradients{new_tensor(x, x.sizes())};
  const Halves h(x), d(gradients[0]);
  const Rows g(grad);
  if (condition) {
    gradients.push_back(new_tensor(*condition, condition->sizes()));
    const Halves c(*condition), d_c(gradients[1]);
    run_rows(GatedBackward<true>(), h.shape(), {h.first(), h.second(), c.first(), c.second(), g.array()}, {},
             {d.first(), d.second(), d_c.first(), d_c.second()}, {}, x);
  } else {
    run_rows(GatedBackward<false>(), h.shape(), {h.first(), h.second(), g.array()}, {}, {d.first(), d.second()}, {}, x);
  }
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_gated_activation", TORCH_BOX(&gated_activation));
  m.impl("_gated_activation_backward", TORCH_BOX(&gated_activation_backward));
}

}  // namespace gk
