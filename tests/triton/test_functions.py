"""Elementary functions of the Triton kernels against NumPy in float64, with their special values."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from genkern.core import triton_lanes as lanes  # noqa: E402

# infinities are asked for; the interpreter computes in NumPy, which warns of them
pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore:overflow encountered")]

N = 4096


@triton.jit
def _apply(x, out, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    if FUNCTION == "exp":
        value = lanes.exp(value)
    elif FUNCTION == "expm1":
        value = lanes.expm1(value)
    elif FUNCTION == "expm1_tail":
        value = lanes.expm1_tail(value)
    elif FUNCTION == "tanh":
        value = lanes.tanh(value)
    elif FUNCTION == "exact_log":
        value = lanes.exact_log(value)
    elif FUNCTION == "log":
        value = lanes.log(value)
    elif FUNCTION == "log1p":
        value = lanes.log1p(value)
    elif FUNCTION == "sigmoid":
        value = lanes.sigmoid(value)
    else:
        value = lanes.softplus(value)
    tl.store(out + i, value)


def _tail(x):
    series = sum(x**k / float(np.prod(np.arange(1, k + 1, dtype=np.float64))) for k in range(2, 20))
    return np.where(np.abs(x) < 0.5, series, np.expm1(x) - x)


EXACT = {
    "exp": np.exp, "expm1": np.expm1, "expm1_tail": _tail, "tanh": np.tanh, "exact_log": np.log, "log": np.log, "log1p": np.log1p,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "softplus": lambda x: np.logaddexp(x, 0),
}  # fmt: skip


def _run(name, x):
    out = torch.empty_like(x)
    _apply[(x.numel() // 1024,)](x, out, name, 1024)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", EXACT)
def test_relative_error(name, dtype):
    if name.endswith("log"):
        x = torch.logspace(-37, 37, N, dtype=torch.float64)
    else:
        signs = torch.tensor([1.0, -1.0]).repeat(N // 4)
        x = torch.cat([torch.linspace(-80, 80, N // 2), torch.logspace(-8, 1, N // 2) * signs])
    x = x[x > -0.99] if name == "log1p" else x
    x = torch.cat([x, x[: -len(x) % 1024]]).to(dtype)
    expected = EXACT[name](x.double().numpy())
    error = np.abs(_run(name, x).double().numpy() - expected) / np.maximum(np.abs(expected), torch.finfo(dtype).tiny)
    ulps = 16 if name == "expm1_tail" else 4  # beyond ln(2) / 2 the tail subtracts 1 and x from e^x
    assert error.max() < ulps * torch.finfo(dtype).eps, x[int(error.argmax())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype):
    x = torch.tensor([0.0, np.inf, -np.inf, np.nan, 1e4, -1e4, -0.0, 1.0], dtype=dtype).repeat(128)
    exp, expm1, tanh = (_run(name, x)[:8].tolist() for name in ("exp", "expm1", "tanh"))
    assert exp[:3] == [1, np.inf, 0] and np.isnan(exp[3]) and exp[4:7] == [np.inf, 0, 1]
    assert expm1[:3] == [0, np.inf, -1] and np.isnan(expm1[3]) and expm1[5:7] == [-1, 0]
    assert tanh[:3] == [0, 1, -1] and np.isnan(tanh[3]) and tanh[4:7] == [1, -1, 0]
    log = _run("log", torch.tensor([0.0, np.inf, -1.0, np.nan, 1.0], dtype=dtype).repeat(1024))[:5].tolist()
    assert log[:2] == [-np.inf, np.inf] and np.isnan(log[2:4]).all() and log[4] == 0
    if dtype == torch.float32:  # results below the smallest normal number are not flushed
        tiny = torch.full((1024,), -95.0)
        assert _run("log", torch.full((1024,), 1e-40))[0].item() == pytest.approx(np.log(1e-40), rel=1e-6)
        assert _run("exp", tiny)[0].item() == pytest.approx(np.exp(-95.0), rel=1e-3, abs=0)
