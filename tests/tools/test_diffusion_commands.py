"""genkern train and sample with diffusion models."""

import json

import numpy as np
import pytest
import torch

import genkern
from genkern import data
from genkern.cli import main

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")
SMALL = ["--width", "8", "--heads", "1", "--timesteps", "50", "--batch-size", "256"]


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ddpm"
    assert main(["train", "ddpm", "--data", "digits", "--out", str(folder), "--epochs", "1", *SMALL]) == 0
    return folder


def test_train_writes_a_strip(run):
    with Image.open(run / "strip.png") as strip:
        assert strip.size == (9 * 9 * 4, 8 * 9 * 4)


def test_the_model_says_which_options_sample_has(run, tmp_path, capsys):
    draw = lambda name, *options: main(["sample", str(run), "--n", "4", "--out", str(tmp_path / name), *options]) == 0
    assert draw("a.npy", "--sampler", "dpmpp_2m", "--steps", "4", "--guidance-scale", "4", "--label", "3")
    model = genkern.load(run)
    labels, key = torch.full((4,), 3), genkern.random.key(0)
    expected = model.sample(4, labels=labels, key=key, sampler="dpmpp_2m", steps=4, guidance_scale=4.0)
    assert (np.load(tmp_path / "a.npy") == expected.numpy()).all()
    assert draw("b.npy", "--sampler", "ddim", "--steps", "4", "--eta", "1")
    assert draw("strip.png", "--steps", "4", "--strip")
    with Image.open(tmp_path / "strip.png") as strip:
        assert strip.size == (9 * 9 * 4, 4 * 9 * 4)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(["sample", str(run), "--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0 and "--guidance-scale X" in out and "(default: dpmpp_2m)" in out and "--batch-size" not in out


def test_mistakes_in_the_options(run, tmp_path, capsys):
    out = ["--out", tmp_path / "x.png"]
    assert "did you mean 'dpmpp_2m'" in refused(capsys, "sample", run, *out, "--sampler", "dpmpp2m")
    assert "takes no eta" in refused(capsys, "sample", run, *out, "--eta", "1")
    assert "invalid int value" in refused(capsys, "sample", run, *out, "--steps", "many")
    assert "--bananas" in refused(capsys, "sample", run, *out, "--bananas", "1")
    assert "at most 1, got 2" in refused(capsys, "sample", run, *out, "--label", "3,1")
    assert "must be a number" in refused(capsys, "sample", run, *out, "--label", "three")
    assert not list(tmp_path.iterdir())


def test_digits32_are_digits_composed():
    source = data.load("digits32")
    x, labels = source.validation
    assert (source.shape, source.levels, source.classes) == ((1, 32, 32), 255, 10)
    assert x.shape == (400, 1, 32, 32) and x.dtype == torch.uint8 and labels.shape == (400, 4)
    quarters = x.view(400, 2, 16, 2, 16).permute(0, 1, 3, 2, 4).reshape(400, 4, 16, 16)
    assert torch.equal(quarters.flatten(2).any(2), labels != 10)
    assert set((labels != 10).sum(1).tolist()) == {1, 2, 3, 4}
    assert (labels[:, :-1] == 10).logical_and(labels[:, 1:] != 10).sum() == 0  # padding is at the end


def test_latent_diffusion_in_two_stages_resumes_to_the_same_weights(tmp_path, capsys):
    """Two steps per epoch: the first epoch and a half train the autoencoder."""
    source = data.load("digits32")
    np.save(tmp_path / "x.npy", source.train[0][:80, 0].numpy())
    options = [
        "--data",
        str(tmp_path / "x.npy"),
        *SMALL[:-2],
        "--batch-size",
        "32",
        "--autoencoder-width",
        "8",
        "--autoencoder-steps",
        "3",
    ]
    train = lambda name, epochs, *more: main(
        ["train", "latent-diffusion", "--out", str(tmp_path / name), "--epochs", epochs, *options, *more]
    )
    assert train("whole", "3") == train("parts", "1") == 0
    assert not (tmp_path / "parts" / "config.json").exists()  # no weights are the best in the first stage
    assert train("parts", "3", "--resume") == 0
    whole, parts = (genkern.load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(x, parts[name]) for name, x in whole.items()) and whole["latent_deviation"].gt(0).all()
    history = json.loads((tmp_path / "whole" / "history.json").read_text())
    assert (
        history[0]["loss"] is None and "nll" in history[0] and history[1]["diffusion"] == history[1]["loss"] and "nll" not in history[2]
    )
    assert {"samples.png", "strip.png", "curves.png"} <= {p.name for p in (tmp_path / "whole").iterdir()}
    capsys.readouterr()
    assert "knows no labels" in refused(capsys, "sample", tmp_path / "whole", "--label", "3", "--out", tmp_path / "x.png")


def test_a_sequence_of_tokens_by_the_command_line(tmp_path):
    torch.manual_seed(0)
    kind = genkern.models.LatentDiffusion
    config = kind.config_for(data.load("digits32"), width=8, heads=1, timesteps=50, autoencoder_width=8)
    assert (config.tokens, config.classes, config.size) == (4, 10, 32)
    kind(config).save_pretrained(tmp_path / "run")
    assert (
        main(["sample", str(tmp_path / "run"), "--n", "2", "--steps", "2", "--label", "3,1,4", "--out", str(tmp_path / "x.png")]) == 0
    )
    assert main(["sample", str(tmp_path / "run"), "--n", "2", "--steps", "2", "--strip", "--out", str(tmp_path / "s.png")]) == 0
