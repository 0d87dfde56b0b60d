"""What core.Op promises to every op, shown on reparameterize_kl; and what the checks promise: a wrong kernel turns them red."""

import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import genkern
from genkern import core, ops, random
from genkern.core import _op
from genkern.ops import gaussian_kl, reparameterize, reparameterize_kl
from genkern.testing import Make, all_cases, bench, check

KEY = random.key(3)
OP = core.OPS["reparameterize_kl"]
needs_cpu_kernels = pytest.mark.skipif(OP.available("cpu")["cpu"] is not None, reason=f"no CPU kernels: {OP.available('cpu')['cpu']}")


def latent(*shape, dtype=torch.float32):
    make = Make(dtype)
    return make(shape).requires_grad_(), make(shape).requires_grad_()


# ---- choosing


@needs_cpu_kernels
def test_stats_count_forward_and_backward():
    genkern.reset_stats()
    with genkern.backend("cpu"):
        z, kl = reparameterize_kl(*latent(3, 5), key=KEY)
        (z.sum() + kl.sum()).backward()
    assert genkern.stats() == {("reparameterize_kl", "cpu"): 1, ("reparameterize_kl_backward", "cpu"): 1}


@needs_cpu_kernels
def test_forced_backend_binds_one_thread_and_its_backward():
    seen = {}
    with genkern.backend("reference"):

        def other():
            genkern.reset_stats()
            gaussian_kl(*latent(3, 5))
            seen.update(genkern.stats())

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert list(seen) == [("gaussian_kl", OP.default("cpu")[0])]
    with genkern.backend("cpu"):
        z = reparameterize(*latent(3, 5), key=KEY)
    genkern.reset_stats()
    with genkern.backend("reference"):
        z.sum().backward()
    assert genkern.stats() == {("reparameterize_backward", "cpu"): 1}


def test_missing_backend_raises_with_the_reason():
    with genkern.backend("emulated"):
        if OP.available("cpu")["emulated"] is None:
            pytest.skip("the emulated library is loaded")
        with pytest.raises(RuntimeError, match="'emulated' was forced but cannot be used: the emulated library is not loaded"):
            gaussian_kl(*latent(3, 5))
    with pytest.raises(ValueError, match="expected one of"), genkern.backend("gpu"):
        pass
    with genkern.backend("cuda"):  # binds CUDA tensors: others keep their default
        assert gaussian_kl(*latent(3, 5)).shape == (3,)


def test_an_op_with_a_reference_alone_works_and_trains():
    op = core.Op("test_only_reference", "(Tensor x) -> Tensor", reference=lambda x: x * x, fake=torch.empty_like, differentiable=("x",))
    try:
        x = torch.ones(3, requires_grad=True)
        assert op.available("cpu")["cpu"] is not None and op.default("cpu")[0] == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            op(x).sum().backward()
        assert x.grad.eq(2).all()
        with genkern.backend("cpu"), pytest.raises(RuntimeError, match="'cpu' was forced but cannot be used"):
            op(x)
    finally:
        del core.OPS["test_only_reference"]


def test_tensors_stand_before_other_arguments_where_there_are_gradients():
    with pytest.raises(ValueError, match="tensors must stand before other arguments"):
        core.Op(
            "test_only_order", "(float a, Tensor x) -> Tensor", reference=lambda a, x: a * x, fake=lambda a, x: x, differentiable=("x",)
        )


def test_strict_explain_and_the_one_warning(monkeypatch):
    monkeypatch.setitem(OP._default, "cpu", ("reference", "a reason"))
    monkeypatch.setattr(_op, "_warned", set())
    with genkern.strict(), pytest.raises(RuntimeError, match="takes the slow PyTorch reference .a reason."):
        reparameterize_kl(*latent(3, 5), key=KEY)
    with pytest.warns(UserWarning, match="runs on its PyTorch references here .a reason.*python -m genkern info") as caught:
        for _ in range(3):
            reparameterize_kl(*latent(3, 5), key=KEY)
    assert len(caught) == 1
    assert genkern.explain("reparameterize_kl", *latent(3, 5)) == ["a reason"]


def test_explain_names_a_copy():
    mu, log_var = latent(4, 6, 5)
    with genkern.backend("reference"):
        assert genkern.explain("gaussian_kl", mu, log_var, None, None) == ['backend "reference" is forced']
    if core.OPS["gaussian_kl"].default("cpu")[0] != "reference":
        strided = mu.transpose(1, 2)
        assert genkern.explain("gaussian_kl", mu, log_var, None, None) == []
        assert genkern.explain(ops.gaussian_kl, mu, log_var, None, None) == []
        assert genkern.explain("gaussian_kl", strided, log_var, None, None) == ["argument 0 is not contiguous and is copied first"]


def test_import_has_no_side_effects():
    script = (
        "import torch, threading; before = threading.active_count(); import genkern, sys;"
        "assert not torch.cuda.is_initialized(); assert threading.active_count() == before;"
        "assert 'triton' not in sys.modules and 'matplotlib' not in sys.modules and 'sklearn' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- differentiating


def test_inputs_that_depend_on_each_other_are_counted_once():
    """The traps of create_graph: one tensor given twice, and an input computed from another."""
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for function in (lambda x: gaussian_kl(x, x), lambda x: gaussian_kl(x, 2 * x), lambda x: reparameterize(x, x * x, key=KEY)):
        assert torch.autograd.gradcheck(function, (x,)) and torch.autograd.gradgradcheck(function, (x,))


def test_backward_twice_and_a_frozen_input():
    mu, log_var = latent(3, 5)
    loss = gaussian_kl(mu, log_var.detach()).sum()
    loss.backward(retain_graph=True)
    first = mu.grad.clone()
    loss.backward()
    torch.testing.assert_close(mu.grad, 2 * first)
    assert log_var.grad is None


def test_saved_input_overwritten_in_place_is_an_error():
    mu, log_var = latent(3, 5)
    hidden = mu * 1
    kl = gaussian_kl(hidden, log_var).sum()
    with torch.no_grad():
        random.normal(KEY, hidden.shape, out=hidden)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kl.backward()


@needs_cpu_kernels
def memory_flags(address):
    """The kernel's flags of the mapping that holds an address: `hg` where 2 MB pages were asked for."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@needs_cpu_kernels
@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="a kernel without huge pages")
def test_large_outputs_ask_for_large_pages():
    with genkern.backend("cpu"):
        z = reparameterize(torch.zeros(40, 1 << 18), torch.zeros(40, 1 << 18), key=KEY)  # 40 MB: a mapping of its own
    assert "hg" in memory_flags(z[20].data_ptr())


def test_only_the_key_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), genkern.backend("cpu"):
        mu, log_var = latent(64, 64)
        reparameterize_kl(mu, log_var, key=KEY)
    assert sorted(t.numel() for t in saved) == [2, 64 * 64, 64 * 64]


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_passes_is_handed_on(dtype):
    """z = mu + sigma eps: without a clamp the gradient of mu is that of z, in the type of mu; neither computed nor copied."""
    mu, log_var = latent(3, 5, dtype=dtype)[0], latent(3, 5)[1]
    with genkern.backend("cpu"):
        z, clamped = (reparameterize(mu, log_var, key=KEY, clamp=clamp) for clamp in (None, (-9, 9)))
    grad = torch.randn(3, 5)
    d_mu, d_log_var = torch.autograd.grad(z, (mu, log_var), grad)
    assert d_mu.dtype is dtype and d_mu.eq(grad.to(dtype)).all()
    assert (d_mu.data_ptr() == grad.data_ptr()) is (dtype is torch.float32)
    for got, expected in zip((d_mu, d_log_var), torch.autograd.grad(clamped, (mu, log_var), grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


# ---- arguments


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: gaussian_kl(x, x[:, :2]), ValueError, r"log_var must have the shape of mu, got \(3, 4\) and \(3, 2\)"),
        (lambda x: gaussian_kl(x.int(), x), TypeError, "mu must be floating point .*, got torch.int32"),
        (lambda x: gaussian_kl([1.0], x), TypeError, "mu must be a tensor, got list"),
        (lambda x: gaussian_kl(x[:, :3]), ValueError, r"mu must hold both moments as \(N, 2C, ...\), got \(3, 3\)"),
        (lambda x: gaussian_kl(x[0, 0], x[0, 0]), ValueError, "needs a batch dimension"),
        (lambda x: gaussian_kl(x, x, x[:2], x[:2]), ValueError, "the prior must have the shape of the posterior"),
        (lambda x: gaussian_kl(x, x, None, x), ValueError, "prior_log_var was given without prior_mu"),
        (lambda x: gaussian_kl(x, x, reduction="mean"), ValueError, 'reduction must be "sample", "element" or "total", got'),
        (lambda x: gaussian_kl(x, x, free_bits=-1), ValueError, "free_bits must be at least 0"),
        (lambda x: reparameterize(x, x, clamp=(1, -1)), ValueError, "clamp must be None"),
        (lambda x: reparameterize(x, x, key=KEY, generator=torch.Generator()), ValueError, "key or generator, not both"),
        (lambda x: reparameterize(x, x, key=random.split(KEY, 2)), ValueError, r"one key per sample needs key \(3, 2\)"),
        (lambda x: reparameterize(x, x.to("meta")), ValueError, "must be on the device of mu, got cpu and meta"),
    ],
)
def test_wrong_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.zeros(3, 4))


def test_numerics_near_the_prior_and_at_the_edges():
    """A collapsed posterior: the naive e^v - 1 - v loses every digit; and NaN, infinities and overflow behave as in torch."""
    v = torch.tensor([[1e-5], [-3e-4], [0.0], [1e-8]])
    expected = 0.5 * (torch.expm1(v.double()) - v.double())
    torch.testing.assert_close(gaussian_kl(torch.zeros_like(v), v).double(), expected[:, 0], rtol=2e-4, atol=1e-17)
    edges = torch.tensor([[float("nan")], [float("inf")], [-float("inf")], [200.0], [-200.0]])
    got = gaussian_kl(torch.zeros_like(edges), edges)
    with genkern.backend("reference"):
        plain = gaussian_kl(torch.zeros_like(edges), edges)
    torch.testing.assert_close(got, plain, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_sums_keep_their_digits(dtype):
    mu = torch.full((2, 300_000), 0.1, dtype=dtype)
    expected = 0.5 * mu[0, 0].double().square() * 300_000
    torch.testing.assert_close(gaussian_kl(mu, torch.zeros_like(mu)).double(), expected.expand(2), rtol=1e-6, atol=0)


# ---- a sabotaged kernel turns the checks red


@needs_cpu_kernels
@pytest.mark.parametrize("where", ["_forward", "_backward"])
def test_a_wrong_kernel_is_found_and_not_benched(where, monkeypatch):
    op, case = core.OPS["reparameterize"], all_cases()["reparameterize"]
    table = getattr(op, where)
    right = table["cpu"]

    def wrong(*args):
        result = right(*args)
        target = result if where == "_forward" else result[-1]
        target[-1, -1] += 1e-4 * (1 + target[-1, -1].abs())
        return result

    monkeypatch.setitem(table, "cpu", wrong)
    with pytest.raises(AssertionError, match="reparameterize on cpu.*is off by"):
        check(case, "cpu", (5, 37), torch.float32)
    with pytest.raises(AssertionError, match="is off by"):
        next(bench.case_rows(case, "cpu", [(5, 37)], torch.float32, compiled=False))


@needs_cpu_kernels
def test_bench_refuses_a_backend_that_did_not_run(monkeypatch):
    case = all_cases()["gaussian_kl"]
    monkeypatch.setitem(core.OPS["gaussian_kl"]._default, "cpu", ("reference", "switched off"))
    with pytest.raises(AssertionError, match="was named but did not run"), pytest.warns(UserWarning):
        next(bench.case_rows(case, "cpu", [(5, 37)], torch.float32, compiled=False))


@needs_cpu_kernels
def test_bench_measures_and_compares(tmp_path, capsys):
    out = tmp_path / "a.json"
    assert bench.main(["gaussian_kl", "--shape", "8x64", "--rounds", "3", "--no-compile", "--json", str(out)]) == 0
    assert "gaussian_kl" in capsys.readouterr().out
    assert bench.main(["compare", str(out), str(out)]) == 0
    import json

    run = json.loads(out.read_text())
    slow = json.loads(out.read_text())
    slow["results"][0]["contenders"]["genkern"]["ratio"] *= 0.5
    assert len(bench.compare(run, slow)) == 1 and run["machine"]["instruction_set"]
