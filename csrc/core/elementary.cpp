// The elementary functions of lanes.h as a raw op, so that tests reach them on every backend and instruction set.
#include <string>

#include "rows.h"

namespace gk {
namespace {

#define GK_ELEMENTARY(Name, expression)                                      \
  struct Name {                                                              \
    static constexpr int kInputs = 1, kRowInputs = 0, kOutputs = 1, kSums = 0; \
    NoNoise noise;                                                           \
    template <class V>                                                       \
    GK_FN void operator()(const V* in, const V*, V, V* out, V*) const {      \
      const V x = in[0];                                                     \
      out[0] = expression;                                                   \
    }                                                                        \
  };
GK_ELEMENTARY(Exp, exp(x))
GK_ELEMENTARY(Expm1, expm1(x, exp(x)))
GK_ELEMENTARY(Log, log(x))
GK_ELEMENTARY(Log1p, log1p(x))
GK_ELEMENTARY(Tanh, tanh(x))
GK_ELEMENTARY(Sigmoid, sigmoid(x))
GK_ELEMENTARY(Softplus, softplus(x))
#undef GK_ELEMENTARY

Tensor elementary(Tensor x, std::string name) {
  Tensor y = torch::stable::empty_like(x);
  const Rows in(x), out(y);
  const auto run = [&](auto f) { run_rows(f, in.shape(), {in.array()}, {}, {out.array()}, {}, x); };
  if (name == "exp") run(Exp{});
  else if (name == "expm1") run(Expm1{});
  else if (name == "log") run(Log{});
  else if (name == "log1p") run(Log1p{});
  else if (name == "tanh") run(Tanh{});
  else if (name == "sigmoid") run(Sigmoid{});
  else if (name == "softplus") run(Softplus{});
  else STD_TORCH_CHECK(false, "no elementary function of this name");
  return y;
}

}  // namespace

GENKERN_LIBRARY(m) { m.impl("_elementary", TORCH_BOX(&elementary)); }

}  // namespace gk
