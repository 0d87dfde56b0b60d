// The device of a source file: registration, guard, stream and launch. One .cpp of an op is compiled
//   by g++ for the CPU libraries,  by nvcc for CUDA (GK_GPU),  by g++ with cuda_emu.h for the emulated CUDA of the tests (GK_GPU).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__CUDACC__)
#define GK_GPU
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#define GENKERN_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(genkern, CUDA, m)
#define GK_LAUNCH(kernel, grid, block, stream, ...)   \
  do {                                                \
    kernel<<<grid, block, 0, stream>>>(__VA_ARGS__);  \
    STD_CUDA_KERNEL_LAUNCH_CHECK();                   \
  } while (0)
namespace gk {
struct OnDevice {  // makes the tensor's device current; launches go to torch's current stream there
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream = nullptr;
  explicit OnDevice(const torch::stable::Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
  }
};
}  // namespace gk
#elif defined(GENKERN_EMULATED)
#define GK_GPU
#include "cuda_emu.h"
#define GENKERN_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(genkern_emulated, CPU, m)
namespace gk {
struct OnDevice {
  cudaStream_t stream = nullptr;
  explicit OnDevice(const torch::stable::Tensor&) {}
};
}  // namespace gk
#else
#define GENKERN_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(genkern, CPU, m)
#endif
