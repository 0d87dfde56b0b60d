"""Every op, on every backend that runs here, through the same properties. A new op's CASES bring it in."""

import pytest
import torch

import genkern
from genkern import core
from genkern.testing import LAYOUTS, Make, all_cases, backends, check, refuse_wide_types

CASES = all_cases()
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
RUNS = [(case, backend, d) for d in DEVICES for case in CASES.values() for backend in ("reference", *backends(d, op=case.name))]
NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _parametrized(runs):
    ids = [f"{backend}{'_on_cuda' if (backend, device) == ('reference', 'cuda') else ''}-{case.name}" for case, backend, device in runs]
    return pytest.mark.parametrize(("case", "backend", "device"), runs, ids=ids)


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
each_run = _parametrized(RUNS)
each_differentiable_run = _parametrized([run for run in RUNS if run[0].constants is not None])
each_type = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())


def flat(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def with_leaves(case, arguments):
    """The arguments, those that have gradients as leaves."""
    leaves = case.differentiable(arguments)
    return {n: a.detach().requires_grad_() if n in leaves else a for n, a in arguments.items()}


def of_leaves(case, arguments, variant=None):
    """(function of the leaves alone, leaves): the rest of the arguments is bound."""
    names = case.differentiable(arguments)
    rest = {n: a for n, a in arguments.items() if n not in names} | (variant or {})
    return lambda *leaves: case.function(**dict(zip(names, leaves, strict=True)), **rest), [arguments[n] for n in names]


def test_every_op_has_a_case():
    assert {name for name in core.OPS if not name.startswith("random_")} == set(CASES)


@each_run
@each_type
def test_values_and_gradients(case, backend, device, dtype):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} takes no {NAMES[dtype]}")
    for variant in case.variants:
        for shape in case.shapes:
            check(case, backend, shape, dtype, variant=variant, device=device)


@each_run
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=NAMES.get)
def test_other_forms_of_the_arguments(case, backend, device, dtype):
    if dtype not in case.dtypes:
        pytest.skip(f"{case.name} takes no {NAMES[dtype]}")
    for form in case.other_forms():
        for variant in form.variants:
            for shape in form.shapes:
                check(form, backend, shape, dtype, variant=variant, device=device)
        for layout in LAYOUTS:
            check(form, backend, max(form.shapes, key=len), dtype, layout=layout, device=device)


@each_run
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case, backend, device, layout):
    for shape in case.shapes:
        check(case, backend, shape, torch.float32, layout=layout, device=device)


@each_differentiable_run
def test_expanded_gradient(case, backend, device):
    """sum().backward() hands the op a gradient of stride 0."""
    arguments = case.arguments(Make(device=device), case.shapes[0])
    grads = {}
    for weights in ("expanded", "dense"):
        leaves = with_leaves(case, arguments)
        with genkern.backend(backend):
            for output in flat(case.function(**leaves)):
                ones = output.new_ones(()).expand(output.shape)
                output.backward(ones if weights == "expanded" else ones.clone(), retain_graph=True)
        grads[weights] = [leaves[n].grad for n in case.differentiable(arguments)]
    assert all(torch.equal(a, b) for a, b in zip(*grads.values(), strict=True))


@each_run
def test_mixed_types(case, backend, device):
    """Each floating-point argument in turn in another type: the kernels agree with the reference."""
    arguments = case.arguments(Make(device=device), case.shapes[0])
    names = [n for n, a in arguments.items() if isinstance(a, torch.Tensor) and a.is_floating_point()]
    for name, narrow in [(n, t) for n in names for t in case.dtypes[1:]]:
        results = []
        for chosen in ("reference", backend):
            with genkern.backend(chosen):
                results.append(flat(case.function(**(arguments | {name: arguments[name].to(narrow)}))))
        for a, b in zip(*results, strict=True):
            assert a.dtype == b.dtype
            rounding = 2 * torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
            torch.testing.assert_close(a, b, rtol=max(1e-5, rounding), atol=1e-5)


@each_differentiable_run
def test_second_order(case, backend, device):
    for form, variant in [*((case, v) for v in case.variants[:2]), *((f, {}) for f in case.other_forms())]:
        function, leaves = of_leaves(form, form.arguments(Make(torch.float64, device), case.small), variant)
        leaves = [leaf.requires_grad_() for leaf in leaves]
        with genkern.backend(backend):
            assert torch.autograd.gradcheck(function, leaves)
            assert torch.autograd.gradgradcheck(function, leaves)


@each_case
def test_compiles_whole(case):
    leaves = with_leaves(case, case.arguments(Make(), case.shapes[0]))
    for variant in case.variants:
        torch._dynamo.reset()
        compiled = torch.compile(lambda kwargs, v=variant: case.function(**kwargs, **v), fullgraph=True, backend="aot_eager")
        for got, expected in zip(flat(compiled(leaves)), flat(case.function(**leaves, **variant)), strict=True):
            assert torch.equal(got, expected)
            if got.requires_grad:
                got.sum().backward(retain_graph=True)


@each_case
def test_inductor_and_export(case):
    arguments = case.arguments(Make(), case.shapes[0])
    outputs = flat(case.function(**arguments))
    native = core.OPS[case.name].default("cpu")[0] != "reference"  # a reference is fused by Inductor, which rounds as it likes
    tolerance = {"rtol": 0, "atol": 0} if native else {}

    class Module(torch.nn.Module):
        def forward(self, arguments):
            return case.function(**arguments)

    torch._dynamo.reset()
    exported = torch.export.export(Module(), (arguments,)).module()
    for function in (torch.compile(Module(), fullgraph=True), exported):
        for a, b in zip(flat(function(arguments)), outputs, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


@each_case
def test_functional_transforms(case):
    """vmap and forward mode take the reference, and are right."""
    if case.constants is None:
        pytest.skip(f"{case.name} has no gradient")
    arguments = [case.arguments(Make(torch.float64, seed=seed), case.shapes[0]) for seed in (0, 1)]
    function, inside = of_leaves(case, arguments[0])
    first = lambda *leaves: flat(function(*leaves))[0]
    pairs = [of_leaves(case, a)[1] for a in arguments]
    batched = torch.vmap(first)(*(torch.stack(leaves) for leaves in zip(*pairs, strict=True)))
    torch.testing.assert_close(batched, torch.stack([first(*leaves) for leaves in pairs]))
    _, tangent = torch.func.jvp(first, tuple(inside), tuple(inside))
    step = 1e-6
    shifted = [first(*(x * (1 + sign * step) for x in inside)) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (shifted[0] - shifted[1]) / (2 * step), rtol=1e-5, atol=1e-6)


@each_case
def test_autocast_changes_nothing(case):
    arguments = case.arguments(Make(), case.shapes[0])
    for backend in ("reference", *backends(op=case.name)):
        with genkern.backend(backend):
            outside = case.function(**arguments)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = case.function(**arguments)
        assert all(torch.equal(a, b) for a, b in zip(flat(outside), flat(inside), strict=True))


@each_run
def test_same_bits_every_run_and_thread_count(case, backend, device):
    """Of outputs, and of the CPU kernels' gradients. Without threads (an interpreter, an emulation) the shape matters little."""
    shape = case.large if backend in ("reference", "cpu") or device == "cuda" else case.shapes[0]
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2):
            torch.set_num_threads(n)
            with genkern.backend(backend):
                arguments = case.arguments(Make(device=device), shape)
                leaves = case.differentiable(arguments) if backend == "cpu" else []
                arguments = {k: a.requires_grad_() if k in leaves else a for k, a in arguments.items()}
                outputs, gradients = flat(case.function(**arguments)), ()
                if leaves:
                    grads = [torch.ones_like(o) for o in outputs]
                    gradients = torch.autograd.grad(outputs, [arguments[k] for k in leaves], grads)
            of_kernels = (f"{case.name}_backward", backend) in genkern.stats()  # else they are torch's to promise
            seen.append(outputs + gradients if of_kernels else outputs)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@each_case
def test_reference_makes_no_wide_types(case, monkeypatch):
    """References run on devices without float64; noise for those is made on the CPU, so it is supplied from outside here."""
    from genkern import random

    arguments = case.arguments(Make(), case.shapes[0])
    fixed = lambda key, shape, *args, dtype=torch.float32, **kwargs: (
        torch.linspace(0.1, 0.9, torch.Size(shape).numel()).reshape(shape).to(dtype)
    )
    for draw in ("normal", "uniform", "exponential", "gumbel", "logistic"):
        monkeypatch.setattr(random, draw, fixed)
    for variant in case.variants:
        with refuse_wide_types(), genkern.backend("reference"):
            case.function(**arguments, **variant)


@each_case
def test_schema_and_fake(case):
    """torch.library.opcheck on the raw ops, on the arguments that the public function hands them."""
    captured = []
    arguments = case.arguments(Make(), case.shapes[0])
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
    if "cpu" in op._with_backward:
        grads = flat(original(*captured[0]))
        torch.library.opcheck(op._backward["cpu"], (*grads, *captured[0]), test_utils=checks)
