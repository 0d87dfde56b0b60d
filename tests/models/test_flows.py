"""Flows: invertible, with the log-determinant of their Jacobian, densities that integrate to one."""

import math

import pytest
import torch

import genkern
from genkern import core, models
from genkern.models import (
    IAF,
    MAF,
    NICE,
    Glow,
    GlowConfig,
    IAFConfig,
    MAFConfig,
    NeuralSplineFlow,
    NeuralSplineFlowConfig,
    NICEConfig,
    RealNVP,
    RealNVPConfig,
)  # fmt: skip

IMAGE = {"shape": (1, 4, 4), "levels": 16}
POINT = {"shape": (3,), "levels": None}
KINDS = {
    "glow": (Glow, GlowConfig(**IMAGE, scales=2, steps=2, width=8)),
    "glow-additive-full": (Glow, GlowConfig(**IMAGE, scales=1, steps=2, width=8, coupling="additive", plu=False, transform="logit")),
    "glow-classes": (Glow, GlowConfig(**IMAGE, scales=1, steps=1, width=8, classes=3, context=2)),
    "nice": (NICE, NICEConfig(**IMAGE, width=16, depth=2)),
    "nice-points": (NICE, NICEConfig(**POINT, width=16, depth=1, base="gaussian", classes=3)),
    "real-nvp": (RealNVP, RealNVPConfig(**IMAGE, width=8, blocks=1)),
    "real-nvp-points": (RealNVP, RealNVPConfig(**POINT, width=8, couplings=4, context=2)),
    "spline": (NeuralSplineFlow, NeuralSplineFlowConfig(**IMAGE, width=8, steps=1, bins=4)),
    "spline-points": (NeuralSplineFlow, NeuralSplineFlowConfig(**POINT, width=8, steps=2, context=2)),
    "spline-autoregressive": (NeuralSplineFlow, NeuralSplineFlowConfig(**POINT, width=16, steps=2, autoregressive=True, context=2)),
    "maf": (MAF, MAFConfig(**IMAGE, hidden=(24, 24), steps=2)),
    "maf-points": (MAF, MAFConfig(**POINT, hidden=(16,), steps=2, classes=3, context=2)),
    "iaf-points": (IAF, IAFConfig(**POINT, hidden=(16, 16), classes=3, context=1)),
}
ALL = pytest.mark.parametrize("name", KINDS)


def make(name, dtype=torch.float32):
    """A model that is not the identity: every parameter moved."""
    kind, config = KINDS[name]
    torch.manual_seed(0)
    model = kind(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def data(model, n=6, dtype=torch.float32, discrete=False):
    generator, c = torch.Generator().manual_seed(1), model.config
    if discrete and c.levels is not None:
        return torch.randint(0, c.levels + 1, (n, *c.shape), generator=generator, dtype=torch.uint8)
    x = torch.randn(n, *c.shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.tanh() * 0.9 if model.bounded else x


def labels(model, n=6):
    """Labels, and a context, of a model that has them."""
    known = {"labels": torch.arange(n) % 3} if model.config.classes else {}
    if model.config.context:
        known["context"] = torch.linspace(-1, 1, 20)[: n * model.config.context].view(n, model.config.context)
    return known


@ALL
def test_the_log_determinant_is_that_of_the_jacobian(name):
    model = make(name, torch.float64)
    x, condition = data(model, 2, torch.float64), labels(model, 2)
    z, log_det = model.encode(x, **condition)
    assert z.shape == (2, model.dimensions) and z.dtype == log_det.dtype == torch.float64
    for i in range(2):
        one = {key: value[i : i + 1] for key, value in condition.items()}
        of = lambda v, one=one: model.encode(v.view(1, *model.config.shape), **one)[0].flatten()
        jacobian = torch.autograd.functional.jacobian(of, x[i].flatten())
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian)[1], rtol=1e-9, atol=1e-9)
    log_prob = model._base_log_prob(z) + log_det
    torch.testing.assert_close(model.log_prob(x, **condition), log_prob)


@ALL
def test_decode_inverts_encode(name):
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-3)):
        model = make(name, dtype)
        x, condition = data(model, dtype=dtype), labels(model)
        with torch.no_grad():
            z, _ = model.encode(x, **condition)
            torch.testing.assert_close(model.decode(z, **condition), x, rtol=0, atol=tolerance)


@ALL
def test_uint8_inputs_round_to_themselves_and_have_bits(name):
    model = make(name)
    if model.config.levels is None:
        return
    x, condition, key = data(model, discrete=True), labels(model), genkern.random.key(5)
    with torch.no_grad():
        z, log_det = model.encode(x, key=key, **condition)
        assert torch.equal(
            model._domain(model._decode(z, model._context(condition.get("labels"), condition.get("context"), len(x)))), x
        )
        bound = model._base_log_prob(z) + log_det
        torch.testing.assert_close(model.log_prob(x, key=key, **condition), bound)
        torch.testing.assert_close(model.bits_per_dim(x, key=key, **condition), -bound / (model.dimensions * math.log(2)))
        out = model(x, key=key, **condition)
        torch.testing.assert_close(out.loss, -bound.mean())
        torch.testing.assert_close(out.parts["bits_per_dim"], -bound.mean() / (model.dimensions * math.log(2)))
        keys = genkern.random.split(key, len(x))
        rows = {k: v[2:4] for k, v in condition.items()}
        whole = model.log_prob(x, key=keys, **condition)
        torch.testing.assert_close(model.log_prob(x[2:4], key=keys[2:4], **rows), whole[2:4])
        assert (model.log_prob(x, samples=64, key=key, **condition) > model.log_prob(x, key=key, **condition) - 5).all()


@ALL
def test_samples_and_files(name, tmp_path):
    model, key = make(name), genkern.random.key(5)
    condition = labels(model, 10)
    whole = model.sample(10, key=key, **condition)
    assert whole.shape == (10, *model.config.shape) and whole.dtype == (torch.float32 if model.config.levels is None else torch.uint8)
    parts = model.sample(10, key=key, batch_size=3, **condition)
    assert (whole.float() - parts.float()).abs().max() <= (1e-4 if model.config.levels is None else 1)
    cold = model.sample(10, key=key, temperature=0.0, **condition)
    if not condition:
        assert torch.equal(cold[0], cold[1])
    model.save_pretrained(tmp_path)
    loaded, x = models.load(tmp_path), data(model)
    condition = labels(model)
    torch.testing.assert_close(loaded.log_prob(x, key=key, **condition), model.log_prob(x, key=key, **condition), rtol=0, atol=0)
    between = loaded.interpolate(x[:2], x[2:4], steps=3, **{k: v[:2] for k, v in condition.items()})
    assert between.shape == (2, 3, *model.config.shape)
    assert loaded.traverse(steps=3, rows=2, context=labels(model, 2).get("context")).shape == (2, 3, *model.config.shape)


@pytest.mark.parametrize("kind, config", [
    (RealNVP, RealNVPConfig(shape=(2,), levels=None, width=32, couplings=4)),
    (NeuralSplineFlow, NeuralSplineFlowConfig(shape=(2,), levels=None, width=32, steps=2)),
    (MAF, MAFConfig(shape=(2,), levels=None, hidden=(32, 32), steps=3)),
])  # fmt: skip
def test_a_trained_density_integrates_to_one(kind, config):
    torch.manual_seed(0)
    model = kind(config).train()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    angle = torch.rand(4096) * math.pi
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    moons = torch.where(torch.arange(4096)[:, None] % 2 == 0, upper, torch.tensor([1.0, 0.4]) - upper) + 0.1 * torch.randn(4096, 2)
    losses = []
    for step in range(150):
        loss = model(moons[step * 256 % 4096 :][:256]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-10:]) / 10 < losses[0] - 0.5
    side = torch.linspace(-6, 6, 601)
    grid = torch.stack(torch.meshgrid(side, side, indexing="ij"), -1).view(-1, 2)
    with torch.no_grad():
        total = model.eval().log_prob(grid).double().exp().sum() * 0.02**2
    assert total == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("kind, config", [
    (NeuralSplineFlow, NeuralSplineFlowConfig(shape=(2,), levels=None, width=32, steps=2, context=2)),
    (MAF, MAFConfig(shape=(2,), levels=None, hidden=(32, 32), steps=2, context=2)),
])  # fmt: skip
def test_a_trained_density_follows_its_context(kind, config):
    """x = (sin 2 c1, c0 c1) + 0.3 noise: the entropy of the noise is what a loss can reach, and the means move with c."""
    mean = lambda c: torch.stack([(2 * c[:, 1]).sin(), c[:, 0] * c[:, 1]], 1)
    torch.manual_seed(0)
    model = kind(config).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        c = torch.randn(256, 2)
        loss = model(mean(c) + 0.3 * torch.randn(256, 2), context=c).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    model.eval()
    c = torch.randn(2000, 2)
    x = mean(c) + 0.3 * torch.randn(2000, 2)
    entropy = 1 + math.log(2 * math.pi * 0.09)
    with torch.no_grad():
        assert -model.log_prob(x, context=c).mean() == pytest.approx(entropy, abs=0.15)
        assert (model.log_prob(x, context=c) - model.log_prob(x, context=c.flip(0))).mean() > 1.0
    for one in torch.tensor([[1.0, 0.5], [-0.5, -1.0]]):
        samples = model.sample(2000, context=one, key=genkern.random.key(0))
        torch.testing.assert_close(samples.mean(0), mean(one[None])[0], rtol=0, atol=0.1)
        torch.testing.assert_close(samples.std(0), torch.full((2,), 0.3), rtol=0, atol=0.07)


def test_a_context_is_checked():
    model, x = make("spline-points"), torch.zeros(4, 3)
    for context, error, words in (
        (None, ValueError, r"needs context \(4, 2\)"),
        (torch.zeros(3, 2), ValueError, r"\(4, 2\), or \(2,\) for all, got \(3, 2\)"),
        (torch.zeros(4, 2).long(), TypeError, "float tensor, got torch.int64"),
    ):
        with pytest.raises(error, match=words):
            model.log_prob(x, context=context)
    one = torch.tensor([0.3, -1.0])
    assert torch.equal(model.log_prob(x, context=one), model.log_prob(x, context=one.double().expand(4, 2)))
    assert model.interpolate(x[:2], x[2:], context=one, steps=3).shape == (2, 3, 3)
    assert model.traverse(rows=2, steps=3, context=one).shape == (2, 3, 3)
    with pytest.raises(ValueError, match="no context"):
        make("maf").log_prob(torch.zeros(2, 1, 4, 4), context=one)
    with pytest.raises(ValueError, match="context must be an int"):
        MAF(MAFConfig(context=-1))


@pytest.mark.parametrize("name, ops_of_it", [
    ("glow", ("affine_coupling",)), ("nice", ("dequantize",)), ("real-nvp", ("affine_coupling",)),
    ("spline", ("rational_quadratic_spline",)), ("maf", ("affine_coupling",)),
])  # fmt: skip
def test_training_and_sampling_run_on_native_kernels(name, ops_of_it):
    kind, config = KINDS[name]
    torch.manual_seed(0)
    model = kind(config).train()
    x = data(model, 64, discrete=True) // 4
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    genkern.reset_stats()
    losses = []
    for key in genkern.random.split(genkern.random.key(0), 20):
        loss = model(x, key=key).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = genkern.stats()
    genkern.reset_stats()
    model.eval().sample(3, key=genkern.random.key(1))
    for op in ops_of_it:
        backend = "cpu" if core.OPS[op].available("cpu")["cpu"] is None else "reference"
        assert trained[op, backend] >= 20
        if op != "dequantize":  # which has no gradient and is of data alone
            assert genkern.stats()[op, backend] >= 1
        if op != "dequantize" and backend == "cpu":
            assert trained[op + "_backward", backend] >= 20


@pytest.mark.parametrize("change, error, words", [
    (lambda x: x[:, :, :2], ValueError, r"\(N, 1, 4, 4\)"),
    (lambda x: x + 10, ValueError, r"\[0, 16\], found \[10, 26\]"),
    (lambda x: x.float(), ValueError, r"\[-1, 1\]"),
    (lambda x: x.long(), TypeError, "int64"),
    (lambda x: x.tolist(), TypeError, "list"),
])  # fmt: skip
def test_wrong_inputs_are_refused_in_words(change, error, words):
    x = torch.arange(17).repeat(2)[:32].view(2, 1, 4, 4).to(torch.uint8)
    with pytest.raises(error, match=words):
        make("glow").encode(change(x))


def test_what_is_no_tensor_has_no_bits():
    for name in ("glow", "maf-points"):
        for of in ("bits_per_dim", "log_prob"):
            with pytest.raises(TypeError, match="must be a tensor, got list"):
                getattr(make(name), of)([1, 2])


@ALL
def test_no_inputs_and_other_floating_types(name):
    model = make(name)
    assert model.sample(0, **labels(model, 0)).shape == (0, *model.config.shape)
    assert model.log_prob(data(model)[:0], **labels(model, 0)).shape == (0,)
    x, condition = data(model), labels(model)
    wanted = model.log_prob(x, **condition)
    torch.testing.assert_close(model.log_prob(x.double(), **condition), wanted)  # as numpy has them
    narrow = x.bfloat16()
    torch.testing.assert_close(model.log_prob(narrow, **condition), model.log_prob(narrow.float(), **condition))


def test_wrong_settings_are_refused_in_words():
    for kind, config, words in (
        (Glow, GlowConfig(shape=(1, 6, 6)), "multiples of 2"),
        (Glow, GlowConfig(shape=(3,)), "needs images"),
        (Glow, GlowConfig(coupling="cubic"), "affine or additive"),
        (NICE, NICEConfig(base="cauchy"), "logistic"),
        (RealNVP, RealNVPConfig(shape=(1,)), "at least 2"),
        (MAF, MAFConfig(transform="log"), "center, logit"),
        (MAF, MAFConfig(shape=2), "shape must be"),
    ):
        with pytest.raises(ValueError, match=words):
            kind(config)
    with pytest.raises(ValueError, match="samples must be an int of at least 1, got 0"):
        make("glow").log_prob(torch.zeros(1, 1, 4, 4), samples=0)
    model = make("glow-classes")
    with pytest.raises(ValueError, match=r"0\.\.2, got 3\.\.3"):
        model.sample(2, labels=3)
    with pytest.raises(ValueError, match="needs labels"):
        model.sample(2)
    with pytest.raises(ValueError, match="leave labels out"):
        make("glow").sample(2, labels=3)
