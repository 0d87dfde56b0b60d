"""The elementary functions that kernels are written with, on every backend that holds them, against float64."""

import math

import pytest
import torch

from genkern.core import BACKENDS, libraries

libraries()  # loads what there is
for _namespace in sorted({backend.namespace for backend in BACKENDS.values()} - {"genkern_triton"}):
    torch.library.define(f"{_namespace}::_elementary", "(Tensor x, str name) -> Tensor")
NAMESPACES = [
    backend.namespace
    for backend in BACKENDS.values()
    if backend.key == "CPU" and torch._C._dispatch_has_kernel_for_dispatch_key(f"{backend.namespace}::_elementary", "CPU")
]
TRUTH = {
    "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
}  # fmt: skip
INF, NAN = math.inf, math.nan
SPECIAL = {  # x -> value, for the functions that treat it specially
    "exp": {0.0: 1, INF: INF, -INF: 0, 1e4: INF, -1e4: 0, NAN: NAN},
    "expm1": {0.0: 0, INF: INF, -INF: -1, -1e4: -1, NAN: NAN},
    "log": {0.0: -INF, 1.0: 0, INF: INF, -1.0: NAN, -INF: NAN, NAN: NAN, 1e-40: math.log(1e-40), 1.4e-45: -103.27893},
    "log1p": {0.0: 0, -1.0: -INF, -2.0: NAN, INF: INF, NAN: NAN, 1e-30: 1e-30, -1e-10: -1e-10},
    "tanh": {0.0: 0, INF: 1, -INF: -1, NAN: NAN, 1e4: 1},
    "sigmoid": {0.0: 0.5, INF: 1, -INF: 0, NAN: NAN, 1e4: 1, -1e4: 0},
    "softplus": {0.0: math.log(2), INF: INF, -INF: 0, 1e4: 1e4, -1e4: 0, NAN: NAN},
}
needs_library = pytest.mark.skipif(not NAMESPACES, reason=f"no CPU library: {libraries()}")
each = pytest.mark.parametrize("name", TRUTH)


def run(namespace, x, name):
    return getattr(torch.ops, namespace)._elementary(x, name)


def points(name):
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(2000)
    x = torch.cat([torch.linspace(-80, 80, 4001, dtype=torch.float64), torch.logspace(-8, 1, 4000, dtype=torch.float64) * signs])
    if name == "log":
        x = torch.cat([torch.logspace(-37, 37, 4000, dtype=torch.float64), 1 + x[4001:] / 20])
    if name == "log1p":
        x = torch.cat([x[4001:] / 10.001, torch.logspace(-30, 37, 4000, dtype=torch.float64)])
    return x


@needs_library
@each
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_relative_error(name, dtype):
    x = points(name).to(dtype)
    truth = TRUTH[name](x.double())
    for namespace in NAMESPACES:
        error = (run(namespace, x, name).double() - truth).abs() / truth.abs().clamp(min=torch.finfo(dtype).tiny)
        worst = int(error.argmax())
        assert error[worst] < 4 * torch.finfo(dtype).eps, (namespace, x[worst].item(), error[worst].item())


@needs_library
@each
def test_special_values(name):
    x = torch.tensor(list(SPECIAL[name]), dtype=torch.float32)
    expected = torch.tensor(list(SPECIAL[name].values()), dtype=torch.float32)
    for namespace in NAMESPACES:
        for copies in (1, 16):  # a tail, and whole vectors
            torch.testing.assert_close(
                run(namespace, x.repeat(copies), name), expected.repeat(copies), rtol=1e-6, atol=0, equal_nan=True
            )
