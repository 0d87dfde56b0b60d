"""denoising_loss in Triton: partial sums per tile, added up in float64; where a key is given the target is made again from it."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops.diffusion._q_sample_triton import factors_of, key_of, noise, per_row, target_of


@triton.jit(do_not_specialize=["scale"])
def loss_kernel(
    prediction, other, partial, grad_prediction, grad_other, prediction_stride, other_stride, alpha, sigma, grad, key, scale,
    rows, width,
    ON_X: tl.constexpr, SIGMA_ON_X: tl.constexpr, ON_EPS: tl.constexpr, ALPHA_ON_EPS: tl.constexpr, DTYPE: tl.constexpr,
    KEY_STRIDE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The loss where `partial` is given, else the gradients. other: the target, or x0 where key is given."""
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    wanted = lanes.load(other, other_stride, row, column, mask, DTYPE)
    factor = tl.full((ROWS, 1), 1.0, DTYPE)  # of `other` in the target
    if key is not None:
        eps = noise(key, row, number, rows, width, KEY_STRIDE, COLUMNS, ALIGNED, DTYPE)
        a, s = per_row(alpha, row, rows), per_row(sigma, row, rows)
        wanted, factor = target_of(wanted, eps, a, s, ON_X, SIGMA_ON_X, ON_EPS, ALPHA_ON_EPS)
    error = tl.where(mask, lanes.load(prediction, prediction_stride, row, column, mask, DTYPE) - wanted, 0.0)
    one = lanes.from_bits(scale, DTYPE)
    if partial is not None:
        tl.store(partial + row * tl.cdiv(width, COLUMNS) + number, tl.sum(error * error * one, 1)[:, None], mask=row < rows)
    else:
        to_prediction = error * (per_row(grad, row, rows) * (one * 2.0))
        tl.store(grad_prediction + row * width + column, to_prediction, mask=mask)
        if grad_other is not None:
            tl.store(grad_other + row * width + column, -factor * to_prediction, mask=mask)


def _launch(prediction, other, partial, grads, alpha, sigma, grad, key, scale, target):
    tensors = [lanes.as_rows(t) for t in (prediction, other)]
    rows, width = tensors[0].shape
    dtype = lanes.working_type(prediction, other)[1]
    row_inputs = [None if t is None else t.contiguous() for t in (alpha, sigma, grad)]
    read = {"KEY_STRIDE": 0, "ALIGNED": True} if key is None else key_of(key, rows, width, dtype)
    lanes.launch(
        loss_kernel, prediction, rows, width, *tensors, partial, *grads, *(t.stride(0) for t in tensors), *row_inputs,
        None if key is None else key.to(prediction.device), lanes.real(scale), DTYPE=dtype, **factors_of(target), **read,
    )  # fmt: skip


@implements("triton", "denoising_loss")
def denoising_loss(prediction, other, fixed, alpha, sigma, key, scale, target):
    work, rows = lanes.working_type(prediction)[0], prediction.shape[0]
    if prediction.numel() == 0:
        return prediction.new_zeros(rows, dtype=work)
    tiles = triton.cdiv(prediction[0].numel(), lanes.tile_shape(prediction[0].numel())[1])
    partial = prediction.new_empty((rows, tiles), dtype=work)
    _launch(prediction, fixed if other is None else other, partial, (None, None), alpha, sigma, None, key, scale, target)
    return partial.sum(1, dtype=torch.float64).to(work)


@implements("triton", "denoising_loss_backward")
def denoising_loss_backward(grad, prediction, other, fixed, alpha, sigma, key, scale, target):
    grads = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (prediction, other) if t is not None]
    if prediction.numel():
        pair = (*grads, None)[:2]
        _launch(prediction, fixed if other is None else other, None, pair, alpha, sigma, grad, key, scale, target)
    return grads
