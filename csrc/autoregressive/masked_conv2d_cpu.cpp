// masked_conv2d on the CPU: a direct convolution over the live taps alone, with lanes over outputs, or, for outputs that fill no
// vector, over pixels; both form the same sums.
//
// A plane is a channel of an image whose rows are `columns` zeros longer, with `columns` zeros before the first: row after row it
// is one sequence, in which every tap is a fixed distance, whatever the width. Results between two rows are dropped. Where lanes
// are over outputs, the same row of all channels lies together, for they are read one after the other. An output is
// its bias, then, in raster order of the taps, the sums over kChain terms each, every one a chain of fused multiply-adds: its bits
// depend on nothing else. The gradient to x is the same convolution with the taps reflected and inputs and outputs exchanged.
#include "rows.h"
#include "transpose.h"

namespace gk {
namespace {

constexpr int kChain = 128;         // short chains round less
constexpr int64_t kTogether = 64;   // pixels that share a stretch of weights
constexpr int64_t kStretch = 64;    // vectors of pixels summed at once, for the gradient to bias
constexpr int64_t kSlack = kLanes;  // of a plane, for vectors that reach over its end

struct Mask {
  int64_t colors;
  bool grouped, own;  // own: of type B
  int64_t color(int64_t channel, int64_t channels) const { return grouped ? channel * colors / channels : channel % colors; }
  bool sees(int64_t output, int64_t input) const { return input < output || (own && input == output); }
};

struct Grid {
  int64_t height, width, rows, columns;  // rows above and columns on either side that the kernel covers
  int64_t apart = 1;                     // channels whose lines take turns
  int64_t stride() const { return width + columns; }
  int64_t down() const { return apart * stride(); }  // to the next row of the same channel
  int64_t plane() const { return columns + (height + rows) * down() + kSlack; }
  int64_t channel(int64_t c) const { return c / apart * plane() + c % apart * stride(); }
  int64_t first(bool below) const { return columns + (below ? 0 : rows * down()); }  // where the image begins in its plane
  int64_t taps() const { return rows * (2 * columns + 1) + columns; }                // but for the centre
  int64_t distance(int64_t tap) const {                                              // of the tap in raster order
    const int64_t size = 2 * columns + 1;
    return (tap / size - rows) * down() + tap % size - columns;
  }
};

// Where the vectors of pixels begin, from the first pixel on: row by row, or, where that takes fewer, one after the other over the
// zeros between rows too.
std::vector<int64_t> vectors(const Grid& grid, int64_t lanes) {
  std::vector<int64_t> by_row, in_turn;
  for (int64_t row = 0; row < grid.height; row++)
    for (int64_t column = 0; column < grid.width; column += lanes) by_row.push_back(row * grid.down() + column);
  for (int64_t p = 0; p < grid.height * grid.stride() - grid.columns; p += lanes) in_turn.push_back(p);
  return grid.apart > 1 || by_row.size() <= in_turn.size() ? by_row : in_turn;
}

// (N, C, H, W) as planes; below: the rows of zeros are below the image, else above it.
template <class S>
std::vector<S> planes(const Tensor& x, const Grid& grid, bool below) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int64_t count = x.size(0) * x.size(1);
  std::vector<S> to(static_cast<size_t>(grid.channel(count)));
  const S* from = static_cast<const S*>(x.data_ptr());
  torch::stable::parallel_for(0, count, 65536 / grid.plane() + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      for (int64_t row = 0; row < grid.height; row++) {
        const S* line = from + (i * grid.height + row) * grid.width;
        S* at = to.data() + grid.channel(i) + grid.first(below) + row * grid.down();
        for (int64_t column = 0; column < grid.width; column += kCount) {
          const int some = static_cast<int>(std::min<int64_t>(kCount, grid.width - column));
          store_first(at + column, load_first(line + column, some, V{}), some);
        }
      }
  });
  return to;
}

// total[j] += the sums over i, each a chain from zero, of the vectors at a + a_at[i] times the number b[b_at[i] + j].
template <class S, int kVectors, int kColumns>
void add_chains(int64_t count, const S* a, const int64_t* a_at, const S* b, const int64_t* b_at, S* total) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  V sum[kVectors][kColumns];
  for (int v = 0; v < kVectors; v++)
    for (int j = 0; j < kColumns; j++) sum[v][j] = V{};  // = {} would clear memory first
  int64_t i = 0;
  do {
    const S *from = a + a_at[i], *number = b + b_at[i];
    V value[kVectors];
    for (int v = 0; v < kVectors; v++) value[v] = load<V>(from + v * kCount);
    for (int j = 0; j < kColumns; j++) {
      const V one = number[j] - V{};
      for (int v = 0; v < kVectors; v++) sum[v][j] = fma(one, value[v], sum[v][j]);
    }
  } while (++i < count);
  for (int j = 0; j < kColumns; j++)
    for (int v = 0; v < kVectors; v++, total += kCount) store(total, load<V>(total) + sum[v][j]);
}

template <class S>
constexpr int kMostColumns = Lane<typename Vector<S>::type>::kCount == 16 ? 14 : 6;  // by two vectors, of 32 or 16 registers
template <class S>
constexpr int kMostRows = Lane<typename Vector<S>::type>::kCount == 16 ? 8 : 4;  // of a narrow block

template <class S, int kVectors, int kMost, class... Rest>
void add_columns(int columns, Rest... rest) {
  if (columns == kMost) return add_chains<S, kVectors, kMost>(rest...);
  if constexpr (kMost > 1) add_columns<S, kVectors, kMost - 1>(columns, rest...);
}
template <class S, class... Rest>
void add_chains(int vectors, int columns, Rest... rest) {
  if (vectors == 2)
    add_columns<S, 2, kMostColumns<S>>(columns, rest...);
  else
    add_columns<S, 1, kMostColumns<S>>(columns, rest...);
}

// Columns cut into parts of nearly equal length, none longer than a kernel's.
template <class S>
std::vector<int> parts_of(int64_t columns) {
  const int64_t parts = (columns + kMostColumns<S> - 1) / kMostColumns<S>;
  std::vector<int> result(static_cast<size_t>(parts));
  for (int64_t i = 0; i < parts; i++) result[i] = static_cast<int>((i + 1) * columns / parts - i * columns / parts);
  return result;
}

struct Terms {  // of the outputs of one colour: where the input stands from the output's place, and its weight from that of term 0
  std::vector<int64_t> input, weight, centre;  // centre: for each input the term of its own pixel, or -1
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
  std::vector<Block> wide, narrow;
  std::vector<typename Vector<S>::type> wide_weights;  // aligned
  std::vector<S> weights;
  std::vector<int> parts;         // of a line of pixels
  std::vector<int64_t> steps[2];  // where the weights of a chain's terms lie, for blocks of one vector and of two
};

// Lines of pixels of a wide block: lanes over outputs, which wastes none of them on the zeros between lines.
template <class S>
void run_lines(const Job<S>& job, const Block& block, int64_t sample, int64_t line, int64_t lines, S* total) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const Grid& grid = job.grid;
  const int vectors = block.rows / kCount;
  const int64_t terms = static_cast<int64_t>(block.terms->input.size()), pixels = lines * grid.width;
  const S* x = job.x + grid.channel(sample * job.inputs) + line * grid.down();
  const S* weights = reinterpret_cast<const S*>(job.wide_weights.data()) + block.weights;
  V outputs[2 * kCount];
  for (int o = 0; o < block.rows; o++) total[o] = job.bias ? job.bias[job.order[block.first + o]] : S{};
  for (int64_t p = 1; p < pixels; p++) memcpy(total + p * block.rows, total, block.rows * sizeof(S));
  for (int64_t i = 0; i < terms; i += kChain)
    for (int64_t row = 0; row < lines; row++) {
      int64_t p = 0;
      for (const int columns : job.parts) {
        add_chains<S>(vectors, columns, std::min<int64_t>(kChain, terms - i), weights + i * block.rows,
                      job.steps[vectors - 1].data(), x + row * grid.down() + p, block.terms->input.data() + i,
                      total + (row * grid.width + p) * block.rows);
        p += columns;
      }
    }
  S* y = job.y + sample * job.outputs * grid.height * grid.width + line * grid.width;
  for (int64_t p = 0; p < pixels; p += kCount) {
    const int valid = static_cast<int>(std::min<int64_t>(kCount, pixels - p));
    load_columns(total + p * block.rows, block.rows, valid, block.rows, outputs);
    for (int o = 0; o < block.rows; o++)
      store_first(y + job.order[block.first + o] * grid.height * grid.width + p, outputs[o], valid);
  }
}

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
      const int64_t p = job.at[first + j] + begin, row = p / grid.down(), column = p % grid.down();
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
      begin += grid.down() - column;
    }
}

template <class S, int kRows, int kColumns>
void run_block(const Job<S>& job, const Block& block, int64_t sample) {
  const int64_t count = static_cast<int64_t>(job.at.size()), pixels = job.grid.height * job.grid.width;
  const S* x = job.x + job.grid.channel(sample * job.inputs);
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

template <class S>
struct Weights {
  const S* data;
  int64_t of_input, of_output;  // how far apart two inputs and two outputs lie
};

Terms terms_of(int64_t color, const Mask& mask, const Grid& grid, int64_t inputs, int64_t of_input, bool reflected) {
  Terms result;
  const int64_t taps = grid.taps();
  for (int64_t tap = 0; tap < taps; tap++)
    for (int64_t c = 0; c < inputs; c++) {
      result.input.push_back(grid.channel(c) + (reflected ? -grid.distance(tap) : grid.distance(tap)));
      result.weight.push_back(c * of_input + tap);
    }
  for (int64_t c = 0; c < inputs; c++) {
    const int64_t other = mask.color(c, inputs);
    const bool seen = reflected ? mask.sees(other, color) : mask.sees(color, other);
    result.centre.push_back(seen ? static_cast<int64_t>(result.input.size()) : -1);
    if (!seen) continue;
    result.input.push_back(grid.channel(c));
    result.weight.push_back(c * of_input + taps);
  }
  return result;
}

// Blocks of the outputs from number `begin` of the order on, which have these terms, and their weights in the order of the work.
template <class S>
void add_blocks(Job<S>& job, const Terms& terms, const Weights<S>& weights, int64_t begin) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int64_t inputs = job.inputs, taps = job.grid.taps(), end = static_cast<int64_t>(job.order.size());
  const int64_t apart = end - begin > 1 ? (job.order[begin + 1] - job.order[begin]) * weights.of_output : 0;
  std::vector<V> columns(static_cast<size_t>(taps + 1));
  for (int rows = 2 * kCount; rows >= kCount; rows /= 2)
    for (; end - begin >= rows; begin += rows) {
      const int64_t at = static_cast<int64_t>(job.wide_weights.size()) * kCount;
      job.wide.push_back({&terms, rows, begin, at});
      job.wide_weights.resize(job.wide_weights.size() + terms.weight.size() * rows / kCount);
      for (int v = 0; v < rows; v += kCount) {
        S* to = reinterpret_cast<S*>(job.wide_weights.data()) + at + v;
        for (int64_t c = 0; c < inputs; c++) {
          load_columns(weights.data + job.order[begin + v] * weights.of_output + c * weights.of_input, apart, kCount,
                       static_cast<int>(taps + 1), columns.data());
          for (int64_t tap = 0; tap < taps; tap++) store(to + (tap * inputs + c) * rows, columns[tap]);
          if (terms.centre[c] >= 0) store(to + terms.centre[c] * rows, columns[taps]);
        }
      }
    }
  for (int rows = kMostRows<S>; rows; rows /= 2)
    for (; end - begin >= rows; begin += rows) {
      job.narrow.push_back({&terms, rows, begin, static_cast<int64_t>(job.weights.size())});
      for (const int64_t at : terms.weight)
        for (int o = 0; o < rows; o++) job.weights.push_back(weights.data[job.order[begin + o] * weights.of_output + at]);
    }
}

// y[o] = bias[o] + sum over the terms that the output's colour sees. reflected: from an output of the convolution to its inputs.
template <class S>
void convolve(const Tensor& x, const Tensor& weight, const S* bias, const Mask& mask, Grid grid, bool reflected, Tensor& y) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int64_t inputs = x.size(1), outputs = y.size(1), size = weight.size(2) * weight.size(3), row = weight.size(1) * size;
  const Weights<S> weights{static_cast<const S*>(weight.data_ptr()), reflected ? row : size, reflected ? size : row};
  if (outputs / mask.colors >= kCount && kCount > 1) grid.apart = std::max<int64_t>(1, inputs);
  const std::vector<S> data = planes<S>(x, grid, reflected);
  Job<S> job{grid,
             x.size(0),
             inputs,
             outputs,
             data.data() + grid.first(reflected),
             bias,
             static_cast<S*>(y.data_ptr()),
             vectors(grid, kCount)};
  job.parts = parts_of<S>(grid.width);
  for (int vectors = 1; vectors <= 2; vectors++)
    for (int64_t i = 0; i < kChain; i++) job.steps[vectors - 1].push_back(i * vectors * kCount);
  std::vector<Terms> terms(static_cast<size_t>(mask.colors));
  for (int64_t color = 0; color < mask.colors; color++) {
    const int64_t begin = static_cast<int64_t>(job.order.size());
    for (int64_t o = 0; o < outputs; o++)
      if (mask.color(o, outputs) == color) job.order.push_back(o);
    terms[color] = terms_of(color, mask, grid, inputs, weights.of_input, reflected);
    add_blocks(job, terms[color], weights, begin);
  }
  const int64_t wide = static_cast<int64_t>(job.wide.size()), narrow = static_cast<int64_t>(job.narrow.size());
  const int64_t line = std::max<int64_t>(1, grid.width * inputs * (grid.taps() + 1));
  const auto at_least = [](int64_t work) { return std::max<int64_t>(1, (int64_t{1} << 20) / work); };
  const int64_t lines = std::max<int64_t>(1, kTogether / std::max<int64_t>(1, grid.width)),
                groups = (grid.height + lines - 1) / lines;
  torch::stable::parallel_for(0, job.samples * wide * groups, at_least(line * lines * 2 * kCount), [&](int64_t begin, int64_t end) {
    std::vector<V> total(static_cast<size_t>(lines * grid.width * 2));
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t part = unit / groups, first = unit % groups * lines;
      run_lines(job, job.wide[part % wide], part / wide, first, std::min(lines, grid.height - first),
                reinterpret_cast<S*>(total.data()));
    }
  });
  const int64_t together = at_least(line * grid.height * kMostRows<S>);
  torch::stable::parallel_for(0, job.samples * narrow, together, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) run_any(job, job.narrow[unit % narrow], unit / narrow);
  });
}

// The gradient to weight, zero under the mask: products of the gradients of a pixel, lanes over outputs, and what its taps see.
// With the channels of a pixel side by side, the taps of one row of the kernel are so too.
template <class S>
void weight_gradient(const Tensor& x, const Tensor& grad, const Mask& mask, const Grid& grid, Tensor& out) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount, kBlock = 2 * kCount;
  const int64_t samples = x.size(0), inputs = x.size(1), outputs = grad.size(1), pixels = grid.height * grid.width;
  const int64_t size = out.size(2) * out.size(3), taps = grid.taps(), centre = mask.own || mask.colors > 1;
  const S *from = static_cast<const S*>(x.data_ptr()), *g = static_cast<const S*>(grad.data_ptr());
  S* to = static_cast<S*>(out.data_ptr());
  std::fill_n(to, out.numel(), S{});
  if (samples * pixels == 0) return;

  std::vector<S> data(static_cast<size_t>(samples * grid.plane() * inputs));  // [sample][place][channel]
  std::vector<int64_t> place(static_cast<size_t>(samples * pixels)), steps;
  for (int64_t i = 0, p = 0; i < samples; i++)
    for (int64_t row = 0; row < grid.height; row++)
      for (int64_t column = 0; column < grid.width; column++)
        place[p++] = (i * grid.plane() + grid.first(false) + row * grid.stride() + column) * inputs;
  for (int64_t i = 0; i < kChain; i++) steps.push_back(i * kBlock);
  torch::stable::parallel_for(0, samples * grid.height, 65536 / (grid.width * inputs) + 1, [&](int64_t begin, int64_t end) {
    std::vector<V> columns(static_cast<size_t>(grid.width));
    for (int64_t line = begin; line < end; line++)
      for (int64_t c = 0; c < inputs; c += kCount) {
        const int some = static_cast<int>(std::min<int64_t>(kCount, inputs - c));
        const int64_t sample = line / grid.height, row = line % grid.height;
        load_columns(from + (sample * inputs + c) * pixels + row * grid.width, pixels, some, static_cast<int>(grid.width),
                     columns.data());
        S* at = data.data() + place[line * grid.width] + c;
        for (int64_t p = 0; p < grid.width; p++) store_first(at + p * inputs, columns[p], some);
      }
  });
  const int64_t blocks = (outputs + kBlock - 1) / kBlock;
  std::vector<V> aligned(static_cast<size_t>(blocks * samples * pixels * 2));
  S* grads = reinterpret_cast<S*>(aligned.data());  // [block][pixel][output]
  torch::stable::parallel_for(0, blocks * samples, 65536 / (pixels * kBlock) + 1, [&](int64_t begin, int64_t end) {
    std::vector<V> columns(static_cast<size_t>(pixels));
    for (int64_t unit = begin; unit < end; unit++)
      for (int v = 0; v < kBlock; v += kCount) {
        const int64_t o = unit / samples * kBlock + v, some = std::min<int64_t>(kCount, outputs - o);
        if (some <= 0) continue;
        load_columns(g + (unit % samples * outputs + o) * pixels, pixels, static_cast<int>(some), static_cast<int>(pixels),
                     columns.data());
        for (int64_t p = 0; p < pixels; p++) store(grads + (unit * pixels + p) * kBlock + v, columns[p]);
      }
  });

  struct Piece {  // of the taps of one row of the kernel by channels
    int64_t row, first, columns;
  };
  constexpr int64_t kPiece = 8 * kMostColumns<S>;
  std::vector<Piece> pieces;
  for (int64_t row = 0; row <= grid.rows; row++) {
    const int64_t columns = (row < grid.rows ? 2 * grid.columns + 1 : grid.columns + centre) * inputs;
    for (int64_t first = 0; first < columns; first += kPiece) pieces.push_back({row, first, std::min(kPiece, columns - first)});
  }
  const int64_t count = static_cast<int64_t>(pieces.size());
  torch::stable::parallel_for(0, blocks * count, 1, [&](int64_t begin, int64_t end) {
    std::vector<V> totals(static_cast<size_t>(kPiece * 2));
    S* total = reinterpret_cast<S*>(totals.data());
    for (int64_t unit = begin; unit < end; unit++) {
      const Piece piece = pieces[unit % count];
      const int64_t block = unit / count;
      std::fill(totals.begin(), totals.end(), V{});
      const S* seen = data.data() + ((piece.row - grid.rows) * grid.stride() - grid.columns) * inputs + piece.first;
      const std::vector<int> parts = parts_of<S>(piece.columns);
      for (int64_t p = 0; p < samples * pixels; p += kChain) {
        int64_t column = 0;
        for (const int columns : parts) {
          add_chains<S>(2, columns, std::min<int64_t>(kChain, samples * pixels - p),
                        grads + (block * samples * pixels + p) * kBlock, steps.data(), seen + column, place.data() + p,
                        total + column * kBlock);
          column += columns;
        }
      }
      for (int64_t i = 0; i < piece.columns; i++) {
        const int64_t tap = piece.row * (2 * grid.columns + 1) + (piece.first + i) / inputs, c = (piece.first + i) % inputs;
        for (int64_t o = 0; o < std::min<int64_t>(kBlock, outputs - block * kBlock); o++)
          if (tap < taps || mask.sees(mask.color(block * kBlock + o, outputs), mask.color(c, inputs)))
            to[((block * kBlock + o) * inputs + c) * size + tap] = total[i * kBlock + o];
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
  if (out[1].numel()) weight_gradient<S>(x, grad, mask, grid, out[1]);
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
