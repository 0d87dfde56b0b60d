"""The comparison rule: a backend against the float64 reference, at most twice as far from it as plain torch in the same type."""

import contextlib
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import genkern
from genkern import core, random
from genkern.testing._fences import Fences

_DRAWS = ("uniform", "normal", "exponential", "gumbel", "logistic")


def backends(device="cpu", op=None):
    """Names of the backends that can run op (by default: at least one op) on this device type now."""
    ops = core.OPS.values() if op is None else [core.OPS[op]]
    return [b for b in core.BACKENDS if any(op.available(device)[b] is None for op in ops)]


@contextlib.contextmanager
def float32_noise():
    """Float64 draws become float32 draws widened, so that a float64 reference sees the noise of the float32 stream."""

    def widened(draw):
        def call(*args, dtype=torch.float32, **kwargs):
            return draw(*args, dtype=torch.float32 if dtype == torch.float64 else dtype, **kwargs).to(dtype)

        return call

    with contextlib.ExitStack() as stack:
        for name in _DRAWS:
            stack.enter_context(mock.patch.object(random, name, widened(getattr(random, name))))
        yield


def verify(device, report=lambda name, verdict: None):
    """{"op/backend": "passed" or what is wrong} of every kernel that exists for this device type, at small sizes.

    report(name, verdict) is called as soon as a kernel's is known.
    """
    from genkern.testing._case import all_cases

    verdicts = {}
    for name, op in core.OPS.items():
        for backend in (b for b, missing in op.available(device).items() if missing is None):
            try:
                _verify_draw(name, backend, device) if name.startswith("random_") else _verify_case(all_cases()[name], backend, device)
                verdicts[f"{name}/{backend}"] = "passed"
            except AssertionError as error:
                verdicts[f"{name}/{backend}"] = str(error)
            except Exception as error:  # such as a compiler's: one kernel's failure must not hide the others' verdicts
                verdicts[f"{name}/{backend}"] = f"{type(error).__name__}: {error}"
            report(f"{name}/{backend}", verdicts[f"{name}/{backend}"])
    return verdicts


def _verify_case(case, backend, device):
    for dtype in case.dtypes:
        for shape in case.shapes:
            for variant in case.variants:
                check(case, backend, shape, dtype, variant=variant, device=device)
    for form in case.other_forms():
        for dtype in case.dtypes[::2]:
            for shape in form.shapes:
                for variant in form.variants:
                    check(form, backend, shape, dtype, variant=variant, device=device)


def _verify_draw(name, backend, device):
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    types = {"random_bits": (torch.int32, torch.int64)}.get(name, floats)
    for dtype in types:
        for key in (random.key(7), random.split(random.key(7, device=device), 3)):
            outputs = []
            for chosen in ("reference", backend):
                outputs.append(torch.empty(3, 1031, dtype=dtype, device=device))
                with genkern.backend(chosen):
                    core.OPS[name](key, outputs[-1], 0.5, 0.0)
            assert same_draw(*outputs), f"{name} on {backend}, {dtype}: its bits are not those of the stream"


def same_draw(expected, got):
    """Equal bits; for float64 within a few units in the last place, all that the reference in plain torch promises."""
    if expected.dtype == torch.float64:
        return torch.allclose(got, expected, rtol=1e-13, atol=1e-13)
    return torch.equal(got, expected)


class refuse_wide_types(TorchDispatchMode):
    """An error wherever float64 or unsigned 64-bit numbers are made: references must run on devices that have neither."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype in (torch.float64, torch.uint64):
                raise AssertionError(f"{function} made a {tensor.dtype} tensor")
        return result


def _outputs_and_gradients(function, arguments, leaves):
    """{name: tensor} of the outputs, and of the gradients of a fixed weighted sum of them to the arguments named in leaves."""
    arguments = {n: a.detach().requires_grad_() if n in leaves else a for n, a in arguments.items()}
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    total = 0
    for output in (o for o in outputs if o.requires_grad):
        weights = torch.linspace(-1, 1.5, max(output.numel(), 1), device=output.device)[: output.numel()]
        total = total + (output * weights.reshape(output.shape).to(output.dtype)).sum(dtype=torch.float64)
    if not leaves:
        return named
    assert isinstance(total, torch.Tensor), "no output has a gradient: Case.constants names the arguments without one, None means all"
    total.backward()
    missing = [n for n in leaves if arguments[n].grad is None]
    assert not missing, f"no gradient comes to {', '.join(missing)}: Case.constants names the arguments without one"
    return named | {f"gradient of {n}": arguments[n].grad for n in leaves}


def check(case, backend, shape, dtype, *, variant=None, layout="contiguous", device="cpu"):
    """Raise AssertionError unless `backend` computes `case` and its gradients as well as plain torch does in this type, and writes
    nothing beside its outputs."""
    from genkern.testing._case import Make

    variant = variant or {}
    arguments = case.arguments(Make(dtype, device, layout), shape)
    wide = {n: a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for n, a in arguments.items()}
    leaves = case.differentiable(arguments)
    run = lambda name, args: _named_run(name, lambda **kw: case.function(**kw, **variant), args, leaves)
    noise = contextlib.nullcontext() if dtype == torch.float64 else float32_noise()
    with noise:
        truth = run("reference", wide)
    plain, fences = run("reference", arguments), Fences(torch.device(device).type)
    where = f"{case.name} on {backend}, {dtype}, shape {tuple(shape)}, {layout}, {', '.join(arguments)}, {variant}"
    fenced = {n: fences.around(a) for n, a in arguments.items() if isinstance(a, torch.Tensor) and layout == "contiguous"}
    with fences:
        got = run(backend, arguments | fenced)
    fences.check(where)
    for name, value in fenced.items():
        assert torch.allclose(value, arguments[name], 0, 0, equal_nan=True), f"{where}: argument {name} was written to"
    for name, expected in truth.items():
        value, reference = got[name], plain[name]
        assert value.dtype == reference.dtype, f"{case.name}: {name} is {value.dtype}, expected {reference.dtype}"
        assert value.shape == expected.shape, f"{case.name}: {name} has shape {value.shape}, expected {expected.shape}"
        if not value.is_floating_point() or (case.exact and name.startswith("output")):
            assert torch.equal(value, reference), f"{where}: {name} is not equal to the reference"
            continue
        finite = reference.isfinite() & expected.isfinite()
        same = (value == reference) | (value.isnan() & reference.isnan())
        assert (finite | same).all(), f"{where}: {name} differs from plain torch where that is infinite or NaN"
        value, reference, expected = value[finite], reference[finite], expected[finite]
        if value.numel() == 0:
            continue
        error, allowed = _error(value, expected), _error(reference, expected)
        ulps = 16 if value.dtype == torch.float64 else 4  # float64 has no wider oracle: both sides' sums round
        floor = ulps * torch.finfo(value.dtype).eps * max(1.0, expected.abs().max().item())
        assert error <= 2 * allowed + floor, f"{where}: {name} is off by {error:.2e}, plain torch by {allowed:.2e} (floor {floor:.2e})"


def _named_run(backend, function, arguments, leaves):
    with genkern.backend(backend):
        return _outputs_and_gradients(function, arguments, leaves)


def _error(value, expected):
    error = (value.double() - expected.double()).abs().max().item()
    return float("inf") if error != error else error
