from types import SimpleNamespace

import pytest
import torch

import genkern
from genkern import core, models, random
from genkern.models import DDPM, DDPMConfig
from genkern.models.diffusion.ddpm import alphas_cumprod

NATIVE = core.OPS["group_norm_act"].available("cpu")["cpu"] is None


def small(**settings):
    torch.manual_seed(0)
    return DDPM(DDPMConfig(**{"levels": 16, "width": 16, "classes": 3, "timesteps": 100, **settings}))


def images(n=32):
    """Images of three classes: stripes of one of three heights."""
    labels = torch.arange(n) % 3
    x = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    for i, label in enumerate(labels):
        x[i, :, 2 * label + 1] = 16
    return x, labels


def test_training_lowers_the_loss_on_native_kernels():
    model, (x, labels) = small(), images()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    genkern.reset_stats()
    losses = []
    for key in random.split(random.key(0), 25):
        loss = model(x, labels=labels, key=key).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    backend = "cpu" if NATIVE else "reference"
    for op in ("group_norm_act", "q_sample", "denoising_loss", "group_norm_act_backward", "denoising_loss_backward"):
        assert genkern.stats().get((op, backend), 0) >= 25, op


def test_the_loss_is_the_formula():
    model, (x, labels), key = small(label_dropout=0.0, target="eps"), images(6), random.key(3)
    torch.nn.init.normal_(model.unet.last.weight, std=0.1)
    got = model(x, labels=labels, key=key).loss
    for_time, for_noise, _ = random.split(key, 3)
    t = (random.uniform(for_time, (6, 1))[:, 0] * 100).long()
    eps, x0 = random.normal(for_noise, x.shape), x / 8.0 - 1
    abar = torch.tensor(alphas_cumprod("cosine", 100))[t].view(-1, 1, 1, 1)
    prediction = model.unet(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t, labels)
    torch.testing.assert_close(got, (prediction - eps).square().mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", ["eps", "x0", "v"])
def test_a_perfect_prediction_is_sampled(target, monkeypatch):
    """With the network replaced by the truth for one known image, every sampler must end at that image."""
    model, image = small(target=target), images(1)[0] / 8.0 - 1
    table = alphas_cumprod("cosine", 100)

    def truth(x, t, labels, guidance_scale):
        a, s = table[t] ** 0.5, (1 - table[t]) ** 0.5
        eps = (x - a * image) / s
        return {"eps": eps, "x0": image.expand_as(x), "v": a * eps - s * image}[target]

    monkeypatch.setattr(model, "predict", truth)
    for eta in (0.0, 1.0):
        got = model.sample(2, key=random.key(1), steps=10, eta=eta)
        assert torch.equal(got, images(1)[0].expand(2, 1, 8, 8))


def test_a_sample_does_not_depend_on_its_batch():
    model, key, labels = small().eval(), random.key(5), torch.arange(6) % 3
    torch.nn.init.normal_(model.unet.last.weight, std=0.05)
    settings = {"key": key, "steps": 4, "guidance_scale": 2.0, "eta": 0.5}
    whole = model.sample(6, labels=labels, **settings)
    assert whole.dtype == torch.uint8 and whole.shape == (6, 1, 8, 8) and whole.max() <= 16 and whole.float().std() > 1
    assert torch.equal(model.sample(6, labels=labels, batch_size=4, **settings), whole)
    assert torch.equal(model.sample(2, labels=labels[:2], **settings), whole[:2])
    assert model.sample(0, key=key).shape == (0, 1, 8, 8)


def test_guidance_moves_away_from_no_label():
    model, x = small(), torch.randn(2, 1, 8, 8)
    torch.nn.init.normal_(model.unet.last.weight, std=0.1)
    for block in model.unet.down:
        if hasattr(block, "conv2"):
            torch.nn.init.normal_(block.conv2.weight, std=0.1)
    with torch.no_grad():
        without, with_label, guided = (
            model.predict(x, 30, labels, scale)
            for labels, scale in ((torch.tensor([3, 3]), 1.0), (torch.tensor([0, 1]), 1.0), (torch.tensor([0, 1]), 3.0))
        )
    assert not torch.allclose(without, with_label)
    torch.testing.assert_close(guided, without + 3 * (with_label - without), rtol=1e-4, atol=1e-5)


def test_noise_per_sample_does_not_depend_on_the_batch():
    model, (x, labels) = small(), images(6)
    torch.nn.init.normal_(model.unet.last.weight, std=0.1)
    keys = random.split(random.key(2), 6)
    parts = [model(x[i : i + 1], labels=labels[i : i + 1], key=keys[i : i + 1]).loss for i in range(6)]
    torch.testing.assert_close(model(x, labels=labels, key=keys).loss, torch.stack(parts).mean())


def test_compiles_in_one_graph():
    model, (x, labels), key = small(blocks=1, resolutions=1), images(4), random.key(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, labels=labels, key=key).loss, model(x, labels=labels, key=key).loss)


def test_trains_under_autocast():
    model, (x, labels), key = small(), images(4), random.key(3)
    exact = model(x, labels=labels, key=key).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(x, labels=labels, key=key).loss
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_fits_a_data_set():
    config = DDPM.config_for(SimpleNamespace(shape=(1, 8, 8), levels=16, classes=10), width=16)
    assert (config.size, config.levels, config.classes, config.width) == (8, 16, 10, 16)
    assert DDPM.defaults.ema is not None and DDPM.conditions == ("labels",)


def test_save_and_load(tmp_path):
    model, (x, labels), key = small(noise_schedule="linear", weighting="min_snr"), images(4), random.key(3)
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config and loaded(x, labels=labels, key=key).loss == model(x, labels=labels, key=key).loss


@pytest.mark.parametrize(
    "settings, words",
    [({"size": 7}, "multiple of 2"), ({"width": 12}, "width"), ({"target": "score"}, "score"), ({"noise_schedule": "fast"}, "fast")],
)
def test_wrong_settings_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        small(**settings)


def test_wrong_labels_are_refused_in_words():
    model, (x, _) = small(), images(4)
    for labels, words in ((torch.tensor([0, 1, 2, 3]), r"0\.\.2"), (torch.zeros(3, dtype=torch.int64), r"\(4,\)")):
        with pytest.raises(ValueError, match=words):
            model(x, labels=labels)
    with pytest.raises(ValueError, match="classes"):
        small(classes=0).sample(1, guidance_scale=2.0)
