import importlib.util
import json
from pathlib import Path

import pytest
import torch

from genkern import data, metrics
from genkern.models import ConditionalVAE, ConditionalVAEConfig

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("judge_digits", Path(__file__).parents[2] / "bench" / "judge_digits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_real_images_pass_as_quarters(bench):
    """digits32 cut into quarters are the digits again, doubled and halved in size."""
    images, labels = data.load("digits32").test
    empty, digits, shown = bench.quarters(images, labels)
    assert empty == 1.0 and len(digits) == len(shown) == (labels != 10).sum()
    assert metrics.Classifier.of(data.load("digits")).accuracy(digits, shown) > 0.9
    assert bench.quarters(images.flip(0), labels)[0] < 0.9


def test_prompts_have_one_to_four_digits(bench):
    labels = bench.prompts(1000)
    count = (labels != 10).sum(1)
    assert set(count.tolist()) == {1, 2, 3, 4} and (labels.sort(1).values != labels).any() and labels.max() == 10
    assert set(labels[:, 0].tolist()) == set(range(10))
    assert all((row[:n] != 10).all() for row, n in zip(labels, count, strict=True))


def test_an_untrained_model_fails_and_real_figures_stand_beside(bench, tmp_path, capsys):
    torch.manual_seed(0)
    ConditionalVAE(ConditionalVAEConfig(levels=16)).save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text('{"data": "digits"}')
    bench.main([str(tmp_path), "--n", "400"])
    found = json.loads((tmp_path / "judge.json").read_text())
    assert found["accuracy"] < 0.3 and found["accuracy_real"] > 0.95 and found["frechet"] > 5 * found["frechet_real"]
    assert "held out" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        bench.main([str(tmp_path), "--set", "steps=3"])
    assert "no option 'steps'" in capsys.readouterr().err
