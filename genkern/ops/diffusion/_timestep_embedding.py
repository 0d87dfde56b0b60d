"""timestep_embedding: the sinusoidal embedding of a time or noise level, in plain torch."""

import math

import torch


def timestep_embedding(t, dim, max_period=10000.0, *, order="cos_sin", shift=0.0, scale=1.0):
    """(N, dim): cosines and sines of scale t w_k, w_k = max_period^(-k / (dim // 2 - shift)), k = 0 ... dim // 2 - 1; an odd last
    column is zero (Vaswani et al., 2017, section 3.5; Ho et al., 2020).

    t               (N,), integers or floating point (fractional times)
    order           "cos_sin": cosines first, the order of Stable Diffusion's models; "sin_cos": sines first, that of DDPM's
    shift           1 reproduces DDPM's frequencies, whose last one is exactly 1 / max_period; 0 those of the later models

    float32 (float64 if t is), whatever the type of the model. TypeError, ValueError on anything else.
    """
    if not isinstance(t, torch.Tensor):
        raise TypeError(f"timestep_embedding: t must be a tensor, got {type(t).__name__}")
    if t.dim() != 1:
        raise ValueError(f"timestep_embedding: t must be (N,), got {tuple(t.shape)}")
    if order not in ("cos_sin", "sin_cos"):
        raise ValueError(f"timestep_embedding: order must be 'cos_sin' or 'sin_cos', got {order!r}")
    half = dim // 2
    if half <= shift:
        raise ValueError(f"timestep_embedding: dim // 2 must exceed shift, got dim {dim} and shift {shift}")
    dtype = torch.float64 if t.dtype == torch.float64 else torch.float32
    k = torch.arange(half, dtype=dtype, device=t.device)
    angles = t.to(dtype)[:, None] * torch.exp(-math.log(max_period) / (half - shift) * k) * scale
    parts = [angles.cos(), angles.sin()] if order == "cos_sin" else [angles.sin(), angles.cos()]
    return torch.cat(parts + [angles.new_zeros(len(t), dim % 2)], 1)
