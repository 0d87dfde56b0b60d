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

// Absent arrays stay so.
inline Array rows_from(Array a, int64_t begin) {
  if (a.lookup) {
    a.lookup += begin * a.lookup_stride;
    return a;
  }
  return a.data ? samples_from(a, begin) : a;
}

struct GuidanceMoments {
  static constexpr int kInputs = 2, kRowInputs = 0, kOutputs = 0, kSums = 5;
  NoNoise noise;
  template <class V>
  GK_FN void operator()(const V* in, const V*, V, V*, V* term) const {
    const V c = in[1], d = c - in[0];
    term[0] = c, term[1] = d, term[2] = d * d, term[3] = c * d, term[4] = c * c;
  }
};

// Of the first samples of u and c, `width` elements each, into the rows of sums.
inline void sum_moments(RowShape shape, const Array& u, const Array& c, const Array& sums, const Tensor& like) {
  Arrays<5> columns;
  for (int k = 0; k < 5; k++) columns[k] = columns_from(sums, k);
  run_rows(GuidanceMoments{}, shape, {u, c}, {}, {}, columns, like);
}

#ifndef GK_GPU
// The weights on_c and on_d of samples, in the arithmetic type: once per sample instead of once per vector.
template <class S>
void guidance_weights(const AdaptiveGuidance& guidance, const Array& table, const Array& sums, int64_t samples, S* weights) {
  for (int64_t i = 0; i < samples; i++) {
    S g, m[5];
    g = *read(table, looked_up(table, i), 1, 1, &g);
    const S* row = read(sums, i, 0, 5, m);
    guidance.weights<S>(g, {row[0], row[1], row[2], row[3], row[4]}, weights[2 * i], weights[2 * i + 1]);
  }
}
#endif

}  // namespace gk
