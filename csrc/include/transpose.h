// Rows of floats as columns of lanes and back: kLanes rows side by side, so that lane e of to[j] is number j of row e.
// A block of kLanes rows by kColumns columns lies in kColumns vectors; halving or doubling the distance of neighbours in all of
// them, log2(kColumns) times, is the transposition.
#pragma once
#include <algorithm>
#include <utility>

#include "lanes.h"

namespace gk {

constexpr int kColumns = kLanes < 8 ? kLanes : 8;
constexpr int kRowsTogether = kLanes / kColumns;  // rows in one vector
static_assert(kRowsTogether <= 2, "a vector holds one row of a block or two");

template <size_t... i>
GK_FN lane_f32 even_lanes(lane_f32 a, lane_f32 b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (2 * i)...);
}
template <size_t... i>
GK_FN lane_f32 odd_lanes(lane_f32 a, lane_f32 b, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, b, (2 * i + 1)...);
}
template <size_t first, size_t... i>
GK_FN lane_f32 alternate(lane_f32 a, lane_f32 b, std::index_sequence<i...>) {  // a[first], b[first], a[first + 1], ...
  return __builtin_shufflevector(a, b, (first + i / 2 + i % 2 * kLanes)...);
}
template <size_t... i>
GK_FN lane_f32 join_rows(lane_f32 a, lane_f32 b, std::index_sequence<i...>) {  // the first kColumns lanes of both
  return __builtin_shufflevector(a, b, (i % kColumns + i / kColumns * kLanes)...);
}
template <size_t... i>
GK_FN lane_f32 second_row(lane_f32 a, std::index_sequence<i...>) {
  return __builtin_shufflevector(a, a, ((i + kColumns) % kLanes)...);
}

// Row e, of `rows` (the last one stands for those beyond), is from[e * stride + (0 ... n - 1)].
GK_FN void load_columns(const float* from, int64_t stride, int rows, int n, lane_f32* to) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  for (int column = 0; column < n; column += kColumns) {
    const int some = std::min(kColumns, n - column);
    lane_f32 row[kLanes], x[kColumns], y[kColumns];
    const float* p = from + column;
    for (int e = 0; e < kLanes; e++) {
      row[e] = load_first(p, some, lane_f32{});
      p += e + 1 < rows ? stride : 0;
    }
    for (int i = 0; i < kColumns; i++) x[i] = kRowsTogether == 2 ? join_rows(row[2 * i], row[2 * i + 1], lanes) : row[i];
    for (int step = 1; step < kColumns; step *= 2) {
      for (int i = 0; i < kColumns / 2; i++) {
        y[i] = even_lanes(x[2 * i], x[2 * i + 1], lanes);
        y[i + kColumns / 2] = odd_lanes(x[2 * i], x[2 * i + 1], lanes);
      }
      for (int i = 0; i < kColumns; i++) x[i] = y[i];
    }
    for (int i = 0; i < kColumns; i++)  // not `i < some`: that becomes a call of memcpy
      if (i < some) to[column + i] = x[i];
  }
}
GK_FN void store_columns(float* to, int64_t stride, int rows, int n, const lane_f32* from) {
  constexpr auto lanes = std::make_index_sequence<kLanes>();
  for (int column = 0; column < n; column += kColumns) {
    const int some = std::min(kColumns, n - column);
    lane_f32 x[kColumns], y[kColumns];
    for (int i = 0; i < kColumns; i++) x[i] = from[column + std::min(i, some - 1)];
    for (int step = 1; step < kColumns; step *= 2) {
      for (int i = 0; i < kColumns / 2; i++) {
        y[2 * i] = alternate<0>(x[i], x[i + kColumns / 2], lanes);
        y[2 * i + 1] = alternate<kLanes / 2>(x[i], x[i + kColumns / 2], lanes);
      }
      for (int i = 0; i < kColumns; i++) x[i] = y[i];
    }
    for (int i = 0; i < kColumns; i++) {
      const int e = kRowsTogether * i;
      if (e < rows) store_first(to + e * stride + column, x[i], some);
      if (kRowsTogether == 2 && e + 1 < rows) store_first(to + (e + 1) * stride + column, second_row(x[i], lanes), some);
    }
  }
}
GK_FN void load_columns(const double* from, int64_t, int, int n, double* to) { std::copy_n(from, n, to); }
GK_FN void store_columns(double* to, int64_t, int, int n, const double* from) { std::copy_n(from, n, to); }

}  // namespace gk
