// guidance_moments: the sums, per sample, from which mean and deviation of any combination of two model outputs follow, in one
// pass.
#include "sampler_step.h"

namespace gk {
namespace {

Tensor guidance_moments(Tensor model_output, bool learned) {
  const Rows rows(model_output);
  const RowShape shape{rows.shape().rows / 2, rows.shape().width / (learned ? 2 : 1)};  // the rest is a variance
  Tensor sums = new_tensor(model_output, {shape.rows, 5}, sum_type(model_output.scalar_type()));
  sum_moments(shape, rows.array(), samples_from(rows.array(), shape.rows), Rows(sums).array(), model_output);
  return sums;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_guidance_moments", TORCH_BOX(&guidance_moments)); }

}  // namespace gk
