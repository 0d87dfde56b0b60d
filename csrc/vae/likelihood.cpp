// Negative log-likelihoods of the decoders: bernoulli_nll, gaussian_nll, discretized_logistic_nll. Summed over each sample in one
// pass; the backward pass recomputes from the inputs. Formulas: genkern/ops/vae/_likelihood.py.
#include "rows.h"
#include "silu.h"

namespace gk {
namespace {

// ---- functors. in: parameters, then the data; row: the gradient of the sample's sum

struct BernoulliNll {  // softplus(l) - x l = (max(l, 0) - x l) + ln(1 + e), e = e^-|l|: nothing is lost where x is sure of l
  static constexpr int kInputs = 2, kRowInputs = 0, kOutputs = 0, kSums = 1;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    term[0] = linear(in) + log1p_of_unit(exp_of_negative(minus_magnitude(in[0])));
  }
  template <class V>
  GK_FN V linear(const V* in) const {
    return fma(-in[1], in[0], not_below(in[0], 0));
  }
  // A sum of logarithms is one of a product, kept as its distance from 1: all terms are positive, so it is as exact for the
  // smallest e as for the largest. 64 factors of at most 2 do not overflow.
  static constexpr int kGathered = 2;
  template <class V>
  GK_FN void gather(const V* in, const V*, V* chain) const {
    const V e = exp_of_negative(minus_magnitude(in[0]));
    chain[0] = chain[0] + linear(in);
    chain[1] = fma(chain[1], e, chain[1] + e);
  }
  template <class V>
  GK_FN void join(V* chain, const V* other) const {
    chain[0] = chain[0] + other[0];
    chain[1] = fma(chain[1], other[1], chain[1] + other[1]);
  }
  template <class V>
  GK_FN V gathered(const V* chain) const {
    return chain[0] + log1p(chain[1]);
  }
};
struct BernoulliNllBackward {  // sigmoid(l) - x, by silu.h's: at least e^-87, in few instructions
  static constexpr int kInputs = 2, kRowInputs = 1, kOutputs = 1, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    out[0] = row[0] * (logistic(silu_bounded(in[0])) - in[1]);
  }
};

constexpr double kLogTwoPi = 1.8378770664093453;

template <bool kVariance>
struct Gaussian {  // 1/2 ((x - mu)^2 e^-v + v + ln 2 pi)
  static constexpr int kInputs = 2 + kVariance, kRowInputs = 0, kOutputs = 0, kSums = 1;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    const V difference = in[kInputs - 1] - in[0];
    V twice = fma(difference, difference, splat<V>(kLogTwoPi));
    if constexpr (kVariance) twice = fma(difference * difference, exp(-in[1]), in[1] + splat<V>(kLogTwoPi));
    term[0] = twice * 0.5f;
  }
};
template <bool kVariance>
struct GaussianBackward {
  static constexpr int kInputs = 2 + kVariance, kRowInputs = 1, kOutputs = 1 + kVariance, kSums = 0;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    const V difference = in[kInputs - 1] - in[0];
    V pull = difference;
    if constexpr (kVariance) {
      pull = pull * exp(-in[1]);
      out[1] = row[0] * fma(-difference, pull, splat<V>(1)) * 0.5f;
    }
    out[0] = -row[0] * pull;
  }
};

// The bin around x reaches half a level to both sides; the outermost bins reach to infinity.
template <class V>
struct Bin {
  V a, b, d, inverse_scale;
  Mask<V> first, last;
  GK_FN Bin(const V* in, double half) {
    const V x = in[2], h = splat<V>(half);
    inverse_scale = exp(-in[1]);
    a = (x - in[0] + h) * inverse_scale;
    b = (x - in[0] - h) * inverse_scale;
    d = (h + h) * inverse_scale;
    first = x < h - 1.0f;
    last = x > 1.0f - h;
  }
};

struct DiscretizedLogistic {  // softplus(-a) + softplus(b) - ln(1 - e^-d)
  static constexpr int kInputs = 3, kRowInputs = 0, kOutputs = 0, kSums = 1;
  NoNoise noise;
  double half;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    const Bin<V> bin(in, half);
    const V below = bin.last ? V{} : softplus(-bin.a), above = bin.first ? V{} : softplus(bin.b);
    const V inside = log(-expm1(-bin.d, exp(-bin.d)));
    term[0] = below + above - (bin.first || bin.last ? V{} : inside);
  }
};
struct DiscretizedLogisticBackward {
  static constexpr int kInputs = 3, kRowInputs = 1, kOutputs = 2, kSums = 0;
  NoNoise noise;
  double half;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    const Bin<V> bin(in, half);
    const V below = bin.last ? V{} : sigmoid(-bin.a), above = bin.first ? V{} : sigmoid(bin.b);
    const V inside = bin.d / expm1(bin.d, exp(bin.d));
    out[0] = row[0] * bin.inverse_scale * (below - above);
    out[1] = row[0] * ((below * bin.a - above * bin.b) + (bin.first || bin.last ? V{} : inside));
  }
};

// ---- tensors, in the order of the functors' inputs

template <class F, class... More>
Tensor nll(const F& f, const Tensor& first, const More&... more) {
  const Rows rows[] = {Rows(first), Rows(more)...};
  Arrays<F::kInputs> in;
  for (int k = 0; k < F::kInputs; k++) in[k] = rows[k].array();
  ScalarType type = first.scalar_type();
  ((type = promote(type, more.scalar_type())), ...);
  const RowShape shape = rows[0].shape();
  Tensor sums = new_tensor(first, {shape.rows}, sum_type(type));
  run_rows(f, shape, in, {}, {}, {per_row(sums)}, first);
  return sums;
}

template <class F, class... Inputs>
std::vector<Tensor> gradients(const F& f, const Tensor& grad, const Inputs&... inputs) {
  const Tensor* tensors[] = {&inputs...};
  const Rows rows[] = {Rows(inputs)...};
  Arrays<F::kInputs> in;
  Arrays<F::kOutputs> out;
  std::vector<Tensor> all;
  for (int k = 0; k < F::kInputs; k++) in[k] = rows[k].array();
  for (int k = 0; k < F::kOutputs; k++) {
    all.push_back(new_tensor(*tensors[k], tensors[k]->sizes()));
    out[k] = Rows(all[k]).array();
  }
  run_rows(f, rows[0].shape(), in, {per_row(grad)}, out, {}, grad);
  return all;
}

Tensor bernoulli_nll(Tensor logits, Tensor x) { return nll(BernoulliNll{}, logits, x); }
std::vector<Tensor> bernoulli_nll_backward(Tensor grad, Tensor logits, Tensor x) {
  return gradients(BernoulliNllBackward{}, grad, logits, x);
}

Tensor gaussian_nll(Tensor mu, MaybeTensor log_var, Tensor x) {
  return log_var ? nll(Gaussian<true>{}, mu, *log_var, x) : nll(Gaussian<false>{}, mu, x);
}
std::vector<Tensor> gaussian_nll_backward(Tensor grad, Tensor mu, MaybeTensor log_var, Tensor x) {
  return log_var ? gradients(GaussianBackward<true>{}, grad, mu, *log_var, x) : gradients(GaussianBackward<false>{}, grad, mu, x);
}

double half_level(int64_t levels) { return 1.0 / static_cast<double>(levels - 1); }
Tensor discretized_logistic_nll(Tensor mu, Tensor log_scale, Tensor x, int64_t levels) {
  return nll(DiscretizedLogistic{{}, half_level(levels)}, mu, log_scale, x);
}
std::vector<Tensor> discretized_logistic_nll_backward(Tensor grad, Tensor mu, Tensor log_scale, Tensor x, int64_t levels) {
  return gradients(DiscretizedLogisticBackward{{}, half_level(levels)}, grad, mu, log_scale, x);
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_bernoulli_nll", TORCH_BOX(&bernoulli_nll));
  m.impl("_bernoulli_nll_backward", TORCH_BOX(&bernoulli_nll_backward));
  m.impl("_gaussian_nll", TORCH_BOX(&gaussian_nll));
  m.impl("_gaussian_nll_backward", TORCH_BOX(&gaussian_nll_backward));
  m.impl("_discretized_logistic_nll", TORCH_BOX(&discretized_logistic_nll));
  m.impl("_discretized_logistic_nll_backward", TORCH_BOX(&discretized_logistic_nll_backward));
}

}  // namespace gk
