// reparameterize: z = mu + exp(log_var / 2) eps, and reparameterize_kl: the same with the divergence to the prior in one pass. eps
// comes from the key in registers, in both directions, and is never stored.
#include "latent.h"

namespace gk {
namespace {

// ---- reparameterize

Tensor reparameterize(Tensor mu, MaybeTensor log_var, Tensor key, double low, double high, bool soft) {
  const Moments q(mu, log_var);
  const ScalarType type = log_var ? promote(mu.scalar_type(), log_var->scalar_type()) : mu.scalar_type();
  Tensor z = empty_like_mu(mu, !log_var, type);
  with_types(low, high, soft, false, false, [&](auto clamp, auto, auto) {
    run_rows(Reparameterize<decltype(clamp)>{{}, clamp}, q.shape(), {q.mu(), q.log_var()}, {}, {Rows(z).array()}, {}, mu,
             keys_of(key));
  });
  return z;
}

std::vector<Tensor> reparameterize_backward(Tensor grad, Tensor mu, MaybeTensor log_var, Tensor key, double low, double high,
                                            bool soft) {
  const Moments q(mu, log_var);
  const Rows grad_rows(grad);
  std::vector<Tensor> gradients;
  // Not clamped, the mean's gradient is `grad` itself and the caller's to hand on.
  const bool passes = log_var && !soft && low == -INFINITY && high == INFINITY;
  const MomentsGradient d(mu, log_var, &gradients, passes);
  with_types(low, high, soft, false, false, [&](auto clamp, auto, auto) {
    run_rows(ReparameterizeBackward<decltype(clamp)>{{}, clamp}, q.shape(), {q.mu(), q.log_var(), grad_rows.array()}, {},
             {d.mu(), d.log_var()}, {}, mu, keys_of(key));
  });
  return gradients;
}

// ---- reparameterize_kl

std::tuple<Tensor, Tensor> reparameterize_kl(Tensor mu, MaybeTensor log_var, MaybeTensor prior_mu, MaybeTensor prior_log_var,
                                             Tensor key, double low, double high, bool soft, double free_bits, bool per_element) {
  const Moments q(mu, log_var);
  const auto prior = prior_moments(prior_mu, prior_log_var);
  const ScalarType type = log_var ? promote(mu.scalar_type(), log_var->scalar_type()) : mu.scalar_type();
  Tensor z = empty_like_mu(mu, !log_var, type);
  const int64_t n = q.shape().rows;
  Tensor kl = per_element ? empty_like_mu(mu, !log_var, sum_type(type)) : new_tensor(mu, {n}, sum_type(type));
  with_types(low, high, soft, prior.has_value(), per_element, [&](auto clamp, auto has_prior, auto element) {
    using F = ReparameterizeKl<decltype(clamp), has_prior(), element()>;
    const F f{{}, clamp, free_bits};
    const auto in = arrays_of<F::kInputs>(q, prior);
    if constexpr (element())
      run_rows(f, q.shape(), in, {}, {Rows(z).array(), Rows(kl).array()}, {}, mu, keys_of(key));
    else
      run_rows(f, q.shape(), in, {}, {Rows(z).array()}, {per_row(kl)}, mu, keys_of(key));
  });
  return {z, kl};
}

std::vector<Tensor> reparameterize_kl_backward(Tensor grad_z, Tensor grad_kl, Tensor mu, MaybeTensor log_var, MaybeTensor prior_mu,
                                               MaybeTensor prior_log_var, Tensor key, double low, double high, bool soft,
                                               double free_bits, bool per_element) {
  const Moments q(mu, log_var);
  const auto prior = prior_moments(prior_mu, prior_log_var);
  const Rows grad_z_rows(grad_z);
  std::vector<Tensor> gradients;
  const MomentsGradient d(mu, log_var, &gradients);
  std::optional<MomentsGradient> d_prior;
  if (prior) d_prior.emplace(*prior_mu, prior_log_var, &gradients);
  with_types(low, high, soft, prior.has_value(), per_element, [&](auto clamp, auto has_prior, auto element) {
    using F = ReparameterizeKlBackward<decltype(clamp), has_prior(), element()>;
    const F f{{}, clamp, free_bits};
    Arrays<F::kOutputs> out{d.mu(), d.log_var()};
    if constexpr (has_prior()) out[2] = d_prior->mu(), out[3] = d_prior->log_var();
    if constexpr (element()) {
      const Rows grad_kl_rows(grad_kl);
      const auto in = arrays_of<F::kInputs>(q, prior, grad_z_rows.array(), grad_kl_rows.array());
      run_rows(f, q.shape(), in, {}, out, {}, mu, keys_of(key));
    } else {
      const auto in = arrays_of<F::kInputs>(q, prior, grad_z_rows.array());
      run_rows(f, q.shape(), in, {per_row(grad_kl)}, out, {}, mu, keys_of(key));
    }
  });
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_reparameterize", TORCH_BOX(&reparameterize));
  m.impl("_reparameterize_backward", TORCH_BOX(&reparameterize_backward));
  m.impl("_reparameterize_kl", TORCH_BOX(&reparameterize_kl));
  m.impl("_reparameterize_kl_backward", TORCH_BOX(&reparameterize_kl_backward));
}

}  // namespace gk
