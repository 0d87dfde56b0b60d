"""Flows by the command line: train, eval, score, sample, traverse."""

import json

import numpy as np
import pytest

from genkern.cli import main, model_class
from genkern.models import IAF, MAF, NICE, Glow, NeuralSplineFlow, RealNVP

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("sklearn")


def test_names():
    names = {
        "glow": Glow,
        "nice": NICE,
        "realnvp": RealNVP,
        "real-nvp": RealNVP,
        "maf": MAF,
        "iaf": IAF,
        "neural-spline-flow": NeuralSplineFlow,
    }
    assert all(model_class(name) is kind for name, kind in names.items())


def test_glow_of_digits(tmp_path, capsys):
    run = str(tmp_path / "run")
    small = ["--epochs", "1", "--steps", "1", "--width", "8", "--classes", "10"]
    assert main(["train", "glow", "--data", "digits", "--out", run, *small]) == 0
    out = capsys.readouterr().out
    assert "per-pixel histogram 2.39" in out and "full-covariance Gaussian 2.94" in out
    assert main(["eval", run, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["loss"] > 0 > values["log_prob"] and values["bits_per_dim"] == pytest.approx(-values["log_prob"] / 64 / np.log(2))
    assert main(["score", run, "--out", str(tmp_path / "scores.npy"), "--lowest", "3"]) == 0
    printed, scores = capsys.readouterr().out, np.load(tmp_path / "scores.npy")
    assert scores.shape == (180,) and scores.mean() == pytest.approx(values["log_prob"], rel=1e-5)  # the same noise
    assert str(scores.argmin()) in printed and "class" in printed
    grid = str(tmp_path / "grid.png")
    assert main(["sample", run, "--n", "4", "--temperature", "0.7", "--label", "3", "--out", grid]) == 0
    assert main(["traverse", run, "--out", grid, "--steps", "3"]) == 0


def test_a_plane_of_points(tmp_path, capsys):
    points = np.random.default_rng(0).normal(size=(400, 2)).astype(np.float32) * [1.0, 0.2]
    np.save(tmp_path / "points.npy", points.astype(np.float32))
    run = str(tmp_path / "run")
    assert main(["train", "maf", "--data", str(tmp_path / "points.npy"), "--out", run, "--epochs", "2", "--hidden", "16"]) == 0
    assert "full-covariance Gaussian" in capsys.readouterr().out
    with Image.open(tmp_path / "run" / "density.png") as picture:
        assert picture.size[0] > 100
    assert main(["score", run, "--split", "all", "--out", str(tmp_path / "scores.npy")]) == 0
    assert np.load(tmp_path / "scores.npy").shape == (400,)
    assert main(["sample", run, "--out", str(tmp_path / "points.png")]) == 0  # the density and the samples
    with Image.open(tmp_path / "points.png") as picture:
        assert picture.size[0] > 100
    with pytest.raises(SystemExit):
        main(["traverse", run])
    assert "not of images" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["score", run, "--out", str(tmp_path / "scores.txt")])
    assert "must end in .npy" in capsys.readouterr().err
