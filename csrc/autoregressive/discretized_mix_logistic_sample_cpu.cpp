// discretized_mix_logistic_sample: channel after channel over a tile of pixels, which is how they lie in memory: first the mixture
// of every pixel, then what belongs to it of each kind of parameter, then the colours.
#include "rows.h"

namespace gk {
namespace {

constexpr int64_t kPixels = 256;                 // of a unit of work; a multiple of the lanes
constexpr int64_t kRoom = kPixels + 8 * kLanes;  // for whole groups of noise

struct Draw {
  double temperature, min_log_scale;
  int64_t levels;  // 0: not rounded
};

template <class V>
GK_FN V kept_within(V x, double low, double high) {  // NaN stays
  x = x < splat<V>(low) ? splat<V>(low) : x;
  return x > splat<V>(high) ? splat<V>(high) : x;
}
template <class V>
GK_FN V uniform(const Scalar<V>* p) {
  return kept_within(load<V>(p), 1e-5, 1 - 1e-5);
}

template <class S, int colours>
struct Tile {
  using V = typename Vector<S>::type;
  static constexpr int kCount = Lane<V>::kCount, kKinds = colours == 3 ? 3 : 2;  // means, log scales, coefficients
  S score[kPixels], number[kPixels], chosen[colours * kKinds][kPixels], x[colours][kPixels];

  void mixture(int64_t i, const S* logits, const S* noise, int64_t count, const Draw& how) {
    const V inverse = splat<V>(1 / how.temperature), mine = splat<V>(static_cast<double>(i));
    for (int64_t p = 0; p < count; p += kCount) {
      const V value = load<V>(logits + p) * inverse - log(-log(uniform<V>(noise + p)));
      const V best = i == 0 ? value : load<V>(score + p);
      const auto keep = i == 0 ? value != value : value <= best;
      store(score + p, keep ? best : value);
      store(number + p, keep ? (i == 0 ? V{} : load<V>(number + p)) : mine);
    }
  }

  void parameter(int64_t i, int j, const S* values, int64_t count) {  // of mixture i; j: the colour's kind
    const V mine = splat<V>(static_cast<double>(i));
    for (int64_t p = 0; p < count; p += kCount) {
      const V value = load<V>(values + p);
      store(chosen[j] + p, load<V>(number + p) == mine ? value : load<V>(chosen[j] + p));
    }
  }

  void color(int c, const S* noise, int64_t count, const Draw& how) {
    const V lowest = splat<V>(how.min_log_scale);
    const auto link = [&](int from, int64_t p) { return tanh(load<V>(chosen[from * kKinds + 2] + p)); };
    for (int64_t p = 0; p < count; p += kCount) {
      V centre = load<V>(chosen[c * kKinds] + p);
      if constexpr (colours == 3) {
        if (c == 1) centre = centre + link(0, p) * load<V>(x[0] + p);
        if (c == 2) centre = centre + (link(1, p) * load<V>(x[0] + p) + link(2, p) * load<V>(x[1] + p));
      }
      const V raw = load<V>(chosen[c * kKinds + 1] + p), u = uniform<V>(noise + p);
      const V scale = splat<V>(how.temperature) * exp(raw < lowest ? lowest : raw);
      V value = kept_within(centre + scale * (log(u) - log(1 - u)), -1, 1);
      if (how.levels) {
        const double steps = static_cast<double>(how.levels - 1);
        const V magic = splat<V>(sizeof(S) == 4 ? 12582912.0 : 6755399441055744.0);  // adding it rounds, ties to even
        value = (((value + 1) * splat<V>(steps / 2) + magic) - magic) * splat<V>(2 / steps) - 1;
      }
      store(x[c] + p, value);
    }
  }
};

template <class S, int colours>
void run(const Rows& params, int64_t channels, int64_t pixels, const Keys& keys, const Rows* uniforms, const Draw& how, S* out) {
  constexpr int kKinds = Tile<S, colours>::kKinds;
  const int64_t n = params.shape().rows, tiles = (pixels + kPixels - 1) / kPixels, k = channels / (colours == 3 ? 10 : 3);
  const int64_t draws = k + colours;
  torch::stable::parallel_for(0, n * tiles, 2, [&](int64_t begin, int64_t end) {
    Tile<S, colours> tile{};
    S converted[kRoom] = {}, noise_buffer[kRoom] = {};
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t row = unit / tiles, first = unit % tiles * kPixels, count = std::min(kPixels, pixels - first);
      const auto channel = [&](const Array& from, int64_t c, S* to) {  // with room for a whole vector at the end
        const S* values = read(from, row, c * pixels + first, count, to);
        if (values != to && count % kLanes) memcpy(to, values, count * sizeof(S)), values = to;
        return values;
      };
      const auto noise = [&](int64_t c) {
        if (uniforms) return channel(uniforms->array(), c, noise_buffer);
        const int64_t at = (keys.stride ? 0 : row * draws * pixels) + c * pixels + first;
        return fill_noise(Uniform{}, noise_buffer, keys.of(row), static_cast<uint64_t>(at), count);
      };
      for (int64_t i = 0; i < k; i++) tile.mixture(i, channel(params.array(), i, converted), noise(i), count, how);
      for (int j = 0; j < colours * kKinds; j++)
        for (int64_t i = 0; i < k; i++) tile.parameter(i, j, channel(params.array(), k + j * k + i, converted), count);
      for (int c = 0; c < colours; c++) {
        tile.color(c, noise(k + c), count, how);
        memcpy(out + (row * colours + c) * pixels + first, tile.x[c], count * sizeof(S));
      }
    }
  });
}

template <class S>
void dispatch(const Tensor& params, const Keys& keys, const MaybeTensor& uniforms, int64_t colours, const Draw& how, Tensor& out) {
  const Rows rows(params);
  std::optional<Rows> given;
  if (uniforms) given.emplace(*uniforms);
  const int64_t channels = params.size(1), pixels = rows.shape().width / channels;
  S* to = static_cast<S*>(out.data_ptr());
  if (colours == 3)
    run<S, 3>(rows, channels, pixels, keys, given ? &*given : nullptr, how, to);
  else
    run<S, 1>(rows, channels, pixels, keys, given ? &*given : nullptr, how, to);
}

// params (N, 10 K or 3 K, ...); key int64 (2,) or (N, 2), or uniforms (N, K + colours, ...) of the type of the result.
Tensor sample(Tensor params, MaybeTensor key, MaybeTensor uniforms, int64_t colours, double temperature, double min_log_scale,
              int64_t levels) {
  std::vector<int64_t> sizes(params.sizes().begin(), params.sizes().end());
  sizes[1] = colours;
  Tensor out = torch::stable::new_empty(params, sizes, sum_type(params.scalar_type()));
  if (out.numel() == 0) return out;
  Tensor dense;
  Keys keys;
  if (key) dense = torch::stable::contiguous(*key), keys = keys_of(dense);
  const Draw how{temperature, min_log_scale, levels};
  if (params.scalar_type() == ScalarType::Double)
    dispatch<double>(params, keys, uniforms, colours, how, out);
  else
    dispatch<float>(params, keys, uniforms, colours, how, out);
  return out;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_discretized_mix_logistic_sample", TORCH_BOX(&sample)); }

}  // namespace gk
