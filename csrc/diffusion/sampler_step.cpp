// sampler_step: guidance, prediction, clip, the next sample, the next history term and the next model input in one pass.
//
//   m = g_u u + g_c c,   y = clip(a x + b m),   every output = C . [x, m, y, noise, h1, h2]
//
// The coefficients are row inputs: one row of a table, chosen by a number or by a tensor of step indices (one, or one per sample).
#include "rows.h"

namespace gk {
namespace {

// Columns of the table: g_u, g_c, a, b, then the row of the sample, the row of the history, and the scale of the model input.
constexpr int kGuidance = 0, kPrediction = 2, kSample = 4;

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
  GK_FN void operator()(const V* in, const V* row, V eps, V* out, V*) const {
    const V x = in[0], m = kRaw == 2 ? fma(row[kGuidance], in[1], row[kGuidance + 1] * in[kRaw]) : in[1];
    V y = fma(row[kPrediction], x, row[kPrediction + 1] * m);
    y = y < splat<V>(-clip) ? splat<V>(-clip) : y;  // this order of operands keeps NaN
    y = y > splat<V>(clip) ? splat<V>(clip) : y;
    if constexpr (kGivenNoise) eps = in[kInputs - 1];
    const V* history = in + 1 + kRaw;
    const V next = combine(row + kSample, x, m, y, eps, history);
    out[0] = next;
    if constexpr (kHistory > 0) out[1] = combine(row + kSample + kTerms, x, m, y, eps, history);
    if constexpr (kNextInput)
      for (int k = kOutputs - kRaw; k < kOutputs; k++) out[k] = next * row[kRowInputs - 1];
  }
};

Array part(const Rows& x, int64_t rows, int k) {  // samples [k rows, (k + 1) rows)
  Array a = x.array();
  a.data = static_cast<char*>(a.data) + k * rows * a.row_stride * element_bytes(a.storage);
  return a;
}

struct Arguments {
  Rows x, raw, out;
  std::optional<Rows> h1, h2, noise, history_out, input_out;
  Array table;
  MaybeTensor key;
  double clip;
};

template <int kRaw, int kHistory, class Distribution, bool kGivenNoise, bool kNextInput>
void run(const Arguments& a, const Tensor& like) {
  using F = SamplerStep<kRaw, kHistory, Distribution, kGivenNoise, kNextInput>;
  const RowShape shape = a.x.shape();
  Arrays<F::kInputs> in{a.x.array()};
  int at = 1;
  for (int k = 0; k < kRaw; k++) in[at++] = part(a.raw, shape.rows, k);
  if constexpr (kHistory > 0) in[at++] = a.h1->array();
  if constexpr (kHistory > 1) in[at++] = a.h2->array();
  if constexpr (kGivenNoise) in[at++] = a.noise->array();
  Arrays<F::kRowInputs> coefficients;
  for (int k = 0; k < F::kRowInputs; k++) {
    coefficients[k] = a.table;
    coefficients[k].data = static_cast<char*>(a.table.data) + k * element_bytes(a.table.storage);
  }
  Arrays<F::kOutputs> out{a.out.array()};
  if constexpr (kHistory > 0) out[1] = a.history_out->array();
  if constexpr (kNextInput)
    for (int k = 0; k < kRaw; k++) out[F::kOutputs - kRaw + k] = part(*a.input_out, shape.rows, k);
  run_rows(F{{}, a.clip}, shape, in, coefficients, out, {}, like, a.key ? keys_of(*a.key) : Keys{});
}

template <int kRaw, int kHistory>
void run_with_noise(const Arguments& a, const Tensor& like) {
  const auto with = [&](auto next_input) {
    if (a.key)
      run<kRaw, kHistory, Normal, false, next_input()>(a, like);
    else if (a.noise)
      run<kRaw, kHistory, NoNoise, true, next_input()>(a, like);
    else
      run<kRaw, kHistory, NoNoise, false, next_input()>(a, like);
  };
  a.input_out ? with(std::true_type{}) : with(std::false_type{});
}

template <int kRaw>
void run_with_history(const Arguments& a, const Tensor& like) {
  if (a.h2)
    run_with_noise<kRaw, 2>(a, like);
  else if (a.h1)
    run_with_noise<kRaw, 1>(a, like);
  else
    run_with_noise<kRaw, 0>(a, like);
}

void sampler_step(Tensor x, Tensor model_output, Tensor table, MaybeTensor steps, int64_t step, MaybeTensor h1, MaybeTensor h2,
                  MaybeTensor noise, MaybeTensor key, double clip, Tensor out, MaybeTensor history_out, MaybeTensor input_out) {
  const auto rows_of = [](const MaybeTensor& t) { return t ? std::optional<Rows>(std::in_place, *t) : std::nullopt; };
  Arguments a{Rows(x),
              Rows(model_output),
              Rows(out),
              rows_of(h1),
              rows_of(h2),
              rows_of(noise),
              rows_of(history_out),
              rows_of(input_out),
              Rows(table).array(),
              key,
              clip};
  if (steps) {
    a.table.lookup = static_cast<const int64_t*>(steps->data_ptr());
    a.table.lookup_stride = steps->numel() > 1 ? 1 : 0;
    a.table.lookup_rows = table.size(0);
  } else {
    a.table.data = static_cast<char*>(a.table.data) + step * a.table.row_stride * element_bytes(a.table.storage);
    a.table.row_stride = 0;
  }
  if (model_output.size(0) == x.size(0))
    run_with_history<1>(a, x);
  else
    run_with_history<2>(a, x);
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_sampler_step", TORCH_BOX(&sampler_step)); }

}  // namespace gk
