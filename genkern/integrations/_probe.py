"""Any linear scheduler of diffusers as a table: its own step is run on unit vectors, and the outputs are its coefficients.

The unknowns of a run are the first sample, the model outputs and the noises; every sample is a combination of them. What later samples
still need of the past is a space of few dimensions (the sample itself and up to three history terms); step by step one vector of it is
kept, and each row of the table is the solution of a small linear system. Nothing is assumed about the formula, and everything is
checked: that runs on random data agree with the combination, and that the table reproduces them.
"""

import contextlib
import copy
import sys

import torch

# Of the ranks: schedulers that keep float64 show their structure to many digits, others carry float32 rounding.
_TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}
MOST_HISTORY = 3  # terms of sampler_step


class NotLinear(ValueError):
    """Why a scheduler cannot be given as a table."""


def probe(own, scheduler, begin, arguments):
    """(table (steps, 13 + 2 K) for the steps from `begin` on, [whether a step draws noise], extras).

    scheduler   after set_timesteps; it is not changed
    own         the class whose step is run
    arguments   keyword arguments of step
    extras      further tables of the same form, one for each tensor that step returns behind the sample
    """
    name = own.__name__
    count = len(scheduler.timesteps) - begin
    any_tensor = lambda _: torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    drawn = _run(own, scheduler, begin, arguments, any_tensor(0), any_tensor, any_tensor)[1]
    if max(drawn) > 1:
        raise NotLinear(f"{name} draws more than one noise in a step")
    noises = sum(drawn)
    size = 1 + count + noises
    unknowns = torch.eye(size, dtype=torch.float64).view(size, 1, size, 1, 1)

    def coefficients(dtype):
        basis = unknowns.to(dtype)
        got = _run(own, scheduler, begin, arguments, basis[0], lambda i: basis[1 + i], lambda j: basis[1 + count + j])[0]
        return torch.stack([torch.stack([o.double().reshape(size) for o in outputs]) for outputs in got])  # (steps, outputs, unknowns)

    rows = coefficients(torch.float32)
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(size, 2, 4, 6, 6, generator=generator)
    actual = _run(own, scheduler, begin, arguments, values[0], lambda i: values[1 + i], lambda j: values[1 + count + j])[0]
    expected = torch.einsum("sou,u...->so...", rows, values.double())
    error = max(_error(e, a) for es, outputs in zip(expected, actual, strict=True) for e, a in zip(es, outputs, strict=True))
    if not error < 2e-6:
        raise NotLinear(f"{name} is not linear in sample, model output and noise (relative error {error:.1e}){suspects(scheduler)}")

    errors = []
    for dtype, tolerance in _TOLERANCES.items():
        rows = coefficients(dtype)
        samples = torch.cat([torch.eye(size, dtype=torch.float64)[:1], rows[:, 0]])  # of every point: (steps + 1, unknowns)
        for history in range(MOST_HISTORY + 1):
            table, extras, error = _realize(samples, rows[:, 1:], drawn, history, tolerance)
            errors.append(error)
            if error < 5e-6:
                return table, [bool(d) for d in drawn], extras
    raise NotLinear(f"{name} needs more than {MOST_HISTORY} history terms (relative error {min(errors):.0e})")


def _error(expected, actual):
    return ((expected - actual.double()).abs().max() / actual.abs().max().clamp(min=1)).item()


def suspects(scheduler):
    """The settings that are known to make a scheduler non-linear."""
    config = scheduler.config
    found = [n for n in ("thresholding", "clip_sample", "clip_denoised", "clip_sample_range") if config.get(n) is True]
    found += [f"variance_type={v!r}" for v in [config.get("variance_type")] if isinstance(v, str) and v.startswith("learned")]
    return ": " + ", ".join(found) if found else ", or its noise does not come from randn_tensor"


def _run(own, scheduler, begin, arguments, x, model_output, noise):
    """([all tensors that each step returned], [noises it drew]) of a run on a copy."""
    scheduler = copy.deepcopy(scheduler)
    vars(scheduler).pop("step", None)
    outputs, drawn, total = [], [], 0

    def next_noise(shape, *args, dtype=None, **kwargs):
        nonlocal total
        value = noise(total)
        total += 1
        return value if dtype is None else value.to(dtype)

    modules = {sys.modules[c.__module__] for c in own.__mro__ if c.__module__ in sys.modules}
    modules = [m for m in modules if hasattr(m, "randn_tensor")]
    originals = [m.randn_tensor for m in modules]
    with contextlib.ExitStack() as stack:
        for module, original in zip(modules, originals, strict=True):
            stack.callback(setattr, module, "randn_tensor", original)
            module.randn_tensor = next_noise
        for i, t in enumerate(scheduler.timesteps[begin:]):
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            before = total
            try:
                result = own.step(scheduler, model_output(i), t, x, **{**arguments, "return_dict": False})
            except Exception as error:
                raise NotLinear(f"{own.__name__} cannot be run on unit vectors: {type(error).__name__}: {error}") from error
            result = [o for o in result if isinstance(o, torch.Tensor)]
            outputs.append([o.clone() for o in result])
            x = result[0]
            drawn.append(total - before)
    return outputs, drawn


def _basis(rows, tolerance):
    """Orthonormal rows that span these, small ones aside."""
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    _, values, basis = torch.linalg.svd(rows, full_matrices=False)
    return basis[values > tolerance * values[:1]]


def _outside(vectors, space):
    """The part of the vectors orthogonal to a space with an orthonormal basis."""
    return vectors - vectors @ space.T @ space


def _realize(samples, others, drawn, history, tolerance):
    """(table, extras, worst relative error) with this many history terms."""
    count, size = len(drawn), samples.shape[1]
    eye = torch.eye(size, dtype=torch.float64)
    first_noise = [1 + count + sum(drawn[:i]) for i in range(count)]
    future = []  # what the points from i on need of the unknowns before step i; a basis
    for i in range(count):
        known = torch.zeros(size, dtype=torch.bool)
        known[: 1 + i] = True
        known[1 + count : first_noise[i]] = True
        future.append(
            _basis(torch.cat([samples[i : i + 1], torch.cat([samples[i + 1 :], others[i:].flatten(0, 1)]) * known]), tolerance)
        )
    kept = []  # of each step, as a combination of the unknowns
    result, extras, worst = [], [[] for _ in range(others.shape[1])], 0.0
    for i in range(count):
        past = [kept[i - k] if i >= k else torch.zeros(size, dtype=torch.float64) for k in range(1, history + 1)]
        noise = eye[first_noise[i]] if drawn[i] else torch.zeros(size, dtype=torch.float64)
        inputs = torch.stack([samples[i], eye[1 + i], noise, *past])
        if history:
            kept.append(_worth_keeping(samples, future, kept, i, history, tolerance))
        targets = torch.stack([samples[i + 1], *kept[-1:], *others[i]])
        scale = inputs.norm(dim=1, keepdim=True)
        scale[scale == 0] = 1.0  # an absent input gets the coefficient 0
        solution = torch.linalg.lstsq((inputs / scale).T, targets.T, rcond=1e-9, driver="gelsd").solution.T / scale.T
        residual = (targets - solution @ inputs).norm(dim=1) / targets.norm(dim=1).clamp(min=1)
        worst = max(worst, residual.max().item())
        terms = [[s[0], s[1], 0.0, *s[2:]] for s in solution.tolist()]  # x, m, y, n, h1 ...
        zero = [0.0] * (4 + history)
        result.append([0.0, 1.0, 0.0, 0.0, *terms[0], *(terms[1] if history else zero), 1.0])
        for extra, row in zip(extras, terms[1 + bool(history) :], strict=True):
            extra.append([0.0, 1.0, 0.0, 0.0, *row, *zero, 1.0])
    to_tensor = lambda rows: torch.tensor(rows, dtype=torch.float64)
    return to_tensor(result), [to_tensor(e) for e in extras], worst


def _worth_keeping(samples, future, kept, i, history, tolerance):
    """A unit vector that step i can make, that the next `history` points need, and that they do not have yet."""
    size = samples.shape[1]
    if i + 1 >= len(future):
        return torch.zeros(size, dtype=torch.float64)
    shared = future[i + 1]
    for space in future[i + 2 : i + 1 + history]:  # vectors of `shared` that later points need too
        combinations, values, _ = torch.linalg.svd(_outside(shared, space), full_matrices=True)
        values = torch.nn.functional.pad(values, (0, len(shared) - len(values)))
        small = combinations[:, values < 50 * tolerance].T
        if len(small) == 0:
            break
        shared = small @ shared
    for first in range(max(0, i - history + 1), i + 1):  # where nothing is missing, what is about to be shifted out
        there = _basis(torch.stack([samples[i + 1], *kept[first:i]]), tolerance)
        combinations, values, _ = torch.linalg.svd(_outside(shared, there), full_matrices=False)
        if len(values) and values[0] > 5 * tolerance:
            return combinations[:, 0] @ shared
    return torch.zeros(size, dtype=torch.float64)
