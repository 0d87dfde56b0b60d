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

// What a call has, known when it is run ...
struct Form {
  int history;  // terms
  bool guided, noisy, next_input, adaptive, bounded, learned;
};
// ... or when it is compiled: the step of samplers with guidance and without noise, which writes the next model input once more.
// On a CPU whose memory keeps up it is a fifth faster than one that asks for every vector.
template <int kTermsOfHistory, bool kAdaptive>
struct GuidedForm {
  static constexpr int history = kTermsOfHistory;
  static constexpr bool guided = !kAdaptive, noisy = false, next_input = true, adaptive = kAdaptive, bounded = false,
                        learned = false;
  static constexpr unsigned kReads = 1u << kX | 1u << kU | 1u << kC | ((1u << history) - 1) << kPast;
  static constexpr unsigned kWrites = 1u << kNext | 1u << kNextInput | (history ? 1u << kNextPast : 0);
};

template <class Distribution, class Form, bool kMore>  // kMore: a history, or the next model input
struct SamplerStep : Form {
  using Form::history, Form::guided, Form::noisy, Form::next_input;
  static constexpr int kInputs = kMore ? kStepInputs : kPast, kRowInputs = kMore ? kStepRows : kSampleOnPast;
  static constexpr int kOutputs = kMore ? kStepOutputs : 1, kSums = 0;
  Distribution noise;
  double clip;

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
template <class Distribution, class Form>
struct AdaptiveStep : SamplerStep<Distribution, Form, true> {
  using Form::adaptive, Form::bounded, Form::learned;
  static constexpr int kInputs = kStepInputs + 1;
  // Behind the columns of the table: the logarithms of the least and the largest variance, the bound, guidance.
  static constexpr int kRowInputs = kStepRows + 3 + kGuidanceInputs;
  AdaptiveGuidance guidance;

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
  Array weights{};             // on the CPU: of adaptive guidance
  int64_t begin = 0, end = 0;  // the samples to take
  bool guided() const { return raw.shape().rows != x.shape().rows; }
  bool adaptive() const {
    return moments || (guided() && (guidance.rescale != 0 || guidance.parallel != 1 || guidance.max_norm < HUGE_VAL));
  }
  int terms() const { return history[2] ? 3 : history[1] ? 2 : history[0] ? 1 : 0; }  // of history
  int scale_column() const { return kSample + 2 * (kTerms + terms()); }
};

Form form_of(const Arguments& a) {
  return {a.terms(), a.guided(), a.key || a.noise, a.input_out.has_value(), a.adaptive(), a.bound.has_value(), a.learned};
}

// Fills in what all functors have and runs; the rest of `in` and `row` is there or absent.
template <class F>
void run(F f, const Arguments& a, const Tensor& like, Arrays<F::kInputs> in, Arrays<F::kRowInputs> row) {
  const int64_t samples = a.x.shape().rows;
  const Form form = form_of(a);
  Arrays<F::kOutputs> out{};
  f.clip = a.clip;
  if constexpr (std::is_base_of<Form, F>::value) static_cast<Form&>(f) = form;
  in[kX] = a.x.array();
  in[kU] = a.raw.array();
  if (form.guided) in[kC] = samples_from(in[kU], samples);
  if (a.noise) in[kNoise] = a.noise->array();
  out[kNext] = a.out.array();
  for (int k = 0; k < kSampleOnPast; k++) row[k] = columns_from(a.table, k);
  if constexpr (F::kOutputs > 1) {
    const int history = form.history;
    for (int k = 0; k < history; k++) {
      in[kPast + k] = a.history[k]->array();
      row[kSampleOnPast + k] = columns_from(a.table, kSampleOnPast + k);
    }
    for (int k = 0; k < kTerms + history && history; k++) row[kPastRow + k] = columns_from(a.table, kSampleOnPast + history + k);
    row[kScale] = columns_from(a.table, a.scale_column());
    if (a.history_out) out[kNextPast] = a.history_out->array();
    if (form.next_input) out[kNextInput] = a.input_out->array();
    if (form.next_input && a.input_out->shape().rows != samples) out[kNextInput + 1] = samples_from(out[kNextInput], samples);
  }
  for (Array& array : in) array = rows_from(array, a.begin);
  for (Array& array : row) array = rows_from(array, a.begin);
  for (Array& array : out) array = rows_from(array, a.begin);
  run_rows(f, {a.end - a.begin, a.x.shape().width}, in, row, out, {}, like, a.key ? keys_of(*a.key) : Keys{});
}

template <class Distribution, class Form>
void run_adaptive(const Arguments& a, const Tensor& like) {
  using F = AdaptiveStep<Distribution, Form>;
  Arrays<F::kInputs> in{};
  Arrays<F::kRowInputs> row{};
  Array* const more = row.data() + kStepRows;
  if (a.learned) {  // the second half of the channels, with the condition; two more columns
    const int64_t outputs = a.raw.shape().rows / std::max<int64_t>(1, a.x.shape().rows);
    in[kStepInputs] = columns_from(samples_from(a.raw.array(), (outputs - 1) * a.x.shape().rows), a.x.shape().width);
    for (int k = 0; k < 2; k++) more[k] = columns_from(a.table, a.scale_column() + 1 + k);
  }
  if (a.bound) more[2] = per_row(*a.bound);
#ifdef GK_GPU
  if (a.moments)
    for (int k = 0; k < kGuidanceInputs; k++) more[3 + k] = columns_from(Rows(*a.moments).array(), k);
#else
  if (a.weights.data)
    for (int k = 0; k < kGuidanceInputs; k++) more[3 + k] = columns_from(a.weights, k);
#endif
  F f{};
  f.guidance = a.guidance;
  run(f, a, like, in, row);
}

#ifndef GK_GPU
// The steps that GuidedForm serves; whether this is one.
template <int kTermsOfHistory>
bool run_guided(const Arguments& a, const Tensor& like) {
  const Form form = form_of(a);
  const bool serves = form.history == kTermsOfHistory && form.guided && !form.noisy && form.next_input && !form.bounded &&
                      !form.learned && a.input_out->shape().rows == a.x.shape().rows;
  if (serves && form.adaptive)
    run_adaptive<NoNoise, GuidedForm<kTermsOfHistory, true>>(a, like);
  else if (serves)
    run(SamplerStep<NoNoise, GuidedForm<kTermsOfHistory, false>, true>{}, a, like, {}, {});
  return serves;
}
#endif

template <class Distribution>
void run_with_noise(const Arguments& a, const Tensor& like) {
  if (a.adaptive() || a.bound || a.learned)
    run_adaptive<Distribution, Form>(a, like);
  else if (a.terms() || a.input_out)
    run(SamplerStep<Distribution, Form, true>{}, a, like, {}, {});
  else
    run(SamplerStep<Distribution, Form, false>{}, a, like, {}, {});
}

void run_any(const Arguments& a, const Tensor& like) {
#ifndef GK_GPU
  if (run_guided<0>(a, like) || run_guided<1>(a, like) || run_guided<2>(a, like)) return;
#endif
  a.key ? run_with_noise<Normal>(a, like) : run_with_noise<NoNoise>(a, like);
}

#ifndef GK_GPU
constexpr int64_t kInCache = 1 << 18;  // elements of the model outputs, for each thread

// Adaptive guidance: where the moments are not given they are taken here, of as many samples at a time as stay in the cache for the
// step. Noise counts elements from the first sample on, so that with it all samples are one block.
template <class S>
void run_weighted(Arguments a, const Tensor& like) {
  const RowShape shape = a.x.shape();
  const int64_t in_cache = kInCache * torch::stable::get_num_threads() / (2 * std::max<int64_t>(1, shape.width));
  const int64_t block = a.moments || a.key ? shape.rows : std::max<int64_t>(1, in_cache);
  std::vector<S> sums(a.moments ? 0 : 5 * shape.rows), weights(2 * shape.rows);
  const Array u = a.raw.array(), table = a.table;
  const std::optional<Rows> given = a.moments ? std::optional<Rows>(std::in_place, *a.moments) : std::nullopt;
  const Array moments = given ? given->array() : Array{sums.data(), 5, table.storage};
  a.weights = {weights.data(), 2, table.storage};
  for (a.begin = 0; a.begin < shape.rows; a.begin = a.end) {
    a.end = std::min(shape.rows, a.begin + block);
    const int64_t samples = a.end - a.begin;
    const Array of_block = rows_from(moments, a.begin);
    if (!a.moments) sum_moments({samples, shape.width}, rows_from(u, a.begin), rows_from(u, shape.rows + a.begin), of_block, like);
    guidance_weights<S>(a.guidance, rows_from(table, a.begin), of_block, samples, weights.data() + 2 * a.begin);
    run_any(a, like);
  }
}
#endif

void sampler_step(Tensor x, Tensor model_output, Tensor table, int64_t step, MaybeTensor h1, MaybeTensor h2, MaybeTensor h3,
                  Tensor out, MaybeTensor history_out, MaybeTensor input_out, MaybeTensor steps, MaybeTensor noise, MaybeTensor key,
                  MaybeTensor moments, MaybeTensor bound, std::optional<double> clip, double rescale, double parallel,
                  std::optional<double> max_norm, bool learned) {
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
              clip.value_or(HUGE_VAL),
              {},
              learned};
  a.guidance = {rescale, parallel, max_norm.value_or(HUGE_VAL), static_cast<double>(std::max<int64_t>(1, a.x.shape().width))};
  a.end = a.x.shape().rows;
#ifdef GK_GPU
  STD_TORCH_CHECK(a.moments || !a.adaptive(), "sampler_step: adaptive guidance needs moments");
  run_any(a, x);
#else
  if (!a.adaptive())
    run_any(a, x);
  else if (a.table.storage == Storage::kDouble)
    run_weighted<double>(std::move(a), x);
  else
    run_weighted<float>(std::move(a), x);
#endif
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_sampler_step", TORCH_BOX(&sampler_step)); }

}  // namespace gk
