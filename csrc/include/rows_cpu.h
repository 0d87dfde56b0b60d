// The CPU driver of rows.h: tiles of 64 vectors, noise for a tile in L1, lanes over a tile, sums per tile in double.
// How work is cut does not depend on the number of threads, so results do not either.
#pragma once
#include <algorithm>
#include <type_traits>

#include "lanes.h"

namespace gk {

// ---- storage <-> arithmetic type

inline void half_to_float(const uint16_t* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
  for (; i < n; i++) {
    _Float16 x;
    memcpy(&x, from + i, 2);
    to[i] = static_cast<float>(x);
  }
}
inline void float_to_half(const float* from, uint16_t* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; i++) {
    const _Float16 x = static_cast<_Float16>(from[i]);
    memcpy(to + i, &x, 2);
  }
}

template <class S>
inline constexpr Storage kStorage = sizeof(S) == 4 ? Storage::kFloat : Storage::kDouble;
template <class S>
inline constexpr S kZeros[kTile] = {};  // what an absent array reads as

// Elements [0, n) of a row from column `column` on, as S: in place where the storage is S, else converted into buffer. What is long
// and not a functor stays out of line, so that it is compiled once.
inline const double* read(const Array& a, int64_t row, int64_t column, int64_t, double*) {
  if (!a.data) return kZeros<double>;
  return static_cast<const double*>(a.data) + row * a.row_stride + column;
}
__attribute__((noinline)) inline const float* widen(const Array& a, int64_t at, int64_t n, float* buffer) {
  if (a.storage == Storage::kHalf) {
    half_to_float(static_cast<const uint16_t*>(a.data) + at, buffer, n);
  } else if (a.storage == Storage::kBFloat16) {
    const uint16_t* p = static_cast<const uint16_t*>(a.data) + at;
    for (int64_t i = 0; i < n; i++) buffer[i] = bfloat16_to_float(p[i]);
  } else {
    const uint8_t* p = static_cast<const uint8_t*>(a.data) + at;
    for (int64_t i = 0; i < n; i++) buffer[i] = p[i];
  }
  return buffer;
}
inline const float* read(const Array& a, int64_t row, int64_t column, int64_t n, float* buffer) {
  const int64_t at = row * a.row_stride + column;
  if (!a.data) return kZeros<float>;
  return a.storage == Storage::kFloat ? static_cast<const float*>(a.data) + at : widen(a, at, n, buffer);
}
// Where results of S for those elements go: straight to memory, or to a buffer that write() converts.
template <class S>
S* place(const Array& a, int64_t row, int64_t column, S* buffer) {
  return a.data && a.storage == kStorage<S> ? static_cast<S*>(a.data) + row * a.row_stride + column : buffer;
}
template <class S>
__attribute__((noinline)) void write(const Array& a, int64_t row, int64_t column, const S* buffer, int64_t n) {
  const int64_t at = row * a.row_stride + column;
  if (!a.data) return;
  if (a.storage == Storage::kByte) {
    uint8_t* p = static_cast<uint8_t*>(a.data) + at;
    for (int64_t i = 0; i < n; i++) p[i] = static_cast<uint8_t>(buffer[i]);
  } else if constexpr (sizeof(S) == 4) {
    uint16_t* p = static_cast<uint16_t*>(a.data) + at;
    if (a.storage == Storage::kHalf) float_to_half(buffer, p, n);
    if (a.storage == Storage::kBFloat16)
      for (int64_t i = 0; i < n; i++) p[i] = float_to_bfloat16(buffer[i]);
  }
}
GK_FN void write_sum(const Array& a, int64_t row, double total) {
  if (a.storage == Storage::kDouble)
    static_cast<double*>(a.data)[row * a.row_stride] = a.onto ? static_cast<const double*>(a.onto)[row] + total : total;
  else
    static_cast<float*>(a.data)[row * a.row_stride] =
        static_cast<float>(a.onto ? static_cast<const float*>(a.onto)[row] + total : total);
}

// ---- noise: elements [first, first + count) of a stream in `buffer`, which has room for whole groups around them

template <class S>
struct Vector;
template <>
struct Vector<float> {
  using type = lane_f32;
};
template <>
struct Vector<double> {
  using type = double;
};

constexpr int64_t kAhead = 512;  // elements: the processor's own prefetch stops at the end of every page of memory
constexpr int64_t kNoiseRoom = kTile + 8 * kLanes;

template <class N>
__attribute__((noinline)) const float* fill_noise(const N& distribution, float* buffer, Key key, uint64_t first, int64_t count) {
  const int64_t skip = static_cast<int64_t>(first % 4);
  lane_u32 words[4];
  lane_f32 values[4];
  for (int64_t at = 0; at < skip + count; at += 4 * kLanes) {  // two short loops overlap better than one with a long chain
    philox_words(key, (first - skip + at) / 4, words);
    for (int j = 0; j < 4; j++) store(buffer + at + j * kLanes, bitcast<lane_f32>(words[j]));
  }
  for (int64_t at = 0; at < skip + count; at += 4 * kLanes) {
    for (int j = 0; j < 4; j++) words[j] = bitcast<lane_u32>(load<lane_f32>(buffer + at + j * kLanes));
    distribution(words, values);
    store_interleaved(buffer + at, values);
  }
  return buffer + skip;
}
template <class N>
__attribute__((noinline)) const double* fill_noise(const N& distribution, double* buffer, Key key, uint64_t first, int64_t count) {
  const int64_t skip = static_cast<int64_t>(first % 2);
  for (int64_t done = -skip; done < count; done += 2) {
    uint32_t words[4];
    philox_words(key, (first + done) / 2, words);
    distribution(words, buffer + skip + done);
  }
  return buffer + skip;
}

// ---- one segment of one row

// A functor with a sum may keep a chain of terms in kGathered numbers of its own, the first a sum: gather(in, row, chain) adds one
// term, at most 64 to a lane; join(chain, other) adds a chain to another; gathered(chain) is the sum.
template <class F, class = void>
constexpr int kChainNumbers = F::kSums;
template <class F>
constexpr int kChainNumbers<F, std::void_t<decltype(F::kGathered)>> = F::kGathered;
template <class F>
constexpr bool gathers = kChainNumbers<F> != F::kSums;

// Which inputs and outputs a functor ever has (bits); one that serves fewer than its arrays says so as kReads and kWrites.
template <class F, class = void>
struct Present {
  static constexpr unsigned kReads = ~0u, kWrites = ~0u;
};
template <class F>
struct Present<F, std::void_t<decltype(F::kReads), decltype(F::kWrites)>> {
  static constexpr unsigned kReads = F::kReads, kWrites = F::kWrites;
};
template <class F>
constexpr bool reads(int k) {
  return Present<F>::kReads >> k & 1;
}
template <class F>
constexpr bool writes(int k) {
  return Present<F>::kWrites >> k & 1;
}

template <class F, class V>
GK_FN void read_row(const RowJob<F>& job, int64_t row, V* row_in) {
  for (int k = 0; k < F::kRowInputs; k++) {
    Scalar<V> one;
    row_in[k] = splat<V>(*read(job.row_in[k], looked_up(job.row_in[k], row), 0, 1, &one));
  }
}

template <class F, class S, class V>
GK_FN void run_segment(const RowJob<F>& job, int64_t row, int64_t column, int64_t n, const V* row_in, const S* noise,
                       S (*buffers)[kTile], double* sums) {
  constexpr int kCount = Lane<V>::kCount;
  const S* in[F::kInputs + 1];
  S* out[F::kOutputs + 1];
  V in_lane[F::kInputs + 1], out_lane[F::kOutputs + 1], term[F::kSums + 1];
  constexpr int kChains = F::kSums ? 4 : 1;  // of additions, independent: equal terms round the same way, so a long chain drifts
  V chain[kChains][kChainNumbers<F> + 1];
  for (int k = 0; k < F::kInputs; k++) in[k] = read(job.in[k], row, column, n, buffers[k]);
  for (int k = 0; k < F::kOutputs; k++) out[k] = place(job.out[k], row, column, buffers[F::kInputs + k]);
  for (auto& total : chain)
    for (int k = 0; k < kChainNumbers<F>; k++) total[k] = V{};
  const F f = job.f;  // stores cannot change a copy, so that its numbers stay in registers
  int64_t i = 0;
  const bool last = column + n == job.width;
  const auto ahead = [&](const Array& a, int64_t at) {
    return at + kAhead + (last && at + kAhead >= n ? a.row_stride - job.width : 0);
  };
  const auto whole = [&](int64_t at, V* total) {
    for (int k = 0; k < F::kInputs; k++)
      if (reads<F>(k)) in_lane[k] = load<V>(in[k] + at), __builtin_prefetch(in[k] + ahead(job.in[k], at));
    if constexpr (gathers<F>) {
      f.gather(in_lane, row_in, total);
      return;
    }
    f(in_lane, row_in, has_noise<F> ? load<V>(noise + at) : V{}, out_lane, term);
    for (int k = 0; k < F::kOutputs; k++)
      if (writes<F>(k)) store(out[k] + at, out_lane[k]), __builtin_prefetch(out[k] + ahead(job.out[k], at), 1);
    for (int k = 0; k < F::kSums; k++) total[k] = total[k] + term[k];
  };
  for (; i + kChains * kCount <= n; i += kChains * kCount)
    for (int c = 0; c < kChains; c++) whole(i + c * kCount, chain[c]);
  for (; i + kCount <= n; i += kCount) whole(i, chain[0]);
  if (i < n) {
    const int rest = static_cast<int>(n - i);
    for (int k = 0; k < F::kInputs; k++) in_lane[k] = load_first(in[k] + i, rest, V{});
    f(in_lane, row_in, has_noise<F> ? load<V>(noise + i) : V{}, out_lane, term);
    for (int k = 0; k < F::kOutputs; k++) store_first(out[k] + i, out_lane[k], rest);
    for (int k = 0; k < F::kSums; k++) chain[0][k] = chain[0][k] + keep_first(term[k], rest);
  }
  for (int k = 0; k < F::kOutputs; k++)
    if (out[k] == buffers[F::kInputs + k]) write(job.out[k], row, column, out[k], n);
  if constexpr (gathers<F>) {
    for (int c = 1; c < kChains; c++) f.join(chain[0], chain[c]);
    sums[0] = sum_lanes(f.gathered(chain[0]));
    return;
  }
  for (int k = 0; k < F::kSums; k++) {
    V total = chain[0][k];
    for (int c = 1; c < kChains; c++) total = total + chain[c][k];
    sums[k] = sum_lanes(total);
  }
}

// ---- rows of at most a vector: as many as fit side by side in its lanes, read and written where they lie

template <class S>
struct Strip {  // row r of a unit begins at data + r * stride
  S* data;
  int64_t stride;
};

template <class S>
Strip<const S> strip_to_read(const Array& a, int64_t row0, int64_t rows, int64_t width, S* buffer) {
  if (!a.data) return {kZeros<S>, width};
  if (a.storage == kStorage<S>) return {static_cast<const S*>(a.data) + row0 * a.row_stride, a.row_stride};
  if (a.row_stride == width) return {read(a, row0, 0, rows * width, buffer), width};
  for (int64_t row = 0; row < rows; row++) read(a, row0 + row, 0, width, buffer + row * width);
  return {buffer, width};
}
template <class S>
const S* row_values(const Array& a, int64_t row0, int64_t rows, S* buffer) {  // of a row input
  if (!a.data) return kZeros<S>;
  if (a.storage == kStorage<S> && a.row_stride == 1 && !a.lookup) return static_cast<const S*>(a.data) + row0;
  for (int64_t row = 0; row < rows; row++) {
    S one;
    buffer[row] = *read(a, looked_up(a, row0 + row), 0, 1, &one);
  }
  return buffer;
}
// `count` numbers, from element i on where rows touch, else whole rows from `row` on side by side.
template <class S>
GK_FN typename Vector<S>::type load_rows(Strip<const S> from, int64_t row, int64_t i, int width, int count, bool dense) {
  if (dense || from.stride == width) return load_first(from.data + i, count, typename Vector<S>::type{});
  const S* p = from.data + row * from.stride;
  __builtin_prefetch(p + kAhead);
  typename Vector<S>::type x = load_first(p, width, typename Vector<S>::type{});
  for (int lane = width; lane < count; lane += width) x = load_lanes(x, p += from.stride - width, lane, width);
  return x;
}
template <class S>
GK_FN void store_rows(Strip<S> to, int64_t row, int64_t i, typename Vector<S>::type x, int width, int count, bool dense) {
  if (dense || to.stride == width) return store_first(to.data + i, x, count);
  S* p = to.data + row * to.stride;
  __builtin_prefetch(p + kAhead, 1);
  store_first(p, x, width);
  for (int lane = width; lane < count; lane += width) store_lanes(p += to.stride - width, x, lane, width);
}

template <class F, class S>
void run_narrow(const RowJob<F>& job, int64_t row0, int64_t rows, const S* noise, S (*buffers)[kTile]) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int width = static_cast<int>(job.width), most = kCount / width;
  S* buffer = *buffers;  // a tile for each array that is not read or written in place, and for each sum
  const auto next = [&] { return (buffer += kTile) - kTile; };
  Strip<const S> in[F::kInputs + 1];
  Strip<S> out[F::kOutputs + 1];
  const S* row_in[F::kRowInputs + 1];
  S* terms[F::kSums + 1];
  V in_lane[F::kInputs + 1], row_lane[F::kRowInputs + 1], out_lane[F::kOutputs + 1], term[F::kSums + 1];
  for (int k = 0; k < F::kInputs; k++) in[k] = strip_to_read(job.in[k], row0, rows, width, next());
  for (int k = 0; k < F::kRowInputs; k++) row_in[k] = row_values(job.row_in[k], row0, rows, next());
  for (int k = 0; k < F::kOutputs; k++) {
    S *own = next(), *place_of_row = place(job.out[k], row0, 0, own);
    out[k] = {place_of_row, place_of_row == own ? width : job.out[k].row_stride};
  }
  for (int k = 0; k < F::kSums; k++) terms[k] = next();
  bool dense = true;  // all rows touch: a vector need not end with a row
  for (int k = 0; k < F::kInputs; k++) dense &= in[k].stride == width;
  for (int k = 0; k < F::kOutputs; k++) dense &= out[k].stride == width;
  const int step = dense ? kCount : most * width;
  int64_t row = 0;
  int column = 0;  // where the first lane is
  for (int64_t i = 0; i < rows * width; i += step) {
    const int count = static_cast<int>(std::min<int64_t>(step, rows * width - i));
#pragma GCC unroll 8
    for (int k = 0; k < F::kInputs; k++) in_lane[k] = load_rows(in[k], row, i, width, count, dense);
    const auto row_of_lane = to_int((to_float<V>(lane_indices() + column) + 0.5f) * (1.0f / width));  // after `row`
    const int next_rows = static_cast<int>(std::min<int64_t>(kCount, rows - row));
#pragma GCC unroll 8
    for (int k = 0; k < F::kRowInputs; k++) row_lane[k] = pick(load_first(row_in[k] + row, next_rows, V{}), row_of_lane);
    job.f(in_lane, row_lane, has_noise<F> ? load<V>(noise + i) : V{}, out_lane, term);
#pragma GCC unroll 8
    for (int k = 0; k < F::kOutputs; k++) store_rows(out[k], row, i, out_lane[k], width, count, dense);
#pragma GCC unroll 8
    for (int k = 0; k < F::kSums; k++) store_first(terms[k] + i, term[k], count);
    row += most, column += step - most * width;
    if (column >= width) row++, column -= width;
  }
  for (int k = 0; k < F::kOutputs; k++) {
    const Array& to = job.out[k];
    if (!to.data || to.storage == kStorage<S>) continue;
    const bool dense = to.row_stride == width;
    for (int64_t row = 0; row < (dense ? 1 : rows); row++)
      write(to, row0 + row, 0, out[k].data + row * width, dense ? rows * width : width);
  }
  for (int k = 0; k < F::kSums; k++) {
    const Array to = job.sum[k];  // a copy that no store can change
    for (int64_t row = 0; row < rows; row++) write_sum(to, row0 + row, sum_lanes(load_first(terms[k] + row * width, width, V{})));
  }
}

// ---- driver: a unit of work is one tile of a row, or as many whole rows as fit in a tile

template <class S, class F>
void drive_rows(const RowJob<F>& job, const Tensor&) {
  using V = typename Vector<S>::type;
  constexpr int kSums = F::kSums, kCount = Lane<V>::kCount;
  constexpr int64_t tile = 64 * kCount;  // a lane adds 64 terms, then the total continues in double
  static_assert(tile <= kTile, "buffers hold a tile");
  const int64_t tiles = std::max<int64_t>(1, (job.width + tile - 1) / tile);  // per row
  const int64_t rows_per_unit = std::max<int64_t>(1, tile / std::max<int64_t>(1, job.width));
  const int64_t units = tiles > 1 ? job.rows * tiles : (job.rows + rows_per_unit - 1) / rows_per_unit;
  const bool narrow = job.width <= kCount && job.width > 0 && job.rows > 1 && job.keys.stride == 0;
  std::vector<double> partial(kSums && tiles > 1 ? static_cast<size_t>(units * kSums) : 0);
  torch::stable::parallel_for(0, units, 16 * kTile / tile, [&](int64_t begin, int64_t end) {
    alignas(64) S buffers[F::kInputs + F::kRowInputs + F::kOutputs + F::kSums + 1][kTile];
    alignas(64) S noise_buffer[has_noise<F> ? kNoiseRoom : 1];
    double sums[kSums + 1];
    V row_in[F::kRowInputs + 1];
    int64_t read_last = -1;  // the row of row_in
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t row0 = tiles > 1 ? unit / tiles : unit * rows_per_unit;
      const int64_t column = tiles > 1 ? unit % tiles * tile : 0;
      const int64_t rows = tiles > 1 ? 1 : std::min(rows_per_unit, job.rows - row0);
      const int64_t n = std::min(tile, job.width - column);
      const S* noise = noise_buffer;
      if constexpr (has_noise<F>)
        if (job.keys.stride == 0)
          noise = fill_noise(job.f.noise, noise_buffer, job.keys.of(0), static_cast<uint64_t>(row0 * job.width + column), rows * n);
      if constexpr (kCount > 1)
        if (narrow) {
          run_narrow<F, S>(job, row0, rows, noise, buffers);
          continue;
        }
      for (int64_t row = row0; row < row0 + rows; row++) {
        const S* row_noise = noise;
        if constexpr (has_noise<F>) {
          if (job.keys.stride == 0)
            row_noise = noise + (row - row0) * job.width;
          else
            row_noise = fill_noise(job.f.noise, noise_buffer, job.keys.of(row), static_cast<uint64_t>(column), n);
        }
        if (row != read_last) read_row(job, read_last = row, row_in);
        run_segment<F, S>(job, row, column, n, row_in, row_noise, buffers, sums);
        for (int k = 0; k < kSums; k++) {
          if (tiles > 1)
            partial[unit * kSums + k] = sums[k];
          else
            write_sum(job.sum[k], row, sums[k]);
        }
      }
    }
  });
  if (kSums == 0 || tiles == 1) return;
  for (int64_t row = 0; row < job.rows; row++)
    for (int k = 0; k < kSums; k++) {
      double total = 0;
      for (int64_t t = 0; t < tiles; t++) total += partial[(row * tiles + t) * kSums + k];
      write_sum(job.sum[k], row, total);
    }
}

}  // namespace gk
