"""Several processes train and sample as one does."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import toys  # noqa: F401  (its models are names of the command)

import genkern
from genkern.cli import main

HERE = Path(__file__).parent
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launched(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(Path(genkern.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_and_sample_as_one(tmp_path):
    launched("-m", *TORCHRUN, HERE / "ranks.py", tmp_path)
    launched(HERE / "ranks.py", tmp_path)
    one, first, second = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert one.keys() == first.keys() == second.keys() and "ToyAdversary/gradient/1" in one
    assert any(name.startswith("accelerate/") for name in one) == bool(importlib.util.find_spec("accelerate"))
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
        torch.testing.assert_close(x, one[name], rtol=1e-4, atol=1e-5, msg=lambda words, name=name: f"{name}: {words}")
    assert (tmp_path / "ToyDenoiser 2" / "model.safetensors").exists()


def test_the_command_under_torchrun(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("PIL")
    (tmp_path / "command.py").write_text("import sys, toys\nfrom genkern.cli import main\nsys.exit(main())")
    (tmp_path / "toys.py").write_text((HERE / "toys.py").read_text())
    options = ["train", "toy-images", "--data", "digits", "--epochs", "2", "--device", "cpu"]
    out = launched("-m", *TORCHRUN, tmp_path / "command.py", *options, "--out", tmp_path / "two")
    assert "on cpu x 2" in out and out.count("wrote") == 1
    assert main([*options, "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    assert [row["loss"] for row in two] == pytest.approx([row["loss"] for row in one], rel=1e-5)
