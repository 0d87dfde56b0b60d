// Products of packed weights (outputs, depth) with a few columns (depth, columns), the arithmetic of dense causal convolutions, and
// their gate. An output is the bias, then the sums over kChain numbers of the depth each, every one a chain of fused multiply-adds.
// Two kernels form the same sums: one with lanes over columns, for whole tiles of them, and one with lanes over outputs, for steps.
// So an output has the same bits however columns are put together.
#pragma once
#include <new>

#include "gate.h"
#include "rows.h"
#include "silu.h"

namespace gk {

constexpr int kChain = 32;  // short chains round less
constexpr int kBlock = 16;  // outputs that lie side by side in packed weights: [block][depth][output]

template <class V>
GK_FN V in_register(V v) {  // where several instructions use it, each of which would load it again
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

template <class S>
struct Tile {
  using V = typename Vector<S>::type;
  static constexpr int kCount = Lane<V>::kCount, kParts = kBlock / kCount;  // vectors of a block
  static constexpr bool kWide = kCount == 16;                               // 32 registers
  static constexpr int kRows = kWide ? 8 : 4, kVectors = 3;                 // outputs by vectors of columns
  static constexpr int kColumns = kVectors * kCount;
  static constexpr int kSteps = kCount == 1 ? 1 : kWide ? 6 : 3;  // columns by four vectors of outputs
};

template <class S>
struct FromLine {  // memory that begins with a cache line: a vector that lies in two lines takes two loads
  using value_type = S;
  S* allocate(size_t count) { return static_cast<S*>(::operator new(count * sizeof(S), std::align_val_t(64))); }
  void deallocate(S* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  template <class T>
  void construct(T* p) {  // not set to zero
    ::new (static_cast<void*>(p)) T;
  }
  template <class T>
  void construct(T* p, const T& value) {
    ::new (static_cast<void*>(p)) T(value);
  }
  bool operator==(const FromLine&) const { return true; }
  bool operator!=(const FromLine&) const { return false; }
};
template <class S>
using Buffer = std::vector<S, FromLine<S>>;

template <class S>
struct Weights {  // of one group
  int64_t outputs, depth;
  const S *packed, *bias;
  int64_t blocks() const { return (outputs + kBlock - 1) / kBlock; }
  int64_t block_size() const { return depth * kBlock; }
  const S* at(int64_t output) const { return packed + output / kBlock * block_size() + output % kBlock; }
};

enum class Activation { kNone, kSilu, kGate };

// What becomes of outputs (row, column) of a tile, and where: y[row * stride + column].
template <class S>
struct Finish {
  S* y;
  int64_t stride, rows;
  Activation activation;         // kGate: row and row + half of the outputs make row of y
  const S* condition = nullptr;  // of output (row, column), added before the gate: condition[row * along[0] + column * along[1]],
  int64_t along[2] = {};         // the second 0 or 1
  bool gated() const { return activation == Activation::kGate; }
  void fetch(int64_t row, int64_t column) const {  // into the second cache, while the products are formed
    if (row < rows) __builtin_prefetch(y + row * stride + column, 1, 2);
    if (condition) __builtin_prefetch(condition + row * along[0] + column * along[1], 0, 2);
  }
  Finish from_column(int64_t column) const {
    Finish moved = *this;
    moved.y += column;
    if (condition) moved.condition += column * along[1];
    return moved;
  }
  template <class V>
  GK_FN V conditioned(V a, int64_t row, int64_t column) const {
    if (!condition) return a;
    const S* c = condition + row * along[0] + column * along[1];
    return a + (along[1] ? load<V>(c) : *c - V{});
  }
};

// Lanes over columns: kRows outputs, half of them from `first` and half from `second` on; x (depth, kColumns of the tile).
template <class S, int kVectors>
void rows_of_columns(const Weights<S>& weights, int64_t first, int64_t second, const S* x, const Finish<S>& finish) {
  using V = typename Tile<S>::V;
  constexpr int kRows = Tile<S>::kRows, kHalf = kRows / 2, kCount = Tile<S>::kCount, kWidth = Tile<S>::kColumns;
  const auto row = [&](int o) { return o < kHalf ? first + o : second + o - kHalf; };
  for (int o = 0; o < kRows; o++)
    for (int j = 0; j < kVectors; j++) finish.fetch(row(o), j * kCount);
  V total[kRows][kVectors];
  for (int o = 0; o < kRows; o++)
    for (int j = 0; j < kVectors; j++) total[o][j] = (weights.bias && row(o) < weights.outputs ? weights.bias[row(o)] : S{}) - V{};
  const S *w = weights.at(first), *v = weights.at(second);
  for (int64_t d = 0; d < weights.depth;) {
    V sum[kRows][kVectors] = {};
    for (const int64_t end = std::min(d + kChain, weights.depth); d < end; d++, x += kWidth, w += kBlock, v += kBlock) {
      V value[kVectors];
      for (int j = 0; j < kVectors; j++) value[j] = load<V>(x + j * kCount);
      for (int o = 0; o < kRows; o++) {
        const V one = (o < kHalf ? w[o] : v[o - kHalf]) - V{};
        for (int j = 0; j < kVectors; j++) sum[o][j] = fma(one, value[j], sum[o][j]);
      }
    }
    for (int o = 0; o < kRows; o++)
      for (int j = 0; j < kVectors; j++) total[o][j] = total[o][j] + sum[o][j];
  }
  if (finish.gated()) {
    for (int o = 0; o < kHalf; o++)
      for (int j = 0; j < kVectors; j++) {
        const V a = finish.conditioned(total[o][j], first + o, j * kCount);
        const V b = finish.conditioned(total[o + kHalf][j], second + o, j * kCount);
        store(finish.y + (first + o) * finish.stride + j * kCount, gate(a, b));
      }
    return;
  }
  for (int o = 0; o < kRows && row(o) < weights.outputs; o++)
    for (int j = 0; j < kVectors; j++)
      store(finish.y + row(o) * finish.stride + j * kCount,
            finish.activation == Activation::kSilu ? silu(total[o][j]) : total[o][j]);
}

// All outputs of `count` columns, rounded up to vectors; x (depth, kColumns of the tile). The half of
// gated outputs must be a multiple of kHalf.
template <class S>
void product_of_tile(const Weights<S>& weights, const S* x, int64_t count, const Finish<S>& finish) {
  constexpr int kCount = Tile<S>::kCount, kHalf = Tile<S>::kRows / 2;
  const int64_t rows = finish.gated() ? weights.outputs / 2 : weights.outputs, apart = finish.gated() ? rows : kHalf;
  for (int64_t first = 0; first < rows; first += finish.gated() ? kHalf : 2 * kHalf)
    if (count > 2 * kCount)
      rows_of_columns<S, 3>(weights, first, first + apart, x, finish);
    else if (count > kCount)
      rows_of_columns<S, 2>(weights, first, first + apart, x, finish);
    else
      rows_of_columns<S, 1>(weights, first, first + apart, x, finish);
}

// Lanes over outputs: kVectors of them from block `block` on, x (depth, kSteps), y (kSteps, blocks kBlock).
template <class S, int kVectors, int kSteps>
void columns_of_outputs(const Weights<S>& weights, int64_t block, const S* x, S* y) {
  using V = typename Tile<S>::V;
  constexpr int kCount = Tile<S>::kCount, kParts = Tile<S>::kParts;
  V total[kSteps][kVectors];
  for (int v = 0; v < kVectors; v++) {
    const int64_t first = block * kBlock + v * kCount;
    const int here = static_cast<int>(std::max<int64_t>(0, std::min<int64_t>(kCount, weights.outputs - first)));
    const V start = weights.bias ? load_first(weights.bias + (here ? first : 0), here, V{}) : V{};
    for (int j = 0; j < kSteps; j++) total[j][v] = start;
  }
  const S* w = weights.packed + block * weights.block_size();
  for (int64_t d = 0; d < weights.depth;) {
    V sum[kSteps][kVectors] = {};
    for (const int64_t end = std::min(d + kChain, weights.depth); d < end; d++, x += kSteps, w += kBlock) {
      V one[kVectors];
      for (int v = 0; v < kVectors; v++) one[v] = load<V>(w + v / kParts * weights.block_size() + v % kParts * kCount);
      for (int j = 0; j < kSteps; j++) {
        const V value = x[j] - V{};
        for (int v = 0; v < kVectors; v++) sum[j][v] = fma(one[v], value, sum[j][v]);
      }
    }
    for (int j = 0; j < kSteps; j++)
      for (int v = 0; v < kVectors; v++) total[j][v] = total[j][v] + sum[j][v];
  }
  for (int j = 0; j < kSteps; j++)
    for (int v = 0; v < kVectors; v++) store(y + (j * weights.blocks() + block) * kBlock + v * kCount, total[j][v]);
}

template <class S, int kSteps>
void all_outputs(const Weights<S>& weights, const S* x, S* y) {
  constexpr int kParts = Tile<S>::kParts, kMany = kSteps == 1 ? 8 : 4;
  int64_t block = 0;
  if constexpr (kMany > kParts)
    for (; block + kMany / kParts <= weights.blocks(); block += kMany / kParts)
      columns_of_outputs<S, kMany, kSteps>(weights, block, x, y);
  if constexpr (4 > kParts && kMany > 4)
    for (; block + 4 / kParts <= weights.blocks(); block += 4 / kParts) columns_of_outputs<S, 4, kSteps>(weights, block, x, y);
  for (; block < weights.blocks(); block++) columns_of_outputs<S, kParts, kSteps>(weights, block, x, y);
}

// y (count, blocks kBlock) from x (depth, count), count at most kSteps.
template <class S, int kMost = Tile<S>::kSteps>
void product_of_steps(const Weights<S>& weights, const S* x, int64_t count, S* y) {
  if (count == kMost) return all_outputs<S, kMost>(weights, x, y);
  if constexpr (kMost > 1) product_of_steps<S, kMost - 1>(weights, x, count, y);
}

// a becomes tanh(a + c) sigmoid(b + d); c, d: null without a condition. Whole vectors are read, and written over what follows a.
template <class S>
void gate_line(S* a, const S* b, const S* c, const S* d, int64_t count) {
  using V = typename Tile<S>::V;
  for (int64_t i = 0; i < count; i += Lane<V>::kCount) {
    V first = load<V>(a + i), second = load<V>(b + i);
    if (c) first = first + load<V>(c + i), second = second + load<V>(d + i);
    store(a + i, gate(first, second));
  }
}

template <class S>
void silu_line(S* a, int64_t count) {
  using V = typename Tile<S>::V;
  for (int64_t i = 0; i < count; i += Lane<V>::kCount) store(a + i, silu(load<V>(a + i)));
}

}  // namespace gk
