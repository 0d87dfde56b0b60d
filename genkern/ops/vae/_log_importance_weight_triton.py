"""log_importance_weight in Triton: the log ratio of the densities in one pass; the numbers per sample in plain torch."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops.vae import _latent


@triton.jit
def forward_kernel(
    z, mu, log_var, ratio, z_stride, mu_stride, log_var_stride, ratio_stride, rows, width,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    point = lanes.load(z, z_stride, row, column, mask, DTYPE)
    v = lanes.load(log_var, log_var_stride, row, column, mask, DTYPE)
    difference = point - lanes.load(mu, mu_stride, row, column, mask, DTYPE)
    value = tl.fma(difference * difference, lanes.exp(v * -1.0), tl.fma(point * -1.0, point, v)) * 0.5
    tl.store(ratio + row * ratio_stride + number, tl.sum(tl.where(mask, value, 0.0), 1)[:, None], mask=row < rows)


@triton.jit
def backward_kernel(
    grad, z, mu, log_var, d_z, d_mu, d_log_var,
    grad_stride, z_stride, mu_stride, log_var_stride, d_z_stride, d_mu_stride, d_log_var_stride, rows, width,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    g = tl.load(grad + row * grad_stride, mask=row < rows, other=0.0).to(DTYPE)
    point = lanes.load(z, z_stride, row, column, mask, DTYPE)
    difference = point - lanes.load(mu, mu_stride, row, column, mask, DTYPE)
    pull = difference * lanes.exp(lanes.load(log_var, log_var_stride, row, column, mask, DTYPE) * -1.0)
    tl.store(d_z + row * d_z_stride + column, g * (pull - point), mask=mask)
    tl.store(d_mu + row * d_mu_stride + column, g * pull * -1.0, mask=mask)
    tl.store(d_log_var + row * d_log_var_stride + column, g * (1.0 - difference * pull) * 0.5, mask=mask)


def _launch(kernel, tensors, like, dtype):
    lanes.launch(kernel, like, *like.shape, *tensors, *(t.stride(0) for t in tensors), DTYPE=dtype)


def _log_weight(nll, z, mu, log_var):
    work, dtype = lanes.working_type(nll, z, mu, log_var)
    rows, width = z.shape[0], z[0:1].numel()
    ratio = z.new_zeros((rows, max(1, triton.cdiv(width, lanes.tile_shape(width)[1]))), dtype=work)
    if z.numel():
        points, *moments = (lanes.as_rows(x) for x in (z, *_latent.moments(mu, log_var)))
        _launch(forward_kernel, (points, *moments, ratio), points, dtype)
    return ratio.sum(1, dtype=torch.float64).to(work) - nll


@implements("triton", "log_importance_weight")
def log_importance_weight(nll, z, mu, log_var, log_sum):
    log_w = _log_weight(nll, z, mu, log_var)
    return log_w if log_sum is None else torch.logaddexp(log_sum.to(log_w.dtype), log_w)


@implements("triton", "log_importance_weight_backward")
def log_importance_weight_backward(grad, nll, z, mu, log_var, log_sum):
    d_z, d_mu = torch.empty_like(z, memory_format=torch.contiguous_format), torch.empty_like(mu, memory_format=torch.contiguous_format)
    gradients = [d_z, d_mu] if log_var is None else [d_z, d_mu, torch.empty_like(log_var, memory_format=torch.contiguous_format)]
    weight = grad
    if log_sum is not None:
        ahead = _log_weight(nll, z, mu, log_var) - log_sum
        weight = grad * torch.sigmoid(ahead)
        gradients.append((grad * torch.sigmoid(-ahead)).to(log_sum.dtype))
    if z.numel():
        results = d_z, *_latent.moments(d_mu, None if log_var is None else gradients[2])
        rows = [lanes.as_rows(x) for x in (z, *_latent.moments(mu, log_var), *results)]
        _launch(backward_kernel, (weight.unsqueeze(1), *rows), rows[0], lanes.working_type(nll, z, mu, log_var)[1])
    return [(-weight).to(nll.dtype), *gradients]
