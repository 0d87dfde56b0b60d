"""guidance_moments: what classifier-free guidance must know of two model outputs to rescale their combination."""

import math

import torch

from genkern.core import Op
from genkern.ops._common import check_float, working_type
from genkern.testing._case import Case


def guidance_moments(model_output):
    """(N, 5): sum u, sum c, sum u^2, sum u c, sum c^2 over each sample, u and c the halves of model_output (2 N, ...), in one pass.

    Sum and sum of squares of every g_u u + g_c c follow without another pass: what the rescaling of Lin et al., 2023 (eq. 15, 16)
    and other adaptive guidance weights need. float32, float64, bfloat16, float16; summed and returned in float32 (float64). No
    gradient. TypeError, ValueError on anything else.
    """
    check_float("guidance_moments", "model_output", model_output)
    if model_output.dim() == 0 or model_output.shape[0] % 2:
        raise ValueError(f"guidance_moments: model_output must have an even number of samples, got shape {tuple(model_output.shape)}")
    return _guidance_moments(model_output.detach())


def rescale_weight(moments, g_u, g_c, rescale, count):
    """(N,) factor of m = g_u u + g_c c: rescale std(c) / std(m) + 1 - rescale (Lin et al., 2023, eq. 15, 16); count elements each."""
    u, c, uu, uc, cc = moments.unbind(-1)
    variance_c = cc - c * c / count
    variance_m = g_u * g_u * uu + 2 * g_u * g_c * uc + g_c * g_c * cc - (g_u * u + g_c * c) ** 2 / count
    ratio = (variance_c.clamp(min=0) / variance_m.clamp(min=torch.finfo(moments.dtype).tiny)).sqrt()
    return rescale * ratio + (1 - rescale)


def _reference(model_output):
    u, c = model_output.to(working_type(model_output)).reshape(model_output.shape[0], model_output.shape[1:].numel()).chunk(2)
    return torch.stack([u.sum(1), c.sum(1), (u * u).sum(1), (u * c).sum(1), (c * c).sum(1)], 1)


_guidance_moments = Op(
    "guidance_moments",
    "(Tensor model_output) -> Tensor",
    reference=_reference,
    fake=lambda model_output: model_output.new_empty((model_output.shape[0] // 2, 5), dtype=working_type(model_output)),
)


def _eager(model_output):
    """Deviations of both and of the guided output, as pipelines take them."""
    u, c = model_output.chunk(2)
    m = u + 7.5 * (c - u)
    dims = list(range(1, m.dim()))
    return c.std(dim=dims, keepdim=True) / m.std(dim=dims, keepdim=True)


CASES = (
    Case(
        guidance_moments,
        lambda make, shape: {"model_output": make((2 * shape[0], *shape[1:]))},
        shapes=((2, 3, 5, 7), (0, 4), (3, 37), (3, 0), (2, 1031)),
        constants=None,
        eager=_eager,
        bytes=lambda shape, size: 2 * size * math.prod(shape),
        bench_shapes=((2, 4, 64, 64), (8, 3, 256, 256)),
    ),
)
