// gaussian_kl: KL(N(mu, e^log_var) || N(prior_mu, e^prior_log_var)) per sample or per element.
#include "latent.h"

namespace gk {
namespace {

Tensor gaussian_kl(Tensor mu, MaybeTensor log_var, MaybeTensor prior_mu, MaybeTensor prior_log_var, double low, double high,
                   bool soft, double free_bits, bool per_element) {
  const Moments q(mu, log_var);
  const auto prior = prior_moments(prior_mu, prior_log_var);
  const ScalarType type = sum_type(log_var ? promote(mu.scalar_type(), log_var->scalar_type()) : mu.scalar_type());
  const int64_t n = q.shape().rows;
  Tensor kl = per_element ? empty_like_mu(mu, !log_var, type) : new_tensor(mu, {n}, type);
  with_types(low, high, soft, prior.has_value(), per_element, [&](auto clamp, auto has_prior, auto element) {
    using F = GaussianKl<decltype(clamp), has_prior(), element()>;
    const F f{{}, clamp, free_bits};
    const auto in = arrays_of<F::kInputs>(q, prior);
    if constexpr (element())
      run_rows(f, q.shape(), in, {}, {Rows(kl).array()}, {}, mu);
    else
      run_rows(f, q.shape(), in, {}, {}, {per_row(kl)}, mu);
  });
  return kl;
}

std::vector<Tensor> gaussian_kl_backward(Tensor grad, Tensor mu, MaybeTensor log_var, MaybeTensor prior_mu,
                                         MaybeTensor prior_log_var, double low, double high, bool soft, double free_bits,
                                         bool per_element) {
  const Moments q(mu, log_var);
  const auto prior = prior_moments(prior_mu, prior_log_var);
  std::vector<Tensor> gradients;
  const MomentsGradient d(mu, log_var, &gradients);
  std::optional<MomentsGradient> d_prior;
  if (prior) d_prior.emplace(*prior_mu, prior_log_var, &gradients);
  with_types(low, high, soft, prior.has_value(), per_element, [&](auto clamp, auto has_prior, auto element) {
    using F = GaussianKlBackward<decltype(clamp), has_prior(), element()>;
    const F f{{}, clamp, free_bits};
    Arrays<F::kOutputs> out{d.mu(), d.log_var()};
    if constexpr (has_prior()) out[2] = d_prior->mu(), out[3] = d_prior->log_var();
    if constexpr (element()) {
      const Rows grad_rows(grad);
      run_rows(f, q.shape(), arrays_of<F::kInputs>(q, prior, grad_rows.array()), {}, out, {}, mu);
    } else {
      run_rows(f, q.shape(), arrays_of<F::kInputs>(q, prior), {per_row(grad)}, out, {}, mu);
    }
  });
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("_gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
}

}  // namespace gk
