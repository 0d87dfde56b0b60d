from types import SimpleNamespace

import pytest
import torch

import genkern
from genkern import core, models, random
from genkern.models import DDPM, DDPMConfig
from genkern.samplers import SAMPLERS, Schedule, by_name

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
    abar = torch.tensor(Schedule.cosine(100).alphas_cumprod, dtype=torch.float32)[t].view(-1, 1, 1, 1)
    prediction = model.unet(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t, labels)
    torch.testing.assert_close(got, (prediction - eps).square().mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule, target", [("cosine", "eps"), ("linear", "x0"), ("sigmoid", "v"), ("flow", "flow"), ("edm", "edm")])
def test_a_perfect_prediction_costs_nothing_and_is_sampled(schedule, target, monkeypatch):
    """With the network replaced by the truth for one known image, the loss is 0 and every sampler ends at that image."""
    model = small(target=target, noise_schedule=schedule)
    pixels, image = images(1)[0], images(1)[0] / 8.0 - 1

    def truth(x, t, labels):
        if schedule == "edm":  # x is x_t / sqrt(sigma^2 + 1/4), the prediction (image - c_skip x_t) / c_out
            sigma = torch.exp(4 * t).view(-1, 1, 1, 1)
            total = (sigma**2 + 0.25).sqrt()
            return (image - 0.25 / total**2 * (x * total)) * total / (sigma * 0.5)
        if schedule == "flow":
            return (x - image) / (t / 100).view(-1, 1, 1, 1)
        a, s = (table[t.long()].view(-1, 1, 1, 1) for table in (model.alphas, model.sigmas))
        eps = (x - a * image) / s
        return {"eps": eps, "x0": image.expand_as(x), "v": a * eps - s * image}[target]

    monkeypatch.setattr(model, "_network", truth)
    assert model(pixels.expand(8, 1, 8, 8), key=random.key(2)).loss < 1e-4
    kind = model.process.schedule.kind
    names = [name for name, (classes, _) in SAMPLERS.items() if any(kind in c.kinds for c in classes) and name != "lcm"]
    assert len(names) >= 6
    for name in names:
        got = model.sample(2, key=random.key(1), sampler=name, steps=10)
        assert torch.equal(got, pixels.expand(2, 1, 8, 8)), name


def test_samplers_by_name():
    schedule = Schedule.cosine(100)
    for name, (classes, settings) in SAMPLERS.items():
        sampler = by_name(name, schedule, 4)
        assert type(sampler) is classes[0] and all(getattr(sampler, option) == value for option, value in settings.items())
    assert by_name("ddim", schedule, 4, eta=0.5, clip=None).eta == 0.5
    assert type(by_name("euler", Schedule.flow(), 4)).__name__ == "FlowMatchEuler"
    with pytest.raises(ValueError, match="did you mean 'dpmpp_2m'"):
        by_name("DPMpp-2M", schedule)
    with pytest.raises(ValueError, match="the names are ddpm, ddim"):
        by_name("q", schedule)
    with pytest.raises(ValueError, match="'ddim' does not serve a schedule of kind flow; those that do: euler, heun"):
        by_name("ddim", Schedule.flow())
    with pytest.raises(TypeError, match="'unipc' takes no eta"):
        by_name("unipc", schedule, eta=1.0)


def alive(model):
    """The layers that begin as zero get weights, so that everything matters."""
    for p in model.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm"])
def test_sampling_runs_on_native_kernels_and_does_not_depend_on_the_batch(sampler):
    model, key, labels = alive(small()), random.key(5), torch.arange(6) % 3
    settings = {"key": key, "steps": 4, "guidance_scale": 2.0, "sampler": sampler}
    genkern.reset_stats()
    whole = model.sample(6, labels=labels, **settings)
    backend = "cpu" if NATIVE else "reference"
    assert genkern.stats()["sampler_step", backend] == 4 and genkern.stats()["group_norm_act", backend] > 4 * 10
    assert whole.dtype == torch.uint8 and whole.shape == (6, 1, 8, 8) and whole.max() <= 16 and whole.float().std() > 1
    assert torch.equal(model.sample(6, labels=labels, batch_size=4, **settings), whole)
    assert torch.equal(model.sample(2, labels=labels[:2], **settings), whole[:2])
    assert torch.equal(model.sample(3, labels=1, **settings)[1], whole[1])
    assert model.sample(0, key=key).shape == (0, 1, 8, 8)


def test_guidance_moves_away_from_no_label():
    """One step of DDIM from pure noise with v as the target: the image is linear in the prediction."""
    model, options = alive(small(timesteps=1000)), {"key": random.key(1), "sampler": "ddim", "steps": 1}
    model._clip, model._levels = lambda: None, lambda x: x
    labels = torch.tensor([0, 1])
    without, with_label = model.sample(2, **options), model.sample(2, labels=labels, **options)
    guided = model.sample(2, labels=labels, guidance_scale=3.0, **options)
    assert (without - with_label).abs().max() > 1e-3
    torch.testing.assert_close(guided, without + 3 * (with_label - without), rtol=1e-4, atol=1e-5)


def test_the_way_from_noise_to_image():
    model, key, labels = alive(small()), random.key(5), torch.arange(3)
    settings = {"key": key, "labels": labels, "steps": 6, "guidance_scale": 2.0}
    strip = model.denoising(3, columns=4, **settings)
    assert strip.shape == (3, 4, 1, 8, 8) and strip.dtype == torch.uint8
    assert torch.equal(strip[:, -1], model.sample(3, **settings))
    noise = random.normal(random.fold_in(random.split(key, 3), 0), (3, 1, 8, 8))
    torch.testing.assert_close(strip[:, 0], model._levels(noise))


def tokens(**settings):
    return alive(small(**{"classes": 5, "tokens": 4, **settings}))


def test_padded_tokens_are_not_seen():
    model, x, t = tokens(), torch.randn(3, 1, 8, 8), torch.tensor([5.0, 50.0, 90.0])
    short = torch.tensor([[3, 1], [0, 4], [2, 5]])  # 5 is padding
    padded = torch.nn.functional.pad(short, (0, 2), value=5)
    with torch.no_grad():
        expected = model.unet(x, t, short)
        torch.testing.assert_close(model.unet(x, t, padded), expected)
        assert not torch.allclose(model.unet(x, t, short.flip(1)), expected)  # their order counts
        nothing = model.unet(x, t, torch.full((3, 4), 5))
        assert nothing.isfinite().all() and not torch.allclose(nothing, expected)
        torch.testing.assert_close(model.unet(x, t, short[:, :0]), nothing)
    with pytest.raises(ValueError, match="or 5 for padding, got 0..6"):
        model.sample(1, labels=torch.tensor([[0, 6]]))
    with pytest.raises(ValueError, match=r"\(2, at most 4\)"):
        model.sample(2, labels=torch.zeros(2, 5, dtype=torch.int64))


def test_tokens_train_and_are_sampled():
    model, (x, _), key = tokens(), images(6), random.key(2)
    labels = torch.arange(24).view(6, 4) % 6
    model(x, labels=labels, key=key).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.unet.tokens.parameters())
    whole = model.sample(6, labels=labels, key=key, steps=3, guidance_scale=2.0)
    assert torch.equal(model.sample(6, labels=labels, key=key, steps=3, guidance_scale=2.0, batch_size=4), whole)
    assert model.sample(2, labels=torch.tensor([3, 1]), key=key, steps=2).shape == (2, 1, 8, 8)


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
    [
        ({"size": 7}, "multiple of 2"),
        ({"width": 12}, "width"),
        ({"target": "score"}, "score"),
        ({"noise_schedule": "fast"}, "fast"),
        ({"target": "flow"}, "v, eps, x0 with the schedule cosine"),
        ({"classes": 0, "tokens": 2}, "vocabulary"),
    ],
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


# ---- latent diffusion


def latent(**settings):
    torch.manual_seed(0)
    settings = {"size": 16, "width": 16, "classes": 3, "timesteps": 100, "autoencoder_width": 8, "autoencoder_steps": 6, **settings}
    return models.LatentDiffusion(models.LatentDiffusionConfig(**settings))


def large(n=12):
    x, labels = images(n)
    return (x.repeat_interleave(2, 2).repeat_interleave(2, 3).int() * 255 // 16).to(torch.uint8), labels


def test_the_latents_have_unit_variance_after_the_first_stage():
    model, (x, labels), losses = latent(kl_weight=1.0).train(), large(), []
    optimizer = torch.optim.Adam(model.objectives()["autoencoder"], 3e-3)
    genkern.reset_stats()
    for key in random.split(random.key(0), 60):
        output = model(x, labels=labels, key=key, objective="autoencoder")
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0] and all(p.grad is None for p in model.unet.parameters())
    backend = "cpu" if NATIVE else "reference"
    for op in ("reparameterize_kl", "gaussian_nll", "group_norm_act", "group_norm_act_backward"):
        assert genkern.stats().get((op, backend), 0) >= 60, op
    model.eval()
    z, _ = genkern.ops.reparameterize_kl(model.encoder(model._images(x)), key=random.key(1))
    deviation = model._scaled(z).square().mean((0, 2, 3)).sqrt()
    assert ((deviation > 0.8) & (deviation < 1.2)).all()
    before = model.latent_deviation.clone()
    model(x, labels=labels, key=random.key(2), objective="autoencoder")
    assert torch.equal(model.latent_deviation, before)  # evaluation measures nothing
    torch.testing.assert_close(model.decode(model.encode(x)).shape, x.shape)


def test_the_second_stage_leaves_the_autoencoder_alone():
    model, (x, labels) = latent(), large()
    assert [model.due("autoencoder", step) for step in (0, 5, 6)] == [True, True, False]
    assert [model.due("diffusion", step) for step in (0, 5, 6)] == [False, False, True]
    model(x, labels=labels, key=random.key(0)).loss.backward()
    assert all(p.grad is None for p in model.objectives()["autoencoder"])
    assert any(p.grad is not None for p in model.unet.parameters())
    assert set(model.averaged()) <= set(model.state_dict())


def test_latent_samples_are_images_and_the_scale_is_saved(tmp_path):
    model, labels, key = alive(latent()), large()[1], random.key(3)
    model.latent_mean.fill_(0.25)
    model.latent_deviation.fill_(2.0)
    genkern.reset_stats()
    whole = model.sample(6, labels=labels[:6], key=key, steps=3, guidance_scale=2.0)
    assert genkern.stats()["sampler_step", "cpu" if NATIVE else "reference"] == 3
    assert whole.shape == (6, 1, 16, 16) and whole.dtype == torch.uint8
    parts = model.sample(6, labels=labels[:6], key=key, steps=3, guidance_scale=2.0, batch_size=4)
    assert (parts.int() - whole.int()).abs().max() <= 1  # the decoder's sums, at the edge of two levels
    assert model.denoising(2, columns=3, labels=labels[:2], key=key, steps=3).shape == (2, 3, 1, 16, 16)
    model.save_pretrained(tmp_path)
    loaded = models.load(tmp_path)
    assert loaded.config == model.config and (loaded.latent_deviation == 2).all() and (loaded.latent_mean == 0.25).all()
    assert torch.equal(loaded.sample(6, labels=labels[:6], key=key, steps=3, guidance_scale=2.0), whole)


@pytest.mark.parametrize(
    "settings, words", [({"reduction": 3}, "power of 2"), ({"size": 20}, "multiple of 8"), ({"autoencoder_width": 4}, "of 8")]
)
def test_wrong_latent_settings_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        latent(**settings)
