// dequantize: (x + u) scaled and shifted, or the logit of that, and its log-determinant per sample, with the noise u made from the
// key in registers.
#include "rows.h"

namespace gk {
namespace {

template <bool kLogit>
struct Dequantize {
  static constexpr int kInputs = 1, kRowInputs = 0, kOutputs = 1, kSums = 1;
  Uniform noise;
  double levels, scale, low, high, log_scale;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V noise_lane, V* out, V* term) const {
    const V u = to_float<V>(to_int(noise_lane * 65536)) * splat<V>(1.0 / 65536), v = in[0] + u;  // exact
    if constexpr (kLogit) {
      const V log_v = log(v * splat<V>(scale) + splat<V>(low));
      const V log_rest = log((splat<V>(levels) - v) * splat<V>(scale) + splat<V>(high));
      out[0] = log_v - log_rest;
      term[0] = splat<V>(log_scale) - log_v - log_rest;
    } else {
      out[0] = v * splat<V>(scale) + splat<V>(low);
      term[0] = splat<V>(log_scale);
    }
  }
};

ScalarType type_of(int64_t number) {  // positions in DTYPES of _dequantize.py
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  return kTypes[number];
}

std::tuple<Tensor, Tensor> dequantize(Tensor x, Tensor key, int64_t levels, double scale, double low, double high, bool logit,
                                      int64_t dtype) {
  const ScalarType type = type_of(dtype);
  Tensor y = new_tensor(x, x.sizes(), type), log_det = new_tensor(x, {x.size(0)}, sum_type(type));
  const Rows x_rows(x), y_rows(y);
  const auto run = [&](auto is_logit) {
    const Dequantize<is_logit()> f{{}, static_cast<double>(levels), scale, low, high, std::log(scale)};
    run_rows(f, x_rows.shape(), {x_rows.array()}, {}, {y_rows.array()}, {per_row(log_det)}, x, keys_of(key));
  };
  logit ? run(std::true_type{}) : run(std::false_type{});
  return {y, log_det};
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_dequantize", TORCH_BOX(&dequantize)); }

}  // namespace gk
