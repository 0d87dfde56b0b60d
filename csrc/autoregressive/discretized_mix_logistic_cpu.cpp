// discretized_mix_logistic_nll: lanes over pixels, whose values of one channel are neighbours in memory. A tile of pixels of all
// channels is copied into a buffer first, and gradients leave through one: to walk over a hundred channels, often whole pages
// apart, pixel by pixel would wait for memory most of the time.
//
// With d = a - b, the log-probability of an inner bin is log(1 - e^-d) - softplus(-a) - softplus(b); since
// softplus(-a) = max(-a, 0) + log(1 + e^-|a|), one logarithm serves all three terms.
#include "rows.h"

namespace gk {
namespace {

constexpr int64_t kPixels = 128;           // of a unit of work; a multiple of the lanes
constexpr int64_t kStride = kPixels + 16;  // of a channel in the buffers; at a power of two the channels would evict each other

template <class V>
GK_FN V positive(V x) {
  return x > 0 ? x : x * 0;
}

template <class V>
struct Bin {
  V log_p, d_mean, d_log_scale;
};

struct Rule {
  double half, edge, min_log_scale, log_width;  // half a bin; |x| beyond edge: an outer bin
  bool openai;
};

// One colour of one mixture. With gradient: the derivatives of log_p.
template <bool gradient, class V>
GK_FN Bin<V> bin(V x, V mean, V raw_log_scale, const Rule& rule) {
  const V zero = x * 0, one = splat<V>(1), lowest = splat<V>(rule.min_log_scale);
  const V log_scale = raw_log_scale < lowest ? lowest : raw_log_scale, inverse = exp(-log_scale), centred = x - mean;
  const V a = inverse * (centred + splat<V>(rule.half)), b = inverse * (centred - splat<V>(rule.half));
  const V d = inverse * splat<V>(2 * rule.half), exp_d = exp(-d), width = -expm1(-d, exp_d);  // 1 - e^-d
  const V ea = exp(a < 0 ? a : -a), eb = exp(b < 0 ? b : -b), edge = splat<V>(rule.edge);
  const V pa = x > edge ? one : ea + 1, pb = x < -edge ? one : eb + 1, w = (x > edge) | (x < -edge) ? one : width;
  const V lost = (x > edge ? zero : positive(-a)) + (x < -edge ? zero : positive(b));
  const V shared = one / (pa * pb);
  Bin<V> result{log(w * shared) - lost, zero, zero};
  V sa = zero, sb = zero, rest = zero;
  if constexpr (gradient) {
    sa = x > edge ? zero : (a < 0 ? one : ea) * pb * shared;   // sigmoid(-a)
    sb = x < -edge ? zero : (b < 0 ? eb : one) * pa * shared;  // sigmoid(b)
    rest = (x > edge) | (x < -edge) ? zero : d * exp_d / width;
    result.d_mean = inverse * (sb - sa);
    result.d_log_scale = b * sb - a * sa - rest;
  }
  if (rule.openai) {
    const V middle = inverse * centred, em = exp(middle < 0 ? middle : -middle);
    const V density = middle - log_scale - 2 * (positive(middle) + log1p(em)) + splat<V>(rule.log_width);
    const auto thin = (result.log_p <= splat<V>(-11.512925464970229)) & (x <= edge) & (x >= -edge);  // log 1e-5
    result.log_p = thin ? density : result.log_p;
    if constexpr (gradient) {
      const V slope = (middle < 0 ? em - 1 : 1 - em) / (em + 1);  // 2 sigmoid(middle) - 1
      result.d_mean = thin ? inverse * slope : result.d_mean;
      result.d_log_scale = thin ? middle * slope - 1 : result.d_log_scale;
    }
  }
  if constexpr (gradient) result.d_log_scale = raw_log_scale < lowest ? zero : result.d_log_scale;
  return result;
}

// Parameters and their gradients lie in buffers, kStride apart by channel.
template <class V, int colours, bool gradient>
struct Mixture {
  static constexpr int kKinds = colours == 3 ? 3 : 2;  // means, log scales, coefficients
  int64_t k;
  Rule rule;
  const Scalar<V>* params;
  Scalar<V>* grads;
  V* joint;                  // k: logit + log-probability
  V (*slopes)[colours * 3];  // k: derivatives to the parameters

  V get(int64_t channel, int64_t pixel) const { return load<V>(params + channel * kStride + pixel); }
  void put(int64_t channel, int64_t pixel, V value) const { store(grads + channel * kStride + pixel, value); }
  int64_t channel(int colour, int kind, int64_t i) const { return k + (colour * kKinds + kind) * k + i; }

  V operator()(const V* x, int64_t pixel, V grad) const {
    const V zero{};
    V top = get(0, pixel), joint_top = splat<V>(-__builtin_inf());
    for (int64_t i = 0; i < k; i++) {
      const V logit = get(i, pixel);
      V sum = logit;
      for (int c = 0; c < colours; c++) {
        V mean = get(channel(c, 0, i), pixel), link0 = zero, link1 = zero;
        if constexpr (colours == 3) {
          if (c == 1) {
            link0 = tanh(get(channel(0, 2, i), pixel));
            mean = mean + link0 * x[0];
          } else if (c == 2) {
            link0 = tanh(get(channel(1, 2, i), pixel));
            link1 = tanh(get(channel(2, 2, i), pixel));
            mean = mean + link0 * x[0] + link1 * x[1];
          }
        }
        const Bin<V> one = bin<gradient>(x[c], mean, get(channel(c, 1, i), pixel), rule);
        sum = sum + one.log_p;
        if constexpr (gradient) {
          slopes[i][c] = one.d_mean;
          slopes[i][colours + c] = one.d_log_scale;
          if (colours == 3 && c == 1) slopes[i][6] = one.d_mean * x[0] * (1 - link0 * link0);
          if (colours == 3 && c == 2) slopes[i][7] = one.d_mean * x[0] * (1 - link0 * link0);
          if (colours == 3 && c == 2) slopes[i][8] = one.d_mean * x[1] * (1 - link1 * link1);
        }
      }
      joint[i] = sum;
      top = logit > top ? logit : top;
      joint_top = sum > joint_top ? sum : joint_top;
    }
    V prior = zero, total = zero;
    for (int64_t i = 0; i < k; i++) {
      prior = prior + exp(get(i, pixel) - top);
      total = total + exp(joint[i] - joint_top);
    }
    if constexpr (gradient) {
      for (int64_t i = 0; i < k; i++) {
        const V weight = grad * exp(joint[i] - joint_top) / total;
        put(i, pixel, grad * exp(get(i, pixel) - top) / prior - weight);
        for (int kind = 0; kind < kKinds; kind++)
          for (int c = 0; c < colours; c++) put(channel(c, kind, i), pixel, -weight * slopes[i][kind * colours + c]);
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

// Sample n's pixels in units of kPixels; totals of units are added in their order.
template <class S, int colours, bool gradient>
void run(const Rows& x, const Rows& params, int64_t channels, int64_t pixels, const Rule& rule, const Array& out,
         const Array& grad) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int64_t n = params.shape().rows, tiles = (pixels + kPixels - 1) / kPixels, k = channels / (colours == 3 ? 10 : 3);
  std::vector<double> partial(gradient ? 0 : n * tiles);
  torch::stable::parallel_for(0, n * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<S> data(colours * kStride), buffer(channels * kStride), grad_buffer(gradient ? channels * kStride : 0);
    std::vector<V> scratch(k * (1 + 3 * colours));
    const Mixture<V, colours, gradient> mixture{
        k, rule, buffer.data(), grad_buffer.data(), scratch.data(), reinterpret_cast<V(*)[3 * colours]>(scratch.data() + k)};
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t row = unit / tiles, first = unit % tiles * kPixels, count = std::min(kPixels, pixels - first);
      for (int64_t c = 0; c < channels; c++) copy(params.array(), row, c * pixels + first, count, buffer.data() + c * kStride);
      for (int c = 0; c < colours; c++) copy(x.array(), row, c * pixels + first, count, data.data() + c * kStride);
      V outer{};
      if constexpr (gradient) {
        S one;
        outer = splat<V>(*read(grad, row, 0, 1, &one));
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
          S* to = place(out, row, c * pixels + first, values);
          if (to == values)
            write(out, row, c * pixels + first, values, count);
          else
            memcpy(to, values, count * sizeof(S));
        }
      } else {
        partial[unit] = sum_lanes(total);
      }
    }
  });
  if constexpr (!gradient) {
    for (int64_t row = 0; row < n; row++) {
      double total = 0;
      for (int64_t tile = 0; tile < tiles; tile++) total += partial[row * tiles + tile];
      write_sum(out, row, total);
    }
  }
}

template <bool gradient>
void dispatch(const Tensor& x, const Tensor& params, int64_t levels, double min_log_scale, bool openai, const Array& out,
              const Array& grad) {
  const double half = 1.0 / static_cast<double>(levels - 1);
  const Rule rule{half, 1 - half / 4, min_log_scale, std::log(2 * half), openai};
  const Rows x_rows(x), rows(params);
  const int64_t channels = params.size(1), pixels = channels ? rows.shape().width / channels : 0;
  const bool wide = params.scalar_type() == ScalarType::Double;
  if (x.size(1) == 3) {
    if (wide)
      run<double, 3, gradient>(x_rows, rows, channels, pixels, rule, out, grad);
    else
      run<float, 3, gradient>(x_rows, rows, channels, pixels, rule, out, grad);
  } else {
    if (wide)
      run<double, 1, gradient>(x_rows, rows, channels, pixels, rule, out, grad);
    else
      run<float, 1, gradient>(x_rows, rows, channels, pixels, rule, out, grad);
  }
}

Tensor nll(Tensor x, Tensor params, int64_t levels, double min_log_scale, bool openai) {
  Tensor out = torch::stable::new_empty(params, {params.size(0)}, sum_type(params.scalar_type()));
  dispatch<false>(x, params, levels, min_log_scale, openai, per_row(out), {});
  return out;
}

std::vector<Tensor> nll_backward(Tensor grad, Tensor x, Tensor params, int64_t levels, double min_log_scale, bool openai) {
  Tensor out = torch::stable::new_empty(params, params.sizes(), params.scalar_type());
  dispatch<true>(x, params, levels, min_log_scale, openai, Rows(out).array(), per_row(grad));
  return {out};
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_discretized_mix_logistic_nll", TORCH_BOX(&nll));
  m.impl("_discretized_mix_logistic_nll_backward", TORCH_BOX(&nll_backward));
}

}  // namespace gk
