"""bernoulli_nll and gaussian_nll in Triton: a partial sum per tile, then their sum."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes

# ---- kernels. a: logits or mu; v: log_var where LOG_VAR; GAUSSIAN picks the density


@triton.jit
def forward_kernel(
    a, v, x, nll, a_stride, v_stride, x_stride, nll_stride, rows, width,
    GAUSSIAN: tl.constexpr, LOG_VAR: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    p = lanes.load(a, a_stride, row, column, mask, DTYPE)
    target = lanes.load(x, x_stride, row, column, mask, DTYPE)
    if GAUSSIAN:
        twice = (target - p) * (target - p)
        if LOG_VAR:
            log_var = lanes.load(v, v_stride, row, column, mask, DTYPE)
            twice = twice * lanes.exp(log_var * -1.0) + log_var
        value = (twice + 1.8378770664093453) * 0.5
    else:
        value = lanes.softplus(p) - p * target
    total = tl.sum(tl.where(mask, value, 0.0), 1)[:, None]
    tl.store(nll + row * nll_stride + number, total, mask=row < rows)


@triton.jit
def backward_kernel(
    grad, a, v, x, d_a, d_v, grad_stride, a_stride, v_stride, x_stride, d_a_stride, d_v_stride, rows, width,
    GAUSSIAN: tl.constexpr, LOG_VAR: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    g = tl.load(grad + row * grad_stride, mask=row < rows, other=0.0).to(DTYPE)
    p = lanes.load(a, a_stride, row, column, mask, DTYPE)
    target = lanes.load(x, x_stride, row, column, mask, DTYPE)
    if GAUSSIAN:
        pull = p - target
        if LOG_VAR:
            pull = pull * lanes.exp(lanes.load(v, v_stride, row, column, mask, DTYPE) * -1.0)
            tl.store(d_v + row * d_v_stride + column, g * (1.0 - (p - target) * pull) * 0.5, mask=mask)
        tl.store(d_a + row * d_a_stride + column, g * pull, mask=mask)
    else:
        tl.store(d_a + row * d_a_stride + column, g * (lanes.sigmoid(p) - target), mask=mask)


# ---- launchers


def _launch(kernel, tensors, like, gaussian, log_var, dtype):
    strides = [0 if t is None else t.stride(0) for t in tensors]
    rows, width = like.shape
    lanes.launch(kernel, like, rows, width, *tensors, *strides, GAUSSIAN=gaussian, LOG_VAR=log_var, DTYPE=dtype)


def _rows(x):
    return None if x is None else lanes.as_rows(x)


def _forward(a, v, x, gaussian):
    work, dtype = lanes.working_type(a, v, x)
    rows, width = a.shape[0], a[0:1].numel()
    if rows * width == 0:
        return a.new_zeros(rows, dtype=work)
    sums = a.new_empty((rows, triton.cdiv(width, lanes.tile_shape(width)[1])), dtype=work)
    _launch(forward_kernel, (_rows(a), _rows(v), _rows(x), sums), _rows(a), gaussian, v is not None, dtype)
    return sums.sum(1, dtype=torch.float64).to(work)


def _backward(grad, a, v, x, gaussian):
    gradients = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, v)]
    if a.numel():
        tensors = (grad.unsqueeze(1), _rows(a), _rows(v), _rows(x), _rows(gradients[0]), _rows(gradients[1]))
        _launch(backward_kernel, tensors, tensors[1], gaussian, v is not None, lanes.working_type(a, v, x)[1])
    return [g for g in gradients if g is not None]


@implements("triton", "bernoulli_nll")
def bernoulli_nll(logits, x):
    return _forward(logits, None, x, False)


@implements("triton", "bernoulli_nll_backward")
def bernoulli_nll_backward(grad, logits, x):
    return _backward(grad, logits, None, x, False)


@implements("triton", "gaussian_nll")
def gaussian_nll(mu, log_var, x):
    return _forward(mu, log_var, x, True)


@implements("triton", "gaussian_nll_backward")
def gaussian_nll_backward(grad, mu, log_var, x):
    return _backward(grad, mu, log_var, x, True)
