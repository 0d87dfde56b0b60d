// masked_conv2d on CUDA: a matrix product of the live weights with the inputs that they meet, which are gathered where they lie. A
// block of 16 x 16 threads has 64 pixels and up to 64 outputs of one colour and walks the depth, channel by channel and within one
// the live taps in raster order, in slabs that it holds in shared memory. An output is one chain of fused multiply-adds, then its
// bias: its bits depend neither on the batch nor on the image's size. Float32 and float64 arithmetic, no tensor cores.
#include "rows.h"

namespace gk {
namespace {

constexpr int kSide = 16, kPixels = 64, kDepth = 16;
static_assert(kSide * kSide == kThreads, "");

struct Conv {
  int64_t inputs, outputs, height, width, pixels;  // pixels: of all images
  int64_t rows, columns;                           // above and on either side that the kernel covers
  int64_t taps, live;                              // taps before the centre; with the centre where a colour sees it
  int64_t colors, blocks;                          // blocks: of the outputs of one colour
  bool grouped, own;
  Array x, weight, bias, y;
};

template <class S, int kMine>  // outputs of a thread
__global__ void __launch_bounds__(kThreads) forward_kernel(const Conv job) {
  constexpr int kOutputs = kSide * kMine, kColumns = kPixels / kSide;
  __shared__ S values[kDepth][kPixels], weights[kDepth][kOutputs + 1];
  const int64_t color = blockIdx.y / job.blocks, of_color = job.outputs / job.colors, plane = job.height * job.width;
  const int64_t first = blockIdx.y % job.blocks * kOutputs, seen = color + job.own, depth = job.inputs * job.live;
  const auto output_of = [&](int64_t i) { return job.grouped ? color * of_color + i : i * job.colors + color; };
  const auto is_live = [&](int64_t k, int64_t c) {
    return k < depth && (k % job.live < job.taps || (job.grouped ? c * job.colors / job.inputs : c % job.colors) < seen);
  };
  const int64_t thread = threadIdx.x, size = 2 * job.columns + 1, all = (2 * job.rows + 1) * size;
  // The pixel whose inputs this thread fetches.
  const int64_t p = blockIdx.x * int64_t{kPixels} + thread % kPixels, n = p / plane, row = p % plane / job.width;
  const int64_t column = p % job.width;
  const int mine = static_cast<int>(thread % kSide), my_output = static_cast<int>(thread / kSide);
  S sum[kMine][kColumns] = {};
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    for (int d = static_cast<int>(thread / kPixels); d < kDepth; d += kThreads / kPixels) {
      const int64_t k = begin + d, c = k / job.live, tap = k % job.live;
      const int64_t y = row + tap / size - job.rows, x = column + tap % size - job.columns;
      const bool inside = p < job.pixels && is_live(k, c) && y >= 0 && x >= 0 && x < job.width;
      values[d][thread % kPixels] = inside ? read_one(job.x, ((n * job.inputs + c) * job.height + y) * job.width + x, S{}) : S{};
    }
    for (int i = static_cast<int>(thread); i < kDepth * kOutputs; i += kThreads) {
      const int64_t k = begin + i % kDepth, c = k / job.live, o = first + i / kDepth;
      const bool inside = o < of_color && is_live(k, c);
      const int64_t at = (output_of(o) * job.inputs + c) * all + k % job.live;
      weights[i % kDepth][i / kDepth] = inside ? read_one(job.weight, at, S{}) : S{};
    }
    __syncthreads();
    for (int d = 0; d < kDepth; d++)
      for (int i = 0; i < kMine; i++) {
        const S w = weights[d][my_output + i * kSide];
        for (int j = 0; j < kColumns; j++) sum[i][j] = fma(w, values[d][mine + j * kSide], sum[i][j]);
      }
    __syncthreads();
  }
  for (int i = 0; i < kMine; i++) {
    const int64_t o = first + my_output + i * kSide;
    if (o >= of_color) break;
    const S bias = job.bias.data ? read_one(job.bias, output_of(o), S{}) : S{};
    for (int j = 0; j < kColumns; j++) {
      const int64_t q = blockIdx.x * int64_t{kPixels} + mine + j * kSide;
      if (q < job.pixels) write_one(job.y, (q / plane * job.outputs + output_of(o)) * plane + q % plane, sum[i][j] + bias);
    }
  }
}

template <class S>
void forward(Conv& job, const OnDevice& device) {
  const int64_t of_color = job.outputs / job.colors, mine = of_color > 2 * kSide ? 4 : of_color > kSide ? 2 : 1;
  job.blocks = (of_color + kSide * mine - 1) / (kSide * mine);
  const int64_t tiles = (job.pixels + kPixels - 1) / kPixels;
  STD_TORCH_CHECK(tiles <= 0x7fffffff && job.blocks * job.colors <= 65535, "masked_conv2d: more elements than one launch can take");
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(job.blocks * job.colors));
  const auto kernel = mine == 4 ? forward_kernel<S, 4> : mine == 2 ? forward_kernel<S, 2> : forward_kernel<S, 1>;
  GK_LAUNCH(kernel, grid, dim3(kThreads), device.stream, job);
}

Array flat(const Tensor& x) { return {x.data_ptr(), 0, storage_of(x.scalar_type())}; }

// x (N, C, H, W), weight (C_out, C, K_h, K_w), bias (C_out): all of one type.
Tensor masked_conv2d(Tensor x, Tensor weight, MaybeTensor bias, bool own, int64_t colors, bool grouped) {
  x = torch::stable::contiguous(x), weight = torch::stable::contiguous(weight);
  if (bias) bias = torch::stable::contiguous(*bias);
  Tensor y = torch::stable::new_empty(x, {x.size(0), weight.size(0), x.size(2), x.size(3)});
  if (y.numel() == 0) return y;
  const OnDevice device(x);
  Conv job{};
  job.inputs = x.size(1), job.outputs = weight.size(0), job.height = x.size(2), job.width = x.size(3);
  job.pixels = x.size(0) * job.height * job.width, job.rows = weight.size(2) / 2, job.columns = weight.size(3) / 2;
  job.taps = job.rows * weight.size(3) + job.columns, job.live = job.taps + (own || colors > 1);
  job.colors = colors, job.grouped = grouped, job.own = own;
  job.x = flat(x), job.weight = flat(weight), job.y = flat(y);
  if (bias) job.bias = flat(*bias);
  if (x.scalar_type() == ScalarType::Double)
    forward<double>(job, device);
  else
    forward<float>(job, device);
  return y;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_masked_conv2d", TORCH_BOX(&masked_conv2d)); }

}  // namespace gk
