// denoising_loss: the squared error of a prediction per sample, times a scale. The target is read; or, where a key is given, made
// again from x0 in both directions and never stored.
#include "q_sample.h"

namespace gk {
namespace {

struct Loss {  // in: prediction, target
  static constexpr int kInputs = 2, kRowInputs = 0, kOutputs = 0, kSums = 1;
  NoNoise noise;
  double scale;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    const V error = in[0] - in[1];
    term[0] = error * error * splat<V>(scale);
  }
};

template <bool kBoth>
struct LossBackward {  // row: gradient; out: gradient of the prediction, and of the target where kBoth
  static constexpr int kInputs = 2, kRowInputs = 1, kOutputs = 1 + kBoth, kSums = 0;
  NoNoise noise;
  double scale;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    out[0] = (in[0] - in[1]) * (row[0] * splat<V>(2 * scale));
    if constexpr (kBoth) out[1] = -out[0];
  }
};

struct RemadeLoss {  // in: prediction, x0; row: alpha, sigma
  static constexpr int kInputs = 2, kRowInputs = 2, kOutputs = 0, kSums = 1;
  Normal noise;
  Target target;
  double scale;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V*, V* term) const {
    const V error = in[0] - target.of(in[1], eps, row[0], row[1]);
    term[0] = error * error * splat<V>(scale);
  }
};

template <bool kBoth>
struct RemadeLossBackward {  // row: alpha, sigma, gradient; out: gradient of the prediction, and of x0 where kBoth
  static constexpr int kInputs = 2, kRowInputs = 3, kOutputs = 1 + kBoth, kSums = 0;
  Normal noise;
  Target target;
  double scale;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    const V error = in[0] - target.of(in[1], eps, row[0], row[1]);
    out[0] = error * (row[2] * splat<V>(2 * scale));
    if constexpr (kBoth) out[1] = -target.x0_factor(row[1]) * out[0];
  }
};

Tensor denoising_loss(Tensor prediction, MaybeTensor leaf, MaybeTensor fixed, MaybeTensor alpha, MaybeTensor sigma, MaybeTensor key,
                      double scale, int64_t target) {
  const Rows p(prediction), other(leaf ? *leaf : *fixed);
  const RowShape shape = p.shape();
  Tensor loss = new_tensor(prediction, {shape.rows}, sum_type(prediction.scalar_type()));
  if (key)
    run_rows(RemadeLoss{{}, target_of(target), scale}, shape, {p.array(), other.array()}, {per_row(*alpha), per_row(*sigma)}, {},
             {per_row(loss)}, prediction, keys_of(*key));
  else
    run_rows(Loss{{}, scale}, shape, {p.array(), other.array()}, {}, {}, {per_row(loss)}, prediction);
  return loss;
}

template <bool kBoth>
std::vector<Tensor> backward(const Tensor& grad, const Tensor& prediction, const Tensor& other, const MaybeTensor& alpha,
                             const MaybeTensor& sigma, const MaybeTensor& key, double scale, int64_t target) {
  const Rows p(prediction), second(other);
  std::vector<Tensor> grads{new_tensor(prediction, prediction.sizes())};
  if (kBoth) grads.push_back(new_tensor(other, other.sizes()));
  Arrays<1 + kBoth> out;
  for (int i = 0; i < 1 + kBoth; i++) out[i] = Rows(grads[i]).array();
  if (key)
    run_rows(RemadeLossBackward<kBoth>{{}, target_of(target), scale}, p.shape(), {p.array(), second.array()},
             {per_row(*alpha), per_row(*sigma), per_row(grad)}, out, {}, prediction, keys_of(*key));
  else
    run_rows(LossBackward<kBoth>{{}, scale}, p.shape(), {p.array(), second.array()}, {per_row(grad)}, out, {}, prediction);
  return grads;
}

std::vector<Tensor> denoising_loss_backward(Tensor grad, Tensor prediction, MaybeTensor leaf, MaybeTensor fixed, MaybeTensor alpha,
                                            MaybeTensor sigma, MaybeTensor key, double scale, int64_t target) {
  return leaf ? backward<true>(grad, prediction, *leaf, alpha, sigma, key, scale, target)
              : backward<false>(grad, prediction, *fixed, alpha, sigma, key, scale, target);
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_denoising_loss", TORCH_BOX(&denoising_loss));
  m.impl("_denoising_loss_backward", TORCH_BOX(&denoising_loss_backward));
}

}  // namespace gk
