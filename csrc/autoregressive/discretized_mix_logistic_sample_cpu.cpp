// discretized_mix_logistic_sample on the CPU: channel after channel over a tile of pixels, which is how they lie in memory: first
// the mixture of every pixel, then what belongs to it of each kind of parameter, then the colours.
#include "discretized_mix_logistic.h"

namespace gk {
namespace {

constexpr int64_t kPixels = 256;                 // of a unit of work; a multiple of the lanes
constexpr int64_t kTogether = 64;                // pixels of several rows, where one has few; a multiple of the lanes
constexpr int64_t kStride = kTogether + 16;      // of a channel of theirs; at a power of two the channels would evict each other
constexpr int64_t kRoom = kPixels + 8 * kLanes;  // for whole groups of noise

template <class S, int colours>
struct Tile {
  using V = typename Vector<S>::type;
  static constexpr int kCount = Lane<V>::kCount, kKinds = MixtureChannels<colours>::kKinds;
  S score[kPixels], number[kPixels], chosen[colours * kKinds][kPixels], x[colours][kPixels];

  void mixture(int64_t i, const S* logits, const S* noise, int64_t count, const MixtureDraw<S>& how) {
    const V mine = splat<V>(static_cast<double>(i));
    for (int64_t p = 0; p < count; p += kCount) {
      const V value = mixture_score(load<V>(logits + p), load<V>(noise + p), how);
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

  void color(int c, const S* noise, int64_t count, const MixtureDraw<S>& how) {
    const auto link = [&](int from, int64_t p) { return tanh(load<V>(chosen[from * kKinds + 2] + p)); };
    for (int64_t p = 0; p < count; p += kCount) {
      V centre = load<V>(chosen[c * kKinds] + p);
      if constexpr (colours == 3) {
        if (c == 1) centre = centre + link(0, p) * load<V>(x[0] + p);
        if (c == 2) centre = centre + (link(1, p) * load<V>(x[0] + p) + link(2, p) * load<V>(x[1] + p));
      }
      store(x[c] + p, colour_value(centre, load<V>(chosen[c * kKinds + 1] + p), load<V>(noise + p), how));
    }
  }
};

}  // namespace

template <class S, int colours>
void mixture_sample(const MixtureJob& job, const MixtureDraw<S>& how, const Tensor&) {
  constexpr int kKinds = Tile<S, colours>::kKinds;
  const int64_t k = job.k, pixels = job.pixels, tiles = (pixels + kPixels - 1) / kPixels, draws = k + colours;
  const int64_t channels = k + colours * kKinds * k, together = std::max<int64_t>(1, kTogether / pixels);
  S* out = static_cast<S*>(job.out.data);
  // The draws of a tile's pixels from channel(c) and noise(c), which have room for a whole vector at the end.
  const auto draw = [&](Tile<S, colours>& tile, const auto& channel, const auto& noise, int64_t count) {
    for (int64_t i = 0; i < k; i++) tile.mixture(i, channel(i), noise(i), count, how);
    for (int j = 0; j < colours * kKinds; j++)
      for (int64_t i = 0; i < k; i++) tile.parameter(i, j, channel(k + j * k + i), count);
    for (int c = 0; c < colours; c++) tile.color(c, noise(k + c), count, how);
  };
  const auto part_of_a_row = [&](int64_t begin, int64_t end) {
    Tile<S, colours> tile{};
    S converted[kRoom] = {}, noise_buffer[kRoom] = {};
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t row = unit / tiles, first = unit % tiles * kPixels, count = std::min(kPixels, pixels - first);
      const auto values_of = [&](const Array& from, int64_t c, S* to) {
        const S* values = read(from, row, c * pixels + first, count, to);
        if (values != to && count % kLanes) memcpy(to, values, count * sizeof(S)), values = to;
        return values;
      };
      const auto noise = [&](int64_t c) {
        if (job.uniforms.data) return values_of(job.uniforms, c, noise_buffer);
        const int64_t at = (job.keys.stride ? 0 : row * draws * pixels) + c * pixels + first;
        return fill_noise(Uniform{}, noise_buffer, job.keys.of(row), static_cast<uint64_t>(at), count);
      };
      draw(tile, [&](int64_t c) { return values_of(job.params, c, converted); }, noise, count);
      for (int c = 0; c < colours; c++) memcpy(out + (row * colours + c) * pixels + first, tile.x[c], count * sizeof(S));
    }
  };
  const auto several_rows = [&](int64_t begin, int64_t end) {  // lanes over their pixels
    Tile<S, colours> tile{};
    std::vector<S> params(channels * kStride), noise(draws * kStride), converted(channels * pixels);
    std::vector<S> noise_buffer(together * draws * pixels + 8 * kLanes);
    const auto spread = [&](const S* values, int64_t count, int64_t row, S* to) {
      for (int64_t c = 0; c < count; c++)
        for (int64_t p = 0; p < pixels; p++) to[c * kStride + row * pixels + p] = values[c * pixels + p];
    };
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t first = unit * together, rows = std::min(together, job.rows - first), numbers = draws * pixels;
      const S* drawn = nullptr;
      if (!job.uniforms.data && !job.keys.stride)
        drawn = fill_noise(Uniform{}, noise_buffer.data(), job.keys.of(0), static_cast<uint64_t>(first * numbers), rows * numbers);
      for (int64_t row = 0; row < rows; row++) {
        spread(read(job.params, first + row, 0, channels * pixels, converted.data()), channels, row, params.data());
        const S* own = drawn               ? drawn + row * numbers
                       : job.uniforms.data ? read(job.uniforms, first + row, 0, numbers, noise_buffer.data())
                                           : fill_noise(Uniform{}, noise_buffer.data(), job.keys.of(first + row), 0, numbers);
        spread(own, draws, row, noise.data());
      }
      draw(
          tile, [&](int64_t c) { return params.data() + c * kStride; }, [&](int64_t c) { return noise.data() + c * kStride; },
          rows * pixels);
      for (int64_t row = 0; row < rows; row++)
        for (int c = 0; c < colours; c++)
          for (int64_t p = 0; p < pixels; p++) out[((first + row) * colours + c) * pixels + p] = tile.x[c][row * pixels + p];
    }
  };
  if (together == 1)
    torch::stable::parallel_for(0, job.rows * tiles, 2, part_of_a_row);
  else
    torch::stable::parallel_for(0, (job.rows + together - 1) / together, 8, several_rows);
}

GENKERN_LIBRARY(m) { m.impl("_discretized_mix_logistic_sample", TORCH_BOX(&discretized_mix_logistic_sample)); }

}  // namespace gk
