"""What README, docs and the modules' own words print as code runs as printed."""

import importlib
import json
import re
import textwrap
import wave
from pathlib import Path

import numpy as np
import pytest
import torch

import genkern
import genkern.data
from genkern.cli import COMMANDS
from genkern.testing.bench import table

ROOT = Path(genkern.__file__).parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="needs a checkout")


def indented(text):
    """Paragraphs and their neighbours that stand four columns in."""
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text + "\n", re.MULTILINE)
    return [block for block in map(textwrap.dedent, blocks) if block.strip()]


def network(x, t, context=None):
    return 0.1 * x


def test_the_readme():
    pytest.importorskip("diffusers")
    namespace = {"model": network, "pipe": torch.nn.Identity()}  # what the reader brings
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
        exec(block, namespace)
    assert namespace["x"].shape == (8, 3, 32, 32) and namespace["mu"].grad is not None


def test_the_commands_of_the_readme_exist():
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    found = set(re.findall(r"(?:^|`)(?:python -m )?genkern ([a-z]+)", text, re.MULTILINE))
    assert {"train", "sample", "bench", "verify", "info"} <= found <= set(COMMANDS)


def test_the_tables_of_figures_are_those_of_the_runs():
    """`genkern bench table RUN.json > RUN.md`; the README shows some of its lines."""
    results = ROOT / "bench" / "results"
    for run in ("cpu_avx512", "cpu_avx2"):
        lines = table(json.loads((results / f"{run}.json").read_text())["results"])
        assert (results / f"{run}.md").read_text().splitlines() == lines
        if run == "cpu_avx512":
            shown = re.findall(r"^\| `.* \| \d+ \| .*x .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
            assert len(shown) > 10 and set(shown) <= set(lines)


@pytest.mark.parametrize("library", ("nflows", "normflows", "zuko"))
def test_the_lines_for_other_libraries(library):
    pytest.importorskip(library)
    first = indented((ROOT / "docs" / "flows.md").read_text())[0]
    assert "genkern.integrations.nflows" in first
    exec(first.replace("nflows", library), {})


def test_the_sequence_of_the_docs():
    layers = [genkern.nn.ActNorm(4), genkern.nn.InvertibleConv1x1(4)]
    namespace = {"layers": layers, "genkern": genkern}
    exec(indented((ROOT / "docs" / "flows.md").read_text())[1], namespace)
    assert isinstance(namespace["flow"], genkern.nn.InvertibleSequence)


@pytest.mark.parametrize("name", ("random", "samplers", "train", "metrics", "testing"))
def test_the_words_of_a_module(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in ("train", "metrics"):
        pytest.importorskip("sklearn")
    module = importlib.import_module(f"genkern.{name}")
    namespace = {"genkern": genkern, "model": network, "text": torch.zeros(4, 2), "empty": torch.zeros(4, 2), **vars(module)}
    code = indented(module.__doc__)[0].replace("epochs=20", "epochs=1")
    if name == "metrics":
        from genkern import data
        from genkern.models import VAE

        digits = data.load("digits")
        (images, labels), train = digits.test, digits.train[0]
        sets = {"a": images[:90], "b": images[90:], "real": train, "samples": images, "train": train}
        namespace |= {"data": digits, "images": images, "labels": labels, "key": genkern.random.key(0), **sets}
        namespace["model"] = VAE(VAE.config_for(digits))
    exec(code, namespace)


def test_the_words_of_data(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for folder in ("photos/a", "photos/b", "speech"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(16):
        image.new("RGB", (8, 8), (i, i, i)).save(f"photos/{'ab'[i % 2]}/{i}.png")
        with wave.open(f"speech/{i}.wav", "wb") as sound:
            sound.setparams((1, 2, 16000, 0, "NONE", ""))
            sound.writeframes(bytes(2 * 16384))
    np.save("digits.npy", np.zeros((32, 1, 8, 8), np.uint8))
    Path("book.txt").write_bytes(bytes(range(256)) * 32)
    namespace = {}
    lines = genkern.data.__doc__.split("\n\n", 1)[1]
    for line in lines.splitlines():  # the columns after a line say type and shape
        exec(line, namespace)
        if "load(" in line:
            kind, *dims = re.search(r"(uint8|float|as stored)(?: \((.*)\))?$", line).groups()
            inputs = namespace["data"].train[0]
            assert kind == "as stored" or inputs.is_floating_point() == (kind == "float")
            assert dims == [None] or all(not d.isdigit() or int(d) == n for d, n in zip(dims[0].split(", "), inputs.shape, strict=True))
    assert len(namespace["inputs"]) == len(namespace["data"].train[0])


def test_the_words_for_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=20, state_size=4)
    namespace = {"model": transformers.MambaForCausalLM(config), "inputs": {"input_ids": torch.ones(1, 3, dtype=torch.int64)}}
    exec(importlib.import_module("genkern.integrations.transformers").__doc__.split("\n\n", 1)[1], namespace)


def test_the_words_of_the_models():
    """Docstrings of models open with how to make one."""
    from genkern import models

    found = [
        re.match(rf"{name}\(.*?\)\)", getattr(models, name).__doc__ or "") for name in models.__all__ if not name.endswith("Config")
    ]
    found = [opening[0] for opening in found if opening]
    assert len(found) > 20
    for opening in found:
        eval(opening, vars(models))
