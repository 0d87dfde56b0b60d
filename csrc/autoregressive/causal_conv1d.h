// Depthwise causal convolution: what its CPU and CUDA kernels share. The sum of one output is one chain of fused multiply-adds from
// the bias on, oldest tap first, in the parallel pass and in the step, so that both give the same bits.
#pragma once
#include "rows.h"

namespace gk {

struct Sequences {  // x (N, C, L) or a state (N, C, P): element (n, c, t) is data[n * sample + c * channel + t]
  Tensor tensor;    // keeps a copy alive
  Array array{};
  int64_t sample = 0, channel = 0;
  Sequences() = default;
  explicit Sequences(const Tensor& x) : tensor(x.size(2) < 2 || x.stride(2) == 1 ? x : torch::stable::contiguous(x)) {
    array = {tensor.data_ptr(), 0, storage_of(tensor.scalar_type())};
    sample = tensor.stride(0), channel = tensor.stride(1);
  }
  GK_FN int64_t at(int64_t n, int64_t c) const { return n * sample + c * channel; }
};

inline Array flat(const Tensor& x) { return {x.data_ptr(), 0, storage_of(x.scalar_type())}; }  // of a contiguous tensor

inline ScalarType conv_type(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& state) {
  ScalarType type = promote(x.scalar_type(), weight.scalar_type());
  if (bias) type = promote(type, bias->scalar_type());
  if (state) type = promote(type, state->scalar_type());
  return type;
}

}  // namespace gk
