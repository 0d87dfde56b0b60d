// sample_tokens: one draw per row from a softmax restricted by a threshold on the score, without sorting.
//
// With a = (greatest logit - logit) / temperature >= 0 every filter says "keep a <= threshold". top-k and top-p ask for the least
// threshold below which lie k tokens, or a share p of the weight e^-a: it is found by cutting an interval in four, then, among the
// tokens left in it, by bisection on the bits of the float, whose order is that of non-negative floats.
#include <cmath>
#include <limits>

#include "rows.h"

namespace gk {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kBlock = 256 * kLanes;  // a lane adds at most 256 numbers in float before the total continues in double
constexpr int64_t kFew = 2048;            // few enough to bisect at once

struct Ones {
  lane_f32 operator()(int64_t, lane_f32 keep) const { return keep; }
};
struct Weights {
  const float* w;
  lane_f32 operator()(int64_t i, lane_f32 keep) const { return keep * load<lane_f32>(w + i); }
};

// out[j] = the sum of what lies at a <= threshold[j]. n is a multiple of kLanes; the padding has a = infinity and weight zero.
template <int count, class Measure>
void mass_below(const float* a, int64_t n, const Measure& measure, const float* threshold, double* out) {
  for (int j = 0; j < count; j++) out[j] = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    lane_f32 total[count] = {};
    for (int64_t i = begin; i < end; i += kLanes) {
      const lane_f32 x = load<lane_f32>(a + i);
      for (int j = 0; j < count; j++) total[j] += measure(i, x <= splat<lane_f32>(threshold[j]) ? splat<lane_f32>(1) : lane_f32{});
    }
    for (int j = 0; j < count; j++) out[j] += sum_lanes(total[j]);
  }
}

struct Scratch {
  std::vector<float> logits, a, w, few_a, few_w;
  std::vector<double> blocks;
  explicit Scratch(int64_t n) : logits(n), a(n), w(n), few_a(n), few_w(n), blocks((n + kBlock - 1) / kBlock) {}
};

// Copies what lies in (low, high], which is usually little, and pads; returns how much, in whole lanes.
int64_t gather(const float* a, const float* w, int64_t n, float low, float high, Scratch& scratch) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const lane_f32 x = load<lane_f32>(a + i);
    const lane_i32 inside = (x > low) & (x <= high);
    uint64_t any = 0, words[kLanes / 2];
    memcpy(words, &inside, sizeof(words));
    for (uint64_t word : words) any |= word;
    if (!any) continue;
    for (int64_t j = i; j < i + kLanes; j++) {
      scratch.few_a[count] = a[j];
      scratch.few_w[count] = w[j];
      count += a[j] > low && a[j] <= high;
    }
  }
  for (; count % kLanes; count++) scratch.few_a[count] = kInfinity, scratch.few_w[count] = 0;
  return count;
}

// The least threshold in (-1, high] with at least `target` below it, given that `high` has. Scratch: for what is left.
template <class Make>
float least_threshold(const float* a, const float* w, int64_t n, float high, double target, const Make& make, Scratch& scratch) {
  float low = -1;
  double base = 0;  // what lies at or below low and was left behind
  if (n > kFew) {
    for (int pass = 0; pass < 3; pass++) {
      const float bottom = std::max(low, 0.0f), step = (high - bottom) * 0.25f;
      const float cuts[3] = {bottom + step, bottom + 2 * step, bottom + 3 * step};
      double mass[3];
      mass_below<3>(a, n, make(w), cuts, mass);
      for (int j = 2; j >= 0; j--)
        if (mass[j] >= target) high = cuts[j];
      for (int j = 0; j < 3; j++)
        if (mass[j] < target && cuts[j] < high) low = cuts[j], base = mass[j];
    }
    n = gather(a, w, n, low, high, scratch);
    a = scratch.few_a.data(), w = scratch.few_w.data();
  }
  int32_t below = low < 0 ? -1 : bitcast<int32_t>(low), above = bitcast<int32_t>(high);
  while (above - below > 1) {
    const int32_t middle = below + (above - below) / 2;
    const float cut = bitcast<float>(middle);
    double mass;
    mass_below<1>(a, n, make(w), &cut, &mass);
    if (base + mass >= target)
      above = middle;
    else
      below = middle;
  }
  return bitcast<float>(above);
}

struct Filter {
  float inverse_temperature;
  int64_t top_k;
  double top_p;
  float highest;  // of a, from min_p
  bool sequential;
};

int64_t draw(const Array& logits, int64_t row, int64_t n, float uniform, const Filter& filter, Scratch& scratch) {
  const float* x = read(logits, row, 0, n, scratch.logits.data());
  lane_f32 tops = splat<lane_f32>(-kInfinity);
  lane_i32 unordered = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const lane_f32 v = load<lane_f32>(x + i);
    tops = v > tops ? v : tops;
    unordered |= v != v;
  }
  float top = -kInfinity;
  bool nan = false;
  for (int j = 0; j < kLanes; j++) top = std::max(top, tops[j]), nan |= unordered[j] != 0;
  for (; i < n; i++) top = x[i] > top ? x[i] : top, nan |= x[i] != x[i];
  if (nan || !std::isfinite(top)) return -1;
  if (filter.inverse_temperature == 0) {
    for (i = 0; x[i] != top; i++) {
    }
    return i;
  }

  float *a = scratch.a.data(), *w = scratch.w.data();
  double total = 0;
  lane_f32 farthest = {};
  const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    lane_f32 sum = {};
    for (i = begin; i < std::min(n, begin + kBlock); i += kLanes) {
      const int rest = static_cast<int>(std::min<int64_t>(kLanes, n - i));
      const lane_f32 v = rest == kLanes ? load<lane_f32>(x + i) : load_first(x + i, rest, lane_f32{});
      const lane_f32 score = (v - splat<lane_f32>(top)) * splat<lane_f32>(filter.inverse_temperature);
      const lane_f32 weight = rest == kLanes ? exp(score) : keep_first(exp(score), rest);
      store(a + i, -score);
      store(w + i, weight);
      sum += weight;
      farthest = -score > farthest && -score < splat<lane_f32>(104) ? -score : farthest;  // beyond, the weight is zero
    }
    total += sum_lanes(sum);
  }
  for (i = n; i < padded; i++) a[i] = kInfinity;

  float high = filter.highest;
  const auto ones = [](const float*) { return Ones{}; };
  const auto weights = [](const float* p) { return Weights{p}; };
  if (filter.top_k || filter.top_p < 1) {
    float end = 0;
    for (int j = 0; j < kLanes; j++) end = std::max(end, farthest[j]);
    if (filter.top_k) {
      double within;  // fewer than k may have a weight at all
      mass_below<1>(a, padded, Ones{}, &end, &within);
      if (within >= static_cast<double>(filter.top_k)) {
        high = std::min(high, least_threshold(a, w, padded, end, static_cast<double>(filter.top_k), ones, scratch));
      }
    }
    if (filter.top_p < 1) {
      if (filter.sequential && filter.top_k) {
        end = std::min(end, high);
        mass_below<1>(a, padded, Weights{w}, &end, &total);
      }
      high = std::min(high, least_threshold(a, w, padded, end, filter.top_p * total, weights, scratch));
    }
  }

  double sum = 0;
  for (int64_t begin = 0; begin < padded; begin += kBlock) {
    double& block = scratch.blocks[begin / kBlock];
    mass_below<1>(a + begin, std::min(padded - begin, kBlock), Weights{w + begin}, &high, &block);
    sum += block;
  }
  const double target = static_cast<double>(uniform) * sum;
  int64_t first = 0,
          chosen = 0;  // the block that holds the answer: the last with a weight, should rounding let none reach the target
  double before = 0, running = 0;
  for (int64_t begin = 0; begin < n && running <= target; begin += kBlock) {
    const double block = scratch.blocks[begin / kBlock];
    if (block > 0) first = begin, before = running;
    running += block;
  }
  running = before;
  for (i = first; i < std::min(n, first + kBlock) && running <= target; i++) {
    if (!(a[i] <= high) || w[i] == 0) continue;
    chosen = i;
    running += w[i];
  }
  return chosen;
}

Tensor sample_tokens(Tensor logits, Tensor uniforms, double inverse_temperature, int64_t top_k, double top_p, double lowest,
                     bool sequential) {
  const Rows rows(logits);
  const auto [count, n] = rows.shape();
  Tensor tokens = new_tensor(logits, {count}, ScalarType::Long);
  const Filter filter{static_cast<float>(inverse_temperature), top_k, top_p, -static_cast<float>(lowest), sequential};
  const Array array = rows.array(), uniform = per_row(uniforms);
  int64_t* out = static_cast<int64_t*>(tokens.data_ptr());
  const int64_t width = n;
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 8192 / width), [&](int64_t begin, int64_t end) {
    Scratch scratch((width + kLanes - 1) / kLanes * kLanes);
    for (int64_t row = begin; row < end; row++) {
      const float u = static_cast<const float*>(uniform.data)[row * uniform.row_stride];
      out[row] = draw(array, row, width, u, filter, scratch);
    }
  });
  return tokens;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_sample_tokens", TORCH_BOX(&sample_tokens)); }

}  // namespace gk
