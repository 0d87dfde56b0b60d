import json
import math

import pytest
import torch

import genkern
from genkern import core, models
from genkern.models import VAE, VAEConfig


def small(**settings):
    torch.manual_seed(0)
    return VAE(VAEConfig(**{"levels": 16, "width": 4, "hidden": 32, "latent": 5, **settings}))


def images(n=12, levels=16):
    return torch.randint(0, levels + 1, (n, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_loss_is_the_formula_in_float64():
    model, x, key = small(beta=0.7), images(), genkern.random.key(3)
    out = model(x, key=key)

    exact = small(beta=0.7).double()
    p = x.double() / 16
    mu, log_var = exact.encoder(2 * p - 1).chunk(2, 1)
    eps = genkern.random.normal(key, mu.shape).double()
    probability = torch.sigmoid(exact.decoder(mu + (log_var / 2).exp() * eps))
    nll = -(p * probability.log() + (1 - p) * (1 - probability).log()).sum((1, 2, 3)).mean()
    kl = 0.5 * (mu**2 + log_var.exp() - 1 - log_var).sum(1).mean()
    torch.testing.assert_close(out.parts["nll"].double(), nll.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.parts["kl"].double(), kl.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.loss.double(), nll + 0.7 * kl, rtol=1e-6, atol=0)
    wanted = torch.autograd.grad(nll + 0.7 * kl, list(exact.parameters()))
    for got, want in zip(torch.autograd.grad(out.loss, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-6)


def test_float_images_give_the_loss_of_the_same_uint8_images():
    model, x, key = small(), images(), genkern.random.key(3)
    torch.testing.assert_close(model(x / 8.0 - 1, key=key).loss, model(x, key=key).loss)


def test_a_key_is_the_noise_and_the_default_generator_the_default():
    model, x, key = small(), images(), genkern.random.key(3)
    assert model(x, key=key).loss == model(x, key=key).loss
    torch.manual_seed(4)
    first, second = model(x).loss, model(x).loss
    torch.manual_seed(4)
    assert model(x).loss == first != second


def test_a_sample_does_not_depend_on_its_batch():
    model, key = small(), genkern.random.key(5)
    whole = model.sample(50, key=key)
    assert whole.dtype == torch.uint8 and whole.shape == (50, 1, 8, 8) and whole.max() <= 16
    for n, batch_size in ((50, 1), (50, 7), (20, 256)):
        assert torch.equal(model.sample(n, key=key, batch_size=batch_size), whole[:n])
    keys = genkern.random.split(key, 50)
    assert torch.equal(model._prior(keys)[13:20], model._prior(keys[13:20]))
    assert model.sample(0, key=key).shape == (0, 1, 8, 8)


def test_encode_and_decode():
    model, x = small(), images()
    mu, log_var = model.encode(x)
    assert mu.shape == log_var.shape == (12, 5)
    decoded = model.decode(mu)
    assert decoded.shape == x.shape and decoded.abs().max() <= 1
    model(decoded)  # in the domain that forward takes


def test_log_prob_is_the_integral_over_the_latent():
    model, x = small(latent=1), images(3)
    grid = torch.linspace(-8, 8, 4001).unsqueeze(1)
    nll = torch.stack([model._nll(x[i : i + 1].expand(4001, 1, 8, 8) / 8 - 1, grid) for i in range(3)], 1)
    log_joint = -nll - 0.5 * (grid**2 + math.log(2 * math.pi))
    exact = log_joint.double().logsumexp(0) + math.log(16 / 4000)
    got = model.log_prob(x, samples=2000, key=genkern.random.key(1))
    assert got.shape == (3,)
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda x: x + 1, ValueError, r"\[0, 16\], found \[1, 17\]"),
        (lambda x: x.float(), ValueError, r"\[-1, 1\], found \[0, 16\]"),
        (lambda x: x.float() / 16 + math.nan, ValueError, "nan"),
        (lambda x: x.long(), TypeError, "int64"),
        (lambda x: x[0], ValueError, r"\(1, 8, 8\)"),
        (lambda x: x[..., :7], ValueError, r"\(N, 1, 8, 8\)"),
        (lambda x: x.tolist(), TypeError, "list"),
    ],
)
def test_wrong_images_are_refused_in_words(change, error, words):
    x = images()
    x[0], x[1] = 0, 16
    with pytest.raises(error, match=words):
        small()(change(x))


def test_save_and_load(tmp_path):
    model, x, key = small(), images(), genkern.random.key(3)
    model.save_pretrained(tmp_path / "vae")
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == ["config.json", "model.safetensors"]
    for loaded in (VAE.from_pretrained(tmp_path / "vae"), models.load(tmp_path / "vae")):
        assert loaded.config == model.config and not loaded.training
        assert loaded(x, key=key).loss == model(x, key=key).loss


def test_loading_something_else_is_refused_in_words(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json"):
        VAE.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "class": "Flow"}))
    with pytest.raises(ValueError, match="holds a Flow"):
        VAE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="none of .*VAE"):
        models.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "config": {"depth": 3}}))
    with pytest.raises(ValueError, match="unknown settings depth"):
        VAE.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    model = small()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full"):
        small(hidden=8).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_training_lowers_the_loss_on_native_kernels():
    model, x = small(), images(64) // 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    genkern.reset_stats()
    losses = []
    for key in genkern.random.split(genkern.random.key(0), 30):
        loss = model(x, key=key).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 5
    backend = "cpu" if core.OPS["reparameterize_kl"].available("cpu")["cpu"] is None else "reference"
    assert genkern.stats()["reparameterize_kl", backend] == 30
    if backend == "cpu":
        assert genkern.stats()["reparameterize_kl_backward", "cpu"] == 30
        genkern.reset_stats()
        model.sample(3, key=genkern.random.key(1))
        assert genkern.stats()["random_normal", "cpu"] == 1


def test_compiles_in_one_graph():
    model, x, key = small(), images(), genkern.random.key(3)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, key=key).loss, model(x, key=key).loss)


def test_digits_are_counted_levels_in_fixed_splits():
    pytest.importorskip("sklearn")
    from genkern.data import digits

    x, labels = digits()
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.uint8 and int(x.max()) == 16 and labels.shape == (1797,)
    parts = [digits(split)[0] for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [1437, 180, 180]
    assert torch.equal(torch.cat(parts).flatten(1).long().sum(1).sort()[0], x.flatten(1).long().sum(1).sort()[0])
    assert parts[2].long().sum() == SUM_OF_TEST
    with pytest.raises(ValueError, match="'train', 'validation', 'test', got 'dev'"):
        digits("dev")


def test_digits_without_scikit_learn_names_the_extra(monkeypatch):
    from genkern.data import digits

    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"genkern\[models\]"):
        digits()


SUM_OF_TEST = 56789  # the split is a contract: a change of the order would show here
