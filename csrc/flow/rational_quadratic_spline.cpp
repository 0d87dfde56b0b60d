// rational_quadratic_spline: spline.h over all elements. CPU: kLanes elements side by side, their parameters transposed in L1.
// CUDA: one thread per element, exponentials computed again instead of kept.
#include "rows.h"
#include "spline.h"
#ifndef GK_GPU
#include "transpose.h"
#endif

namespace gk {
namespace {

struct SplineJob {  // element e owns row e of the parameters
  SplineShape shape;
  int64_t count;
  Array in, widths, heights, slopes;
  Array out, log_det;  // forward: results; backward: their gradients
  Array d_in, d_widths, d_heights, d_slopes;
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
void gather(const Array& a, int64_t first, int count, int n, S* rows, V* to) {
  if (n == 0) return;
  const S* from = read(a, first, 0, n, rows);
  if (from == rows)
    for (int e = 1; e < count; e++) read(a, first + e, 0, n, rows + e * n);
  load_columns(from, from == rows ? n : a.row_stride, count, n, to);
}
template <class S, class V>
void scatter(const Array& a, int64_t first, int count, int n, S* rows, const V* from) {
  if (n == 0) return;
  S* to = place(a, first, 0, rows);
  store_columns(to, to == rows ? n : a.row_stride, count, n, from);
  if (to == rows)
    for (int e = 0; e < count; e++) write(a, first + e, 0, rows + e * n, n);
}

template <class S, bool kInverse, bool kBackward>
void drive(const SplineJob& job, const Tensor&) {
  using V = typename Vector<S>::type;
  using W = Wide<V>;
  constexpr int kCount = Lane<V>::kCount;
  const int bins = job.shape.bins, slopes = job.shape.slopes();
  torch::stable::parallel_for(0, (job.count + kCount - 1) / kCount, 64, [&](int64_t begin, int64_t end) {
    std::vector<double> room(2 * bins * sizeof(W) / 8 + (3 * bins + 2) * kCount + 8);  // and rows, and 8 to align
    const size_t skip = (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64;
    W* weights = reinterpret_cast<W*>(reinterpret_cast<char*>(room.data()) + skip);
    V* lanes = reinterpret_cast<V*>(weights + 2 * bins);
    RawLanes<V> raw{lanes, lanes + bins, lanes + 2 * bins, weights, weights + bins};
    S* rows = reinterpret_cast<S*>(lanes + 2 * bins + slopes);
    alignas(64) S buffer[4][kCount];
    for (int64_t group = begin; group < end; group++) {
      const int64_t first = group * kCount;
      const int count = static_cast<int>(std::min<int64_t>(kCount, job.count - first));
      gather(job.widths, first, count, bins, rows, raw.widths);
      gather(job.heights, first, count, bins, rows, raw.heights);
      gather(job.slopes, first, count, slopes, rows, raw.slopes);
      const V in = load_first(read(job.in, 0, first, count, buffer[0]), count, V{});
      if constexpr (kBackward) {
        const V to_out = load_first(read(job.out, 0, first, count, buffer[1]), count, V{});
        const V to_log_det = load_first(read(job.log_det, 0, first, count, buffer[2]), count, V{});
        const V to_in = spline_backward<V, kInverse>(job.shape, raw, in, to_out, to_log_det);
        S* d_in = place(job.d_in, 0, first, buffer[3]);
        store_first(d_in, to_in, count);
        if (d_in == buffer[3]) write(job.d_in, 0, first, d_in, count);
        scatter(job.d_widths, first, count, bins, rows, raw.widths);
        scatter(job.d_heights, first, count, bins, rows, raw.heights);
        scatter(job.d_slopes, first, count, slopes, rows, raw.slopes);
      } else {
        V value, log_det;
        spline_forward<V, kInverse>(job.shape, raw, in, &value, &log_det);
        S* out = place(job.out, 0, first, buffer[1]);
        store_first(out, value, count);
        if (out == buffer[1]) write(job.out, 0, first, out, count);
        store_first(static_cast<S*>(job.log_det.data) + first, log_det, count);
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

Array line_of(Tensor& x) {
  x = torch::stable::contiguous(x);
  return {x.data_ptr(), x.numel(), storage_of(x.scalar_type())};
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
  return {shape, x.numel(), line_of(x), rows_of(widths), rows_of(heights), rows_of(slopes), {}, {}, {}, {}, {}, {}};
}

std::tuple<Tensor, Tensor> rational_quadratic_spline(Tensor x, Tensor widths, Tensor heights, Tensor slopes, bool inverse,
                                                     int64_t tails, double bound, double min_width, double min_height,
                                                     double min_slope) {
  const ScalarType type =
      promote(promote(x.scalar_type(), widths.scalar_type()), promote(heights.scalar_type(), slopes.scalar_type()));
  Tensor out = new_tensor(x, x.sizes(), type), log_det = new_tensor(x, x.sizes(), sum_type(type));
  SplineJob job = job_of(x, widths, heights, slopes, tails, bound, min_width, min_height, min_slope);
  job.out = line_of(out), job.log_det = line_of(log_det);
  run<false>(job, inverse, x);
  return {out, log_det};
}

std::vector<Tensor> rational_quadratic_spline_backward(Tensor grad_out, Tensor grad_log_det, Tensor x, Tensor widths,
                                                       Tensor heights, Tensor slopes, bool inverse, int64_t tails, double bound,
                                                       double min_width, double min_height, double min_slope) {
  std::vector<Tensor> gradients;
  for (const Tensor& like : {x, widths, heights, slopes}) gradients.push_back(new_tensor(like, like.sizes()));
  SplineJob job = job_of(x, widths, heights, slopes, tails, bound, min_width, min_height, min_slope);
  job.out = line_of(grad_out), job.log_det = line_of(grad_log_det);
  job.d_in = line_of(gradients[0]);
  job.d_widths = rows_of(gradients[1]), job.d_heights = rows_of(gradients[2]), job.d_slopes = rows_of(gradients[3]);
  run<true>(job, inverse, x);
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_rational_quadratic_spline", TORCH_BOX(&rational_quadratic_spline));
  m.impl("_rational_quadratic_spline_backward", TORCH_BOX(&rational_quadratic_spline_backward));
}

}  // namespace gk
