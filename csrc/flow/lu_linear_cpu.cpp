// lu_linear: y = L U x + b for rows of few numbers, its inverse and the gradients of both. kLanes rows side by side.
#include "rows.h"
#include "transpose.h"

namespace gk {
namespace {

constexpr int kMost = 32;                // features; the lanes and the gradient's sums of a group stay in the first caches
constexpr int64_t kGroupsTogether = 64;  // groups of rows whose gradients are summed in lanes before the total continues in double

template <class S>
struct Factors {
  int n;
  S matrix[kMost * kMost];  // L below the diagonal, U on it and above
  S bias[kMost];
  double log_abs_det = 0;

  Factors(const Tensor& lower, const Tensor& upper, const Tensor& diagonal, const Tensor& b) : n(static_cast<int>(b.size(0))) {
    STD_TORCH_CHECK(n <= kMost, "lu_linear: too many features for the kernel");
    const S *below = data(lower), *above = data(upper), *middle = data(diagonal);
    std::copy_n(data(b), n, bias);
    for (int i = 0; i < n; i++) {
      for (int j = 0; j < i; j++) matrix[i * n + j] = *below++;
      for (int j = i + 1; j < n; j++) matrix[i * n + j] = *above++;
      matrix[i * n + i] = middle[i];
      log_abs_det += std::log(std::abs(static_cast<double>(middle[i])));
    }
  }
  static const S* data(const Tensor& x) { return static_cast<const S*>(x.data_ptr()); }

  // v = T v, or T^-1 v, in place; T is L or U, or transposed (L^T is an upper triangle, U^T a lower one).
  template <bool kSolve, class V>
  GK_FN void apply(bool is_l, bool transposed, V* v) const {
    const bool lower = is_l != transposed, ascending = lower == kSolve;
    const int down = transposed ? 1 : n, along = transposed ? n : 1;
    for (int step = 0; step < n; step++) {
      const int i = ascending ? step : n - 1 - step;
      V sum{};
      for (int j = lower ? 0 : i + 1; j < (lower ? i : n); j++) sum = fma(splat<V>(matrix[i * down + j * along]), v[j], sum);
      const V own = splat<V>(is_l ? 1 : matrix[i * n + i]);
      v[i] = kSolve ? (v[i] - sum) / own : fma(v[i], own, sum);
    }
  }
  template <bool kInverse, class V>
  GK_FN void add_bias(V* v) const {
    for (int i = 0; i < n; i++) v[i] = kInverse ? v[i] - splat<V>(bias[i]) : v[i] + splat<V>(bias[i]);
  }
};

template <class S, bool kInverse>
void forward(const Factors<S>& f, int64_t rows, const S* x, S* y) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  torch::stable::parallel_for(0, (rows + kCount - 1) / kCount, kGroupsTogether, [&](int64_t begin, int64_t end) {
    V v[kMost];
    for (int64_t first = begin * kCount; first < std::min(end * kCount, rows); first += kCount) {
      const int count = static_cast<int>(std::min<int64_t>(kCount, rows - first));
      load_columns(x + first * f.n, f.n, count, f.n, v);
      if (kInverse) f.template add_bias<kInverse>(v);
      f.template apply<kInverse>(kInverse, false, v);
      f.template apply<kInverse>(!kInverse, false, v);
      if (!kInverse) f.template add_bias<kInverse>(v);
      store_columns(y + first * f.n, f.n, count, f.n, v);
    }
  });
}

// With y = L a + b and a = U x, q = L^T p and the gradients p of y and U^T q of x: p a^T is that of L, q x^T that of U. Of the
// inverse the same numbers in another order: p = L^-T q and q = U^-T of the gradient of x, all with the other sign. The sums over
// rows, like `matrix`, then those of p.
template <class S, bool kInverse>
std::vector<double> backward(const Factors<S>& f, int64_t rows, const S* in, const S* grad, S* d_in) {
  using V = typename Vector<S>::type;
  constexpr int kCount = Lane<V>::kCount;
  const int n = f.n;
  const int64_t groups = (rows + kCount - 1) / kCount, parts = (groups + kGroupsTogether - 1) / kGroupsTogether;
  std::vector<double> sums(parts * n * (n + 1));
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      V total[kMost * (kMost + 1)]{}, a[kMost], x[kMost], p[kMost], q[kMost];
      const int64_t stop = std::min((part + 1) * kGroupsTogether * kCount, rows);
      for (int64_t first = part * kGroupsTogether * kCount; first < stop; first += kCount) {
        const int count = static_cast<int>(std::min<int64_t>(kCount, rows - first));
        load_columns(in + first * n, n, count, n, x);
        load_columns(grad + first * n, n, count, n, q);
        for (int i = 0; i < n; i++) q[i] = keep_first(q[i], count);
        if constexpr (kInverse) {
          f.template add_bias<true>(x);
          f.template apply<true>(true, false, x);
          std::copy_n(x, n, a);
          f.template apply<true>(false, false, x);
          f.template apply<true>(false, true, q);
          std::copy_n(q, n, p);
          f.template apply<true>(true, true, p);
          store_columns(d_in + first * n, n, count, n, p);
        } else {
          std::copy_n(x, n, a);
          f.template apply<false>(false, false, a);
          std::copy_n(q, n, p);
          f.template apply<false>(true, true, q);
          V d[kMost];
          std::copy_n(q, n, d);
          f.template apply<false>(false, true, d);
          store_columns(d_in + first * n, n, count, n, d);
        }
        for (int i = 0; i < n; i++) {
          for (int j = 0; j < i; j++) total[i * n + j] = fma(p[i], a[j], total[i * n + j]);
          for (int j = i; j < n; j++) total[i * n + j] = fma(q[i], x[j], total[i * n + j]);
          total[n * n + i] = total[n * n + i] + p[i];
        }
      }
      for (int k = 0; k < n * (n + 1); k++) sums[part * n * (n + 1) + k] = sum_lanes(total[k]);
    }
  });
  for (int64_t part = 1; part < parts; part++)
    for (int k = 0; k < n * (n + 1); k++) sums[k] += sums[part * n * (n + 1) + k];
  if (kInverse)
    for (double& sum : sums) sum = -sum;
  return sums;
}

template <class S>
void forward(const Tensor& x, const Tensor& lower, const Tensor& upper, const Tensor& diagonal, const Tensor& bias, bool inverse,
             const Tensor& y, const Tensor& log_det) {
  const Factors<S> f(lower, upper, diagonal, bias);
  const S* from = Factors<S>::data(x);
  S* to = static_cast<S*>(y.data_ptr());
  inverse ? forward<S, true>(f, x.size(0), from, to) : forward<S, false>(f, x.size(0), from, to);
  std::fill_n(static_cast<S*>(log_det.data_ptr()), x.size(0), static_cast<S>(inverse ? -f.log_abs_det : f.log_abs_det));
}

template <class S>
void backward(const Tensor& grad, const Tensor& grad_log_det, const Tensor& x, const Tensor& lower, const Tensor& upper,
              const Tensor& diagonal, const Tensor& bias, bool inverse, const std::vector<Tensor>& gradients) {
  const Factors<S> f(lower, upper, diagonal, bias);
  const int64_t rows = x.size(0), n = f.n;
  const S *in = Factors<S>::data(x), *to_y = Factors<S>::data(grad), *to_log_det = Factors<S>::data(grad_log_det);
  S* d[5];
  for (int i = 0; i < 5; i++) d[i] = static_cast<S*>(gradients[i].data_ptr());
  std::vector<double> sums = inverse ? backward<S, true>(f, rows, in, to_y, d[0]) : backward<S, false>(f, rows, in, to_y, d[0]);
  sums.resize(n * (n + 1));  // zeros where there are no rows
  double to_log_diagonal = 0;
  for (int64_t row = 0; row < rows; row++) to_log_diagonal += inverse ? -to_log_det[row] : to_log_det[row];
  for (int i = 0; i < n; i++) {
    for (int j = 0; j < i; j++) *d[1]++ = static_cast<S>(sums[i * n + j]);
    for (int j = i + 1; j < n; j++) *d[2]++ = static_cast<S>(sums[i * n + j]);
    d[3][i] = static_cast<S>(sums[i * n + i] + to_log_diagonal / f.matrix[i * n + i]);
    d[4][i] = static_cast<S>(sums[n * n + i]);
  }
}

std::tuple<Tensor, Tensor> lu_linear(Tensor x, Tensor lower, Tensor upper, Tensor diagonal, Tensor bias, bool inverse) {
  for (Tensor* t : {&x, &lower, &upper, &diagonal, &bias}) *t = torch::stable::contiguous(*t);
  const Tensor y = new_tensor(x, x.sizes()), log_det = new_tensor(x, {x.size(0)});
  const auto run = x.scalar_type() == ScalarType::Double ? &forward<double> : &forward<float>;
  run(x, lower, upper, diagonal, bias, inverse, y, log_det);
  return {y, log_det};
}

std::vector<Tensor> lu_linear_backward(Tensor grad, Tensor grad_log_det, Tensor x, Tensor lower, Tensor upper, Tensor diagonal,
                                       Tensor bias, bool inverse) {
  std::vector<Tensor> gradients;
  for (Tensor* t : {&grad, &grad_log_det, &x, &lower, &upper, &diagonal, &bias}) *t = torch::stable::contiguous(*t);
  for (const Tensor& like : {x, lower, upper, diagonal, bias}) gradients.push_back(new_tensor(like, like.sizes()));
  const auto run = x.scalar_type() == ScalarType::Double ? &backward<double> : &backward<float>;
  run(grad, grad_log_det, x, lower, upper, diagonal, bias, inverse, gradients);
  return gradients;
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_lu_linear", TORCH_BOX(&lu_linear));
  m.impl("_lu_linear_backward", TORCH_BOX(&lu_linear_backward));
}

}  // namespace gk
