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

struct Term {  // of the sum: a channel and a tap
  bool used;
  int up, left;           // how far the tap is from the centre
  int64_t input, weight;  // where the input stands from the pixel's place in channel 0, the weight from its output's first
};

__device__ __forceinline__ Term term_of(const Conv& job, int64_t k, int64_t seen) {
  const unsigned c = static_cast<unsigned>(k) / static_cast<unsigned>(job.live);
  const int tap = static_cast<int>(k - c * job.live), size = static_cast<int>(2 * job.columns + 1);
  const int up = static_cast<int>(job.rows) - tap / size, left = static_cast<int>(job.columns) - tap % size;
  const int64_t color = job.grouped ? c * job.colors / job.inputs : c % job.colors;
  return {c < job.inputs && (tap < job.taps || color < seen), up, left, c * job.height * job.width - up * job.width - left,
          c * (2 * job.rows + 1) * size + tap};
}

template <class S, int kMine>  // outputs of a thread
__global__ void __launch_bounds__(kThreads) forward_kernel(const Conv job) {
  constexpr int kOutputs = kSide * kMine, kColumns = kPixels / kSide;
  __shared__ Term terms[kDepth];
  __shared__ S values[kDepth][kPixels], weights[kDepth][kOutputs + 1];
  const int64_t color = blockIdx.y / job.blocks, of_color = job.outputs / job.colors, plane = job.height * job.width;
  const int thread = static_cast<int>(threadIdx.x), mine = thread % kSide, other = thread / kSide;
  const int64_t first = blockIdx.y % job.blocks * kOutputs + other;  // the outputs of this thread: first + i kSide
  const auto output_of = [&](int i) {
    return job.grouped ? color * of_color + first + i * kSide : (first + i * kSide) * job.colors + color;
  };
  const int64_t begin = blockIdx.x * int64_t{kPixels}, p = begin + thread % kPixels;  // the pixel whose inputs this thread fetches
  const int64_t n = p / plane, at = p % plane, row = at / job.width, column = at % job.width;
  const int64_t weights_of_output = job.inputs * (2 * job.rows + 1) * (2 * job.columns + 1);
  S sum[kMine][kColumns] = {};
  for (int64_t k = 0; k < job.inputs * job.live; k += kDepth) {
    if (thread < kDepth) terms[thread] = term_of(job, k + thread, color + job.own);
    __syncthreads();
    for (int d = thread / kPixels; d < kDepth; d += kThreads / kPixels) {
      const Term term = terms[d];
      const int64_t x = column - term.left;
      const bool inside = p < job.pixels && term.used && row >= term.up && x >= 0 && x < job.width;
      values[d][thread % kPixels] = inside ? read_one(job.x, n * job.inputs * plane + at + term.input, S{}) : S{};
    }
    const Term term = terms[mine];
    for (int i = 0; i < kMine; i++) {
      const bool inside = term.used && first + i * kSide < of_color;
      weights[mine][other + i * kSide] = inside ? read_one(job.weight, output_of(i) * weights_of_output + term.weight, S{}) : S{};
    }
    __syncthreads();
    for (int d = 0; d < kDepth; d++)
      for (int i = 0; i < kMine; i++) {
        const S w = weights[d][other + i * kSide];
        for (int j = 0; j < kColumns; j++) sum[i][j] = fma(w, values[d][mine + j * kSide], sum[i][j]);
      }
  }
  for (int i = 0; i < kMine && first + i * kSide < of_color; i++) {
    const S bias = job.bias.data ? read_one(job.bias, output_of(i), S{}) : S{};
    for (int j = 0; j < kColumns; j++) {
      const int64_t q = begin + mine + j * kSide;
      if (q < job.pixels) write_one(job.y, (q / plane * job.outputs + output_of(i)) * plane + q % plane, sum[i][j] + bias);
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
  Tensor y = new_tensor(x, {x.size(0), weight.size(0), x.size(2), x.size(3)});
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
