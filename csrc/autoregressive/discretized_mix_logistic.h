// discretized_mix_logistic_nll and _sample: formulas on lanes, and the tensors of a call. Formulas of the ops in torch:
// genkern/ops/autoregressive/_discretized_mix_logistic.py.
//
// With m = (x - mean) / s, D half a bin's width over s, t = e^-|m| and q = e^-D, an inner bin holds
//   (1 - q^2) t / ((1 + q t) (t + q)),
// a bin at an end one of t / (t + q) and 1 / (1 + q t). So a colour takes three exponentials and no logarithm: its probability is
// kept as ratio e^rest, where a product of three ratios is an ordinary float.
#pragma once
#include "rows.h"

namespace gk {

template <class S>
struct MixtureRule {
  S half, edge, min_log_scale, log_width;  // half a bin; |x| beyond edge: a bin at an end; ln of a bin's width
  bool openai;
};

template <class V>
struct Bin {  // and the derivatives of its log-probability
  V ratio, rest, d_mean, d_log_scale;
};

// One colour of one mixture.
template <bool gradient, class V>
GK_FN Bin<V> bin(V x, V mean, V raw_log_scale, const MixtureRule<Scalar<V>>& rule) {
  const V one = splat<V>(1), zero{}, lowest = splat<V>(rule.min_log_scale), edge = splat<V>(rule.edge);
  const V log_scale = raw_log_scale < lowest ? lowest : raw_log_scale, inverse = exp(-log_scale);
  const V m = inverse * (x - mean), distance = m < 0 ? -m : m, half = inverse * splat<V>(rule.half), d = half + half;
  // t and q may both be tiny, where only t / q counts: then both are larger by e^shift, which nothing else feels.
  const V smaller = distance < half ? distance : half, shift = smaller > 24 ? smaller - 24 : zero;
  const V t = exp(shift - distance), q = exp(shift - half), q_less_one = expm1(shift - half, q);
  const Mask<V> above = x > edge, below = -x > edge, outer = above | below;
  const Mask<V> near_only = (below & (m >= 0)) | (above & (m < 0)), far_only = (below & (m < 0)) | (above & (m >= 0));
  // As d goes to zero, so does 1 - q^2: then d leaves the ratio for its logarithm, which is known.
  const V tiny = splat<V>(1e-30), width = -q_less_one * (q_less_one + 2), qt = q * t;
  V top = width < tiny ? tiny : width, near = qt + 1, far = t + q, taken = d < tiny ? tiny : d;
  V sa = qt, sb = q, lost = distance - shift;
  const Mask<V> with_log_width = (outer == 0) & (d < 1);
  Mask<V> thin{};
  if (rule.openai) {  // the density times the bin's width where the bin holds next to nothing
    thin = (outer == 0) & (top * t <= splat<V>(1e-5) * (near * far));
    near = thin ? t + 1 : near;
    far = thin ? t + 1 : far;
    sa = thin ? t : sa;
    sb = thin ? one : sb;
    lost = thin ? distance : lost;
  }
  taken = with_log_width ? taken : one;
  const Mask<V> whole = outer | thin;
  near = far_only ? one : near;
  far = near_only ? one : far;
  const V product = near * far;
  Bin<V> result;
  result.ratio = divide(whole ? one : top, whole ? product : product * taken);
  result.rest = (with_log_width | thin ? splat<V>(rule.log_width) - log_scale : zero) - (near_only ? zero : lost);
  if constexpr (gradient) {
    const V inverse_product = divide(one, product);
    sa = far_only ? zero : sa * far * inverse_product;
    sb = near_only ? zero : sb * near * inverse_product;
    const V to_distance = sa - sb, to_half = half * (sa + sb) + (outer ? zero : divide(d * (q * q), top));
    result.d_mean = inverse * (m < 0 ? to_distance : -to_distance);
    result.d_log_scale = raw_log_scale < lowest ? zero : -(distance * to_distance + (thin ? one : to_half));
  }
  return result;
}

// Channels of the parameters: k logits, then for each colour k means, k log scales and, for three colours, k coefficients.
template <int colours>
struct MixtureChannels {
  static constexpr int kKinds = colours == 3 ? 3 : 2, kSlopes = colours * kKinds;
  int64_t k;
  GK_FN int64_t operator()(int colour, int kind, int64_t i) const { return k + (colour * kKinds + kind) * k + i; }
};

// Mixture i: its weight times its probability is ratio e^exponent. slopes: the derivatives of its log-probability to the
// parameters, kind after kind. get(channel) are the parameters of the pixels.
template <int colours, bool gradient, class V, class Get>
GK_FN void component(const Get& get, int64_t k, int64_t i, V logit, const V* x, const MixtureRule<Scalar<V>>& rule, V* ratio,
                     V* exponent, V* slopes) {
  const MixtureChannels<colours> channel{k};
  V link[3] = {}, product = splat<V>(1), sum = logit;
  if constexpr (colours == 3)
    for (int c = 0; c < 3; c++) link[c] = tanh(get(channel(c, 2, i)));
  for (int c = 0; c < colours; c++) {
    V mean = get(channel(c, 0, i));
    if (c == 1) mean = fma(link[0], x[0], mean);
    if (c == 2) mean = fma(link[2], x[1], fma(link[1], x[0], mean));
    const Bin<V> one = bin<gradient>(x[c], mean, get(channel(c, 1, i)), rule);
    product = product * one.ratio;
    sum = sum + one.rest;
    if constexpr (gradient) {
      slopes[c] = one.d_mean;
      slopes[colours + c] = one.d_log_scale;
      if (c == 1) slopes[2 * colours] = one.d_mean * x[0] * (1 - link[0] * link[0]);
      if (c == 2)
        for (int from = 0; from < 2; from++)
          slopes[2 * colours + 1 + from] = one.d_mean * x[from] * (1 - link[1 + from] * link[1 + from]);
    }
  }
  *ratio = product;
  *exponent = sum;
}

// ---- draws

template <class S>
struct MixtureDraw {
  S temperature, inverse_temperature, min_log_scale, steps;  // levels - 1; 0: not rounded
};

template <class V>
GK_FN V kept_within(V x, double low, double high) {  // NaN stays
  x = x < splat<V>(low) ? splat<V>(low) : x;
  return x > splat<V>(high) ? splat<V>(high) : x;
}
template <class V>
GK_FN V drawable(V u) {
  return kept_within(u, 1e-5, 1 - 1e-5);
}

// The mixture with the largest score is drawn.
template <class V>
GK_FN V mixture_score(V logit, V u, const MixtureDraw<Scalar<V>>& how) {
  return logit * splat<V>(how.inverse_temperature) - log(-log(drawable(u)));
}

template <class V>
GK_FN V colour_value(V centre, V raw_log_scale, V u, const MixtureDraw<Scalar<V>>& how) {
  const V lowest = splat<V>(how.min_log_scale);
  u = drawable(u);
  const V scale = splat<V>(how.temperature) * exp(raw_log_scale < lowest ? lowest : raw_log_scale);
  const V value = kept_within(centre + scale * (log(u) - log(1 - u)), -1, 1);
  if (how.steps == 0) return value;
  const V magic = splat<V>(sizeof(Scalar<V>) == 4 ? 12582912.0 : 6755399441055744.0);  // adding it rounds, ties to even
  return (((value + 1) * splat<V>(how.steps * 0.5) + magic) - magic) * splat<V>(2.0 / how.steps) - 1;
}

// ---- tensors

struct MixtureJob {  // trivially copyable, so that it can be a CUDA kernel's argument
  Array x, params;   // one row per sample: channels * pixels numbers
  Array out;         // of the likelihood (rows,), of its gradient and of draws as params and x
  Array grad;        // (rows,)
  Array uniforms;    // data null: from the keys
  Keys keys;
  int64_t rows, pixels, k;
};

// Defined per device.
template <class S, int colours>
void mixture_nll(const MixtureJob& job, const MixtureRule<S>& rule, const Tensor& like);
template <class S, int colours>
void mixture_nll_backward(const MixtureJob& job, const MixtureRule<S>& rule, const Tensor& like);
template <class S, int colours>
void mixture_sample(const MixtureJob& job, const MixtureDraw<S>& how, const Tensor& like);

inline MixtureJob mixture_job(const Rows& params, int64_t channels, int64_t colours) {
  MixtureJob job{};
  job.params = params.array();
  job.rows = params.shape().rows, job.pixels = params.shape().width / channels, job.k = channels / (colours == 3 ? 10 : 3);
  return job;
}

template <bool gradient, class S>
void mixture_dispatch(const MixtureJob& job, int64_t colours, int64_t levels, double min_log_scale, bool openai,
                      const Tensor& like) {
  const double half = 1.0 / static_cast<double>(levels - 1);
  const MixtureRule<S> rule{static_cast<S>(half), static_cast<S>(1 - half / 4), static_cast<S>(min_log_scale),
                            static_cast<S>(std::log(2 * half)), openai};
  if constexpr (gradient)
    colours == 3 ? mixture_nll_backward<S, 3>(job, rule, like) : mixture_nll_backward<S, 1>(job, rule, like);
  else
    colours == 3 ? mixture_nll<S, 3>(job, rule, like) : mixture_nll<S, 1>(job, rule, like);
}

inline Tensor discretized_mix_logistic_nll(Tensor x, Tensor params, int64_t levels, double min_log_scale, bool openai) {
  Tensor out = new_tensor(params, {params.size(0)}, sum_type(params.scalar_type()));
  const Rows data(x), rows(params);
  MixtureJob job = mixture_job(rows, params.size(1), x.size(1));
  job.x = data.array(), job.out = per_row(out);
  if (job.rows == 0) return out;
  params.scalar_type() == ScalarType::Double
      ? mixture_dispatch<false, double>(job, x.size(1), levels, min_log_scale, openai, params)
      : mixture_dispatch<false, float>(job, x.size(1), levels, min_log_scale, openai, params);
  return out;
}

inline std::vector<Tensor> discretized_mix_logistic_nll_backward(Tensor grad, Tensor x, Tensor params, int64_t levels,
                                                                 double min_log_scale, bool openai) {
  Tensor out = new_tensor(params, params.sizes(), params.scalar_type());
  if (out.numel() == 0) return {out};
  const Rows data(x), rows(params);
  MixtureJob job = mixture_job(rows, params.size(1), x.size(1));
  job.x = data.array(), job.grad = per_row(grad), job.out = Rows(out).array();
  params.scalar_type() == ScalarType::Double ? mixture_dispatch<true, double>(job, x.size(1), levels, min_log_scale, openai, params)
                                             : mixture_dispatch<true, float>(job, x.size(1), levels, min_log_scale, openai, params);
  return {out};
}

template <class S>
void mixture_draw(const MixtureJob& job, int64_t colours, double temperature, double min_log_scale, int64_t levels,
                  const Tensor& like) {
  const MixtureDraw<S> how{static_cast<S>(temperature), static_cast<S>(1 / temperature), static_cast<S>(min_log_scale),
                           static_cast<S>(levels ? levels - 1 : 0)};
  colours == 3 ? mixture_sample<S, 3>(job, how, like) : mixture_sample<S, 1>(job, how, like);
}

// params (N, 10 K or 3 K, ...); key int64 (2,) or (N, 2), or uniforms (N, K + colours, ...) of the type of the result.
inline Tensor discretized_mix_logistic_sample(Tensor params, MaybeTensor key, MaybeTensor uniforms, int64_t colours,
                                              double temperature, double min_log_scale, int64_t levels) {
  std::vector<int64_t> sizes(params.sizes().begin(), params.sizes().end());
  sizes[1] = colours;
  Tensor out = new_tensor(params, sizes, sum_type(params.scalar_type()));
  if (out.numel() == 0) return out;
  const Rows rows(params);
  std::optional<Rows> given;
  Tensor dense;
  MixtureJob job = mixture_job(rows, params.size(1), colours);
  job.out = Rows(out).array();
  if (uniforms) given.emplace(*uniforms), job.uniforms = given->array();
  if (key) dense = torch::stable::contiguous(*key), job.keys = keys_of(dense);
  params.scalar_type() == ScalarType::Double ? mixture_draw<double>(job, colours, temperature, min_log_scale, levels, params)
                                             : mixture_draw<float>(job, colours, temperature, min_log_scale, levels, params);
  return out;
}

}  // namespace gk
