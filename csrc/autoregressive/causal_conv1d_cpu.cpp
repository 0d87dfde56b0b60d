// causal_conv1d, depthwise, on the CPU: y[t] = silu(bias + sum_k weight[k] x[t - (K - 1 - k) dilation]) and its gradients.
//
// Up to four neighbouring taps are rotated in registers: one load serves all of them, and the gradient of x is written one vector
// late, when the gradients ahead of it are known. Other kernels, and sequence indices, read a row that was copied behind its state.
// A unit of work is a row forward and a channel backward, so sums do not depend on the number of threads.
#include <utility>

#include "causal_conv1d.h"
#include "silu.h"

namespace gk {
namespace {

constexpr int64_t kFlush = 128;  // vectors summed in float before the total continues in double

struct Job {
  int64_t samples, channels, time, taps, dilation;
  bool silu;
  Sequences x, state, y, d_x, d_state;  // y: the output, or its gradient
  Array weight, bias{}, d_weight{}, d_bias{};
  const int32_t* seq = nullptr;  // (N, L)
  int64_t history() const { return (taps - 1) * dilation; }
};

// ---- rotation: elements t - back of (previous, current), and t + ahead of (current, next)

template <int shift, int... i>
GK_FN lane_f32 window(lane_f32 a, lane_f32 b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, (i + shift)...);
}
template <int back>
GK_FN lane_f32 delayed(lane_f32 current, lane_f32 previous) {
  return window<kLanes - back>(previous, current, std::make_integer_sequence<int, kLanes>());
}
template <int ahead>
GK_FN lane_f32 advanced(lane_f32 current, lane_f32 next) {
  return window<ahead>(current, next, std::make_integer_sequence<int, kLanes>());
}
template <int K, int... k>
GK_FN void taps_of(lane_f32 current, lane_f32 previous, lane_f32* tap, std::integer_sequence<int, k...>) {
  ((tap[k] = delayed<K - 1 - k>(current, previous)), ...);
}
template <int K, int... k>
GK_FN lane_f32 input_gradient(const lane_f32* w, lane_f32 h, lane_f32 next, std::integer_sequence<int, k...>) {
  lane_f32 d = {};
  ((d = fma(w[k], advanced<K - 1 - k>(h, next), d)), ...);
  return d;
}

template <int K>
struct Rotating {
  using Taps = std::make_integer_sequence<int, K>;
  lane_f32 w[K], bias, previous;

  Rotating(const float* weight, float b, const float* state) : bias(splat<lane_f32>(b)), previous{} {
    for (int k = 0; k < K; k++) w[k] = splat<lane_f32>(weight[k]);
    if (state)
      for (int i = 0; i < K - 1; i++) previous[kLanes - (K - 1) + i] = state[i];
  }
  GK_FN lane_f32 step(lane_f32 current, lane_f32* tap) {
    taps_of<K>(current, previous, tap, Taps());
    previous = current;
    lane_f32 a = bias;
    for (int k = 0; k < K; k++) a = fma(w[k], tap[k], a);
    return a;
  }
};

template <int K, bool kSilu>
void rotate_forward(const float* x, const float* weight, float bias, const float* state, float* y, int64_t time) {
  Rotating<K> conv(weight, bias, state);
  lane_f32 tap[K];
  const auto out = [&](lane_f32 current) __attribute__((always_inline)) {
    const lane_f32 a = conv.step(current, tap);
    return kSilu ? silu(a) : a;
  };
  int64_t t = 0;
  for (; t + kLanes <= time; t += kLanes) {
    __builtin_prefetch(x + t + kAhead), __builtin_prefetch(y + t + kAhead, 1);
    store(y + t, out(load<lane_f32>(x + t)));
  }
  const int rest = static_cast<int>(time - t);
  if (rest) store_first(y + t, out(load_first(x + t, rest, lane_f32{})), rest);
}

// sums: K of the weight, then that of the bias.
template <int K, bool kSilu>
void rotate_backward(const float* x, const float* grad, const float* weight, float bias, const float* state, float* d_x,
                     float* d_state, double* sums, int64_t time) {
  using Taps = std::make_integer_sequence<int, K>;
  Rotating<K> conv(weight, bias, state);
  lane_f32 tap[K], total[K + 1] = {}, last = {}, first = {};
  const auto step = [&](int64_t t, lane_f32 current, lane_f32 h, int count) __attribute__((always_inline)) {
    const lane_f32 a = conv.step(current, tap);
    if (kSilu) h = h * silu_derivative(a);
    if (count < kLanes) h = keep_first(h, count);
    for (int k = 0; k < K; k++) total[k] = fma(h, tap[k], total[k]);
    total[K] = total[K] + h;
    if (t)
      store(d_x + t - kLanes, input_gradient<K>(conv.w, last, h, Taps()));
    else
      first = h;
    last = h;
  };
  const auto flush = [&] {
    for (int k = 0; k <= K; k++) sums[k] += sum_lanes(total[k]), total[k] = lane_f32{};
  };
  int64_t t = 0;
  for (; t + kLanes <= time; t += kLanes) {
    __builtin_prefetch(x + t + kAhead), __builtin_prefetch(grad + t + kAhead), __builtin_prefetch(d_x + t + kAhead, 1);
    step(t, load<lane_f32>(x + t), load<lane_f32>(grad + t), kLanes);
    if ((t / kLanes + 1) % kFlush == 0) flush();
  }
  const int rest = static_cast<int>(time - t);
  if (rest) step(t, load_first(x + t, rest, lane_f32{}), load_first(grad + t, rest, lane_f32{}), rest), t += kLanes;
  flush();
  if (time) store_first(d_x + t - kLanes, input_gradient<K>(conv.w, last, lane_f32{}, Taps()), rest ? rest : kLanes);
  if (d_state)
    for (int i = 0; i < K - 1; i++) {
      float d = 0;
      for (int k = 0; k <= i; k++) d += weight[k] * first[i - k];
      d_state[i] = d;
    }
}

// ---- numbers of an array as S, and back; into one that is absent none go

template <class S>
void take(const Array& from, int64_t at, int64_t count, S* to) {
  const S* got = read(from, 0, at, count, to);
  if (got != to) std::copy(got, got + count, to);
}
template <class S>
void put(const Array& to, int64_t at, const S* values, int64_t count) {
  S* out = place(to, 0, at, const_cast<S*>(values));
  if (out != values)
    std::copy(values, values + count, out);
  else
    write(to, 0, at, values, count);
}

// ---- any number of taps, any dilation, sequence indices, float64

template <class S>
struct Padded {  // buffers of one row with room for whole vectors past its end
  using V = typename Vector<S>::type;
  using I = typename Lane<S>::Int;
  const Job& job;
  std::vector<S> x, h, out;  // x: state, then the row; h: the gradient before the activation between two histories of zeros
  std::vector<I> seq;        // that of the state is the first one

  explicit Padded(const Job& j) : job(j) {
    const size_t room = static_cast<size_t>(j.time + 2 * j.history() + kLanes);
    x.resize(room), h.resize(room), out.resize(room);
    if (j.seq) seq.resize(room);
  }
  void read_row(int64_t n, int64_t c) {
    const int64_t past = job.history();
    if (job.state.array.data) take(job.state.array, job.state.at(n, c), past, x.data());
    take(job.x.array, job.x.at(n, c), job.time, x.data() + past);
    for (int64_t i = 0; job.seq && i < past + job.time; i++) seq[i] = job.seq[n * job.time + std::max<int64_t>(0, i - past)];
  }
  static typename Lane<V>::Int load_int(const I* p) {
    typename Lane<V>::Int v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  GK_FN V tap(int64_t t, int64_t k) const {  // that of weight k for output t; none from another sequence
    const V value = load<V>(x.data() + t + k * job.dilation);
    if (!job.seq) return value;
    return load_int(seq.data() + t + k * job.dilation) == load_int(seq.data() + t + job.history()) ? value : V{};
  }
  GK_FN V drop_padding(int64_t t, V value) const {  // where the index is negative
    if (!job.seq) return value;
    return load_int(seq.data() + t + job.history()) < 0 ? V{} : value;
  }
  GK_FN V before_activation(int64_t t, const S* weight, S bias) const {
    V a = splat<V>(bias);
    for (int64_t k = 0; k < job.taps; k++) a = fma(splat<V>(weight[k]), tap(t, k), a);
    return a;
  }

  void forward(const S* weight, S bias) {
    for (int64_t t = 0; t < job.time; t += Lane<V>::kCount) {
      const V a = before_activation(t, weight, bias);
      store(out.data() + t, drop_padding(t, job.silu ? silu(a) : a));
    }
  }
  // h holds the gradient of y behind a history of zeros; out becomes that of the state followed by that of x.
  void backward(const S* weight, S bias, double* sums) {
    const int64_t past = job.history();
    constexpr int kCount = Lane<V>::kCount;
    for (int64_t t = 0; t < job.time; t += kCount) {
      V g = load<V>(h.data() + past + t);
      if (job.silu) g = g * silu_derivative(before_activation(t, weight, bias));
      g = keep_first(drop_padding(t, g), static_cast<int>(std::min<int64_t>(kCount, job.time - t)));
      store(h.data() + past + t, g);
    }
    for (int64_t k = 0; k <= job.taps; k++) {
      V total = {};
      int64_t summed = 0;
      for (int64_t t = 0; t < job.time; t += kCount) {
        const V g = load<V>(h.data() + past + t);
        total = k < job.taps ? fma(g, tap(t, k), total) : total + g;
        if (++summed % kFlush == 0) sums[k] += sum_lanes(total), total = V{};
      }
      sums[k] += sum_lanes(total);
    }
    for (int64_t i = 0; i < past + job.time; i += kCount) {
      V d = {};
      for (int64_t k = 0; k < job.taps; k++) {
        V g = load<V>(h.data() + past + i - k * job.dilation);  // of output i - k * dilation
        if (job.seq) g = same_sequence(i, i - k * job.dilation) ? g : V{};
        d = fma(splat<V>(weight[k]), g, d);
      }
      store(out.data() + i, d);
    }
  }
  GK_FN typename Lane<V>::Int same_sequence(int64_t i, int64_t t) const {  // of padded element i and output t, zero where t < 0
    typename Lane<V>::Int same = {};
    if constexpr (Lane<V>::kCount == 1)
      return t >= 0 && t < job.time && seq[i] == seq[t + job.history()];
    else
      for (int j = 0; j < kLanes; j++)
        same[j] = t + j >= 0 && t + j < job.time && seq[i + j] == seq[t + j + job.history()] ? -1 : 0;
    return same;
  }
};

// ---- rows

template <class S>
S bias_of(const Job& job, int64_t c) {
  S one;
  return job.bias.data ? *read(job.bias, 0, c, 1, &one) : S{};
}

template <class F>
void with_taps(const Job& job, F&& f) {
  const auto with = [&](auto taps) {
    if (job.silu)
      f(taps, std::true_type());
    else
      f(taps, std::false_type());
  };
  switch (job.taps) {
    case 1:
      return with(std::integral_constant<int, 1>());
    case 2:
      return with(std::integral_constant<int, 2>());
    case 3:
      return with(std::integral_constant<int, 3>());
    case 4:
      return with(std::integral_constant<int, 4>());
  }
}
template <class S>
bool rotates(const Job& job) {
  return sizeof(S) == 4 && job.taps <= 4 && job.dilation == 1 && !job.seq;
}
int64_t grain(const Job& job, int64_t rows) {  // units of work that are worth a thread
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, (job.time + kLanes) * rows));
}

template <class S>
void forward(const Job& job) {
  torch::stable::parallel_for(0, job.samples * job.channels, grain(job, 1), [&](int64_t begin, int64_t end) {
    std::vector<S> w(static_cast<size_t>(job.taps)), past(static_cast<size_t>(job.history() + 1));
    const bool rotating = rotates<S>(job);
    std::optional<Padded<S>> padded;
    std::vector<S> in, out;
    if (!rotating) padded.emplace(job);
    if (rotating && job.x.array.storage != Storage::kFloat) in.resize(job.time);
    if (rotating && job.y.array.storage != Storage::kFloat) out.resize(job.time);
    for (int64_t row = begin; row < end; row++) {
      const int64_t n = row / job.channels, c = row % job.channels;
      const S* weight = read(job.weight, 0, c * job.taps, job.taps, w.data());
      const S bias = bias_of<S>(job, c);
      if (!rotating) {
        padded->read_row(n, c);
        padded->forward(weight, bias);
        put(job.y.array, job.y.at(n, c), padded->out.data(), job.time);
        continue;
      }
      if constexpr (sizeof(S) == 4) {
        const float* x = read(job.x.array, 0, job.x.at(n, c), job.time, in.data());
        float* y = place(job.y.array, 0, job.y.at(n, c), out.data());
        const float* state =
            job.state.array.data ? read(job.state.array, 0, job.state.at(n, c), job.history(), past.data()) : nullptr;
        with_taps(job, [&](auto taps, auto act) { rotate_forward<taps(), act()>(x, weight, bias, state, y, job.time); });
        if (y == out.data()) write(job.y.array, 0, job.y.at(n, c), y, job.time);
      }
    }
  });
}

template <class S>
void backward(const Job& job) {
  torch::stable::parallel_for(0, job.channels, grain(job, job.samples), [&](int64_t begin, int64_t end) {
    std::vector<S> w(static_cast<size_t>(job.taps)), past(static_cast<size_t>(job.history() + 1)), d_past(past.size()), in, grads,
        d_in;
    std::vector<double> sums(static_cast<size_t>(job.taps + 1));
    std::vector<S> narrow(sums.size());
    const bool rotating = rotates<S>(job);
    std::optional<Padded<S>> padded;
    if (rotating)
      in.resize(job.time), grads.resize(job.time), d_in.resize(job.time);
    else
      padded.emplace(job);
    for (int64_t c = begin; c < end; c++) {
      const S* weight = read(job.weight, 0, c * job.taps, job.taps, w.data());
      const S bias = bias_of<S>(job, c);
      std::fill(sums.begin(), sums.end(), 0.0);
      for (int64_t n = 0; n < job.samples; n++) {
        if (!rotating) {
          const int64_t history = job.history();
          padded->read_row(n, c);
          take(job.y.array, job.y.at(n, c), job.time, padded->h.data() + history);
          padded->backward(weight, bias, sums.data());
          put(job.d_x.array, job.d_x.at(n, c), padded->out.data() + history, job.time);
          put(job.d_state.array, job.d_state.at(n, c), padded->out.data(), history);
          continue;
        }
        if constexpr (sizeof(S) == 4) {
          const float* x = read(job.x.array, 0, job.x.at(n, c), job.time, in.data());
          const float* grad = read(job.y.array, 0, job.y.at(n, c), job.time, grads.data());
          float* d_x = place(job.d_x.array, 0, job.d_x.at(n, c), d_in.data());
          const bool stateful = job.state.array.data;
          const float* state = stateful ? read(job.state.array, 0, job.state.at(n, c), job.history(), past.data()) : nullptr;
          float* d_state = stateful ? d_past.data() : nullptr;
          with_taps(job, [&](auto taps, auto act) {
            rotate_backward<taps(), act()>(x, grad, weight, bias, state, d_x, d_state, sums.data(), job.time);
          });
          if (d_x == d_in.data()) write(job.d_x.array, 0, job.d_x.at(n, c), d_x, job.time);
          if (stateful) put(job.d_state.array, job.d_state.at(n, c), d_state, job.history());
        }
      }
      for (size_t k = 0; k < sums.size(); k++) narrow[k] = static_cast<S>(sums[k]);
      put(job.d_weight, c * job.taps, narrow.data(), job.taps);
      put(job.d_bias, c, narrow.data() + job.taps, 1);
    }
  });
}

// ---- tensors. x (N, C, L), weight (C, K), bias (C), initial_state (N, C, (K - 1) dilation), seq_idx (N, L); the small ones
// contiguous

Job job_of(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const MaybeTensor& state, const MaybeTensor& seq_idx,
           int64_t dilation, bool silu) {
  Job job{x.size(0), x.size(1), x.size(2), weight.size(1), dilation, silu, Sequences(x), {}, {}, {}, {}, flat(weight)};
  if (bias) job.bias = flat(*bias);
  if (state && job.history()) job.state = Sequences(*state);
  if (seq_idx) job.seq = static_cast<const int32_t*>(seq_idx->data_ptr());
  return job;
}

void causal_conv1d_out(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor state, MaybeTensor seq_idx, int64_t dilation,
                       bool silu, Tensor y) {  // the elements of a row of y lie side by side
  if (y.numel() == 0) return;
  Job job = job_of(x, weight, bias, state, seq_idx, dilation, silu);
  job.y = Sequences(y);
  if (y.scalar_type() == ScalarType::Double)
    forward<double>(job);
  else
    forward<float>(job);
}

Tensor causal_conv1d(Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor state, MaybeTensor seq_idx, int64_t dilation,
                     bool silu) {
  Tensor y = new_tensor(x, x.sizes(), conv_type(x, weight, bias, state));
  causal_conv1d_out(x, weight, bias, state, seq_idx, dilation, silu, y);
  return y;
}

std::vector<Tensor> causal_conv1d_backward(Tensor grad, Tensor x, Tensor weight, MaybeTensor bias, MaybeTensor state,
                                           MaybeTensor seq_idx, int64_t dilation, bool silu) {
  std::vector<Tensor> gradients{new_tensor(x, x.sizes()), new_tensor(weight, weight.sizes())};
  Job job = job_of(x, weight, bias, state, seq_idx, dilation, silu);
  job.y = Sequences(grad);
  job.d_x = Sequences(gradients[0]);
  job.d_weight = flat(gradients[1]);
  if (bias) gradients.push_back(new_tensor(*bias, bias->sizes())), job.d_bias = flat(gradients.back());
  if (state) {
    gradients.push_back(new_tensor(*state, state->sizes()));
    if (job.history()) job.d_state = Sequences(gradients.back());
  }
  if (grad.scalar_type() == ScalarType::Double)
    backward<double>(job);
  else
    backward<float>(job);
  return gradients;
}

// ---- causal_conv1d_update: a few steps. Lanes hold channels; columns of the state and of x are gathered side by side.

struct StepJob {
  int64_t samples, channels, time, taps, dilation, length;  // length: of the state
  bool silu;
  Array x, state, y, weight, bias{};
  int64_t x_stride[3], state_stride[3], y_stride[3];  // of sample, channel, time
  const int32_t* indices = nullptr;                   // of states; negative: no request
};

template <class S>  // values of `count` neighbouring channels
void gather(const Array& a, int64_t at, int64_t stride, int count, S* to) {
  if (stride == 1) {
    take(a, at, count, to);
  } else if (a.storage == kStorage<S>) {
    const S* from = static_cast<const S*>(a.data) + at;
    for (int i = 0; i < count; i++) to[i] = from[i * stride];
  } else {
    for (int i = 0; i < count; i++) take(a, at + i * stride, 1, to + i);
  }
}
template <class S>
void scatter(const Array& a, int64_t at, int64_t stride, int count, const S* from) {
  if (stride == 1) {
    put(a, at, from, count);
  } else if (a.storage == kStorage<S>) {
    S* to = static_cast<S*>(a.data) + at;
    for (int i = 0; i < count; i++) to[i * stride] = from[i];
  } else {
    for (int i = 0; i < count; i++) put(a, at + i * stride, from + i, 1);
  }
}

// Three neighbours of every lane, a[m] the m-th vector in memory: element j of column i is element 3 j + i, and back.
template <int i, int... j>
GK_FN lane_f32 column_of_three(const lane_f32* a, std::integer_sequence<int, j...>) {
  const lane_f32 low = __builtin_shufflevector(a[0], a[1], (3 * j + i < 2 * kLanes ? 3 * j + i : 0)...);
  return __builtin_shufflevector(low, a[2], (3 * j + i < 2 * kLanes ? j : 3 * j + i - kLanes)...);
}
template <int m, int... q>
GK_FN lane_f32 vector_of_three(const lane_f32* column, std::integer_sequence<int, q...>) {
  constexpr int first = m * kLanes;
  const lane_f32 two = __builtin_shufflevector(column[0], column[1], ((first + q) / 3 + ((first + q) % 3 == 1 ? kLanes : 0))...);
  return __builtin_shufflevector(two, column[2], ((first + q) % 3 < 2 ? q : kLanes + (first + q) / 3)...);
}

// Four neighbours of every lane: element j of the result is element 4 j + i of the vectors a.
template <int i, int... j>
GK_FN lane_f32 column_of_four(const lane_f32* a, std::integer_sequence<int, j...>) {
  const lane_f32 low = __builtin_shufflevector(a[0], a[1], (j < kLanes / 2 ? 4 * j + i : 0)...);
  const lane_f32 high = __builtin_shufflevector(a[2], a[3], (j < kLanes / 2 ? 4 * j + i : 0)...);
  return __builtin_shufflevector(low, high, (j < kLanes / 2 ? j : kLanes / 2 + j)...);
}
GK_FN void weights_of_four(const float* weight, float* to) {  // (kLanes, 4) to (4, kLanes)
  using Lanes = std::make_integer_sequence<int, kLanes>;
  lane_f32 a[4];
  for (int m = 0; m < 4; m++) a[m] = load<lane_f32>(weight + m * kLanes);
  store(to, column_of_four<0>(a, Lanes()));
  store(to + kLanes, column_of_four<1>(a, Lanes()));
  store(to + 2 * kLanes, column_of_four<2>(a, Lanes()));
  store(to + 3 * kLanes, column_of_four<3>(a, Lanes()));
}

// Four neighbours of every lane become the last three and x: vector m of them.
template <int m, int... q>
GK_FN lane_f32 shifted_four(lane_f32 a, lane_f32 x, std::integer_sequence<int, q...>) {
  return __builtin_shufflevector(a, x, (q % 4 < 3 ? q + 1 : kLanes + (m * kLanes + q) / 4)...);
}

// One step of a whole vector of channels, four taps, the state of a channel side by side: the step of state space models. Of four
// columns the oldest is no input of the step.
template <int columns>
GK_FN void step_of_four(const float* x, float* state, const float* w, float* y, bool activate) {
  using Lanes = std::make_integer_sequence<int, kLanes>;
  lane_f32 memory[columns], tap[4];
  for (int m = 0; m < columns; m++) memory[m] = load<lane_f32>(state + m * kLanes);
  tap[3] = load<lane_f32>(x);
  if constexpr (columns == 4) {
    memory[0] = shifted_four<0>(memory[0], tap[3], Lanes()), memory[1] = shifted_four<1>(memory[1], tap[3], Lanes());
    memory[2] = shifted_four<2>(memory[2], tap[3], Lanes()), memory[3] = shifted_four<3>(memory[3], tap[3], Lanes());
    tap[0] = column_of_four<0>(memory, Lanes()), tap[1] = column_of_four<1>(memory, Lanes());
    tap[2] = column_of_four<2>(memory, Lanes());
  } else {
    tap[0] = column_of_three<0>(memory, Lanes()), tap[1] = column_of_three<1>(memory, Lanes());
    tap[2] = column_of_three<2>(memory, Lanes());
    memory[0] = vector_of_three<0>(tap + 1, Lanes()), memory[1] = vector_of_three<1>(tap + 1, Lanes());
    memory[2] = vector_of_three<2>(tap + 1, Lanes());
  }
  lane_f32 a = load<lane_f32>(w + 4 * kLanes);
  for (int k = 0; k < 4; k++) a = fma(load<lane_f32>(w + k * kLanes), tap[k], a);
  store(y, activate ? silu(a) : a);
  for (int m = 0; m < columns; m++) store(state + m * kLanes, memory[m]);
}

constexpr int64_t kSpan = 16 * kLanes;  // channels whose weights are taken apart at once, for all samples

// Whole vectors of channels, at most a span.
template <int columns>
void steps_of_four(const StepJob& job, int64_t x_at, int64_t state_at, int64_t y_at, int64_t channels, const float* w) {
  float x_buffer[kSpan], state_buffer[columns * kSpan], y_buffer[kSpan];
  const float* x = read(job.x, 0, x_at, channels, x_buffer);
  float *state = place(job.state, 0, state_at, state_buffer), *y = place(job.y, 0, y_at, y_buffer);
  if (state == state_buffer) read(job.state, 0, state_at, columns * channels, state_buffer);
  for (int64_t c = 0; c < channels; c += kLanes) step_of_four<columns>(x + c, state + columns * c, w + 5 * c, y + c, job.silu);
  if (state == state_buffer) write(job.state, 0, state_at, state, columns * channels);
  if (y == y_buffer) write(job.y, 0, y_at, y, channels);
}

// Weights and biases of the channels from `first` to `last`: to [vector][tap, then bias][lane].
template <class S>
void take_weights(const StepJob& job, int64_t first, int64_t last, S* to) {
  constexpr int kCount = Lane<typename Vector<S>::type>::kCount;
  for (int64_t c = first; c < last; c += kCount, to += (job.taps + 1) * kCount) {
    const int count = static_cast<int>(std::min<int64_t>(kCount, last - c));
    bool done = false;
    if constexpr (sizeof(S) == 4)
      if ((done = job.taps == 4 && count == kCount)) {
        float buffer[4 * kCount];
        weights_of_four(read(job.weight, 0, c * 4, 4 * kCount, buffer), to);
      }
    for (int64_t k = 0; k < job.taps && !done; k++) gather(job.weight, c * job.taps + k, job.taps, count, to + k * kCount);
    if (job.bias.data) gather(job.bias, c, 1, count, to + job.taps * kCount);
  }
}

template <class S>
void steps(const StepJob& job) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int64_t columns = job.length + job.time, spans = (job.channels + kSpan - 1) / kSpan;
  const bool of_four = sizeof(S) == 4 && job.taps == 4 && (job.length == 3 || job.length == 4) && job.dilation == 1 &&
                       job.time == 1 && job.state_stride[1] == job.length && job.state_stride[2] == 1 && job.x_stride[1] == 1 &&
                       job.y_stride[1] == 1;
  const int64_t grain = std::max<int64_t>(1, 16384 / (columns * std::min(kSpan, job.channels)));
  torch::stable::parallel_for(0, spans * job.samples, grain, [&](int64_t begin, int64_t end) {
    std::vector<S> weights(static_cast<size_t>((job.taps + 1) * kSpan));  // [vector][tap, then bias][lane]
    std::vector<S> window(static_cast<size_t>(columns * kCount)), out(static_cast<size_t>(kCount));
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t n = unit % job.samples, first = unit / job.samples * kSpan, last = std::min(first + kSpan, job.channels);
      if (unit == begin || n == 0) take_weights(job, first, last, weights.data());
      const int64_t slot = job.indices ? job.indices[n] : n;
      const S* w = weights.data();
      const auto x_at = [&](int64_t c) { return n * job.x_stride[0] + c * job.x_stride[1]; };
      const auto y_at = [&](int64_t c) { return n * job.y_stride[0] + c * job.y_stride[1]; };
      const auto state_at = [&](int64_t c) { return slot * job.state_stride[0] + c * job.state_stride[1]; };
      int64_t c = first;
      if constexpr (sizeof(S) == 4)
        if (of_four && slot >= 0) {
          const int64_t whole = (last - first) / kCount * kCount;
          (job.length == 3 ? steps_of_four<3> : steps_of_four<4>)(job, x_at(c), state_at(c), y_at(c), whole, w);
          c += whole, w += 5 * whole;
        }
      for (; c < last; c += kCount, w += (job.taps + 1) * kCount) {
        const int count = static_cast<int>(std::min<int64_t>(kCount, last - c));
        if (slot < 0) {
          std::fill(out.begin(), out.end(), S{});
          for (int64_t t = 0; t < job.time; t++) scatter(job.y, y_at(c) + t * job.y_stride[2], job.y_stride[1], count, out.data());
          continue;
        }
        for (int64_t i = 0; i < job.length; i++)
          gather(job.state, state_at(c) + i * job.state_stride[2], job.state_stride[1], count, window.data() + i * kCount);
        for (int64_t t = 0; t < job.time; t++)
          gather(job.x, x_at(c) + t * job.x_stride[2], job.x_stride[1], count, window.data() + (job.length + t) * kCount);
        const S* oldest = window.data() + (job.length - (job.taps - 1) * job.dilation) * kCount;
        for (int64_t t = 0; t < job.time; t++) {
          V a = load<V>(w + job.taps * kCount);
          for (int64_t k = 0; k < job.taps; k++)
            a = fma(load<V>(w + k * kCount), load<V>(oldest + (t + k * job.dilation) * kCount), a);
          store(out.data(), job.silu ? silu(a) : a);
          scatter(job.y, y_at(c) + t * job.y_stride[2], job.y_stride[1], count, out.data());
        }
        for (int64_t i = 0; i < job.length; i++)
          scatter(job.state, state_at(c) + i * job.state_stride[2], job.state_stride[1], count,
                  window.data() + (job.time + i) * kCount);
      }
    }
  });
}

Tensor causal_conv1d_update(Tensor x, Tensor state, Tensor weight, MaybeTensor bias, MaybeTensor indices, int64_t dilation,
                            bool silu) {
  const ScalarType type = conv_type(x, weight, bias, {});
  Tensor y = new_tensor(x, x.sizes(), type);
  if (y.numel() == 0) return y;
  StepJob job{x.size(0), x.size(1), x.size(2),   weight.size(1), dilation,    state.size(2),
              silu,      flat(x),   flat(state), flat(y),        flat(weight)};
  for (int d = 0; d < 3; d++) job.x_stride[d] = x.stride(d), job.state_stride[d] = state.stride(d), job.y_stride[d] = y.stride(d);
  if (bias) job.bias = flat(*bias);
  if (indices) job.indices = static_cast<const int32_t*>(indices->data_ptr());
  if (type == ScalarType::Double)
    steps<double>(job);
  else
    steps<float>(job);
  return y;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_causal_conv1d", TORCH_BOX(&causal_conv1d));
  m.impl("_causal_conv1d_out", TORCH_BOX(&causal_conv1d_out));
  m.impl("_causal_conv1d_backward", TORCH_BOX(&causal_conv1d_backward));
  m.impl("_causal_conv1d_update", TORCH_BOX(&causal_conv1d_update));
}

}  // namespace gk
