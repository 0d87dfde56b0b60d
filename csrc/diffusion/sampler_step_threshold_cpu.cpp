// dynamic_threshold on the CPU: a quantile of |y| per sample without sorting. One pass makes |y| and counts what exceeds 1; where
// that is no more than the quantile leaves out, the bound is 1. Else the values are counted by their leading bits, which order as
// they do.
#include <algorithm>

#include "sampler_step.h"

namespace gk {
namespace {

struct ThresholdJob {
  Array x, u, c, table, moments;  // c.data null: one output
  RowShape shape;
  AdaptiveGuidance guidance;
  bool adaptive;
  double quantile, max;
};

// |y| of one sample; returns how many exceed 1.
template <class S>
int64_t magnitudes(const ThresholdJob& job, int64_t sample, S* to) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  alignas(64) S buffers[3][kTile], table_buffer[4], moment_buffer[5];
  const S* row = read(job.table, looked_up(job.table, sample), 0, 4, table_buffer);
  const V g_u = splat<V>(row[0]), g_c = splat<V>(row[1]), a = splat<V>(row[2]), b = splat<V>(row[3]);
  S on_c = 0, on_d = 0;
  if (job.adaptive) {
    const S* m = read(job.moments, sample, 0, 5, moment_buffer);
    job.guidance.weights<S>(row[1], {m[0], m[1], m[2], m[3], m[4]}, on_c, on_d);
  }
  const V zero = {}, one = splat<V>(1);
  V above = {};
  int64_t total = 0;
  for (int64_t column = 0; column < job.shape.width; column += kTile) {
    const int64_t n = std::min(kTile, job.shape.width - column);
    const S* x = read(job.x, sample, column, n, buffers[0]);
    const S* u = read(job.u, sample, column, n, buffers[1]);
    const S* c = job.c.data ? read(job.c, sample, column, n, buffers[2]) : u;
    const auto one_vector = [&](V x_lane, V m, V c_lane) {
      if (job.adaptive)
        m = fma(splat<V>(on_c), c_lane, splat<V>(on_d) * (c_lane - m));
      else if (job.c.data)
        m = fma(g_u, m, g_c * c_lane);
      V y = fma(a, x_lane, b * m);
      y = y < zero ? -y : y;
      above = above + (y > one ? one : zero);
      return y;
    };
    int64_t i = 0;
    for (; i + kCount <= n; i += kCount) store(to + column + i, one_vector(load<V>(x + i), load<V>(u + i), load<V>(c + i)));
    if (i < n) {  // lanes beyond the end are 0
      const int rest = static_cast<int>(n - i);
      const V y = one_vector(load_first(x + i, rest, V{}), load_first(u + i, rest, V{}), load_first(c + i, rest, V{}));
      store_first(to + column + i, y, rest);
    }
    total += static_cast<int64_t>(sum_lanes(above) + 0.5);
    above = V{};
  }
  return total;
}

template <class S>
double threshold(const ThresholdJob& job, S* values, int64_t above) {
  using B = typename Lane<S>::Uint;
  constexpr int kShift = 8 * sizeof(B) - 12;  // the sign is 0: 11 bits lead
  const int64_t n = job.shape.width;
  const double at = job.quantile * static_cast<double>(n - 1);
  const int64_t low = static_cast<int64_t>(at), high = std::min(low + 1, n - 1);
  if (high < n - above) return 1;
  std::vector<int64_t> counts(2048);
  const auto bits = [&](int64_t i) {
    B b;
    memcpy(&b, values + i, sizeof(B));
    return static_cast<B>(b & ~(B{1} << (8 * sizeof(B) - 1)));
  };
  for (int64_t i = 0; i < n; i++) counts[bits(i) >> kShift]++;
  int64_t below = 0;
  B first = 0;
  while (below + counts[first] <= low) below += counts[first++];
  std::vector<B> rest;
  rest.reserve(n - below);
  for (int64_t i = 0; i < n; i++)
    if (bits(i) >> kShift >= first) rest.push_back(bits(i));
  const auto middle = rest.begin() + (low - below);
  std::nth_element(rest.begin(), middle, rest.end());
  const B next = high > low ? *std::min_element(middle + 1, rest.end()) : *middle;
  S lower, upper;
  memcpy(&lower, &*middle, sizeof(S));
  memcpy(&upper, &next, sizeof(S));
  const S found = lower + static_cast<S>(at - static_cast<double>(low)) * (upper - lower);
  return found < 1 ? 1 : found > job.max ? job.max : found;
}

template <class S>
void thresholds(const ThresholdJob& job, S* out) {
  torch::stable::parallel_for(0, job.shape.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<S> values(job.shape.width + 16);
    for (int64_t sample = begin; sample < end; sample++)
      out[sample] = static_cast<S>(threshold(job, values.data(), magnitudes(job, sample, values.data())));
  });
}

Tensor dynamic_threshold(Tensor x, Tensor model_output, Tensor table, MaybeTensor steps, int64_t step, MaybeTensor moments,
                         double rescale, double parallel, double max_norm, double quantile, double max) {
  const Rows samples(x), raw(model_output);
  const RowShape shape = samples.shape();
  Tensor bound = new_tensor(x, {shape.rows}, sum_type(x.scalar_type()));
  ThresholdJob job{samples.array(),     raw.array(), {}, table_rows(table, steps, step), {}, shape, {},
                   moments.has_value(), quantile,    max};
  if (model_output.size(0) != x.size(0)) job.c = samples_from(job.u, shape.rows);
  if (moments) job.moments = Rows(*moments).array();
  job.guidance = {rescale, parallel, max_norm, static_cast<double>(std::max<int64_t>(1, shape.width))};
  if (shape.rows == 0) return bound;
  if (shape.width == 0)
    torch::stable::fill_(bound, 1.0);
  else if (samples.array().storage == Storage::kDouble)
    thresholds(job, static_cast<double*>(bound.data_ptr()));
  else
    thresholds(job, static_cast<float*>(bound.data_ptr()));
  return bound;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_dynamic_threshold", TORCH_BOX(&dynamic_threshold)); }

}  // namespace gk
