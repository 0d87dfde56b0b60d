"""denoising_loss in Triton: partial sums per tile, added up in float64; the noise is made again in both directions."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops.diffusion._q_sample_triton import factors_of, key_of, noise, per_row, target_of


@triton.jit
def loss_kernel(
    prediction, x0, partial, grad_prediction, grad_x0, prediction_stride, x0_stride, alpha, sigma, weight, grad, key, rows, width,
    ON_X: tl.constexpr, SIGMA_ON_X: tl.constexpr, ON_EPS: tl.constexpr, ALPHA_ON_EPS: tl.constexpr, DTYPE: tl.constexpr,
    KEY_STRIDE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The loss where `partial` is given, else the gradients."""
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    x = lanes.load(x0, x0_stride, row, column, mask, DTYPE)
    eps = noise(key, row, number, rows, width, KEY_STRIDE, COLUMNS, ALIGNED, DTYPE)
    a, s = per_row(alpha, row, rows), per_row(sigma, row, rows)
    wanted, factor = target_of(x, eps, a, s, ON_X, SIGMA_ON_X, ON_EPS, ALPHA_ON_EPS)
    error = tl.where(mask, lanes.load(prediction, prediction_stride, row, column, mask, DTYPE) - wanted, 0.0)
    w = per_row(weight, row, rows)
    if partial is not None:
        tl.store(partial + row * tl.cdiv(width, COLUMNS) + number, tl.sum(error * error * w, 1)[:, None], mask=row < rows)
    else:
        to_prediction = error * (w * per_row(grad, row, rows) * 2.0)
        tl.store(grad_prediction + row * width + column, to_prediction, mask=mask)
        tl.store(grad_x0 + row * width + column, -factor * to_prediction, mask=mask)


def _launch(prediction, x0, partial, grads, alpha, sigma, weight, grad, key, target):
    tensors = [lanes.as_rows(t) for t in (prediction, x0)]
    rows, width = tensors[0].shape
    dtype = lanes.working_type(prediction, x0)[1]
    row_inputs = [None if t is None else t.contiguous() for t in (alpha, sigma, weight, grad)]
    lanes.launch(
        loss_kernel, prediction, rows, width, *tensors, partial, *grads, *(t.stride(0) for t in tensors), *row_inputs,
        key.to(prediction.device), DTYPE=dtype, **factors_of(target), **key_of(key, rows, width, dtype),
    )  # fmt: skip


@implements("triton", "denoising_loss")
def denoising_loss(prediction, x0, alpha, sigma, weight, key, target):
    work, rows = lanes.working_type(prediction, x0)[0], prediction.shape[0]
    if prediction.numel() == 0:
        return prediction.new_zeros(rows, dtype=work)
    tiles = triton.cdiv(prediction[0].numel(), lanes.tile_shape(prediction[0].numel())[1])
    partial = prediction.new_empty((rows, tiles), dtype=work)
    _launch(prediction, x0, partial, (None, None), alpha, sigma, weight, None, key, target)
    return partial.sum(1, dtype=torch.float64).to(work)


@implements("triton", "denoising_loss_backward")
def denoising_loss_backward(grad, prediction, x0, alpha, sigma, weight, key, target):
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (prediction, x0)]
    if prediction.numel():
        _launch(prediction, x0, None, grads, alpha, sigma, weight, grad, key, target)
    return grads
