import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toys import ToyAdversary, ToyConfig, ToyDenoiser, ToyDropout, points, toy

import genkern
from genkern import checkpoint
from genkern.train import fit


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def untimed(history):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def test_training_lowers_the_loss_and_keeps_the_best(tmp_path, capsys):
    model = toy()
    state = torch.get_rng_state()
    history = fit(model, points(), tmp_path, epochs=5)
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5] and history[-1]["loss"] < history[0]["loss"]
    assert {"size", "validation_loss", "validation_size", "seconds"} <= history[0].keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(genkern.train.FILES)
    assert json.loads((tmp_path / "history.json").read_text()) == history
    best = min(row["validation_loss"] for row in history)
    found = genkern.load(tmp_path).evaluate(*points().validation, key=genkern.random.split(genkern.random.key(0), 3)[2])
    assert found["loss"] == best
    assert capsys.readouterr().err.count("validation loss") == 5


@pytest.mark.parametrize(
    "kind, settings",
    [
        (ToyDenoiser, {"ema": 0.9, "clip_grad_norm": 0.1, "warmup": 3, "schedule": "cosine"}),
        (ToyDropout, {"precision": "bfloat16"}),
        (ToyAdversary, {"ema": 0.5}),
    ],
)
def test_an_interrupted_run_ends_as_an_unbroken_one(tmp_path, kind, settings, monkeypatch):
    whole, broken = toy(kind), toy(kind)
    wanted = fit(whole, points(), tmp_path / "whole", epochs=3, progress=False, **settings)

    class Enough(Exception):
        pass

    for stop in (3, 1, 4):  # checkpoints later
        saves, save = [], checkpoint.save

        def counted(*args, saves=saves, save=save, stop=stop):
            save(*args)
            saves.append(1)
            if len(saves) == stop:
                raise Enough

        monkeypatch.setattr(checkpoint, "save", counted)
        torch.manual_seed(time.time_ns() % 1000)  # another start, other global numbers: neither matters
        broken = kind(ToyConfig()) if (tmp_path / "broken").exists() else toy(kind)
        with pytest.raises(Enough):
            fit(broken, points(), tmp_path / "broken", resume=True, save_every=2, epochs=3, progress=False, **settings)
        monkeypatch.setattr(checkpoint, "save", save)
    broken = kind(ToyConfig())
    got = fit(broken, points(), tmp_path / "broken", resume=True, save_every=2, epochs=3, progress=False, **settings)
    assert same(broken.state_dict(), whole.state_dict())
    assert untimed(got) == untimed(wanted)
    for name in ("model.safetensors", "last.safetensors"):
        a, b = (safetensors.torch.load_file(tmp_path / run / name) for run in ("whole", "broken"))
        assert same(a, b), name


def test_a_run_killed_at_random_moments_ends_with_the_same_weights(tmp_path):
    """SIGKILL gives no chance to tidy up: it comes between two files and in the middle of a write too."""
    environment = {**os.environ, "PYTHONPATH": str(Path(genkern.__file__).parent.parent)}
    moment = str(time.time_ns() % 2**32)
    command = [sys.executable, Path(__file__).parent / "killed.py", tmp_path, moment]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (moment, done.stdout, done.stderr)
    whole, broken = (safetensors.torch.load_file(tmp_path / run / "last.safetensors") for run in ("whole", "broken"))
    assert same(whole, broken)
    assert same(*(safetensors.torch.load_file(tmp_path / run / "model.safetensors") for run in ("whole", "broken")))
    assert untimed(json.loads((tmp_path / "whole" / "history.json").read_text())) == untimed(
        json.loads((tmp_path / "broken" / "history.json").read_text())
    )
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == sorted(genkern.train.FILES)  # nothing half-written stays
