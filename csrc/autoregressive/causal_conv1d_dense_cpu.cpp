// causal_conv1d with groups of several channels, on the CPU: y[o, t] = bias[o] + sum over k, c of weight[o, c, k] x[c, t + k
// dilation], where x begins with the past. An output is the bias, then, oldest tap first, the sums over kChain channels each, every
// one a chain of fused multiply-adds. Two kernels form the same sums: one with lanes over time, for long sequences, and one with
// lanes over outputs, for steps and for what is left of a sequence. So an output has the same bits in any chunk, any batch and any
// number of threads.
#include <utility>

#include "causal_conv1d.h"

namespace gk {
namespace {

constexpr int kChain = 32;  // short chains round less
constexpr int kBlock = 16;  // outputs that lie side by side in packed weights: [group][block][tap][channel][output]

template <class S>
struct Shape {
  using V = typename Vector<S>::type;
  static constexpr int kCount = Lane<V>::kCount, kParts = kBlock / kCount;  // vectors of a block
  static constexpr bool kWide = kCount == 16;                               // 32 registers
  static constexpr int kRows = kWide ? 8 : 4, kColumns = 3;                 // outputs by vectors of time
  static constexpr int kSteps = kCount == 1 ? 1 : kWide ? 6 : 3;            // columns by four vectors of outputs
};

template <class S>
struct DenseJob {
  int64_t samples, channels, time, taps, dilation, groups, outputs;  // channels and outputs of a group
  const S *x, *weight, *bias;                                        // weight: packed
  int64_t x_sample, x_channel, x_time;
  S* y;  // (samples, groups outputs, time)
  int64_t blocks() const { return (outputs + kBlock - 1) / kBlock; }
  int64_t block_size() const { return taps * channels * kBlock; }
};

template <class S>
std::vector<S> pack(const Tensor& weight, int64_t groups) {  // of (groups outputs, channels, taps)
  const int64_t outputs = weight.size(0) / groups, channels = weight.size(1), taps = weight.size(2);
  const int64_t blocks = (outputs + kBlock - 1) / kBlock;
  std::vector<S> packed(static_cast<size_t>(groups * blocks * taps * channels * kBlock));
  const S* from = static_cast<const S*>(weight.data_ptr());
  for (int64_t g = 0; g < groups; g++)
    for (int64_t o = 0; o < outputs; o++)
      for (int64_t c = 0; c < channels; c++)
        for (int64_t k = 0; k < taps; k++)
          packed[(((g * blocks + o / kBlock) * taps + k) * channels + c) * kBlock + o % kBlock] =
              from[((g * outputs + o) * channels + c) * taps + k];
  return packed;
}

// Lanes over time: kRows outputs from `first` on, at kColumns vectors of time from t on.
template <class S>
void rows_of_time(const DenseJob<S>& job, const S* x, const S* weight, const S* bias, int64_t first, S* y, int64_t t) {
  using V = typename Shape<S>::V;
  constexpr int kRows = Shape<S>::kRows, kColumns = Shape<S>::kColumns, kCount = Shape<S>::kCount;
  const int64_t valid = std::min<int64_t>(kRows, job.outputs - first);
  V total[kRows][kColumns];
  for (int o = 0; o < kRows; o++)
    for (int j = 0; j < kColumns; j++) total[o][j] = splat<V>(bias && o < valid ? bias[first + o] : S{});
  const S* w = weight + first / kBlock * job.block_size() + first % kBlock;
  for (int64_t k = 0; k < job.taps; k++) {
    const S* from = x + t + k * job.dilation;
    for (int64_t c = 0; c < job.channels;) {
      V sum[kRows][kColumns] = {};
      for (const int64_t end = std::min(c + kChain, job.channels); c < end; c++, from += job.x_channel, w += kBlock) {
        V value[kColumns];
        for (int j = 0; j < kColumns; j++) value[j] = load<V>(from + j * kCount);
        for (int o = 0; o < kRows; o++) {
          const V one = w[o] - V{};
          for (int j = 0; j < kColumns; j++) sum[o][j] = fma(one, value[j], sum[o][j]);
        }
      }
      for (int o = 0; o < kRows; o++)
        for (int j = 0; j < kColumns; j++) total[o][j] = total[o][j] + sum[o][j];
    }
  }
  for (int o = 0; o < valid; o++)
    for (int j = 0; j < kColumns; j++) store(y + (first + o) * job.time + t + j * kCount, total[o][j]);
}

// Lanes over outputs: kVectors of them from block `block` on, at kSteps columns.
template <class S, int kVectors, int kSteps>
void columns_of_outputs(const DenseJob<S>& job, const S* const* x, const S* weight, const S* bias, int64_t block, S* const* y) {
  using V = typename Shape<S>::V;
  constexpr int kCount = Shape<S>::kCount, kParts = Shape<S>::kParts;
  const int64_t first = block * kBlock, count = std::min<int64_t>(kVectors * kCount, job.outputs - first);
  V total[kSteps][kVectors];
  for (int v = 0; v < kVectors; v++) {
    const int here = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kCount, count - v * kCount)));
    const V start = bias ? load_first(bias + first + v * kCount, here, V{}) : V{};
    for (int j = 0; j < kSteps; j++) total[j][v] = start;
  }
  const S* w = weight + block * job.block_size();
  for (int64_t k = 0; k < job.taps; k++)
    for (int64_t c = 0; c < job.channels;) {
      V sum[kSteps][kVectors] = {};
      for (const int64_t end = std::min(c + kChain, job.channels); c < end; c++, w += kBlock) {
        const int64_t at = k * job.dilation * job.x_time + c * job.x_channel;
        V one[kVectors];
        for (int v = 0; v < kVectors; v++) one[v] = load<V>(w + v / kParts * job.block_size() + v % kParts * kCount);
        for (int j = 0; j < kSteps; j++) {
          const V value = x[j][at] - V{};
          for (int v = 0; v < kVectors; v++) sum[j][v] = fma(one[v], value, sum[j][v]);
        }
      }
      for (int j = 0; j < kSteps; j++)
        for (int v = 0; v < kVectors; v++) total[j][v] = total[j][v] + sum[j][v];
    }
  for (int j = 0; j < kSteps; j++) {
    S out[kVectors * kCount];
    for (int v = 0; v < kVectors; v++) store(out + v * kCount, total[j][v]);
    for (int64_t o = 0; o < count; o++) y[j][(first + o) * job.time] = out[o];
  }
}

template <class S, int kSteps>
void all_outputs(const DenseJob<S>& job, const S* const* x, const S* weight, const S* bias, S* const* y) {
  constexpr int kParts = Shape<S>::kParts, kMany = kSteps == 1 ? 8 : 4;
  int64_t block = 0;
  if constexpr (kMany > kParts)
    for (; block + kMany / kParts <= job.blocks(); block += kMany / kParts)
      columns_of_outputs<S, kMany, kSteps>(job, x, weight, bias, block, y);
  if constexpr (4 > kParts && kMany > 4)
    for (; block + 4 / kParts <= job.blocks(); block += 4 / kParts)
      columns_of_outputs<S, 4, kSteps>(job, x, weight, bias, block, y);
  for (; block < job.blocks(); block++) columns_of_outputs<S, kParts, kSteps>(job, x, weight, bias, block, y);
}

template <class S, int kMost>
void some_columns(int count, const DenseJob<S>& job, const S* const* x, const S* weight, const S* bias, S* const* y) {
  if (count == kMost) return all_outputs<S, kMost>(job, x, weight, bias, y);
  if constexpr (kMost > 1) some_columns<S, kMost - 1>(count, job, x, weight, bias, y);
}

// Columns of all samples, numbered n time + t, in units that are tiles of time where that kernel applies.
template <class S>
void dense(const DenseJob<S>& job) {
  constexpr int kTile = Shape<S>::kColumns * Shape<S>::kCount, kSteps = Shape<S>::kSteps;
  const int64_t tiles = job.x_time == 1 && Shape<S>::kCount > 1 ? job.time / kTile : 0;  // of a sample
  const int64_t rest = job.time - tiles * kTile, of_rest = (job.samples * rest + kSteps - 1) / kSteps;
  const int64_t work = job.block_size() * job.blocks();
  const auto per_thread = [&](int64_t columns) { return std::max<int64_t>(1, 262144 / std::max<int64_t>(1, work * columns)); };
  const auto group = [&](int64_t g, auto&& f) {
    f(job.weight + g * job.blocks() * job.block_size(), job.bias ? job.bias + g * job.outputs : nullptr,
      g * job.channels * job.x_channel, g * job.outputs * job.time);
  };
  torch::stable::parallel_for(0, job.samples * tiles, per_thread(kTile), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++)
      for (int64_t g = 0; g < job.groups; g++)
        group(g, [&](const S* weight, const S* bias, int64_t x_at, int64_t y_at) {
          const int64_t n = unit / tiles, t = unit % tiles * kTile;
          const S* x = job.x + n * job.x_sample + x_at;
          S* y = job.y + n * job.groups * job.outputs * job.time + y_at;
          for (int64_t first = 0; first < job.outputs; first += Shape<S>::kRows) rows_of_time(job, x, weight, bias, first, y, t);
        });
  });
  torch::stable::parallel_for(0, of_rest, per_thread(kSteps), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++)
      for (int64_t g = 0; g < job.groups; g++)
        group(g, [&](const S* weight, const S* bias, int64_t x_at, int64_t y_at) {
          const S* x[kSteps];
          S* y[kSteps];
          const int count = static_cast<int>(std::min<int64_t>(kSteps, job.samples * rest - unit * kSteps));
          for (int j = 0; j < count; j++) {
            const int64_t column = unit * kSteps + j, n = column / rest, t = tiles * kTile + column % rest;
            x[j] = job.x + n * job.x_sample + x_at + t * job.x_time;
            y[j] = job.y + n * job.groups * job.outputs * job.time + y_at + t;
          }
          some_columns<S, kSteps>(count, job, x, weight, bias, y);
        });
  });
}

template <class S>
void run(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed, int64_t dilation,
         int64_t groups, Tensor& y) {
  std::vector<S> own;
  if (!packed) own = pack<S>(weight, groups);
  dense<S>({x.size(0), weight.size(1), y.size(2), weight.size(2), dilation, groups, weight.size(0) / groups,
            static_cast<const S*>(x.data_ptr()), packed ? static_cast<const S*>(packed->data_ptr()) : own.data(),
            bias ? static_cast<const S*>(bias->data_ptr()) : nullptr, x.stride(0), x.stride(1), x.stride(2),
            static_cast<S*>(y.data_ptr())});
}

// x (N, C, past + L) of any strides, weight (C_out, C / groups, K), bias (C_out), packed: a tensor of the packed weights. All of
// one type.
Tensor causal_conv1d_dense(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor packed, int64_t dilation, int64_t groups) {
  const int64_t time = x.size(2) - (weight.size(2) - 1) * dilation;
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0), time});
  if (y.numel() == 0) return y;
  if (x.scalar_type() == ScalarType::Double)
    run<double>(x, weight, bias, packed, dilation, groups, y);
  else
    run<float>(x, weight, bias, packed, dilation, groups, y);
  return y;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_causal_conv1d_dense", TORCH_BOX(&causal_conv1d_dense)); }

}  // namespace gk
