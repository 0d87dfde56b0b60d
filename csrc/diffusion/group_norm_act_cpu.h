// What both layouts of group_norm_act on the CPU share: vectors with a last one that is not full, and the numbers of a channel.
#pragma once
#include "group_norm_act.h"

#define GK_INLINE __attribute__((always_inline))

namespace gk {

template <class S>
using VectorOf = typename Vector<S>::type;

template <class V>
GK_FN V load_part(const Scalar<V>* p, int count) {
  return count == Lane<V>::kCount ? load<V>(p) : load_first(p, count, V{});
}
template <class V>
GK_FN void store_part(Scalar<V>* p, V x, int count) {
  if (count == Lane<V>::kCount)
    store(p, x);
  else
    store_first(p, x, count);
}
template <class V, class F>
GK_FN void each_vector(int64_t n, const F& f) {  // f(start, count): count is a constant but for the last call
  constexpr int kCount = Lane<V>::kCount;
  int64_t i = 0;
  for (; i + kCount <= n; i += kCount) f(i, kCount);
  if (i < n) f(i, static_cast<int>(n - i));
}

template <class S>
S number(const Array& a, int64_t at, double absent) {
  S one;
  return a.data ? *read(a, 0, at, 1, &one) : static_cast<S>(absent);
}
inline void put(const Array& a, int64_t at, double x) {
  if (a.data == nullptr) return;
  if (a.storage == Storage::kDouble || a.storage == Storage::kFloat) return write_sum({a.data, 1, a.storage}, at, x);
  const float one = static_cast<float>(x);
  write(a, 0, at, &one, 1);
}

// Count, mean and sum of squares around it of some numbers.
struct Moments {
  double count = 0, mean = 0, centred = 0;
  void merge(const Moments& other) {  // Chan et al., 1979
    const double total = count + other.count, delta = other.mean - mean;
    mean += delta * other.count / total;
    centred += other.centred + delta * delta * count * other.count / total;
    count = total;
  }
};

template <class S>
struct Statistics {
  double mean, rstd;
  Statistics(const Moments& m, double eps) : mean(m.mean), rstd(1 / std::sqrt(std::max(0.0, m.centred) / m.count + eps)) {
    if (std::isnan(m.centred)) rstd = m.centred;
  }
  S centre() const { return static_cast<S>(mean); }  // subtracted first: exact where it matters
  double rest() const { return mean - static_cast<double>(centre()); }
};

// z = a (u - centre) + b for one channel of a sample.
template <class S>
struct Affine {
  double gain, weight, bias, a, b;
  Affine(const GroupNorm& job, const Statistics<S>& s, int64_t sample, int64_t channel) {
    const int64_t row = sample * job.channels + channel;
    gain = 1 + static_cast<double>(number<S>(job.scale, row, 0));
    weight = number<S>(job.weight, channel, 1), bias = number<S>(job.bias, channel, 0);
    a = s.rstd * weight * gain;
    b = bias * gain + number<S>(job.shift, row, 0) - s.rest() * a;
  }
};

// Gradients of weight and bias from the sums over samples of those of dz and dz xhat per channel, (samples, channels) each.
template <class S>
void put_parameter_gradients(const GroupNorm& job, const GroupNormGradients& d, const double* sum_dz, const double* sum_dz_xhat) {
  for (int64_t channel = 0; channel < job.channels && (d.weight.data || d.bias.data); channel++) {
    double weight = 0, bias = 0;
    for (int64_t row = channel; row < job.samples * job.channels; row += job.channels) {
      const double gain = 1 + static_cast<double>(number<S>(job.scale, row, 0));
      weight += gain * sum_dz_xhat[row], bias += gain * sum_dz[row];
    }
    put(d.weight, channel, weight);
    put(d.bias, channel, bias);
  }
}

}  // namespace gk
