"""timestep_embedding: the sinusoidal embedding of a time or noise level, in plain torch.

Without a kernel: a few numbers per sample, once per evaluation of a network.
"""

import math

import torch

from genkern.ops._common import check_choice, check_number, check_tensor


def timestep_embedding(t, dim, max_period=10000.0, *, order="cos_sin", shift=0.0, scale=1.0):
    """(N, dim): cosines and sines of scale t w_k, w_k = max_period^(-k / (dim // 2 - shift)), k = 0 ... dim // 2 - 1; an odd last
    column is zero (Vaswani et al., 2017, section 3.5; Ho et al., 2020).

    t               (N,), integers or floating point (fractional times)
    dim             number of columns
    scale           factor of t
    order           "cos_sin": cosines first, the order of Stable Diffusion's models; "sin_cos": sines first, that of DDPM's
    shift           1 reproduces DDPM's frequencies, whose last one is exactly 1 / max_period; 0 those of the later models

    float32 (float64 if t is), whatever the type of the model. TypeError, ValueError on anything else.
    """
    op = "timestep_embedding"
    check_tensor(op, "t", t)
    if t.is_complex() or t.dtype == torch.bool:
        raise TypeError(f"{op}: t must be integers or floating point, got {t.dtype}")
    if t.dim() != 1:
        raise ValueError(f"{op}: t must be (N,), got {tuple(t.shape)}")
    check_choice(op, "order", order, ("cos_sin", "sin_cos"))
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"{op}: dim must be an int, got {dim!r}")
    for name, value in (("max_period", max_period), ("shift", shift), ("scale", scale)):
        check_number(op, name, value)
    if not max_period > 0:
        raise ValueError(f"{op}: max_period must be positive, got {max_period}")
    half = dim // 2
    if half <= shift:
        raise ValueError(f"{op}: dim // 2 must exceed shift, got dim {dim} and shift {shift}")
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    k = torch.arange(half, dtype=dtype, device=t.device)
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(max_period) / (half - shift) * k) * scale
    parts = [angles.cos(), angles.sin()] if order == "cos_sin" else [angles.sin(), angles.cos()]
    return torch.cat(parts + [angles.new_zeros(len(t), dim % 2)], 1)
