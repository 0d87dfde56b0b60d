"""Every op, on every backend that runs here, through the same properties. A new op's CASES bring it in."""

import pytest
import torch

import genkern
from genkern import core
from genkern.testing import LAYOUTS, Make, all_cases, backends, check, refuse_wide_types

CASES = all_cases()
PAIRS = [(case, backend) for case in CASES.values() for backend in ("reference", *backends(op=case.name))]
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_case_and_backend = pytest.mark.parametrize(("case", "backend"), PAIRS, ids=[f"{b}-{c.name}" for c, b in PAIRS])
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: str(t).split(".")[1])


def test_every_op_that_differentiates_has_a_case():
    assert {op.name for op in core.OPS.values() if op._differentiable} <= set(CASES)


@each_case_and_backend
@each_type
def test_values_and_gradients(case, backend, dtype):
    for variant in case.variants:
        for shape in case.shapes:
            check(case, backend, shape, dtype, variant=variant)


@each_case_and_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=lambda t: str(t).split(".")[1])
def test_other_forms_of_the_arguments(case, backend, dtype):
    for form in case.other_forms():
        for variant in form.variants:
            for shape in form.shapes:
                check(form, backend, shape, dtype, variant=variant)
        for layout in LAYOUTS:
            check(form, backend, max(form.shapes, key=len), dtype, layout=layout)


@each_case_and_backend
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, backend, layout):
    for shape in case.shapes:
        check(case, backend, shape, torch.float32, layout=layout)


@each_case_and_backend
def test_expanded_gradient(case, backend):
    """sum().backward() hands the op a gradient of stride 0."""
    arguments = case.arguments(Make(), (5, 37))
    grads = {}
    for weights in ("expanded", "dense"):
        leaves = {n: a.clone().requires_grad_() if a.is_floating_point() else a for n, a in arguments.items()}
        with genkern.backend(backend):
            outputs = case.function(**leaves)
            for output in outputs if isinstance(outputs, tuple) else (outputs,):
                ones = torch.ones((), dtype=output.dtype).expand(output.shape)
                output.backward(ones if weights == "expanded" else ones.clone(), retain_graph=True)
        grads[weights] = [a.grad for a in leaves.values() if a.is_floating_point()]
    assert all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True))


@each_case
def test_mixed_types(case):
    for narrow in (torch.bfloat16, torch.float16, torch.float64):
        arguments = case.arguments(Make(), (3, 37))
        first = next(n for n, a in arguments.items() if a.is_floating_point())
        arguments[first] = arguments[first].to(narrow)
        results = []
        for backend in ("reference", *backends(op=case.name)):
            with genkern.backend(backend):
                outputs = case.function(**arguments)
            results.append(outputs if isinstance(outputs, tuple) else (outputs,))
        for got in results[1:]:
            for a, b in zip(results[0], got, strict=True):
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@each_case_and_backend
def test_second_order(case, backend):
    for form, variant in [*((case, v) for v in case.variants[:2]), *((f, {}) for f in case.other_forms())]:
        arguments = form.arguments(Make(torch.float64), (2, 3))
        names = [n for n, a in arguments.items() if a.is_floating_point()]
        rest = {n: a for n, a in arguments.items() if n not in names}
        function = lambda *leaves, rest=rest, names=names, variant=variant: case.function(
            **dict(zip(names, leaves, strict=True)), **rest, **variant
        )
        leaves = [arguments[n].requires_grad_() for n in names]
        with genkern.backend(backend):
            assert torch.autograd.gradcheck(function, leaves)
            assert torch.autograd.gradgradcheck(function, leaves)


@each_case
def test_compiles_whole(case):
    arguments = case.arguments(Make(), (3, 37))
    leaves = {n: a.requires_grad_() if a.is_floating_point() else a for n, a in arguments.items()}
    flat = lambda outputs: outputs if isinstance(outputs, tuple) else (outputs,)
    for variant in case.variants:
        torch._dynamo.reset()
        compiled = torch.compile(lambda kwargs, v=variant: case.function(**kwargs, **v), fullgraph=True, backend="aot_eager")
        for got, expected in zip(flat(compiled(leaves)), flat(case.function(**leaves, **variant)), strict=True):
            assert torch.equal(got, expected)
            got.sum().backward(retain_graph=True)


@each_case
def test_inductor_and_export(case):
    arguments = case.arguments(Make(), (3, 37))
    outputs = case.function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)

    class Module(torch.nn.Module):
        def forward(self, arguments):
            return case.function(**arguments)

    torch._dynamo.reset()
    exported = torch.export.export(Module(), (arguments,)).module()
    for function in (torch.compile(Module(), fullgraph=True), exported):
        got = function(arguments)
        for a, b in zip(got if isinstance(got, tuple) else (got,), outputs, strict=True):
            assert torch.equal(a, b)


@each_case
def test_functional_transforms(case):
    """vmap and forward mode take the reference, and are right."""
    arguments = case.arguments(Make(torch.float64), (2, 4, 3))
    names = [n for n, a in arguments.items() if a.is_floating_point()]
    rest = {n: a for n, a in arguments.items() if n not in names}
    first = lambda outputs: outputs[0] if isinstance(outputs, tuple) else outputs
    function = lambda *leaves: first(case.function(**dict(zip(names, leaves, strict=True)), **rest))
    leaves = tuple(arguments[n] for n in names)
    batched = torch.vmap(function)(*leaves)
    looped = torch.stack([function(*(leaf[i] for leaf in leaves)) for i in range(2)])
    torch.testing.assert_close(batched, looped)
    inside = tuple(leaf[0] for leaf in leaves)
    _, tangent = torch.func.jvp(function, inside, inside)
    step = 1e-6
    shifted = [function(*(x * (1 + sign * step) for x in inside)) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (shifted[0] - shifted[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@each_case
def test_autocast_changes_nothing(case):
    arguments = case.arguments(Make(), (3, 37))
    for backend in ("reference", *backends(op=case.name)):
        with genkern.backend(backend):
            outside = case.function(**arguments)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = case.function(**arguments)
        pairs = zip(outside, inside, strict=True) if isinstance(outside, tuple) else [(outside, inside)]
        assert all(torch.equal(a, b) for a, b in pairs)


@each_case_and_backend
def test_same_bits_every_run_and_thread_count(case, backend):
    threads = torch.get_num_threads()
    seen = []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            with genkern.backend(backend):
                outputs = case.function(**case.arguments(Make(), (3, 5003)))
            seen.append(outputs if isinstance(outputs, tuple) else (outputs,))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@each_case
def test_reference_makes_no_wide_types(case, monkeypatch):
    """References run on devices without float64; noise for those is made on the CPU, so it is supplied from outside here."""
    from genkern import random

    arguments, noise = case.arguments(Make(), (3, 37)), torch.linspace(-2, 2, 37)
    monkeypatch.setattr(random, "normal", lambda key, shape, dtype, device: noise.expand(shape).to(dtype))
    for variant in case.variants:
        with refuse_wide_types(), genkern.backend("reference"):
            case.function(**arguments, **variant)


@each_case
def test_schema_and_fake(case):
    """torch.library.opcheck on the raw ops, on the arguments that the public function hands them."""
    captured = []
    arguments = case.arguments(Make(), (3, 37))
    op = core.OPS[case.name]
    original = op._forward["cpu"]
    if op.available("cpu")["cpu"] is not None:
        pytest.skip(f"no CPU kernels: {op.available('cpu')['cpu']}")

    def capture(*args):
        captured.append(args)
        return original(*args)

    op._forward["cpu"] = capture
    try:
        with genkern.backend("cpu"):
            case.function(**arguments)
    finally:
        op._forward["cpu"] = original
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(original, captured[0], test_utils=checks)
    outputs = original(*captured[0])
    grads = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.library.opcheck(op._backward["cpu"], (*grads, *captured[0]), test_utils=checks)
