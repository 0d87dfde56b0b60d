"""causal_conv1d: the same bits in pieces and in steps, sequences that do not touch, and bad arguments."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

import genkern
from genkern import ops
from genkern.testing import backends

each_backend = pytest.mark.parametrize("backend", ("reference", *backends(op="causal_conv1d")))
each_dense = pytest.mark.parametrize("backend", backends(op="causal_conv1d_dense"))


def _inputs(n, c, length, taps=4):
    generator = torch.Generator().manual_seed(3)
    return (torch.randn(shape, generator=generator) for shape in ((n, c, length), (c, 1, taps), (c,)))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [1, 32])
@pytest.mark.parametrize("taps, dilation", [(4, 1), (3, 2)])
@pytest.mark.parametrize("backend", [b for b in backends(op="causal_conv1d_update") if b != "triton"])
def test_pieces_and_steps_have_the_bits_of_one_pass(backend, n, threads, taps, dilation):
    c, length = 21, 131
    x, weight, bias = _inputs(n, c, length, taps)
    options = {"dilation": dilation, "activation": "silu"}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with genkern.backend(backend):
            whole, final = ops.causal_conv1d(x, weight, bias, groups=c, return_final_state=True, **options)
            for chunk in (1, 7, 64):
                state = torch.zeros(n, c, (taps - 1) * dilation)
                steps, pieces, carried = state.clone(), [], []
                for part in x.split(chunk, 2):
                    piece, state = ops.causal_conv1d(
                        part, weight, bias, groups=c, initial_state=state, return_final_state=True, **options
                    )
                    pieces.append(piece)
                    carried.append(ops.causal_conv1d_update(part, steps, weight, bias, **options))
                assert torch.equal(torch.cat(pieces, 2), whole) and torch.equal(state, final)
                assert torch.equal(torch.cat(carried, 2), whole) and torch.equal(steps, final)
            assert torch.equal(ops.causal_conv1d(x[:1], weight, bias, groups=c, **options), whole[:1])
    finally:
        torch.set_num_threads(before)


@each_backend
def test_packed_sequences_do_not_touch(backend):
    """Whatever the neighbours hold; outputs at negative indices are zero."""
    x, weight, bias = _inputs(1, 3, 20)
    index = torch.tensor([[0] * 6 + [1] * 9 + [-1] * 5], dtype=torch.int32)
    options = {"groups": 3, "activation": "silu"}
    with genkern.backend(backend):
        alone = [ops.causal_conv1d(part, weight, bias, **options) for part in (x[..., :6], x[..., 6:15])]
        poisoned = x.clone()
        poisoned[..., 5] = float("inf")
        poisoned[..., 15:] = float("nan")
        y, final = ops.causal_conv1d(poisoned, weight, bias, seq_idx=index, return_final_state=True, **options)
        torch.testing.assert_close(torch.cat([y[..., :5], y[..., 6:15]], 2), torch.cat([alone[0][..., :5], alone[1]], 2))
        assert (y[..., 15:] == 0).all()
        short = torch.tensor([[0] * 18 + [1] * 2], dtype=torch.int32)
        _, final = ops.causal_conv1d(x, weight, bias, seq_idx=short, return_final_state=True, **options)
        assert torch.equal(final, torch.cat([torch.zeros(1, 3, 1), x[..., 18:]], 2))


@each_backend
def test_the_future_does_not_reach_the_past(backend):
    x, weight, bias = _inputs(2, 5, 40)
    with genkern.backend(backend):
        expected = ops.causal_conv1d(x, weight, bias, groups=5)
        for poison in (float("nan"), float("inf")):
            poisoned = x.clone()
            poisoned[..., 23:] = poison
            assert torch.equal(ops.causal_conv1d(poisoned, weight, bias, groups=5)[..., :23], expected[..., :23])


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_out_has_the_bits_of_a_fresh_result(backend, dtype):
    """Also in place of x, in rows that lie apart, and where elements of a row do."""
    x, weight, bias = (t.to(dtype) for t in _inputs(2, 5, 37))
    options = {"groups": 5, "activation": "silu", "return_final_state": True}
    with genkern.backend(backend):
        y, final = ops.causal_conv1d(x, weight, bias, **options)
        memory, clone = torch.full((2, 40, 9), torch.nan, dtype=dtype), x.clone()
        apart, across = torch.full((2, 9, 40), torch.nan, dtype=dtype)[:, 2:7, 3:], memory[:, 3:, 2:7].mT
        for given, out in ((x, torch.empty_like(x)), (x, apart), (x, across), (clone, clone)):
            version = out._version
            got, state = ops.causal_conv1d(given, weight, bias, out=out, **options)
            assert got is out and out._version > version
            assert torch.equal(out, y) and torch.equal(state, final)


def test_out_of_the_other_forms():
    """A copy of the result: for several channels a group, and behind the gate."""
    x, weight, out = torch.randn(2, 4, 9), torch.randn(6, 4, 3), torch.empty(2, 6, 9)
    assert torch.equal(ops.causal_conv1d(x, weight, out=out), ops.causal_conv1d(x, weight))
    gated = ops.causal_conv1d(x, weight, activation="gated", out=out[:, :3])
    assert torch.equal(out[:, :3], ops.causal_conv1d(x, weight, activation="gated")) and gated.data_ptr() == out.data_ptr()


def test_extreme_inputs_of_silu():
    x = torch.cat([torch.linspace(-200, 200, 4001), torch.tensor([3e38, -3e38, torch.inf, torch.nan])])[None, None]
    y = ops.causal_conv1d(x, torch.ones(1, 1, 1), activation="silu")
    torch.testing.assert_close(y, F.silu(x), equal_nan=True, rtol=1e-6, atol=1e-30)
    leaf = x[..., :-2].clone().requires_grad_()
    ops.causal_conv1d(leaf, torch.ones(1, 1, 1), activation="silu").sum().backward()
    torchs = x[..., :-2].double().requires_grad_()
    F.silu(torchs).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), torchs.grad, rtol=1e-5, atol=1e-7)


@each_backend
@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_and_dense(groups, backend):
    """torch's convolution behind zeros or a state; packed sequences equal those computed alone."""
    x, state = torch.randn(2, 4, 17, dtype=torch.float64), torch.randn(2, 4, 4, dtype=torch.float64)
    weight, bias = torch.randn(6, 4 // groups, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    options = {"dilation": 2, "groups": groups, "activation": "silu"}
    with genkern.backend(backend):
        y = ops.causal_conv1d(x, weight, bias, initial_state=state, **options)
        torch.testing.assert_close(y, F.silu(F.conv1d(torch.cat([state, x], 2), weight, bias, dilation=2, groups=groups)))
        index = torch.tensor([[0] * 9 + [1] * 8] * 2, dtype=torch.int32)
        packed = ops.causal_conv1d(x, weight, bias, initial_state=state, seq_idx=index, **options)
        torch.testing.assert_close(packed[..., :9], y[..., :9])
        torch.testing.assert_close(packed[..., 9:], ops.causal_conv1d(x[..., 9:], weight, bias, **options))


@each_dense
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_gated_is_the_convolution_and_then_the_gate(groups, backend):
    x, weight, bias = torch.randn(2, 6, 75), torch.randn(12 if groups < 6 else 6, 6 // groups, 3), torch.randn(12 if groups < 6 else 6)
    options = {"dilation": 5, "groups": groups, "initial_state": torch.randn(2, 6, 10)}
    condition = torch.randn(2, len(weight), 1)
    genkern.reset_stats()
    with genkern.backend(backend):
        expected = ops.gated_activation(ops.causal_conv1d(x, weight, bias, **options), condition)
        one_pass = ops.causal_conv1d(x, weight, bias, activation="gated", condition=condition, **options)
        assert torch.equal(one_pass, expected)
        given = [t.requires_grad_() for t in (x, weight, bias, condition)]
        two_passes = ops.causal_conv1d(x, weight, bias, activation="gated", condition=condition, **options)
        assert torch.equal(two_passes, one_pass)
    behind = torch.cat([options["initial_state"], x], 2)
    a, b = (F.conv1d(behind, weight, bias, dilation=5, groups=groups) + condition).chunk(2, 1)
    torchs = torch.autograd.grad((torch.tanh(a) * torch.sigmoid(b)).square().sum(), given)
    torch.testing.assert_close(torch.autograd.grad(two_passes.square().sum(), given), torchs, rtol=1e-4, atol=1e-4)
    assert {chosen for _, chosen in genkern.stats()} == {backend}


@each_dense
@pytest.mark.parametrize("shape", [(1, 5, 500), (40, 5, 1), (3, 5, 97)])
def test_dense_has_the_same_bits_in_any_tile(shape, backend):
    """Tiles of columns reach over samples; what is left of them takes another kernel."""
    x, weight, bias = torch.randn(shape), torch.randn(21, 5, 3), torch.randn(21)
    state = torch.randn(*shape[:2], 4)
    with genkern.backend(backend):
        whole, final = ops.causal_conv1d(x, weight, bias, dilation=2, initial_state=state, return_final_state=True)
        behind = torch.cat([state, x], 2)
        torch.testing.assert_close(whole, F.conv1d(behind, weight, bias, dilation=2))
        assert torch.equal(final, behind[..., shape[2] :])
        for n in {0, shape[0] - 1}:
            one = ops.causal_conv1d(x.mT.contiguous().mT[n : n + 1], weight, bias, dilation=2, initial_state=state[n : n + 1])
            assert torch.equal(one, whole[n : n + 1])
        for chunk in (13, 60) if backend == "triton" and shape[2] > 100 else (1, 13, 60):  # the interpreter takes 12 s for steps
            pieces, carried = [], state
            for part in x.split(chunk, 2):
                y, carried = ops.causal_conv1d(part, weight, bias, dilation=2, initial_state=carried, return_final_state=True)
                pieces.append(y)
            assert torch.equal(torch.cat(pieces, 2), whole) and torch.equal(carried, final)


@pytest.mark.skipif("cpu" not in backends(op="causal_conv1d_dense"), reason="needs the CPU library")
@pytest.mark.parametrize("groups, channels, length", [(1, 6, 3), (1, 6, 700), (2, 6, 700), (2, 400, 40)])
def test_dense_gradients_for_any_number_of_threads(groups, channels, length):
    """Sums of several pieces, blocks of outputs that threads share out, a sound shorter than what the taps reach back, and more
    channels than are taken at once."""
    given = [torch.randn(shape) for shape in ((2, channels, length), (42, channels // groups, 3), (42,), (2, channels, 10))]
    grad = torch.randn(2, length, 42).mT

    def gradients(dtype, function):
        leaves = [t.to(dtype).requires_grad_() for t in given]
        return torch.autograd.grad(function(*leaves), leaves, grad.to(dtype))

    def ours(x, weight, bias, state):
        return ops.causal_conv1d(x, weight, bias, dilation=5, groups=groups, initial_state=state)

    def torchs(x, weight, bias, state):
        return F.conv1d(torch.cat([state, x], 2), weight, bias, dilation=5, groups=groups)

    before, got = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got.append(gradients(torch.float32, ours))
    finally:
        torch.set_num_threads(before)
    for other in got[1:]:
        assert all(map(torch.equal, other, got[0]))
    truth, plain = gradients(torch.float64, torchs), gradients(torch.float32, torchs)
    for a, b, exact in zip(got[0], plain, truth, strict=True):
        assert (a - exact).abs().max() <= 2 * (b - exact).abs().max() + 1e-6


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="no fused multiply-add in the CPU library")
@pytest.mark.skipif("emulated" not in backends(op="causal_conv1d_dense"), reason="GENKERN_EMULATED_LIBRARY is not set")
@pytest.mark.parametrize("channels, outputs, taps, groups", [(5, 21, 3, 1), (40, 130, 2, 1), (1, 7, 70, 1), (8, 16, 3, 2)])
def test_emulated_dense_has_the_bits_of_the_cpu(channels, outputs, taps, groups):
    x, weight, bias = torch.randn(2, channels, 75), torch.randn(outputs, channels // groups, taps), torch.randn(outputs)
    got = []
    for backend in ("cpu", "emulated"):
        with genkern.backend(backend):
            got.append(ops.causal_conv1d(x, weight, bias, dilation=2, groups=groups))
    assert torch.equal(*got)


@each_dense
def test_a_state_of_another_type(backend):
    x, weight, state = torch.randn(2, 5, 9).bfloat16(), torch.randn(8, 5, 3).bfloat16(), torch.randn(2, 5, 2)
    with genkern.backend(backend):
        y = ops.causal_conv1d(x, weight, initial_state=state)
    torch.testing.assert_close(y, F.conv1d(torch.cat([state, x.float()], 2), weight.float()))


def test_on_a_gpu_narrow_types_take_torchs_convolution(monkeypatch):
    """Tensors without data stand in for those of a GPU."""
    monkeypatch.setitem(genkern.core.OPS["causal_conv1d_dense"]._default, "cuda", ("reference", None))
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16):
            genkern.reset_stats()
            y = ops.causal_conv1d(*(torch.empty(shape, device="cuda", dtype=dtype) for shape in ((2, 4, 9), (8, 4, 3))))
            assert y.dtype == dtype and y.shape == (2, 8, 9)
            assert list(genkern.stats()) == ([("causal_conv1d_dense", "reference")] if dtype == torch.float32 else [])


@pytest.mark.parametrize("backend", ("reference", *backends(op="causal_conv1d_update")))
def test_update_of_slots(backend):
    """Each request shifts its own slot, an empty one touches nothing, and a state that lies (S, P, C) in memory serves too."""
    x, weight, bias = _inputs(3, 21, 2)
    slots = torch.randn(5, 21, 6)
    indices = torch.tensor([4, -1, 0], dtype=torch.int32)
    with genkern.backend(backend):
        for state in (slots.clone(), slots.mT.contiguous().mT):
            y = ops.causal_conv1d_update(x, state, weight, bias, state_indices=indices)
            for request, slot in ((0, 4), (2, 0)):
                alone = slots[slot : slot + 1].clone()
                assert torch.equal(y[request : request + 1], ops.causal_conv1d_update(x[request : request + 1], alone, weight, bias))
                assert torch.equal(state[slot : slot + 1], alone)
            assert (y[1] == 0).all() and torch.equal(state[1:4], slots[1:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [3, 4, 6])
def test_steps_of_wide_and_narrow_states(columns, dtype):
    """More columns than the taps reach back, channels over several spans and a rest, an input that lies in a wider one, an empty
    request."""
    c = 277
    x, weight, bias = (t.to(dtype) for t in _inputs(3, c, 7))
    whole = ops.causal_conv1d(x, weight, bias, groups=c, activation="silu")
    state = torch.zeros(4, c, columns, dtype=dtype)
    indices = torch.tensor([2, -1, 0], dtype=torch.int32)
    for t in range(7):
        projected = torch.cat([x[..., t], x[..., t]], 1)[:, :c]
        y = ops.causal_conv1d_update(projected, state, weight, bias, activation="silu", state_indices=indices)
        assert torch.equal(y[::2], whole[::2, :, t]) and not y[1].any()
    assert torch.equal(state[[2, 0]], F.pad(x, (columns, 0))[::2, :, -columns:]) and not state[[1, 3]].any()


@pytest.mark.parametrize("groups", [1, 2])
def test_dense_silu_has_the_bits_of_two_passes_in_pieces(groups):
    x, weight, bias = torch.randn(2, 6, 205), torch.randn(20, 6 // groups, 2), torch.randn(20)
    options = {"groups": groups, "dilation": 3, "activation": "silu"}
    whole = ops.causal_conv1d(x, weight, bias, **options)
    torch.testing.assert_close(whole, F.silu(F.conv1d(F.pad(x, (3, 0)), weight, bias, groups=groups, dilation=3)))
    pieces, state = [], torch.zeros(2, 6, 3)
    for part in x.split([1, 4, 150, 50], 2):
        y, state = ops.causal_conv1d(part, weight, bias, initial_state=state, return_final_state=True, **options)
        pieces.append(y)
    assert torch.equal(torch.cat(pieces, 2), whole)
    given = [t.clone().requires_grad_() for t in (x, weight, bias)]
    assert torch.equal(ops.causal_conv1d(*given, **options), whole)  # in two passes
    a = F.conv1d(F.pad(given[0], (3, 0)), given[1], given[2], groups=groups, dilation=3)
    expected = torch.autograd.grad(F.silu(a).square().sum(), given)
    got = torch.autograd.grad(ops.causal_conv1d(*given, **options).square().sum(), given)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@each_dense
@pytest.mark.parametrize("outputs", [6, 24])
def test_gated_has_the_same_bits_in_pieces(outputs, backend):
    """Halves that tiles can pair and others; tiles within a sample and over two; a condition for each column or for all."""
    x, weight = torch.randn(2, 3, 290), torch.randn(outputs, 3, 2)
    for condition in (None, torch.randn(2, outputs, 290), torch.randn(2, outputs, 1), torch.randn(2, 290, outputs).mT):
        with genkern.backend(backend):
            whole = ops.causal_conv1d(x, weight, activation="gated", condition=condition)
            two = ops.gated_activation(ops.causal_conv1d(x, weight), condition)
            pieces, state, at = [], torch.zeros(2, 3, 1), 0
            for part in x.split([5, 200, 85], 2):
                here = condition if condition is None or condition.shape[2] == 1 else condition[..., at : at + part.shape[2]]
                y, state = ops.causal_conv1d(
                    part, weight, activation="gated", condition=here, initial_state=state, return_final_state=True
                )
                pieces.append(y)
                at += part.shape[2]
        assert torch.equal(whole, two) and torch.equal(torch.cat(pieces, 2), whole)


def test_one_step_has_no_time_dimension():
    x, weight, bias = _inputs(2, 21, 1)
    states = torch.zeros(2, 2, 21, 3)
    several = ops.causal_conv1d_update(x, states[0], weight, bias)
    assert torch.equal(ops.causal_conv1d_update(x[..., 0], states[1], weight[:, 0], bias), several[..., 0])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"x": torch.zeros(2, 3)}, ValueError, "x must have 3 dimensions"),
        ({"x": torch.zeros(2, 4, 5, dtype=torch.int32)}, TypeError, "floating point"),
        ({"groups": 3}, ValueError, "groups must divide"),
        ({"weight": torch.zeros(4, 2, 3)}, ValueError, "weight must have shape"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must have shape"),
        ({"dilation": 0}, ValueError, "dilation must be"),
        ({"activation": "relu"}, ValueError, "activation must be"),
        ({"condition": torch.zeros(2, 4, 5)}, ValueError, "condition belongs to"),
        ({"activation": "gated", "condition": torch.zeros(2, 3, 5)}, ValueError, "condition must broadcast"),
        ({"weight": torch.zeros(3, 4, 3), "groups": 1, "activation": "gated"}, ValueError, "even C_out"),
        ({"initial_state": torch.zeros(2, 4, 3)}, ValueError, "initial_state must have shape"),
        ({"seq_idx": torch.zeros(2, 5)}, TypeError, "seq_idx must be int32"),
        ({"out": torch.zeros(2, 4, 5).bfloat16()}, TypeError, "out must be float32"),
        ({"out": torch.zeros(2, 4, 6)}, ValueError, "out must have shape"),
        ({"out": torch.zeros(1, 4, 5).expand(2, 4, 5)}, ValueError, "out must not be expanded"),
        ({"out": torch.zeros(2, 4, 5, requires_grad=True)}, ValueError, "out has no gradient"),
        ({"out": torch.zeros(2, 4, 5), "bias": torch.zeros(4, requires_grad=True)}, ValueError, "out has no gradient"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {"x": torch.zeros(2, 4, 5), "weight": torch.zeros(4, 1, 3), "groups": 4} | change
    with pytest.raises(error, match=words):
        ops.causal_conv1d(**arguments)


def test_out_must_not_overlap_an_input():
    memory = torch.zeros(2, 4, 6)
    with pytest.raises(ValueError, match="out must not overlap"):
        ops.causal_conv1d(memory[..., :5], torch.zeros(4, 1, 3), groups=4, out=memory[..., 1:])


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"state": torch.zeros(2, 4, 1)}, ValueError, "state must have shape"),
        ({"state_indices": torch.tensor([0, 2], dtype=torch.int32)}, ValueError, "below the number of slots"),
        ({"state_indices": torch.tensor([0, 1])}, TypeError, "state_indices must be int32"),
        ({"weight": torch.zeros(4, 1, 3, requires_grad=True)}, ValueError, "has no gradient"),
    ],
)
def test_bad_steps_write_nothing(change, error, words):
    arguments = {"x": torch.zeros(2, 4), "state": torch.ones(2, 4, 2), "weight": torch.zeros(4, 1, 3)} | change
    before = arguments["state"].clone()
    with pytest.raises(error, match=words):
        ops.causal_conv1d_update(**arguments)
    assert torch.equal(arguments["state"], before)
