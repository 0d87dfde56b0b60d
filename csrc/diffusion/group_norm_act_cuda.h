// What both layouts of group_norm_act on CUDA share.
#pragma once
#include "group_norm_act.h"

namespace gk {

__device__ __forceinline__ double block_sum(double x, double* shared) {  // the same for all threads
  __syncthreads();
  shared[threadIdx.x] = x;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  return shared[0];
}

// The sum of term(element) over [from, n) in steps, in S for 16 terms and then in double.
template <class S, class F>
__device__ __forceinline__ double long_sum(int from, int n, int step, const F& term) {
  double total = 0;
  for (int i = from; i < n;) {
    S part{};
    for (int k = 0; k < 16 && i < n; k++, i += step) part += term(i);
    total += part;
  }
  return total;
}

template <class S>
__device__ __forceinline__ S number(const Array& a, int64_t at, S absent) {
  return a.data ? read_one(a, at, S{}) : absent;
}
template <class S>
__device__ __forceinline__ void put(const Array& a, int64_t at, double x) {
  if (a.data) write_one(a, at, static_cast<S>(x));
}

template <class S>
struct Affine {  // z = a xhat + b; row counts channels of all samples
  S gain, weight, bias, a, b;
  __device__ __forceinline__ Affine(const GroupNorm& job, int64_t row, int64_t channel) {
    gain = 1 + number(job.scale, row, S{});
    weight = number(job.weight, channel, S{1});
    bias = number(job.bias, channel, S{});
    a = weight * gain;
    b = fma(bias, gain, number(job.shift, row, S{}));
  }
};

// What follows from the sums over pixels in d.sums, with a block for each group of a sample: the gradients per sample and channel,
// and the means over the group of g = dz gain weight, the gradient of xhat, and of g xhat.
struct Means {
  double g, g_xhat;
};
template <class S>
__device__ __forceinline__ Means put_channel_gradients(const GroupNorm& job, const GroupNormGradients& d, S rstd, double* shared) {
  const int64_t rows = job.samples * job.channels, per_group = job.channels_per_group();
  const int64_t first = blockIdx.x % job.groups * per_group, of_sample = blockIdx.x / job.groups * job.channels;
  double g = 0, g_xhat = 0;
  for (int64_t channel = first + threadIdx.x; channel < first + per_group; channel += kThreads) {
    const int64_t row = of_sample + channel;
    const double dz = d.sums[row], dz_xhat = d.sums[rows + row];
    const Affine<S> affine(job, row, channel);
    g += affine.a * dz, g_xhat += affine.a * dz_xhat;
    put<S>(d.shift, row, dz);
    put<S>(d.scale, row, affine.weight * dz_xhat + affine.bias * dz);
  }
  const Means mean{block_sum(g, shared) * job.inverse_size, block_sum(g_xhat, shared) * job.inverse_size};
  for (int64_t channel = first + threadIdx.x; channel < first + per_group; channel += kThreads) {
    const int64_t row = of_sample + channel;
    const double of_pixels = mean.g * static_cast<double>(job.pixels) + mean.g_xhat * d.sums[2 * rows + row];
    put<S>(d.pre_bias, row, (Affine<S>(job, row, channel).a * d.sums[row] - of_pixels) * rstd);
  }
  return mean;
}

template <class S>
__global__ void __launch_bounds__(kThreads) parameters_kernel(const GroupNorm job, const GroupNormGradients d) {
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x, rows = job.samples * job.channels;
  if (channel >= job.channels) return;
  double weight = 0, bias = 0;
  for (int64_t row = channel; row < rows; row += job.channels) {
    const double gain = 1 + (job.scale.data ? static_cast<double>(read_one(job.scale, row, S{})) : 0.0);
    weight += gain * d.sums[rows + row], bias += gain * d.sums[row];
  }
  put<S>(d.weight, channel, weight);
  put<S>(d.bias, channel, bias);
}

template <class S>
void put_parameter_gradients(const GroupNorm& job, const GroupNormGradients& d, const OnDevice& device) {
  if (!d.weight.data && !d.bias.data) return;
  const auto kernel = parameters_kernel<S>;
  GK_LAUNCH(kernel, dim3(static_cast<unsigned>((job.channels + kThreads - 1) / kThreads)), dim3(kThreads), device.stream, job, d);
}

}  // namespace gk
