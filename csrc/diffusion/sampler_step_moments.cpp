// guidance_moments: the sums, per sample, from which mean and deviation of any combination of two model outputs follow, in one
// pass.
#include "rows.h"

namespace gk {
namespace {

struct GuidanceMoments {
  static constexpr int kInputs = 2, kRowInputs = 0, kOutputs = 0, kSums = 5;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    const V u = in[0], c = in[1];
    term[0] = u, term[1] = c, term[2] = u * u, term[3] = u * c, term[4] = c * c;
  }
};

Tensor guidance_moments(Tensor model_output) {
  const Rows rows(model_output);
  const RowShape shape{rows.shape().rows / 2, rows.shape().width};
  Tensor sums = torch::stable::new_empty(model_output, {shape.rows, 5}, sum_type(model_output.scalar_type()));
  const Array u = rows.array();
  Array c = u;
  c.data = static_cast<char*>(c.data) + shape.rows * c.row_stride * element_bytes(c.storage);
  Arrays<5> columns;
  for (int k = 0; k < 5; k++) columns[k] = Rows(sums).columns(k);
  run_rows(GuidanceMoments{}, shape, {u, c}, {}, {}, columns, model_output);
  return sums;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_guidance_moments", TORCH_BOX(&guidance_moments)); }

}  // namespace gk
