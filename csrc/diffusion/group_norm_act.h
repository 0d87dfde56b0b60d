// group_norm_act: y = act((norm(x + pre_bias) * weight + bias) * (1 + scale) + shift), norm over the elements of a group of
// channels of one sample (Wu & He, 2018). x may lie in two tensors that follow each other along the channels.
#pragma once
#include <algorithm>

#include "rows.h"
#include "silu.h"

namespace gk {

struct GroupNorm {               // trivially copyable, so that it can be a CUDA kernel's argument
  Array x, x2, y;                // one row per sample: channels * pixels elements; x2.data null: x holds all channels
  Array weight, bias;            // (channels,); data null: absent
  Array pre_bias, scale, shift;  // (samples, channels); data null: absent
  int64_t samples, channels, channels_of_x, pixels, groups;
  double eps, inverse_size;  // 1 / elements of a group
  bool silu;
  GK_FN int64_t channels_per_group() const { return channels / groups; }
};

struct GroupNormGradients {  // data null: the argument is absent
  Array grad;                // of y; contiguous like all below
  Array x, x2, weight, bias, pre_bias, scale, shift;
  double* sums;  // [3][samples, channels]: of dz, of dz * xhat, of xhat; dz is the gradient before the activation
};

// What follows the affine map, and the gradient before it from that behind it.
template <bool kSilu, class V>
GK_FN V activated(V z) {
  if constexpr (kSilu)
    return silu(z);
  else
    return z;
}
template <bool kSilu, class V>
GK_FN V before_activation(V dy, V z) {
  if constexpr (kSilu)
    return dy * silu_derivative(z);
  else
    return dy;
}

inline ScalarType group_norm_type(const Tensor& x, const MaybeTensor& x2) {
  return x2 ? promote(x.scalar_type(), x2->scalar_type()) : x.scalar_type();
}

// The tensors of one call, kept alive, and the job that points into them.
class GroupNormCall {
 public:
  GroupNormCall(const Tensor& x, const MaybeTensor& x2, const MaybeTensor& weight, const MaybeTensor& bias,
                const MaybeTensor& pre_bias, const MaybeTensor& scale, const MaybeTensor& shift, int64_t groups, double eps,
                bool silu, int channel_dim) {
    keep_.reserve(7);
    keep_.emplace_back(x);
    job.x = keep_.back().array();
    job.samples = x.size(0);
    job.channels = job.channels_of_x = x.size(channel_dim);
    job.pixels = 1;
    for (int64_t d = 1; d < x.dim(); d++)
      if (d != channel_dim) job.pixels *= x.size(d);
    if (x2) {
      keep_.emplace_back(*x2);
      job.x2 = keep_.back().array();
      job.channels += x2->size(channel_dim);
    }
    job.weight = flat(weight), job.bias = flat(bias), job.pre_bias = flat(pre_bias), job.scale = flat(scale),
    job.shift = flat(shift);
    job.groups = groups, job.eps = eps, job.silu = silu;
    job.inverse_size = 1.0 / static_cast<double>(std::max<int64_t>(1, job.channels_per_group() * job.pixels));
  }
  GroupNorm job{};
  bool is_double() const { return job.x.storage == Storage::kDouble; }
  bool empty() const { return job.samples == 0 || job.channels == 0 || job.pixels == 0; }

 private:
  Array flat(const MaybeTensor& t) {
    if (!t) return {};
    keep_.emplace_back(t->is_contiguous() ? *t : torch::stable::contiguous(*t));  // a call of the op takes longer than to ask
    return keep_.back().array();
  }
  std::vector<Rows> keep_;
};

// Gradients in the order of the arguments: a new tensor for each that is there; zero where there is nothing to add up.
class GroupNormGradientCall {
 public:
  GroupNormGradientCall(const Tensor& grad, const GroupNorm& job) : grad_(grad) {
    d.grad = grad_.array();
    sums_ = new_tensor(grad, {3 * job.samples * job.channels}, ScalarType::Double);
    d.sums = static_cast<double*>(sums_.data_ptr());
  }
  const GroupNormGradients& add_all(const Tensor& x, const MaybeTensor& x2, const MaybeTensor& weight, const MaybeTensor& bias,
                                    const MaybeTensor& pre_bias, const MaybeTensor& scale, const MaybeTensor& shift) {
    d.x = add(x), d.x2 = add(x2), d.weight = add(weight), d.bias = add(bias);
    d.pre_bias = add(pre_bias), d.scale = add(scale), d.shift = add(shift);
    return d;
  }
  GroupNormGradients d{};
  std::vector<Tensor> gradients;

 private:
  Array add(const MaybeTensor& like) {
    if (!like) return {};
    gradients.push_back(new_tensor(*like, like->sizes()));
    return Rows(gradients.back()).array();
  }
  Rows grad_;
  Tensor sums_;
};

// run(number of the arithmetic type, whether there is SiLU as a type)
template <class F>
void with_types(const GroupNormCall& call, const F& run) {
  const auto of = [&](auto number) { call.job.silu ? run(number, std::true_type{}) : run(number, std::false_type{}); };
  call.is_double() ? of(double{}) : of(float{});
}

// Kernels, of a device and a layout: kChannelDim of x, which is (samples, channels, ...) or (samples, pixels, channels), and
// forward<S, kSilu>(job, like), backward<S, kSilu>(job, gradients, like) for arithmetic in S.
template <class Kernels>
void group_norm_into(GroupNormCall& call, const Tensor& x, const Tensor& y) {
  if (call.empty()) return;
  call.job.y = Rows(y).array();
  with_types(call, [&](auto s, auto silu) { Kernels::template forward<decltype(s), decltype(silu)::value>(call.job, x); });
}

template <class Kernels>
Tensor group_norm_act(Tensor x, MaybeTensor x2, MaybeTensor weight, MaybeTensor bias, MaybeTensor pre_bias, MaybeTensor scale,
                      MaybeTensor shift, int64_t groups, double eps, bool silu) {
  GroupNormCall call(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu, Kernels::kChannelDim);
  const auto sizes = x.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[Kernels::kChannelDim] = call.job.channels;
  Tensor y = new_tensor(x, shape, group_norm_type(x, x2));
  group_norm_into<Kernels>(call, x, y);
  return y;
}

template <class Kernels>
void group_norm_act_out(Tensor x, MaybeTensor x2, MaybeTensor weight, MaybeTensor bias, MaybeTensor pre_bias, MaybeTensor scale,
                        MaybeTensor shift, int64_t groups, double eps, bool silu, Tensor out) {
  GroupNormCall call(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu, Kernels::kChannelDim);
  group_norm_into<Kernels>(call, x, out);
}

template <class Kernels>
std::vector<Tensor> group_norm_act_backward(Tensor grad, Tensor x, MaybeTensor x2, MaybeTensor weight, MaybeTensor bias,
                                            MaybeTensor pre_bias, MaybeTensor scale, MaybeTensor shift, int64_t groups, double eps,
                                            bool silu) {
  GroupNormCall call(x, x2, weight, bias, pre_bias, scale, shift, groups, eps, silu, Kernels::kChannelDim);
  GroupNormGradientCall back(grad, call.job);
  const GroupNormGradients& d = back.add_all(x, x2, weight, bias, pre_bias, scale, shift);
  if (call.empty()) {
    for (Tensor& gradient : back.gradients) torch::stable::zero_(gradient);
    return back.gradients;
  }
  with_types(call, [&](auto s, auto silu) { Kernels::template backward<decltype(s), decltype(silu)::value>(call.job, d, x); });
  return back.gradients;
}

}  // namespace gk
