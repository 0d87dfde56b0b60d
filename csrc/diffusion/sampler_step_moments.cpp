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
    const V c = in[1], d = c - in[0];
    term[0] = c, term[1] = d, term[2] = d * d, term[3] = c * d, term[4] = c * c;
  }
};

Tensor guidance_moments(Tensor model_output, bool learned) {
  const Rows rows(model_output);
  const RowShape shape{rows.shape().rows / 2, rows.shape().width / (learned ? 2 : 1)};  // the rest is a variance
  Tensor sums = new_tensor(model_output, {shape.rows, 5}, sum_type(model_output.scalar_type()));
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
