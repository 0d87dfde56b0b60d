"""sampler_step: one step of any linear diffusion sampler, its coefficients a row of a table."""

import math

import torch

from genkern import random
from genkern.core import Op
from genkern.ops._common import (
    check_device,
    check_float,
    check_like,
    check_number,
    check_shape,
    check_written,
    in_working_type,
    same_precision,
    working_type,
)
from genkern.ops.diffusion._sampler_step_moments import _moments, guidance_moments, guidance_weights
from genkern.testing._case import Case


def sampler_step(
    x,
    model_output,
    table,
    step,
    h1=None,
    h2=None,
    h3=None,
    *,
    noise=None,
    key=None,
    generator=None,
    clip=None,
    bound=None,
    moments=None,
    rescale=0.0,
    parallel=1.0,
    max_norm=None,
    learned_variance=False,
    next_input=False,
    out=None,
    history_out=None,
    input_out=None,
):
    """One step of a diffusion sampler in one pass: guidance, prediction, clip, update, history and the next model input.

        m       = g_u u + g_c c                             guidance (Ho & Salimans, 2021, eq. 6); the model output itself without it
        y       = clip(a x + b m)                           the prediction: data, noise or a derivative
        x'      = S . [x, m, y, noise, h1, h2, h3]          the next sample
        h'      = H . [x, m, y, noise, h1, h2, h3]          the next history term, where h1 is given
        input'  = scale x'                                  the next model input, written twice under guidance

    DDPM, DDIM, Euler, Heun, DPM-Solver++, UniPC, LCM, flow matching and others are such steps (genkern.samplers makes their tables).

    x               (N, ...) the sample, of any shape
    model_output    (N, ...); or (2 N, ...), outputs u without and c with the condition one after the other
    table           (steps, 13 + 2 K) coefficients, K the number of history terms given. Columns: g_u, g_c; a, b; the 4 + K of S;
                    those of H; scale. g_u, g_c count only under guidance, H only where K > 0
    step            the row of the table: an int, or an int64 tensor () or (N,), one for each sample, on the device of x, where it
                    is read by the kernel: without synchronisation. Indices on a GPU are clamped to the table
    h1, h2, h3      (N, ...) earlier history terms, the latest first. All of them are read: fill unused ones with zeros
    noise           (N, ...); True: drawn in registers from `key`
    key             int64 (2,), or (N, 2) for one stream per sample: the noise is genkern.random.normal(key, x.shape). None with
                    noise=True: drawn from `generator`, or from torch's default generator
    clip            None, or the bound of |y|
    bound           (N,) dynamic_threshold's: y = clip(y, -bound, bound) / bound (Saharia et al., 2022, section 2.3)
    moments         (N, 5) guidance_moments(model_output): with them m is c + (g_c - 1) f (d - (1 - parallel) d_c), d = c - u,
                    d_c its part along c and f = min(1, max_norm / |d|) (adaptive projected guidance; Sadat et al., 2024, algorithm 1),
                    then m (rescale std(c) / std(m) + 1 - rescale) (Lin et al., 2023, eq. 15, 16), per sample. g_u must be 1 - g_c
    learned_variance    model_output has twice the channels, the second half v: where x_0 or noise is told, the standard deviation
                    exp((v' log max + (1 - v') log min) / 2), v' = (v + 1) / 2, multiplies the noise (Nichol & Dhariwal, 2021, eq. 15);
                    the table ends in two more columns, log min and log max; with -1 and 1 v is the logarithm itself. Under guidance
                    v is that of c
    next_input      also return the next model input, of the shape and type of model_output
    out, history_out, input_out     where to write x', h' and input' instead of new tensors; contiguous rows. They may be x and the
                    last history term themselves, so that a step allocates nothing. input_out may have the shape of x under guidance
                    too: written once

    Returns x', or a tuple (x'[, h'][, input']). float32, float64, bfloat16, float16, also mixed; computed in float32 (float64 if a
    tensor is). x' has the type of x, h' of h1. No gradient. TypeError, ValueError on anything else.
    """
    draws = noise is True or key is not None or generator is not None
    if draws:
        if noise is not None and noise is not True:
            raise ValueError("sampler_step: give noise as a tensor or a key, not both")
        noise = None
    clip = math.inf if clip is None else clip
    check_number("sampler_step", "clip", clip)
    if not clip > 0:
        raise ValueError(f"sampler_step: clip must be positive, got {clip}")
    steps = None
    plain = moments is bound is max_norm is None and rescale == 0 and parallel == 1 and not learned_variance
    if plain and _plain(x, model_output, table, step, h1, h2, h3, noise, out, history_out, input_out):
        max_norm = math.inf
    else:
        _check_tensors(x, model_output, learned_variance, h1=h1, h2=h2, h3=h3, noise=noise)
        width = 13 + 2 * ((h1 is not None) + (h2 is not None) + (h3 is not None)) + 2 * learned_variance
        steps, step = _check_step("sampler_step", table, step, x, width)
        max_norm = _check_guidance("sampler_step", moments, model_output, x, rescale, parallel, max_norm)
        if bound is not None:
            check_float("sampler_step", "bound", bound)
            check_shape("sampler_step", "bound", bound, x.shape[:1], "(N,)")
            check_device("sampler_step", "bound", bound, "x", x)
        tensors = same_precision((x, model_output, h1, h2, h3, noise))
        if any(t is not None and t.requires_grad for t in tensors):
            tensors = [None if t is None else t.detach() for t in tensors]
        x, model_output, h1, h2, h3, noise = tensors
        table, moments, bound = _small(working_type(*tensors), table, moments, bound)
        shape = x.shape
        _check_output("out", out, shape, x)
        _check_output("history_out", history_out, shape, h1)
        once = input_out is not None and input_out.shape == shape
        _check_output("input_out", input_out, shape if once else (model_output.shape[0], *shape[1:]), model_output)
    if draws:
        key = random.key_for("sampler_step", key, generator, x)
    written = {n: t for n, t in (("out", out), ("history_out", history_out), ("input_out", input_out)) if t is not None}
    if written:
        check_written("sampler_step", written, (x, model_output, h1, h2, h3, noise))
    out = _new(x) if out is None else out
    outputs = [out]
    if h1 is not None:
        history_out = _new(h1) if history_out is None else history_out
        outputs.append(history_out)
    if next_input or input_out is not None:
        if input_out is None:
            input_out = _new(model_output.chunk(2, 1)[0] if learned_variance else model_output)
        outputs.append(input_out)
    _sampler_step(
        x, model_output, table, step, h1, h2, h3, out, history_out, input_out, steps, noise, key, moments, bound, float(clip),
        float(rescale), float(parallel), max_norm, learned_variance,
    )  # fmt: skip
    if written:
        torch.autograd.graph.increment_version(list(written.values()))
    return tuple(outputs) if len(outputs) > 1 else out


def dynamic_threshold(
    x, model_output, table, step, *, moments=None, rescale=0.0, parallel=1.0, max_norm=None, quantile=0.995, maximum=1.0
):
    """(N,) bounds of sampler_step's prediction y = a x + b m: the quantile of |y| of each sample, at least 1, at most `maximum`.

    Dynamic thresholding (Saharia et al., 2022, section 2.3); between two elements the quantile is interpolated. For sampler_step's
    `bound`. Other arguments as there; model_output may have more channels than x, which are not read. float32 (float64 where a
    tensor is). No gradient. TypeError, ValueError on anything else.
    """
    op = "dynamic_threshold"
    check_float(op, "x", x)
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have a leading sample dimension, got shape ()")
    check_float(op, "model_output", model_output)
    _check_model_output(op, model_output, x, model_output.dim() > 1 and x.dim() > 1 and model_output.shape[1] == 2 * x.shape[1])
    steps, step = _check_step(op, table, step, x, None)
    max_norm = _check_guidance(op, moments, model_output, x, rescale, parallel, max_norm)
    check_number(op, "quantile", quantile)
    check_number(op, "maximum", maximum)
    if not (0 <= quantile <= 1 and maximum >= 1):
        raise ValueError(f"{op}: quantile must be in [0, 1] and maximum at least 1, got {quantile} and {maximum}")
    x, model_output = (t.detach() for t in same_precision((x, model_output)))
    table, moments = _small(working_type(x), table, moments)
    numbers = (float(rescale), float(parallel), max_norm, float(quantile), float(maximum))
    return _dynamic_threshold(x, model_output, table, steps, step, moments, *numbers)


_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def _plain(x, model_output, table, step, h1, h2, h3, noise, out, history_out, input_out):
    """Whether at a glance everything is as it must be and as the kernel takes it: in the usual call the checks are half of the time.

    What this turns down goes through the checks that say what is wrong, and may well be accepted there.
    """
    if not (type(x) is type(model_output) is type(table) is torch.Tensor and type(step) is int):
        return False
    shape, device, of_model, size = x.shape, x.device, model_output.shape, table.shape
    terms = (h1 is not None) + (h2 is not None) + (h3 is not None)
    if not (
        of_model[1:] == shape[1:] and shape and of_model[0] in (shape[0], 2 * shape[0])
        and x.dtype in _NARROW and model_output.dtype in _NARROW and table.dtype is torch.float32
        and model_output.device == device and table.device == device
        and not (x.requires_grad or model_output.requires_grad or table.requires_grad)
        and len(size) == 2 and size[1] == 13 + 2 * terms and 0 <= step < size[0] and table.is_contiguous()
        and (h1, h2, h3)[terms:] == (None, None, None)[terms:] and (terms or history_out is None)
    ):  # fmt: skip
        return False
    for t in (h1, h2, h3, noise, out, history_out, input_out):
        if t is not None and not (
            type(t) is torch.Tensor and (t.shape == shape or (t is input_out and t.shape == of_model)) and t.dtype in _NARROW
            and t.device == device and t.is_contiguous() and not t.requires_grad
        ):  # fmt: skip
            return False
    return True


def _check_tensors(x, model_output, learned_variance, **others):
    check_float("sampler_step", "x", x)
    if x.dim() == 0:
        raise ValueError("sampler_step: x must have a leading sample dimension, got shape ()")
    check_float("sampler_step", "model_output", model_output)
    _check_model_output("sampler_step", model_output, x, learned_variance)
    h1, h2, h3 = others["h1"], others["h2"], others["h3"]
    if (h1 is None and h2 is not None) or (h2 is None and h3 is not None):
        raise ValueError("sampler_step: h2 needs h1, h3 needs h2")
    for name, tensor in others.items():
        if tensor is not None:
            check_like("sampler_step", name, tensor, "x", x)


def _new(like):
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _small(dtype, *tensors):
    """Coefficients in the type of the arithmetic."""
    return [None if t is None else t.detach().to(dtype).contiguous() for t in tensors]


def _check_model_output(op, model_output, x, learned_variance):
    check_device(op, "model_output", model_output, "x", x)
    channels = x.shape[1:2] if not learned_variance else (2 * x.shape[1],) if x.dim() > 1 else (-1,)
    given, n = tuple(model_output.shape), x.shape[0]
    if given[1:2] != tuple(channels) or given[2:] != tuple(x.shape[2:]) or given[0] not in (n, 2 * n):
        twice = ", with twice its channels" if learned_variance else ""
        shapes = f"{tuple(x.shape)} and {given}"
        raise ValueError(f"{op}: model_output must have the shape of x{twice}, or twice its samples, got {shapes}")


def _check_guidance(op, moments, model_output, x, rescale, parallel, max_norm):
    """The largest norm as a number."""
    for name, value in (("rescale", rescale), ("parallel", parallel), ("max_norm", 1.0 if max_norm is None else max_norm)):
        check_number(op, name, value)
    if moments is None:
        if rescale != 0 or parallel != 1 or max_norm is not None:
            raise ValueError(f"{op}: rescale, parallel and max_norm need moments, those of guidance_moments(model_output)")
        return math.inf
    if model_output.shape[0] != 2 * x.shape[0]:
        raise ValueError(f"{op}: moments need a model_output of twice the samples of x, got {tuple(model_output.shape)}")
    check_float(op, "moments", moments)
    check_shape(op, "moments", moments, (x.shape[0], 5), "(N, 5)")
    check_device(op, "moments", moments, "x", x)
    if not 0 <= rescale <= 1:
        raise ValueError(f"{op}: rescale must be in [0, 1], got {rescale}")
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"{op}: max_norm must be positive, got {max_norm}")
    return math.inf if max_norm is None else float(max_norm)


def _check_step(op, table, step, x, width):
    """(tensor of steps or None, int)."""
    check_float(op, "table", table, 2)
    if width is not None:
        check_shape(op, "table", table, (table.shape[0], width), "(steps, 13 + 2 K)")
    check_device(op, "table", table, "x", x)
    if not isinstance(step, torch.Tensor):
        if isinstance(step, bool) or not isinstance(step, (int, torch.SymInt)):
            raise TypeError(f"{op}: step must be an int or an int64 tensor, got {type(step).__name__}")
        if not 0 <= step < table.shape[0]:
            raise ValueError(f"{op}: step must be in [0, {table.shape[0]}), got {step}")
        return None, step
    if step.dtype != torch.int64 or (step.dim() and step.shape != x.shape[:1]):
        raise ValueError(f"{op}: step must be int64 () or ({x.shape[0]},), got {step.dtype} {tuple(step.shape)}")
    check_device(op, "step", step, "x", x)
    if step.device.type == "cpu" and step.numel() and not torch.compiler.is_compiling():
        low, high = (step.item(), step.item()) if step.dim() == 0 else (step.min().item(), step.max().item())
        if low < 0 or high >= table.shape[0]:
            raise ValueError(f"{op}: step must be in [0, {table.shape[0]}), got {low} ... {high}")
    return step.contiguous(), 0


def _check_output(name, out, shape, like):
    """out, if given, is somewhere to write a tensor of this shape and near the type of `like`."""
    if out is None:
        return
    if like is None:
        raise ValueError("sampler_step: history_out needs h1")
    check_float("sampler_step", name, out)
    check_shape("sampler_step", name, out, shape)
    check_device("sampler_step", name, out, "x", like)
    if (out.dtype == torch.float64) != (like.dtype == torch.float64):
        raise ValueError(f"sampler_step: float64 does not mix with narrower outputs: {name} is {out.dtype}, expected {like.dtype}")
    if not (out.is_contiguous() or (out.numel() and out[0].is_contiguous())):
        raise ValueError(f"sampler_step: the samples of {name} must be contiguous")
    if out.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"sampler_step: {name} requires grad; a step has no gradient")


def _coefficients(table, steps, step, x):
    row = table[step] if steps is None else table[steps.clamp(0, table.shape[0] - 1)]
    return [_per_sample(c, x) for c in row.unbind(-1)]


def _per_sample(c, x):
    return c.reshape(c.shape + (1,) * (x.dim() - c.dim()))


def _guided(x, model_output, g_u, g_c, moments, rescale, parallel, max_norm):
    m = model_output
    if m.shape[0] == x.shape[0]:
        return m
    u, c = m.chunk(2)
    if moments is None:
        return g_u * u + g_c * c
    on_c, on_d = guidance_weights(moments, g_c.reshape(-1), rescale, parallel, max_norm, x.shape[1:].numel())
    return _per_sample(on_c, x) * c + _per_sample(on_d, x) * (c - u)


def _reference(
    x, model_output, table, step, h1, h2, h3, out, history_out, input_out, steps=None, noise=None, key=None, moments=None,
    bound=None, clip=None, rescale=0.0, parallel=1.0, max_norm=None, learned=False,
):  # fmt: skip
    clip, max_norm = (math.inf if limit is None else limit for limit in (clip, max_norm))
    x, model_output, table, h1, h2, h3, noise = in_working_type(x, model_output, table, h1, h2, h3, noise)
    g_u, g_c, a, b, *rest = _coefficients(table, steps, step, x)
    if learned:
        model_output, v = model_output.chunk(2, 1)
        *rest, low, high = rest
    *rest, scale = rest
    adaptive = rescale != 0 or parallel != 1 or max_norm < math.inf
    if moments is None and adaptive and model_output.shape[0] != x.shape[0]:  # the CPU's kernel can be asked to take them itself
        moments = _moments(model_output)
    m = _guided(x, model_output, g_u, g_c, moments, rescale, parallel, max_norm)
    y = a * x + b * m
    if clip < math.inf:
        y = y.clamp(-clip, clip)
    if bound is not None:
        bound = _per_sample(bound, x)
        y = torch.maximum(torch.minimum(y, bound), -bound) / bound
    if key is not None:
        noise = random.normal(key, x.shape, dtype=x.dtype, device=x.device)
    if learned and noise is not None:
        part = (v[-x.shape[0] :] + 1) / 2 if x.shape[0] else v[:0]
        noise = noise * torch.exp(0.5 * (part * high + (1 - part) * low))
    half = len(rest) // 2
    new, history = (_combination(row, (x, m, y, noise, h1, h2, h3)) for row in (rest[:half], rest[half:]))
    out.copy_(new)
    if history_out is not None:
        history_out.copy_(history)
    if input_out is not None:
        scaled = scale * new
        input_out.copy_(scaled if input_out.shape == x.shape else torch.cat([scaled, scaled]))


def _combination(coefficients, terms):
    return sum(c * t for c, t in zip(coefficients, terms, strict=False) if t is not None)


def _reference_threshold(x, model_output, table, steps, step, moments, rescale, parallel, max_norm, quantile, maximum):
    x, model_output, table = in_working_type(x, model_output, table)
    if model_output.shape[1:] != x.shape[1:]:
        model_output = model_output.chunk(2, 1)[0]
    if x.numel() == 0:
        return x.new_ones(x.shape[0])
    g_u, g_c, a, b, *_ = _coefficients(table, steps, step, x)
    y = a * x + b * _guided(x, model_output, g_u, g_c, moments, rescale, parallel, max_norm)
    ordered = y.reshape(x.shape[0], -1).abs().sort(1).values
    at = quantile * (ordered.shape[1] - 1)
    low = ordered[:, int(at)]
    high = ordered[:, min(int(at) + 1, ordered.shape[1] - 1)]
    return (low + (at - int(at)) * (high - low)).clamp(1.0, maximum)


_sampler_step = Op(
    "sampler_step",
    # What a plain step has stands first: every argument that is passed costs a tenth of a microsecond, those left out nothing.
    "(Tensor x, Tensor model_output, Tensor table, int step, Tensor? h1, Tensor? h2, Tensor? h3, Tensor(a!) out, "
    "Tensor(b!)? history_out, Tensor(c!)? input_out, Tensor? steps=None, Tensor? noise=None, Tensor? key=None, "
    "Tensor? moments=None, Tensor? bound=None, float? clip=None, float rescale=0.0, float parallel=1.0, float? max_norm=None, "
    "bool learned=False) -> ()",
    reference=_reference,
    fake=lambda *args: None,
)

_dynamic_threshold = Op(
    "dynamic_threshold",
    "(Tensor x, Tensor model_output, Tensor table, Tensor? steps, int step, Tensor? moments, float rescale, float parallel, "
    "float max_norm, float quantile, float maximum) -> Tensor",
    reference=_reference_threshold,
    fake=lambda x, *rest: x.new_empty(x.shape[:1], dtype=working_type(x)),
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
    """Three history terms, noise from one key, a step index per sample."""
    return {
        "x": make(shape), "model_output": make(shape), "table": make((3, 19)), "h1": make(shape), "h2": make(shape), "h3": make(shape),
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


def _adaptive(make, shape):
    """Guidance by moments, a bound per sample, two history terms."""
    model_output = _doubled(make, shape)
    return {
        "x": make(shape), "model_output": model_output, "table": make((3, 17)), "step": 1, "h1": make(shape), "h2": make(shape),
        "moments": guidance_moments(model_output), "rescale": 0.7, "parallel": 0.2, "max_norm": 3.0, "noise": make(shape),
        "bound": 1 + make((shape[0],)).abs(),
    }  # fmt: skip


def _learned_variance(make, shape):
    channels = (shape[0], 2 * shape[1], *shape[2:]) if len(shape) > 1 else shape
    more = {} if len(shape) == 1 else {"learned_variance": True}
    return {
        "x": make(shape), "model_output": make(channels), "table": make((3, 15 if more else 13)), "step": 1, "noise": True,
        "key": random.key(5, device=make.device), **more,
    }  # fmt: skip


def _guided_threshold(make, shape):
    model_output = _doubled(make, shape)
    return {
        "x": make(shape), "model_output": model_output, "table": make((3, 13)), "moments": guidance_moments(model_output),
        "rescale": 0.7, "step": torch.arange(shape[0], device=make.device) % 3,
    }  # fmt: skip


# What a step of DPM-Solver++ 2M takes in plain torch, with the doubling of the next model input.
_EAGER = {"g": 7.5, "a": 1.1, "b": -0.4, "x": 0.9, "y": 0.2, "h1": -0.1}


def _eager(x, model_output, table, step, h1):
    u, c = model_output.chunk(2)
    m = u + _EAGER["g"] * (c - u)
    y = _EAGER["a"] * x + _EAGER["b"] * m
    x = _EAGER["x"] * x + _EAGER["y"] * (y + _EAGER["h1"] * (y - h1))
    return x, y, torch.cat([x, x])


def _peers():
    """diffusers' own step in the middle of a run, with what pipelines do around it."""
    import diffusers

    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(20)
    scheduler.set_begin_index(0)
    scheduler._init_step_index(scheduler.timesteps[0])
    t = scheduler.timesteps[10]

    def step_of_diffusers(x, model_output, table, step, h1):
        u, c = model_output.chunk(2)
        scheduler._step_index, scheduler.lower_order_nums, scheduler.model_outputs = 10, 2, [h1, h1]
        x = scheduler.step(u + 7.5 * (c - u), t, x, return_dict=False)[0]
        return x, scheduler.model_outputs[-1], torch.cat([x, x])

    return {"diffusers": step_of_diffusers}


CASES = (
    Case(
        sampler_step,
        _arguments,
        forms=(_one_of_all, _given_noise, _key_per_sample, _adaptive, _learned_variance),
        shapes=((2, 3, 5, 7), (0, 4), (3, 37), (5,), (2, 1031)),
        variants=({}, {"clip": 0.5, "next_input": True}),
        constants=None,
        eager=_eager,
        peers=_peers,
        bytes=lambda shape, size: 8 * size * math.prod(shape),
        bench_shapes=((2, 4, 64, 64), (8, 3, 256, 256)),
        bench_variant={"next_input": True},
    ),
    Case(
        dynamic_threshold,
        lambda make, shape: {"x": make(shape, 1.5), "model_output": make(shape), "table": make((3, 13)), "step": 1},
        forms=(_guided_threshold,),
        shapes=((2, 3, 5, 7), (0, 4), (3, 37), (5,), (2, 1031)),
        variants=({"quantile": 0.9, "maximum": 2.5}, {"quantile": 0.5}),
        constants=None,
        eager=lambda x, model_output, table, step: (x - model_output).reshape(len(x), -1).abs().quantile(0.995, 1).clamp(1, 2),
        bytes=lambda shape, size: 2 * size * math.prod(shape),
        bench_shapes=((2, 3, 64, 64), (8, 3, 256, 256)),
        bench_variant={"maximum": 2.0},
    ),
)
