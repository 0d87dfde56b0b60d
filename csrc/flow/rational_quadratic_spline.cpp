// rational_quadratic_spline: spline.h over all elements. CPU: kLanes elements side by side, their parameters transposed in L1.
// CUDA: one thread per element, exponentials computed again instead of kept.
#include "rows.h"
#include "spline.h"

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

template <class V>
struct RawLanes {                                // parameters of kCount elements as [parameter][element]
  V *widths, *heights, *slopes, *low_x, *low_y;  // widths and heights become their weights, then gradients
  GK_FN V width(int k) const { return widths[k]; }
  GK_FN V height(int k) const { return heights[k]; }
  GK_FN V slope(int k) const { return slopes[k]; }
  GK_FN Pair<V> weigh_x(int k, V top) {
    const Pair<V> weight = exp_pair(widths[k], top);
    widths[k] = weight.high, low_x[k] = weight.low;
    return weight;
  }
  GK_FN Pair<V> weigh_y(int k, V top) {
    const Pair<V> weight = exp_pair(heights[k], top);
    heights[k] = weight.high, low_y[k] = weight.low;
    return weight;
  }
  GK_FN Pair<V> weight_x(int k, V) const { return {widths[k], low_x[k]}; }
  GK_FN Pair<V> weight_y(int k, V) const { return {heights[k], low_y[k]}; }
  GK_FN void put_x(int k, V gradient) { widths[k] = gradient; }  // each read for the last time just before
  GK_FN void put_y(int k, V gradient) { heights[k] = gradient; }
  GK_FN void put_slope(int k, V gradient) { slopes[k] = gradient; }
};

template <class S>
void gather(const Array& a, int64_t first, int count, int n, int lanes, S* to) {
  S buffer[kTile];
  for (int begin = 0; begin < n; begin += kTile) {
    const int some = std::min<int>(kTile, n - begin);
    for (int e = 0; e < count; e++) {
      const S* p = read(a, first + e, begin, some, buffer);
      for (int j = 0; j < some; j++) to[(begin + j) * lanes + e] = p[j];
    }
  }
}
template <class S>
void scatter(const Array& a, int64_t first, int count, int n, int lanes, const S* from) {
  S buffer[kTile];
  for (int begin = 0; begin < n; begin += kTile) {
    const int some = std::min<int>(kTile, n - begin);
    for (int e = 0; e < count; e++) {
      S* p = place(a, first + e, begin, buffer);
      for (int j = 0; j < some; j++) p[j] = from[(begin + j) * lanes + e];
      if (p == buffer) write(a, first + e, begin, buffer, some);
    }
  }
}

template <class S, bool kInverse, bool kBackward>
void drive(const SplineJob& job, const Tensor&) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int bins = job.shape.bins, slopes = job.shape.slopes();
  torch::stable::parallel_for(0, (job.count + kCount - 1) / kCount, 64, [&](int64_t begin, int64_t end) {
    std::vector<S> room((4 * bins + slopes + 1) * kCount);  // + 1: aligned below
    const size_t skip = (64 - reinterpret_cast<uintptr_t>(room.data()) % 64) % 64 % sizeof(V);
    V* lanes = reinterpret_cast<V*>(reinterpret_cast<char*>(room.data()) + skip);
    RawLanes<V> raw{lanes, lanes + bins, lanes + 4 * bins, lanes + 2 * bins, lanes + 3 * bins};
    alignas(64) S buffer[4][kCount];
    for (int64_t group = begin; group < end; group++) {
      const int64_t first = group * kCount;
      const int count = static_cast<int>(std::min<int64_t>(kCount, job.count - first));
      gather(job.widths, first, count, bins, kCount, reinterpret_cast<S*>(raw.widths));
      gather(job.heights, first, count, bins, kCount, reinterpret_cast<S*>(raw.heights));
      gather(job.slopes, first, count, slopes, kCount, reinterpret_cast<S*>(raw.slopes));
      const V in = load_first(read(job.in, 0, first, count, buffer[0]), count, V{});
      if constexpr (kBackward) {
        const V to_out = load_first(read(job.out, 0, first, count, buffer[1]), count, V{});
        const V to_log_det = load_first(read(job.log_det, 0, first, count, buffer[2]), count, V{});
        const V to_in = spline_backward<V, kInverse>(job.shape, raw, in, to_out, to_log_det);
        S* d_in = place(job.d_in, 0, first, buffer[3]);
        store_first(d_in, to_in, count);
        if (d_in == buffer[3]) write(job.d_in, 0, first, d_in, count);
        scatter(job.d_widths, first, count, bins, kCount, reinterpret_cast<S*>(raw.widths));
        scatter(job.d_heights, first, count, bins, kCount, reinterpret_cast<S*>(raw.heights));
        scatter(job.d_slopes, first, count, slopes, kCount, reinterpret_cast<S*>(raw.slopes));
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

template <class S>
struct RawMemory {
  const SplineJob& job;
  int64_t element;
  __device__ __forceinline__ S at(const Array& a, int k) const { return read_one(a, element * a.row_stride + k, S{}); }
  __device__ __forceinline__ S width(int k) const { return at(job.widths, k); }
  __device__ __forceinline__ S height(int k) const { return at(job.heights, k); }
  __device__ __forceinline__ S slope(int k) const { return at(job.slopes, k); }
  __device__ __forceinline__ Pair<S> weight_x(int k, S top) const { return exp_pair(width(k), top); }
  __device__ __forceinline__ Pair<S> weight_y(int k, S top) const { return exp_pair(height(k), top); }
  __device__ __forceinline__ Pair<S> weigh_x(int k, S top) const { return weight_x(k, top); }
  __device__ __forceinline__ Pair<S> weigh_y(int k, S top) const { return weight_y(k, top); }
  __device__ __forceinline__ void put(const Array& a, int k, S x) const { write_one(a, element * a.row_stride + k, x); }
  __device__ __forceinline__ void put_x(int k, S gradient) const { put(job.d_widths, k, gradient); }
  __device__ __forceinline__ void put_y(int k, S gradient) const { put(job.d_heights, k, gradient); }
  __device__ __forceinline__ void put_slope(int k, S gradient) const { put(job.d_slopes, k, gradient); }
};

template <class S, bool kInverse, bool kBackward>
__global__ void __launch_bounds__(kThreads) spline_kernel(const SplineJob job) {
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (element >= job.count) return;
  RawMemory<S> raw{job, element};
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
  Tensor out = torch::stable::new_empty(x, x.sizes(), type), log_det = torch::stable::new_empty(x, x.sizes(), sum_type(type));
  SplineJob job = job_of(x, widths, heights, slopes, tails, bound, min_width, min_height, min_slope);
  job.out = line_of(out), job.log_det = line_of(log_det);
  run<false>(job, inverse, x);
  return {out, log_det};
}

std::vector<Tensor> rational_quadratic_spline_backward(Tensor grad_out, Tensor grad_log_det, Tensor x, Tensor widths,
                                                       Tensor heights, Tensor slopes, bool inverse, int64_t tails, double bound,
                                                       double min_width, double min_height, double min_slope) {
  std::vector<Tensor> gradients;
  for (const Tensor& like : {x, widths, heights, slopes}) gradients.push_back(torch::stable::new_empty(like, like.sizes()));
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
