// causal_conv1d with groups of several channels, on the CPU: y[o, t] = bias[o] + sum over k, c of weight[o, c, k] x[c, t - (K - 1 -
// k) dilation], and with the gate of WaveNet behind it. The inputs of a few columns are laid side by side, (tap and channel,
// column), then multiplied by packed weights. All columns (n, t) are numbered through, so that tiles are full for short sequences
// of a batch too.
#include <utility>

#include "causal_conv1d.h"
#include "dense_product.h"

namespace gk {
namespace {

constexpr int64_t kTiles = 4;  // of one unit of work

template <class S>
struct Strided {  // element (n, c, t) is data[n * stride[0] + c * stride[1] + t * stride[2]]
  const S* data = nullptr;
  int64_t stride[3] = {};
  Strided() = default;
  explicit Strided(const Tensor& x) : data(static_cast<const S*>(x.data_ptr())), stride{x.stride(0), x.stride(1), x.stride(2)} {}
  const S* at(int64_t n, int64_t c, int64_t t) const { return data + n * stride[0] + c * stride[1] + t * stride[2]; }
};

template <class S>
struct DenseJob {
  int64_t samples, channels, time, taps, dilation, groups;  // channels of a group
  Activation activation;                                    // kGate: of one group
  Strided<S> x, state, condition;
  Weights<S> weights;  // of the first group
  S* y;                // (samples, rows, time)
  bool gated() const { return activation == Activation::kGate; }
  int64_t history() const { return (taps - 1) * dilation; }
  int64_t rows() const { return gated() ? weights.outputs / 2 : groups * weights.outputs; }
  int64_t group_size() const { return weights.blocks() * weights.block_size(); }
};

template <class S>
Buffer<S> pack(const Tensor& weight, int64_t groups) {  // of (groups outputs, channels, taps)
  const int64_t outputs = weight.size(0) / groups, channels = weight.size(1), taps = weight.size(2);
  const int64_t blocks = (outputs + kBlock - 1) / kBlock, depth = taps * channels;
  Buffer<S> packed(static_cast<size_t>(groups * blocks * depth * kBlock), S{});
  const S* from = static_cast<const S*>(weight.data_ptr());
  S* to = packed.data();
  for (int64_t g = 0; g < groups; g++)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t count = std::min<int64_t>(kBlock, outputs - b * kBlock);
      for (int64_t k = 0; k < taps; k++)
        for (int64_t c = 0; c < channels; c++, to += kBlock) {
          const S* row = from + (g * outputs + b * kBlock) * depth + c * taps + k;
          for (int64_t o = 0; o < count; o++) to[o] = row[o * depth];
        }
    }
  return packed;
}

template <class S>
GK_FN void copy(const S* from, int64_t stride, int64_t count, S* to) {
  if (stride == 1 && count == Tile<S>::kColumns)
    memcpy(to, from, sizeof(S) * Tile<S>::kColumns);  // a few vectors, inline
  else if (stride == 1)
    memcpy(to, from, sizeof(S) * static_cast<size_t>(count));
  else
    for (int64_t i = 0; i < count; i++) to[i] = from[i * stride];
}

// f(n, t, run, at): columns first + at and so on, `run` of them, are times t and so on of sample n.
template <class F>
void each_run(int64_t first, int64_t count, int64_t time, F&& f) {
  for (int64_t at = 0; at < count;) {
    const int64_t n = (first + at) / time, t = (first + at) % time, run = std::min(count - at, time - t);
    f(n, t, run, at);
    at += run;
  }
}

// What `count` columns from `first` on see: to (tiles, taps channels, width).
template <class S>
void gather(const DenseJob<S>& job, int64_t group, int64_t first, int64_t count, int64_t width, S* to) {
  each_run(first, count, job.time, [&](int64_t n, int64_t t, int64_t run, int64_t at) {
    for (int64_t i = 0; i < job.channels; i++)
      for (int64_t k = 0; k < job.taps; k++) {
        const int64_t from = t + k * job.dilation - job.history(), past = std::max<int64_t>(0, std::min(run, -from));
        const int64_t c = group * job.channels + i, d = k * job.channels + i;
        for (int64_t j = 0, some; j < run; j += some) {
          const int64_t tile = (at + j) / width, column = (at + j) % width;
          some = std::min((j < past ? past : run) - j, width - column);
          S* row = to + (tile * job.weights.depth + d) * width + column;
          if (j >= past)
            copy(job.x.at(n, c, from + j), job.x.stride[2], some, row);
          else if (job.state.data)
            copy(job.state.at(n, c, from + j + job.history()), job.state.stride[2], some, row);
          else
            std::fill(row, row + some, S{});
        }
      }
  });
}

template <class S>
struct Buffers {  // of one thread, for units of `width` columns of which there are `columns`
  Buffer<S> in, out, condition;
  Buffers(const DenseJob<S>& job, int64_t width, int64_t columns) {
    const int64_t tile = Tile<S>::kColumns, rows = (job.weights.blocks() + 1) * kBlock;
    in.resize(static_cast<size_t>(job.weights.depth * std::min(width, (columns + tile - 1) / tile * tile)));
    out.resize(static_cast<size_t>(rows * width));
    if (job.condition.data) condition.resize(static_cast<size_t>(rows * width));
  }
};

// Some tiles of columns, lanes over them; several at once read and write longer pieces of a row.
template <class S>
void tiles(const DenseJob<S>& job, int64_t group, const Weights<S>& weights, int64_t first, int64_t count, Buffers<S>& buffers) {
  constexpr int64_t kTile = Tile<S>::kColumns, kWidth = kTiles * kTile;
  gather(job, group, first, count, kTile, buffers.in.data());
  S* y = job.y + group * weights.outputs * job.time;
  const int64_t sample = job.rows() * job.time, n = first / job.time, t = first % job.time, step = job.condition.stride[2];
  const bool direct = count == kWidth && t + count <= job.time && (step == 0 || step == 1);
  const int64_t rows = job.gated() ? weights.outputs / 2 : weights.outputs;
  Finish<S> finish{direct ? y + n * sample + t : buffers.out.data(), direct ? job.time : kWidth, rows, job.activation};
  if (job.condition.data && direct) {
    finish.condition = job.condition.at(n, 0, t), finish.along[0] = job.condition.stride[1], finish.along[1] = step;
  } else if (job.condition.data) {
    finish.condition = buffers.condition.data(), finish.along[0] = kWidth, finish.along[1] = 1;
    each_run(first, count, job.time, [&](int64_t m, int64_t s, int64_t run, int64_t at) {
      for (int64_t o = 0; o < weights.outputs; o++)
        copy(job.condition.at(m, o, s), step, run, buffers.condition.data() + o * kWidth + at);
    });
  }
  for (int64_t at = 0; at < count; at += kTile)
    product_of_tile(weights, buffers.in.data() + at * weights.depth, count - at, finish.from_column(at));
  if (direct) return;
  each_run(first, count, job.time, [&](int64_t m, int64_t s, int64_t run, int64_t at) {
    for (int64_t o = 0; o < rows; o++) copy(buffers.out.data() + o * kWidth + at, 1, run, y + m * sample + o * job.time + s);
  });
}

// A few columns, lanes over outputs.
template <class S>
void steps(const DenseJob<S>& job, int64_t group, const Weights<S>& weights, int64_t first, int64_t count, Buffers<S>& buffers) {
  gather(job, group, first, count, count, buffers.in.data());
  product_of_steps(weights, buffers.in.data(), count, buffers.out.data());
  const int64_t rows = job.gated() ? weights.outputs / 2 : weights.outputs;
  for (int64_t j = 0; j < count; j++) {
    const int64_t n = (first + j) / job.time, t = (first + j) % job.time;
    S* out = buffers.out.data() + j * weights.blocks() * kBlock;
    if (job.gated()) {
      S* c = job.condition.data ? buffers.condition.data() : nullptr;
      if (c) copy(job.condition.at(n, 0, t), job.condition.stride[1], weights.outputs, c);
      gate_line(out, out + rows, c, c ? c + rows : nullptr, rows);
    }
    if (job.activation == Activation::kSilu) silu_line(out, rows);
    S* y = job.y + n * job.rows() * job.time + group * weights.outputs * job.time + t;
    for (int64_t o = 0; o < rows; o++) y[o * job.time] = out[o];
  }
}

template <class S>
void dense(const DenseJob<S>& job) {
  constexpr bool kWide = Tile<S>::kCount > 1;
  constexpr int64_t kWidth = kTiles * Tile<S>::kColumns, kSteps = Tile<S>::kSteps;
  const int64_t columns = job.samples * job.time, rest = columns % kWidth;
  const bool halves = job.gated() && job.weights.outputs / 2 % (Tile<S>::kRows / 2);   // that tiles cannot pair
  const int64_t in_steps = !kWide || halves ? columns : rest > 2 * kSteps ? 0 : rest;  // a few columns are quicker one by one
  const auto in_units = [&](int64_t from, int64_t end_column, int64_t width, auto&& kernel) {
    const int64_t grain = std::max<int64_t>(1, 262144 / std::max<int64_t>(1, job.group_size() * width));
    torch::stable::parallel_for(0, (end_column - from + width - 1) / width, grain, [&](int64_t begin, int64_t end) {
      Buffers<S> buffers(job, width, end_column - from);
      for (int64_t unit = begin; unit < end; unit++)
        for (int64_t g = 0; g < job.groups; g++) {
          Weights<S> weights = job.weights;
          weights.packed += g * job.group_size();
          if (weights.bias) weights.bias += g * weights.outputs;
          const int64_t first = from + unit * width;
          kernel(job, g, weights, first, std::min(width, end_column - first), buffers);
        }
    });
  };
  if constexpr (kWide) in_units(0, columns - in_steps, kWidth, tiles<S>);
  in_units(columns - in_steps, columns, kSteps, steps<S>);
}

template <class S>
void run(const Tensor& x, const MaybeTensor& state, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
         const MaybeTensor& condition, int64_t dilation, int64_t groups, Activation activation, Tensor& y) {
  Buffer<S> own;
  if (!packed) own = pack<S>(weight, groups);
  DenseJob<S> job{x.size(0), weight.size(1), y.size(2), weight.size(2), dilation, groups, activation, Strided<S>(x), {}, {}, {},
                  {}};
  job.weights = {weight.size(0) / groups, weight.size(1) * weight.size(2),
                 packed ? static_cast<const S*>(packed->data_ptr()) : own.data(),
                 bias ? static_cast<const S*>(bias->data_ptr()) : nullptr};
  if (state && job.history()) job.state = Strided<S>(*state);
  if (condition) job.condition = Strided<S>(*condition);
  job.y = static_cast<S*>(y.data_ptr());
  dense(job);
}

// x (N, C, L), state (N, C, (K - 1) dilation), condition (N, C_out, L): any strides; weight (C_out, C / groups, K), bias (C_out),
// packed: a tensor of the packed weights. All of one type.
Tensor convolve(const Tensor& x, const MaybeTensor& state, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
                const MaybeTensor& condition, int64_t dilation, int64_t groups, Activation activation) {
  Tensor y = new_tensor(x, {x.size(0), weight.size(0) / (activation == Activation::kGate ? 2 : 1), x.size(2)});
  if (y.numel() == 0) return y;
  if (x.scalar_type() == ScalarType::Double)
    run<double>(x, state, weight, bias, packed, condition, dilation, groups, activation, y);
  else
    run<float>(x, state, weight, bias, packed, condition, dilation, groups, activation, y);
  return y;
}

Tensor causal_conv1d_dense(Tensor x, MaybeTensor state, Tensor weight, MaybeTensor bias, MaybeTensor packed, int64_t dilation,
                           int64_t groups) {
  return convolve(x, state, weight, bias, packed, {}, dilation, groups, Activation::kNone);
}
Tensor causal_conv1d_dense_silu(Tensor x, MaybeTensor state, Tensor weight, MaybeTensor bias, MaybeTensor packed, int64_t dilation,
                                int64_t groups) {
  return convolve(x, state, weight, bias, packed, {}, dilation, groups, Activation::kSilu);
}
Tensor causal_conv1d_gated(Tensor x, MaybeTensor state, Tensor weight, MaybeTensor bias, MaybeTensor packed, MaybeTensor condition,
                           int64_t dilation) {
  return convolve(x, state, weight, bias, packed, condition, dilation, 1, Activation::kGate);
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_causal_conv1d_dense", TORCH_BOX(&causal_conv1d_dense));
  m.impl("_causal_conv1d_dense_silu", TORCH_BOX(&causal_conv1d_dense_silu));
  m.impl("_causal_conv1d_gated", TORCH_BOX(&causal_conv1d_gated));
}

}  // namespace gk
