"""q_sample and what denoising_loss shares with it in Triton: the noise comes from the key in registers."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.ops.diffusion._q_sample import TARGETS


@triton.jit
def per_row(t, row, rows):
    return tl.load(t + row, mask=row < rows, other=0.0)


@triton.jit
def noise(key, row, number, rows, width, KEY_STRIDE: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr):
    seed, offset = lanes.stream(key, row, rows, KEY_STRIDE)
    return lanes.normals(seed, offset, number * COLUMNS + (0 if KEY_STRIDE else row * width), COLUMNS, ALIGNED, DTYPE)


@triton.jit
def target_of(x, eps, alpha, sigma, ON_X: tl.constexpr, SIGMA_ON_X: tl.constexpr, ON_EPS: tl.constexpr, ALPHA_ON_EPS: tl.constexpr):
    """(the target, the factor of x0 in it)"""
    factor = sigma * SIGMA_ON_X + ON_X
    return tl.fma(factor + tl.zeros_like(x), x, (alpha * ALPHA_ON_EPS + ON_EPS) * eps), factor


@triton.jit
def q_sample_kernel(
    x0, noisy, target, x0_stride, noisy_stride, target_stride, alpha, sigma, key, rows, width,
    ON_X: tl.constexpr, SIGMA_ON_X: tl.constexpr, ON_EPS: tl.constexpr, ALPHA_ON_EPS: tl.constexpr, DTYPE: tl.constexpr,
    KEY_STRIDE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    x = lanes.load(x0, x0_stride, row, column, mask, DTYPE)
    a, s = per_row(alpha, row, rows), per_row(sigma, row, rows)
    eps = noise(key, row, number, rows, width, KEY_STRIDE, COLUMNS, ALIGNED, DTYPE)
    wanted, factor = target_of(x, eps, a, s, ON_X, SIGMA_ON_X, ON_EPS, ALPHA_ON_EPS)
    tl.store(noisy + row * noisy_stride + column, tl.fma(a + tl.zeros_like(x), x, s * eps), mask=mask)
    tl.store(target + row * target_stride + column, wanted, mask=mask)


@triton.jit
def q_sample_backward_kernel(
    grad_noisy, grad_target, grad_x0, noisy_stride, target_stride, x0_stride, alpha, sigma, rows, width,
    ON_X: tl.constexpr, SIGMA_ON_X: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    of_noisy = lanes.load(grad_noisy, noisy_stride, row, column, mask, DTYPE)
    of_target = lanes.load(grad_target, target_stride, row, column, mask, DTYPE)
    factor = per_row(sigma, row, rows) * SIGMA_ON_X + ON_X
    tl.store(grad_x0 + row * x0_stride + column, per_row(alpha, row, rows) * of_noisy + factor * of_target, mask=mask)


def key_of(key, rows, width, dtype):
    """The key and the constants that say how it is read."""
    one = key.dim() == 1
    aligned = not one or rows == 1 or width % (2 if dtype == tl.float64 else 4) == 0
    return {"KEY_STRIDE": 0 if one else 2, "ALIGNED": aligned}


def factors_of(target):
    return dict(zip(("ON_X", "SIGMA_ON_X", "ON_EPS", "ALPHA_ON_EPS"), list(TARGETS.values())[target], strict=True))


@implements("triton", "q_sample")
def q_sample(x0, alpha, sigma, key, target):
    noisy, wanted = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device), torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    if x0.numel():
        tensors = [lanes.as_rows(t) for t in (x0, noisy, wanted)]
        rows, width = tensors[0].shape
        dtype = lanes.working_type(x0)[1]
        lanes.launch(
            q_sample_kernel, x0, rows, width, *tensors, *(t.stride(0) for t in tensors), alpha.contiguous(), sigma.contiguous(),
            key.to(x0.device), DTYPE=dtype, **factors_of(target), **key_of(key, rows, width, dtype),
        )  # fmt: skip
    return noisy, wanted


@implements("triton", "q_sample_backward")
def q_sample_backward(grad_noisy, grad_target, x0, alpha, sigma, key, target):
    grad = torch.empty(x0.shape, dtype=x0.dtype, device=x0.device)
    if x0.numel():
        tensors = [lanes.as_rows(t) for t in (grad_noisy, grad_target, grad)]
        rows, width = tensors[0].shape
        factors = {name: value for name, value in factors_of(target).items() if "EPS" not in name}
        lanes.launch(
            q_sample_backward_kernel, x0, rows, width, *tensors, *(t.stride(0) for t in tensors), alpha.contiguous(),
            sigma.contiguous(), DTYPE=lanes.working_type(x0)[1], **factors,
        )  # fmt: skip
    return [grad]
