import importlib.util
import json
from pathlib import Path

import pytest

from genkern import cli

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def gallery(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gallery", BENCH / "gallery.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    return module


def test_every_model_has_its_part(gallery):
    here = {name for name, kind in cli.model_names().items() if kind.__module__.startswith("genkern.models.")}
    assert set(gallery.PARTS) == here


def test_a_part_runs_alone_and_the_page_shows_it(gallery, tmp_path, monkeypatch):
    monkeypatch.setitem(gallery.PARTS, "vae", ("digits", {"epochs": 1, "latent": 2}))
    assert gallery.main(["vae"]) == 0
    facts = json.loads((tmp_path / "vae.json").read_text())
    assert facts["epochs"] == 1 and facts["held_out"]["loss"] > 0 and len(facts["judged"]["shares"]) == 10
    page = (tmp_path / "README.md").read_text()
    assert "**VAE**" in page and "--latent 2" in page and "BetaVAE" not in page
    from PIL import Image

    assert min(Image.open(tmp_path / "vae.png").size) >= 64
    assert (tmp_path / "all.png").exists()


def test_a_typo_and_a_failure(gallery, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        gallery.main(["beta-vea"])
    assert "did you mean 'beta-vae'" in capsys.readouterr().err
    monkeypatch.setitem(gallery.PARTS, "vae", ("digits", {"epochs": 1, "latent": 0}))
    assert gallery.main(["vae"]) == "failed: vae"
