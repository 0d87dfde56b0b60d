// rational_quadratic_spline: spline.h over all elements. CPU: kLanes elements side by side, their parameters transposed in L1.
// CUDA: one thread per element, exponentials computed again instead of kept.
// rational_quadratic_spline_coupling (CPU): some columns of rows, by parameters that stand together; kLanes rows side by side.
#include <cstring>

#include "rows.h"
#include "spline.h"
#ifndef GK_GPU
#include "transpose.h"
#endif

namespace gk {
namespace {

struct SplineJob {  // row r of `in` owns row r of the parameters
  SplineShape shape;
  int64_t count;
  Array in, widths, heights, slopes;
  Array out, log_det;  // forward: results; backward: their gradients
  Array d_in, d_widths, d_heights, d_slopes;
  int64_t features = 1, width = 1;   // features with a spline, their parameters one after another in a row; columns of `in`
  const int64_t* columns = nullptr;  // of the features; none: the last ones
  double logit_scale = 1;            // of widths and heights
};

#ifndef GK_GPU

// A sum of exponentials of moderate numbers needs no shift in double. Where others are among them, the largest becomes zero.
GK_FN void make_moderate(lane_f32* raw, int n) {
  lane_i32 most{};
  for (int k = 0; k < n; k++) {
    const lane_i32 size = bitcast<lane_i32>(raw[k]) & 0x7fffffff;  // as an integer NaN is above all numbers
    most = size > most ? size : most;
  }
  const lane_i32 large = most > bitcast<int32_t>(80.0f);
  if (!any(large)) return;
  lane_f32 top = raw[0];
  for (int k = 1; k < n; k++) top = raw[k] > top ? raw[k] : top;
  for (int k = 0; k < n; k++) {
    const lane_f32 x = raw[k] - top, moderate = x < -80.0f ? splat<lane_f32>(-80) : x;
    raw[k] = large ? moderate : raw[k];
  }
}
GK_FN void make_moderate(double* raw, int n) {
  const double top = *std::max_element(raw, raw + n);
  for (int k = 0; k < n; k++) raw[k] -= top;
}

template <class V>
struct RawLanes {  // parameters of kCount elements as [parameter][element]; gradients take their places
  V *widths, *heights, *slopes;
  Wide<V>*weights_x, *weights_y;
  GK_FN void open(const SplineShape& shape) {
    make_moderate(widths, shape.bins), make_moderate(heights, shape.bins);
    for (int k = 0; k < shape.bins; k++)
      weights_x[k] = exp_between(widen(widths[k])), weights_y[k] = exp_between(widen(heights[k]));
  }
  GK_FN V slope(int k) const { return slopes[k]; }
  GK_FN Wide<V> weight_x(int k) const { return weights_x[k]; }
  GK_FN Wide<V> weight_y(int k) const { return weights_y[k]; }
  GK_FN void put_x(int k, V gradient) { widths[k] = gradient; }
  GK_FN void put_y(int k, V gradient) { heights[k] = gradient; }
  GK_FN void put_slope(int k, V gradient) { slopes[k] = gradient; }
};

// Rows of parameters to lanes and back; those of other types pass through `rows`, room for a group of them.
template <class S, class V>
void gather(const Array& a, int64_t first, int64_t column, int count, int n, S* rows, V* to) {
  if (n == 0) return;
  const S* from = read(a, first, column, n, rows);
  if (from == rows)
    for (int e = 1; e < count; e++) read(a, first + e, column, n, rows + e * n);
  load_columns(from, from == rows ? n : a.row_stride, count, n, to);
}
template <class S, class V>
void scatter(const Array& a, int64_t first, int64_t column, int count, int n, S* rows, const V* from) {
  if (n == 0) return;
  S* to = place(a, first, column, rows);
  store_columns(to, to == rows ? n : a.row_stride, count, n, from);
  if (to == rows)
    for (int e = 0; e < count; e++) write(a, first + e, column, rows + e * n, n);
}

template <class S>
void write_element(const Array& a, int64_t row, int64_t column, S value) {
  S* to = place(a, row, column, &value);
  *to = value;
  if (to == &value) write(a, row, column, to, 1);
}

// A column of `count` rows to a lane and back.
template <class S, class V>
V load_column(const Array& a, int64_t first, int64_t column, int count, S* buffer) {
  if (a.row_stride == 1) return load_first(read(a, 0, first, count, buffer), count, V{});
  S one;
  for (int e = 0; e < count; e++) buffer[e] = *read(a, first + e, column, 1, &one);
  return load_first(buffer, count, V{});
}
template <class S, class V>
void store_column(const Array& a, int64_t first, int64_t column, int count, S* buffer, V values) {
  const bool touching = a.row_stride == 1;
  S* to = touching ? place(a, 0, first, buffer) : buffer;
  store_first(to, values, count);
  if (to != buffer) return;
  if (touching) return write(a, 0, first, buffer, count);
  for (int e = 0; e < count; e++) write_element(a, first + e, column, buffer[e]);
}

// Whole rows, dense in both.
template <class S>
void copy_rows(const Array& from, const Array& to, int64_t first, int64_t count) {
  const int64_t begin = first * from.row_stride, end = begin + count * from.row_stride, bytes = element_bytes(to.storage);
  if (from.storage == to.storage) {
    std::memcpy(static_cast<char*>(to.data) + begin * bytes, static_cast<char*>(from.data) + begin * bytes, (end - begin) * bytes);
    return;
  }
  S one;
  for (int64_t at = begin; at < end; at++) write_element(to, 0, at, *read(from, 0, at, 1, &one));
}

template <class S, bool kInverse, bool kBackward>
void drive(const SplineJob& job, const Tensor&) {
  using V = typename Vector<S>::type;
  using W = Wide<V>;
  constexpr int kCount = Lane<V>::kCount;
  const int bins = job.shape.bins, slopes = job.shape.slopes(), numbers = 2 * bins + slopes;
  const int64_t grain = std::max<int64_t>(1, 64 / job.features);
  torch::stable::parallel_for(0, (job.count + kCount - 1) / kCount, grain, [&](int64_t begin, int64_t end) {
    std::vector<double> room(2 * bins * sizeof(W) / 8 + (3 * bins + 2) * kCount + 8);  // and rows, and 8 to align
    const size_t skip = (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
    W* weights = reinterpret_cast<W*>(reinterpret_cast<char*>(room.data()) + skip);
    V* lanes = reinterpret_cast<V*>(weights + 2 * bins);
    RawLanes<V> raw{lanes, lanes + bins, lanes + 2 * bins, weights, weights + bins};
    S* rows = reinterpret_cast<S*>(lanes + numbers);
    alignas(64) S buffer[4][kCount];
    const auto scale_logits = [&] {
      if (job.logit_scale != 1)
        for (int k = 0; k < 2 * bins; k++) lanes[k] = lanes[k] * static_cast<S>(job.logit_scale);
    };
    for (int64_t group = begin; group < end; group++) {
      const int64_t first = group * kCount;
      const int count = static_cast<int>(std::min<int64_t>(kCount, job.count - first));
      if (job.features < job.width) copy_rows<S>(kBackward ? job.out : job.in, kBackward ? job.d_in : job.out, first, count);
      for (int64_t feature = 0; feature < job.features; feature++) {
        const int64_t column = job.columns ? job.columns[feature] : job.width - job.features + feature, at = feature * numbers;
        gather(job.widths, first, at, count, bins, rows, raw.widths);
        gather(job.heights, first, at, count, bins, rows, raw.heights);
        gather(job.slopes, first, at, count, slopes, rows, raw.slopes);
        scale_logits();
        const V in = load_column<S, V>(job.in, first, column, count, buffer[0]);
        if constexpr (kBackward) {
          const V to_log_det = load_first(read(job.log_det, 0, first, count, buffer[2]), count, V{});
          const V to_out = load_column<S, V>(job.out, first, column, count, buffer[1]);
          const V to_in = spline_backward<V, kInverse>(job.shape, raw, in, to_out, to_log_det);
          store_column(job.d_in, first, column, count, buffer[3], to_in);
          scale_logits();
          scatter(job.d_widths, first, at, count, bins, rows, raw.widths);
          scatter(job.d_heights, first, at, count, bins, rows, raw.heights);
          scatter(job.d_slopes, first, at, count, slopes, rows, raw.slopes);
        } else {
          V value, log_det;
          spline_forward<V, kInverse>(job.shape, raw, in, &value, &log_det);
          store_column(job.out, first, column, count, buffer[1], value);
          S* total = static_cast<S*>(job.log_det.data) + first;
          store_first(total, feature ? load_first(total, count, V{}) + log_det : log_det, count);
        }
      }
    }
  });
}

#else

// e^(raw - top) for raw <= top, about 1e-8 relative where exp() has 1e-7; at least e^-80.
__device__ __forceinline__ double wide_exp(double raw, double top) { return exp(raw - top); }
__device__ __forceinline__ double wide_exp(float raw, float top) {
  float x = raw - top;
  const float part = x - raw;
  float lost = (raw - (x - part)) - (top + part);
  lost = x < -80.0f ? 0.0f : lost;
  x = x < -80.0f ? -80.0f : x;
  const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;  // an integer
  const float r0 = fma(n, -0.693145751953125f, x), r = fma(n, -1.4286068203e-6f, r0);
  const float r_lost = fma(n, -1.4286068203e-6f, r0 - r) + lost, one_r = r + 1.0f;
  const float more = (r - (one_r - 1.0f)) + fma(r_lost, one_r, exp_tail_polynomial(r) * r * r);
  return (widen(one_r) + widen(more)) * widen(bitcast<float>((to_int(n == n ? n : 0.0f) + 127) << 23));
}

template <class S>
struct RawMemory {
  const SplineJob& job;
  int64_t element;
  S top_x, top_y;
  __device__ __forceinline__ S at(const Array& a, int k) const { return read_one(a, element * a.row_stride + k, S{}); }
  __device__ __forceinline__ void open(const SplineShape& shape) {
    top_x = at(job.widths, 0), top_y = at(job.heights, 0);
    for (int k = 1; k < shape.bins; k++) {
      const S w = at(job.widths, k), h = at(job.heights, k);
      top_x = w > top_x ? w : top_x, top_y = h > top_y ? h : top_y;
    }
  }
  __device__ __forceinline__ S slope(int k) const { return at(job.slopes, k); }
  __device__ __forceinline__ double weight_x(int k) const { return wide_exp(at(job.widths, k), top_x); }
  __device__ __forceinline__ double weight_y(int k) const { return wide_exp(at(job.heights, k), top_y); }
  __device__ __forceinline__ void put(const Array& a, int k, S x) const { write_one(a, element * a.row_stride + k, x); }
  __device__ __forceinline__ void put_x(int k, S gradient) const { put(job.d_widths, k, gradient); }
  __device__ __forceinline__ void put_y(int k, S gradient) const { put(job.d_heights, k, gradient); }
  __device__ __forceinline__ void put_slope(int k, S gradient) const { put(job.d_slopes, k, gradient); }
};

template <class S, bool kInverse, bool kBackward>
__global__ void __launch_bounds__(kThreads) spline_kernel(const SplineJob job) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= job.count) return;
  RawMemory<S> raw{job, element, S{}, S{}};
  const S in = read_one(job.in, element, S{});
  if constexpr (kBackward) {
    const S to_out = read_one(job.out, element, S{}), to_log_det = read_one(job.log_det, element, S{});
    write_one(job.d_in, element, spline_backward<S, kInverse>(job.shape, raw, in, to_out, to_log_det));
  } else {
    S out, log_det;
    spline_forward<S, kInverse>(job.shape, raw, in, &out, &log_det);
    write_one(job.out, element, out);
    write_one(job.log_det, element, log_det);
  }
}

template <class S, bool kInverse, bool kBackward>
void drive(const SplineJob& job, const Tensor& like) {
  const OnDevice device(like);
  const int64_t blocks = (job.count + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "more elements than one launch can take");
  const auto kernel = spline_kernel<S, kInverse, kBackward>;
  GK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device.stream, job);
}

#endif

// ---- tensors

// x (..., n) as one row of n per element: in place where the leading dimensions lie evenly, as in slices of one tensor.
Array rows_of(Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  const int64_t last = static_cast<int64_t>(sizes.size()) - 1;
  bool even = sizes[last] == 1 || strides[last] == 1;
  int64_t row_stride = sizes[last], expected = -1;
  for (int64_t d = last - 1; d >= 0; d--) {
    if (sizes[d] == 1) continue;
    if (expected < 0) row_stride = expected = strides[d];
    even = even && strides[d] == expected;
    expected = strides[d] * sizes[d];
  }
  if (!even) {
    x = torch::stable::contiguous(x);
    row_stride = sizes[last];
  }
  return {x.data_ptr(), row_stride, storage_of(x.scalar_type())};
}

Array dense(Tensor& x, int64_t width = 1) {
  x = torch::stable::contiguous(x);
  return {x.data_ptr(), width, storage_of(x.scalar_type())};
}

template <bool kBackward>
void run(const SplineJob& job, bool inverse, const Tensor& x) {
  if (job.count == 0) return;
  if (job.in.storage == Storage::kDouble) {
    inverse ? drive<double, true, kBackward>(job, x) : drive<double, false, kBackward>(job, x);
  } else {
    inverse ? drive<float, true, kBackward>(job, x) : drive<float, false, kBackward>(job, x);
  }
}

SplineJob job_of(Tensor& x, Tensor& widths, Tensor& heights, Tensor& slopes, int64_t tails, double bound, double min_width,
                 double min_height, double min_slope) {
  const int bins = static_cast<int>(widths.size(-1));
  const SplineShape shape{bins, static_cast<Tails>(tails), bound, min_width, min_height, min_slope};
  return {shape, x.numel(), dense(x), rows_of(widths), rows_of(heights), rows_of(slopes), {}, {}, {}, {}, {}, {}};
}

std::tuple<Tensor, Tensor> rational_quadratic_spline(Tensor x, Tensor widths, Tensor heights, Tensor slopes, bool inverse,
                                                     int64_t tails, double bound, double min_width, double min_height,
                                                     double min_slope) {
  const ScalarType type =
      promote(promote(x.scalar_type(), widths.scalar_type()), promote(heights.scalar_type(), slopes.scalar_type()));
  Tensor out = new_tensor(x, x.sizes(), type), log_det = new_tensor(x, x.sizes(), sum_type(type));
  SplineJob job = job_of(x, widths, heights, slopes, tails, bound, min_width, min_height, min_slope);
  job.out = dense(out), job.log_det = dense(log_det);
  run<false>(job, inverse, x);
  return {out, log_det};
}

std::vector<Tensor> rational_quadratic_spline_backward(Tensor grad_out, Tensor grad_log_det, Tensor x, Tensor widths,
                                                       Tensor heights, Tensor slopes, bool inverse, int64_t tails, double bound,
                                                       double min_width, double min_height, double min_slope) {
  std::vector<Tensor> gradients;
  for (const Tensor& like : {x, widths, heights, slopes}) gradients.push_back(new_tensor(like, like.sizes()));
  SplineJob job = job_of(x, widths, heights, slopes, tails, bound, min_width, min_height, min_slope);
  job.out = dense(grad_out), job.log_det = dense(grad_log_det);
  job.d_in = dense(gradients[0]);
  job.d_widths = rows_of(gradients[1]), job.d_heights = rows_of(gradients[2]), job.d_slopes = rows_of(gradients[3]);
  run<true>(job, inverse, x);
  return gradients;
}

#ifndef GK_GPU

Array part(const Array& a, int64_t column) {
  return {static_cast<char*>(a.data) + column * element_bytes(a.storage), a.row_stride, a.storage};
}

// Rows of `params` are the numbers of all features: widths, heights and slopes of the first one, then of the next.
SplineJob coupling_job(Tensor& x, Tensor& params, std::optional<Tensor>& changed, const SplineShape& shape, double logit_scale) {
  const int numbers = 2 * shape.bins + shape.slopes();
  const int64_t width = x.size(1);
  const Array rows = rows_of(params);
  SplineJob job{shape, x.size(0), dense(x, width), rows, part(rows, shape.bins), part(rows, 2 * shape.bins), {}, {}, {}, {},
                {},    {}};
  job.features = params.size(1) / numbers, job.width = width, job.logit_scale = logit_scale;
  if (!changed) return job;
  *changed = torch::stable::contiguous(*changed);
  job.columns = static_cast<const int64_t*>(changed->data_ptr());
  for (int64_t i = 0; i < job.features; i++)
    STD_TORCH_CHECK(job.columns[i] >= 0 && job.columns[i] < width, "rational_quadratic_spline_coupling: changed is out of range");
  return job;
}

std::tuple<Tensor, Tensor> rational_quadratic_spline_coupling(Tensor x, Tensor params, std::optional<Tensor> changed, bool inverse,
                                                              int64_t bins, int64_t tails, double bound, double min_width,
                                                              double min_height, double min_slope, double logit_scale) {
  const ScalarType type = promote(x.scalar_type(), params.scalar_type());
  Tensor out = new_tensor(x, x.sizes(), type), log_det = new_tensor(x, {x.size(0)}, sum_type(type));
  const SplineShape shape{static_cast<int>(bins), static_cast<Tails>(tails), bound, min_width, min_height, min_slope};
  SplineJob job = coupling_job(x, params, changed, shape, logit_scale);
  job.out = dense(out, job.width), job.log_det = dense(log_det);
  run<false>(job, inverse, x);
  return {out, log_det};
}

std::vector<Tensor> rational_quadratic_spline_coupling_backward(Tensor grad_out, Tensor grad_log_det, Tensor x, Tensor params,
                                                                std::optional<Tensor> changed, bool inverse, int64_t bins,
                                                                int64_t tails, double bound, double min_width, double min_height,
                                                                double min_slope, double logit_scale) {
  std::vector<Tensor> gradients;
  for (const Tensor& like : {x, params}) gradients.push_back(new_tensor(like, like.sizes()));
  const SplineShape shape{static_cast<int>(bins), static_cast<Tails>(tails), bound, min_width, min_height, min_slope};
  SplineJob job = coupling_job(x, params, changed, shape, logit_scale);
  job.out = dense(grad_out, job.width), job.log_det = dense(grad_log_det);
  job.d_in = dense(gradients[0], job.width);
  const Array d_params = rows_of(gradients[1]);
  job.d_widths = d_params, job.d_heights = part(d_params, shape.bins), job.d_slopes = part(d_params, 2 * shape.bins);
  run<true>(job, inverse, x);
  return gradients;
}

#endif

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_rational_quadratic_spline", TORCH_BOX(&rational_quadratic_spline));
  m.impl("_rational_quadratic_spline_backward", TORCH_BOX(&rational_quadratic_spline_backward));
#ifndef GK_GPU
  m.impl("_rational_quadratic_spline_coupling", TORCH_BOX(&rational_quadratic_spline_coupling));
  m.impl("_rational_quadratic_spline_coupling_backward", TORCH_BOX(&rational_quadratic_spline_coupling_backward));
#endif
}

}  // namespace gk
