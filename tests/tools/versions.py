"""Load what other torch versions saved into FOLDER, and save the same for them: python versions.py FOLDER NAME (tools/check_abi.sh).

A model, with what it gave; and a run that training goes on from.
"""

import shutil
import sys
import tempfile
from pathlib import Path

import safetensors.torch
import torch
import toys

import genkern
from genkern.models import VAE, VAEConfig
from genkern.train import fit

KEY = genkern.random.key(3)
SETTINGS = {"ema": 0.9, "save_every": 2, "progress": False}


def given(model):
    images = torch.arange(2 * 64, dtype=torch.uint8).reshape(2, 1, 8, 8) % 17
    return {"log_prob": model.log_prob(images, key=KEY, samples=3), "sample": model.sample(4, key=KEY)}


def main(folder, name):
    torch.set_num_threads(1)
    for other in sorted(p for p in folder.iterdir() if p.name != name):
        expected = safetensors.torch.load_file(other / "given.safetensors")
        got = given(genkern.models.load(other / "model"))
        torch.testing.assert_close(got["log_prob"], expected["log_prob"])
        assert (got["sample"].int() - expected["sample"].int()).abs().max() <= 1  # a pixel on the edge of two levels
        model = toys.ToyDenoiser(toys.ToyConfig())
        with tempfile.TemporaryDirectory() as run:  # a copy, so that every version goes on from the same place
            shutil.copytree(other / "run", run, dirs_exist_ok=True)
            fit(model, toys.points(), run, resume=True, epochs=3, **SETTINGS)
        finished = safetensors.torch.load_file(other / "finished.safetensors")
        torch.testing.assert_close(dict(model.state_dict()), finished, rtol=1e-4, atol=1e-6)
        print(f"torch {torch.__version__}: loads and goes on from what {other.name} saved")
    if (folder / name).exists():  # the second time round, to load what newer versions saved
        return
    torch.manual_seed(0)
    model = VAE(VAEConfig(levels=16, width=4, hidden=32, latent=5)).eval()
    model.save_pretrained(folder / name / "model")
    safetensors.torch.save_file(given(model), folder / name / "given.safetensors")
    for epochs, run in ((3, "whole"), (1, "run")):
        torch.manual_seed(0)
        model = toys.ToyDenoiser(toys.ToyConfig())
        fit(model, toys.points(), folder / name / run, epochs=epochs, **SETTINGS)
        if epochs == 3:
            safetensors.torch.save_file(dict(model.state_dict()), folder / name / "finished.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
