// gaussian_log_prob: log-density of a diagonal Gaussian summed over each sample in one pass; the backward pass recomputes from the
// inputs. in: x, then the mean and the log standard deviation where they exist.
#include "rows.h"

namespace gk {
namespace {

constexpr double kHalfLogTwoPi = 0.9189385332046727;

template <bool kMean, bool kStd>
struct LogProb {  // -((x - mean) e^-log_std)^2 / 2 - ln(2 pi) / 2 - log_std
  static constexpr int kInputs = 1 + kMean + kStd, kRowInputs = 0, kOutputs = 0, kSums = 1;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    V z = in[0], normalizer = splat<V>(kHalfLogTwoPi);
    if constexpr (kMean) z = z - in[1];
    if constexpr (kStd) z = z * exp(-in[1 + kMean]), normalizer = normalizer + in[1 + kMean];
    term[0] = fma(z * z, splat<V>(-0.5), -normalizer);
  }
};
template <bool kMean, bool kStd>
struct LogProbBackward {
  static constexpr int kInputs = 1 + kMean + kStd, kRowInputs = 1, kOutputs = 1 + kMean + kStd, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    V z = in[0], pull = in[0];
    if constexpr (kMean) pull = z = z - in[1];
    if constexpr (kStd) {
      const V inverse_std = exp(-in[1 + kMean]);
      z = z * inverse_std, pull = z * inverse_std;
      out[1 + kMean] = row[0] * fma(z, z, splat<V>(-1));
    }
    out[0] = -row[0] * pull;
    if constexpr (kMean) out[1] = row[0] * pull;
  }
};

// run(has mean, has log_std) as compile-time constants
template <class Run>
void with_parts(const MaybeTensor& mean, const MaybeTensor& log_std, const Run& run) {
  const auto second = [&](auto has_mean) { log_std ? run(has_mean, std::true_type{}) : run(has_mean, std::false_type{}); };
  mean ? second(std::true_type{}) : second(std::false_type{});
}

struct Inputs {
  std::vector<Rows> rows;
  Inputs(const Tensor& x, const MaybeTensor& mean, const MaybeTensor& log_std) {
    rows.emplace_back(x);
    if (mean) rows.emplace_back(*mean);
    if (log_std) rows.emplace_back(*log_std);
  }
  template <int n>
  Arrays<n> arrays() const {
    Arrays<n> result;
    for (int i = 0; i < n; i++) result[i] = rows[i].array();
    return result;
  }
};

Tensor gaussian_log_prob(Tensor x, MaybeTensor mean, MaybeTensor log_std) {
  const Inputs in(x, mean, log_std);
  ScalarType type = sum_type(x.scalar_type());
  if (mean) type = promote(type, sum_type(mean->scalar_type()));
  if (log_std) type = promote(type, sum_type(log_std->scalar_type()));
  Tensor log_prob = new_tensor(x, {x.size(0)}, type);
  with_parts(mean, log_std, [&](auto has_mean, auto has_std) {
    using F = LogProb<has_mean(), has_std()>;
    run_rows(F{}, in.rows[0].shape(), in.arrays<F::kInputs>(), {}, {}, {per_row(log_prob)}, x);
  });
  return log_prob;
}

std::vector<Tensor> gaussian_log_prob_backward(Tensor grad, Tensor x, MaybeTensor mean, MaybeTensor log_std) {
  const Inputs in(x, mean, log_std);
  std::vector<Tensor> gradients{new_tensor(x, x.sizes())};
  if (mean) gradients.push_back(new_tensor(*mean, mean->sizes()));
  if (log_std) gradients.push_back(new_tensor(*log_std, log_std->sizes()));
  with_parts(mean, log_std, [&](auto has_mean, auto has_std) {
    using F = LogProbBackward<has_mean(), has_std()>;
    Arrays<F::kOutputs> out;
    for (int i = 0; i < F::kOutputs; i++) out[i] = Rows(gradients[i]).array();
    run_rows(F{}, in.rows[0].shape(), in.arrays<F::kInputs>(), {per_row(grad)}, out, {}, x);
  });
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_gaussian_log_prob", TORCH_BOX(&gaussian_log_prob));
  m.impl("_gaussian_log_prob_backward", TORCH_BOX(&gaussian_log_prob_backward));
}

}  // namespace gk
