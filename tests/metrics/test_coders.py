"""Baselines of text and sound: against counts by hand, entropies and each other."""

import math

import pytest
import torch

from genkern.metrics import baselines, lpc_bits, ngram_bits, png_bits
from genkern.models import WaveNet, WaveNetConfig


def test_counts_by_hand():
    train, test = torch.tensor([[0, 1, 0, 1, 1]]), torch.tensor([[1, 0]])
    one = lambda count: (count - 0.75 + 0.75 * 2 / 3) / 5  # of 5 symbols, two kinds, three in the alphabet
    p1, p0 = one(3), one(2)
    assert abs(ngram_bits(train, test, 1, vocabulary=3) + (math.log2(p1) + math.log2(p0)) / 2) < 1e-12
    after_one = (0.25 + 0.75 * 2 * p0) / 2  # 1 is followed by 0 once and by 1 once
    assert abs(ngram_bits(train, test, 2, vocabulary=3) + (math.log2(p1) + math.log2(after_one)) / 2) < 1e-12


@pytest.mark.parametrize("order", [1, 2, 4])
def test_ngram_probabilities_sum_to_one(order):
    train = torch.randint(0, 3, (5, 9), generator=torch.Generator().manual_seed(0))
    every = torch.cartesian_prod(*[torch.arange(3)] * 3)
    bits = torch.tensor([3 * ngram_bits(train, row[None], order, vocabulary=3) for row in every], dtype=torch.float64)
    assert abs(torch.exp2(-bits).sum() - 1) < 1e-9


def test_linear_prediction_reaches_the_entropy_of_its_noise():
    generator, x = torch.Generator().manual_seed(0), [torch.zeros(4, dtype=torch.float64)] * 2
    noise = 0.01 * torch.randn(1000, 4, generator=generator, dtype=torch.float64)
    for e in noise:
        x.append(1.8 * x[-1] - 0.95 * x[-2] + e)  # a resonance
    amplitudes = torch.linspace(-1, 1, 1001)
    levels = torch.bucketize(torch.stack(x[2:], 1).float(), (amplitudes[1:] + amplitudes[:-1]) / 2)
    entropy = math.log2(0.01 / 0.002 * math.sqrt(2 * math.pi * math.e))
    got = lpc_bits(levels, amplitudes)
    assert entropy < got < entropy + 0.35 < lpc_bits(levels, amplitudes, orders=(0,))
    with pytest.raises(ValueError, match="integers"):
        lpc_bits(levels.float(), amplitudes)


def test_what_a_run_is_compared_with():
    from genkern import data

    sound = data.load("plucks")
    short = data.Data(
        "s", *[(x[:2, :, :300], None) for x, _ in (sound.train, sound.validation, sound.test)], shape=(1, 300), levels=None, window=300
    )
    found = [baselines(short, "test", WaveNet(WaveNetConfig(head=head, layers=2))) for head in ("softmax", "logistic", "gaussian")]
    assert 2 < found[0]["linear prediction"] < 8 and 2 < found[1]["linear prediction"] < 8 and found[2] == {}


def test_png_of_each_photograph():
    from genkern import data

    photos = data.load("photos")
    parts = photos.by_class()
    found = {name: png_bits(part.pictures.values()) for name, part in parts.items()}
    assert found == pytest.approx({"china": 4.41, "flower": 2.45}, abs=0.05)
    assert png_bits(photos.pictures.values()) == pytest.approx(sum(found.values()) / 2)
    for name, part in parts.items():
        assert list(part.pictures) == [name] and (part.test[1] == photos.class_names.index(name)).all()
        assert len(part.train[0]) == 2850
    patch = parts["china"].validation[0][0]  # the held-out patches lie in the picture
    assert torch.equal(parts["china"].pictures["china"][:, :32, :32], patch)
    assert png_bits([torch.zeros(1, 64, 64, dtype=torch.uint8)]) < 0.3
    with pytest.raises(ValueError, match="no label"):
        data.load("topics").by_class()
