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

// The sum of term(i) for i in [0, n), in double and in eight chains: one would wait for each addition.
template <class F>
double sum_of_terms(int64_t n, const F& term) {
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int j = 0; j < 8; j++) sums[j] += static_cast<double>(term(i + j));
  for (; i < n; i++) sums[0] += static_cast<double>(term(i));
  return ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}
template <class S>
S number(const Array& a, int64_t at) {
  S one;
  return *read(a, 0, at, 1, &one);
}
// Numbers [at, at + n) of an array in double; `absent` where it has no data.
template <class S>
void numbers(const Array& a, int64_t at, int64_t n, double absent, double* to) {
  if (a.data == nullptr) {
    std::fill_n(to, n, absent);
    return;
  }
  S buffer[kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i);
    const S* from = read(a, 0, at + i, count, buffer);
    for (int64_t j = 0; j < count; j++) to[i + j] = static_cast<double>(from[j]);
  }
}
// The reverse: value(i) for i in [0, n) goes to at + i.
template <class S, class F>
void put(const Array& a, int64_t at, int64_t n, const F& value) {
  if (a.data == nullptr) return;
  S buffer[kTile];
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t count = std::min(kTile, n - i);
    S* to = place(a, 0, at + i, buffer);
    for (int64_t j = 0; j < count; j++) to[j] = static_cast<S>(value(i + j));
    if (to == buffer) write(a, 0, at + i, to, count);
  }
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

// What neighbouring channels of one sample are mapped by: z = a (u - centre) + b.
template <class S>
class Affine {
  const int64_t room_;
  std::vector<double> wide_;
  std::vector<S> narrow_;
  double* const shift_ = wide_.data();

 public:
  explicit Affine(int64_t channels)
      : room_(channels), wide_(static_cast<size_t>(4 * channels)), narrow_(static_cast<size_t>(2 * channels)) {}
  Affine(const Affine&) = delete;  // pointers lead into the vectors
  Affine(Affine&&) = default;
  double *const weight = shift_ + room_, *const bias = weight + room_, *const gain = bias + room_;  // gain = 1 + scale
  S *const a = narrow_.data(), *const b = a + room_;

  void read_channels(const GroupNorm& job, int64_t sample, int64_t first, int64_t n) {
    const int64_t row = sample * job.channels + first;
    numbers<S>(job.weight, first, n, 1, weight);
    numbers<S>(job.bias, first, n, 0, bias);
    numbers<S>(job.scale, row, n, 0, gain);
    numbers<S>(job.shift, row, n, 0, shift_);
    for (int64_t c = 0; c < n; c++) gain[c] += 1;
  }
  void normalise(const Statistics<S>& s, int64_t begin, int64_t end) {  // channels [begin, end) of those read
    const double rest = s.rest();
    for (int64_t c = begin; c < end; c++) {
      const double factor = s.rstd * weight[c] * gain[c];
      a[c] = static_cast<S>(factor);
      b[c] = static_cast<S>(bias[c] * gain[c] + shift_[c] - rest * factor);
    }
  }
};

// What follows from the sums over pixels in d.sums: of one group, whose numbers stand in `affine` from `first` on and whose sums
// from `row` on, the gradients per sample and channel; returns the means over the group of g = dz gain weight, the gradient of
// xhat, and of g xhat.
template <class S>
std::pair<double, double> put_channel_gradients(const GroupNorm& job, const GroupNormGradients& d, const Statistics<S>& s,
                                                const Affine<S>& affine, int64_t first, int64_t row) {
  const int64_t rows = job.samples * job.channels, n = job.channels_per_group();
  const double *const sum_dz = d.sums + row, *const sum_dz_xhat = sum_dz + rows, *const sum_xhat = sum_dz_xhat + rows;
  const double *const weight = affine.weight + first, *const bias = affine.bias + first, *const gain = affine.gain + first;
  const auto mean = [&](const double* sum) {
    return sum_of_terms(n, [&](int64_t c) { return gain[c] * weight[c] * sum[c]; }) / static_cast<double>(n * job.pixels);
  };
  const double mean_g = mean(sum_dz), mean_g_xhat = mean(sum_dz_xhat);
  put<S>(d.shift, row, n, [&](int64_t c) { return sum_dz[c]; });
  put<S>(d.scale, row, n, [&](int64_t c) { return weight[c] * sum_dz_xhat[c] + bias[c] * sum_dz[c]; });
  put<S>(d.pre_bias, row, n, [&](int64_t c) {
    const double of_pixels = mean_g * static_cast<double>(job.pixels) + mean_g_xhat * sum_xhat[c];
    return s.rstd * (gain[c] * weight[c] * sum_dz[c] - of_pixels);
  });
  return {mean_g, mean_g_xhat};
}

// Of all samples, the gradients of weight and bias.
template <class S>
void put_parameter_gradients(const GroupNorm& job, const GroupNormGradients& d) {
  if (!d.weight.data && !d.bias.data) return;
  const int64_t channels = job.channels;
  const double *const sum_dz = d.sums, *const sum_dz_xhat = d.sums + job.samples * channels;
  std::vector<double> scale(static_cast<size_t>(channels)), weight(scale), bias(scale);
  for (int64_t row = 0; row < job.samples * channels; row += channels) {
    numbers<S>(job.scale, row, channels, 0, scale.data());
    for (int64_t c = 0; c < channels; c++) {
      const auto at = static_cast<size_t>(c);
      weight[at] += (1 + scale[at]) * sum_dz_xhat[row + c], bias[at] += (1 + scale[at]) * sum_dz[row + c];
    }
  }
  put<S>(d.weight, 0, channels, [&](int64_t c) { return weight[static_cast<size_t>(c)]; });
  put<S>(d.bias, 0, channels, [&](int64_t c) { return bias[static_cast<size_t>(c)]; });
}

}  // namespace gk
