"""bernoulli_nll, gaussian_nll and discretized_logistic_nll in Triton: a partial sum per tile, then their sum."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes

# ---- kernels. a: logits or mu; v: log_var or log_scale, where SECOND; half: half a bin of the discretized logistic


@triton.jit
def _bin(p, log_scale, target, half):
    """a and b, the ends of the bin around target, its width d, 1 / scale, and whether it is the first or the last."""
    inverse_scale = lanes.exp(log_scale * -1.0)
    middle = target - p
    first, last = target < half - 1.0, target > 1.0 - half
    return (middle + half) * inverse_scale, (middle - half) * inverse_scale, (half + half) * inverse_scale, inverse_scale, first, last


@triton.jit(do_not_specialize=["half"])
def forward_kernel(
    a, v, x, nll, a_stride, v_stride, x_stride, nll_stride, half, rows, width,
    DENSITY: tl.constexpr, SECOND: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    p = lanes.load(a, a_stride, row, column, mask, DTYPE)
    target = lanes.load(x, x_stride, row, column, mask, DTYPE)
    if SECOND:
        second = lanes.load(v, v_stride, row, column, mask, DTYPE)
    if DENSITY == "bernoulli":
        value = (tl.where(p < 0, 0.0, p) - p * target) + lanes.softplus(tl.abs(p) * -1.0)  # as softplus(p) - p x, with nothing lost
    elif DENSITY == "gaussian":
        twice = (target - p) * (target - p)
        if SECOND:
            twice = twice * lanes.exp(second * -1.0) + second
        value = (twice + 1.8378770664093453) * 0.5
    else:
        high, low, d, inverse_scale, first, last = _bin(p, second, target, lanes.from_bits(half, DTYPE))
        below, above = lanes.softplus(high * -1.0), lanes.softplus(low)
        inside = lanes.log(lanes.expm1(d * -1.0) * -1.0)
        value = tl.where(last, 0.0, below) + tl.where(first, 0.0, above) - tl.where(first | last, 0.0, inside)
    total = tl.sum(tl.where(mask, value, 0.0), 1)[:, None]
    tl.store(nll + row * nll_stride + number, total, mask=row < rows)


@triton.jit(do_not_specialize=["half"])
def backward_kernel(
    grad, a, v, x, d_a, d_v, grad_stride, a_stride, v_stride, x_stride, d_a_stride, d_v_stride, half, rows, width,
    DENSITY: tl.constexpr, SECOND: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    g = tl.load(grad + row * grad_stride, mask=row < rows, other=0.0).to(DTYPE)
    p = lanes.load(a, a_stride, row, column, mask, DTYPE)
    target = lanes.load(x, x_stride, row, column, mask, DTYPE)
    if SECOND:
        second = lanes.load(v, v_stride, row, column, mask, DTYPE)
    if DENSITY == "bernoulli":
        d_first = lanes.sigmoid(p) - target
    elif DENSITY == "gaussian":
        d_first = p - target
        if SECOND:
            d_first = d_first * lanes.exp(second * -1.0)
            d_second = (1.0 - (p - target) * d_first) * 0.5
    else:
        high, low, d, inverse_scale, first, last = _bin(p, second, target, lanes.from_bits(half, DTYPE))
        below, above = tl.where(last, 0.0, lanes.sigmoid(high * -1.0)), tl.where(first, 0.0, lanes.sigmoid(low))
        inside = tl.where(first | last, 0.0, d / lanes.expm1(d))
        d_first = inverse_scale * (below - above)
        d_second = (below * high - above * low) + inside
    tl.store(d_a + row * d_a_stride + column, g * d_first, mask=mask)
    if SECOND:
        tl.store(d_v + row * d_v_stride + column, g * d_second, mask=mask)


# ---- launchers


def _launch(kernel, tensors, like, density, half, second, dtype):
    strides = [0 if t is None else t.stride(0) for t in tensors]
    rows, width = like.shape
    constants = dict(DENSITY=density, SECOND=second, DTYPE=dtype)
    lanes.launch(kernel, like, rows, width, *tensors, *strides, lanes.real(half), **constants)


def _rows(x):
    return None if x is None else lanes.as_rows(x)


def _forward(density, a, v, x, half=0.0):
    work, dtype = lanes.working_type(a, v, x)
    rows, width = a.shape[0], a[0:1].numel()
    if rows * width == 0:
        return a.new_zeros(rows, dtype=work)
    sums = a.new_empty((rows, triton.cdiv(width, lanes.tile_shape(width)[1])), dtype=work)
    _launch(forward_kernel, (_rows(a), _rows(v), _rows(x), sums), _rows(a), density, half, v is not None, dtype)
    return sums.sum(1, dtype=torch.float64).to(work)


def _backward(density, grad, a, v, x, half=0.0):
    gradients = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, v)]
    if a.numel():
        tensors = (grad.unsqueeze(1), _rows(a), _rows(v), _rows(x), _rows(gradients[0]), _rows(gradients[1]))
        _launch(backward_kernel, tensors, tensors[1], density, half, v is not None, lanes.working_type(a, v, x)[1])
    return [g for g in gradients if g is not None]


@implements("triton", "bernoulli_nll")
def bernoulli_nll(logits, x):
    return _forward("bernoulli", logits, None, x)


@implements("triton", "bernoulli_nll_backward")
def bernoulli_nll_backward(grad, logits, x):
    return _backward("bernoulli", grad, logits, None, x)


@implements("triton", "gaussian_nll")
def gaussian_nll(mu, log_var, x):
    return _forward("gaussian", mu, log_var, x)


@implements("triton", "gaussian_nll_backward")
def gaussian_nll_backward(grad, mu, log_var, x):
    return _backward("gaussian", grad, mu, log_var, x)


@implements("triton", "discretized_logistic_nll")
def discretized_logistic_nll(mu, log_scale, x, levels):
    return _forward("discretized_logistic", mu, log_scale, x, 1 / (levels - 1))


@implements("triton", "discretized_logistic_nll_backward")
def discretized_logistic_nll_backward(grad, mu, log_scale, x, levels):
    return _backward("discretized_logistic", grad, mu, log_scale, x, 1 / (levels - 1))
