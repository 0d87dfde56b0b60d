// total_correlation: the density of every sample under the posterior of every other, reduced over pairs without storing them.
//
// Lanes run over j, the posteriors: their moments lie transposed, padded to whole vectors with posteriors of density zero. For
// sample i and dimension d one sweep makes ln q(z_id|x_jd) in a buffer of one row, the next its exponentials; the joint density
// gathers beside them. The backward pass recomputes both and holds the exponentials of one sample, (D, B) numbers.
#include <limits>

#include "rows.h"

namespace gk {
namespace {

constexpr double kHalfLogTwoPi = 0.91893853320467274;

struct Weights {  // logarithms of w_ii and w_ij
  double own, other;
};

template <class S>
class Pairs {
 public:
  using V = typename Vector<S>::type;
  static constexpr int64_t kCount = Lane<V>::kCount;

  const int64_t samples, dims, padded;

  Pairs(const Tensor& z, const Tensor& mu, const Tensor& log_var, Weights w)
      : samples(z.size(0)),
        dims(z.size(1)),
        padded((samples + kCount - 1) / kCount * kCount),
        weights_(w),
        z_(z),
        mu_(dims * padded, 0),
        half_precision_(dims * padded, 0),
        bias_(dims * padded, -std::numeric_limits<S>::infinity()) {
    const Points m(mu), v(log_var);
    for (int64_t j = 0; j < samples; j++)
      for (int64_t d = 0; d < dims; d++) {
        const S log_variance = at(v.array, j, d);
        mu_[d * padded + j] = at(m.array, j, d);
        half_precision_[d * padded + j] = std::exp(-log_variance) / 2;
        bias_[d * padded + j] = log_variance * S(-0.5) - static_cast<S>(kHalfLogTwoPi);
      }
  }

  S z(int64_t i, int64_t d) const { return at(z_.array, i, d); }

  // For sample i: e[j] of dimension d = w_ij q(z_id|x_jd) / (other e^top) in row d of `e` (one row for all if stride is 0), their
  // sum to each_dimension(d, top, sum); joint[j] = w_ij q(z_i|x_j), likewise scaled. Returns {ln q(z_i|x_i), top and sum of the
  // joint}.
  struct Joint {
    double own, top, sum;
  };
  template <class Each>
  Joint densities(int64_t i, S* joint, S* e, int64_t stride, const Each& each_dimension) const {
    std::fill(joint, joint + samples, S(0));
    std::fill(joint + samples, joint + padded, -std::numeric_limits<S>::infinity());
    for (int64_t d = 0; d < dims; d++, e += stride) {
      const V x = splat<V>(z(i, d));
      const S *m = mu_.data() + d * padded, *h = half_precision_.data() + d * padded, *b = bias_.data() + d * padded;
      V top = splat<V>(-std::numeric_limits<S>::infinity());
      for (int64_t j = 0; j < padded; j += kCount) {
        const V difference = x - load<V>(m + j), log_q = fma(difference * -load<V>(h + j), difference, load<V>(b + j));
        store(e + j, log_q);
        store(joint + j, load<V>(joint + j) + log_q);
        top = log_q > top ? log_q : top;
      }
      const S largest = scalar_top(top);
      each_dimension(d, largest, exponentials(i, e, largest));
    }
    const double own = joint[i];
    V top = splat<V>(-std::numeric_limits<S>::infinity());
    for (int64_t j = 0; j < padded; j += kCount) {
      const V log_q = load<V>(joint + j);
      top = log_q > top ? log_q : top;
    }
    const S largest = scalar_top(top);
    return {own, largest, exponentials(i, joint, largest)};
  }

  // e[j] is the gradient of the loss to ln q(z_id|x_j): adds what it means for mu and log_var to theirs, returns it for z_id.
  double pull_back(int64_t i, int64_t d, const S* g, S* d_mu, S* d_log_var) const {
    const V x = splat<V>(z(i, d));
    const S *m = mu_.data() + d * padded, *h = half_precision_.data() + d * padded;
    V total{};
    for (int64_t j = 0; j < padded; j += kCount) {
      const V difference = x - load<V>(m + j), half_pull = difference * load<V>(h + j), grad = load<V>(g + j);
      const V pull = grad * half_pull * 2.0f;
      store(d_mu + j, load<V>(d_mu + j) + pull);
      store(d_log_var + j, fma(grad, fma(half_pull, difference, splat<V>(-0.5)), load<V>(d_log_var + j)));
      total = total - pull;
    }
    return sum_lanes(total);
  }

 private:
  struct Points {
    explicit Points(const Tensor& x) : rows(x), array(rows.array()) {}
    Rows rows;  // keeps a copy alive
    Array array;
  };
  static S at(const Array& a, int64_t row, int64_t column) { return static_cast<const S*>(a.data)[row * a.row_stride + column]; }
  static S scalar_top(V top) {
    S values[kCount];
    store(values, top);
    for (int64_t half = kCount / 2; half > 0; half /= 2)
      for (int64_t k = 0; k < half; k++) values[k] = std::max(values[k], values[k + half]);
    return values[0];
  }
  double exponentials(int64_t i, S* e, S top) const {
    e[i] += static_cast<S>(weights_.own - weights_.other);
    V total{};
    for (int64_t j = 0; j < padded; j += kCount) {
      const V value = exp(load<V>(e + j) - splat<V>(top));
      store(e + j, value);
      total = total + value;
    }
    return sum_lanes(total);
  }

  const Weights weights_;
  const Points z_;
  std::vector<S> mu_, half_precision_, bias_;  // [dimension][posterior]
};

template <class S>
void forward(const Pairs<S>& pairs, Weights w, const std::array<S*, 3>& out) {
  const int64_t grain = std::max<int64_t>(1, 16 * kTile / std::max<int64_t>(1, pairs.padded * pairs.dims));
  torch::stable::parallel_for(0, pairs.samples, grain, [&](int64_t begin, int64_t end) {
    std::vector<S> joint(pairs.padded), e(pairs.padded);
    for (int64_t i = begin; i < end; i++) {
      double marginals = 0, prior = 0;
      const auto q = pairs.densities(i, joint.data(), e.data(), 0, [&](int64_t d, S top, double sum) {
        const double z = pairs.z(i, d);
        marginals += static_cast<double>(top) + std::log(sum) + w.other;
        prior -= z * z / 2 + kHalfLogTwoPi;
      });
      const double aggregate = q.top + std::log(q.sum) + w.other;
      out[0][i] = static_cast<S>(q.own - aggregate);
      out[1][i] = static_cast<S>(aggregate - marginals);
      out[2][i] = static_cast<S>(marginals - prior);
    }
  });
}

// A unit of work is a fixed part of the samples with sums of its own, so that results do not depend on the number of threads.
template <class S>
void backward(const Pairs<S>& pairs, const std::array<Array, 3>& grads, S* d_z, S* d_mu, S* d_log_var) {
  using V = typename Pairs<S>::V;
  const int64_t n = pairs.samples, dims = pairs.dims, padded = pairs.padded, size = dims * padded;
  const int64_t rows = std::max<int64_t>(8, (n + 15) / 16), units = (n + rows - 1) / rows;
  std::vector<S> partial(units * 2 * size, 0);  // gradients of mu and log_var [unit][which][dimension][posterior]
  torch::stable::parallel_for(0, units, std::max<int64_t>(1, 16 * kTile / (rows * size)), [&](int64_t begin, int64_t end) {
    std::vector<S> joint(padded), e(size), scale(dims);
    for (int64_t i = begin * rows; i < std::min(end * rows, n); i++) {
      S *to_mu = partial.data() + i / rows * 2 * size, *to_log_var = to_mu + size, one;
      const double index_code = *read(grads[0], i, 0, 1, &one), correlation = *read(grads[1], i, 0, 1, &one);
      const double dimensions = *read(grads[2], i, 0, 1, &one);
      const auto q = pairs.densities(i, joint.data(), e.data(), padded, [&](int64_t d, S, double sum) {
        scale[d] = static_cast<S>((dimensions - correlation) / sum);
      });
      const V joint_scale = splat<V>((correlation - index_code) / q.sum);
      for (int64_t d = 0; d < dims; d++) {
        S* g = e.data() + d * padded;
        const V marginal_scale = splat<V>(scale[d]);
        for (int64_t j = 0; j < padded; j += Pairs<S>::kCount)
          store(g + j, fma(load<V>(g + j), marginal_scale, load<V>(joint.data() + j) * joint_scale));
        g[i] += static_cast<S>(index_code);
        const double direct = dimensions * static_cast<double>(pairs.z(i, d));
        d_z[i * dims + d] = static_cast<S>(direct + pairs.pull_back(i, d, g, to_mu + d * padded, to_log_var + d * padded));
      }
    }
  });
  for (int64_t j = 0; j < n; j++)
    for (int64_t d = 0; d < dims; d++) {
      double mu = 0, log_var = 0;
      for (int64_t u = 0; u < units; u++) {
        mu += partial[u * 2 * size + d * padded + j];
        log_var += partial[(u * 2 + 1) * size + d * padded + j];
      }
      d_mu[j * dims + d] = static_cast<S>(mu);
      d_log_var[j * dims + d] = static_cast<S>(log_var);
    }
}

template <class S>
S* data_of(const Tensor& x) {
  return static_cast<S*>(x.data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> total_correlation(Tensor z, Tensor mu, Tensor log_var, double own, double other) {
  const auto make = [&] { return new_tensor(z, {z.size(0)}); };
  const Tensor a = make(), b = make(), c = make();
  const auto run = [&](auto zero) {
    using S = decltype(zero);
    forward<S>(Pairs<S>(z, mu, log_var, {own, other}), {own, other}, {data_of<S>(a), data_of<S>(b), data_of<S>(c)});
  };
  z.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  return {a, b, c};
}

std::vector<Tensor> total_correlation_backward(Tensor grad_0, Tensor grad_1, Tensor grad_2, Tensor z, Tensor mu, Tensor log_var,
                                               double own, double other) {
  const auto make = [&] { return new_tensor(z, z.sizes()); };
  const Tensor d_z = make(), d_mu = make(), d_log_var = make();
  if (z.numel()) {
    const auto run = [&](auto zero) {
      using S = decltype(zero);
      backward<S>(Pairs<S>(z, mu, log_var, {own, other}), {per_row(grad_0), per_row(grad_1), per_row(grad_2)}, data_of<S>(d_z),
                  data_of<S>(d_mu), data_of<S>(d_log_var));
    };
    z.scalar_type() == ScalarType::Double ? run(0.0) : run(0.0f);
  }
  return {d_z, d_mu, d_log_var};
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_total_correlation", TORCH_BOX(&total_correlation));
  m.impl("_total_correlation_backward", TORCH_BOX(&total_correlation_backward));
}

}  // namespace gk
