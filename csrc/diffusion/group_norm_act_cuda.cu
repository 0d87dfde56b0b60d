// group_norm_act on CUDA: one block for each group of each sample. The mean first, then the squares around it, rounded and
// corrected, so that a large mean costs nothing; sums go from float to double every 16 terms and then through a tree. No atomics.
// The group is read anew by every pass, which the caches serve for the groups of usual networks.
#include "group_norm_act_cuda.h"

namespace gk {
namespace {

// One group of one sample; elements are numbered in memory order, [0, size).
template <class S>
struct Group {
  const GroupNorm& job;
  int64_t sample;
  int first_channel, channels, pixels, size;

  __device__ __forceinline__ explicit Group(const GroupNorm& j) : job(j) {
    sample = blockIdx.x / j.groups;
    channels = static_cast<int>(j.channels_per_group());
    first_channel = static_cast<int>(blockIdx.x % j.groups) * channels;
    pixels = static_cast<int>(j.pixels);
    size = channels * pixels;
  }
  __device__ __forceinline__ int64_t in_sample(int at) const { return static_cast<int64_t>(first_channel) * pixels + at; }
  __device__ __forceinline__ int64_t row(int channel) const { return sample * job.channels + first_channel + channel; }
  __device__ __forceinline__ S u(int at, int channel) const {  // x + pre_bias
    const int64_t e = in_sample(at), border = job.channels_of_x * job.pixels;
    S x;
    if (e < border)
      x = read_one(job.x, sample * job.x.row_stride + e, S{});
    else
      x = read_one(job.x2, sample * job.x2.row_stride + e - border, S{});
    return job.pre_bias.data ? x + read_one(job.pre_bias, row(channel), S{}) : x;
  }
  __device__ __forceinline__ Affine<S> affine(int channel) const { return {job, row(channel), first_channel + channel}; }
};

template <class S>
struct Statistics {
  S centre, offset, rstd;  // xhat = (u - centre) rstd + offset

  __device__ __forceinline__ Statistics(const Group<S>& group, double* shared) {
    const int thread = static_cast<int>(threadIdx.x), n = group.size;
    const double inverse = group.job.inverse_size;
    const double sum = long_sum<S>(thread, n, kThreads, [&](int i) { return group.u(i, i / group.pixels); });
    centre = static_cast<S>(block_sum(sum, shared) * inverse);
    const double rest =
        block_sum(long_sum<S>(thread, n, kThreads, [&](int i) { return group.u(i, i / group.pixels) - centre; }), shared);
    const double square = block_sum(long_sum<S>(thread, n, kThreads,
                                                [&](int i) {
                                                  const S d = group.u(i, i / group.pixels) - centre;
                                                  return d * d;
                                                }),
                                    shared);
    double variance = (square - rest * rest * inverse) * inverse;
    variance = variance < 0 ? 0 : variance;  // keeps NaN
    rstd = 1 / sqrt(static_cast<S>(variance + group.job.eps));
    offset = static_cast<S>(-rest * inverse) * rstd;
  }
};

template <class S>
constexpr int kBlocks = sizeof(S) == 8;  // in double one on a multiprocessor is enough: no spills for the sake of occupancy

template <class S, bool kSilu>
__global__ void __launch_bounds__(kThreads, kBlocks<S>) forward_kernel(const GroupNorm job) {
  __shared__ double shared[kThreads];
  const Group<S> group(job);
  const Statistics<S> s(group, shared);
  for (int i = static_cast<int>(threadIdx.x); i < group.size; i += kThreads) {
    const int channel = i / group.pixels;
    const Affine<S> affine = group.affine(channel);
    const S z = fma(affine.a, fma(group.u(i, channel) - s.centre, s.rstd, s.offset), affine.b);
    write_one(job.y, group.sample * job.y.row_stride + group.in_sample(i), activated<kSilu>(z));
  }
}

template <class S, bool kSilu>
__global__ void __launch_bounds__(kThreads, kBlocks<S>)
    backward_kernel(const GroupNorm job, const GroupNormGradients d, const int segment) {
  __shared__ double shared[3][kThreads];
  const Group<S> group(job);
  const Statistics<S> s(group, shared[0]);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % segment;
  const int64_t rows = job.samples * job.channels;
  const auto xhat_at = [&](int i, int channel) { return fma(group.u(i, channel) - s.centre, s.rstd, s.offset); };
  const auto dz_at = [&](int i, S xhat, const Affine<S>& affine) {
    const S dy = read_one(d.grad, group.sample * d.grad.row_stride + group.in_sample(i), S{});
    return before_activation<kSilu>(dy, fma(affine.a, xhat, affine.b));
  };
  for (int first = 0; first < group.channels; first += kThreads / segment) {  // `segment` threads for each channel
    const int channel = first + thread / segment;
    double total[3] = {};
    if (channel < group.channels) {
      const Affine<S> affine = group.affine(channel);
      for (int p = lane; p < group.pixels;) {
        S part[3] = {};
        for (int k = 0; k < 16 && p < group.pixels; k++, p += segment) {
          const int i = channel * group.pixels + p;
          const S xhat = xhat_at(i, channel), dz = dz_at(i, xhat, affine);
          part[0] += dz, part[1] += dz * xhat, part[2] += xhat;
        }
        for (int j = 0; j < 3; j++) total[j] += part[j];
      }
    }
    __syncthreads();
    for (int j = 0; j < 3; j++) shared[j][thread] = total[j];
    __syncthreads();
    for (int half = segment / 2; half > 0; half /= 2) {
      if (lane < half)
        for (int j = 0; j < 3; j++) shared[j][thread] += shared[j][thread + half];
      __syncthreads();
    }
    if (lane == 0 && channel < group.channels)
      for (int j = 0; j < 3; j++) d.sums[j * rows + group.row(channel)] = shared[j][thread];
  }
  __syncthreads();
  const Means mean = put_channel_gradients(job, d, s.rstd, shared[0]);
  const S p = static_cast<S>(mean.g), q = static_cast<S>(mean.g_xhat);
  const int64_t border = job.channels_of_x * job.pixels;
  for (int i = thread; i < group.size; i += kThreads) {
    const int channel = i / group.pixels;
    const Affine<S> affine = group.affine(channel);
    const S xhat = xhat_at(i, channel), dx = (fma(affine.a, dz_at(i, xhat, affine), -p) - q * xhat) * s.rstd;
    const int64_t e = group.in_sample(i);
    if (e < border)
      write_one(d.x, group.sample * d.x.row_stride + e, dx);
    else
      write_one(d.x2, group.sample * d.x2.row_stride + e - border, dx);
  }
}

dim3 one_block_per_group(const GroupNorm& job) {
  STD_TORCH_CHECK(job.channels_per_group() * job.pixels < 0x7fffffff - kThreads * 16,
                  "a group has more elements than a block can count");
  STD_TORCH_CHECK(job.samples * job.groups <= 0x7fffffff, "more groups than one launch can take");
  return dim3(static_cast<unsigned>(job.samples * job.groups));
}

struct OnCuda {
  static constexpr int kChannelDim = 1;
  template <class S, bool kSilu>
  static void forward(const GroupNorm& job, const Tensor& like) {
    const OnDevice device(like);
    const auto kernel = forward_kernel<S, kSilu>;
    GK_LAUNCH(kernel, one_block_per_group(job), dim3(kThreads), device.stream, job);
  }

  template <class S, bool kSilu>
  static void backward(const GroupNorm& job, const GroupNormGradients& d, const Tensor& like) {
    const OnDevice device(like);
    int segment = 1;
    while (segment < kThreads && segment < job.pixels) segment *= 2;
    const auto kernel = backward_kernel<S, kSilu>;
    GK_LAUNCH(kernel, one_block_per_group(job), dim3(kThreads), device.stream, job, d, segment);
    put_parameter_gradients<S>(job, d, device);
  }
};

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_group_norm_act", TORCH_BOX(&group_norm_act<OnCuda>));
  m.impl("_group_norm_act_out", TORCH_BOX(&group_norm_act_out<OnCuda>));
  m.impl("_group_norm_act_backward", TORCH_BOX(&group_norm_act_backward<OnCuda>));
}

}  // namespace gk
