// q_sample: x_t and the target of training in one pass; eps comes from the key in registers.
#include "q_sample.h"

namespace gk {
namespace {

struct QSample {  // in: x0; row: alpha, sigma; out: x_t, target
  static constexpr int kInputs = 1, kRowInputs = 2, kOutputs = 2, kSums = 0;
  Normal noise;
  Target target;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    out[0] = fma(row[0], in[0], row[1] * eps);
    out[1] = target.of(in[0], eps, row[0], row[1]);
  }
};

struct QSampleBackward {  // in: gradients of x_t and of the target; row: alpha, sigma; out: gradient of x0
  static constexpr int kInputs = 2, kRowInputs = 2, kOutputs = 1, kSums = 0;
  NoNoise noise;
  Target target;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    out[0] = fma(row[0], in[0], target.x0_factor(row[1]) * in[1]);
  }
};

std::tuple<Tensor, Tensor> q_sample(Tensor x0, Tensor alpha, Tensor sigma, Tensor key, int64_t target) {
  const Rows x(x0);
  Tensor x_t = new_tensor(x0, x0.sizes()), wanted = new_tensor(x0, x0.sizes());
  run_rows(QSample{{}, target_of(target)}, x.shape(), {x.array()}, {per_row(alpha), per_row(sigma)},
           {Rows(x_t).array(), Rows(wanted).array()}, {}, x0, keys_of(key));
  return {x_t, wanted};
}

std::vector<Tensor> q_sample_backward(Tensor grad_x_t, Tensor grad_target, Tensor x0, Tensor alpha, Tensor sigma, Tensor,
                                      int64_t target) {
  const Rows first(grad_x_t), second(grad_target);
  Tensor grad = new_tensor(x0, x0.sizes());
  run_rows(QSampleBackward{{}, target_of(target)}, first.shape(), {first.array(), second.array()}, {per_row(alpha), per_row(sigma)},
           {Rows(grad).array()}, {}, x0);
  return {grad};
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_q_sample", TORCH_BOX(&q_sample));
  m.impl("_q_sample_backward", TORCH_BOX(&q_sample_backward));
}

}  // namespace gk
