// The diagonal Gaussian latent of a variational autoencoder (Kingma & Welling, 2014): its clamp, its Kullback-Leibler divergence to
// a standard or a learned Gaussian prior, and their derivatives, per element.
#pragma once
#include "rows.h"

namespace gk {

// ---- clamps of (mu, log_var): value and derivative

struct HardClamp {  // log_var to [low, high]; no clamp is (-inf, inf). The gradient is zero outside
  double low, high;
  template <class V>
  GK_FN void operator()(V* mu, V* log_var, V* d_mu, V* d_log_var) const {
    const V raw = *log_var;
    V v = raw < splat<V>(low) ? splat<V>(low) : raw;  // this order of operands keeps NaN
    v = v > splat<V>(high) ? splat<V>(high) : v;
    *log_var = v;
    *d_mu = splat<V>(1);
    *d_log_var = raw == v ? splat<V>(1) : V{};
    (void)mu;
  }
};

struct SoftClamp {  // NVAE (Vahdat & Kautz, 2020): 5 tanh(x / 5) on the mean and on the log standard deviation
  template <class V>
  GK_FN void operator()(V* mu, V* log_var, V* d_mu, V* d_log_var) const {
    const V s = tanh(*mu * splat<V>(1.0 / 5)), t = tanh(*log_var * splat<V>(1.0 / 10));
    *mu = s * 5.0f;
    *log_var = t * 10.0f;
    *d_mu = 1.0f - s * s;
    *d_log_var = 1.0f - t * t;
  }
};

template <class Clamp, class V>
struct Posterior {
  V mu, log_var, d_mu, d_log_var;  // clamped, and the derivatives of the clamp
  GK_FN Posterior(const Clamp& clamp, V raw_mu, V raw_log_var) : mu(raw_mu), log_var(raw_log_var) {
    clamp(&mu, &log_var, &d_mu, &d_log_var);
  }
};

// ---- divergence: 1/2 (q + e^d - 1 - d), with q = (mu - prior_mu)^2 e^-prior_log_var and d = log_var - prior_log_var

template <bool kPrior, class V>
struct Divergence {
  V precision, difference, d, exp_d;
  GK_FN Divergence(V mu, V log_var, V sigma, const V* prior) {
    if constexpr (kPrior) {
      precision = exp(-prior[1]);
      difference = mu - prior[0];
      d = log_var - prior[1];
      exp_d = exp(d);
    } else {
      precision = splat<V>(1);
      difference = mu;
      d = log_var;
      exp_d = sigma * sigma;  // one exponential serves the sample and the divergence
    }
  }
  GK_FN V squares() const { return kPrior ? difference * difference * precision : difference * difference; }
  GK_FN V value() const { return (squares() + expm1_tail(d, exp_d)) * 0.5f; }
  GK_FN V at_least(double free_bits) const {
    const V kl = value();
    return kl < splat<V>(free_bits) ? splat<V>(free_bits) : kl;
  }
  GK_FN V gradient_above(double free_bits, V grad) const {  // of at_least
    if (free_bits == 0) return grad;
    return value() < splat<V>(free_bits) ? V{} : grad;
  }
};

// Gradients of one element's divergence times g, added to d_mu and d_log_var of the clamped posterior; the prior's are written.
template <bool kPrior, class V>
GK_FN void add_divergence_gradient(const Divergence<kPrior, V>& kl, V g, V* d_mu, V* d_log_var, V* d_prior) {
  const V pull = kPrior ? kl.difference * kl.precision : kl.difference, stretch = expm1(kl.d, kl.exp_d) * 0.5f;
  *d_mu = fma(g, pull, *d_mu);
  *d_log_var = fma(g, stretch, *d_log_var);
  if constexpr (kPrior) {
    d_prior[0] = -g * pull;
    d_prior[1] = -g * (stretch + kl.squares() * 0.5f);
  }
}

// ---- functors. in: mu, log_var[, prior_mu, prior_log_var], then element gradients; row: gradients per row

template <class Clamp>
struct Reparameterize {  // z = mu + exp(log_var / 2) eps
  static constexpr int kInputs = 2, kRowInputs = 0, kOutputs = 1, kSums = 0;
  Normal noise;
  Clamp clamp;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V eps, V* out, V*) const {
    const Posterior<Clamp, V> q(clamp, in[0], in[1]);
    out[0] = fma(exp(q.log_var * 0.5f), eps, q.mu);
  }
};

template <class Clamp>
struct ReparameterizeBackward {
  static constexpr int kInputs = 3, kRowInputs = 0, kOutputs = 2, kSums = 0;
  Normal noise;
  Clamp clamp;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V eps, V* out, V*) const {
    const Posterior<Clamp, V> q(clamp, in[0], in[1]);
    const V grad = in[2];
    out[0] = grad * q.d_mu;
    out[1] = grad * exp(q.log_var * 0.5f) * eps * q.d_log_var * 0.5f;
  }
};

// kPerElement: the divergence is an output (and its gradient an input) per element, otherwise a sum (a number) per row.
template <class Clamp, bool kPrior, bool kPerElement>
struct GaussianKl {
  static constexpr int kInputs = kPrior ? 4 : 2, kRowInputs = 0, kOutputs = kPerElement, kSums = !kPerElement;
  NoNoise noise;
  Clamp clamp;
  double free_bits;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V* out, V* term) const {
    const Posterior<Clamp, V> q(clamp, in[0], in[1]);
    const V sigma = kPrior ? V{} : exp(q.log_var * 0.5f);
    *(kPerElement ? out : term) = Divergence<kPrior, V>(q.mu, q.log_var, sigma, in + 2).at_least(free_bits);
  }
};

template <class Clamp, bool kPrior, bool kPerElement>
struct GaussianKlBackward {
  static constexpr int kInputs = (kPrior ? 4 : 2) + kPerElement, kRowInputs = !kPerElement, kOutputs = kPrior ? 4 : 2, kSums = 0;
  NoNoise noise;
  Clamp clamp;
  double free_bits;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V, V* out, V*) const {
    const Posterior<Clamp, V> q(clamp, in[0], in[1]);
    const Divergence<kPrior, V> kl(q.mu, q.log_var, kPrior ? V{} : exp(q.log_var * 0.5f), in + 2);
    const V grad = kPerElement ? in[kInputs - 1] : row[0];
    out[0] = out[1] = V{};
    add_divergence_gradient(kl, kl.gradient_above(free_bits, grad), out, out + 1, out + 2);
    out[0] = out[0] * q.d_mu;
    out[1] = out[1] * q.d_log_var;
  }
};

template <class Clamp, bool kPrior, bool kPerElement>
struct ReparameterizeKl {
  static constexpr int kInputs = kPrior ? 4 : 2, kRowInputs = 0, kOutputs = 1 + kPerElement, kSums = !kPerElement;
  Normal noise;
  Clamp clamp;
  double free_bits;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V eps, V* out, V* term) const {
    const Posterior<Clamp, V> q(clamp, in[0], in[1]);
    const V sigma = exp(q.log_var * 0.5f);
    out[0] = fma(sigma, eps, q.mu);
    *(kPerElement ? out + 1 : term) = Divergence<kPrior, V>(q.mu, q.log_var, sigma, in + 2).at_least(free_bits);
  }
};

template <class Clamp, bool kPrior, bool kPerElement>
struct ReparameterizeKlBackward {
  static constexpr int kGrad = kPrior ? 4 : 2;  // position of the gradient of z
  static constexpr int kInputs = kGrad + 1 + kPerElement, kRowInputs = !kPerElement, kOutputs = kGrad, kSums = 0;
  Normal noise;
  Clamp clamp;
  double free_bits;
  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    const Posterior<Clamp, V> q(clamp, in[0], in[1]);
    const V sigma = exp(q.log_var * 0.5f);
    const Divergence<kPrior, V> kl(q.mu, q.log_var, sigma, in + 2);
    const V grad = kPerElement ? in[kGrad + 1] : row[0];
    out[0] = in[kGrad];
    out[1] = in[kGrad] * sigma * eps * 0.5f;
    add_divergence_gradient(kl, kl.gradient_above(free_bits, grad), out, out + 1, out + 2);
    out[0] = out[0] * q.d_mu;
    out[1] = out[1] * q.d_log_var;
  }
};

// ---- tensors

// Mean and log-variance as rows, from two tensors or from the two halves (N, 2C, ...) of one along dimension 1.
class Moments {
 public:
  Moments(const Tensor& mu, const MaybeTensor& log_var) : first_(mu) {
    if (log_var) second_.emplace(*log_var);
  }
  RowShape shape() const {
    const RowShape s = first_.shape();
    return second_ ? s : RowShape{s.rows, s.width / 2};
  }
  Array mu() const { return first_.array(); }
  Array log_var() const { return second_ ? second_->array() : first_.columns(shape().width); }

 private:
  Rows first_;
  std::optional<Rows> second_;
};

// A new tensor of the shape of mu (its first half if it holds both moments).
inline Tensor empty_like_mu(const Tensor& mu, bool both, ScalarType type) {
  const auto sizes = mu.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  if (both) shape[1] /= 2;
  return new_tensor(mu, shape, type);
}

// Gradients in the order of the arguments: one tensor for each that is there, but none for a mean whose gradient passes.
class MomentsGradient {
 public:
  MomentsGradient(const Tensor& mu, const MaybeTensor& log_var, std::vector<Tensor>* all, bool passes = false) : passes_(passes) {
    const auto add = [&](const Tensor& like) {
      all->push_back(new_tensor(like, like.sizes()));
      return all->back();
    };
    const Tensor first = add(passes ? *log_var : mu);
    rows_.emplace(first, passes ? first : log_var ? MaybeTensor(add(*log_var)) : MaybeTensor());
  }
  Array mu() const { return passes_ ? Array{} : rows_->mu(); }
  Array log_var() const { return rows_->log_var(); }

 private:
  bool passes_;
  std::optional<Moments> rows_;
};

// run(clamp, std::bool_constant<prior>, std::bool_constant<per element>) with the types that the arguments ask for.
template <class Run>
void with_types(double low, double high, bool soft, bool prior, bool per_element, const Run& run) {
  const auto with_clamp = [&](auto clamp) {
    const auto with_prior = [&](auto has_prior) {
      per_element ? run(clamp, has_prior, std::true_type{}) : run(clamp, has_prior, std::false_type{});
    };
    prior ? with_prior(std::true_type{}) : with_prior(std::false_type{});
  };
  soft ? with_clamp(SoftClamp{}) : with_clamp(HardClamp{low, high});
}

template <int n, class... More>
Arrays<n> arrays_of(const Moments& q, const std::optional<Moments>& prior, More... more) {
  Arrays<n> all{q.mu(), q.log_var()};
  int at = 2;
  if (prior) all[at++] = prior->mu(), all[at++] = prior->log_var();
  ((all[at++] = more), ...);
  return all;
}

inline std::optional<Moments> prior_moments(const MaybeTensor& mu, const MaybeTensor& log_var) {
  return mu ? std::optional<Moments>(std::in_place, *mu, log_var) : std::nullopt;
}

}  // namespace gk
