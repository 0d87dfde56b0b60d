"""The diagonal Gaussian latent in Triton: one forward and one backward kernel, whose constants say which of z and kl they make."""

import torch
import triton
import triton.language as tl

from genkern.core import triton_lanes as lanes
from genkern.ops._common import promoted
from genkern.ops.vae import _latent

# ---- formulas


@triton.jit
def _clamp(mu, log_var, low, high, SOFT: tl.constexpr, DTYPE: tl.constexpr):
    """Clamped (mu, log_var) and the derivatives of the clamp."""
    if SOFT:
        s, t = lanes.tanh(mu * 0.2), lanes.tanh(log_var * 0.1)
        return s * 5.0, t * 10.0, 1.0 - s * s, 1.0 - t * t
    else:
        low, high = lanes.from_bits(low, DTYPE), lanes.from_bits(high, DTYPE)
        v = tl.where(log_var < low, low, log_var)  # this order of operands keeps NaN
        v = tl.where(v > high, high, v)
        return mu, v, tl.full(mu.shape, 1.0, DTYPE), tl.where(log_var == v, 1.0, 0.0).to(DTYPE)


@triton.jit
def _divergence(mu, log_var, prior_mu, prior_log_var, PRIOR: tl.constexpr):
    """kl = 1/2 (q + e^d - 1 - d), and (pull, stretch, q): its derivatives to mu and log_var, and q."""
    if PRIOR:
        difference, d = mu - prior_mu, log_var - prior_log_var
        pull = difference * lanes.exp(prior_log_var * -1.0)
    else:
        difference, d = mu, log_var
        pull = mu
    q = difference * pull
    return (q + lanes.expm1_tail(d)) * 0.5, pull, lanes.expm1(d) * 0.5, q


# ---- kernels. KL: "" (none), "sum" (a partial sum per tile, a gradient per row) or "element"


@triton.jit(do_not_specialize=["low", "high", "free_bits"])
def forward_kernel(
    mu, log_var, prior_mu, prior_log_var, z, kl,
    mu_stride, log_var_stride, prior_mu_stride, prior_log_var_stride, z_stride, kl_stride,
    key, low, high, free_bits, rows, width,
    NOISE: tl.constexpr, KL: tl.constexpr, PRIOR: tl.constexpr, SOFT: tl.constexpr, DTYPE: tl.constexpr,
    KEY_STRIDE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    m = lanes.load(mu, mu_stride, row, column, mask, DTYPE)
    v = lanes.load(log_var, log_var_stride, row, column, mask, DTYPE)
    m, v, d_m, d_v = _clamp(m, v, low, high, SOFT, DTYPE)
    if NOISE:
        seed, offset = lanes.stream(key, row, rows, KEY_STRIDE)
        first = number * COLUMNS + (0 if KEY_STRIDE else row * width)
        eps = lanes.normals(seed, offset, first, COLUMNS, ALIGNED, DTYPE)
        tl.store(z + row * z_stride + column, tl.fma(lanes.exp(v * 0.5), eps, m), mask=mask)
    if KL != "":
        prior_m, prior_v = m, v
        if PRIOR:
            prior_m = lanes.load(prior_mu, prior_mu_stride, row, column, mask, DTYPE)
            prior_v = lanes.load(prior_log_var, prior_log_var_stride, row, column, mask, DTYPE)
        value, pull, stretch, q = _divergence(m, v, prior_m, prior_v, PRIOR)
        floor = lanes.from_bits(free_bits, DTYPE)
        value = tl.where(value < floor, floor, value)
        if KL == "sum":
            total = tl.sum(tl.where(mask, value, 0.0), 1)[:, None]
            tl.store(kl + row * kl_stride + number, total, mask=row < rows)
        else:
            tl.store(kl + row * kl_stride + column, value, mask=mask)


@triton.jit(do_not_specialize=["low", "high", "free_bits"])
def backward_kernel(
    mu, log_var, prior_mu, prior_log_var, grad_z, grad_kl, d_mu, d_log_var, d_prior_mu, d_prior_log_var,
    mu_stride, log_var_stride, prior_mu_stride, prior_log_var_stride, grad_z_stride, grad_kl_stride,
    d_mu_stride, d_log_var_stride, d_prior_mu_stride, d_prior_log_var_stride,
    key, low, high, free_bits, rows, width,
    NOISE: tl.constexpr, KL: tl.constexpr, PRIOR: tl.constexpr, SOFT: tl.constexpr, DTYPE: tl.constexpr,
    KEY_STRIDE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    m = lanes.load(mu, mu_stride, row, column, mask, DTYPE)
    v = lanes.load(log_var, log_var_stride, row, column, mask, DTYPE)
    m, v, d_m, d_v = _clamp(m, v, low, high, SOFT, DTYPE)
    to_mu, to_log_var = tl.zeros_like(m), tl.zeros_like(v)  # gradients of the clamped moments
    if NOISE:
        seed, offset = lanes.stream(key, row, rows, KEY_STRIDE)
        first = number * COLUMNS + (0 if KEY_STRIDE else row * width)
        eps = lanes.normals(seed, offset, first, COLUMNS, ALIGNED, DTYPE)
        to_mu = lanes.load(grad_z, grad_z_stride, row, column, mask, DTYPE)
        to_log_var = to_mu * lanes.exp(v * 0.5) * eps * 0.5
    if KL != "":
        prior_m, prior_v = m, v
        if PRIOR:
            prior_m = lanes.load(prior_mu, prior_mu_stride, row, column, mask, DTYPE)
            prior_v = lanes.load(prior_log_var, prior_log_var_stride, row, column, mask, DTYPE)
        value, pull, stretch, q = _divergence(m, v, prior_m, prior_v, PRIOR)
        if KL == "sum":
            g = tl.load(grad_kl + row * grad_kl_stride, mask=row < rows, other=0.0).to(DTYPE)
        else:
            g = lanes.load(grad_kl, grad_kl_stride, row, column, mask, DTYPE)
        g = tl.where(value < lanes.from_bits(free_bits, DTYPE), 0.0, g)
        to_mu = tl.fma(g, pull, to_mu)
        to_log_var = tl.fma(g, stretch, to_log_var)
        if PRIOR:
            tl.store(d_prior_mu + row * d_prior_mu_stride + column, g * pull * -1.0, mask=mask)
            to_prior = g * (stretch + q * 0.5) * -1.0
            tl.store(d_prior_log_var + row * d_prior_log_var_stride + column, to_prior, mask=mask)
    if d_mu is not None:
        tl.store(d_mu + row * d_mu_stride + column, to_mu * d_m, mask=mask)
    tl.store(d_log_var + row * d_log_var_stride + column, to_log_var * d_v, mask=mask)


# ---- launchers


def forward(mu, log_var, prior_mu, prior_log_var, key, low, high, soft, free_bits, kl):
    """(z or None, kl or None) as their ops return them: z if there is a key; kl "", "sum" or "element"."""
    work = lanes.working_type(mu, log_var, prior_mu, prior_log_var)[0]
    z = None if key is None else _latent.empty_like_mu(mu, log_var, promoted(mu, log_var))
    rows, width = mu.shape[0], mu[0:1].numel() // (2 if log_var is None else 1)
    if rows * width == 0:
        return z, _latent.empty_kl(mu, log_var, kl == "element").zero_() if kl else None
    sums = mu.new_empty((rows, triton.cdiv(width, lanes.tile_shape(width)[1])), dtype=work) if kl == "sum" else None
    elements = _latent.empty_kl(mu, log_var, True) if kl == "element" else None
    tensors = [*_moments(mu, log_var), *_moments(prior_mu, prior_log_var), _rows(z), _rows(elements) if sums is None else sums]
    _launch(forward_kernel, tensors, key, low, high, soft, free_bits, kl)
    return z, elements if sums is None else sums.sum(1, dtype=torch.float64).to(work)


def backward(grad_z, grad_kl, mu, log_var, prior_mu, prior_log_var, key, low, high, soft, free_bits, kl, passes=False):
    """Gradients of the given ones of mu, log_var, prior_mu, prior_log_var; passes: without that of mu."""
    inputs = mu, log_var, prior_mu, prior_log_var
    wanted = (None if passes else mu, *inputs[1:])
    gradients = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in wanted]
    if mu.numel():
        grad_kl = grad_kl.unsqueeze(1) if kl == "sum" else _rows(grad_kl)
        tensors = [*_moments(*inputs[:2]), *_moments(*inputs[2:]), _rows(grad_z), grad_kl]
        tensors += [*_moments(*gradients[:2]), *_moments(*gradients[2:])]
        _launch(backward_kernel, tensors, key, low, high, soft, free_bits, kl)
    return [g for g in gradients if g is not None]


def _rows(x):
    return None if x is None else lanes.as_rows(x)


def _moments(mu, log_var):
    """Mean and log-variance as rows: of two tensors, or the two halves of one."""
    if mu is None or log_var is not None:
        return _rows(mu), _rows(log_var)
    return lanes.as_rows(mu).chunk(2, 1)


def _launch(kernel, tensors, key, low, high, soft, free_bits, kl):
    """tensors: (N, width) or None, in the order of the kernel's pointers, mu first."""
    rows, width = tensors[0].shape
    one_key = key is None or key.dim() == 1
    if one_key and kl != "sum" and all(t is None or t.is_contiguous() for t in tensors):
        tensors, rows, width = [None if t is None else t.view(1, -1) for t in tensors], 1, rows * width
    dtype = lanes.working_type(*tensors)[1]
    lanes.launch(
        kernel, tensors[0], rows, width,
        *tensors, *(0 if t is None else t.stride(0) for t in tensors),
        None if key is None else key.to(tensors[0].device), lanes.real(low), lanes.real(high), lanes.real(free_bits),
        NOISE=key is not None, KL=kl, PRIOR=tensors[2] is not None, SOFT=soft, DTYPE=dtype, KEY_STRIDE=0 if one_key else 2,
        ALIGNED=not one_key or rows == 1 or width % (2 if dtype == tl.float64 else 4) == 0,
    )  # fmt: skip
