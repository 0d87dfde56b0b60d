// causal_conv1d, depthwise, on CUDA. Forward: a thread per output, neighbouring outputs in neighbouring threads. Backward in three
// passes: the gradient before the activation; that of x and the state, a thread per element; those of the weight and the bias, a
// block per channel and tap, whose threads meet in a fixed tree in double. No atomics.
#include "causal_conv1d.h"
#include "silu.h"

namespace gk {
namespace {

constexpr int kMaxBlocks = 1 << 20;  // of a grid; threads stride over the rest

struct Conv {
  int64_t samples, channels, time, taps, dilation;
  bool silu;
  Array x, state, y, d_x, d_state, weight, bias, d_weight, d_bias;  // y: the output, or its gradient
  int64_t x_stride[2], state_stride[2], y_stride[2];                // of sample and channel; what is made here is contiguous
  const int32_t* seq;
  __device__ __forceinline__ int64_t history() const { return (taps - 1) * dilation; }
};

// The input that weight k meets for output t; zero from another sequence and before the beginning.
template <class S>
__device__ __forceinline__ S tap_of(const Conv& job, int64_t n, int64_t c, int64_t t, int64_t k) {
  const int64_t from = t - (job.taps - 1 - k) * job.dilation;
  if (job.seq) {
    const int32_t* seq = job.seq + n * job.time;
    if (seq[from < 0 ? 0 : from] != seq[t]) return S{};
  }
  if (from >= 0) return read_one(job.x, n * job.x_stride[0] + c * job.x_stride[1] + from, S{});
  if (!job.state.data) return S{};
  return read_one(job.state, n * job.state_stride[0] + c * job.state_stride[1] + job.history() + from, S{});
}
template <class S>
__device__ __forceinline__ S before_activation(const Conv& job, int64_t n, int64_t c, int64_t t) {
  S a = job.bias.data ? read_one(job.bias, c, S{}) : S{};
  for (int64_t k = 0; k < job.taps; k++) a = fma(read_one(job.weight, c * job.taps + k, S{}), tap_of<S>(job, n, c, t, k), a);
  return a;
}
__device__ __forceinline__ bool is_padding(const Conv& job, int64_t n, int64_t t) {
  return job.seq && job.seq[n * job.time + t] < 0;
}

template <class S>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Conv job) {
  const int64_t count = job.samples * job.channels * job.time;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / job.time, t = i - row * job.time, n = row / job.channels, c = row - n * job.channels;
    const S a = before_activation<S>(job, n, c, t);
    write_one(job.y, i, is_padding(job, n, t) ? S{} : job.silu ? silu(a) : a);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) activation_backward_kernel(const Conv job, S* h) {
  const int64_t count = job.samples * job.channels * job.time;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / job.time, t = i - row * job.time, n = row / job.channels, c = row - n * job.channels;
    S grad = read_one(job.y, n * job.y_stride[0] + c * job.y_stride[1] + t, S{});
    if (job.silu) grad = grad * silu_derivative(before_activation<S>(job, n, c, t));
    h[i] = is_padding(job, n, t) ? S{} : grad;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) input_backward_kernel(const Conv job, const S* h) {
  const int64_t past = job.history(), length = past + job.time, count = job.samples * job.channels * length;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = i / length, at = i - row * length - past;  // at < 0: of the state
    const int64_t n = row / job.channels, c = row - n * job.channels;
    if (at < 0 && !job.d_state.data) continue;
    const int32_t* seq = job.seq ? job.seq + n * job.time : nullptr;
    S d = S{};
    for (int64_t k = 0; k < job.taps; k++) {
      const int64_t t = at + (job.taps - 1 - k) * job.dilation;
      if (t < 0 || t >= job.time || (seq && seq[at < 0 ? 0 : at] != seq[t])) continue;
      d = fma(read_one(job.weight, c * job.taps + k, S{}), h[row * job.time + t], d);
    }
    if (at < 0)
      write_one(job.d_state, row * past + past + at, d);
    else
      write_one(job.d_x, row * job.time + at, d);
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) weight_backward_kernel(const Conv job, const S* h) {
  __shared__ double shared[kThreads];
  const int64_t c = blockIdx.x, count = job.samples * job.time;
  const int64_t k = blockIdx.y;  // the bias comes after the taps
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int64_t n = i / job.time, t = i % job.time;
    const S grad = h[(n * job.channels + c) * job.time + t];
    total += static_cast<double>(k < job.taps ? grad * tap_of<S>(job, n, c, t, k) : grad);
  }
  shared[threadIdx.x] = total;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  if (k < job.taps)
    write_one(job.d_weight, c * job.taps + k, static_cast<S>(shared[0]));
  else
    write_one(job.d_bias, c, static_cast<S>(shared[0]));
}

dim3 grid_of(int64_t count) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return dim3(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks));
}

Conv conv_of(const Tensor& x, const Sequences& in, const Tensor& weight, const MaybeTensor& bias, const Sequences& state,
             const MaybeTensor& seq_idx, int64_t dilation, bool silu) {
  Conv job{};
  job.samples = x.size(0), job.channels = x.size(1), job.time = x.size(2), job.taps = weight.size(1);
  job.dilation = dilation, job.silu = silu, job.x = in.array, job.state = state.array, job.weight = flat(weight);
  job.x_stride[0] = in.sample, job.x_stride[1] = in.channel, job.state_stride[0] = state.sample,
  job.state_stride[1] = state.channel;
  if (bias) job.bias = flat(*bias);
  if (seq_idx) job.seq = static_cast<const int32_t*>(seq_idx->data_ptr());
  return job;
}
Sequences state_of(const MaybeTensor& state) { return state && state->size(2) ? Sequences(*state) : Sequences(); }

Tensor causal_conv1d(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor state, MaybeTensor seq_idx, int64_t dilation,
                     bool silu) {
  const ScalarType type = conv_type(x, weight, bias, state);
  Tensor y = new_tensor(x, x.sizes(), type);
  if (y.numel() == 0) return y;
  const OnDevice device(x);
  const Sequences in(x), past = state_of(state);
  Conv job = conv_of(x, in, weight, bias, past, seq_idx, dilation, silu);
  job.y = flat(y);
  const auto kernel = type == ScalarType::Double ? forward_kernel<double> : forward_kernel<float>;
  GK_LAUNCH(kernel, grid_of(y.numel()), dim3(kThreads), device.stream, job);
  return y;
}

template <class S>
void backward(const Conv& job, Tensor& h, bool biased, const OnDevice& device) {
  S* before = static_cast<S*>(h.data_ptr());
  const int64_t rows = job.samples * job.channels, past = (job.taps - 1) * job.dilation;
  const auto activation = activation_backward_kernel<S>;
  if (rows * job.time > 0) GK_LAUNCH(activation, grid_of(rows * job.time), dim3(kThreads), device.stream, job, before);
  const auto input = input_backward_kernel<S>;
  if (rows * (past + job.time) > 0) GK_LAUNCH(input, grid_of(rows * (past + job.time)), dim3(kThreads), device.stream, job, before);
  const dim3 grid(static_cast<unsigned>(job.channels), static_cast<unsigned>(job.taps + biased));
  const auto parameters = weight_backward_kernel<S>;
  if (job.channels > 0) GK_LAUNCH(parameters, grid, dim3(kThreads), device.stream, job, before);
}

std::vector<Tensor> causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor state,
                                           MaybeTensor seq_idx, int64_t dilation, bool silu) {
  std::vector<Tensor> gradients{new_tensor(x, x.sizes()), new_tensor(weight, weight.sizes())};
  if (bias) gradients.push_back(new_tensor(*bias, bias->sizes()));
  if (state) gradients.push_back(new_tensor(*state, state->sizes()));
  STD_TORCH_CHECK(weight.size(1) < 65535, "causal_conv1d: at most 65534 taps");
  const OnDevice device(x);
  const Sequences in(x), past = state_of(state), out(grad);
  Conv job = conv_of(x, in, weight, bias, past, seq_idx, dilation, silu);
  job.y = out.array, job.y_stride[0] = out.sample, job.y_stride[1] = out.channel;
  job.d_x = flat(gradients[0]), job.d_weight = flat(gradients[1]);
  if (bias) job.d_bias = flat(gradients[2]);
  if (past.array.data) job.d_state = flat(gradients.back());
  Tensor h = new_tensor(grad, grad.sizes(), sum_type(grad.scalar_type()));
  if (grad.scalar_type() == ScalarType::Double)
    backward<double>(job, h, bias.has_value(), device);
  else
    backward<float>(job, h, bias.has_value(), device);
  return gradients;
}

// ---- causal_conv1d_update: a thread per request and channel walks its steps, then shifts its state

struct Step {
  int64_t samples, channels, time, taps, dilation, length;  // length: of the state
  bool silu;
  Array x, state, y, weight, bias;
  int64_t x_stride[3], state_stride[3];  // of sample, channel, time
  const int32_t* indices;                // of states; negative: no request
};

template <class S>
__global__ void __launch_bounds__(kThreads) update_kernel(const Step job) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= job.samples * job.channels) return;
  const int64_t n = i / job.channels, c = i % job.channels, slot = job.indices ? job.indices[n] : n;
  const int64_t x_at = n * job.x_stride[0] + c * job.x_stride[1], state_at = slot * job.state_stride[0] + c * job.state_stride[1];
  const auto input = [&](int64_t j) {  // of the state followed by x
    return j < job.length ? read_one(job.state, state_at + j * job.state_stride[2], S{})
                          : read_one(job.x, x_at + (j - job.length) * job.x_stride[2], S{});
  };
  const int64_t oldest = job.length - (job.taps - 1) * job.dilation;
  for (int64_t t = 0; t < job.time; t++) {
    S a = S{};
    if (slot >= 0) {
      if (job.bias.data) a = read_one(job.bias, c, S{});
      for (int64_t k = 0; k < job.taps; k++)
        a = fma(read_one(job.weight, c * job.taps + k, S{}), input(oldest + t + k * job.dilation), a);
      if (job.silu) a = silu(a);
    }
    write_one(job.y, i * job.time + t, a);
  }
  if (slot >= 0)
    for (int64_t j = 0; j < job.length; j++) write_one(job.state, state_at + j * job.state_stride[2], input(j + job.time));
}

Tensor causal_conv1d_update(Tensor x, Tensor state, Tensor weight, MaybeTensor bias, MaybeTensor indices, int64_t dilation,
                            bool silu) {
  const ScalarType type = conv_type(x, weight, bias, {});
  Tensor y = new_tensor(x, x.sizes(), type);
  if (y.numel() == 0) return y;
  const OnDevice device(x);
  Step job{};
  job.samples = x.size(0), job.channels = x.size(1), job.time = x.size(2), job.taps = weight.size(1);
  job.dilation = dilation, job.length = state.size(2), job.silu = silu;
  job.x = flat(x), job.state = flat(state), job.y = flat(y), job.weight = flat(weight);
  for (int d = 0; d < 3; d++) job.x_stride[d] = x.stride(d), job.state_stride[d] = state.stride(d);
  if (bias) job.bias = flat(*bias);
  if (indices) job.indices = static_cast<const int32_t*>(indices->data_ptr());
  const int64_t blocks = (job.samples * job.channels + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "more elements than one launch can take");
  const auto kernel = type == ScalarType::Double ? update_kernel<double> : update_kernel<float>;
  GK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), device.stream, job);
  return y;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("_causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
  m.impl("_causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
}

}  // namespace gk
