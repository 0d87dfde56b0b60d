// denoising_loss: the weighted squared error of a prediction per sample. The target is made again from x0 and the key, in both
// directions, and is never stored.
#include "q_sample.h"

namespace gk {
namespace {

struct DenoisingLoss {  // in: prediction, x0; row: alpha, sigma, weight / width
  static constexpr int kInputs = 2, kRowInputs = 3, kOutputs = 0, kSums = 1;
  Normal noise;
  Target target;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V*, V* term) const {
    const V error = in[0] - target.of(in[1], eps, row[0], row[1]);
    term[0] = error * error * row[2];
  }
};

struct DenoisingLossBackward {  // row: alpha, sigma, weight / width, gradient; out: gradients of the prediction and of x0
  static constexpr int kInputs = 2, kRowInputs = 4, kOutputs = 2, kSums = 0;
  Normal noise;
  Target target;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    const V error = in[0] - target.of(in[1], eps, row[0], row[1]);
    out[0] = error * (row[2] * row[3] * 2.0f);
    out[1] = -target.x0_factor(row[1]) * out[0];
  }
};

Tensor denoising_loss(Tensor prediction, Tensor x0, Tensor alpha, Tensor sigma, Tensor weight, Tensor key, int64_t target) {
  const Rows p(prediction), x(x0);
  const int64_t n = p.shape().rows;
  Tensor loss = torch::stable::new_empty(prediction, {n}, sum_type(prediction.scalar_type()));
  run_rows(DenoisingLoss{{}, target_of(target)}, p.shape(), {p.array(), x.array()},
           {per_row(alpha), per_row(sigma), per_row(weight)}, {}, {per_row(loss)}, prediction, keys_of(key));
  return loss;
}

std::vector<Tensor> denoising_loss_backward(Tensor grad, Tensor prediction, Tensor x0, Tensor alpha, Tensor sigma, Tensor weight,
                                            Tensor key, int64_t target) {
  const Rows p(prediction), x(x0);
  Tensor grad_prediction = torch::stable::new_empty(prediction, prediction.sizes());
  Tensor grad_x0 = torch::stable::new_empty(x0, x0.sizes());
  run_rows(DenoisingLossBackward{{}, target_of(target)}, p.shape(), {p.array(), x.array()},
           {per_row(alpha), per_row(sigma), per_row(weight), per_row(grad)}, {Rows(grad_prediction).array(), Rows(grad_x0).array()},
           {}, prediction, keys_of(key));
  return {grad_prediction, grad_x0};
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("_denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
}

}  // namespace gk
