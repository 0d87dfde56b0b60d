// causal_conv1d with groups of several channels, and with the gate of WaveNet behind it, on CUDA: a product of matrices, the
// weights (outputs, depth) by what the columns see (depth, columns), in tiles of shared memory. Factors are float (double) whatever
// the tensors hold; tensor cores are Triton's. The sums are those of dense_product.h, the same bits as on the CPU: the bias, then
// chains of kDepth numbers of the depth (tap, channel) each. All columns (n, t) are numbered through, so that tiles are full for
// short sequences of a batch too, and no sum depends on where its column lies.
//
// There is no backward kernel: _dense_backward in genkern/ops/autoregressive/_causal_conv1d_dense.py says what stands in.
#include "causal_conv1d.h"
#include "gate.h"

#ifdef __CUDACC__
#define GK_UNROLL _Pragma("unroll")  // keeps the totals in registers where nvcc would not
#else
#define GK_UNROLL
#endif

namespace gk {
namespace {

constexpr int kDepth = 32;                // of a tile: kChain of dense_product.h
constexpr int kRows = 64, kColumns = 64;  // of a tile; a gated one has kRows / 2 outputs, each of two rows
constexpr int kThreadRows = 8, kThreadColumns = 4;
constexpr int kAcross = kColumns / kThreadColumns, kBlockThreads = kRows / kThreadRows * kAcross;
constexpr int kPadded = kRows + 4;  // spreads the rows over the banks of shared memory, keeps 16-byte accesses

struct Dense {
  int64_t samples, channels, outputs, groups, time, taps, dilation;  // channels and outputs of a group
  int64_t blocks, columns;                                           // blocks of outputs of a group; samples * time
  Array x, state, weight, bias, condition, y;                        // weight (groups, rows of a group, channels, taps), contiguous
  int64_t x_stride[2], state_stride[2], condition_stride[3];         // of sample, channel (and time)
  __device__ __forceinline__ int64_t history() const { return (taps - 1) * dilation; }
};

// The row of the weights that row i of thread row `down` of a tile stands for, and the output it belongs to.
template <bool kGated>
__device__ __forceinline__ int64_t output_of(int64_t first, int down, int i) {
  constexpr int kOwn = kGated ? kThreadRows / 2 : kThreadRows;
  return first + down * kOwn + i % kOwn;
}
template <bool kGated>
__device__ __forceinline__ int64_t row_of(const Dense& job, int64_t output, int i) {
  return kGated && i >= kThreadRows / 2 ? output + job.outputs : output;
}

// What column (n, t) sees at `back` before t in channel c.
template <class S>
__device__ __forceinline__ S seen(const Dense& job, int64_t n, int64_t c, int64_t t, int64_t back) {
  const int64_t from = t - back;
  if (from >= 0) return read_one(job.x, n * job.x_stride[0] + c * job.x_stride[1] + from, S{});
  if (!job.state.data) return S{};
  return read_one(job.state, n * job.state_stride[0] + c * job.state_stride[1] + job.history() + from, S{});
}

template <class S, bool kGated>
__global__ void __launch_bounds__(kBlockThreads) dense_kernel(const Dense job) {
  alignas(16) __shared__ S weights[kDepth][kPadded];
  alignas(16) __shared__ S values[kDepth][kColumns];
  const int thread = static_cast<int>(threadIdx.x), across = thread % kAcross, down = thread / kAcross;
  const int64_t block = blockIdx.x, group = block / job.blocks % job.groups;  // neighbouring blocks share their columns
  const int64_t first = block % job.blocks * (kGated ? kRows / 2 : kRows);
  const int64_t first_column = block / (job.blocks * job.groups) * kColumns;
  const int64_t depth = job.taps * job.channels;

  S total[kThreadRows][kThreadColumns];
  for (int i = 0; i < kThreadRows; i++) {
    const int64_t output = output_of<kGated>(first, down, i);
    const bool there = job.bias.data && output < job.outputs;
    const S start = there ? read_one(job.bias, group * job.outputs + row_of<kGated>(job, output, i), S{}) : S{};
    for (int j = 0; j < kThreadColumns; j++) total[i][j] = start;
  }

  const int column = thread % kColumns, at_depth = thread % kDepth;  // that this thread fetches
  const int64_t n = (first_column + column) / job.time, t = (first_column + column) % job.time;
  const bool live = first_column + column < job.columns;
  int64_t x_channel = thread / kColumns, x_tap = 0, w_channel = at_depth, w_tap = 0;  // counted on: divisions would take longer
  const auto carry = [&](int64_t& channel, int64_t& tap) {
    for (; channel >= job.channels; channel -= job.channels) tap++;
  };
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    for (int i = thread / kColumns; i < kDepth; i += kBlockThreads / kColumns, x_channel += kBlockThreads / kColumns) {
      carry(x_channel, x_tap);
      const int64_t c = group * job.channels + x_channel, back = (job.taps - 1 - x_tap) * job.dilation;
      values[i][column] = live && x_tap < job.taps ? seen<S>(job, n, c, t, back) : S{};
    }
    carry(w_channel, w_tap);
    for (int p = thread / kDepth; p < kRows; p += kBlockThreads / kDepth) {
      const int64_t output = output_of<kGated>(first, p / kThreadRows, p % kThreadRows);
      const int64_t row = group * job.outputs + row_of<kGated>(job, output, p % kThreadRows);
      const bool there = output < job.outputs && w_tap < job.taps;
      weights[at_depth][p] = there ? read_one(job.weight, row * depth + w_channel * job.taps + w_tap, S{}) : S{};
    }
    w_channel += kDepth;
    __syncthreads();
    S sum[kThreadRows][kThreadColumns] = {};
    for (int i = 0; i < kDepth; i++) {
      S w[kThreadRows], v[kThreadColumns];
      for (int r = 0; r < kThreadRows; r++) w[r] = weights[i][down * kThreadRows + r];
      for (int j = 0; j < kThreadColumns; j++) v[j] = values[i][across + j * kAcross];
      for (int r = 0; r < kThreadRows; r++)
        for (int j = 0; j < kThreadColumns; j++) sum[r][j] = fma(w[r], v[j], sum[r][j]);
    }
    for (int r = 0; r < kThreadRows; r++)
      for (int j = 0; j < kThreadColumns; j++) total[r][j] = total[r][j] + sum[r][j];
    __syncthreads();
  }

  GK_UNROLL for (int j = 0; j < kThreadColumns; j++) {
    const int64_t at = first_column + across + j * kAcross, m = at / job.time, s = at % job.time;
    GK_UNROLL for (int i = 0; i < (kGated ? kThreadRows / 2 : kThreadRows); i++) {
      const int64_t output = output_of<kGated>(first, down, i);
      if (at >= job.columns || output >= job.outputs) continue;
      S value = total[i][j];
      if constexpr (kGated) {
        S other = total[i + kThreadRows / 2][j];
        if (job.condition.data) {
          const int64_t c = m * job.condition_stride[0] + output * job.condition_stride[1] + s * job.condition_stride[2];
          value = value + read_one(job.condition, c, S{});
          other = other + read_one(job.condition, c + job.outputs * job.condition_stride[1], S{});
        }
        value = gate(value, other);
      }
      write_one(job.y, (m * job.groups * job.outputs + group * job.outputs + output) * job.time + s, value);
    }
  }
}

// x (N, C, L), state (N, C, (K - 1) dilation), condition (N, C_out, L): any strides; weight (C_out, C / groups, K), bias (C_out).
Tensor convolve(const Tensor& x, const MaybeTensor& state, const Tensor& weight, const MaybeTensor& bias,
                const MaybeTensor& condition, int64_t dilation, int64_t groups, bool gated) {
  ScalarType type = conv_type(x, weight, bias, state);
  if (condition) type = promote(type, condition->scalar_type());
  const int64_t outputs = weight.size(0) / (gated ? 2 : 1);
  Tensor y = new_tensor(x, {x.size(0), outputs, x.size(2)}, type);
  if (y.numel() == 0) return y;
  const OnDevice device(x);
  const Sequences in(x), past = state && state->size(2) ? Sequences(*state) : Sequences();
  Dense job{x.size(0), weight.size(1), outputs / groups, groups, x.size(2), weight.size(2), dilation};
  const int64_t of_block = gated ? kRows / 2 : kRows;
  job.blocks = (job.outputs + of_block - 1) / of_block, job.columns = job.samples * job.time;
  job.x = in.array, job.state = past.array, job.weight = flat(weight), job.y = flat(y);
  job.x_stride[0] = in.sample, job.x_stride[1] = in.channel, job.state_stride[0] = past.sample, job.state_stride[1] = past.channel;
  if (bias) job.bias = flat(*bias);
  if (condition) {
    job.condition = flat(*condition);
    for (int d = 0; d < 3; d++) job.condition_stride[d] = condition->stride(d);
  }
  const int64_t blocks = job.blocks * groups * ((job.columns + kColumns - 1) / kColumns);
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "more elements than one launch can take");
  const bool wide = type == ScalarType::Double;
  const auto kernel = gated ? (wide ? dense_kernel<double, true> : dense_kernel<float, true>)
                            : (wide ? dense_kernel<double, false> : dense_kernel<float, false>);
  GK_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks)), dim3(kBlockThreads), device.stream, job);
  return y;
}

// packed: weights as the CPU's kernel reads them.
Tensor causal_conv1d_dense(Tensor x, MaybeTensor state, Tensor weight, MaybeTensor bias, MaybeTensor, int64_t dilation,
                           int64_t groups) {
  return convolve(x, state, weight, bias, {}, dilation, groups, false);
}
Tensor causal_conv1d_gated(Tensor x, MaybeTensor state, Tensor weight, MaybeTensor bias, MaybeTensor, MaybeTensor condition,
                           int64_t dilation) {
  return convolve(x, state, weight, bias, condition, dilation, 1, true);
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_causal_conv1d_dense", TORCH_BOX(&causal_conv1d_dense));
  m.impl("_causal_conv1d_gated", TORCH_BOX(&causal_conv1d_gated));
}

}  // namespace gk
