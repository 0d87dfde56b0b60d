// The forward process x_t = alpha x0 + sigma eps, and what a model of it predicts: a mixture of x0 and eps.
#pragma once
#include "rows.h"

namespace gk {

struct Target {  // (on_x0 + sigma_on_x0 sigma) x0 + (on_eps + alpha_on_eps alpha) eps
  float on_x0, sigma_on_x0, on_eps, alpha_on_eps;
  template <class V>
  GK_FN V x0_factor(V sigma) const {
    return sigma * splat<V>(sigma_on_x0) + splat<V>(on_x0);
  }
  template <class V>
  GK_FN V of(V x0, V eps, V alpha, V sigma) const {
    return fma(x0_factor(sigma), x0, (alpha * splat<V>(alpha_on_eps) + splat<V>(on_eps)) * eps);
  }
};

inline Target target_of(int64_t index) {  // the order of TARGETS in _q_sample.py
  constexpr Target kTargets[] = {{0, 0, 1, 0}, {1, 0, 0, 0}, {0, -1, 0, 1}, {-1, 0, 1, 0}};
  return kTargets[index];
}

}  // namespace gk
