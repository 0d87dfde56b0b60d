import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

import genkern
import genkern.data
from genkern import core, models, random
from genkern.models import DCGAN, GAN, WGAN, WGANGP, ConditionalGAN
from genkern.models.gan import losses
from genkern.train import fit

NATIVE = core.OPS["group_norm_act"].available("cpu")["cpu"] is None
KINDS = {"gan": GAN, "cgan": ConditionalGAN, "dcgan": DCGAN, "wgan": WGAN, "wgangp": WGANGP}
each_model = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def small(kind, **settings):
    torch.manual_seed(0)
    return kind(kind.Config(**{"levels": 16, "latent": 5, "width": 8, "hidden": 16, **settings}))


def images(n=12):
    return torch.randint(0, 17, (n, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def given(model, n=12):
    return {"labels": torch.arange(n) % 10} if model.conditions else {}


def data(n=96):
    """Squares, bright or dark: two classes of ten."""
    x, labels = torch.zeros(n, 1, 8, 8, dtype=torch.uint8), torch.arange(n) % 2
    x[:, :, 2:6, 2:6] = (4 + 12 * labels).to(torch.uint8).view(-1, 1, 1, 1)
    cut = lambda a, b: (x[a:b], labels[a:b])
    parts = {"train": cut(0, n - 32), "validation": cut(n - 32, n - 16), "test": cut(n - 16, n)}
    return genkern.data.Data("squares", **parts, shape=(1, 8, 8), levels=16, class_names=tuple("0123456789"))


# ---- losses and penalties


def test_the_losses_are_their_formulas():
    real, fake = torch.tensor([-3.0, 0.2, 2.0]).double(), torch.tensor([1.5, -0.7]).double()
    p = torch.sigmoid
    wanted = {
        "minimax": (-p(real).log().mean() - (1 - p(fake)).log().mean(), (1 - p(fake)).log().mean()),
        "non_saturating": (-p(real).log().mean() - (1 - p(fake)).log().mean(), -p(fake).log().mean()),
        "hinge": (torch.tensor([4.0, 0.8, 0.0]).mean() + torch.tensor([2.5, 0.3]).mean(), -fake.mean()),
        "wasserstein": (fake.mean() - real.mean(), -fake.mean()),
    }
    assert wanted.keys() == set(losses.LOSSES)
    for kind, (discriminator, generator) in wanted.items():
        torch.testing.assert_close(losses.discriminator_loss(kind, real, fake), discriminator.double())
        torch.testing.assert_close(losses.generator_loss(kind, fake), generator)
    sure = torch.tensor([-200.0, 200.0])
    for kind in losses.LOSSES:
        assert losses.discriminator_loss(kind, sure, sure).isfinite() and losses.generator_loss(kind, sure).isfinite()


def test_penalties_of_functions_with_known_slopes():
    real, fake, mix = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.rand(4)
    linear = lambda x: 2 * x.flatten(1).sum(1)  # its slope has the norm 2 sqrt(18) everywhere
    torch.testing.assert_close(losses.gradient_penalty(linear, real, fake, mix), torch.tensor((2 * math.sqrt(18) - 1) ** 2))
    torch.testing.assert_close(losses.r1_penalty(linear, real), torch.tensor(36.0))
    square = lambda x: x.flatten(1).square().sum(1) / 2  # its slope is x
    x = mix.view(-1, 1, 1, 1) * real + (1 - mix.view(-1, 1, 1, 1)) * fake
    torch.testing.assert_close(
        losses.gradient_penalty(square, real, fake, mix), (x.flatten(1).norm(dim=1) - 1).square().mean(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(losses.r1_penalty(square, real), real.square().sum((1, 2, 3)).mean() / 2)
    scale = torch.ones((), requires_grad=True)  # a critic without slope has a finite gradient
    losses.gradient_penalty(lambda x: scale * 0 * x.sum((1, 2, 3)), real, fake, mix).backward()
    assert scale.grad.isfinite()


def test_second_order_gradients_through_genkern_ops_equal_a_float64_reference():
    """The critic's group norm is native in float32; the same critic of torch's own layers in float64 gives the truth."""
    model, x, key = small(WGANGP, width=16), images(), random.key(3)
    genkern.reset_stats()
    loss = model(x, key=key, objective="discriminator").loss
    assert genkern.stats().get(("group_norm_act", "cpu" if NATIVE else "reference"), 0) >= 2
    got = torch.autograd.grad(loss, list(model.discriminator.parameters()))

    class Norm(torch.nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.groups, self.eps, self.weight, self.bias = fused.num_groups, fused.eps, fused.weight, fused.bias

        def forward(self, x):
            n, c, h, w = x.shape
            g = x.reshape(n, self.groups, -1)
            g = (g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + self.eps).sqrt()
            y = g.reshape(x.shape) * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
            return y * torch.sigmoid(y)

    exact = small(WGANGP, width=16).double()
    critic = exact.discriminator
    for i, layer in enumerate(critic.features):
        if isinstance(layer, genkern.nn.GroupNormAct):
            critic.features[i] = Norm(layer)
    for_latent, for_mix = random.split(random.fold_in(key, 0), 2).unbind(-2)
    real = x.double() / 8 - 1
    with torch.no_grad():
        fake = model.generator(random.normal(for_latent, (12, 5))).double()
    mix = random.uniform(for_mix, (12, 1)).double().view(-1, 1, 1, 1)
    between = (mix * real + (1 - mix) * fake).requires_grad_()
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    penalty = (slope.square().sum((1, 2, 3)).sqrt() - 1).square().mean()
    truth = critic(fake).mean() - critic(real).mean() + 10 * penalty
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(truth, list(critic.parameters()))
    scale = max(float(g.abs().max()) for g in wanted)
    for mine, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine.double(), want, rtol=1e-4, atol=1e-5 * scale)


# ---- objectives


@each_model
@pytest.mark.parametrize("objective", ["discriminator", "generator"])
def test_an_objective_trains_only_its_own_parameters(kind, objective):
    model, x = small(kind), images()
    loss = model(x, key=random.key(0), objective=objective, **given(model)).loss
    loss.backward()
    for name in ("discriminator", "generator"):
        gradients = [p.grad for p in getattr(model, name).parameters()]
        assert all((g is not None) == (name == objective) for g in gradients)
        assert name != objective or any(g.abs().max() > 0 for g in gradients)


def test_the_generator_loss_has_the_gradient_of_a_plain_pass():
    model, x, key = small(DCGAN).eval(), images(), random.key(1)  # eval: the spectral norm does not move between the passes
    got = torch.autograd.grad(model(x, key=key, objective="generator").loss, list(model.generator.parameters()))
    z = random.normal(random.split(random.fold_in(key, 1), 2)[0], (12, 5))
    plain = torch.nn.functional.softplus(-model.discriminator(model.generator(z))).mean()
    for mine, want in zip(got, torch.autograd.grad(plain, list(model.generator.parameters())), strict=True):
        torch.testing.assert_close(mine, want)


@each_model
def test_noise_is_one_stream_per_image(kind):
    model, x, keys = small(kind).eval(), images(6), random.split(random.key(2), 6)
    labels = given(model, 6)
    for objective in ("discriminator", "generator"):
        row = lambda i: {name: value[i : i + 1] for name, value in labels.items()}
        parts = [model(x[i : i + 1], key=keys[i : i + 1], objective=objective, **row(i)).loss.detach() for i in range(6)]
        torch.testing.assert_close(model(x, key=keys, objective=objective, **labels).loss.detach(), torch.stack(parts).mean())


def test_spectral_norm_bounds_the_discriminator():
    model = small(GAN, spectral_norm=True).train()
    for _ in range(30):
        model.discriminator(torch.randn(4, 1, 8, 8))
    x, y = torch.randn(2, 50, 1, 8, 8).unbind()
    slope = (model.discriminator(x) - model.discriminator(y)).abs() / (x - y).flatten(1).norm(dim=1)
    assert slope.max() < 1.1**2  # SiLU's slope is at most 1.1; two layers of it
    for layer in model.discriminator.modules():
        if isinstance(layer, torch.nn.Linear):
            assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1, abs=0.02)


def test_clipping_holds_after_every_step():
    model = small(WGAN, clip=0.02)
    fit(model, data(), epochs=2, batch_size=16, learning_rate=0.5, progress=False)
    assert max(p.abs().max().item() for p in model.discriminator.parameters()) == pytest.approx(0.02)
    assert max(p.abs().max() for p in model.generator.parameters()) > 0.1


# ---- samples


@each_model
def test_a_sample_does_not_depend_on_its_batch(kind):
    model, key = small(kind).eval(), random.key(5)
    labels = given(model, 20)
    whole = model.sample(20, key=key, **labels)
    assert whole.dtype == torch.uint8 and whole.shape == (20, 1, 8, 8) and whole.max() <= 16
    some = {name: value[:7] for name, value in labels.items()}
    assert torch.equal(model.sample(7, key=key, **some), whole[:7])
    assert torch.equal(model.sample(20, key=key, batch_size=3, **labels), whole)
    assert torch.equal(model.sample(20, key=random.split(key, 20), **labels), whole)
    assert model.sample(0, key=key, **given(model, 0)).shape == (0, 1, 8, 8)


def test_labels_move_both_networks():
    model, key = small(ConditionalGAN).eval(), random.key(0)
    one, two = (model.decode(torch.ones(3, 5), labels=torch.full((3,), label)) for label in (1, 2))
    assert not torch.allclose(one, two)
    scores = [model.discriminator(one, torch.full((3,), label)) for label in (1, 2)]
    assert not torch.allclose(*scores)
    same = [model(images(3), objective="discriminator", key=key, labels=x).loss for x in (torch.tensor([2, 2, 2]).byte(), 2)]
    assert same[0] == same[1] and torch.equal(model.sample(3, key=key, labels=2), model.sample(3, key=key, labels=torch.full((3,), 2)))
    for labels, words in (
        (None, "needs labels"),
        (torch.tensor([0, 10]), r"0\.\.9"),
        (torch.zeros(2), "integers"),
        (torch.zeros(3).long(), r"\(2,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            model.sample(2, key=key, labels=labels)


# ---- training


@each_model
def test_save_and_load(kind, tmp_path):
    model, x, key = small(kind).eval(), images(), random.key(3)
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config
    assert torch.equal(loaded.sample(4, key=key, **given(model, 4)), model.sample(4, key=key, **given(model, 4)))
    both = [m(x, key=key, objective="discriminator", **given(m)).loss for m in (loaded, model)]
    assert both[0] == both[1]


@each_model
def test_training_and_evaluation(kind, tmp_path):
    model, before = small(kind), small(kind)
    genkern.reset_stats()
    history = fit(model, data(), tmp_path, epochs=3, batch_size=16, learning_rate=1e-3, ema=0.9, progress=False)
    if kind is WGANGP and NATIVE:
        assert genkern.stats()[("group_norm_act", "cpu")] > 20
    assert {"loss", "discriminator", "real", "fake", "validation_loss", "validation_generator"} <= history[-1].keys()
    assert model.config.critic_steps > 4 or "generator" in history[0]
    for name in ("discriminator", "generator"):
        moved = [
            not torch.equal(a, b) for a, b in zip(getattr(model, name).parameters(), getattr(before, name).parameters(), strict=True)
        ]
        assert sum(moved) > len(moved) / 2
    kept = models.load(tmp_path)
    key = random.split(random.key(0), 3)[2]
    best = min(row["validation_loss"] for row in history)
    assert kept.evaluate(*data().validation, key=key)["loss"] == pytest.approx(best, rel=1e-6)


def test_the_average_is_of_the_generator_only():
    model, plain = small(DCGAN), small(DCGAN)
    assert all(name.startswith("generator.") for name in model.averaged()) and any("running_var" in n for n in model.averaged())
    settings = {"epochs": 2, "batch_size": 16, "learning_rate": 1e-3, "progress": False, "validate": False}
    fit(model, data(), ema=0.9, **settings)
    fit(plain, data(), ema=None, **settings)
    for name, x in plain.state_dict().items():
        averaged = name in model.averaged() and not name.endswith("num_batches_tracked")
        assert torch.equal(x, model.state_dict()[name]) != averaged, name


def test_several_critic_steps_to_one_of_the_generator():
    model = small(WGANGP, critic_steps=3)
    assert [step for step in range(9) if model.due("generator", step)] == [2, 5, 8]
    assert all(model.due("discriminator", step) for step in range(9))
    start = [p.detach().clone() for p in model.generator.parameters()]
    rows = fit(model, data(), epochs=1, batch_size=32, ema=None, progress=False)  # two steps: the critic's alone
    assert "generator" not in rows[0] and all(torch.equal(a, b) for a, b in zip(start, model.generator.parameters(), strict=True))
    rows = fit(model, data(), epochs=1, batch_size=16, ema=None, progress=False)  # four: one is the generator's
    assert rows[0]["generator"] and not all(torch.equal(a, b) for a, b in zip(start, model.generator.parameters(), strict=True))


@pytest.mark.parametrize("kind", [DCGAN, WGAN], ids=["dcgan", "wgan"])
def test_a_resumed_run_ends_as_an_unbroken_one(kind, tmp_path):
    settings = {"batch_size": 16, "save_every": 3, "progress": False}
    whole, half, rest = small(kind), small(kind), small(kind)
    wanted = fit(whole, data(), tmp_path / "whole", epochs=4, **settings)
    fit(half, data(), tmp_path / "half", epochs=2, **settings)
    got = fit(rest, data(), tmp_path / "half", epochs=4, resume=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), rest.state_dict().values(), strict=True))
    untimed = lambda history: [{name: x for name, x in row.items() if name != "seconds"} for row in history]
    assert untimed(got) == untimed(wanted)


def test_the_evaluation_tells_a_collapsed_generator():
    model, x = small(GAN).eval(), data(600).train[0]
    collapsed = model.evaluate(x, key=random.key(0))["loss"]
    model.sample = lambda n, **_: data(n + 32).train[0]
    assert model.evaluate(x, key=random.key(0))["loss"] < 0.01 < 1 < collapsed


def test_by_the_command_line(tmp_path, capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    from genkern.cli import main

    run = str(tmp_path / "run")
    assert main(["train", "cgan", "--data", "digits", "--out", run, "--epochs", "1", "--hidden", "16", "--loss", "hinge"]) == 0
    assert main(["sample", run, "--n", "4", "--label", "3", "--out", str(tmp_path / "grid.png")]) == 0
    capsys.readouterr()
    assert main(["eval", run]) == 0
    assert "generator" in capsys.readouterr().out


# ---- settings


@each_model
def test_fits_a_data_set(kind):
    source = SimpleNamespace(name="photos", shape=(3, 32, 32), levels=255, classes=4)
    config = kind.config_for(source, hidden=16)
    assert (config.channels, config.size, config.levels, config.hidden) == (3, 32, 255, 16)
    assert len({f.name for f in dataclasses.fields(config)}) == len(dataclasses.fields(config))
    model = kind(dataclasses.replace(config, width=8))
    assert model.sample(2, key=random.key(0), **given(model, 2)).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="square images"):
        kind.config_for(SimpleNamespace(name="text", shape=(128,), levels=255, classes=4))


@pytest.mark.parametrize(
    "kind, settings, words",
    [
        (GAN, {"network": "rnn"}, "network must be one of mlp, conv"),
        (GAN, {"loss": "l2"}, "loss must be one of"),
        (GAN, {"loss": "wasserstein", "spectral_norm": False}, "needs spectral_norm or gradient_penalty"),
        (GAN, {"critic_steps": 0}, "critic_steps must be an int of at least 1"),
        (DCGAN, {"size": 6}, "size must be a multiple of 4, got 6"),
        (WGAN, {"loss": "hinge"}, "loss must be wasserstein"),
        (WGAN, {"clip": 0.0}, "clip must be positive"),
        (WGANGP, {"critic_norm": "batch"}, "scores each image alone"),
        (DCGAN, {"critic_norm": "batch"}, "scores each image alone"),
    ],
)
def test_wrong_settings_are_refused_in_words(kind, settings, words):
    with pytest.raises(ValueError, match=words):
        small(kind, **settings)


def test_wrong_calls_are_refused_in_words():
    model = small(GAN)
    with pytest.raises(ValueError, match="objective must be one of discriminator, generator, got 'loss'"):
        model(images(), objective="loss", key=random.key(0))
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\), got \(2, 3, 8, 8\)"):
        model(torch.zeros(2, 3, 8, 8), objective="generator", key=random.key(0))
