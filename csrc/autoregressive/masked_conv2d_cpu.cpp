// masked_conv2d on the CPU: a direct convolution over the live taps alone, with lanes over pixels.
//
// A plane is a channel of an image whose rows are `columns` zeros longer, with `columns` zeros before the first: row after row it
// is one sequence, in which every tap is a fixed distance, whatever the width. Results between two rows are dropped. An output is
// its bias, then, in raster order of the taps, the sums over kChain terms each, every one a chain of fused multiply-adds: its bits
// depend on nothing else. The gradient to x is the same convolution with the taps reflected and inputs and outputs exchanged.
#include "rows.h"

namespace gk {
namespace {

constexpr int kChain = 128;         // short chains round less
constexpr int64_t kSlack = kLanes;  // of a plane, for vectors that reach over its end
constexpr int64_t kStretch = 64;    // vectors of pixels whose products are summed in registers, for the gradient to weight

struct Mask {
  int64_t colors;
  bool grouped, own;  // own: of type B
  int64_t color(int64_t channel, int64_t channels) const { return grouped ? channel * colors / channels : channel % colors; }
  bool sees(int64_t output, int64_t input) const { return input < output || (own && input == output); }
};

struct Grid {
  int64_t height, width, rows, columns;  // rows above and columns on either side that the kernel covers
  int64_t stride() const { return width + columns; }
  int64_t plane() const { return columns + (height + rows) * stride() + kSlack; }
  int64_t first(bool below) const { return columns + (below ? 0 : rows * stride()); }  // where the image begins in its plane
  int64_t taps() const { return rows * (2 * columns + 1) + columns; }                  // but for the centre
  int64_t distance(int64_t tap) const {                                                // of the tap in raster order
    const int64_t size = 2 * columns + 1;
    return (tap / size - rows) * stride() + tap % size - columns;
  }
};

// Where the vectors of pixels begin, from the first pixel on: row by row, or, where that takes fewer, one after the other over the
// zeros between rows too.
std::vector<int64_t> vectors(const Grid& grid, int64_t lanes) {
  std::vector<int64_t> by_row, in_turn;
  for (int64_t row = 0; row < grid.height; row++)
    for (int64_t column = 0; column < grid.width; column += lanes) by_row.push_back(row * grid.stride() + column);
  for (int64_t p = 0; p < grid.height * grid.stride() - grid.columns; p += lanes) in_turn.push_back(p);
  return by_row.size() <= in_turn.size() ? by_row : in_turn;
}

// (N, C, H, W) as planes; below: the rows of zeros are below the image, else above it.
template <class S>
std::vector<S> planes(const Tensor& x, const Grid& grid, bool below) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int64_t count = x.size(0) * x.size(1);
  std::vector<S> to(static_cast<size_t>(count * grid.plane()));
  const S* from = static_cast<const S*>(x.data_ptr());
  torch::stable::parallel_for(0, count, std::max<int64_t>(1, 65536 / grid.plane()), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t row = 0; row < grid.height; row++) {
        const S* line = from + (i * grid.height + row) * grid.width;
        S* at = to.data() + i * grid.plane() + grid.first(below) + row * grid.stride();
        for (int64_t column = 0; column < grid.width; column += kCount)  // what it writes beyond the row is zero
          store(at + column, load_first(line + column, static_cast<int>(std::min<int64_t>(kCount, grid.width - column)), V{}));
      }
  });
  return to;
}

struct Terms {  // of the outputs of one colour: where the input stands from the output's place, and its weight from that of term 0
  std::vector<int64_t> input, weight;
};

struct Block {  // of outputs of one colour
  const Terms* terms;
  int rows;
  int64_t first, weights;  // in the order of the outputs; in the packed weights [term][row]
};

template <class S>
struct Job {
  Grid grid;
  int64_t samples, inputs, outputs;
  const S *x, *bias;           // x: planes of the inputs, from the place of the first pixel on
  S* y;                        // (samples, outputs, height, width)
  std::vector<int64_t> at;     // where the vectors begin
  std::vector<int64_t> order;  // the outputs, colour by colour
  std::vector<Block> blocks;
  std::vector<S> weights;
};

// kColumns vectors, from number `first` on, of kRows outputs.
template <class S, int kRows, int kColumns>
void run_tile(const Job<S>& job, const Block& block, const S* start, const S* x, int64_t first, S* const* y) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const Grid& grid = job.grid;
  const int64_t* input = block.terms->input.data();
  const int64_t terms = static_cast<int64_t>(block.terms->input.size());
  const S *from[kColumns], *w = job.weights.data() + block.weights;
  for (int j = 0; j < kColumns; j++) from[j] = x + job.at[first + j];
  V total[kRows][kColumns];
  for (int o = 0; o < kRows; o++)
    for (int j = 0; j < kColumns; j++) total[o][j] = start[o] - V{};
  for (int64_t i = 0; i < terms;) {
    V sum[kRows][kColumns] = {};
    for (const int64_t end = std::min<int64_t>(i + kChain, terms); i < end; i++, w += kRows) {
      V value[kColumns];
      for (int j = 0; j < kColumns; j++) value[j] = load<V>(from[j] + input[i]);
      for (int o = 0; o < kRows; o++) {
        const V one = w[o] - V{};
        for (int j = 0; j < kColumns; j++) sum[o][j] = fma(one, value[j], sum[o][j]);
      }
    }
    for (int o = 0; o < kRows; o++)
      for (int j = 0; j < kColumns; j++) total[o][j] = total[o][j] + sum[o][j];
  }
  for (int j = 0; j < kColumns; j++)
    for (int64_t begin = 0; begin < kCount;) {  // the parts of rows in a vector
      const int64_t p = job.at[first + j] + begin, row = p / grid.stride(), column = p % grid.stride();
      if (row >= grid.height) break;
      const int64_t valid = std::min(kCount - begin, grid.width - column);
      if (valid > 0)
        for (int o = 0; o < kRows; o++) {
          S* to = y[o] + row * grid.width + column;
          if (valid == kCount) {
            store(to, total[o][j]);
          } else {
            S out[kCount];
            store(out, total[o][j]);
            memcpy(to, out + begin, valid * sizeof(S));
          }
        }
      begin += grid.stride() - column;
    }
}

template <class S, int kRows, int kColumns>
void run_block(const Job<S>& job, const Block& block, int64_t sample) {
  const int64_t count = static_cast<int64_t>(job.at.size()), pixels = job.grid.height * job.grid.width;
  const S* x = job.x + sample * job.inputs * job.grid.plane();
  S start[kRows], *y[kRows];
  for (int o = 0; o < kRows; o++) {
    const int64_t output = job.order[block.first + o];
    start[o] = job.bias ? job.bias[output] : S{};
    y[o] = job.y + (sample * job.outputs + output) * pixels;
  }
  int64_t first = 0;
  for (; first + kColumns <= count; first += kColumns) run_tile<S, kRows, kColumns>(job, block, start, x, first, y);
  for (; first < count; first++) run_tile<S, kRows, 1>(job, block, start, x, first, y);
}

template <class S>
void run_any(const Job<S>& job, const Block& block, int64_t sample) {
  constexpr bool kWide = Lane<typename Vector<S>::type>::kCount == 16;  // 32 registers
  if constexpr (kWide)
    if (block.rows == 8) return run_block<S, 8, 3>(job, block, sample);
  if (block.rows == 4) return run_block<S, 4, kWide ? 6 : 3>(job, block, sample);
  if (block.rows == 2) return run_block<S, 2, kWide ? 8 : 4>(job, block, sample);
  return run_block<S, 1, 8>(job, block, sample);
}

// y[o] = bias[o] + sum over the terms that the output's colour sees. reflected: from an output of the convolution to its inputs.
template <class S>
void convolve(const Tensor& x, const Tensor& weight, const S* bias, const Mask& mask, const Grid& grid, bool reflected, Tensor& y) {
  constexpr int kCount = Lane<typename Vector<S>::type>::kCount, kMost = kCount == 16 ? 8 : 4;
  const int64_t inputs = x.size(1), outputs = y.size(1), size = weight.size(2) * weight.size(3), row = weight.size(1) * size;
  const int64_t of_input = reflected ? row : size, of_output = reflected ? size : row;
  const std::vector<S> data = planes<S>(x, grid, reflected);
  Job<S> job{grid,
             x.size(0),
             inputs,
             outputs,
             data.data() + grid.first(reflected),
             bias,
             static_cast<S*>(y.data_ptr()),
             vectors(grid, kCount)};
  std::vector<Terms> terms(static_cast<size_t>(mask.colors));
  const S* w = static_cast<const S*>(weight.data_ptr());
  for (int64_t color = 0; color < mask.colors; color++) {
    Terms& mine = terms[color];
    for (int64_t tap = 0; tap <= grid.taps(); tap++)
      for (int64_t c = 0; c < inputs; c++) {
        const int64_t other = mask.color(c, inputs);
        if (tap == grid.taps() && !(reflected ? mask.sees(other, color) : mask.sees(color, other))) continue;
        mine.input.push_back(c * grid.plane() + (reflected ? -grid.distance(tap) : grid.distance(tap)));
        mine.weight.push_back(c * of_input + tap);
      }
    const int64_t begin = static_cast<int64_t>(job.order.size());
    for (int64_t o = 0; o < outputs; o++)
      if (mask.color(o, outputs) == color) job.order.push_back(o);
    int64_t left = static_cast<int64_t>(job.order.size()) - begin;
    for (int rows = kMost; rows; rows /= 2)
      for (; left >= rows; left -= rows) {
        const int64_t first = static_cast<int64_t>(job.order.size()) - left;
        job.blocks.push_back({&mine, rows, first, static_cast<int64_t>(job.weights.size())});
        for (const int64_t at : mine.weight)
          for (int o = 0; o < rows; o++) job.weights.push_back(w[job.order[first + o] * of_output + at]);
      }
  }
  const int64_t blocks = static_cast<int64_t>(job.blocks.size());
  const int64_t work = std::max<int64_t>(1, grid.height * grid.width * inputs * (grid.taps() + 1) * kMost);
  torch::stable::parallel_for(0, job.samples * blocks, std::max<int64_t>(1, (int64_t{1} << 20) / work),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t unit = begin; unit < end; unit++)
                                  run_any(job, job.blocks[unit % blocks], unit / blocks);
                              });
}

struct Place {  // of a vector of pixels of one sample: its distance from the first one
  int64_t x, grad;
};

// total[o][t] += the products of the gradients at kOutputs planes, `apart` values apart, with x at kTaps distances, at some places.
template <class S, int kOutputs, int kTaps, class V = typename Vector<S>::type>
void add_products(const Place* places, int64_t count, const S* x, const S* grad, int64_t apart, const int64_t* distance, V* total,
                  int64_t taps) {
  const S *g[kOutputs], *from[kTaps];
  for (int o = 0; o < kOutputs; o++) g[o] = grad + o * apart;
  for (int t = 0; t < kTaps; t++) from[t] = x + distance[t];
  V sum[kOutputs][kTaps] = {};
  for (int64_t i = 0; i < count; i++) {
    const Place at = places[i];
    V one[kOutputs];
    for (int o = 0; o < kOutputs; o++) one[o] = load<V>(g[o] + at.grad);
    for (int t = 0; t < kTaps; t++) {
      const V value = load<V>(from[t] + at.x);
      for (int o = 0; o < kOutputs; o++) sum[o][t] = fma(one[o], value, sum[o][t]);
    }
  }
  for (int o = 0; o < kOutputs; o++)
    for (int t = 0; t < kTaps; t++) total[o * taps + t] = total[o * taps + t] + sum[o][t];
}

template <class S, int kOutputs, int kMost, class... Rest>
void add_some(int64_t count, Rest... rest) {
  if (count == kMost) return add_products<S, kOutputs, kMost>(rest...);
  if constexpr (kMost > 1) add_some<S, kOutputs, kMost - 1>(count, rest...);
}

// The gradient to weight, zero under the mask: for each output a unit of work, several outputs at once.
template <class S>
void weight_gradient(const std::vector<S>& x, const std::vector<S>& grad, int64_t samples, const Mask& mask, const Grid& grid,
                     Tensor& out) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount, kOutputs = kCount == 16 ? 4 : 2, kTaps = kCount == 16 ? 6 : 5;
  const int64_t outputs = out.size(0), inputs = out.size(1), size = out.size(2) * out.size(3), taps = grid.taps() + 1;
  const int64_t plane = grid.plane(), groups = (outputs + kOutputs - 1) / kOutputs;
  S* to = static_cast<S*>(out.data_ptr());
  std::vector<Place> places;
  for (int64_t n = 0; n < samples; n++) {
    // vectors that begin in every row may reach into the next, whose pixels would count twice
    for (int64_t p = 0; grid.width % kCount && p < grid.height * grid.stride() - grid.columns; p += kCount)
      places.push_back({n * inputs * plane + p, n * outputs * plane + p});
    for (int64_t p = 0; grid.width % kCount == 0 && p < grid.height * grid.width; p += kCount) {
      const int64_t at = p + p / grid.width * grid.columns;
      places.push_back({n * inputs * plane + at, n * outputs * plane + at});
    }
  }
  std::vector<int64_t> distance;
  for (int64_t t = 0; t < taps; t++) distance.push_back(grid.distance(t));
  torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> total(static_cast<size_t>(kOutputs * taps));
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t o = unit * kOutputs, count = std::min<int64_t>(kOutputs, outputs - o);
      for (int64_t c = 0; c < inputs; c++) {
        std::fill(total.begin(), total.end(), V{});
        const S* from = x.data() + c * plane + grid.first(false);
        const S* g = grad.data() + o * plane + grid.first(true);
        for (size_t i = 0; i < places.size(); i += kStretch) {
          const int64_t stretch = std::min<int64_t>(kStretch, places.size() - i);
          for (int64_t t = 0; t < taps; t += kTaps) {
            const int64_t some = std::min<int64_t>(kTaps, taps - t);
            const auto add = [&](auto outputs_at_once, int64_t j) {
              constexpr int kAtOnce = decltype(outputs_at_once)::value;
              add_some<S, kAtOnce, kTaps>(some, places.data() + i, stretch, from, g + j * plane, plane, distance.data() + t,
                                          total.data() + j * taps + t, taps);
            };
            if (count == kOutputs)
              add(std::integral_constant<int, kOutputs>(), 0);
            else
              for (int64_t j = 0; j < count; j++) add(std::integral_constant<int, 1>(), j);
          }
        }
        for (int64_t i = 0; i < count; i++) {
          S* w = to + ((o + i) * inputs + c) * size;
          for (int64_t t = 0; t < size; t++) w[t] = t < taps ? static_cast<S>(sum_lanes(total[i * taps + t])) : S{};
          if (!mask.sees(mask.color(o + i, outputs), mask.color(c, inputs))) w[taps - 1] = 0;
        }
      }
    }
  });
}

template <class S>
void bias_gradient(const Tensor& grad, Tensor& out) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int64_t samples = grad.size(0), outputs = grad.size(1), pixels = grad.size(2) * grad.size(3);
  const S* g = static_cast<const S*>(grad.data_ptr());
  S* to = static_cast<S*>(out.data_ptr());
  torch::stable::parallel_for(0, outputs, 1, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o++) {
      double total = 0;
      for (int64_t n = 0; n < samples; n++)
        for (int64_t p = 0; p < pixels;) {
          V sum{};
          for (const int64_t last = std::min(p + kStretch * kCount, pixels); p < last; p += kCount)
            sum = sum + load_first(g + (n * outputs + o) * pixels + p, static_cast<int>(std::min<int64_t>(kCount, last - p)), V{});
          total += sum_lanes(sum);
        }
      to[o] = static_cast<S>(total);
    }
  });
}

Grid grid_of(const Tensor& x, const Tensor& weight) { return {x.size(2), x.size(3), weight.size(2) / 2, weight.size(3) / 2}; }

// x (N, C, H, W), weight (C_out, C, K_h, K_w), bias (C_out): all of one type, float or double.
Tensor masked_conv2d(Tensor x, Tensor weight, MaybeTensor bias, bool own, int64_t colors, bool grouped) {
  x = torch::stable::contiguous(x), weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor y = new_tensor(x, {x.size(0), weight.size(0), x.size(2), x.size(3)});
  if (y.numel() == 0) return y;
  const Mask mask{colors, grouped, own};
  const void* b = bias ? bias->data_ptr() : nullptr;
  if (x.scalar_type() == ScalarType::Double)
    convolve<double>(x, weight, static_cast<const double*>(b), mask, grid_of(x, weight), false, y);
  else
    convolve<float>(x, weight, static_cast<const float*>(b), mask, grid_of(x, weight), false, y);
  return y;
}

template <class S>
void backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Mask& mask, std::vector<Tensor>& out) {
  const Grid grid = grid_of(x, weight);
  if (out[0].numel()) convolve<S>(grad, weight, nullptr, mask, grid, true, out[0]);
  if (out[1].numel()) weight_gradient<S>(planes<S>(x, grid, false), planes<S>(grad, grid, true), x.size(0), mask, grid, out[1]);
  if (out.size() > 2) bias_gradient<S>(grad, out[2]);
}

std::vector<Tensor> masked_conv2d_backward(Tensor grad, Tensor x, Tensor weight, MaybeTensor bias, bool own, int64_t colors,
                                           bool grouped) {
  grad = torch::stable::contiguous(grad), x = torch::stable::contiguous(x), weight = torch::stable::contiguous(weight);
  std::vector<Tensor> out{new_tensor(x, x.sizes()), new_tensor(weight, weight.sizes())};
  if (bias) out.push_back(new_tensor(*bias, bias->sizes()));
  const Mask mask{colors, grouped, own};
  if (x.scalar_type() == ScalarType::Double)
    backward<double>(grad, x, weight, mask, out);
  else
    backward<float>(grad, x, weight, mask, out);
  return out;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_masked_conv2d", TORCH_BOX(&masked_conv2d));
  m.impl("_masked_conv2d_backward", TORCH_BOX(&masked_conv2d_backward));
}

}  // namespace gk
