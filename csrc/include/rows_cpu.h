// The CPU driver of rows.h: tiles of 64 vectors, noise for a tile in L1, lanes over a tile, sums per tile in double.
// How work is cut does not depend on the number of threads, so results do not either.
#pragma once
#include <algorithm>

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
  const bool direct = a.data && a.storage == (sizeof(S) == 4 ? Storage::kFloat : Storage::kDouble);
  return direct ? static_cast<S*>(a.data) + row * a.row_stride + column : buffer;
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
inline void write_sum(const Array& a, int64_t row, double total) {
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
  V chain[kChains][F::kSums + 1];
  for (int k = 0; k < F::kInputs; k++) in[k] = read(job.in[k], row, column, n, buffers[k]);
  for (int k = 0; k < F::kOutputs; k++) out[k] = place(job.out[k], row, column, buffers[F::kInputs + k]);
  for (auto& total : chain)
    for (int k = 0; k < F::kSums; k++) total[k] = V{};
  const F f = job.f;  // stores cannot change a copy, so that its numbers stay in registers
  int64_t i = 0;
  const auto whole = [&](int64_t at, V* total) {
    for (int k = 0; k < F::kInputs; k++)
      if (reads<F>(k)) in_lane[k] = load<V>(in[k] + at), __builtin_prefetch(in[k] + at + kAhead);
    f(in_lane, row_in, has_noise<F> ? load<V>(noise + at) : V{}, out_lane, term);
    for (int k = 0; k < F::kOutputs; k++)
      if (writes<F>(k)) store(out[k] + at, out_lane[k]), __builtin_prefetch(out[k] + at + kAhead, 1);
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
  for (int k = 0; k < F::kSums; k++) {
    V total = chain[0][k];
    for (int c = 1; c < kChains; c++) total = total + chain[c][k];
    sums[k] = sum_lanes(total);
  }
}

// ---- rows narrower than a vector: as many as fit in a tile side by side, so that no lane runs empty

template <class S>
GK_FN void copy_narrow(const S* from, S* to, int n) {  // n numbers, fewer than lanes
  store_first(to, load_first(from, n, typename Vector<S>::type{}), n);
}
template <class S>
__attribute__((noinline)) const S* pack(const Array& a, int64_t row0, int64_t rows, int64_t width, S* buffer) {
  if (a.row_stride == width) return read(a, row0, 0, rows * width, buffer);
  const S* from = read(a, row0, 0, width, buffer);
  for (int64_t row = 0; row < rows; row++) {
    S* to = buffer + row * width;
    if (from != buffer)
      copy_narrow(from + row * a.row_stride, to, static_cast<int>(width));
    else if (row)
      read(a, row0 + row, 0, width, to);
  }
  return buffer;
}
template <class S>
__attribute__((noinline)) void unpack(const Array& a, int64_t row0, int64_t rows, int64_t width, S* buffer) {
  for (int64_t row = 0; row < rows; row++) {
    S* from = buffer + row * width;
    S* to = place(a, row0 + row, 0, from);
    if (to == from)
      write(a, row0 + row, 0, from, width);
    else
      copy_narrow(from, to, static_cast<int>(width));
  }
}

template <class F, class S>
void run_packed(const RowJob<F>& job, int64_t row0, int64_t rows, const S* noise, S (*buffers)[kTile]) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int64_t width = job.width, n = rows * width;
  const S* in[F::kInputs + F::kRowInputs + 1];
  S* out = buffers[F::kInputs + F::kRowInputs];  // outputs and terms: one tile each from here on
  V in_lane[F::kInputs + F::kRowInputs + 1], out_lane[F::kOutputs + 1], term[F::kSums + 1];
  for (int k = 0; k < F::kInputs; k++) in[k] = pack(job.in[k], row0, rows, width, buffers[k]);
  for (int k = 0; k < F::kRowInputs; k++) {
    S* to = buffers[F::kInputs + k];
    in[F::kInputs + k] = job.row_in[k].data ? to : kZeros<S>;
    if (!job.row_in[k].data) continue;
    for (int64_t row = 0; row < rows; row++) {
      S one;
      const S value = *read(job.row_in[k], looked_up(job.row_in[k], row0 + row), 0, 1, &one);
      for (int64_t j = 0; j < width; j++) to[row * width + j] = value;
    }
  }
  for (int64_t i = 0; i < n; i += kCount) {  // the last lanes may lie beyond n, where every buffer still has room
    const int count = static_cast<int>(std::min<int64_t>(kCount, n - i));
    for (int k = 0; k < F::kInputs + F::kRowInputs; k++) in_lane[k] = load_first(in[k] + i, count, V{});
    job.f(in_lane, in_lane + F::kInputs, has_noise<F> ? load<V>(noise + i) : V{}, out_lane, term);
    for (int k = 0; k < F::kOutputs; k++) store(out + k * kTile + i, out_lane[k]);
    for (int k = 0; k < F::kSums; k++) store(out + (F::kOutputs + k) * kTile + i, term[k]);
  }
  for (int k = 0; k < F::kOutputs; k++) unpack(job.out[k], row0, rows, width, out + k * kTile);
  for (int k = 0; k < F::kSums; k++)
    for (int64_t row = 0; row < rows; row++)
      write_sum(job.sum[k], row0 + row,
                sum_lanes(load_first(out + (F::kOutputs + k) * kTile + row * width, static_cast<int>(width), V{})));
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
  const bool packed = job.width < kCount && job.rows > 1 && job.keys.stride == 0;
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
        if (packed) {
          run_packed<F, S>(job, row0, rows, noise, buffers);
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
