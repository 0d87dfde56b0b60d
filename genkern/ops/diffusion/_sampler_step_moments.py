"""guidance_moments: what classifier-free guidance must know of two model outputs to rescale their combination."""

import math

import torch

from genkern.core import Op
from genkern.ops._common import check_float, working_type
from genkern.testing._case import Case


def guidance_moments(model_output, *, learned_variance=False):
    """(N, 5): sum c, sum d, sum d^2, sum c d, sum c^2 over each sample, d = c - u, u and c the halves of model_output (2 N, ...).

    Mean and deviation of every combination of the two follow without another pass: what sampler_step needs for the rescaling of
    Lin et al., 2023 and the projected guidance of Sadat et al., 2024. learned_variance: the second half of the channels (dimension
    1) is not counted. float32, float64, bfloat16, float16; summed and returned in float32 (float64). No gradient. TypeError,
    ValueError on anything else.
    """
    check_float("guidance_moments", "model_output", model_output)
    if model_output.dim() == 0 or model_output.shape[0] % 2:
        raise ValueError(f"guidance_moments: model_output must have an even number of samples, got shape {tuple(model_output.shape)}")
    if learned_variance and (model_output.dim() < 2 or model_output.shape[1] % 2):
        raise ValueError(f"guidance_moments: learned_variance needs an even number of channels, got {tuple(model_output.shape)}")
    return _guidance_moments(model_output.detach(), learned_variance)


def guidance_weights(moments, g, rescale, parallel, max_norm, count):
    """(N,) factors of c and of c - u in sampler_step's adaptive guidance of scale g; count elements per sample."""
    c, d, dd, cd, cc = moments.unbind(-1)
    tiny = 1e-30
    on_d = (g - 1) * (max_norm / dd.clamp(min=tiny).sqrt()).clamp(max=1.0)
    on_c = 1 - on_d * (1 - parallel) * cd / cc.clamp(min=tiny)
    of_c = (cc - c * c / count).clamp(min=0)
    of_m = on_c * on_c * cc + on_d * (2 * on_c * cd + on_d * dd) - (on_c * c + on_d * d) ** 2 / count
    factor = rescale * (of_c / of_m.clamp(min=tiny)).sqrt() + (1 - rescale)
    return on_c * factor, on_d * factor


def _reference(model_output, learned):
    return _moments(model_output.chunk(2, 1)[0] if learned else model_output)


def _moments(model_output):
    u, c = model_output.to(working_type(model_output)).reshape(model_output.shape[0], model_output.shape[1:].numel()).chunk(2)
    d = c - u
    return torch.stack([c.sum(1), d.sum(1), (d * d).sum(1), (c * d).sum(1), (c * c).sum(1)], 1)


_guidance_moments = Op(
    "guidance_moments",
    "(Tensor model_output, bool learned) -> Tensor",
    reference=_reference,
    fake=lambda model_output, learned: model_output.new_empty((model_output.shape[0] // 2, 5), dtype=working_type(model_output)),
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
