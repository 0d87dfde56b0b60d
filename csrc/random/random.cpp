// Draws from the keyed stream into `out`: out = value * scale + shift (bits: the words themselves).
#include "rows.h"

namespace gk {
namespace {

template <class Distribution>
struct Draw {
  static constexpr int kInputs = 0, kRowInputs = 0, kOutputs = 1, kSums = 0;
  Distribution noise;
  double scale, shift;
  template <class V>
  GK_FN void operator()(const V*, const V*, V value, V* out, V*) const {
    out[0] = value * splat<V>(scale) + splat<V>(shift);
  }
};

template <class Distribution>
struct DrawUnscaled {
  static constexpr int kInputs = 0, kRowInputs = 0, kOutputs = 1, kSums = 0;
  Distribution noise;
  template <class V>
  GK_FN void operator()(const V*, const V*, V value, V* out, V*) const {
    out[0] = value;
  }
};

template <class F>
void draw(const F& f, const Tensor& key, Tensor& out) {
  const Rows rows(out);
  run_rows(f, rows.shape(), {}, {}, {rows.array()}, {}, out, keys_of(key));
}

template <class Distribution>
void draw_scaled(Tensor key, Tensor out, double scale, double shift) {
  draw(Draw<Distribution>{{}, scale, shift}, key, out);
}

// As many bits as the type holds, so that 1 is never reached.
void draw_uniform(Tensor key, Tensor out, double scale, double shift) {
  Uniform uniform;
  const ScalarType type = out.scalar_type();
  if (type == ScalarType::Half) uniform.mask = 0x7ff, uniform.scale = 0x1p-11f;
  if (type == ScalarType::BFloat16) uniform.mask = 0xff, uniform.scale = 0x1p-8f;
  draw(Draw<Uniform>{uniform, scale, shift}, key, out);
}

void draw_bits(Tensor key, Tensor out, double, double) { draw(DrawUnscaled<Bits>{}, key, out); }

void draw_bernoulli(Tensor key, Tensor out, double p, double) {
  const uint64_t below = static_cast<uint64_t>(p * 4294967296.0 + 0.5);  // words that give 1
  if (below == 0) {
    torch::stable::zero_(out);
    return;
  }
  DrawUnscaled<Bernoulli> f;
  f.noise.last = static_cast<uint32_t>(below - 1);
  draw(f, key, out);
}

}  // namespace

GENKERN_LIBRARY(m) {
  m.impl("_random_bits", TORCH_BOX(&draw_bits));
  m.impl("_random_uniform", TORCH_BOX(&draw_uniform));
  m.impl("_random_normal", TORCH_BOX(&draw_scaled<Normal>));
  m.impl("_random_bernoulli", TORCH_BOX(&draw_bernoulli));
  m.impl("_random_exponential", TORCH_BOX(&draw_scaled<Exponential>));
  m.impl("_random_gumbel", TORCH_BOX(&draw_scaled<Gumbel>));
  m.impl("_random_logistic", TORCH_BOX(&draw_scaled<Logistic>));
}

}  // namespace gk
