"""sampler_step: one step of any linear diffusion sampler, its coefficients a row of a table."""

import math

import torch

from genkern import random
from genkern.core import Op
from genkern.ops._common import check_device, check_float, check_like, check_shape, in_working_type, same_precision, working_type
from genkern.testing._case import Case


def sampler_step(
    x,
    model_output,
    table,
    step,
    h1=None,
    h2=None,
    *,
    noise=None,
    key=None,
    generator=None,
    clip=None,
    next_input=False,
    out=None,
    history_out=None,
    input_out=None,
):
    """One step of a diffusion sampler in one pass: guidance, prediction, clip, update, history and the next model input.

        m       = g_u u + g_c c                         guidance (Ho & Salimans, 2021, eq. 6); the model output itself without it
        y       = clip(a x + b m)                       the prediction: data, noise or a derivative
        x'      = S . [x, m, y, noise, h1, h2]          the next sample
        h'      = H . [x, m, y, noise, h1, h2]          the next history term, where h1 is given
        input'  = scale x'                              the next model input, written twice under guidance

    DDPM, DDIM, Euler, Heun, DPM-Solver++, UniPC, LCM, flow matching and others are such steps (genkern.samplers makes their tables).

    x               (N, ...) the sample, of any shape
    model_output    (N, ...); or (2 N, ...), outputs u without and c with the condition one after the other
    table           (steps, 13 + 2 K) coefficients, K the number of history terms given. Columns: g_u, g_c; a, b; the 4 + K of S;
                    those of H; scale. g_u, g_c count only under guidance, H only where K > 0
    step            the row of the table: an int, or an int64 tensor () or (N,), one for each sample, on the device of x, where it
                    is read by the kernel: without synchronisation. Indices on a GPU are clamped to the table
    h1, h2          (N, ...) earlier history terms, the latest first. All of them are read: fill unused ones with zeros
    noise           (N, ...); True: drawn in registers from `key`
    key             int64 (2,), or (N, 2) for one stream per sample: the noise is genkern.random.normal(key, x.shape). None with
                    noise=True: drawn from `generator`, or from torch's default generator
    clip            None, or the bound of |y|
    next_input      also return the next model input, of the shape and type of model_output
    out, history_out, input_out     where to write x', h' and input' instead of new tensors; contiguous rows. They may be x and the
                    last history term themselves, so that a step allocates nothing

    Returns x', or a tuple (x'[, h'][, input']). float32, float64, bfloat16, float16, also mixed; computed in float32 (float64 if a
    tensor is). x' has the type of x, h' of h1. No gradient. TypeError, ValueError on anything else.
    """
    check_float("sampler_step", "x", x)
    if x.dim() == 0:
        raise ValueError("sampler_step: x must have a leading sample dimension, got shape ()")
    check_float("sampler_step", "model_output", model_output)
    check_device("sampler_step", "model_output", model_output, "x", x)
    if model_output.shape[1:] != x.shape[1:] or model_output.shape[0] not in (x.shape[0], 2 * x.shape[0]):
        shapes = f"{tuple(x.shape)} and {tuple(model_output.shape)}"
        raise ValueError(f"sampler_step: model_output must have the shape of x, or twice its samples, got {shapes}")
    if h1 is None and h2 is not None:
        raise ValueError("sampler_step: h2 needs h1")
    for name, tensor in (("h1", h1), ("h2", h2), ("noise", None if noise is True else noise)):
        if tensor is not None:
            check_like("sampler_step", name, tensor, "x", x)
    steps, step = _check_step(table, step, x, 13 + 2 * ((h1 is not None) + (h2 is not None)))
    if noise is True or key is not None or generator is not None:
        if noise is not None and noise is not True:
            raise ValueError("sampler_step: give noise as a tensor or a key, not both")
        key, noise = _key(key, generator, x), None
    clip = math.inf if clip is None else float(clip)
    if not clip > 0:
        raise ValueError(f"sampler_step: clip must be positive, got {clip}")

    tensors = same_precision((x, model_output, h1, h2, noise))
    if any(t is not None and t.requires_grad for t in tensors):
        tensors = [None if t is None else t.detach() for t in tensors]
    x, model_output, h1, h2, noise = tensors
    table = table.detach().to(working_type(*tensors)).contiguous()
    given = [t for t in (out, history_out, input_out) if t is not None]
    shape = x.shape
    out = _output("out", out, shape, x)
    outputs = [out]
    if h1 is not None:
        history_out = _output("history_out", history_out, shape, h1, x)
        outputs.append(history_out)
    elif history_out is not None:
        raise ValueError("sampler_step: history_out needs h1")
    if next_input or input_out is not None:
        input_out = _output("input_out", input_out, model_output.shape, model_output, x)
        outputs.append(input_out)
    _sampler_step(x, model_output, table, steps, step, h1, h2, noise, key, clip, out, history_out, input_out)
    if given:
        torch.autograd.graph.increment_version(given)
    return tuple(outputs) if len(outputs) > 1 else out


def _check_step(table, step, x, width):
    """(tensor of steps or None, int)."""
    check_float("sampler_step", "table", table, 2)
    check_shape("sampler_step", "table", table, (table.shape[0], width), "(steps, 13 + 2 K)")
    check_device("sampler_step", "table", table, "x", x)
    if not isinstance(step, torch.Tensor):
        if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
            raise TypeError(f"sampler_step: step must be an int or an int64 tensor, got {type(step).__name__}")
        if not 0 <= step < table.shape[0]:
            raise ValueError(f"sampler_step: step must be in [0, {table.shape[0]}), got {step}")
        return None, step
    if step.dtype != torch.int64 or (step.dim() and step.shape != x.shape[:1]):
        raise ValueError(f"sampler_step: step must be int64 () or ({x.shape[0]},), got {step.dtype} {tuple(step.shape)}")
    check_device("sampler_step", "step", step, "x", x)
    if step.device.type == "cpu" and step.numel() and not torch.compiler.is_compiling():
        low, high = (step.item(), step.item()) if step.dim() == 0 else (step.min().item(), step.max().item())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(f"sampler_step: step must be in [0, {table.shape[0]}), got {low} ... {high}")
    return step.contiguous(), 0


def _key(key, generator, x):
    if key is None:
        return random.draw_key(generator, x.device)
    if generator is not None:
        raise ValueError("sampler_step: give key or generator, not both")
    random.check_key("sampler_step", key)
    if key.dim() == 2 and key.shape[0] != x.shape[0]:
        raise ValueError(f"sampler_step: one key per sample needs key ({x.shape[0]}, 2), got {tuple(key.shape)}")
    return random.beside(key, x)


def _output(name, out, shape, like, x=None):
    """out if given and usable, else a new tensor of this shape and the type of `like`."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    check_float("sampler_step", name, out)
    check_shape("sampler_step", name, out, shape)
    check_device("sampler_step", name, out, "x", like)
    if (out.dtype == torch.float64) != (like.dtype == torch.float64):
        raise ValueError(f"sampler_step: float64 does not mix with narrower outputs: {name} is {out.dtype}, expected {like.dtype}")
    if not (out.is_contiguous() or (out.numel() and out[0].is_contiguous())):
        raise ValueError(f"sampler_step: the samples of {name} must be contiguous")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"sampler_step: {name} requires grad; a step has no gradient")
    return out


def _reference(x, model_output, table, steps, step, h1, h2, noise, key, clip, out, history_out, input_out):
    x, model_output, table, h1, h2, noise = in_working_type(x, model_output, table, h1, h2, noise)
    row = table[step] if steps is None else table[steps.clamp(0, table.shape[0] - 1)]
    g_u, g_c, a, b, *rest, scale = (c.reshape(c.shape + (1,) * (x.dim() - c.dim())) for c in row.unbind(-1))
    m = model_output
    if m.shape[0] != x.shape[0]:
        u, c = m.chunk(2)
        m = g_u * u + g_c * c
    y = a * x + b * m
    if clip < math.inf:
        y = y.clamp(-clip, clip)
    if key is not None:
        noise = random.normal(key, x.shape, dtype=x.dtype, device=x.device)
    half = len(rest) // 2
    new, history = (_combination(row, (x, m, y, noise, h1, h2)) for row in (rest[:half], rest[half:]))
    out.copy_(new)
    if history_out is not None:
        history_out.copy_(history)
    if input_out is not None:
        scaled = scale * new
        input_out.copy_(scaled if input_out.shape == x.shape else torch.cat([scaled, scaled]))


def _combination(coefficients, terms):
    return sum(c * t for c, t in zip(coefficients, terms, strict=False) if t is not None)


_sampler_step = Op(
    "sampler_step",
    "(Tensor x, Tensor model_output, Tensor table, Tensor? steps, int step, Tensor? h1, Tensor? h2, Tensor? noise, Tensor? key, "
    "float clip, Tensor(a!) out, Tensor(b!)? history_out, Tensor(c!)? input_out) -> ()",
    reference=_reference,
    fake=lambda *args: None,
)

# ---- case


def _doubled(make, shape, **kwargs):
    return make((2 * shape[0], *shape[1:]), **kwargs)


def _arguments(make, shape):
    """Guidance and one history term, as in DPM-Solver++ 2M."""
    return {
        "x": make(shape), "model_output": _doubled(make, shape), "table": make((3, 15)), "step": 1, "h1": make(shape),
    }  # fmt: skip


def _one_of_all(make, shape):
    """Two history terms, noise from one key, a step index per sample."""
    return {
        "x": make(shape), "model_output": make(shape), "table": make((3, 17)), "h1": make(shape), "h2": make(shape),
        "step": torch.arange(shape[0], device=make.device) % 3, "key": random.key(5, device=make.device), "noise": True,
    }  # fmt: skip


def _given_noise(make, shape):
    """No history, noise as a tensor, one step index on the device."""
    return {
        "x": make(shape), "model_output": _doubled(make, shape), "table": make((3, 13)), "noise": make(shape),
        "step": torch.tensor(2, device=make.device),
    }  # fmt: skip


def _key_per_sample(make, shape):
    return {
        "x": make(shape), "model_output": make(shape), "table": make((3, 13)), "step": 0,
        "key": random.split(random.key(5, device=make.device), shape[0]), "noise": True,
    }  # fmt: skip


# What a step of DPM-Solver++ 2M takes in plain torch, with the doubling of the next model input.
_EAGER = {"g": 7.5, "a": 1.1, "b": -0.4, "x": 0.9, "y": 0.2, "h1": -0.1}


def _eager(x, model_output, table, step, h1):
    u, c = model_output.chunk(2)
    m = u + _EAGER["g"] * (c - u)
    y = _EAGER["a"] * x + _EAGER["b"] * m
    x = _EAGER["x"] * x + _EAGER["y"] * (y + _EAGER["h1"] * (y - h1))
    return x, y, torch.cat([x, x])


CASES = (
    Case(
        sampler_step,
        _arguments,
        forms=(_one_of_all, _given_noise, _key_per_sample),
        shapes=((2, 3, 5, 7), (0, 4), (3, 37), (5,), (2, 1031)),
        variants=({}, {"clip": 0.5, "next_input": True}),
        constants=None,
        eager=_eager,
        bytes=lambda shape, size: 8 * size * math.prod(shape),
        bench_shapes=((2, 4, 64, 64), (8, 3, 256, 256)),
        bench_variant={"next_input": True},
    ),
)
