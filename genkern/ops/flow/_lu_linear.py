"""lu_linear: a linear map by its triangular factors, with its log-determinant; for rows of few numbers, where calls are the cost."""

import torch

from genkern.core import Op
from genkern.ops._common import check_device, check_float, check_shape, in_working_type, promoted
from genkern.testing._case import Case

_NAME = "lu_linear"
_MOST = 32  # features the kernel takes: of more, products of matrices are faster


def lu_linear(x, lower, upper, diagonal, bias, *, inverse=False):
    """(y, log_det): y = L U x + b for each row of x, and log |det dy/dx|, the sum of log |diagonal| (Oliva et al., Transformation
    Autoregressive Networks, 2018, section 3.2; nflows' LULinear).

    x           (N, D)
    lower       (D (D - 1) / 2,) what is below the diagonal of L, which is one, row by row
    upper       (D (D - 1) / 2,) what is above the diagonal of U, row by row
    diagonal    (D,) of U, not zero
    bias        (D,) b
    inverse     x from y, by substitution; log_det is that of this map

    y (N, D), log_det (N,), the same number for each row. float32, float64, bfloat16, float16, also mixed; computed in float32
    (float64); y has the promoted type, log_det is float32 (float64 if an input is). TypeError, ValueError on anything else.
    Differentiable to any order. One kernel on the CPU up to D = 32, else products of matrices.
    """
    check_float(_NAME, "x", x, 2)
    features = x.shape[1]
    triangle = (features * (features - 1) // 2,)
    for name, tensor, shape, meaning in (
        ("lower", lower, triangle, "(D (D - 1) / 2,)"),
        ("upper", upper, triangle, "(D (D - 1) / 2,)"),
        ("diagonal", diagonal, (features,), "(D,)"),
        ("bias", bias, (features,), "(D,)"),
    ):
        check_float(_NAME, name, tensor)
        check_shape(_NAME, name, tensor, shape, meaning)
        check_device(_NAME, name, tensor, "x", x)
    tensors = (x, lower, upper, diagonal, bias)
    dtype = promoted(*tensors)
    if any(t.dtype is not dtype for t in tensors) or dtype.itemsize == 2:  # calls of .to() cost as much as the kernel
        tensors = in_working_type(*tensors)
    y, log_det = (_op if x.is_cpu and features <= _MOST else _reference)(*tensors, inverse)
    return y if y.dtype is dtype else y.to(dtype), log_det


def _reference(x, lower, upper, diagonal, bias, inverse):
    n = x.shape[1]
    below, above = (f(n, n, offset, device=x.device).unbind() for f, offset in ((torch.tril_indices, -1), (torch.triu_indices, 1)))
    lower = torch.eye(n, dtype=x.dtype, device=x.device).index_put(below, lower)
    log_det = diagonal.abs().log().sum()
    upper = torch.diag(diagonal).index_put(above, upper)
    with torch.autocast(x.device.type, enabled=False):
        if inverse:
            y = torch.linalg.solve_triangular(lower, (x - bias).t(), upper=False, unitriangular=True)
            y, log_det = torch.linalg.solve_triangular(upper, y, upper=True).t(), -log_det
        else:
            y = torch.addmm(bias, x @ upper.t(), lower.t())
    return y, log_det * x.new_ones(len(x))


def _fake(x, *_):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(len(x))


_op = Op(
    _NAME,
    "(Tensor x, Tensor lower, Tensor upper, Tensor diagonal, Tensor bias, bool inverse) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    differentiable=("x", "lower", "upper", "diagonal", "bias"),
)


def _eager(x, lower, upper, diagonal, bias):
    """As nflows writes it."""
    n = len(bias)
    left, right = torch.eye(n, dtype=x.dtype), torch.zeros(n, n, dtype=x.dtype)
    left[tuple(torch.tril_indices(n, n, -1))] = lower
    right[tuple(torch.triu_indices(n, n, 1))] = upper
    i = torch.arange(n)
    right[i, i] = diagonal
    y = torch.nn.functional.linear(torch.nn.functional.linear(x, right), left, bias)
    return y, diagonal.abs().log().sum() * x.new_ones(len(x))


def _arguments(make, shape):
    n = shape[1]
    factors = {"lower": make((n * (n - 1) // 2,), scale=0.3), "upper": make((n * (n - 1) // 2,), scale=0.3)}
    return {"x": make(shape)} | factors | {"diagonal": 1.5 + make((n,)).tanh(), "bias": make((n,))}


CASES = (
    Case(
        lu_linear,
        _arguments,
        shapes=((5, 4), (0, 3), (35, 1), (3, 33)),
        large=(2063, 3),
        variants=({}, {"inverse": True}),
        eager=_eager,
        bytes=lambda shape, size: size * shape[0] * (2 * shape[1] + 1),
        bytes_backward=lambda shape, size: size * shape[0] * (3 * shape[1] + 1),
        bench_shapes=((200, 10), (1000, 10), (10000, 10)),
    ),
)
