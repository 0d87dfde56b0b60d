// log_importance_weight: per sample the sum of 1/2 ((z - mu)^2 e^-log_var + log_var - z^2) less nll, and log(e^log_sum + that
// weight).
#include "latent.h"

namespace gk {
namespace {

struct LogRatio {  // log p(z) - log q(z|x). in: z, mu, log_var
  static constexpr int kInputs = 3, kRowInputs = 0, kOutputs = 0, kSums = 1;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    const V difference = in[0] - in[1];
    term[0] = fma(difference * difference, exp(-in[2]), fma(-in[0], in[0], in[2])) * 0.5f;
  }
};
struct LogRatioBackward {  // row: the gradient of log w
  static constexpr int kInputs = 3, kRowInputs = 1, kOutputs = 3, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    const V difference = in[0] - in[1], pull = difference * exp(-in[2]);
    out[0] = row[0] * (pull - in[0]);
    out[1] = -row[0] * pull;
    out[2] = row[0] * fma(-difference, pull, splat<V>(1)) * 0.5f;
  }
};

// One number per sample. in: log ratio, nll[, log_sum]
template <bool kSum>
struct Accumulate {
  static constexpr int kInputs = 2 + kSum, kRowInputs = 0, kOutputs = 1, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V* out, V*) const {
    out[0] = in[0] - in[1];
    if constexpr (kSum) {
      const V a = in[2], b = out[0], larger = a > b ? a : b, gap = a > b ? b - a : a - b;  // a NaN stays one in gap
      out[0] = a == b ? larger + splat<V>(0.693147180559945) : larger + softplus(gap);     // equal infinities have no gap
    }
  }
};
template <bool kSum>
struct AccumulateBackward {  // in: the gradient, log ratio, nll[, log_sum]; out: gradients of log ratio, nll[, log_sum]
  static constexpr int kInputs = 3 + kSum, kRowInputs = 0, kOutputs = 2 + kSum, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V* out, V*) const {
    out[0] = in[0];
    if constexpr (kSum) {
      const V ahead = (in[1] - in[2]) - in[3];
      out[0] = in[0] * sigmoid(ahead);
      out[2] = in[0] * sigmoid(-ahead);
    }
    out[1] = -out[0];
  }
};

Tensor log_ratio(const Tensor& z, const Moments& q, ScalarType type) {
  const Rows rows(z);
  Tensor ratio = new_tensor(z, {q.shape().rows}, type);
  run_rows(LogRatio{}, q.shape(), {rows.array(), q.mu(), q.log_var()}, {}, {}, {per_row(ratio)}, z);
  return ratio;
}

ScalarType type_of(const Tensor& nll, const Tensor& z, const Tensor& mu) {  // float64 comes in every tensor or in none
  return sum_type(promote(promote(nll.scalar_type(), z.scalar_type()), mu.scalar_type()));
}

Tensor log_importance_weight(Tensor nll, Tensor z, Tensor mu, MaybeTensor log_var, MaybeTensor log_sum) {
  const Moments q(mu, log_var);
  const Tensor ratio = log_ratio(z, q, type_of(nll, z, mu));
  const RowShape samples{q.shape().rows, 1};
  Tensor result = torch::stable::empty_like(ratio);
  const Rows r(ratio), losses(nll), out(result);
  if (log_sum) {
    const Rows before(*log_sum);
    run_rows(Accumulate<true>{}, samples, {r.array(), losses.array(), before.array()}, {}, {out.array()}, {}, z);
  } else {
    run_rows(Accumulate<false>{}, samples, {r.array(), losses.array()}, {}, {out.array()}, {}, z);
  }
  return result;
}

std::vector<Tensor> log_importance_weight_backward(Tensor grad, Tensor nll, Tensor z, Tensor mu, MaybeTensor log_var,
                                                   MaybeTensor log_sum) {
  const Moments q(mu, log_var);
  const RowShape samples{q.shape().rows, 1};
  const auto empty_like = [](const Tensor& x) { return new_tensor(x, x.sizes()); };
  std::vector<Tensor> gradients{empty_like(nll), empty_like(z)};
  const MomentsGradient d(mu, log_var, &gradients);
  const Tensor ratio = log_ratio(z, q, type_of(nll, z, mu)), weight = torch::stable::empty_like(ratio);
  const Rows g(grad), r(ratio), losses(nll), w(weight), d_nll(gradients[0]), points(z), d_z(gradients[1]);
  if (log_sum) {
    gradients.push_back(empty_like(*log_sum));
    const Rows before(*log_sum), d_sum(gradients.back());
    run_rows(AccumulateBackward<true>{}, samples, {g.array(), r.array(), losses.array(), before.array()}, {},
             {w.array(), d_nll.array(), d_sum.array()}, {}, z);
  } else {
    run_rows(AccumulateBackward<false>{}, samples, {g.array(), r.array(), losses.array()}, {}, {w.array(), d_nll.array()}, {}, z);
  }
  run_rows(LogRatioBackward{}, q.shape(), {points.array(), q.mu(), q.log_var()}, {per_row(weight)},
           {d_z.array(), d.mu(), d.log_var()}, {}, z);
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_log_importance_weight", TORCH_BOX(&log_importance_weight));
  m.impl("_log_importance_weight_backward", TORCH_BOX(&log_importance_weight_backward));
}

}  // namespace gk
