// wavenet_step on the CPU: one step of all layers of WaveNet and of the two convolutions behind them. The products are those of
// causal_conv1d, whose bits they have. A unit of work is a few samples, which go through all layers.
#include <cmath>

#include "dense_product.h"

namespace gk {
namespace {

template <class S>
struct StackJob {
  int64_t samples, residual, gate, skip, outputs, taps, layers, time, rows;  // rows: of the past of a sample
  const int64_t* dilations;
  const S *x, *weights, *condition;
  S *past, *y;
};

// What a few samples hold on their way through the layers; rows of the vectors below belong to samples.
template <class S>
class Columns {
 public:
  Columns(const StackJob<S>& job, int64_t first, int64_t count) : job_(job), first_(first), count_(count), at_(job.weights) {
    const int64_t most = std::max({job.taps * job.residual, job.gate / 2, job.skip});
    const int64_t widest = std::max({job.gate, job.residual + job.skip, job.outputs});
    in_.resize(static_cast<size_t>(most * count)), out_.resize(static_cast<size_t>((widest + 2 * kBlock) * count));
    x_.assign(job.x + first * job.residual, job.x + (first + count) * job.residual);
    total_.resize(static_cast<size_t>(job.skip * count));
    condition_.resize(static_cast<size_t>(job.gate + 2 * kBlock));
  }

  void run() {
    for (int64_t layer = 0, row = 0; layer < job_.layers; row += (job_.taps - 1) * job_.dilations[layer++]) {
      convolve(layer, row);
      gate_and_add(layer);
    }
    const S scale = static_cast<S>(std::sqrt(1.0 / static_cast<double>(job_.layers)));
    for (S& t : total_) t = t * scale;
    rectify(total_.data(), job_.skip);
    product(job_.skip, job_.skip);
    rectify(out_.data(), width_);
    product(job_.outputs, job_.skip);
    for (int64_t j = 0; j < count_; j++)
      std::copy(out_.data() + j * width_, out_.data() + j * width_ + job_.outputs, job_.y + (first_ + j) * job_.outputs);
  }

 private:
  // out_ (count, width_) from in_ (depth, count) by the weights that come next.
  void product(int64_t outputs, int64_t depth) {
    Weights<S> weights{outputs, depth, at_, nullptr};
    width_ = weights.blocks() * kBlock;
    weights.bias = at_ + width_ * depth;
    at_ += width_ * (depth + 1);
    product_of_steps(weights, in_.data(), count_, out_.data());
  }
  void put(const S* from, int64_t count, int64_t row, int64_t j) {  // as rows of in_, for sample j
    for (int64_t i = 0; i < count; i++) in_[static_cast<size_t>((row + i) * count_ + j)] = from[i];
  }
  void rectify(const S* from, int64_t stride) {
    for (int64_t j = 0; j < count_; j++)
      for (int64_t i = 0; i < job_.skip; i++) {
        const S value = from[j * stride + i];
        in_[static_cast<size_t>(i * count_ + j)] = value < 0 ? S{} : value;
      }
  }
  // The past of a layer is a ring: what came (taps - 1) dilation steps ago stands where the newest goes.
  void convolve(int64_t layer, int64_t row) {
    const int64_t channels = job_.residual, dilation = job_.dilations[layer], size = (job_.taps - 1) * dilation;
    for (int64_t j = 0; j < count_; j++) {
      S* ring = job_.past + ((first_ + j) * job_.rows + row) * channels;
      const S* x = x_.data() + j * channels;
      for (int64_t k = 0; k + 1 < job_.taps; k++)
        put(ring + (job_.time + k * dilation) % size * channels, channels, k * channels, j);
      put(x, channels, (job_.taps - 1) * channels, j);
      if (size) std::copy(x, x + channels, ring + job_.time % size * channels);
    }
    product(job_.gate, job_.taps * channels);
  }
  void gate_and_add(int64_t layer) {
    const int64_t half = job_.gate / 2, channels = job_.residual;
    for (int64_t j = 0; j < count_; j++) {
      S *z = out_.data() + j * width_, *c = nullptr;
      if (job_.condition) {
        const S* from = job_.condition + ((first_ + j) * job_.layers + layer) * job_.gate;
        std::copy(from, from + job_.gate, c = condition_.data());
      }
      gate_line(z, z + half, c, c ? c + half : nullptr, half);
      put(z, half, 0, j);
    }
    product(channels + job_.skip, half);
    const S scale = static_cast<S>(std::sqrt(0.5));
    for (int64_t j = 0; j < count_; j++) {
      const S* out = out_.data() + j * width_;
      S *x = x_.data() + j * channels, *total = total_.data() + j * job_.skip;
      for (int64_t i = 0; i < channels; i++) x[i] = (out[i] + x[i]) * scale;
      for (int64_t i = 0; i < job_.skip; i++) total[i] = total[i] + out[channels + i];
    }
  }

  const StackJob<S>& job_;
  int64_t first_, count_, width_ = 0;
  const S* at_;
  std::vector<S> in_, out_, x_, total_, condition_;
};

template <class S>
void step(const StackJob<S>& job) {
  constexpr int64_t kSteps = Tile<S>::kSteps;
  torch::stable::parallel_for(0, (job.samples + kSteps - 1) / kSteps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++)
      Columns<S>(job, unit * kSteps, std::min(kSteps, job.samples - unit * kSteps)).run();
  });
}

template <class S>
void run(StackJob<S> job, const Tensor& x, const Tensor& past, const Tensor& weights, const MaybeTensor& condition, Tensor& y) {
  job.x = static_cast<const S*>(x.data_ptr()), job.weights = static_cast<const S*>(weights.data_ptr());
  job.condition = condition ? static_cast<const S*>(condition->data_ptr()) : nullptr;
  job.past = static_cast<S*>(past.data_ptr()), job.y = static_cast<S*>(y.data_ptr());
  step(job);
}

// Everything contiguous and of one type; sizes are those of the Python side.
Tensor wavenet_step(Tensor x, Tensor past, Tensor weights, MaybeTensor condition, std::vector<int64_t> dilations, int64_t taps,
                    int64_t gate, int64_t skip, int64_t outputs, int64_t time) {
  Tensor y = new_tensor(x, {x.size(0), outputs});
  if (y.numel() == 0) return y;
  const auto job = [&](auto one) {
    return StackJob<decltype(one)>{
        x.size(0),    x.size(1),       gate, skip, outputs, taps, static_cast<int64_t>(dilations.size()), time,
        past.size(1), dilations.data()};
  };
  if (x.scalar_type() == ScalarType::Double)
    run(job(double{}), x, past, weights, condition, y);
  else
    run(job(float{}), x, past, weights, condition, y);
  return y;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_wavenet_step", TORCH_BOX(&wavenet_step)); }

}  // namespace gk
