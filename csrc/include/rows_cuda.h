// The CUDA driver of rows.h: a thread takes four neighbouring elements of a row, a block of 256 threads one tile of 1024 or as many
// short rows as fit. Sums: float within a thread, then a tree in double; tiles of one row meet in a second kernel. No atomics.
#pragma once
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include "lanes.h"

namespace gk {

constexpr int kThreads = 256;

// ---- four elements

#ifdef __CUDACC__
__device__ __forceinline__ float half_to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
#else
inline float half_to_float(uint16_t x) { return static_cast<float>(bitcast<_Float16>(x)); }
inline uint16_t float_to_half(float x) { return bitcast<uint16_t>(static_cast<_Float16>(x)); }
#endif

__device__ __forceinline__ bool aligned(const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

__device__ __forceinline__ float read_one(const Array& a, int64_t at, float) {
  switch (a.storage) {
    case Storage::kFloat:
      return static_cast<const float*>(a.data)[at];
    case Storage::kBFloat16:
      return bfloat16_to_float(static_cast<const uint16_t*>(a.data)[at]);
    case Storage::kHalf:
      return half_to_float(static_cast<const uint16_t*>(a.data)[at]);
    default:
      return static_cast<const uint8_t*>(a.data)[at];
  }
}
__device__ __forceinline__ double read_one(const Array& a, int64_t at, double) { return static_cast<const double*>(a.data)[at]; }

__device__ __forceinline__ void write_one(const Array& a, int64_t at, float x) {
  switch (a.storage) {
    case Storage::kFloat:
      static_cast<float*>(a.data)[at] = x;
      break;
    case Storage::kBFloat16:
      static_cast<uint16_t*>(a.data)[at] = float_to_bfloat16(x);
      break;
    case Storage::kHalf:
      static_cast<uint16_t*>(a.data)[at] = float_to_half(x);
      break;
    default:
      static_cast<uint8_t*>(a.data)[at] = static_cast<uint8_t>(x);
  }
}
__device__ __forceinline__ void write_one(const Array& a, int64_t at, double x) {
  if (a.storage == Storage::kByte)
    static_cast<uint8_t*>(a.data)[at] = static_cast<uint8_t>(x);
  else
    static_cast<double*>(a.data)[at] = x;
}

template <class S>
__device__ __forceinline__ void write_sum(const Array& a, int64_t row, double total) {
  write_one(a, row * a.row_stride, static_cast<S>(a.onto ? static_cast<const S*>(a.onto)[row] + total : total));
}

template <class S>
__device__ __forceinline__ void read_four(const Array& a, int64_t at, int count, S x[4]) {
  if (!a.data) count = 0;
  if constexpr (sizeof(S) == 4) {
    const float* p = static_cast<const float*>(a.data) + at;
    if (count == 4 && a.storage == Storage::kFloat && aligned(p, 16)) {
      const float4 v = *reinterpret_cast<const float4*>(p);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
      return;
    }
    const uint16_t* h = static_cast<const uint16_t*>(a.data) + at;
    if (count == 4 && (a.storage == Storage::kBFloat16 || a.storage == Storage::kHalf) && aligned(h, 8)) {
      const uint2 v = *reinterpret_cast<const uint2*>(h);
      const uint16_t bits[4] = {static_cast<uint16_t>(v.x), static_cast<uint16_t>(v.x >> 16), static_cast<uint16_t>(v.y),
                                static_cast<uint16_t>(v.y >> 16)};
      for (int j = 0; j < 4; j++) x[j] = a.storage == Storage::kHalf ? half_to_float(bits[j]) : bfloat16_to_float(bits[j]);
      return;
    }
  }
  for (int j = 0; j < 4; j++) x[j] = j < count ? read_one(a, at + j, S{}) : S{};
}

template <class S>
__device__ __forceinline__ void write_four(const Array& a, int64_t at, int count, const S x[4]) {
  if (!a.data) return;
  if constexpr (sizeof(S) == 4) {
    float* p = static_cast<float*>(a.data) + at;
    if (count == 4 && a.storage == Storage::kFloat && aligned(p, 16)) {
      *reinterpret_cast<float4*>(p) = float4{x[0], x[1], x[2], x[3]};
      return;
    }
    uint16_t* h = static_cast<uint16_t*>(a.data) + at;
    if (count == 4 && (a.storage == Storage::kBFloat16 || a.storage == Storage::kHalf) && aligned(h, 8)) {
      uint32_t bits[4];
      for (int j = 0; j < 4; j++) bits[j] = a.storage == Storage::kHalf ? float_to_half(x[j]) : float_to_bfloat16(x[j]);
      *reinterpret_cast<uint2*>(h) = uint2{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16};
      return;
    }
  }
  for (int j = 0; j < 4; j++)
    if (j < count) write_one(a, at + j, x[j]);
}

// Elements first ... first + 3 of a stream: one counter where first is a multiple of 4, else the two around them. Selected with
// constant indices, so that the values stay in registers.
template <class S, class N>
__device__ __forceinline__ void four_of_stream(const N& distribution, Key key, uint64_t first, S x[4]) {
  constexpr int per_counter = sizeof(S) == 4 ? 4 : 2;
  const int skip = static_cast<int>(first % per_counter);
  uint32_t words[4];
  S all[4 + per_counter];
  for (int c = 0; c < 4; c += per_counter) {
    philox_words(key, (first + c) / per_counter, words);
    distribution(words, all + c);
  }
  if (skip) {
    philox_words(key, (first + 4) / per_counter, words);
    distribution(words, all + 4);
  }
  for (int j = 0; j < 4; j++) {
    x[j] = all[j];
    for (int s = 1; s < per_counter; s++) x[j] = skip == s ? all[j + s] : x[j];
  }
}

// ---- kernels

template <class S, class F>
__global__ void __launch_bounds__(kThreads, 1)  // one block is enough: no spills for the sake of occupancy
    rows_kernel(const RowJob<F> job, const int64_t tiles, const int segment, double* partial) {
  __shared__ double shared[F::kSums + 1][kThreads];
  const int rows_per_block = tiles > 1 ? 1 : kThreads / segment, lane = threadIdx.x % segment;
  const int64_t row = tiles > 1 ? blockIdx.x / tiles : static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / segment;
  const int64_t tile = tiles > 1 ? blockIdx.x % tiles : 0, column = tile * kTile + 4 * lane;
  const int64_t left = job.width - column;
  const int count = row < job.rows && left > 0 ? (left < 4 ? static_cast<int>(left) : 4) : 0;
  S total[F::kSums + 1];
  for (int k = 0; k < F::kSums; k++) total[k] = S{};
  if (count) {
    S in[F::kInputs + 1][4], out[F::kOutputs + 1][4], noise[4], row_in[F::kRowInputs + 1];
    for (int k = 0; k < F::kInputs; k++) read_four(job.in[k], row * job.in[k].row_stride + column, count, in[k]);
    for (int k = 0; k < F::kRowInputs; k++) {
      const Array& a = job.row_in[k];
      row_in[k] = a.data ? read_one(a, looked_up(a, row) * a.row_stride, S{}) : S{};
    }
    if constexpr (has_noise<F>) {
      const uint64_t first = job.keys.stride ? column : row * job.width + column;
      four_of_stream(job.f.noise, job.keys.of(row), first, noise);
    }
    for (int j = 0; j < 4; j++) {
      S in_one[F::kInputs + 1], out_one[F::kOutputs + 1], term[F::kSums + 1];
      for (int k = 0; k < F::kInputs; k++) in_one[k] = in[k][j];
      job.f(in_one, row_in, has_noise<F> ? noise[j] : S{}, out_one, term);
      for (int k = 0; k < F::kOutputs; k++) out[k][j] = out_one[k];
      for (int k = 0; k < F::kSums; k++) total[k] += j < count ? term[k] : S{};
    }
    for (int k = 0; k < F::kOutputs; k++) write_four(job.out[k], row * job.out[k].row_stride + column, count, out[k]);
  }
  if constexpr (F::kSums > 0) {
    for (int k = 0; k < F::kSums; k++) shared[k][threadIdx.x] = total[k];
    __syncthreads();
    for (int half = segment / 2; half > 0; half /= 2) {
      if (lane < half)
        for (int k = 0; k < F::kSums; k++) shared[k][threadIdx.x] += shared[k][threadIdx.x + half];
      __syncthreads();
    }
    if (lane == 0 && row < job.rows)
      for (int k = 0; k < F::kSums; k++) {
        if (tiles > 1)
          partial[(row * tiles + tile) * F::kSums + k] = shared[k][threadIdx.x];
        else
          write_sum<S>(job.sum[k], row, shared[k][threadIdx.x]);
      }
  }
}

template <class S, class F>
__global__ void __launch_bounds__(kThreads) sum_tiles_kernel(const RowJob<F> job, const int64_t tiles, const double* partial) {
  __shared__ double shared[kThreads];
  const int64_t row = blockIdx.x / F::kSums;
  const int k = static_cast<int>(blockIdx.x % F::kSums);
  double total = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) total += partial[(row * tiles + tile) * F::kSums + k];
  shared[threadIdx.x] = total;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) write_sum<S>(job.sum[k], row, shared[0]);
}

// ---- driver

template <class S, class F>
void drive_rows(const RowJob<F>& job, const Tensor& like) {
  const OnDevice device(like);
  const int64_t tiles = job.width > kTile ? (job.width + kTile - 1) / kTile : 1;
  int segment = 1;  // threads of one row: a power of two
  while (segment < kThreads && 4 * segment < job.width) segment *= 2;
  const int64_t blocks = tiles > 1 ? job.rows * tiles : (job.rows + kThreads / segment - 1) / (kThreads / segment);
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "more elements than one launch can take");
  const auto kernel = rows_kernel<S, F>;
  const dim3 grid(static_cast<unsigned>(blocks)), block(kThreads);
  if constexpr (F::kSums > 0) {
    if (tiles > 1) {
      Tensor partial = new_tensor(like, {blocks * F::kSums}, ScalarType::Double);
      double* sums = static_cast<double*>(partial.data_ptr());
      GK_LAUNCH(kernel, grid, block, device.stream, job, tiles, segment, sums);
      const auto finish = sum_tiles_kernel<S, F>;
      GK_LAUNCH(finish, dim3(static_cast<unsigned>(job.rows * F::kSums)), block, device.stream, job, tiles, sums);
      return;
    }
  }
  GK_LAUNCH(kernel, grid, block, device.stream, job, tiles, segment, static_cast<double*>(nullptr));
}

}  // namespace gk
