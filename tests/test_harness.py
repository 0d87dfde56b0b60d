"""What the checks and the bench promise: a wrong kernel turns them red, in every way a kernel can be wrong; and the traps of torch
and of memory that a new op meets."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

import genkern.testing
from genkern import core, random
from genkern.ops import gaussian_kl, reparameterize, reparameterize_kl, sampler_step
from genkern.testing import (
    Case,
    Fences,
    Make,
    all_cases,
    bench,
    check,
    check_repeatable,
    check_second_order,
    refuse_wide_types,
    verify,
)

KEY = random.key(3)
CASES = all_cases()
MISSING = core.OPS["reparameterize"].available("cpu")["cpu"]
needs_cpu_kernels = pytest.mark.skipif(MISSING is not None, reason=f"no CPU kernels: {MISSING}")


@pytest.fixture(autouse=True)
def same_thread_count():
    """The bench sets it."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sabotage(monkeypatch):
    """sabotage(op, spoil): the CPU kernel of op computes, and spoil(its outputs, its arguments) then damages the outputs."""

    def replace(op, spoil):
        right = core.OPS[op]._forward["cpu"]
        monkeypatch.setitem(core.OPS[op]._forward, "cpu", lambda *args: spoil(right(*args), args))

    return replace


def _last_element(value):
    def spoil(output, args):
        output.view(-1)[-1:] = value
        return output

    return spoil


# ---- sums


@needs_cpu_kernels
def test_a_sum_of_equal_terms_is_as_good_as_plain_torch():
    """Equal terms round the same way at every addition: a long run of float additions drifts."""
    for value in (0.3, 0.7, 1.9):
        x = torch.full((1,), value).expand(3, 1031)
        exact, kl = gaussian_kl(x.double(), x.double()), gaussian_kl(x, x)
        with genkern.backend("reference"):
            plain = gaussian_kl(x, x)
        error = lambda got, exact=exact: ((got - exact).abs() / exact).max().item()
        assert error(kl) <= 2 * error(plain) + 4 * torch.finfo(torch.float32).eps


# ---- the comparison rule


@needs_cpu_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-3])
def test_one_wrong_element_is_found(value, sabotage):
    sabotage("reparameterize", _last_element(value))
    with pytest.raises(AssertionError, match="reparameterize on cpu.*output 0"):
        check(CASES["reparameterize"], "cpu", (3, 5), torch.float32)


@needs_cpu_kernels
@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_infinite_references_excuse_nothing(value, sabotage):
    """Where plain torch overflows, its error is infinite; that must not become the allowance of a wrong kernel."""

    def arguments(make, shape):
        log_var = make(shape)
        log_var[0, 0] = 60  # sigma = e^30: beyond float16
        return {"mu": make(shape), "log_var": log_var, "key": KEY}

    case = dataclasses.replace(CASES["reparameterize"], arguments=arguments, forms=())
    check(case, "cpu", (3, 5), torch.float16)
    sabotage("reparameterize", lambda z, args: z.fill_(value))
    with pytest.raises(AssertionError, match="output 0"):
        check(case, "cpu", (3, 5), torch.float16)


@needs_cpu_kernels
def test_wrong_type_and_shape_are_found(sabotage):
    sabotage("reparameterize", lambda z, args: z.to(torch.bfloat16))
    with pytest.raises(AssertionError, match="is torch.bfloat16, expected torch.float32"):
        check(CASES["reparameterize"], "cpu", (3, 5), torch.float32)


@needs_cpu_kernels
def test_an_element_never_written_is_found(sabotage):
    """Memory from torch.empty is NaN under the tests (conftest.py)."""
    sabotage("reparameterize", lambda z, args: torch.cat([z.view(-1)[:-1], torch.empty(1)]).view(z.shape))
    with pytest.raises(AssertionError, match="output 0"):
        check(CASES["reparameterize"], "cpu", (3, 5), torch.float32)


@needs_cpu_kernels
@pytest.mark.parametrize(("offset", "side"), [(-1, "before"), (15, "behind")])
def test_a_write_beside_an_output_is_found(offset, side, sabotage):
    def spoil(z, args):
        z.as_strided((), (), z.storage_offset() + offset).fill_(1)
        return z

    sabotage("reparameterize", spoil)
    with pytest.raises(AssertionError, match=f"reparameterize on cpu.*4 bytes {side} a tensor of 60 bytes were written to"):
        check(CASES["reparameterize"], "cpu", (3, 5), torch.float32)


@needs_cpu_kernels
def test_a_write_beside_an_argument_is_found(sabotage):
    def spoil(z, args):
        args[0].detach().as_strided((), (), args[0].storage_offset() + 15).fill_(1)
        return z

    sabotage("reparameterize", spoil)
    with pytest.raises(AssertionError, match="behind a tensor of 60 bytes were written to"):
        check(CASES["reparameterize"], "cpu", (3, 5), torch.float32)


@pytest.mark.parametrize("backend", genkern.testing.backends())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_steps_write_nothing_beside_out(backend, dtype):
    fences, make = Fences(), Make(dtype)
    if core.OPS["sampler_step"].available("cpu")[backend] is not None:
        pytest.skip(f"sampler_step has no {backend} kernel here")
    for shape in ((1, 1), (2, 7), (3, 17), (1, 1031)):
        x, twice, table = make(shape), make((2 * shape[0], *shape[1:])), make((2, 19)).to(torch.promote_types(dtype, torch.float32))
        out, history, both = fences.around(x), fences.around(x), fences.around(twice)
        with genkern.backend(backend), fences:
            got = sampler_step(x, twice, table, 1, x, x, x, key=KEY, out=out, history_out=history, input_out=both)
        fences.check(f"sampler_step on {backend}, {dtype}, {shape}")
        assert all(a is b for a, b in zip(got, (out, history, both), strict=True)) and all(t.isfinite().all() for t in got)


@needs_cpu_kernels
def test_an_argument_written_to_is_found(sabotage):
    def spoil(z, args):
        args[0].detach().view(-1)[-1] += 1
        return z

    sabotage("reparameterize", spoil)
    with pytest.raises(AssertionError, match="argument mu was written to"):
        check(CASES["reparameterize"], "cpu", (3, 5), torch.float32)


@needs_cpu_kernels
def test_a_wrong_gradient_is_found(monkeypatch):
    right = core.OPS["reparameterize"]._backward["cpu"]

    def wrong(*args):
        grads = right(*args)
        grads[-1].view(-1)[-1:] += 1e-3
        return grads

    monkeypatch.setitem(core.OPS["reparameterize"]._backward, "cpu", wrong)
    with pytest.raises(AssertionError, match="gradient of log_var is off by"):
        check(CASES["reparameterize"], "cpu", (3, 5), torch.float32)


def test_a_gradient_that_is_not_there_is_named():
    x_alone = lambda x, y: 2 * x
    nothing = lambda x, y: (2 * x).detach()
    for function, words in ((x_alone, "no gradient comes to y"), (nothing, "no output has a gradient")):
        case = Case(function, lambda make, shape: {"x": make(shape), "y": make(shape)})
        with pytest.raises(AssertionError, match=words):
            check(case, "cpu", (3, 5), torch.float32)


# ---- what depends on more than the arguments


def _scaled(spoil):
    """A case of 2 x s, x (N, D) and s (D,), whose result `spoil(y, x)` damages where the reference does not run."""

    def scaled(x, s):
        y = 2 * x * s
        return y if core._backends.forced() == "reference" else spoil(y, x)

    return Case(scaled, lambda make, shape: {"x": make(shape), "s": make(shape[1:])}, shapes=((3, 5),))


def test_a_right_function_passes():
    check_repeatable(_scaled(lambda y, x: y), "cpu")
    check_second_order(_scaled(lambda y, x: y), "cpu")


def _kept_by_address(y, x, kept={}):  # noqa: B006
    return y * kept.setdefault(x.data_ptr(), (x.detach()[0, 0].item(), x))[0]  # x stays: no other tensor takes its place


def _kept_by_shape(y, x, kept={}):  # noqa: B006
    return y.sum() * 0 + kept.setdefault(y.shape, y.detach())


def _counted(y, x, calls=[]):  # noqa: B006
    calls.append(1)
    return y * (1 + 1e-6 * (len(calls) > 2))


@pytest.mark.parametrize(
    "spoil, words",
    [
        (_counted, "output 0 changes from call to call"),
        (lambda y, x: y * (1 + 1e-6 * torch.get_num_threads()), "output 0 changes with the number of threads"),
        (_kept_by_shape, "output 0 is that of an earlier call"),
        (_kept_by_address, "is not that of the values last written into the arguments"),
        (lambda y, x: y + 1e-6 * x[-1], "output 0 of other samples changes with the last sample of x"),
    ],
)
def test_what_depends_on_more_than_its_arguments_is_found(spoil, words):
    with pytest.raises(AssertionError, match=words):
        check_repeatable(_scaled(spoil), "cpu")


def test_wrong_derivatives_are_found():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(y)
            return y.sin()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0].detach().cos()  # right, but a constant to the second derivative

    check(_scaled(lambda y, x: y), "cpu", (3, 5), torch.float32)
    with pytest.raises(AssertionError, match="wrong second derivative"):
        check_second_order(_scaled(lambda y, x: Wrong.apply(y)), "cpu")
    with pytest.raises(AssertionError, match="wrong first derivative"):
        check_second_order(_scaled(lambda y, x: y + y.detach()), "cpu")


@needs_cpu_kernels
def test_a_kernel_wrong_for_one_form_only_is_found(sabotage):
    """Right for the standard prior, wrong for a learned one: the forms of the case and verify see it."""
    case = CASES["gaussian_kl"]
    sabotage("gaussian_kl", lambda kl, args: kl if args[2] is None else kl * 1.001)
    for shape in case.shapes:
        check(case, "cpu", shape, torch.float32)
    with pytest.raises(AssertionError, match="prior_mu.*is off by"):
        for form in case.other_forms():
            check(form, "cpu", (5, 37), torch.float32)


@needs_cpu_kernels
def test_verify_reports_a_kernel_that_raises_and_goes_on(monkeypatch):
    def raises(*args):
        raise TypeError("does not compile")

    names = ("gaussian_kl", "random_bits")
    monkeypatch.setattr(core, "OPS", {name: core.OPS[name] for name in names})
    monkeypatch.setitem(core.OPS["gaussian_kl"]._forward, "cpu", raises)
    verdicts = verify("cpu")
    assert verdicts["gaussian_kl/cpu"] == "TypeError: does not compile"
    assert verdicts["random_bits/cpu"] == "passed"


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verify_finds_one_wrong_draw(dtype, monkeypatch):
    op = core.OPS["random_normal"]
    right = op._forward["cpu"]

    def wrong(key, out, a, b):
        right(key, out, a, b)
        if out.dtype == dtype:
            out.view(-1)[-1] += 1e-6

    monkeypatch.setattr(core, "OPS", {"random_normal": op})
    monkeypatch.setitem(op._forward, "cpu", wrong)
    assert "not those of the stream" in verify("cpu")["random_normal/cpu"]


def test_wide_types_are_refused():
    for make in (lambda: torch.zeros(2).double(), lambda: torch.zeros(2, dtype=torch.uint64)):
        with refuse_wide_types(), pytest.raises(AssertionError, match="made a torch"):
            make()


def test_the_documented_example_runs():
    """The example of the module's docstring, pasted into a file: it passes, and fails once its kernel is wrong."""
    text = re.search(r"\n\n(    .*?\n)\nA check", genkern.testing.__doc__, re.DOTALL).group(1)
    right = textwrap.dedent(text)
    wrong = right.replace("* s.exp()\n\n", "* (1 + s)\n\n", 1)
    assert right != wrong
    for script, status in ((right, 0), (wrong, 1)):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert "AssertionError: scale on cpu" in done.stderr and "output 0 is off by" in done.stderr


# ---- the bench


@needs_cpu_kernels
def test_bench_prints_no_ratio_for_a_wrong_kernel_and_goes_on(sabotage, tmp_path, capsys):
    sabotage("reparameterize", _last_element(1e-3))
    out = tmp_path / "a.json"
    assert bench.main(["reparameterize", "gaussian_kl", "--shape", "8x64", "--quick", "--json", str(out)]) == 1
    run = json.loads(out.read_text())
    assert {r["op"] for r in run["results"]} == {"gaussian_kl"} and list(run["refused"]) == ["reparameterize"]
    assert "reparameterize     REFUSED: reparameterize on cpu" in capsys.readouterr().out


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_bench_takes_right_draws_of_every_type(dtype, capsys):
    assert bench.main(["random_normal", "--shape", "64", "--quick", "--dtype", dtype]) == 0


@needs_cpu_kernels
def test_bench_writes_a_row_for_each_number_of_threads(tmp_path, capsys):
    out = tmp_path / "a.json"
    assert bench.main(["random_uniform", "--shape", "64", "--quick", "--threads", "1,2", "--json", str(out)]) == 0
    run = json.loads(out.read_text())
    assert [r["threads"] for r in run["results"]] == run["machine"]["threads"] == [1, 2]
    assert bench.compare(run, run) == []


@needs_cpu_kernels
def test_bench_refuses_a_wrong_draw(monkeypatch, capsys):
    op = core.OPS["random_uniform"]
    monkeypatch.setitem(op._forward, "cpu", lambda key, out, a, b: out.zero_())
    assert bench.main(["random_uniform", "--shape", "64", "--quick"]) == 1
    assert "REFUSED: random_uniform on cpu: its bits are not those of the stream" in capsys.readouterr().out


def test_bench_table_fits_100_columns(capsys):
    facts = {"cpu": "a processor", "instruction_set": "AVX512", "torch": "2.13.0+cpu", "genkern": "0.1.0"}
    contender = {"us": 123456.7, "ratio": 0.91, "ratio_p20": 100.1, "ratio_p80": 100.2, "of_copy": 1.0, "genkern_ratio": 100.1}
    contender["peak_bytes"] = 1 << 20
    names = ("eager", "genkern", "compile", "copy")
    result = {"op": "random_exponential", "shape": [8, 4, 128, 128], "mode": "forward+backward", "threads": 2}
    bench.print_header(facts)
    bench.print_row(result | {"contenders": {name: contender for name in names}})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100 and lines[-1].endswith("slower")


def test_peak_bytes_counts_what_is_held_at_once():
    x = torch.zeros(1000)
    assert bench.peak_bytes(lambda: x.neg()) == 4000  # the result
    assert bench.peak_bytes(lambda: x.neg().exp()) == 8000  # and what it came from
    assert bench.peak_bytes(lambda: x.neg_()) == 0


def test_bench_compare_fails_on_a_fallen_ratio_and_plot_and_table_show_it(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    row = {
        "op": "gaussian_kl",
        "shape": [8, 64],
        "dtype": "float32",
        "mode": "forward",
        "contenders": {"genkern": {"ratio": 4.0}, "eager": {"genkern_ratio": 4.0}},
    }
    slow = row | {"contenders": {"genkern": {"ratio": 3.5}, "eager": {"genkern_ratio": 3.5}}}
    for name, result in (("old", row), ("new", slow)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": [result]}))
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert bench.main(["compare", old, new]) == 1 and bench.main(["compare", new, old]) == 0
    assert "gaussian_kl 8x64 forward: 4.00x eager before, 3.50x now" in capsys.readouterr().out
    assert bench.main(["plot", old, str(tmp_path / "a.png")]) == 0
    assert pathlib.Path(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert bench.main(["table", old]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| `gaussian_kl` | 8 x 64 | 1 | 4.0x | – | – | – | – |"
    with pytest.raises(SystemExit):
        bench.main(["compare", old])


# ---- traps of torch and of memory


@pytest.mark.parametrize(
    "function", [gaussian_kl, lambda *m: reparameterize(*m, key=KEY), lambda *m: reparameterize_kl(*m, key=KEY)[1]]
)
def test_forward_mode_has_a_tangent(function):
    """A raw op has none, without an error: core must take the reference."""
    mu, log_var = (Make(torch.float64)((3, 4)) for _ in range(2))
    leaf = mu.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf, log_var).sum(), leaf)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(function(forward_ad.make_dual(mu, torch.ones_like(mu)), log_var)).tangent
    torch.testing.assert_close(tangent.sum(), gradient.sum())


def test_out_raises_the_version_counter():
    out = torch.empty(8)
    before = out._version
    random.normal(KEY, (8,), out=out)
    assert out._version > before


@pytest.mark.parametrize("draw", ["uniform", "normal", "exponential", "gumbel", "logistic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_draws_write_nothing_beside_out(draw, dtype):
    for count in (0, 1, 3, 4, 5, 15, 16, 17, 31, 33, 127, 1031):
        for offset in (1, 3, 8):
            inside = slice(offset, offset + count)
            memory = torch.full((count + 64,), 7.0, dtype=dtype)
            expected = getattr(random, draw)(KEY, (count,), dtype=dtype)
            getattr(random, draw)(KEY, (count,), dtype=dtype, out=memory[inside])
            assert torch.equal(memory[inside], expected)
            memory[inside] = 7
            assert (memory == 7).all()


def test_inputs_are_not_written():
    arguments = CASES["reparameterize_kl"].arguments(Make(), (3, 37))
    copies = {n: a.clone() for n, a in arguments.items()}
    leaves = {n: a.requires_grad_() if a.is_floating_point() else a for n, a in arguments.items()}
    z, kl = reparameterize_kl(**leaves)
    (z.sum() + kl.sum()).backward()
    assert all(torch.equal(arguments[n], copies[n]) for n in copies)


def test_gradients_come_in_any_layout():
    leaves = [Make()((3, 37)).requires_grad_() for _ in range(2)]
    outputs = reparameterize_kl(*leaves, key=KEY)
    grads = [torch.randn(37, 3).t(), torch.randn(6)[::2]]
    strided = torch.autograd.grad(outputs, leaves, grads, retain_graph=True)
    dense = torch.autograd.grad(outputs, leaves, [g.contiguous() for g in grads])
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
