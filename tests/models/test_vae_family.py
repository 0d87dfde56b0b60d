"""The relatives of the VAE: conditions, objectives, likelihoods, and what latents are walked for."""

import math

import pytest
import torch

import genkern
from genkern import core, data, models, random, train
from genkern.models import (
    IWAE,
    TCVAE,
    VAE,
    BetaVAE,
    BetaVAEConfig,
    ConditionalVAE,
    ConditionalVAEConfig,
    IWAEConfig,
    VAEConfig,
)

KINDS = (VAE, ConditionalVAE, BetaVAE, IWAE, TCVAE)
SMALL = {"levels": 16, "width": 4, "hidden": 32, "latent": 5}
KEY = random.key(3)


def small(kind=VAE, **settings):
    torch.manual_seed(0)
    return kind(kind.Config(**{**SMALL, **settings}))


def images(n=12, levels=16):
    return torch.randint(0, levels + 1, (n, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def conditions(model, n=12):
    return {"labels": torch.arange(n) % 10} if model.conditions else {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"network": "mlp", "likelihood": "gaussian"}, {"likelihood": "discretized_logistic"}])
def test_every_kind_trains_samples_and_comes_back(kind, settings, tmp_path):
    model = small(kind, **settings)
    genkern.reset_stats()
    loss = model(images(), key=KEY, **conditions(model)).loss
    loss.backward()
    assert math.isfinite(loss.item()) and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    backend = core.OPS["reparameterize_kl"].default("cpu")[0]
    nll = f"{model.config.likelihood}_nll"
    noise = "reparameterize" if kind is IWAE else "reparameterize_kl"
    assert genkern.stats()[noise, backend] and any(name == nll for name, _ in genkern.stats())
    model.eval()
    samples = model.sample(12, key=KEY, **conditions(model))
    assert samples.dtype == torch.uint8 and samples.shape == (12, 1, 8, 8) and samples.max() <= 16
    model.save_pretrained(tmp_path)
    again = models.load(tmp_path)
    assert type(again) is kind and torch.equal(again.sample(12, key=KEY, **conditions(model)), samples)
    one = {name: value[7:8] for name, value in conditions(model).items()}
    assert torch.equal(model.sample(1, key=random.split(KEY, 12)[7:8], **one), samples[7:8])


def test_importance_bound_of_one_sample_is_the_elbo():
    model, x = small(IWAE, samples=1), images()
    reference = small(VAE)
    reference.load_state_dict(model.state_dict())
    key = random.split(KEY, 1)[0]
    torch.testing.assert_close(model(x, key=KEY).loss, reference(x, key=key).loss)
    torch.testing.assert_close(reference.log_prob(x, samples=1, key=KEY).mean(), -model(x, key=KEY).loss)


def test_the_bound_grows_with_samples():
    """In expectation (Burda et al., 2016, theorem 1); here the mean over many images, at a fixed key."""
    model, x = small(VAE), images(200)
    bounds = [model.log_prob(x, samples=k, key=KEY).mean().item() for k in (1, 8, 128)]
    assert bounds[0] < bounds[1] < bounds[2]


def test_importance_weights_are_the_densities_in_float64():
    model, x = small(VAE).double(), images().double() / 8 - 1
    keys = random.split(KEY, 4)
    mu, log_var = model.encode(x)
    weights = []
    for key in keys:
        z = genkern.ops.reparameterize(mu, log_var, key=key)
        prior, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mu, (log_var / 2).exp())
        p = torch.sigmoid(model.decoder(z))
        ink = (x + 1) / 2
        log_p = (ink * p.log() + (1 - ink) * (1 - p).log()).sum((1, 2, 3))
        weights.append(log_p + prior.log_prob(z).sum(1) - posterior.log_prob(z).sum(1))
    expected = torch.stack(weights).logsumexp(0) - math.log(4)
    torch.testing.assert_close(model.log_prob(x, samples=4, key=KEY), expected)


def kept(model, x):
    """(loss, gradients, bytes that autograd keeps for the backward pass)."""
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x, key=KEY).loss
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters())), total


def test_recomputed_samples_change_no_gradient_and_keep_the_activations_of_none():
    x = images(64)
    model, thrifty = small(IWAE, samples=16), small(IWAE, samples=16, recompute=True)
    (loss, gradients, full), (again, regradients, thrift) = kept(model, x), kept(thrifty, x)
    assert torch.equal(loss, again) and all(torch.equal(a, b) for a, b in zip(gradients, regradients, strict=True))
    assert thrift < full / 5


def test_the_bound_runs_on_the_streaming_kernel():
    model, x = small(IWAE), images()
    genkern.reset_stats()
    model(x, key=KEY).loss.backward()
    model.log_prob(x, samples=3, key=KEY)
    backend = core.OPS["log_importance_weight"].default("cpu")[0]
    assert genkern.stats()["log_importance_weight", backend] == 5 + 3
    assert genkern.stats()["log_importance_weight_backward", backend] == 5


def test_the_parts_of_the_divergence_telescope():
    """They add up to log q(z|x) - log p(z), whose mean over many samples is the analytic divergence."""
    model = small(TCVAE, dataset_size=1000, index_code=2.0, beta=5.0, dimensions=3.0)
    out = model(images(), key=KEY)
    parts = out.parts
    torch.testing.assert_close(out.loss, parts["nll"] + 2 * parts["index_code"] + 5 * parts["correlation"] + 3 * parts["dimensions"])
    mu, log_var = model.encode(images())
    z = genkern.ops.reparameterize(mu, log_var, key=KEY)
    posterior, prior = torch.distributions.Normal(mu, (log_var / 2).exp()), torch.distributions.Normal(0.0, 1.0)
    expected = (posterior.log_prob(z) - prior.log_prob(z)).sum(1).mean()
    torch.testing.assert_close(parts["index_code"] + parts["correlation"] + parts["dimensions"], expected, rtol=1e-5, atol=1e-5)
    many = [model(images(), key=key).parts for key in random.split(KEY, 400)]
    total = sum(p["index_code"] + p["correlation"] + p["dimensions"] for p in many) / 400
    assert total.item() == pytest.approx(parts["kl"].item(), abs=0.15)
    assert model(images()[:1], key=KEY).loss.isfinite()


def test_capacity_grows_with_the_training_steps():
    model = small(BetaVAE, beta=3.0, capacity=8.0, capacity_steps=4)
    for step in range(6):
        out = model(images(), key=KEY)
        capacity = min(8.0, 2.0 * step)
        expected = out.parts["nll"] + 3.0 * (out.parts["kl"] - capacity).abs()
        torch.testing.assert_close(out.loss, expected)
    model.eval()
    model(images(), key=KEY)
    assert model.steps == 6
    with pytest.raises(ValueError, match="capacity"):
        BetaVAE(BetaVAEConfig(capacity=-1.0))


def test_a_label_matters_to_encoder_and_decoder():
    model, x = small(ConditionalVAE), images()
    zeros, ones = torch.zeros(12, dtype=torch.int64), torch.ones(12, dtype=torch.int64)
    assert not torch.equal(model.encode(x, labels=zeros)[0], model.encode(x, labels=ones)[0])
    assert not torch.equal(model.decode(torch.zeros(12, 5), labels=zeros), model.decode(torch.zeros(12, 5), labels=ones))
    for labels, words in ((None, "needs labels"), (zeros.float(), "integers"), (zeros[:5], "12"), (zeros + 10, r"0\.\.9, got 10")):
        with pytest.raises(ValueError, match=words):
            model(x, labels=labels)


def test_walks_through_the_latent_space():
    model, x = small(), images()
    rows = model.traverse(steps=7)
    assert rows.shape == (5, 7, 1, 8, 8) and torch.equal(rows[0, 3], rows[4, 3])  # all cross at zero
    between = model.interpolate(x[:3], x[3:6], steps=4)
    assert between.shape == (3, 4, 1, 8, 8)
    assert torch.equal(between[:, 0], model.reconstruct(x[:3])) and torch.equal(between[:, -1], model.reconstruct(x[3:6]))


def test_bits_per_dim_counts_probabilities_of_levels():
    model, x = small(likelihood="discretized_logistic"), images()
    bits = model.bits_per_dim(x, key=KEY, samples=3)
    torch.testing.assert_close(bits * 64 * math.log(2), -model.log_prob(x, key=KEY, samples=3))
    assert small().bits_per_dim(x).isnan().all()


@pytest.mark.parametrize("kind", (VAE, ConditionalVAE, TCVAE))
def test_configs_fit_the_digits_and_a_short_run_learns(kind, tmp_path):
    digits = data.load("digits")
    torch.manual_seed(0)
    model = kind(kind.config_for(digits, width=4, hidden=64))
    assert (model.config.levels, model.config.size) == (16, 8)
    history = train.fit(model, digits, tmp_path / "run", epochs=3, progress=False)
    assert history[-1]["loss"] < history[0]["loss"]


def test_refusals():
    for settings, words in (
        ({"size": 7}, "multiple of 2"),
        ({"likelihood": "poisson"}, "one of bernoulli"),
        ({"network": "rnn"}, "one of conv"),
    ):
        with pytest.raises(ValueError, match=words):
            VAE(VAEConfig(**settings))
    with pytest.raises(ValueError, match="samples"):
        IWAE(IWAEConfig(samples=0))
    with pytest.raises(TypeError, match="ConditionalVAEConfig"):
        ConditionalVAE(VAEConfig())
    assert issubclass(ConditionalVAEConfig, VAEConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_and_compile(kind):
    model, x = small(kind), images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, key=KEY, **conditions(model))
    assert out.loss.dtype == torch.float32 and out.loss.isfinite()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x, key=KEY, **conditions(model)).loss, model(x, key=KEY, **conditions(model)).loss)
