// group_norm_act on the CPU where the channels lie innermost (torch.channels_last): x is (samples, pixels, channels). A part is a
// run of pixels of one sample. Parts are cut by the shape alone, and what they add up merges in their order, so results do not
// depend on the number of threads. The statistics take each tile's own mean as origin and merge in double, as those of the other
// layout.
#include <memory>

#include "group_norm_act_cpu.h"

namespace gk {
namespace {

constexpr int64_t kTileElements = 1 << 15, kTilePixels = 64;  // a tile stays in L2, and its sums in float stay short
constexpr int64_t kPartElements = 1 << 16;

// How the pixels of a sample are cut, and what a thread needs to look at a tile of them.
template <class S>
class Parts {
 public:
  explicit Parts(const GroupNorm& j)
      : job(j),
        tile(std::clamp<int64_t>(kTileElements / j.channels, 1, kTilePixels)),
        per_part(std::max<int64_t>(1, kPartElements / (tile * j.channels)) * tile),
        count((j.pixels + per_part - 1) / per_part) {}

  // memory that costs nothing until it is used
  static std::unique_ptr<S[]> room(int64_t n) { return std::unique_ptr<S[]>(new S[static_cast<size_t>(n)]); }
  // run(sample, part) for all parts of all samples
  template <class F>
  void each(const F& run) const {
    const int64_t share = std::max<int64_t>(1, kPartElements / (std::min(per_part, job.pixels) * job.channels));
    torch::stable::parallel_for(0, job.samples * count, share, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; index++) run(index / count, index % count);
    });
  }
  // f(first pixel, number of pixels) for the tiles of a part
  template <class F>
  void each_tile(int64_t part, const F& f) const {
    const int64_t end = std::min(job.pixels, (part + 1) * per_part);
    for (int64_t at = part * per_part; at < end; at += tile) f(at, std::min(tile, end - at));
  }
  // u = x + pre_bias of pixels [at, at + n), (n, channels): in place where it lies so, else in the buffer
  const S* values(int64_t sample, int64_t at, int64_t n, S* buffer) const {
    const int64_t channels = job.channels, of_x = job.channels_of_x;
    const S* u = buffer;
    if (job.x2.data) {
      for (int64_t i = 0; i < n; i++) {
        copy(job.x, sample, (at + i) * of_x, of_x, buffer + i * channels);
        copy(job.x2, sample, (at + i) * (channels - of_x), channels - of_x, buffer + i * channels + of_x);
      }
    } else {
      u = read(job.x, sample, at * channels, n * channels, buffer);
    }
    if (!job.pre_bias.data) return u;
    const auto own = room(channels);
    const S* pre = read(job.pre_bias, sample, 0, channels, own.get());
    for (int64_t i = 0; i < n; i++)
      each_vector<V>(channels, [&](int64_t c, int k) GK_INLINE {
        store_part(buffer + i * channels + c, load_part<V>(u + i * channels + c, k) + load_part<V>(pre + c, k), k);
      });
    return buffer;
  }
  // values (n, channels) of pixels [at, at + n) into two tensors
  void put_values(const Array& first, const Array& second, int64_t sample, int64_t at, int64_t n, const S* from) const {
    const int64_t channels = job.channels, of_x = job.channels_of_x;
    for (int64_t i = at; i < at + n; i++, from += channels) {
      paste(from, first, sample, i * of_x, of_x);
      paste(from + of_x, second, sample, i * (channels - of_x), channels - of_x);
    }
  }

  using V = VectorOf<S>;
  const GroupNorm& job;
  const int64_t tile, per_part, count;

 private:
  static void copy(const Array& from, int64_t sample, int64_t column, int64_t n, S* to) {
    const S* piece = read(from, sample, column, n, to);
    if (piece != to) std::copy(piece, piece + n, to);
  }
  static void paste(const S* from, const Array& to, int64_t sample, int64_t column, int64_t n) {
    if (S* direct = place<S>(to, sample, column, nullptr))
      std::copy(from, from + n, direct);
    else
      write(to, sample, column, from, n);
  }
};

// Sums over n pixels for each channel, memory read in its order: add(channel, count, first pixel, pixels) -> what these pixels,
// four at most, add to the k sums of the channels.
template <int k, class S, class F>
void add_pixels(int64_t channels, int64_t n, S* const (&sums)[k], const F& add) {
  using V = VectorOf<S>;
  for (S* sum : sums) std::fill_n(sum, channels, S{});
  const auto rows = [&](int64_t i, auto pixels) GK_INLINE {
    each_vector<V>(channels, [&](int64_t c, int count) GK_INLINE {
      V part[k] = {};
      for (int j = 0; j < pixels(); j++) add(c, count, i + j, part);
      for (int j = 0; j < k; j++) store_part(sums[j] + c, load_part<V>(sums[j] + c, count) + part[j], count);
    });
  };
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) rows(i, std::integral_constant<int, 4>{});
  for (; i < n; i++) rows(i, std::integral_constant<int, 1>{});
}

template <class S>
void add_part(const Parts<S>& parts, int64_t sample, int64_t part, Moments* of_groups) {
  using V = VectorOf<S>;
  const GroupNorm& job = parts.job;
  const int64_t channels = job.channels, per_group = job.channels_per_group();
  const auto room = Parts<S>::room((parts.tile + 3) * channels);
  S *const buffer = room.get(), *const origin = buffer + parts.tile * channels, *const sum = origin + channels,
           *const square = sum + channels;
  parts.each_tile(part, [&](int64_t at, int64_t n) {
    const S* u = parts.values(sample, at, n, buffer);
    const double count = static_cast<double>(n * per_group);
    add_pixels(channels, n, {sum}, [&](int64_t c, int k, int64_t i, V* part) GK_INLINE {
      const S* p = u + i * channels + c;
      __builtin_prefetch(p + kAhead);
      part[0] = part[0] + load_part<V>(p, k);
    });
    const auto over_group = [&](const S* of, int64_t g) {
      return sum_of_terms(per_group, [&](int64_t c) { return of[g * per_group + c]; });
    };
    for (int64_t g = 0; g < job.groups; g++)
      std::fill_n(origin + g * per_group, per_group, static_cast<S>(over_group(sum, g) / count));
    add_pixels(channels, n, {sum, square}, [&](int64_t c, int k, int64_t i, V* part) GK_INLINE {
      const V away = load_part<V>(u + i * channels + c, k) - load_part<V>(origin + c, k);
      part[0] = part[0] + away;
      part[1] = fma(away, away, part[1]);
    });
    for (int64_t g = 0; g < job.groups; g++) {
      const double left = over_group(sum, g), squares = over_group(square, g);
      of_groups[g].merge({count, origin[g * per_group] + left / count, squares - left * left / count});
    }
  });
}

template <class S>
Statistics<S> statistics(const Parts<S>& parts, int64_t sample, int64_t group, const std::vector<Moments>& moments) {
  const Moments* of = moments.data() + sample * parts.count * parts.job.groups + group;
  Moments all = *of;
  for (int64_t part = 1; part < parts.count; part++) all.merge(of[part * parts.job.groups]);
  return {all, parts.job.eps};
}

// The numbers of all channels of one sample: z = a (u - centre) + b, xhat = (u - centre) rstd + offset.
template <class S>
struct Channels : Affine<S> {
  std::vector<S> centre, rstd, offset;

  Channels(const Parts<S>& parts, int64_t sample, const std::vector<Moments>& moments)
      : Affine<S>(parts.job.channels), centre(static_cast<size_t>(parts.job.channels)), rstd(centre), offset(centre) {
    const GroupNorm& job = parts.job;
    this->read_channels(job, sample, 0, job.channels);
    for (int64_t g = 0; g < job.groups; g++) {
      const Statistics<S> s = statistics(parts, sample, g, moments);
      const int64_t begin = g * job.channels_per_group(), end = begin + job.channels_per_group();
      this->normalise(s, begin, end);
      std::fill(centre.begin() + begin, centre.begin() + end, s.centre());
      std::fill(rstd.begin() + begin, rstd.begin() + end, static_cast<S>(s.rstd));
      std::fill(offset.begin() + begin, offset.begin() + end, static_cast<S>(-s.rest() * s.rstd));
    }
  }
};

template <class S>
std::vector<Moments> moments_of_parts(const Parts<S>& parts) {
  const GroupNorm& job = parts.job;
  std::vector<Moments> moments(static_cast<size_t>(job.samples * parts.count * job.groups));
  parts.each([&](int64_t sample, int64_t part) {
    add_part(parts, sample, part, moments.data() + (sample * parts.count + part) * job.groups);
  });
  return moments;
}

template <class S>
std::vector<Channels<S>> channels_of_samples(const Parts<S>& parts, const std::vector<Moments>& moments) {
  std::vector<Channels<S>> of;
  for (int64_t sample = 0; sample < parts.job.samples; sample++) of.emplace_back(parts, sample, moments);
  return of;
}

template <class S, bool kSilu>
void forward(const GroupNorm& job) {
  using V = VectorOf<S>;
  const Parts<S> parts(job);
  const std::vector<Channels<S>> of_samples = channels_of_samples(parts, moments_of_parts(parts));
  const int64_t channels = job.channels;
  parts.each([&](int64_t sample, int64_t part) {
    const Channels<S>& of = of_samples[static_cast<size_t>(sample)];
    const S *const centre = of.centre.data(), *const a = of.a, *const b = of.b;
    const auto room = Parts<S>::room(2 * parts.tile * channels);
    parts.each_tile(part, [&](int64_t at, int64_t n) {
      const S* u = parts.values(sample, at, n, room.get());
      S* const out_buffer = room.get() + parts.tile * channels;
      S* const out = place(job.y, sample, at * channels, out_buffer);
      for (int64_t i = 0; i < n; i++)
        each_vector<V>(channels, [&](int64_t c, int k) GK_INLINE {
          const S* p = u + i * channels + c;
          __builtin_prefetch(p + kAhead);
          __builtin_prefetch(out + i * channels + c + kAhead, 1);
          const V z = fma(load_part<V>(a + c, k), load_part<V>(p, k) - load_part<V>(centre + c, k), load_part<V>(b + c, k));
          store_part(out + i * channels + c, activated<kSilu>(z), k);
        });
      if (out == out_buffer) write(job.y, sample, at * channels, out, n * channels);
    });
  });
}

template <class S, bool kSilu>
void backward(const GroupNorm& job, const GroupNormGradients& d) {
  using V = VectorOf<S>;
  const Parts<S> parts(job);
  const std::vector<Moments> moments = moments_of_parts(parts);
  const std::vector<Channels<S>> of_samples = channels_of_samples(parts, moments);
  const int64_t channels = job.channels, per_group = job.channels_per_group(), rows = job.samples * channels;
  const auto dz_of = [](V dy, V centred, V a, V b) GK_INLINE { return before_activation<kSilu>(dy, fma(a, centred, b)); };
  // dz stands in the gradient of x until that is written, unless that is in two pieces or of another type.
  const bool kept = kSilu && !d.x2.data && place<S>(d.x, 0, 0, nullptr) != nullptr;
  // Sums per channel of dz, dz xhat and xhat, of each part and then of each sample.
  std::vector<double> of_parts(static_cast<size_t>(job.samples * parts.count * 3 * channels));
  parts.each([&](int64_t sample, int64_t part) {
    const Channels<S>& of = of_samples[static_cast<size_t>(sample)];
    const S *const centre = of.centre.data(), *const rstd = of.rstd.data(), *const offset = of.offset.data();
    const S *const a = of.a, *const b = of.b;
    double* const sums = of_parts.data() + (sample * parts.count + part) * 3 * channels;
    const auto room = Parts<S>::room((2 * parts.tile + 3) * channels);
    S* const tile_sums = room.get() + 2 * parts.tile * channels;
    parts.each_tile(part, [&](int64_t at, int64_t n) {
      const S* u = parts.values(sample, at, n, room.get());
      const S* dy = read(d.grad, sample, at * channels, n * channels, room.get() + parts.tile * channels);
      S* const dz_of_tile = kept ? place<S>(d.x, sample, at * channels, nullptr) : nullptr;
      add_pixels(channels, n, {tile_sums, tile_sums + channels, tile_sums + 2 * channels},
                 [&](int64_t c, int k, int64_t i, V* sum) GK_INLINE {
                   const int64_t e = i * channels + c;
                   __builtin_prefetch(u + e + kAhead);
                   __builtin_prefetch(dy + e + kAhead);
                   const V centred = load_part<V>(u + e, k) - load_part<V>(centre + c, k);
                   const V xhat = fma(centred, load_part<V>(rstd + c, k), load_part<V>(offset + c, k));
                   const V dz = dz_of(load_part<V>(dy + e, k), centred, load_part<V>(a + c, k), load_part<V>(b + c, k));
                   if (dz_of_tile) store_part(dz_of_tile + e, dz, k);
                   sum[0] = sum[0] + dz;
                   sum[1] = fma(dz, xhat, sum[1]);
                   sum[2] = sum[2] + xhat;
                 });
      for (int64_t c = 0; c < 3 * channels; c++) sums[c] += tile_sums[c];
    });
  });
  std::fill(d.sums, d.sums + 3 * rows, 0.0);
  for (int64_t index = 0; index < job.samples * parts.count; index++)
    for (int64_t i = 0; i < 3; i++)
      for (int64_t c = 0; c < channels; c++)
        d.sums[i * rows + index / parts.count * channels + c] += of_parts[static_cast<size_t>((index * 3 + i) * channels + c)];
  // rstd (g - mean_g - mean_g_xhat xhat) = a dz - p - q xhat, with g = dz gain weight
  std::vector<S> p(static_cast<size_t>(rows)), q(static_cast<size_t>(rows));
  for (int64_t sample = 0; sample < job.samples; sample++) {
    const Channels<S>& of = of_samples[static_cast<size_t>(sample)];
    for (int64_t g = 0; g < job.groups; g++) {
      const Statistics<S> s = statistics(parts, sample, g, moments);
      const int64_t first = g * per_group, row = sample * channels + first;
      const auto [mean_g, mean_g_xhat] = put_channel_gradients(job, d, s, of, first, row);
      std::fill_n(p.begin() + row, per_group, static_cast<S>(s.rstd * mean_g));
      std::fill_n(q.begin() + row, per_group, static_cast<S>(s.rstd * mean_g_xhat));
    }
  }
  put_parameter_gradients<S>(job, d);
  parts.each([&](int64_t sample, int64_t part) {
    const Channels<S>& of = of_samples[static_cast<size_t>(sample)];
    const S *const centre = of.centre.data(), *const rstd = of.rstd.data(), *const offset = of.offset.data();
    const S *const a = of.a, *const b = of.b;
    const S *const p_row = p.data() + sample * channels, *const q_row = q.data() + sample * channels;
    const auto room = Parts<S>::room(3 * parts.tile * channels);
    parts.each_tile(part, [&](int64_t at, int64_t n) {
      const S* u = parts.values(sample, at, n, room.get());
      const S* dy = kept ? place<S>(d.x, sample, at * channels, nullptr)
                         : read(d.grad, sample, at * channels, n * channels, room.get() + parts.tile * channels);
      S* const out_buffer = room.get() + 2 * parts.tile * channels;
      S* const out = d.x2.data ? out_buffer : place(d.x, sample, at * channels, out_buffer);
      const auto finish = [&](auto again) GK_INLINE {
        for (int64_t i = 0; i < n; i++)
          each_vector<V>(channels, [&](int64_t c, int k) GK_INLINE {
            const int64_t e = i * channels + c;
            __builtin_prefetch(u + e + kAhead);
            __builtin_prefetch(dy + e + kAhead);
            const V centred = load_part<V>(u + e, k) - load_part<V>(centre + c, k), factor = load_part<V>(a + c, k);
            const V xhat = fma(centred, load_part<V>(rstd + c, k), load_part<V>(offset + c, k));
            V dz = load_part<V>(dy + e, k);
            if constexpr (again()) dz = dz_of(dz, centred, factor, load_part<V>(b + c, k));
            store_part(out + e, fma(factor, dz, -load_part<V>(p_row + c, k)) - load_part<V>(q_row + c, k) * xhat, k);
          });
      };
      kept ? finish(std::false_type{}) : finish(std::true_type{});
      if (d.x2.data)
        parts.put_values(d.x, d.x2, sample, at, n, out);
      else if (out == out_buffer)
        write(d.x, sample, at * channels, out, n * channels);
    });
  });
}

struct OnCpuLast {
  static constexpr int kChannelDim = 2;
  template <class S, bool kSilu>
  static void forward(const GroupNorm& job, const Tensor&) {
    gk::forward<S, kSilu>(job);
  }
  template <class S, bool kSilu>
  static void backward(const GroupNorm& job, const GroupNormGradients& d, const Tensor&) {
    gk::backward<S, kSilu>(job, d);
  }
};

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_group_norm_act_channels_last", TORCH_BOX(&group_norm_act<OnCpuLast>));
  m.impl("_group_norm_act_channels_last_out", TORCH_BOX(&group_norm_act_out<OnCpuLast>));
  m.impl("_group_norm_act_channels_last_backward", TORCH_BOX(&group_norm_act_backward<OnCpuLast>));
}

}  // namespace gk
