// discretized_mix_logistic_nll and _sample on CUDA: a thread per pixel, whose numbers of one channel are neighbours in memory.
// Every parameter is read once (a draw: those of the chosen mixture), every gradient written once. The backward pass knows the
// weights of the mixtures only at the end, so it keeps what it made of the first kKept mixtures in shared memory and makes that of
// further ones again. Sums over pixels: a tree in double, then a second kernel. No atomics.
#include "discretized_mix_logistic.h"

namespace gk {
namespace {

constexpr int kGradientThreads = 64;

template <Storage storage>
using Arithmetic = std::conditional_t<storage == Storage::kDouble, double, float>;

template <Storage storage>  // known when compiled: a thread's reads do not wait for branches
struct Pixel {
  using S = Arithmetic<storage>;
  Array params;
  int64_t pixels, at;
  __device__ __forceinline__ Pixel(const MixtureJob& job, int64_t row, int64_t pixel)
      : params(job.params), pixels(job.pixels), at(row * job.params.row_stride + pixel) {
    params.storage = storage;
  }
  __device__ __forceinline__ S operator()(int64_t channel) const { return read_one(params, at + channel * pixels, S{}); }
};

template <class S, int colours>
__device__ __forceinline__ void read_colours(const MixtureJob& job, int64_t row, int64_t pixel, S x[3]) {
  for (int c = 0; c < colours; c++) x[c] = read_one(job.x, row * job.x.row_stride + c * job.pixels + pixel, S{});
}

template <class S>
struct LogSum {  // of ratio e^exponent, one after the other
  S top = static_cast<S>(-1e38), total = 0;
  __device__ __forceinline__ void add(S ratio, S exponent) {
    const S d = exponent - top, e = exp(d < 0 ? d : -d);
    total = d > 0 ? fma(total, e, ratio) : fma(ratio, e, total);
    top = d > 0 ? exponent : top;
  }
  __device__ __forceinline__ S value() const { return top + log(total); }
};

// `segment` threads, a power of two, for each of a block's rows, or several tiles of kThreads pixels for a row.
template <Storage storage, int colours>
__global__ void __launch_bounds__(kThreads) nll_kernel(const MixtureJob job, const MixtureRule<Arithmetic<storage>> rule,
                                                       const int64_t tiles, const int segment, double* partial) {
  using S = Arithmetic<storage>;
  __shared__ double shared[kThreads];
  const int rows_per_block = kThreads / segment, lane = static_cast<int>(threadIdx.x) % segment;
  const int64_t row = tiles > 1 ? blockIdx.x / tiles : static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / segment;
  const int64_t tile = tiles > 1 ? blockIdx.x % tiles : 0, pixel = tile * kThreads + lane;
  S nll{};
  if (row < job.rows && pixel < job.pixels) {
    const Pixel<storage> get(job, row, pixel);
    S x[3];
    read_colours<S, colours>(job, row, pixel, x);
    LogSum<S> prior, joint;
    for (int64_t i = 0; i < job.k; i++) {
      const S logit = get(i);
      S ratio, exponent;
      component<colours, false>(get, job.k, i, logit, x, rule, &ratio, &exponent, static_cast<S*>(nullptr));
      prior.add(1, logit);
      joint.add(ratio, exponent);
    }
    nll = prior.value() - joint.value();
  }
  shared[threadIdx.x] = nll;
  __syncthreads();
  for (int half = segment / 2; half > 0; half /= 2) {
    if (lane < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (lane != 0 || row >= job.rows) return;
  if (tiles > 1)
    partial[blockIdx.x] = shared[threadIdx.x];
  else
    write_sum<S>(job.out, row, shared[threadIdx.x]);
}

template <class S>
__global__ void __launch_bounds__(kThreads) sum_kernel(const Array out, const int64_t tiles, const double* partial) {
  __shared__ double shared[kThreads];
  double total = 0;
  for (int64_t tile = threadIdx.x; tile < tiles; tile += kThreads) total += partial[blockIdx.x * tiles + tile];
  shared[threadIdx.x] = total;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < static_cast<unsigned>(half)) shared[threadIdx.x] += shared[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) write_sum<S>(out, blockIdx.x, shared[0]);
}

template <Storage storage, int colours>
__global__ void __launch_bounds__(kGradientThreads)
    gradient_kernel(const MixtureJob job, const MixtureRule<Arithmetic<storage>> rule) {
  using S = Arithmetic<storage>;
  using Channels = MixtureChannels<colours>;
  constexpr int kNumbers = 2 + Channels::kSlopes, kKept = 28672 / static_cast<int>(kNumbers * kGradientThreads * sizeof(S));
  __shared__ S kept[kKept * kNumbers][kGradientThreads];
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kGradientThreads + threadIdx.x;
  const int64_t row = index / job.pixels, pixel = index - row * job.pixels;
  if (row >= job.rows) return;
  const Pixel<storage> get(job, row, pixel);
  const Channels channel{job.k};
  S x[3];
  read_colours<S, colours>(job, row, pixel, x);
  LogSum<S> prior, joint;
  S of[kNumbers];  // a mixture's ratio, exponent and slopes
  for (int64_t i = 0; i < job.k; i++) {
    const S logit = get(i);
    component<colours, true>(get, job.k, i, logit, x, rule, of, of + 1, of + 2);
    prior.add(1, logit);
    joint.add(of[0], of[1]);
    if (i < kKept)
      for (int j = 0; j < kNumbers; j++) kept[i * kNumbers + j][threadIdx.x] = of[j];
  }
  const S grad = read_one(job.grad, row * job.grad.row_stride, S{}), of_prior = grad / prior.total, of_joint = grad / joint.total;
  Array out = job.out;
  out.storage = storage;
  const int64_t at = row * out.row_stride + pixel;
  for (int64_t i = 0; i < job.k; i++) {
    const S logit = get(i);
    if (i < kKept)
      for (int j = 0; j < kNumbers; j++) of[j] = kept[i * kNumbers + j][threadIdx.x];
    else
      component<colours, true>(get, job.k, i, logit, x, rule, of, of + 1, of + 2);
    const S weight = of_joint * (of[0] * exp(of[1] - joint.top));
    write_one(out, at + i * job.pixels, of_prior * exp(logit - prior.top) - weight);
    for (int c = 0; c < colours; c++)
      for (int kind = 0; kind < Channels::kKinds; kind++)
        write_one(out, at + channel(c, kind, i) * job.pixels, -weight * of[2 + kind * colours + c]);
  }
}

// Element e of a stream of uniforms, e counted in one key's stream.
template <class S>
__device__ __forceinline__ S uniform_at(Key key, uint64_t e) {
  constexpr int per_counter = sizeof(S) == 4 ? 4 : 2;
  uint32_t words[4];
  S values[per_counter];
  philox_words(key, e / per_counter, words);
  Uniform()(words, values);
  S u = values[0];
  for (int j = 1; j < per_counter; j++) u = e % per_counter == static_cast<unsigned>(j) ? values[j] : u;
  return u;
}

template <Storage storage, int colours>
__global__ void __launch_bounds__(kThreads) sample_kernel(const MixtureJob job, const MixtureDraw<Arithmetic<storage>> how) {
  using S = Arithmetic<storage>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = index / job.pixels, pixel = index - row * job.pixels, draws = job.k + colours;
  if (row >= job.rows) return;
  const Pixel<storage> get(job, row, pixel);
  const Key key = job.uniforms.data ? Key{} : job.keys.of(row);
  const int64_t first = (job.keys.stride ? 0 : row * draws * job.pixels) + pixel;
  const auto noise = [&](int64_t c) {
    return job.uniforms.data ? read_one(job.uniforms, row * job.uniforms.row_stride + c * job.pixels + pixel, S{})
                             : uniform_at<S>(key, static_cast<uint64_t>(first + c * job.pixels));
  };
  S best = mixture_score(get(0), noise(0), how);
  int64_t chosen = 0;
  for (int64_t i = 1; i < job.k; i++) {
    const S score = mixture_score(get(i), noise(i), how);
    const bool keep = score <= best;
    best = keep ? best : score;
    chosen = keep ? chosen : i;
  }
  const MixtureChannels<colours> channel{job.k};
  S x[3] = {}, link[3] = {};
  if constexpr (colours == 3)
    for (int c = 0; c < 3; c++) link[c] = tanh(get(channel(c, 2, chosen)));
  for (int c = 0; c < colours; c++) {
    S centre = get(channel(c, 0, chosen));
    if (c == 1) centre = centre + link[0] * x[0];
    if (c == 2) centre = centre + (link[1] * x[0] + link[2] * x[1]);
    x[c] = colour_value(centre, get(channel(c, 1, chosen)), noise(job.k + c), how);
    static_cast<S*>(job.out.data)[(row * colours + c) * job.pixels + pixel] = x[c];
  }
}

// call(storage as a constant) for the storages whose arithmetic is S
template <class S, class F>
void for_storage(Storage storage, const F& call) {
  if constexpr (sizeof(S) == 8) {
    call(std::integral_constant<Storage, Storage::kDouble>());
  } else {
    if (storage == Storage::kFloat) call(std::integral_constant<Storage, Storage::kFloat>());
    if (storage == Storage::kHalf) call(std::integral_constant<Storage, Storage::kHalf>());
    if (storage == Storage::kBFloat16) call(std::integral_constant<Storage, Storage::kBFloat16>());
  }
}

dim3 blocks(int64_t count) {
  STD_TORCH_CHECK(count <= 0x7fffffff, "more pixels than one launch can take");
  return dim3(static_cast<unsigned>(count));
}

}  // namespace

template <class S, int colours>
void mixture_nll(const MixtureJob& job, const MixtureRule<S>& rule, const Tensor& like) {
  const OnDevice device(like);
  const int64_t tiles = job.pixels > kThreads ? (job.pixels + kThreads - 1) / kThreads : 1;
  int segment = 1;
  while (segment < kThreads && segment < job.pixels) segment *= 2;
  const int64_t count = tiles > 1 ? job.rows * tiles : (job.rows + kThreads / segment - 1) / (kThreads / segment);
  Tensor sums = new_tensor(like, {tiles > 1 ? count : 0}, ScalarType::Double);
  double* partial = static_cast<double*>(sums.data_ptr());
  for_storage<S>(job.params.storage, [&](auto storage) {
    const auto kernel = nll_kernel<decltype(storage)::value, colours>;
    GK_LAUNCH(kernel, blocks(count), dim3(kThreads), device.stream, job, rule, tiles, segment, partial);
  });
  if (tiles == 1) return;
  const auto finish = sum_kernel<S>;
  GK_LAUNCH(finish, blocks(job.rows), dim3(kThreads), device.stream, job.out, tiles, partial);
}

template <class S, int colours>
void mixture_nll_backward(const MixtureJob& job, const MixtureRule<S>& rule, const Tensor& like) {
  const OnDevice device(like);
  const dim3 grid = blocks((job.rows * job.pixels + kGradientThreads - 1) / kGradientThreads);
  for_storage<S>(job.params.storage, [&](auto storage) {
    const auto kernel = gradient_kernel<decltype(storage)::value, colours>;
    GK_LAUNCH(kernel, grid, dim3(kGradientThreads), device.stream, job, rule);
  });
}

template <class S, int colours>
void mixture_sample(const MixtureJob& job, const MixtureDraw<S>& how, const Tensor& like) {
  const OnDevice device(like);
  const dim3 grid = blocks((job.rows * job.pixels + kThreads - 1) / kThreads);
  for_storage<S>(job.params.storage, [&](auto storage) {
    const auto kernel = sample_kernel<decltype(storage)::value, colours>;
    GK_LAUNCH(kernel, grid, dim3(kThreads), device.stream, job, how);
  });
}

GENKERN_LIBRARY(m) {
  m.impl("_discretized_mix_logistic_nll", TORCH_BOX(&discretized_mix_logistic_nll));
  m.impl("_discretized_mix_logistic_nll_backward", TORCH_BOX(&discretized_mix_logistic_nll_backward));
  m.impl("_discretized_mix_logistic_sample", TORCH_BOX(&discretized_mix_logistic_sample));
}

}  // namespace gk
