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

// Column (n, t) holds, for tap k and channel c of a group, x[n, c, t - behind + k dilation]: before x the state or zeros, after it
// zeros. `behind` is (K - 1) dilation where outputs are computed, and 0 where the gradients of inputs are, from later outputs.
template <class S>
struct Columns {
  int64_t samples, time, channels, taps, dilation, behind, length;  // time: of a sample's columns; length: of x
  Strided<S> x, state{};
  int64_t depth() const { return taps * channels; }
  Columns from_channel(int64_t c) const {
    Columns moved = *this;
    moved.x.data += c * x.stride[1];
    if (state.data) moved.state.data += c * state.stride[1];
    return moved;
  }
};

template <class S>
struct DenseJob {
  Columns<S> columns;
  int64_t groups;
  Activation activation;  // kGate: of one group
  Weights<S> weights;     // of the first group
  S* y;                   // (samples, rows, time)
  Strided<S> condition{};
  bool gated() const { return activation == Activation::kGate; }
  int64_t rows() const { return gated() ? weights.outputs / 2 : groups * weights.outputs; }
  int64_t group_size() const { return weights.blocks() * weights.block_size(); }
};

// Of (groups outputs, channels, taps); transposed: what leads from the gradients of outputs, later and later, to that of an input.
template <class S>
Buffer<S> pack(const Tensor& weight, int64_t groups, bool transposed) {
  const int64_t size = weight.numel() / groups, taps = weight.size(2);
  int64_t outputs = weight.size(0) / groups, channels = weight.size(1), of_output = channels * taps, of_channel = taps;
  if (transposed) std::swap(outputs, channels), std::swap(of_output, of_channel);
  Buffer<S> packed(static_cast<size_t>(groups * ((outputs + kBlock - 1) / kBlock) * channels * taps * kBlock), S{});
  S* to = packed.data();
  for (int64_t g = 0; g < groups; g++)
    for (int64_t first = 0; first < outputs; first += kBlock)
      for (int64_t k = 0; k < taps; k++)
        for (int64_t c = 0; c < channels; c++, to += kBlock) {
          const S* from = static_cast<const S*>(weight.data_ptr()) + g * size + c * of_channel + (transposed ? taps - 1 - k : k);
          for (int64_t o = first; o < std::min(first + kBlock, outputs); o++) to[o - first] = from[o * of_output];
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

// `count` columns from `first` on: to (tiles, taps channels, width).
template <class S>
void gather(const Columns<S>& from, int64_t first, int64_t count, int64_t width, S* to) {
  each_run(first, count, from.time, [&](int64_t n, int64_t t, int64_t run, int64_t at) {
    for (int64_t c = 0; c < from.channels; c++)
      for (int64_t k = 0; k < from.taps; k++) {
        const int64_t start = t + k * from.dilation - from.behind;  // x begins at column -start of the run
        const int64_t past = std::max<int64_t>(0, std::min(run, -start)), end = std::max(past, std::min(run, from.length - start));
        for (int64_t j = 0, some; j < run; j += some) {
          const int64_t tile = (at + j) / width, column = (at + j) % width;
          some = std::min((j < past ? past : j < end ? end : run) - j, width - column);
          S* row = to + (tile * from.depth() + k * from.channels + c) * width + column;
          if (j >= past && j < end)
            copy(from.x.at(n, c, start + j), from.x.stride[2], some, row);
          else if (j < past && from.state.data)
            copy(from.state.at(n, c, start + j + from.behind), from.state.stride[2], some, row);
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
  gather(job.columns.from_channel(group * job.columns.channels), first, count, kTile, buffers.in.data());
  const int64_t time = job.columns.time, sample = job.rows() * time, n = first / time, t = first % time;
  const int64_t step = job.condition.stride[2];
  S* y = job.y + group * weights.outputs * time;
  const bool direct = count == kWidth && t + count <= time && (step == 0 || step == 1);
  const int64_t rows = job.gated() ? weights.outputs / 2 : weights.outputs;
  Finish<S> finish{direct ? y + n * sample + t : buffers.out.data(), direct ? time : kWidth, rows, job.activation};
  if (job.condition.data && direct) {
    finish.condition = job.condition.at(n, 0, t), finish.along[0] = job.condition.stride[1], finish.along[1] = step;
  } else if (job.condition.data) {
    finish.condition = buffers.condition.data(), finish.along[0] = kWidth, finish.along[1] = 1;
    each_run(first, count, time, [&](int64_t m, int64_t s, int64_t run, int64_t at) {
      for (int64_t o = 0; o < weights.outputs; o++)
        copy(job.condition.at(m, o, s), step, run, buffers.condition.data() + o * kWidth + at);
    });
  }
  for (int64_t at = 0; at < count; at += kTile)
    product_of_tile(weights, buffers.in.data() + at * weights.depth, count - at, finish.from_column(at));
  if (direct) return;
  each_run(first, count, time, [&](int64_t m, int64_t s, int64_t run, int64_t at) {
    for (int64_t o = 0; o < rows; o++) copy(buffers.out.data() + o * kWidth + at, 1, run, y + m * sample + o * time + s);
  });
}

// A few columns, lanes over outputs.
template <class S>
void steps(const DenseJob<S>& job, int64_t group, const Weights<S>& weights, int64_t first, int64_t count, Buffers<S>& buffers) {
  gather(job.columns.from_channel(group * job.columns.channels), first, count, count, buffers.in.data());
  product_of_steps(weights, buffers.in.data(), count, buffers.out.data());
  const int64_t rows = job.gated() ? weights.outputs / 2 : weights.outputs, time = job.columns.time;
  for (int64_t j = 0; j < count; j++) {
    const int64_t n = (first + j) / time, t = (first + j) % time;
    S* out = buffers.out.data() + j * weights.blocks() * kBlock;
    if (job.gated()) {
      S* c = job.condition.data ? buffers.condition.data() : nullptr;
      if (c) copy(job.condition.at(n, 0, t), job.condition.stride[1], weights.outputs, c);
      gate_line(out, out + rows, c, c ? c + rows : nullptr, rows);
    }
    if (job.activation == Activation::kSilu) silu_line(out, rows);
    S* y = job.y + (n * job.rows() + group * weights.outputs) * time + t;
    for (int64_t o = 0; o < rows; o++) y[o * time] = out[o];
  }
}

template <class S>
void dense(const DenseJob<S>& job) {
  constexpr bool kWide = Tile<S>::kCount > 1;
  constexpr int64_t kWidth = kTiles * Tile<S>::kColumns, kSteps = Tile<S>::kSteps;
  const int64_t columns = job.columns.samples * job.columns.time, rest = columns % kWidth;
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
const S* pointer(const MaybeTensor& x) {
  return x ? static_cast<const S*>(x->data_ptr()) : nullptr;
}

template <class S>
Columns<S> inputs_of(const Tensor& x, const MaybeTensor& state, const Tensor& weight, int64_t dilation) {
  const int64_t taps = weight.size(2), past = (taps - 1) * dilation;
  Columns<S> columns{x.size(0), x.size(2), weight.size(1), taps, dilation, past, x.size(2), Strided<S>(x)};
  if (state && past) columns.state = Strided<S>(*state);
  return columns;
}

template <class S>
void run(const Tensor& x, const MaybeTensor& state, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
         const MaybeTensor& condition, int64_t dilation, int64_t groups, Activation activation, Tensor& y) {
  Buffer<S> own;
  if (!packed) own = pack<S>(weight, groups, false);
  const Weights<S> weights{weight.size(0) / groups, weight.size(1) * weight.size(2), packed ? pointer<S>(packed) : own.data(),
                           pointer<S>(bias)};
  DenseJob<S> job{inputs_of<S>(x, state, weight, dilation), groups, activation, weights, static_cast<S*>(y.data_ptr())};
  if (condition) job.condition = Strided<S>(*condition);
  dense(job);
}

// x (N, C, L), state (N, C, (K - 1) dilation), condition (N, C_out, L): any strides; weight (C_out, C / groups, K), bias (C_out),
// packed: a tensor of the packed weights. All of one type.
Tensor convolve(const Tensor& x, const MaybeTensor& state, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& packed,
                const MaybeTensor& condition, int64_t dilation, int64_t groups, Activation activation) {
  Tensor y = new_tensor(x, {x.size(0), weight.size(0) / (activation == Activation::kGate ? 2 : 1), x.size(2)});
  if (y.numel() == 0) return y;
  const Sequences inputs(x);  // gathered once for each tap
  if (x.scalar_type() == ScalarType::Double)
    run<double>(inputs.tensor, state, weight, bias, packed, condition, dilation, groups, activation, y);
  else
    run<float>(inputs.tensor, state, weight, bias, packed, condition, dilation, groups, activation, y);
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

// ---- gradients. That of x is a convolution of the gradients of later outputs with the transposed weights, and that of the state
// what it is before x. A weight's is the product of two rows, a gradient's and an input's, over all columns: lanes over columns,
// some kSum of them in a chain, the rest of the sum in double.

constexpr int64_t kSum = 512;
constexpr int64_t kDeep = 512;  // rows of inputs, about, that stay in the second cache

template <class V, int... i>
GK_FN V sum_of_neighbours(V a, V b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (2 * i)...) + __builtin_shufflevector(a, b, (2 * i + 1)...);
}
template <int kCount, int kLanesLeft, class V>  // the sums over the lanes of each become neighbours
GK_FN void fold(V* v) {
  if constexpr (kLanesLeft > 1) {
    constexpr auto lanes = std::make_integer_sequence<int, Lane<V>::kCount>();
    for (int i = 0; i < kCount / 2; i++) v[i] = sum_of_neighbours(v[2 * i], v[2 * i + 1], lanes);
    if constexpr (kCount % 2) v[kCount / 2] = sum_of_neighbours(v[kCount - 1], V{}, lanes);
    fold<(kCount + 1) / 2, kLanesLeft / 2>(v);
  }
}

// total[o][j] += sum over `width` columns of grad[o] x[j].
template <class S>
void add_products(const S* grad, const S* x, int64_t width, double* total) {
  using V = typename Tile<S>::V;
  constexpr int kRows = Tile<S>::kRows, kVectors = Tile<S>::kVectors, kCount = Tile<S>::kCount, kSums = kRows * kVectors;
  V sum[kSums] = {};
  for (int64_t t = 0; t < width; t += kCount) {
    V value[kVectors];
    for (int j = 0; j < kVectors; j++) value[j] = load<V>(x + j * width + t);
    for (int o = 0; o < kRows; o++) {
      const V one = in_register(load<V>(grad + o * width + t));
      for (int j = 0; j < kVectors; j++) sum[o * kVectors + j] = fma(one, value[j], sum[o * kVectors + j]);
    }
  }
  fold<kSums, kCount>(sum);
  S sums[kSums + kCount];
  for (int i = 0; i < kSums; i += kCount) store(sums + i, sum[i / kCount]);
  for (int i = 0; i < kSums; i++) total[i] += static_cast<double>(sums[i]);
}

// What is seen through some columns, in rows of `width`, zeros behind them.
template <class S>
void gather_rows(const Columns<S>& from, int64_t first, int64_t count, int64_t width, S* to) {
  gather(from, first, count, width, to);
  for (int64_t d = 0; d < from.depth(); d++) std::fill(to + d * width + count, to + (d + 1) * width, S{});
}

// d_weight (groups outputs, channels, taps) of those channels of a group that x has, d_bias (groups outputs); grad: of one tap.
template <class S>
void weight_gradient(const Columns<S>& x, const Columns<S>& grad, int64_t groups, int64_t channels, S* d_weight, S* d_bias) {
  constexpr int kRows = Tile<S>::kRows, kVectors = Tile<S>::kVectors, kCount = Tile<S>::kCount, kSums = kRows * kVectors;
  const int64_t outputs = grad.channels, depth = x.depth(), columns = x.samples * x.time;
  const int64_t blocks = (outputs + kRows - 1) / kRows, parts = (depth + kVectors) / kVectors;  // with a row of ones, for the bias
  const auto whole_vectors = [](int64_t count) { return (count + kCount - 1) / kCount * kCount; };
  const int64_t grain = std::max<int64_t>(1, 262144 / std::max<int64_t>(1, kRows * depth * columns));
  torch::stable::parallel_for(0, groups * blocks, grain, [&](int64_t begin, int64_t end) {
    const size_t room = static_cast<size_t>(std::min(kSum, whole_vectors(columns)));
    Buffer<S> in(parts * kVectors * room, S{}), rows(kRows * room, S{});
    std::vector<double> total;  // of the blocks of a group: [block][part][row][vector]
    for (int64_t stop; begin < end; begin = stop) {
      const int64_t group = begin / blocks, first_block = begin % blocks;
      stop = std::min(end, (group + 1) * blocks);
      const int64_t here = stop - begin;
      total.assign(static_cast<size_t>(here * parts * kSums), 0.0);
      for (int64_t first = 0; first < columns; first += kSum) {
        const int64_t count = std::min(kSum, columns - first), width = whole_vectors(count);
        gather_rows(x.from_channel(group * channels), first, count, width, in.data());
        std::fill_n(in.begin() + depth * width, width, S{1});
        for (int64_t b = 0; b < here; b++) {
          const int64_t row = (first_block + b) * kRows;
          Columns<S> some = grad.from_channel(group * outputs + row);
          some.channels = std::min<int64_t>(kRows, outputs - row);
          gather_rows(some, first, count, width, rows.data());
          for (int64_t p = 0; p < parts; p++)
            add_products(rows.data(), in.data() + p * kVectors * width, width, total.data() + (b * parts + p) * kSums);
        }
      }
      for (int64_t o = first_block * kRows; o < std::min(outputs, (first_block + here) * kRows); o++) {
        const double* sums = total.data() + (o / kRows - first_block) * parts * kSums + o % kRows * kVectors;
        const auto sum = [&](int64_t d) { return static_cast<S>(sums[d / kVectors * kSums + d % kVectors]); };
        S* to = d_weight + (group * outputs + o) * channels * x.taps;
        for (int64_t k = 0; k < x.taps; k++)
          for (int64_t c = 0; c < x.channels; c++) to[c * x.taps + k] = sum(k * x.channels + c);
        if (d_bias) d_bias[group * outputs + o] = sum(depth);
      }
    }
  });
}

template <class S>
void backward(const Tensor& grad, const Tensor& x, const MaybeTensor& state, const Tensor& weight, int64_t dilation, int64_t groups,
              Tensor& d_x, MaybeTensor& d_state, Tensor& d_weight, MaybeTensor& d_bias) {
  const int64_t outputs = weight.size(0) / groups, channels = weight.size(1), taps = weight.size(2), length = x.size(2);
  const int64_t past = (taps - 1) * dilation;
  const Buffer<S> packed = pack<S>(weight, groups, true);
  const Columns<S> later{x.size(0), length, outputs, taps, dilation, 0, length, Strided<S>(grad)};
  const Weights<S> weights{channels, outputs * taps, packed.data(), nullptr};
  DenseJob<S> job{later, groups, Activation::kNone, weights, static_cast<S*>(d_x.data_ptr())};
  dense(job);
  if (d_state && d_state->numel()) {
    job.columns.time = job.columns.behind = past;
    job.y = static_cast<S*>(d_state->data_ptr());
    dense(job);
  }
  Columns<S> same = later;
  same.taps = 1;
  const Columns<S> inputs = inputs_of<S>(x, state, weight, dilation);
  const int64_t pieces = (channels * taps + kDeep - 1) / kDeep, most = (channels + pieces - 1) / pieces;
  for (int64_t c = 0; c < channels; c += most) {
    Columns<S> some = inputs.from_channel(c);
    some.channels = std::min(most, channels - c);
    weight_gradient(some, same, groups, channels, static_cast<S*>(d_weight.data_ptr()) + c * taps,
                    d_bias && c == 0 ? static_cast<S*>(d_bias->data_ptr()) : nullptr);
  }
}

std::vector<Tensor> causal_conv1d_dense_backward(Tensor grad, Tensor x, MaybeTensor state, Tensor weight, MaybeTensor bias,
                                                 MaybeTensor packed, int64_t dilation, int64_t groups) {
  Tensor d_x = new_tensor(x, x.sizes()), d_weight = new_tensor(x, weight.sizes());
  MaybeTensor d_state, d_bias;
  if (state) d_state = new_tensor(x, state->sizes());
  if (bias) d_bias = new_tensor(x, bias->sizes());
  if (x.scalar_type() == ScalarType::Double)
    backward<double>(Sequences(grad).tensor, Sequences(x).tensor, state, weight, dilation, groups, d_x, d_state, d_weight, d_bias);
  else
    backward<float>(Sequences(grad).tensor, Sequences(x).tensor, state, weight, dilation, groups, d_x, d_state, d_weight, d_bias);
  std::vector<Tensor> gradients{d_x};
  if (d_state) gradients.push_back(*d_state);
  gradients.push_back(d_weight);
  if (d_bias) gradients.push_back(*d_bias);
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_causal_conv1d_dense", TORCH_BOX(&causal_conv1d_dense));
  m.impl("_causal_conv1d_dense_silu", TORCH_BOX(&causal_conv1d_dense_silu));
  m.impl("_causal_conv1d_dense_backward", TORCH_BOX(&causal_conv1d_dense_backward));
  m.impl("_causal_conv1d_gated", TORCH_BOX(&causal_conv1d_gated));
}

}  // namespace gk
