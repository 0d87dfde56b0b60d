// bernoulli_nll and gaussian_nll: negative log-likelihoods per sample, summed over a row in one pass, and their gradients.
#include "rows.h"

namespace gk {
namespace {

struct BernoulliNll {  // softplus(l) - x l. in: logits, x
  static constexpr int kInputs = 2, kRowInputs = 0, kOutputs = 0, kSums = 1;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    term[0] = softplus(in[0]) - in[0] * in[1];
  }
};

struct BernoulliNllBackward {
  static constexpr int kInputs = 2, kRowInputs = 1, kOutputs = 1, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    out[0] = row[0] * (sigmoid(in[0]) - in[1]);
  }
};

constexpr double kLogTwoPi = 1.8378770664093453;

template <bool kLogVar>
struct GaussianNll {  // 1/2 ((x - mu)^2 e^-log_var + log_var + ln 2 pi). in: mu, x[, log_var]
  static constexpr int kInputs = kLogVar ? 3 : 2, kRowInputs = 0, kOutputs = 0, kSums = 1;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    const V d = in[1] - in[0];
    V twice = d * d + splat<V>(kLogTwoPi);
    if constexpr (kLogVar) twice = d * d * exp(-in[2]) + (in[2] + splat<V>(kLogTwoPi));
    term[0] = twice * 0.5f;
  }
};

template <bool kLogVar>
struct GaussianNllBackward {
  static constexpr int kInputs = kLogVar ? 3 : 2, kRowInputs = 1, kOutputs = kLogVar ? 2 : 1, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    const V d = in[0] - in[1];
    if constexpr (kLogVar) {
      const V pull = d * exp(-in[2]);
      out[0] = row[0] * pull;
      out[1] = row[0] * (1.0f - d * pull) * 0.5f;
    } else {
      out[0] = row[0] * d;
    }
  }
};

Tensor new_sums(const Tensor& first, const Tensor& second, const MaybeTensor& third = {}) {
  ScalarType type = promote(first.scalar_type(), second.scalar_type());
  if (third) type = promote(type, third->scalar_type());
  return torch::stable::new_empty(first, {first.size(0)}, sum_type(type));
}

Tensor bernoulli_nll(Tensor logits, Tensor x) {
  const Rows l(logits), target(x);
  Tensor nll = new_sums(logits, x);
  run_rows(BernoulliNll{}, l.shape(), {l.array(), target.array()}, {}, {}, {per_row(nll)}, logits);
  return nll;
}

std::vector<Tensor> bernoulli_nll_backward(Tensor grad, Tensor logits, Tensor x) {
  const Rows l(logits), target(x);
  Tensor d_logits = torch::stable::new_empty(logits, logits.sizes());
  run_rows(BernoulliNllBackward{}, l.shape(), {l.array(), target.array()}, {per_row(grad)}, {Rows(d_logits).array()}, {}, logits);
  return {d_logits};
}

Tensor gaussian_nll(Tensor mu, MaybeTensor log_var, Tensor x) {
  const Rows m(mu), target(x);
  Tensor nll = new_sums(mu, x, log_var);
  if (log_var) {
    const Rows v(*log_var);
    run_rows(GaussianNll<true>{}, m.shape(), {m.array(), target.array(), v.array()}, {}, {}, {per_row(nll)}, mu);
  } else {
    run_rows(GaussianNll<false>{}, m.shape(), {m.array(), target.array()}, {}, {}, {per_row(nll)}, mu);
  }
  return nll;
}

std::vector<Tensor> gaussian_nll_backward(Tensor grad, Tensor mu, MaybeTensor log_var, Tensor x) {
  const Rows m(mu), target(x);
  std::vector<Tensor> gradients{torch::stable::new_empty(mu, mu.sizes())};
  const Array d_mu = Rows(gradients[0]).array();
  if (log_var) {
    const Rows v(*log_var);
    gradients.push_back(torch::stable::new_empty(*log_var, log_var->sizes()));
    run_rows(GaussianNllBackward<true>{}, m.shape(), {m.array(), target.array(), v.array()}, {per_row(grad)},
             {d_mu, Rows(gradients[1]).array()}, {}, mu);
  } else {
    run_rows(GaussianNllBackward<false>{}, m.shape(), {m.array(), target.array()}, {per_row(grad)}, {d_mu}, {}, mu);
  }
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_bernoulli_nll", TORCH_BOX(&bernoulli_nll));
  m.impl("_bernoulli_nll_backward", TORCH_BOX(&bernoulli_nll_backward));
  m.impl("_gaussian_nll", TORCH_BOX(&gaussian_nll));
  m.impl("_gaussian_nll_backward", TORCH_BOX(&gaussian_nll_backward));
}

}  // namespace gk
