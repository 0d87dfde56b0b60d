// group_norm_act on the CPU: one group of one sample at a time, in tiles that stay in L1. The statistics take each tile's own mean
// as origin and merge in double, so they survive data with a large mean; the affine maps are one multiply-add per element. The
// backward pass makes the statistics again, adds up three numbers per channel while it leaves the gradient before the activation
// where that of x will stand, and from those writes the gradients.
#include "group_norm_act_cpu.h"

namespace gk {
namespace {

template <class S>
constexpr int64_t kGroupTile = 256 * Lane<VectorOf<S>>::kCount;  // four chains of additions, so a lane adds 64 terms
constexpr int64_t kKept =
    1 << 16;  // where the gradient of x is narrow, dz of a group of so many elements is kept, of larger ones made again

template <class V>
GK_FN V load_ahead(const Scalar<V>* p) {
  __builtin_prefetch(p + kAhead);
  return load<V>(p);
}
GK_FN double sum_of(double x) { return x; }
template <int n>
double sum_of_doubles(
    const double* x) {  // in a tree of vectors: rows may be short, and sum_lanes' one chain then takes much of the time
  if constexpr (n == 1) {
    return *x;
  } else {
    typedef double half __attribute__((vector_size(4 * n)));
    half low, high;
    memcpy(&low, x, sizeof(half));
    memcpy(&high, x + n / 2, sizeof(half));
    low += high;
    double sums[n / 2];
    memcpy(sums, &low, sizeof(half));
    return sum_of_doubles<n / 2>(sums);
  }
}
GK_FN double sum_of(lane_f32 x) {
  typedef double all __attribute__((vector_size(8 * kLanes)));
  const all wide = __builtin_convertvector(x, all);
  double sums[kLanes];
  memcpy(sums, &wide, sizeof(all));
  return sum_of_doubles<kLanes>(sums);
}

// SiLU keeps the processor busy while the memory idles: meanwhile what is needed next comes to L2, as far as it fits there.
struct Fetch {
  const char* from;
  int64_t bytes;
  GK_FN void operator()(int64_t i) const { __builtin_prefetch(from + i * bytes, 0, 2); }
};
constexpr int64_t kFetched = 1 << 19;  // bytes

// One group of one sample. Its elements are numbered in memory order, [0, size()).
template <class S>
struct Group {
  using V = VectorOf<S>;
  const GroupNorm& job;
  int64_t index, sample, first_channel;

  Group(const GroupNorm& j, int64_t i)
      : job(j), index(i), sample(index / j.groups), first_channel(index % j.groups * j.channels_per_group()) {}

  int64_t size() const { return job.channels_per_group() * job.pixels; }
  int64_t in_sample(int64_t at) const { return first_channel * job.pixels + at; }
  int64_t row(int64_t channel) const { return sample * job.channels + first_channel + channel; }  // of (samples, channels)

  // f(tile's first element, number of elements)
  template <class F>
  void each_tile(const F& f) const {
    for (int64_t at = 0; at < size(); at += kGroupTile<S>) f(at, std::min(kGroupTile<S>, size() - at));
  }
  // f(channel of the group, start, count): the pieces of elements [at, at + n) that lie in one channel
  template <class F>
  void each_channel(int64_t at, int64_t n, const F& f) const {
    int64_t channel = at / job.pixels, left = (channel + 1) * job.pixels - at;
    for (int64_t i = 0; i < n; i += left, left = job.pixels, channel++) f(channel, i, std::min(left, n - i));
  }
  // f(array, start of the piece in a row of it, start in [0, n), count): the pieces that lie in x and in x2
  template <class F>
  void each_input(int64_t at, int64_t n, const Array& first, const Array& second, const F& f) const {
    const int64_t border = job.channels_of_x * job.pixels, from = in_sample(at);
    const int64_t in_first = std::max<int64_t>(0, std::min(n, border - from));
    if (in_first > 0) f(first, from, 0, in_first);
    if (in_first < n) f(second, from + in_first - border, in_first, n - in_first);
  }
  // Element `at` of the group after this one, if it is there.
  Fetch next(int64_t at, bool there) const {
    const Group of(job, index + there);
    const int64_t border = job.channels_of_x * job.pixels, from = of.in_sample(at);
    const Array& a = from < border ? job.x : job.x2;
    const int64_t bytes = element_bytes(a.storage), element = of.sample * a.row_stride + from - (from < border ? 0 : border);
    return {static_cast<const char*>(a.data) + element * bytes, size() * bytes <= kFetched ? bytes : 0};
  }
  // u = x + pre_bias at [at, at + n): in place where it lies so, else in the buffer
  const S* values(int64_t at, int64_t n, S* buffer) const {
    const S* v = nullptr;
    each_input(at, n, job.x, job.x2, [&](const Array& a, int64_t column, int64_t i, int64_t count) {
      const S* piece = read(a, sample, column, count, buffer + i);
      if (count == n)
        v = piece;
      else if (piece != buffer + i)
        std::copy(piece, piece + count, buffer + i);
    });
    if (v == nullptr) v = buffer;
    if (job.pre_bias.data == nullptr) return v;
    each_channel(at, n, [&](int64_t channel, int64_t start, int64_t count) {
      const V pre = splat<V>(number<S>(job.pre_bias, row(channel)));
      each_vector<V>(count,
                     [&](int64_t i, int k) GK_INLINE { store_part(buffer + start + i, load_part<V>(v + start + i, k) + pre, k); });
    });
    return buffer;
  }
};

template <class S>
Statistics<S> statistics_of(const Group<S>& group, S* buffer) {
  using V = VectorOf<S>;
  constexpr int kCount = Lane<V>::kCount;
  Moments all;
  group.each_tile([&](int64_t at, int64_t n) {
    const S* v = group.values(at, n, buffer);
    V sum[4] = {}, rest[4] = {}, square[4] = {};
    int64_t i = 0;
    for (; i + 4 * kCount <= n; i += 4 * kCount)
      for (int j = 0; j < 4; j++) sum[j] = sum[j] + load_ahead<V>(v + i + j * kCount);
    each_vector<V>(n - i, [&](int64_t at, int k) GK_INLINE { sum[0] = sum[0] + load_part<V>(v + i + at, k); });
    const V guess = splat<V>(sum_of((sum[0] + sum[1]) + (sum[2] + sum[3])) / static_cast<double>(n));
    for (i = 0; i + 4 * kCount <= n; i += 4 * kCount)
      for (int j = 0; j < 4; j++) {
        const V d = load<V>(v + i + j * kCount) - guess;
        rest[j] = rest[j] + d;
        square[j] = fma(d, d, square[j]);
      }
    each_vector<V>(n - i, [&](int64_t at, int k) GK_INLINE {
      const V d = keep_first(load_part<V>(v + i + at, k) - guess, k);
      rest[0] = rest[0] + d;
      square[0] = fma(d, d, square[0]);
    });
    const double count = static_cast<double>(n), left = sum_of((rest[0] + rest[1]) + (rest[2] + rest[3]));
    const double origin = sum_lanes(keep_first(guess, 1)), squares = sum_of((square[0] + square[1]) + (square[2] + square[3]));
    all.merge({count, origin + left / count, squares - left * left / count});
  });
  return {all, group.job.eps};
}

// run(begin, end) over the groups of all samples; a share holds at least this many elements
template <class F>
void over_groups(const GroupNorm& job, const F& run) {
  const int64_t size = job.channels_per_group() * job.pixels;
  torch::stable::parallel_for(0, job.samples * job.groups, std::max<int64_t>(1, 16 * kTile / size), run);
}

template <class S, bool kSilu>
void forward(const GroupNorm& job) {
  using V = VectorOf<S>;
  over_groups(job, [&](int64_t begin, int64_t end) {
    alignas(64) S buffer[kGroupTile<S>], out_buffer[kGroupTile<S>];
    const int64_t per_group = job.channels_per_group();
    Affine<S> affine(per_group);
    for (int64_t index = begin; index < end; index++) {
      const Group<S> group(job, index);
      const Statistics<S> s = statistics_of(group, buffer);
      const V centre = splat<V>(s.centre());
      affine.read_channels(job, group.sample, group.first_channel, per_group);
      affine.normalise(s, 0, per_group);
      group.each_tile([&](int64_t at, int64_t n) {
        const S* u = group.values(at, n, buffer);
        const Fetch next = group.next(at, index + 1 < end);
        S* out = place(job.y, group.sample, group.in_sample(at), out_buffer);
        group.each_channel(at, n, [&](int64_t channel, int64_t start, int64_t count) {
          const V a = splat<V>(affine.a[channel]), b = splat<V>(affine.b[channel]);
          each_vector<V>(count, [&](int64_t i, int k) GK_INLINE {
            __builtin_prefetch(out + start + i + kAhead, 1);
            if constexpr (kSilu) next(start + i);
            store_part(out + start + i, activated<kSilu>(fma(a, load_part<V>(u + start + i, k) - centre, b)), k);
          });
        });
        if (out == out_buffer) write(job.y, group.sample, group.in_sample(at), out, n);
      });
    }
  });
}

template <class S, bool kSilu>
void backward(const GroupNorm& job, const GroupNormGradients& d) {
  using V = VectorOf<S>;
  const int64_t rows = job.samples * job.channels, per_group = job.channels_per_group();
  double *const sum_dz = d.sums, *const sum_dz_xhat = d.sums + rows, *const sum_xhat = d.sums + 2 * rows;
  std::fill(d.sums, d.sums + 3 * rows, 0.0);
  // dz stands in the gradient of x until that is written, unless it is in two pieces or of another type.
  const bool in_place = kSilu && !d.x2.data && place<S>(d.x, 0, 0, nullptr) != nullptr;
  over_groups(job, [&](int64_t begin, int64_t end) {
    alignas(64) S buffer[kGroupTile<S>], grad_buffer[kGroupTile<S>], out[kGroupTile<S>];
    const bool keep = in_place || (kSilu && per_group * job.pixels <= kKept);
    std::vector<S> kept(static_cast<size_t>(keep && !in_place ? per_group * job.pixels : 0));
    Affine<S> affine(per_group);
    for (int64_t index = begin; index < end; index++) {
      const Group<S> group(job, index);
      const Statistics<S> s = statistics_of(group, buffer);
      affine.read_channels(job, group.sample, group.first_channel, per_group);
      affine.normalise(s, 0, per_group);
      S* const dz_of_group = in_place ? place<S>(d.x, group.sample, group.in_sample(0), nullptr) : kept.data();
      const V centre = splat<V>(s.centre()), rstd = splat<V>(s.rstd), offset = splat<V>(-s.rest() * s.rstd);
      const auto add_up = [&](auto with_xhat) {
        group.each_tile([&](int64_t at, int64_t n) {
          const S* u = group.values(at, n, buffer);
          const S* dy = read(d.grad, group.sample, group.in_sample(at), n, grad_buffer);
          const Fetch next = group.next(at, index + 1 < end);
          group.each_channel(at, n, [&](int64_t channel, int64_t start, int64_t count) {
            const V a = splat<V>(affine.a[channel]), b = splat<V>(affine.b[channel]);
            V total = {}, total_xhat = {}, total_of_xhat = {};
            each_vector<V>(count, [&](int64_t i, int k) GK_INLINE {
              if constexpr (kSilu) next(start + i);
              __builtin_prefetch(dy + start + i + kAhead);
              const V centred = keep_first(load_part<V>(u + start + i, k) - centre, k);
              const V dz = before_activation<kSilu>(load_part<V>(dy + start + i, k), fma(a, centred, b));
              const V xhat = keep_first(fma(centred, rstd, offset), k);
              if (keep) store_part(dz_of_group + at + start + i, dz, k);
              total = total + dz;
              total_xhat = fma(dz, xhat, total_xhat);
              if constexpr (with_xhat()) total_of_xhat = total_of_xhat + xhat;
            });
            const int64_t row = group.row(channel);
            sum_dz[row] += sum_of(total);
            sum_dz_xhat[row] += sum_of(total_xhat);
            if constexpr (with_xhat()) sum_xhat[row] += sum_of(total_of_xhat);
          });
        });
      };
      job.pre_bias.data ? add_up(std::true_type{}) : add_up(std::false_type{});
      const auto [mean_g, mean_g_xhat] = put_channel_gradients(job, d, s, affine, 0, group.row(0));
      const V p = splat<V>(s.rstd * mean_g), q = splat<V>(s.rstd * mean_g_xhat);
      group.each_tile([&](int64_t at, int64_t n) {
        const S* u = group.values(at, n, buffer);
        const S* dy = keep ? dz_of_group + at : read(d.grad, group.sample, group.in_sample(at), n, grad_buffer);
        group.each_channel(at, n, [&](int64_t channel, int64_t start, int64_t count) {
          const V a = splat<V>(affine.a[channel]), b = splat<V>(affine.b[channel]);
          const auto finish = [&](auto again) GK_INLINE {
            each_vector<V>(count, [&](int64_t i, int k) GK_INLINE {
              const V centred = load_part<V>(u + start + i, k) - centre, xhat = fma(centred, rstd, offset);
              V dz = load_part<V>(dy + start + i, k);
              if constexpr (again()) dz = before_activation<kSilu>(dz, fma(a, centred, b));
              store_part(out + start + i, fma(a, dz, -p) - q * xhat, k);  // rstd (g - mean_g - mean_g_xhat xhat)
            });
          };
          keep ? finish(std::false_type{}) : finish(std::true_type{});
        });
        group.each_input(at, n, d.x, d.x2, [&](const Array& to, int64_t column, int64_t i, int64_t count) {
          S* direct = place(to, group.sample, column, out + i);
          if (direct != out + i)
            std::copy(out + i, out + i + count, direct);
          else
            write(to, group.sample, column, out + i, count);
        });
      });
    }
  });
  put_parameter_gradients<S>(job, d);
}

struct OnCpu {
  static constexpr int kChannelDim = 1;
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
  m.impl("_group_norm_act", TORCH_BOX(&group_norm_act<OnCpu>));
  m.impl("_group_norm_act_out", TORCH_BOX(&group_norm_act_out<OnCpu>));
  m.impl("_group_norm_act_backward", TORCH_BOX(&group_norm_act_backward<OnCpu>));
}

}  // namespace gk
