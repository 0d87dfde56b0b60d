// sampler_step: guidance, prediction, clip, the next sample, the next history term and the next model input in one pass.
//
//   m = g_u u + g_c c,   y = clip(a x + b m),   every output = C . [x, m, y, noise, h1, h2, h3]
//
// The coefficients are row inputs: one row of a table, chosen by a number or by a tensor of step indices (one, or one per sample).
// Few functors serve all combinations of guidance, history, noise and outputs: what is absent is an Array without data, and a
// branch that goes the same way for every vector costs less than eighty functors take to compile.
#include "sampler_step.h"

namespace gk {
namespace {

constexpr int kHistory = 3, kTerms = 4;                                 // of an output: x, m, y, noise; then the history
enum In { kX, kU, kC, kNoise, kPast, kStepInputs = kPast + kHistory };  // u: the one output of the model without guidance
enum Out { kNext, kNextPast, kNextInput, kStepOutputs = kNextInput + 2 };
enum Row {
  kGuidance,
  kPrediction = 2,
  kSample = 4,
  kSampleOnPast = kSample + kTerms,
  kPastRow = kSampleOnPast + kHistory,
  kPastOnPast = kPastRow + kTerms,
  kScale = kPastOnPast + kHistory,
  kStepRows
};
#ifdef GK_GPU
constexpr int kGuidanceInputs = 5;  // the moments
#else
constexpr int kGuidanceInputs = 2;  // the weights
#endif

template <class Distribution, bool kMore>  // kMore: a history, or the next model input
struct SamplerStep {
  static constexpr int kInputs = kMore ? kStepInputs : kPast, kRowInputs = kMore ? kStepRows : kSampleOnPast;
  static constexpr int kOutputs = kMore ? kStepOutputs : 1, kSums = 0;
  Distribution noise;
  double clip;
  int history;  // terms
  bool guided, noisy, next_input;

  template <class V>
  GK_FN V model_output(const V* in, const V* row) const {
    return guided ? fma(row[kGuidance], in[kU], row[kGuidance + 1] * in[kC]) : in[kU];
  }

  template <class V>
  GK_FN V predicted(V x, V m, const V* row) const {
    V y = fma(row[kPrediction], x, row[kPrediction + 1] * m);
    y = y < splat<V>(-clip) ? splat<V>(-clip) : y;  // this order of operands keeps NaN
    return y > splat<V>(clip) ? splat<V>(clip) : y;
  }

  template <class V>
  GK_FN V combine(const V* c, V x, V m, V y, V eps, const V* past) const {
    V sum = fma(c[0], x, fma(c[1], m, c[2] * y));
    if (noisy) sum = fma(c[3], eps, sum);
    if constexpr (kMore)
      for (int k = 0; k < kHistory; k++)
        if (k < history) sum = fma(c[kTerms + k], past[k], sum);
    return sum;
  }

  template <class V>
  GK_FN void put(V x, V m, V y, V eps, const V* past, const V* row, V* out) const {
    out[kNext] = combine(row + kSample, x, m, y, eps, past);
    if constexpr (kMore) {
      out[kNextPast] = history ? combine(row + kPastRow, x, m, y, eps, past) : V{};
      out[kNextInput] = out[kNextInput + 1] = next_input ? out[kNext] * row[kScale] : V{};
    }
  }

  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    const V m = model_output(in, row), y = predicted(in[kX], m, row);
    put(in[kX], m, y, std::is_same<Distribution, NoNoise>::value ? in[kNoise] : eps, in + kPast, row, out);
  }
};

// With adaptive guidance, a threshold per sample, or a learned variance.
template <class Distribution>
struct AdaptiveStep : SamplerStep<Distribution, true> {
  static constexpr int kInputs = kStepInputs + 1;
  // Behind the columns of the table: the logarithms of the least and the largest variance, the bound, guidance.
  static constexpr int kRowInputs = kStepRows + 3 + kGuidanceInputs;
  AdaptiveGuidance guidance;
  bool adaptive, bounded, learned;

  template <class V>
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    const V* more = row + kStepRows;
    V m = this->model_output(in, row);
    if (adaptive) {
      V on_c, on_d;
#ifdef GK_GPU
      guidance.weights<V>(row[kGuidance + 1], {more[3], more[4], more[5], more[6], more[7]}, on_c, on_d);
#else
      on_c = more[3], on_d = more[4];
#endif
      m = fma(on_c, in[kC], on_d * (in[kC] - in[kU]));
    }
    V y = this->predicted(in[kX], m, row);
    if (bounded) {
      y = y < -more[2] ? -more[2] : y;
      y = (y > more[2] ? more[2] : y) / more[2];
    }
    if (std::is_same<Distribution, NoNoise>::value) eps = in[kNoise];
    if (learned) {  // v in [-1, 1] between the logarithms
      const V part = fma(in[kStepInputs], splat<V>(0.5), splat<V>(0.5));
      eps = eps * exp(fma(part, more[1] - more[0], more[0]) * splat<V>(0.5));
    }
    this->put(in[kX], m, y, eps, in + kPast, row, out);
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
  int terms() const { return history[2] ? 3 : history[1] ? 2 : history[0] ? 1 : 0; }  // of history
  int scale_column() const { return kSample + 2 * (kTerms + terms()); }
};

// Fills in what all functors have and runs; the rest of `in` and `row` is there or absent.
template <class F>
void run(F f, const Arguments& a, const Tensor& like, Arrays<F::kInputs> in, Arrays<F::kRowInputs> row) {
  const int64_t samples = a.x.shape().rows;
  const int history = a.terms();
  Arrays<F::kOutputs> out{};
  f.clip = a.clip, f.history = history;
  f.guided = a.raw.shape().rows != samples, f.noisy = a.key || a.noise, f.next_input = a.input_out.has_value();
  in[kX] = a.x.array();
  in[kU] = a.raw.array();
  if (f.guided) in[kC] = samples_from(in[kU], samples);
  if (a.noise) in[kNoise] = a.noise->array();
  out[kNext] = a.out.array();
  for (int k = 0; k < kSampleOnPast; k++) row[k] = columns_from(a.table, k);
  if constexpr (F::kOutputs > 1) {
    for (int k = 0; k < history; k++) {
      in[kPast + k] = a.history[k]->array();
      row[kSampleOnPast + k] = columns_from(a.table, kSampleOnPast + k);
    }
    for (int k = 0; k < kTerms + history && history; k++) row[kPastRow + k] = columns_from(a.table, kSampleOnPast + history + k);
    row[kScale] = columns_from(a.table, a.scale_column());
    if (a.history_out) out[kNextPast] = a.history_out->array();
    if (f.next_input) out[kNextInput] = a.input_out->array();
    if (f.next_input && a.input_out->shape().rows != samples) out[kNextInput + 1] = samples_from(out[kNextInput], samples);
  }
  run_rows(f, a.x.shape(), in, row, out, {}, like, a.key ? keys_of(*a.key) : Keys{});
}

template <class Distribution>
void run_adaptive(const Arguments& a, const Tensor& like) {
  using F = AdaptiveStep<Distribution>;
  Arrays<F::kInputs> in{};
  Arrays<F::kRowInputs> row{};
  Array* const more = row.data() + kStepRows;
  if (a.learned) {  // the second half of the channels, with the condition; two more columns
    const int64_t outputs = a.raw.shape().rows / std::max<int64_t>(1, a.x.shape().rows);
    in[kStepInputs] = columns_from(samples_from(a.raw.array(), (outputs - 1) * a.x.shape().rows), a.x.shape().width);
    for (int k = 0; k < 2; k++) more[k] = columns_from(a.table, a.scale_column() + 1 + k);
  }
  if (a.bound) more[2] = per_row(*a.bound);
  std::vector<float> weights;
  std::vector<double> wide_weights;
  if (a.moments) {
#ifdef GK_GPU
    for (int k = 0; k < kGuidanceInputs; k++) more[3 + k] = columns_from(Rows(*a.moments).array(), k);
#else
    Array on{nullptr, 2, a.table.storage};
    if (on.storage == Storage::kDouble)
      on.data = (wide_weights = guidance_weights<double>(a.guidance, a.table, *a.moments)).data();
    else
      on.data = (weights = guidance_weights<float>(a.guidance, a.table, *a.moments)).data();
    for (int k = 0; k < kGuidanceInputs; k++) more[3 + k] = columns_from(on, k);
#endif
  }
  F f{};
  f.guidance = a.guidance;
  f.adaptive = a.moments.has_value(), f.bounded = a.bound.has_value(), f.learned = a.learned;
  run(f, a, like, in, row);
}

template <class Distribution>
void run_with_noise(const Arguments& a, const Tensor& like) {
  if (a.moments || a.bound || a.learned)
    run_adaptive<Distribution>(a, like);
  else if (a.terms() || a.input_out)
    run(SamplerStep<Distribution, true>{}, a, like, {}, {});
  else
    run(SamplerStep<Distribution, false>{}, a, like, {}, {});
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
  key ? run_with_noise<Normal>(a, x) : run_with_noise<NoNoise>(a, x);
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_sampler_step", TORCH_BOX(&sampler_step)); }

}  // namespace gk
