// What the kernels of a sampler step share: adaptive classifier-free guidance from sums over each sample.
#pragma once
#include "rows.h"

namespace gk {

// The columns of guidance_moments, with d = c - u: sum c, sum d, sum d^2, sum c d, sum c^2.
template <class V>
struct Moments {
  V c, d, dd, cd, cc;
};

struct AdaptiveGuidance {
  double rescale, parallel, max_norm, count;  // count: elements of a sample

  // m = on_c c + on_d d for guidance scale g.
  template <class V>
  GK_FN void weights(V g, const Moments<V>& sum, V& on_c, V& on_d) const {
    const V zero = {}, tiny = splat<V>(1e-30), one = splat<V>(1);
    const V norm = sqrt(sum.dd > zero ? sum.dd : tiny);
    V kept = splat<V>(max_norm) / norm;
    kept = kept < one ? kept : one;
    on_d = (g - one) * kept;
    on_c = one - on_d * splat<V>(1 - parallel) * sum.cd / (sum.cc > tiny ? sum.cc : tiny);
    const V inverse = splat<V>(1 / count), total = fma(on_c, sum.c, on_d * sum.d);
    V of_c = sum.cc - sum.c * sum.c * inverse;
    V of_m = fma(on_c * on_c, sum.cc, on_d * fma(on_c + on_c, sum.cd, on_d * sum.dd)) - total * total * inverse;
    of_c = of_c > zero ? of_c : zero;
    of_m = of_m > tiny ? of_m : tiny;
    const V factor = fma(splat<V>(rescale), sqrt(of_c / of_m), splat<V>(1 - rescale));
    on_c = on_c * factor;
    on_d = on_d * factor;
  }
};

inline Array columns_from(Array a, int64_t begin) {
  a.data = static_cast<char*>(a.data) + begin * element_bytes(a.storage);
  return a;
}

inline Array samples_from(Array a, int64_t begin) { return columns_from(a, begin * a.row_stride); }

// The rows of a coefficient table: one for all samples, or chosen by step indices in memory.
inline Array table_rows(const Tensor& table, const MaybeTensor& steps, int64_t step) {
  Array rows = Rows(table).array();
  if (steps) {
    rows.lookup = static_cast<const int64_t*>(steps->data_ptr());
    rows.lookup_stride = steps->numel() > 1 ? 1 : 0;
    rows.lookup_rows = table.size(0);
    return rows;
  }
  rows = samples_from(rows, step);
  rows.row_stride = 0;
  return rows;
}

#ifndef GK_GPU
// The weights of every sample, on_c and on_d, in the arithmetic type: once per sample instead of once per vector.
template <class S>
std::vector<S> guidance_weights(const AdaptiveGuidance& guidance, const Array& table, const Tensor& moments) {
  const int64_t samples = moments.size(0);
  const Array sums = Rows(moments).array();
  std::vector<S> weights(2 * samples + 1);
  for (int64_t i = 0; i < samples; i++) {
    S g, m[5];
    g = *read(table, looked_up(table, i), 1, 1, &g);
    const S* row = read(sums, i, 0, 5, m);
    guidance.weights<S>(g, {row[0], row[1], row[2], row[3], row[4]}, weights[2 * i], weights[2 * i + 1]);
  }
  return weights;
}
#endif

}  // namespace gk
