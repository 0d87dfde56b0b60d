"""nflows, normflows, zuko and the VITS of transformers on genkern's kernels: their own results within twice their own float32 error."""

import pytest
import torch

import genkern
from genkern import core

BINS = 6
ROWS = "rational_quadratic_spline_coupling"


def parameters(slopes, n=200, scale=1.5, features=4):
    torch.manual_seed(0)
    x = 2.5 * torch.randn(n, features)
    return x, *(scale * torch.randn(n, features, k) for k in (BINS, BINS, slopes))


def compare(ours, theirs, tensors, floor=1e-6, **options):
    """Values, log-determinants and gradients of ours against theirs in float64, with theirs in float32 as the measure."""

    def results(function, dtype):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        y, log_det = function(*leaves, **options)
        (y.sin().sum() + log_det.sum()).backward()
        assert y.dtype == log_det.dtype == dtype and y.shape == log_det.shape
        return [y.detach(), log_det.detach(), *(t.grad for t in leaves)]

    exact, eager, fused = results(theirs, torch.float64), results(theirs, torch.float32), results(ours, torch.float32)
    for one, other, true in zip(fused, eager, exact, strict=True):
        largest = float(true.abs().max())
        error = lambda x, true=true: float((x.double() - true).abs().max())
        assert error(one) <= 2 * error(other) + floor * max(1.0, largest)
    double = results(ours, torch.float64)
    for one, true in zip(double, exact, strict=True):
        torch.testing.assert_close(one, true, rtol=1e-7, atol=1e-7)


def native(op):
    return core.OPS[op].available("cpu")["cpu"] is None


def patched(fused, function):
    def run(*args):
        fused.patch()
        try:
            return function(*args)
        finally:
            fused.unpatch()

    return run


@pytest.mark.parametrize("library, tails", [("nflows", "linear"), ("normflows", "linear"), ("normflows", "circular")])
@pytest.mark.parametrize("inverse", [False, True])
def test_unconstrained_splines(library, tails, inverse):
    module = pytest.importorskip(f"genkern.integrations.{library}", exc_type=ImportError)
    original = pytest.importorskip("nflows.transforms.splines" if library == "nflows" else "normflows.utils.splines")
    tensors = parameters(BINS - 1 if tails == "linear" else BINS)
    theirs, ours = original.unconstrained_rational_quadratic_spline, module.unconstrained_rational_quadratic_spline
    compare(ours, theirs, tensors, inverse=inverse, tails=tails, tail_bound=3.0)
    genkern.reset_stats()
    ours(*tensors, tails=tails)
    assert genkern.stats()["rational_quadratic_spline", "cpu" if native("rational_quadratic_spline") else "reference"] == 1
    for wrong, error in (({"tails": "cubic"}, RuntimeError), ({"min_bin_width": 0.5}, ValueError)):
        for function in (ours, theirs):
            with pytest.raises(error):
                function(*tensors, **wrong)


@pytest.mark.parametrize("inverse", [False, True])
def test_constrained_splines_of_nflows(inverse):
    pytest.importorskip("nflows")
    from nflows.transforms import splines
    from nflows.transforms.base import InputOutsideDomain

    from genkern.integrations import nflows as fused

    x, *rest = parameters(BINS + 1)
    compare(fused.rational_quadratic_spline, splines.rational_quadratic_spline, (torch.sigmoid(x), *rest), inverse=inverse)
    square = {"left": -2.0, "right": 1.0, "bottom": 1.0, "top": 4.0}
    if not inverse:
        inside = -2 + 3 * torch.sigmoid(x)
        compare(fused.rational_quadratic_spline, splines.rational_quadratic_spline, (inside, *rest), **square)
    with pytest.raises(InputOutsideDomain):
        fused.rational_quadratic_spline(x, *rest, inverse=inverse)
    assert fused.rational_quadratic_spline(x[:0], *(r[:0] for r in rest))[0].shape == (0, 4)


def test_a_patched_nflows_flow_and_back():
    nflows = pytest.importorskip("nflows")
    from nflows.flows import MaskedAutoregressiveFlow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import AffineCouplingTransform, PiecewiseRationalQuadraticCouplingTransform

    from genkern.integrations import nflows as fused

    assert nflows and MaskedAutoregressiveFlow
    torch.manual_seed(0)
    net = lambda i, o: ResidualNet(i, o, hidden_features=16, num_blocks=1)
    mask, x = torch.tensor([1, 0, 1, 0]), torch.randn(64, 4)
    for make, op in (
        (lambda: AffineCouplingTransform(mask, net), "affine_coupling"),
        (lambda: PiecewiseRationalQuadraticCouplingTransform(mask, net, tails="linear", tail_bound=2.0), ROWS),
    ):
        transform = make().eval()
        run = lambda t=transform: [v.detach() for pair in (t(x), t.inverse(x)) for v in pair]
        wanted = run()
        fused.patch()
        fused.patch()
        try:
            genkern.reset_stats()
            for one, other in zip(run(), wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert genkern.stats()[op, "cpu" if native(op) else "reference"] == 2
        finally:
            fused.unpatch()
        genkern.reset_stats()
        for one, other in zip(run(), wanted, strict=True):
            assert torch.equal(one, other)
        assert not genkern.stats()


@pytest.mark.parametrize("kind", ["coupling", "autoregressive"])
@pytest.mark.parametrize("tails", ["linear", None])
def test_the_spline_layers_of_nflows(kind, tails):
    """Gradients of the inputs, the context and the weights too."""
    transforms = pytest.importorskip("nflows.transforms")
    from nflows.nn.nets import ResidualNet

    from genkern.integrations import nflows as fused

    torch.manual_seed(0)
    options = {"num_bins": BINS, "tails": tails, "tail_bound": 2.0}
    if kind == "coupling":
        net = lambda i, o: ResidualNet(i, o, hidden_features=16, num_blocks=1, context_features=2)
        layer = transforms.PiecewiseRationalQuadraticCouplingTransform(torch.tensor([1, 0, 1, 0]), net, **options)
    else:
        kind = transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
        layer = kind(4, 16, context_features=2, num_blocks=1, **options)
    x = torch.randn(64, 4) if tails else torch.rand(64, 4)

    def forward(x, context, *weights):
        y, log_det = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, context))
        return y, log_det.unsqueeze(1).expand_as(y)

    names, weights = zip(*layer.named_parameters(), strict=True)
    compare(patched(fused, forward), forward, (x, torch.randn(64, 2), *(w.detach() for w in weights)))
    genkern.reset_stats()
    patched(fused, forward)(x, torch.randn(64, 2), *weights)
    op = ROWS if tails else "rational_quadratic_spline"
    assert genkern.stats()[op, "cpu" if native(op) else "reference"] == 1


def test_a_spline_coupling_of_nflows_whose_network_has_no_width():
    transforms = pytest.importorskip("nflows.transforms")
    from genkern.integrations import nflows as fused

    class Network(torch.nn.Linear):
        def forward(self, x, context):
            return super().forward(x)

    layer, x = transforms.PiecewiseRationalQuadraticCouplingTransform([1, 0], Network, tails="linear"), torch.randn(8, 2)
    fused.patch()
    try:
        with pytest.warns(UserWarning, match="not scaled"):
            layer(x)
    finally:
        fused.unpatch()


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("features", [2, 5])
def test_the_lu_layer_of_nflows(features, inverse):
    transforms = pytest.importorskip("nflows.transforms")
    from genkern.integrations import nflows as fused

    torch.manual_seed(0)
    layer, x = transforms.LULinear(features, identity_init=False), torch.randn(17, features)
    torch.nn.init.normal_(layer.bias)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def run(x, *weights):
        named = {f"layer.{name}": weight for name, weight in zip(names, weights, strict=True)}
        y, log_det = torch.func.functional_call(Direction(layer, inverse), named, (x,))
        log_det += 1  # as CompositeTransform might: it has memory of its own
        return y, log_det.unsqueeze(1).expand_as(y)

    leaves = (x, *(w.detach() for w in weights))
    compare(patched(fused, run), run, leaves)
    double = [leaf.double().requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(patched(fused, run), double)
    layer.eval().use_cache()
    wanted = run(x, *weights)
    layer.cache.invalidate()
    for one, other in zip(patched(fused, run)(x, *weights), wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("use_batch_norm", [False, True])
def test_the_residual_network_of_nflows(use_batch_norm):
    nets = pytest.importorskip("nflows.nn.nets")
    from genkern.integrations import nflows as fused

    torch.manual_seed(0)
    net = nets.ResidualNet(3, 4, hidden_features=8, context_features=2, use_batch_norm=use_batch_norm)
    names, weights = zip(*net.named_parameters(), strict=True)

    def run(x, context, *weights):
        buffers = {n: b.to(x.dtype, copy=True) for n, b in net.named_buffers()}  # batch norms count what they see
        y = torch.func.functional_call(net, dict(zip(names, weights, strict=True)) | buffers, (x, context))
        return y, y

    compare(patched(fused, run), run, (torch.randn(20, 3), torch.randn(20, 2), *(w.detach() for w in weights)))
    x = torch.randn(5, 3)
    alone = nets.ResidualNet(3, 4, hidden_features=8)
    assert torch.equal(patched(fused, alone)(x), alone(x))


class Direction(torch.nn.Module):
    """A transform in one direction, as a module that functional_call takes."""

    def __init__(self, layer, inverse):
        super().__init__()
        self.layer, self.inverse = layer, inverse

    def forward(self, *args):
        return self.layer.inverse(*args) if self.inverse else self.layer(*args)


@pytest.mark.parametrize("scale_map", ["exp", "sigmoid", "sigmoid_inv"])
def test_a_patched_normflows_coupling(scale_map):
    pytest.importorskip("normflows")
    from normflows.flows.affine.coupling import AffineCoupling

    from genkern.integrations import normflows as fused

    torch.manual_seed(0)
    flow = AffineCoupling(torch.nn.Linear(3, 6), scale_map=scale_map)
    z = [torch.randn(32, 3), torch.randn(32, 3)]
    run = lambda: [v.detach() for (_, z2), log_det in (flow(z), flow.inverse(z)) for v in (z2, log_det)]
    wanted = run()
    fused.patch()
    try:
        genkern.reset_stats()
        for one, other in zip(run(), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert sum(genkern.stats().values()) == 2
    finally:
        fused.unpatch()
    assert all(torch.equal(one, other) for one, other in zip(run(), wanted, strict=True))


@pytest.mark.parametrize("inverse", [False, True])
def test_zuko_transforms(inverse):
    pytest.importorskip("zuko")
    from zuko.transforms import MonotonicRQSTransform

    from genkern.integrations import zuko as fused

    def theirs(x, *raw):
        transform = MonotonicRQSTransform(*raw, bound=3.0)
        if not inverse:
            return transform.call_and_ladj(x)
        back = transform.inv(x)
        return back, -transform.call_and_ladj(back)[1]

    ours = lambda x, *raw: fused.rational_quadratic_spline(x, *raw, bound=3.0, inverse=inverse)
    compare(ours, theirs, parameters(BINS - 1, scale=3.0))


def test_a_patched_zuko_flow_and_back():
    zuko = pytest.importorskip("zuko")
    from genkern.integrations import zuko as fused

    torch.manual_seed(0)
    flow, x, c = zuko.flows.NSF(3, 2, transforms=2, hidden_features=(16,)), 2 * torch.randn(50, 3), torch.randn(2)
    early = zuko.transforms.MonotonicRQSTransform(torch.randn(4), torch.randn(4), torch.randn(3))
    wanted, before = flow(c).log_prob(x), early(x)
    fused.patch()
    try:
        genkern.reset_stats()
        torch.testing.assert_close(flow(c).log_prob(x), wanted, rtol=1e-4, atol=1e-4)
        transform = flow(c).transform
        torch.testing.assert_close(transform.inv(transform(x)), x, rtol=1e-3, atol=1e-3)
        assert sum(genkern.stats().values()) >= 4
        assert torch.equal(early(x), before)
        late = zuko.transforms.MonotonicRQSTransform(torch.randn(4), torch.randn(4), torch.randn(3))
        assert late.bins == 4 and late.horizontal.shape == (5,)
    finally:
        fused.unpatch()
    assert torch.equal(flow(c).log_prob(x), wanted) and late(x).isfinite().all()


@pytest.mark.parametrize("reverse", [False, True])
def test_the_spline_of_vits(reverse):
    modeling = pytest.importorskip("transformers.models.vits.modeling_vits")
    from genkern.integrations import vits as fused

    theirs = modeling._unconstrained_rational_quadratic_spline
    compare(fused.unconstrained_rational_quadratic_spline, theirs, parameters(BINS - 1), reverse=reverse)
    fused.patch()
    try:
        assert modeling._unconstrained_rational_quadratic_spline is fused.unconstrained_rational_quadratic_spline
        far, *rest = parameters(BINS - 1)
        y, log_det = modeling._unconstrained_rational_quadratic_spline(far + 100, *rest)
        assert torch.equal(y, far + 100) and not log_det.any()
    finally:
        fused.unpatch()
    assert modeling._unconstrained_rational_quadratic_spline is theirs
