"""gated_activation in Triton."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops._common import promoted


@triton.jit
def _halves(x, condition, x_stride, condition_stride, row, column, mask, width, CONDITION: tl.constexpr, DTYPE: tl.constexpr):
    a = lanes.load(x, x_stride, row, column, mask, DTYPE)
    b = lanes.load(x + width, x_stride, row, column, mask, DTYPE)
    if CONDITION:
        a += lanes.load(condition, condition_stride, row, column, mask, DTYPE)
        b += lanes.load(condition + width, condition_stride, row, column, mask, DTYPE)
    return a, b


@triton.jit
def gate_kernel(
    x, condition, y, x_stride, condition_stride, y_stride, rows, width,
    CONDITION: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, _, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    a, b = _halves(x, condition, x_stride, condition_stride, row, column, mask, width, CONDITION, DTYPE)
    tl.store(y + row * y_stride + column, lanes.tanh(a) * lanes.sigmoid(b), mask=mask)


@triton.jit
def gate_backward_kernel(
    grad, x, condition, d_x, d_condition, grad_stride, x_stride, condition_stride, d_x_stride, d_condition_stride, rows, width,
    CONDITION: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, _, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    a, b = _halves(x, condition, x_stride, condition_stride, row, column, mask, width, CONDITION, DTYPE)
    g = lanes.load(grad, grad_stride, row, column, mask, DTYPE)
    t, s = lanes.tanh(a), lanes.sigmoid(b)
    d_a, d_b = g * s * (1.0 - t * t), g * t * (s * (1.0 - s))
    tl.store(d_x + row * d_x_stride + column, d_a, mask=mask)
    tl.store(d_x + width + row * d_x_stride + column, d_b, mask=mask)
    if CONDITION:
        tl.store(d_condition + row * d_condition_stride + column, d_a, mask=mask)
        tl.store(d_condition + width + row * d_condition_stride + column, d_b, mask=mask)


def _rows(*tensors):
    return [None if t is None else lanes.as_rows(t) for t in tensors]


def _strides(*tensors):
    return [0 if t is None else t.stride(0) for t in tensors]


@implements("triton", "gated_activation")
def gated_activation(x, condition):
    y = x.new_empty((x.shape[0], x.shape[1] // 2, *x.shape[2:]), dtype=promoted(x, condition))
    if y.numel():
        tensors = _rows(x, condition, y)
        constants = {"CONDITION": condition is not None, "DTYPE": lanes.working_type(x, condition)[1]}
        lanes.launch(gate_kernel, x, x.shape[0], y[0].numel(), *tensors, *_strides(*tensors), **constants)
    return y


@implements("triton", "gated_activation_backward")
def gated_activation_backward(grad, x, condition):
    d = [None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, condition)]
    if x.numel():
        tensors = _rows(grad, x, condition, *d)
        constants = {"CONDITION": condition is not None, "DTYPE": lanes.working_type(x, condition)[1]}
        lanes.launch(gate_backward_kernel, x, x.shape[0], grad[0].numel(), *tensors, *_strides(*tensors), **constants)
    return [t for t in d if t is not None]
