// sampler_step: guidance, prediction, clip, the next sample, the next history term and the next model input in one pass.
//
//   m = g_u u + g_c c,   y = clip(a x + b m),   every output = C . [x, m, y, noise, h1, h2, h3]
//
// The coefficients are row inputs: one row of a table, chosen by a number or by a tensor of step indices (one, or one per sample).
#include "sampler_step.h"

namespace gk {
namespace {

// Columns of the table: g_u, g_c, a, b, then the row of the sample, the row of the history, and the scale of the model input.
constexpr int kGuidance = 0, kPrediction = 2, kSample = 4;
#ifdef GK_GPU
constexpr int kGuidanceInputs = 5;  // the moments
#else
constexpr int kGuidanceInputs = 2;  // the weights
#endif

template <int kRaw, int kHistory, class Distribution, bool kGivenNoise, bool kNextInput>
struct SamplerStep {
  static constexpr int kTerms = 4 + kHistory;  // of an output
  static constexpr int kInputs = 1 + kRaw + kHistory + kGivenNoise, kRowInputs = kSample + 2 * kTerms + 1;
  static constexpr int kOutputs = 1 + (kHistory > 0) + (kNextInput ? kRaw : 0), kSums = 0;
  Distribution noise;
  double clip;

  template <class V>
  GK_FN static V combine(const V* c, V x, V m, V y, V eps, const V* history) {
    V sum = fma(c[0], x, fma(c[1], m, c[2] * y));
    if constexpr (kGivenNoise || !std::is_same<Distribution, NoNoise>::value) sum = fma(c[3], eps, sum);
    for (int k = 0; k < kHistory; k++) sum = fma(c[4 + k], history[k], sum);
    return sum;
  }

  template <class V>
  GK_FN static V guided(const V* in, const V* row) {
    return kRaw == 2 ? fma(row[kGuidance], in[1], row[kGuidance + 1] * in[kRaw]) : in[1];
  }

  template <class V>
  GK_FN V predicted(V x, V m, const V* row) const {
    V y = fma(row[kPrediction], x, row[kPrediction + 1] * m);
    y = y < splat<V>(-clip) ? splat<V>(-clip) : y;  // this order of operands keeps NaN
    return y > splat<V>(clip) ? splat<V>(clip) : y;
  }

  template <class V>
  GK_FN static void put(V x, V m, V y, V eps, const V* history, const V* row, V* out) {
    const V next = combine(row + kSample, x, m, y, eps, history);
    out[0] = next;
    if constexpr (kHistory > 0) out[1] = combine(row + kSample + kTerms, x, m, y, eps, history);
    if constexpr (kNextInput)
      for (int k = kOutputs - kRaw; k < kOutputs; k++) out[k] = next * row[kSample + 2 * kTerms];
  }

  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    const V x = in[0], m = guided(in, row), y = predicted(x, m, row);
    put(x, m, y, kGivenNoise ? in[kInputs - 1] : eps, in + 1 + kRaw, row, out);
  }
};

// With adaptive guidance, a threshold per sample, or a learned variance.
template <int kRaw, int kHistory, class Distribution, bool kNextInput>
struct AdaptiveStep : SamplerStep<kRaw, kHistory, Distribution, true, kNextInput> {
  using Plain = SamplerStep<kRaw, kHistory, Distribution, true, kNextInput>;
  static constexpr int kInputs = Plain::kInputs + 1;  // the variance comes last, given noise before it
  // Behind the columns of the table: the logarithms of the least and the largest variance, the bound, guidance.
  static constexpr int kRowInputs = Plain::kRowInputs + 3 + kGuidanceInputs;
  AdaptiveGuidance guidance;
  bool adaptive, bounded, given, learned;

  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    const V* more = row + Plain::kRowInputs;
    V m = Plain::guided(in, row);
    if (kRaw == 2 && adaptive) {
      V on_c, on_d;
#ifdef GK_GPU
      guidance.weights<V>(row[kGuidance + 1], {more[3], more[4], more[5], more[6], more[7]}, on_c, on_d);
#else
      on_c = more[3], on_d = more[4];
#endif
      m = fma(on_c, in[kRaw], on_d * (in[kRaw] - in[1]));
    }
    V y = this->predicted(in[0], m, row);
    if (bounded) {
      y = y < -more[2] ? -more[2] : y;
      y = (y > more[2] ? more[2] : y) / more[2];
    }
    if (given)
      eps = in[kInputs - 2];
    else if (std::is_same<Distribution, NoNoise>::value)
      eps = V{};
    if (learned) {  // v in [-1, 1] between the logarithms
      const V part = fma(in[kInputs - 1], splat<V>(0.5), splat<V>(0.5));
      eps = eps * exp(fma(part, more[1] - more[0], more[0]) * splat<V>(0.5));
    }
    Plain::put(in[0], m, y, eps, in + 1 + kRaw, row, out);
  }
};

struct Arguments {
  Rows x, raw, out;
  std::optional<Rows> history[3], noise, history_out, input_out;
  Array table;
  MaybeTensor key, moments, bound;
  double clip;
  AdaptiveGuidance guidance;
  bool learned;
};

template <class F, int kRaw, int kHistory, bool kNextInput>
void fill(const Arguments& a, Arrays<F::kInputs>& in, Arrays<F::kRowInputs>& row, Arrays<F::kOutputs>& out) {
  const RowShape shape = a.x.shape();
  in[0] = a.x.array();
  for (int k = 0; k < kRaw; k++) in[1 + k] = samples_from(a.raw.array(), k * shape.rows);
  for (int k = 0; k < kHistory; k++) in[1 + kRaw + k] = a.history[k]->array();
  for (int k = 0; k < F::kRowInputs; k++) row[k] = columns_from(a.table, k);
  out[0] = a.out.array();
  if constexpr (kHistory > 0) out[1] = a.history_out->array();
  if constexpr (kNextInput)
    for (int k = 0; k < kRaw; k++) out[F::kOutputs - kRaw + k] = samples_from(a.input_out->array(), k * shape.rows);
}

template <int kRaw, int kHistory, class Distribution, bool kGivenNoise, bool kNextInput>
void run_plain(const Arguments& a, const Tensor& like) {
  using F = SamplerStep<kRaw, kHistory, Distribution, kGivenNoise, kNextInput>;
  Arrays<F::kInputs> in;
  Arrays<F::kRowInputs> row;
  Arrays<F::kOutputs> out;
  fill<F, kRaw, kHistory, kNextInput>(a, in, row, out);
  if constexpr (kGivenNoise) in[F::kInputs - 1] = a.noise->array();
  run_rows(F{{}, a.clip}, a.x.shape(), in, row, out, {}, like, a.key ? keys_of(*a.key) : Keys{});
}

template <int kRaw, int kHistory, class Distribution, bool kNextInput>
void run_adaptive(const Arguments& a, const Tensor& like) {
  using F = AdaptiveStep<kRaw, kHistory, Distribution, kNextInput>;
  Arrays<F::kInputs> in;
  Arrays<F::kRowInputs> row;
  Arrays<F::kOutputs> out;
  fill<F, kRaw, kHistory, kNextInput>(a, in, row, out);
  in[F::kInputs - 2] = a.noise ? a.noise->array() : in[0];  // what is absent points at something that may be read
  in[F::kInputs - 1] = in[0];
  if (a.learned) {  // the second half of the channels, with the condition
    in[F::kInputs - 1] = columns_from(samples_from(a.raw.array(), (kRaw - 1) * a.x.shape().rows), a.x.shape().width);
  } else {
    row[F::kRowInputs - kGuidanceInputs - 3] = row[F::kRowInputs - kGuidanceInputs - 2] = a.table;
  }
  row[F::kRowInputs - kGuidanceInputs - 1] = a.bound ? per_row(*a.bound) : a.table;
  for (int k = F::kRowInputs - kGuidanceInputs; k < F::kRowInputs; k++) row[k] = a.table;
  std::vector<float> weights;
  std::vector<double> wide_weights;
  if (a.moments) {
#ifdef GK_GPU
    for (int k = 0; k < 5; k++) row[F::kRowInputs - 5 + k] = columns_from(Rows(*a.moments).array(), k);
#else
    Array on{nullptr, 2, a.table.storage};
    if (on.storage == Storage::kDouble)
      on.data = (wide_weights = guidance_weights<double>(a.guidance, a.table, *a.moments)).data();
    else
      on.data = (weights = guidance_weights<float>(a.guidance, a.table, *a.moments)).data();
    for (int k = 0; k < 2; k++) row[F::kRowInputs - 2 + k] = columns_from(on, k);
#endif
  }
  const F f{{{}, a.clip}, a.guidance, a.moments.has_value(), a.bound.has_value(), a.noise.has_value(), a.learned};
  run_rows(f, a.x.shape(), in, row, out, {}, like, a.key ? keys_of(*a.key) : Keys{});
}

template <int kRaw, int kHistory>
void run(const Arguments& a, const Tensor& like) {
  const auto with = [&](auto next_input) {
    constexpr bool kNext = next_input();
    if (a.moments || a.bound || a.learned)
      a.key ? run_adaptive<kRaw, kHistory, Normal, kNext>(a, like) : run_adaptive<kRaw, kHistory, NoNoise, kNext>(a, like);
    else if (a.key)
      run_plain<kRaw, kHistory, Normal, false, kNext>(a, like);
    else if (a.noise)
      run_plain<kRaw, kHistory, NoNoise, true, kNext>(a, like);
    else
      run_plain<kRaw, kHistory, NoNoise, false, kNext>(a, like);
  };
  a.input_out ? with(std::true_type{}) : with(std::false_type{});
}

template <int kRaw>
void run_with_history(const Arguments& a, const Tensor& like) {
  if (a.history[2])
    run<kRaw, 3>(a, like);
  else if (a.history[1])
    run<kRaw, 2>(a, like);
  else if (a.history[0])
    run<kRaw, 1>(a, like);
  else
    run<kRaw, 0>(a, like);
}

void sampler_step(Tensor x, Tensor model_output, Tensor table, MaybeTensor steps, int64_t step, MaybeTensor h1, MaybeTensor h2,
                  MaybeTensor h3, MaybeTensor noise, MaybeTensor key, MaybeTensor moments, MaybeTensor bound, double clip,
                  double rescale, double parallel, double max_norm, bool learned, Tensor out, MaybeTensor history_out,
                  MaybeTensor input_out) {
  const auto rows_of = [](const MaybeTensor& t) { return t ? std::optional<Rows>(std::in_place, *t) : std::nullopt; };
  Arguments a{Rows(x),
              Rows(model_output),
              Rows(out),
              {rows_of(h1), rows_of(h2), rows_of(h3)},
              rows_of(noise),
              rows_of(history_out),
              rows_of(input_out),
              table_rows(table, steps, step),
              key,
              moments,
              bound,
              clip,
              {},
              learned};
  a.guidance = {rescale, parallel, max_norm, static_cast<double>(std::max<int64_t>(1, a.x.shape().width))};
  if (model_output.size(0) == x.size(0))
    run_with_history<1>(a, x);
  else
    run_with_history<2>(a, x);
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_sampler_step", TORCH_BOX(&sampler_step)); }

}  // namespace gk
