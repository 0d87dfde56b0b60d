// group_norm_act on CUDA where the channels lie innermost (torch.channels_last): x is (samples, pixels, channels). A part is a run
// of pixels of one sample, a block takes 32 neighbouring channels of it, so that a warp reads what lies together. Moments of the
// channels of each part first, around their own rounded mean; a block per group merges them; then the map. No atomics.
#include "group_norm_act_cuda.h"

namespace gk {
namespace {

constexpr int kChannels = 32, kRows = kThreads / kChannels;  // of a block: threads side by side, and one above the other
constexpr int kMostParts = 64;

struct Parts {
  int64_t pixels, count;  // of one part; parts of a sample
  int64_t column_blocks;  // of kChannels channels
};

// What is known of a group once its moments are merged, (samples, groups) of it: xhat = (u - centre) rstd + offset.
template <class S>
struct Known {
  S centre, rstd, offset;
  S mean_g, mean_g_xhat;  // backward: g = dz gain weight is the gradient of xhat
};

// The pixels and the channel of one thread.
template <class S>
struct Column {
  const GroupNorm& job;
  int64_t part, sample, begin, end, channel;
  int first;  // pixel of this thread: begin + first, and then every kRows-th

  __device__ __forceinline__ Column(const GroupNorm& j, const Parts& parts) : job(j) {
    part = blockIdx.x / parts.column_blocks;
    sample = part / parts.count;
    begin = part % parts.count * parts.pixels;
    end = begin + parts.pixels < j.pixels ? begin + parts.pixels : j.pixels;
    channel = blockIdx.x % parts.column_blocks * kChannels + threadIdx.x % kChannels;
    first = static_cast<int>(threadIdx.x) / kChannels;
  }
  __device__ __forceinline__ bool there() const { return channel < job.channels; }
  __device__ __forceinline__ int64_t row() const { return sample * job.channels + channel; }
  __device__ __forceinline__ int64_t group() const { return sample * job.groups + channel / job.channels_per_group(); }
  __device__ __forceinline__ int64_t in_sample(int64_t pixel) const { return pixel * job.channels + channel; }
  __device__ __forceinline__ S pre_bias() const { return number(job.pre_bias, row(), S{}); }
  __device__ __forceinline__ S x(int64_t pixel) const {
    const int64_t of_x = job.channels_of_x;
    if (channel < of_x) return read_one(job.x, sample * job.x.row_stride + pixel * of_x + channel, S{});
    return read_one(job.x2, sample * job.x2.row_stride + pixel * (job.channels - of_x) + channel - of_x, S{});
  }
  __device__ __forceinline__ S dy(const GroupNormGradients& d, int64_t pixel) const {
    return read_one(d.grad, sample * d.grad.row_stride + in_sample(pixel), S{});
  }
  template <class F>
  __device__ __forceinline__ double sum(const F& term) const {  // of this thread's pixels; nothing beyond the last channel
    const int count = there() ? static_cast<int>(end - begin) : 0;
    return long_sum<S>(first, count, kRows, [&](int i) { return term(begin + i); });
  }
};

__device__ __forceinline__ double column_sum(double x, double* shared) {  // the same for all threads of a channel
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half >= kChannels; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[threadIdx.x % kChannels];
}

template <class S>
__global__ void __launch_bounds__(kThreads) moments_kernel(const GroupNorm job, const Parts parts, double* moments) {
  __shared__ double shared[kThreads];
  const Column<S> column(job, parts);
  const double inverse = 1.0 / static_cast<double>(column.end - column.begin);
  const S pre_bias = column.there() ? column.pre_bias() : S{};
  const auto u = [&](int64_t pixel) { return column.x(pixel) + pre_bias; };
  const S origin = static_cast<S>(column_sum(column.sum(u), shared) * inverse);
  const double rest = column_sum(column.sum([&](int64_t pixel) { return u(pixel) - origin; }), shared);
  const double square = column_sum(column.sum([&](int64_t pixel) {
    const S away = u(pixel) - origin;
    return away * away;
  }),
                                   shared);
  if (column.first == 0 && column.there()) {
    double* const to = moments + 2 * (column.part * job.channels + column.channel);
    to[0] = static_cast<double>(origin) + rest * inverse;
    to[1] = square - rest * rest * inverse;
  }
}

// The moments of a group of a sample, one block each.
template <class S>
__global__ void __launch_bounds__(kThreads)
    merge_kernel(const GroupNorm job, const Parts parts, const double* moments, Known<S>* known) {
  __shared__ double shared[kThreads];
  const int per_group = static_cast<int>(job.channels_per_group()), n = static_cast<int>(parts.count) * per_group;
  const int64_t sample = blockIdx.x / job.groups, first = blockIdx.x % job.groups * per_group;
  const auto at = [&](int i) {
    return moments + 2 * ((sample * parts.count + i / per_group) * job.channels + first + i % per_group);
  };
  const auto count = [&](int i) {
    const int64_t left = job.pixels - i / per_group * parts.pixels;
    return static_cast<double>(left < parts.pixels ? left : parts.pixels);
  };
  double total = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) total += count(i) * at(i)[0];
  const double mean = block_sum(total, shared) * job.inverse_size;
  double centred = 0;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) {
    const double away = at(i)[0] - mean;
    centred += at(i)[1] + count(i) * away * away;
  }
  double variance = block_sum(centred, shared) * job.inverse_size;
  variance = variance < 0 ? 0 : variance;  // keeps NaN
  if (threadIdx.x == 0) {
    const S centre = static_cast<S>(mean), rstd = 1 / sqrt(static_cast<S>(variance + job.eps));
    known[blockIdx.x] = {centre, rstd, static_cast<S>(static_cast<double>(centre) - mean) * rstd, S{}, S{}};
  }
}

template <class S, bool kSilu>
__global__ void __launch_bounds__(kThreads) forward_kernel(const GroupNorm job, const Parts parts, const Known<S>* known) {
  const Column<S> column(job, parts);
  if (!column.there()) return;
  const Known<S> s = known[column.group()];
  const Affine<S> affine(job, column.row(), column.channel);
  const S pre_bias = column.pre_bias();
  for (int64_t pixel = column.begin + column.first; pixel < column.end; pixel += kRows) {
    const S z = fma(affine.a, fma(column.x(pixel) + pre_bias - s.centre, s.rstd, s.offset), affine.b);
    write_one(job.y, column.sample * job.y.row_stride + column.in_sample(pixel), activated<kSilu>(z));
  }
}

// Of the channels of each part the sums of dz, dz xhat and xhat: sums (3, samples parts, channels).
template <class S, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    sums_kernel(const GroupNorm job, const GroupNormGradients d, const Parts parts, const Known<S>* known, double* sums) {
  __shared__ double shared[kThreads];
  const Column<S> column(job, parts);
  double total[3] = {};
  if (column.there()) {
    const Known<S> s = known[column.group()];
    const Affine<S> affine(job, column.row(), column.channel);
    const S pre_bias = column.pre_bias();
    for (int64_t pixel = column.begin + column.first; pixel < column.end;) {
      S part[3] = {};
      for (int k = 0; k < 16 && pixel < column.end; k++, pixel += kRows) {
        const S xhat = fma(column.x(pixel) + pre_bias - s.centre, s.rstd, s.offset);
        const S dz = before_activation<kSilu>(column.dy(d, pixel), fma(affine.a, xhat, affine.b));
        part[0] += dz, part[1] += dz * xhat, part[2] += xhat;
      }
      for (int j = 0; j < 3; j++) total[j] += part[j];
    }
  }
  const int64_t of_kind = job.samples * parts.count * job.channels;
  for (int j = 0; j < 3; j++) {
    const double all = column_sum(total[j], shared);
    if (column.first == 0 && column.there()) sums[j * of_kind + column.part * job.channels + column.channel] = all;
  }
}

// One block for each group of a sample: the sums over its parts, and what follows from them.
template <class S>
__global__ void __launch_bounds__(kThreads)
    channels_kernel(const GroupNorm job, const GroupNormGradients d, const Parts parts, const double* sums, Known<S>* known) {
  __shared__ double shared[kThreads];
  const int per_group = static_cast<int>(job.channels_per_group());
  const int64_t sample = blockIdx.x / job.groups, first = blockIdx.x % job.groups * per_group, rows = job.samples * job.channels;
  for (int i = static_cast<int>(threadIdx.x); i < per_group; i += kThreads) {
    const int64_t channel = first + i;
    double all[3] = {};
    for (int64_t part = 0; part < parts.count; part++)
      for (int j = 0; j < 3; j++)
        all[j] += sums[(j * job.samples + sample) * parts.count * job.channels + part * job.channels + channel];
    for (int j = 0; j < 3; j++) d.sums[j * rows + sample * job.channels + channel] = all[j];  // read by this thread alone
  }
  Known<S>& s = known[blockIdx.x];
  const Means mean = put_channel_gradients(job, d, s.rstd, shared);
  if (threadIdx.x == 0) s.mean_g = static_cast<S>(mean.g), s.mean_g_xhat = static_cast<S>(mean.g_xhat);
}

template <class S, bool kSilu>
__global__ void __launch_bounds__(kThreads)
    gradient_kernel(const GroupNorm job, const GroupNormGradients d, const Parts parts, const Known<S>* known) {
  const Column<S> column(job, parts);
  if (!column.there()) return;
  const Known<S> s = known[column.group()];
  const Affine<S> affine(job, column.row(), column.channel);
  const S pre_bias = column.pre_bias();
  const int64_t of_x = job.channels_of_x, channel = column.channel;
  for (int64_t pixel = column.begin + column.first; pixel < column.end; pixel += kRows) {
    const S xhat = fma(column.x(pixel) + pre_bias - s.centre, s.rstd, s.offset);
    const S dz = before_activation<kSilu>(column.dy(d, pixel), fma(affine.a, xhat, affine.b));
    const S dx = (fma(affine.a, dz, -s.mean_g) - s.mean_g_xhat * xhat) * s.rstd;
    if (channel < of_x)
      write_one(d.x, column.sample * d.x.row_stride + pixel * of_x + channel, dx);
    else
      write_one(d.x2, column.sample * d.x2.row_stride + pixel * (job.channels - of_x) + channel - of_x, dx);
  }
}

// The launches of one call, and what they leave for each other.
template <class S>
class Run {
 public:
  Run(const GroupNorm& j, const Tensor& like) : job(j), device(like) {
    const int64_t least = 16 * kRows;
    parts.pixels = std::max(least, (j.pixels + kMostParts - 1) / kMostParts);
    parts.count = (j.pixels + parts.pixels - 1) / parts.pixels;
    parts.column_blocks = (j.channels + kChannels - 1) / kChannels;
    STD_TORCH_CHECK(parts.pixels <= 0x3fffffff && parts.count * j.channels_per_group() <= 0x3fffffff &&
                        j.samples * parts.count * parts.column_blocks <= 0x7fffffff && j.samples * j.groups <= 0x7fffffff,
                    "more elements than one launch can take");
    blocks = dim3(static_cast<unsigned>(j.samples * parts.count * parts.column_blocks));
    groups = dim3(static_cast<unsigned>(j.samples * j.groups));
    numbers_ = room(3 * j.samples * parts.count * j.channels, like);  // moments, and then the three sums in their place
    known_ = room(j.samples * j.groups * static_cast<int64_t>(sizeof(Known<S>) + 7) / 8, like);
    numbers = static_cast<double*>(numbers_.data_ptr());
    known = reinterpret_cast<Known<S>*>(known_.data_ptr());
    const auto moments = moments_kernel<S>;
    GK_LAUNCH(moments, blocks, threads, device.stream, job, parts, numbers);
    const auto merge = merge_kernel<S>;
    GK_LAUNCH(merge, groups, threads, device.stream, job, parts, numbers, known);
  }
  const GroupNorm& job;
  const OnDevice device;
  Parts parts;
  dim3 blocks, groups, threads{kThreads};
  double* numbers;
  Known<S>* known;

 private:
  static Tensor room(int64_t doubles, const Tensor& like) { return new_tensor(like, {doubles}, ScalarType::Double); }
  Tensor numbers_, known_;
};

struct OnCudaLast {
  static constexpr int kChannelDim = 2;
  template <class S, bool kSilu>
  static void forward(const GroupNorm& job, const Tensor& like) {
    const Run<S> run(job, like);
    const auto kernel = forward_kernel<S, kSilu>;
    GK_LAUNCH(kernel, run.blocks, run.threads, run.device.stream, job, run.parts, run.known);
  }
  template <class S, bool kSilu>
  static void backward(const GroupNorm& job, const GroupNormGradients& d, const Tensor& like) {
    const Run<S> run(job, like);
    const auto sums = sums_kernel<S, kSilu>;
    GK_LAUNCH(sums, run.blocks, run.threads, run.device.stream, job, d, run.parts, run.known, run.numbers);
    const auto channels = channels_kernel<S>;
    GK_LAUNCH(channels, run.groups, run.threads, run.device.stream, job, d, run.parts, run.numbers, run.known);
    const auto gradient = gradient_kernel<S, kSilu>;
    GK_LAUNCH(gradient, run.blocks, run.threads, run.device.stream, job, d, run.parts, run.known);
    put_parameter_gradients<S>(job, d, run.device);
  }
};

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_group_norm_act_channels_last", TORCH_BOX(&group_norm_act<OnCudaLast>));
  m.impl("_group_norm_act_channels_last_out", TORCH_BOX(&group_norm_act_out<OnCudaLast>));
  m.impl("_group_norm_act_channels_last_backward", TORCH_BOX(&group_norm_act_backward<OnCudaLast>));
}

}  // namespace gk
