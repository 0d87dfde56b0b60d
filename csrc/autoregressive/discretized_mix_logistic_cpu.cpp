// discretized_mix_logistic_nll on the CPU: lanes over pixels, whose values of one channel are neighbours in memory. A tile of
// pixels of all channels is copied into a buffer first, and gradients leave through one: to walk over a hundred channels, often
// whole pages apart, pixel by pixel would wait for memory most of the time.
#include "discretized_mix_logistic.h"

namespace gk {
namespace {

constexpr int64_t kPixels = 128;              // of a unit of work; a multiple of the lanes
constexpr int64_t kLarge = int64_t{1} << 20;  // bytes of gradients that would not stay in a core's caches
constexpr int64_t kStride = kPixels + 16;     // of a channel in the buffers; at a power of two the channels would evict each other

// Parameters and their gradients lie in buffers, kStride apart by channel.
template <class V, int colours, bool gradient>
struct Mixture {
  using Channels = MixtureChannels<colours>;
  int64_t k;
  MixtureRule<Scalar<V>> rule;
  const Scalar<V>* params;
  Scalar<V>* grads;
  V *ratio, *exponent;             // k each
  V (*slopes)[Channels::kSlopes];  // k

  V get(int64_t channel, int64_t pixel) const { return load<V>(params + channel * kStride + pixel); }
  void put(int64_t channel, int64_t pixel, V value) const { store(grads + channel * kStride + pixel, value); }

  V operator()(const V* x, int64_t pixel, V grad) const {
    const Channels channel{k};
    V top = get(0, pixel), joint_top = splat<V>(-__builtin_inf());
    for (int64_t i = 0; i < k; i++) {
      const V logit = get(i, pixel);
      const auto at_pixel = [&](int64_t c) { return get(c, pixel); };
      component<colours, gradient>(at_pixel, k, i, logit, x, rule, &ratio[i], &exponent[i], slopes[i]);
      top = logit > top ? logit : top;
      joint_top = exponent[i] > joint_top ? exponent[i] : joint_top;
    }
    V prior{}, total{};
    for (int64_t i = 0; i < k; i++) {
      prior = prior + exp(get(i, pixel) - top);
      ratio[i] = ratio[i] * exp(exponent[i] - joint_top);
      total = total + ratio[i];
    }
    if constexpr (gradient) {
      const V of_prior = grad / prior, of_total = grad / total;
      for (int64_t i = 0; i < k; i++) {
        const V weight = of_total * ratio[i];
        put(i, pixel, of_prior * exp(get(i, pixel) - top) - weight);
        for (int c = 0; c < colours; c++)
          for (int kind = 0; kind < Channels::kKinds; kind++)
            put(channel(c, kind, i), pixel, -weight * slopes[i][kind * colours + c]);
      }
    }
    return (top + log(prior)) - (joint_top + log(total));
  }
};

template <class S>
void copy(const Array& from, int64_t row, int64_t first, int64_t count, S* to) {
  const S* values = read(from, row, first, count, to);
  if (values != to) memcpy(to, values, count * sizeof(S));
}

inline void copy_out(const float* from, float* to, int64_t count, bool large) {
  if (!large || count % kLanes || reinterpret_cast<uintptr_t>(to) % sizeof(lane_f32)) {
    memcpy(to, from, count * sizeof(float));
    return;
  }
  for (int64_t i = 0; i < count; i += kLanes) stream(to + i, load<lane_f32>(from + i));
}
inline void copy_out(const double* from, double* to, int64_t count, bool) { memcpy(to, from, count * sizeof(double)); }

// Sample n's pixels in units of kPixels; totals of units are added in their order.
template <class S, int colours, bool gradient>
void run(const MixtureJob& job, const MixtureRule<S>& rule) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount, kSlopes = MixtureChannels<colours>::kSlopes;
  const int64_t k = job.k, pixels = job.pixels, tiles = (pixels + kPixels - 1) / kPixels, channels = k + kSlopes * k;
  const bool large = job.rows * pixels * channels * static_cast<int64_t>(sizeof(S)) > kLarge;
  std::vector<double> partial(gradient ? 0 : job.rows * tiles);
  torch::stable::parallel_for(0, job.rows * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<S> data(colours * kStride), buffer(channels * kStride), grad_buffer(gradient ? channels * kStride : 0);
    std::vector<V> scratch(k * (2 + kSlopes));
    V* slopes = scratch.data() + 2 * k;
    const Mixture<V, colours, gradient> mixture{
        k, rule, buffer.data(), grad_buffer.data(), scratch.data(), scratch.data() + k, reinterpret_cast<V(*)[kSlopes]>(slopes)};
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t row = unit / tiles, first = unit % tiles * kPixels, count = std::min(kPixels, pixels - first);
      for (int64_t c = 0; c < channels; c++) copy(job.params, row, c * pixels + first, count, buffer.data() + c * kStride);
      for (int c = 0; c < colours; c++) copy(job.x, row, c * pixels + first, count, data.data() + c * kStride);
      V outer{};
      if constexpr (gradient) {
        S one;
        outer = splat<V>(*read(job.grad, row, 0, 1, &one));
      }
      V total{};
      for (int64_t i = 0; i < count; i += kCount) {
        V value[colours];
        for (int c = 0; c < colours; c++) value[c] = load<V>(data.data() + c * kStride + i);
        const V nll = mixture(value, i, outer);
        total = total + (count - i >= kCount ? nll : keep_first(nll, static_cast<int>(count - i)));
      }
      if constexpr (gradient) {
        for (int64_t c = 0; c < channels; c++) {
          S* values = grad_buffer.data() + c * kStride;
          S* to = place(job.out, row, c * pixels + first, values);
          if (to == values)
            write(job.out, row, c * pixels + first, values, count);
          else
            copy_out(values, to, count, large);
        }
      } else {
        partial[unit] = sum_lanes(total);
      }
    }
    if (gradient && large) streamed();
  });
  if constexpr (!gradient) {
    for (int64_t row = 0; row < job.rows; row++) {
      double total = 0;
      for (int64_t tile = 0; tile < tiles; tile++) total += partial[row * tiles + tile];
      write_sum(job.out, row, total);
    }
  }
}

}  // namespace

template <class S, int colours>
void mixture_nll(const MixtureJob& job, const MixtureRule<S>& rule, const Tensor&) {
  run<S, colours, false>(job, rule);
}
template <class S, int colours>
void mixture_nll_backward(const MixtureJob& job, const MixtureRule<S>& rule, const Tensor&) {
  run<S, colours, true>(job, rule);
}

GENKERN_LIBRARY(m) {
  m.impl("_discretized_mix_logistic_nll", TORCH_BOX(&discretized_mix_logistic_nll));
  m.impl("_discretized_mix_logistic_nll_backward", TORCH_BOX(&discretized_mix_logistic_nll_backward));
}

}  // namespace gk
