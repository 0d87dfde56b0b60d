"""Mistakes at the command line are one line in words, and found before the work is done."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import genkern
from genkern import checkpoint
from genkern.cli import main
from genkern.models import VAE, VAEConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    VAE(VAEConfig(levels=16, width=4, hidden=16, latent=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train vae --data digits --out RUN/x --epoch 3", "did you mean --epochs?"),
        ("train vae --data digits --out RUN/x --epochs 0", "epochs must be an int of at least 1, got 0"),
        ("train vae --data digits --out RUN/x --schedule cos", "schedule must be one of 'constant', 'cosine'"),
        ("train vae --data digits --out RUN/x --learning-rate -1", "learning_rate must be at least 0"),
        ("train --data digits vae --out RUN/x", "the name of the model comes first, before --data"),
        ("train vae --data digits --out RUN/x --save-every 0", "must be at least 1"),
        ("train vae --data digits --out RUN/x --device cudda", "--device cudda cannot be used here"),
        ("sample RUN --device gpu", "--device gpu cannot be used here"),
        ("sample RUN --labels 3", "did you mean --label?"),
        ("sample RUN --out RUN/x.wav", "a VAE are no sound"),
        ("sample RUN --out RUN/x.jpg", "must end in .png or .npy"),
        ("score RUN --out RUN/nowhere/x.npy", "no folder"),
        ("score RUN --batch-size 0", "must be at least 1"),
        ("score RUN --lowest -1", "must be at least 0"),
        ("traverse RUN --steps 0", "must be at least 1"),
        ("traverse RUN --out RUN/x.txt", "must end in .png"),
        ("verify --device tpu", "invalid choice: 'tpu'"),
        ("bench gaussian_kl --shape 4xq", "such as 256x4096, got 4xq"),
        ("bench gaussian_kl --rounds 1", "--rounds 2"),
        ("bench gausian_kl", "did you mean 'gaussian_kl'?"),
        ("bench plot RUN/config.json RUN/x.png", "config.json is no result of genkern bench --json"),
        ("info --jsn", "did you mean --json?"),
        ("bench compare RUN/nothing.json RUN/nothing.json", "No such file"),
    ],
)
def test_words(run, command, words, capsys, monkeypatch):
    monkeypatch.setattr(VAE, "forward", None)  # nothing is trained
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        main([part.replace("RUN", str(run)) for part in command.split()])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err and sorted(run.rglob("*")) == before


def test_interrupted(tmp_path):
    pytest.importorskip("sklearn")
    small = ["--width", "4", "--hidden", "16", "--save-every", "3", "--epochs", "1000"]  # by itself it would not end in time
    command = [sys.executable, "-m", "genkern", "train", "vae", "--data", "digits", *small, "--out", tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(Path(genkern.__file__).parent.parent)}
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and so their children, ignore it
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes)
    while not (tmp_path / "last.safetensors").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    words = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and words.endswith("genkern train: interrupted\n")
    assert checkpoint.load(tmp_path / "last.safetensors")[1]["epoch"] >= 0
