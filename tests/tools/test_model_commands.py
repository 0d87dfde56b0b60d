"""genkern train, sample, eval and traverse, as a newcomer meets them."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from toys import ToyImages

import genkern
from genkern import cli
from genkern.cli import main
from genkern.models._base import MODELS, Training

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", "toy-images", "--data", "digits", "--out", str(folder), "--epochs", "3", "--scale", "0.6"]) == 0
    return folder


def test_train_writes_what_it_says(run):
    assert {"curves.png", "samples.png", *genkern.train.FILES} == {p.name for p in run.iterdir()}
    for name in ("curves.png", "samples.png"):
        with Image.open(run / name) as picture:
            assert picture.size[0] > 100
    model = genkern.load(run)
    assert model.config == ToyImages.Config(size=8, levels=16, classes=10, scale=0.6)
    facts = json.loads((run / "run.json").read_text())
    assert facts["data"] == "digits" and facts["training"]["epochs"] == 3 and facts["training"]["batch_size"] == 200
    history = json.loads((run / "history.json").read_text())
    assert history[-1]["validation_loss"] < history[0]["validation_loss"]


def test_resume_goes_on(run, tmp_path, capsys):
    short, options = tmp_path / "short", ["--data", "digits", "--scale", "0.6"]
    main(["train", "toyimages", *options, "--out", str(short), "--epochs", "1", "--resume"])
    assert "nothing to resume" in capsys.readouterr().err
    main(["train", "toy-images", *options, "--out", str(short), "--epochs", "3", "--resume"])
    assert torch.equal(genkern.load(short).mean, genkern.load(run).mean)
    assert max(map(len, capsys.readouterr().out.splitlines()[1:3])) <= 80
    assert "resume it" in refused(capsys, "train", "toy-images", *options, "--out", short)
    assert "begun with learning_rate 0.05, got 1.0" in refused(
        capsys, "train", "toy-images", *options, "--out", short, "--resume", "--learning-rate", "1"
    )
    whole = (short / "last.safetensors").read_bytes()
    (short / "last.safetensors").write_bytes(whole[:-1])
    assert "last.safetensors cannot be used" in refused(capsys, "train", "toy-images", *options, "--out", short, "--resume")


def test_sample_by_label_and_seed(run, tmp_path):
    numbers = {}
    for name, options in {"a": ["--label", "3"], "b": ["--label", "3"], "c": ["--label", "4"], "d": ["--seed", "1"]}.items():
        assert main(["sample", str(run), "--n", "5", "--out", str(tmp_path / f"{name}.npy"), *options]) == 0
        numbers[name] = np.load(tmp_path / f"{name}.npy")
    assert numbers["a"].shape == (5, 1, 8, 8) and numbers["a"].dtype == np.uint8
    assert (
        (numbers["a"] == numbers["b"]).all() and not (numbers["a"] == numbers["c"]).all() and not (numbers["a"] == numbers["d"]).all()
    )
    assert main(["sample", str(run), "--n", "5", "--out", str(tmp_path / "grid.png")]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == "L" and grid.size == (3 * 9 * 4, 2 * 9 * 4)


def test_eval_and_traverse(run, tmp_path, capsys):
    assert main(["eval", str(run), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["n"] == 180 and values["loss"] == pytest.approx(-values["log_prob"])
    assert main(["eval", str(run), "--split", "validation"]) == 0
    assert "validation of digits" in capsys.readouterr().out
    assert main(["eval", str(run), "--by-class", "--json"]) == 0
    classes = json.loads(capsys.readouterr().out)["classes"]
    assert list(classes) == list("0123456789")
    counts = genkern.data.load("digits").test[1].bincount()
    mean = sum(int(n) * c["log_prob"] for n, c in zip(counts, classes.values(), strict=True)) / 180
    assert mean == pytest.approx(values["log_prob"], rel=1e-5)
    assert main(["traverse", str(run), "--out", str(tmp_path / "t.png"), "--steps", "4"]) == 0
    with Image.open(tmp_path / "t.png") as grid:
        assert grid.size == (4 * 5 * 8, 2 * 5 * 8)


def test_the_vae_by_the_command_line(tmp_path, capsys):
    assert (
        main(["train", "vae", "--data", "digits", "--out", str(tmp_path / "run"), "--epochs", "1", "--latent", "3", "--beta", "0.5"])
        == 0
    )
    model = genkern.load(tmp_path / "run")
    assert (model.config.latent, model.config.beta, model.config.levels) == (3, 0.5, 16)
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["loss"] == pytest.approx(values["nll"] + 0.5 * values["kl"]) and values["log_prob"] < 0
    assert main(["sample", str(tmp_path / "run"), "--n", "4", "--out", str(tmp_path / "grid.png")]) == 0
    assert main(["traverse", str(tmp_path / "run"), "--out", str(tmp_path / "t.png"), "--steps", "4"]) == 0
    with Image.open(tmp_path / "t.png") as grid:
        assert grid.size[0] * 3 == grid.size[1] * 4  # a row for each of the three directions


def test_a_text_by_the_command_line(tmp_path, capsys):
    (tmp_path / "book.txt").write_text("the cat sat on the mat. " * 100)
    run = str(tmp_path / "run")
    settings = ["--epochs", "1", "--width", "8", "--layers", "1", "--window", "16", "--batch-size", "16"]
    assert main(["train", "char-lstm", "--data", str(tmp_path / "book.txt"), "--out", run, *settings]) == 0
    assert main(["sample", run, "--n", "2", "--out", str(tmp_path / "text.txt")]) == 0
    assert len((tmp_path / "text.txt").read_bytes()) == 2 * 64 + 3
    capsys.readouterr()
    assert main(["eval", run, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["bits_per_dim"] < 9


def test_commands_that_a_model_cannot_serve(run, tmp_path, capsys):
    assert "no text" in refused(capsys, "sample", run, "--out", tmp_path / "t.txt")
    assert "needs a text" in refused(capsys, "train", "gpt", "--data", "digits", "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_without_the_extras_the_training_stays(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["train", "toy-images", "--data", "digits", "--out", str(tmp_path / "run"), "--epochs", "1"]) == 0
    assert 'no pictures: curves: needs matplotlib, of the extra "models"' in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_help_and_a_missing_name(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["train", "--help"])
    assert caught.value.code == 0 and "toy-images" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        main(["train", "toy-images", "--help"])
    assert caught.value.code == 0 and "--learning-rate X" in (out := capsys.readouterr().out) and "--scale X" in out
    with pytest.raises(SystemExit):
        main(["train", "beta-vae", "--help"])
    assert "(default: 4.0) weight of the divergence" in capsys.readouterr().out  # the comment behind the field, here of VAE's
    assert "required: name" in refused(capsys, "train")
    assert "the name of the model comes first" in refused(capsys, "train", "--data", "digits")


def test_mistakes_get_one_line_and_write_nothing(run, tmp_path, capsys):
    out = tmp_path / "new"
    assert "did you mean 'toy-images'?" in refused(capsys, "train", "toy-imges", "--data", "digits", "--out", out)
    assert "did you mean 'cvae'?" in refused(capsys, "train", "cva", "--data", "digits", "--out", out)
    assert "did you mean 'digits'?" in refused(capsys, "train", "toy-images", "--data", "digit", "--out", out)
    assert "invalid int value: 'x'" in refused(capsys, "train", "toy-images", "--data", "digits", "--out", out, "--epochs", "x")
    assert "--bananas" in refused(capsys, "train", "toy-images", "--data", "digits", "--out", out, "--bananas", "3")
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(capsys, "train", "toy-images", "--data", "digits", "--out", tmp_path / "file")
    np.save(tmp_path / "x.npy", np.zeros((10, 8, 8), np.uint8))
    assert "needs labels, and" in refused(capsys, "train", "toy-images", "--data", tmp_path / "x.npy", "--out", out)
    assert "there is no folder" in refused(capsys, "sample", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(capsys, "eval", tmp_path / "empty")
    assert "0..9, got 10" in refused(capsys, "sample", run, "--label", "10", "--out", tmp_path / "x.png")
    assert "no folder" in refused(capsys, "sample", run, "--out", tmp_path / "no" / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "file", "x.npy"]
    assert len(refused(capsys, "sample", run, "--n", "0").splitlines()) == 1


def test_devices_that_are_not_there_and_damaged_runs(run, tmp_path, capsys):
    train = ["train", "toy-images", "--data", "digits", "--out", tmp_path / "new"]
    for name in ("nonsense", "cuda:99"):
        assert f"--device {name} cannot be used" in refused(capsys, *train, "--device", name)
        assert f"--device {name} cannot be used" in refused(capsys, "eval", run, "--device", name)
    shutil.copytree(run, tmp_path / "run")
    for text in ("not json", "[1]", '{"data": 3}'):
        (tmp_path / "run" / "run.json").write_text(text)
        assert "run.json cannot be used" in refused(capsys, "eval", tmp_path / "run")
    shutil.copy(run / "run.json", tmp_path / "run")
    facts = json.loads((run / "config.json").read_text())
    facts["config"]["size"] = 10**8  # more memory than there is
    (tmp_path / "run" / "config.json").write_text(json.dumps(facts))
    assert "config.json cannot be used" in refused(capsys, "sample", tmp_path / "run")


def test_names_follow_one_rule():
    kinds = {"BetaVAE": "beta-vae", "VQVAE": "vqvae", "RealNVP": "real-nvp", "DDPM": "ddpm", "VAE": "vae", "ToyImages": "toy-images"}
    assert {name: cli._kebab(name) for name in kinds} == kinds
    assert cli.model_class("vae") is genkern.models.VAE and cli.model_class("timages") is ToyImages
    names = [name for name, kind in MODELS.items() if hasattr(kind, "Config")]
    assert len(cli.model_names()) == len(names)


def test_every_setting_of_every_model_is_one_option():
    own = {"name", "data", "window", "out", "resume", "seed", "save_every", "device"}
    training = {field.name for field in dataclasses.fields(Training)}
    for kind in cli.model_names().values():
        fields = {field.name for field in dataclasses.fields(kind.Config)}
        assert not fields & (training | own), (kind, fields & (training | own))


def test_options_read_their_types(capsys):
    for hint, text, value in (
        (float | None, "none", None),
        (float | None, "0.5", 0.5),
        (bool, "no", False),
        (tuple[int, ...], "1,2,2", (1, 2, 2)),
        (tuple, "1.5", (1.5,)),
        (str, "cosine", "cosine"),
    ):
        assert cli._reader(hint)(text) == value
    with pytest.raises(ValueError):
        cli._reader(bool)("perhaps")
