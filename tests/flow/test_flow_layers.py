"""Layers of flows: invertible, initialised by data once, trained in little memory."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import genkern
from genkern.nn import (
    MADE,
    ActNorm,
    ActNormConv1x1,
    AdditiveCoupling,
    AffineCoupling,
    Flip,
    InvertibleConv1x1,
    InvertibleSequence,
    MaskedAutoregressive,
    SplineCoupling,
    Squeeze,
)  # fmt: skip


class Net(nn.Module):
    def __init__(self, inputs, outputs, width=16, dropout=0.0, scale=0.3):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Dropout(dropout), nn.Linear(width, outputs))
        with torch.no_grad():
            self.layers[-1].weight.normal_().mul_(scale)

    def forward(self, x, context=None):
        h = self.layers(x)
        return h if context is None else h + context.sum(1, keepdim=True)


def couplings(count, n=6, dropout=0.0, scale=0.3, spline=False):
    torch.manual_seed(0)
    layers = []
    for i in range(count):
        layers += [ActNormConv1x1(n)] if i % 2 == 0 else [ActNorm(n), InvertibleConv1x1(n, plu=i % 4 == 1)]
        if i % 3 == 2:
            layers.append(AdditiveCoupling(Net(n // 2, n // 2, dropout=dropout, scale=scale), n))
        elif i % 3 == 1:
            mask = torch.arange(n) % 2 == 0
            network = Net(n, 2 * n, dropout=dropout, scale=scale)
            layers.append(AffineCoupling(network, n, mask=mask, scale="tanh", learned_limit=True))
        else:
            layers.append(AffineCoupling(Net(n // 2, n, dropout=dropout, scale=scale), n))
        if spline and i == 1:
            layers.append(SplineCoupling(Net(n // 2, n // 2 * 11, dropout=dropout), n, bins=4))
        layers.append(Flip())
    return layers


def gradients(backward, dtype=torch.float32, context=True, count=5, every=4, dropout=0.0, **options):
    sequence = InvertibleSequence(couplings(count, dropout=dropout, **options), backward=backward, every=every).to(dtype)
    torch.manual_seed(1)
    x, c = torch.randn(32, 6, dtype=dtype, requires_grad=True), torch.randn(32, 3, dtype=dtype, requires_grad=True)
    start = torch.randn(32, dtype=dtype, requires_grad=True)
    y, log_det = sequence(x, start, c if context else None)
    (y.square().sum() + (y.detach() + 1).sum() * 0 + (log_det * torch.arange(32)).sum()).backward()
    return sequence, [y, log_det, x.grad, start.grad, *([c.grad] if context else []), *(p.grad for p in sequence.parameters())]


@pytest.mark.parametrize("backward", ["invert", "checkpoint"])
@pytest.mark.parametrize("options", [{}, {"context": False}, {"dropout": 0.4}, {"spline": True}])
def test_gradients_are_those_of_a_plain_run(backward, options):
    plain, wanted = gradients("store", torch.float64, **options)
    sequence, got = gradients(backward, torch.float64, **options)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    assert sequence.backward == backward and sequence.reconstruction_error < 1e-10
    assert sequence.state_dict().keys() == plain.state_dict().keys()


def kept_bytes(backward, count=24, every=8):
    sequence = InvertibleSequence(couplings(count), backward=backward, every=every)
    x, kept = torch.randn(256, 6), {}
    own = {p.data_ptr() for p in [*sequence.parameters(), *sequence.buffers()]}
    sequence(x)  # the first batch initialises

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, log_det = sequence(x)
    return sum(len(storage) for storage in kept.values()), y


def test_what_is_kept():
    stream = 256 * 6 * 4
    inverted, _ = kept_bytes("invert")
    stored, _ = kept_bytes("store")
    assert inverted <= 14 * stream < stored / 10  # 96 layers, the input of every 8th


def test_only_safe_layers_are_inverted():
    layers = couplings(4, spline=True)
    calls = []
    for layer in layers:
        inverse = layer.inverse
        layer.inverse = lambda *a, layer=layer, inverse=inverse, **o: calls.append(type(layer)) or inverse(*a, **o)
    sequence = InvertibleSequence(layers, backward="invert", every=3)
    y, log_det = sequence(torch.randn(8, 6, requires_grad=True))
    (y.sum() + log_det.sum()).backward()
    assert ActNorm in calls and SplineCoupling not in calls


def test_garbage_is_measured_and_not_trained_on():
    """Scales that the inverse cannot undo in float32: the gradients are right all the same, and a warning says what happens next."""
    wanted = gradients("store", count=24, scale=6.0)[1]
    for every, says in ((200, "every 100th layer"), (2, "goes on with checkpoints")):
        with pytest.warns(RuntimeWarning, match=says) as found:
            sequence, got = gradients("invert", count=24, scale=6.0 if every > 2 else 60.0, every=every)
        assert len(found) == 1 and sequence.reconstruction_error > sequence.tolerance
        if every > 2:
            for one, other in zip(got, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=float(other.detach().abs().max()) * 1e-4)
    assert sequence.backward == "checkpoint"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequence(torch.randn(4, 6, requires_grad=True))[0].sum().backward()


def test_every_segment_of_a_pass_is_measured():
    class Liar(Flip):
        def inverse(self, y, log_det=None, context=None):
            return 2 * y.flip(1), log_det

    sequence = InvertibleSequence([Liar(), *(Flip() for _ in range(15))], backward="invert", every=1, trials=1)
    with pytest.warns(RuntimeWarning, match="goes on with checkpoints"):
        sequence(torch.randn(4, 6, requires_grad=True))[0].sum().backward()


def test_bfloat16_streams_are_refused_and_networks_may_run_in_it():
    sequence = InvertibleSequence(couplings(3), backward="invert")
    with pytest.raises(TypeError, match="float32 or float64 stream, got torch.bfloat16"):
        sequence(torch.randn(4, 6, dtype=torch.bfloat16))
    sequence(torch.randn(64, 6))  # initialises
    results = {}
    for backward, precision in (("invert", True), ("store", True), ("store", False)):
        sequence.backward = backward
        sequence.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision):
            y, log_det = sequence(torch.linspace(-1, 1, 24).view(4, 6).requires_grad_())
        assert y.dtype == torch.float32
        (y.square().sum() + log_det.sum()).backward()
        results[backward, precision] = torch.cat([p.grad.flatten() for p in sequence.parameters()])
    exact = results["store", False]
    errors = {backward: float((results[backward, True] - exact).norm() / exact.norm()) for backward in ("invert", "store")}
    assert errors["invert"] < 2 * errors["store"] < 0.1


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="invert, checkpoint, store"):
        InvertibleSequence([], backward="forget")
    with pytest.raises(ValueError, match="must be positive"):
        InvertibleSequence([], every=0)


def test_images_squeeze_and_invert():
    torch.manual_seed(0)
    sequence = InvertibleSequence([Squeeze(), ActNorm(12), Squeeze("position"), InvertibleConv1x1(48)], backward="invert")
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    y, log_det = sequence(x)
    back, negative = sequence.inverse(y)
    torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(negative, -log_det, rtol=1e-5, atol=1e-4)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_actnorm_is_initialised_once_by_the_first_training_batch():
    torch.manual_seed(0)
    x = 3 * torch.randn(64, 4, 5, 5) + torch.arange(4.0).view(4, 1, 1)
    x[:, 3] = 2.0  # constant: no division by its zero deviation
    layer = ActNorm(4).eval()
    layer(x)
    assert not layer.initialized  # evaluation does not look at data
    layer.inverse(x)
    y, _ = layer.train()(x)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std((0, 2, 3)), torch.tensor([1.0, 1.0, 1.0, 0.0]), rtol=0, atol=1e-3)
    before = layer.state_dict()
    layer(10 * x)
    other = ActNorm(4).train()
    other.load_state_dict(before)
    other(10 * x)
    for name, value in layer.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    one, _ = ActNorm(2).train()(torch.randn(1, 2))
    assert one.isfinite().all()


def test_actnorm_and_convolution_in_one_product():
    torch.manual_seed(0)
    one = ActNormConv1x1(6).double()
    x, start = 3 * torch.randn(16, 6, 2, 2, dtype=torch.float64) + 1, torch.randn(16, dtype=torch.float64)
    y, log_det = one(x, start)  # the first batch sets the actnorm
    assert one.norm.initialized and one.state_dict().keys() >= {"norm.log_scale", "norm.shift", "conv.lower"}
    wanted, total = one.conv(*one.norm(x, start))
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(log_det, total)
    back, rest = one.inverse(y, log_det)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(rest, start)
    parameters = list(one.parameters())
    loss = lambda y, log_det: (y.sin().sum() + log_det.sum(),)
    got, right = (torch.autograd.grad(loss(*pair), parameters) for pair in ((y, log_det), (wanted, total)))
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_of_a_sequence_are_prepared_in_one_batch(monkeypatch):
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (ActNormConv1x1(4), Flip())]
    sequence = InvertibleSequence([*layers, Squeeze(), ActNormConv1x1(16), ActNormConv1x1(16)]).double()
    x = torch.randn(29, 4, 4, 2, dtype=torch.float64)
    sequence(x)  # the first batch
    y, log_det = x, None
    for layer in sequence.layers:
        y, log_det = layer(y, log_det)
    calls, plu_weight = [], genkern.ops.plu_weight
    monkeypatch.setattr(genkern.ops, "plu_weight", lambda *a, **options: calls.append(a[0].shape) or plu_weight(*a, **options))
    got = sequence(x)
    back, rest = sequence.inverse(*got)
    assert calls == [(3, 4, 4), (2, 16, 16)] * 2
    for one, other in zip((*got, back, rest), (y, log_det, x, torch.zeros_like(rest)), strict=True):
        torch.testing.assert_close(one, other)
    wanted = torch.autograd.grad(y.sin().sum() + log_det.sum(), list(sequence.parameters()))
    found = torch.autograd.grad(got[0].sin().sum() + got[1].sum(), list(sequence.parameters()))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_a_checkpoint_around_a_sequence_at_its_first_batch():
    from torch.utils.checkpoint import checkpoint

    sequence = InvertibleSequence(couplings(3, dropout=0.3))
    y, log_det = checkpoint(sequence, torch.randn(8, 6, requires_grad=True), use_reentrant=False)
    (y.sum() + log_det.sum()).backward()
    assert all(p.grad is not None for p in sequence.parameters())


def test_the_limit_of_tanh_is_learned():
    layer = AffineCoupling(lambda seen, context: torch.cat([seen, 3 * seen], 1), 4, scale="tanh", limit=1.5, learned_limit=True)
    x = torch.randn(5, 4, 3, requires_grad=True)
    with torch.no_grad():
        layer.limit[1] = -0.25
    y, log_det = layer(x)
    log_s = layer.limit[:, None] * torch.tanh(3 * x[:, :2])
    torch.testing.assert_close(y[:, 2:], x[:, 2:] * log_s.exp() + x[:, :2])
    torch.testing.assert_close(log_det, log_s.sum((1, 2)))
    log_det.sum().backward()
    torch.testing.assert_close(layer.limit.grad, torch.tanh(3 * x[:, :2]).sum((0, 2)))
    with pytest.raises(ValueError, match="learned_limit"):
        AffineCoupling(nn.Identity(), 4, scale="exp", learned_limit=True)


def test_actnorm_sees_the_batches_of_all_processes():
    program = """
import os, sys, torch
rank, port = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{port}", rank=rank, world_size=2)
from genkern.nn import ActNorm
torch.manual_seed(0)
x = 2 * torch.randn(64, 3) + torch.arange(64.0)[:, None]
layer = ActNorm(3)
layer(x[32 * rank : 32 * rank + 32])
whole = torch.cat([-x.std(0, correction=0).log(), -x.mean(0) / x.std(0, correction=0)])
torch.testing.assert_close(torch.cat([layer.log_scale, layer.shift]), whole)
"""
    import os
    import tempfile

    environment = {**os.environ, "PYTHONPATH": str(Path(genkern.__file__).parent.parent)}
    with tempfile.TemporaryDirectory() as folder:
        runs = [subprocess.Popen([sys.executable, "-c", program, str(r), f"{folder}/store"], env=environment) for r in range(2)]
        assert [run.wait(timeout=120) for run in runs] == [0, 0]


@pytest.mark.parametrize("bins", [None, 5])
def test_autoregressive_layers_both_ways_with_and_without_gradients(bins):
    torch.manual_seed(0)
    layer = MaskedAutoregressive(5, (20, 20), context=3, bins=bins).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_().mul_(0.5)
    x, context = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    y, log_det = layer(x, None, context)
    with torch.no_grad():
        fast, fast_log_det = layer.inverse(y.detach(), None, context)
    slow, slow_log_det = layer.inverse(y, None, context)
    for back, negative in ((fast, fast_log_det), (slow, slow_log_det)):
        torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(negative, -log_det, rtol=1e-6, atol=1e-6)
    of = lambda v: MADE.forward(layer.network, v[None], context[:1])[0].view(-1, 5) if bins is None else None
    if bins is None:
        jacobian = torch.autograd.functional.jacobian(of, x[0])  # (2, feature, input)
        assert (jacobian.triu() == 0).all() and (jacobian.tril(-1) != 0).any()


def test_a_masked_network_takes_the_context_it_was_made_for():
    x, c = torch.randn(2, 3), torch.randn(2, 4)
    for features, context in ((0, c), (4, None), (4, c[:, :3])):
        network = MADE(3, 1, (8,), features)
        with pytest.raises(ValueError, match=f"a context of {features} features, got one of"):
            network(x, context)
        with pytest.raises(ValueError, match=f"a context of {features} features, got one of"):
            network.generate(lambda d, params: params[:, 0], 2, context)
