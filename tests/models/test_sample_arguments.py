"""sample() of every kind of model refuses what is no number of samples, no batch size and no key."""

import pytest
import torch

from genkern import models, random

TINY = {
    models.VAE: models.VAEConfig(width=4, hidden=8),
    models.DDPM: models.DDPMConfig(width=8, heads=1),
    models.GAN: models.GANConfig(latent=4),
    models.NICE: models.NICEConfig(),
    models.MADE: models.MADEConfig(levels=1, hidden=(8,)),
    models.PixelCNN: models.PixelCNNConfig(size=2, levels=1),
    models.CharLSTM: models.CharLSTMConfig(width=8),
    models.WaveNet: models.WaveNetConfig(layers=1, stacks=1, residual=8, gate=8, skip=8, levels=16),
}


@pytest.mark.parametrize("kind", TINY)
def test_wrong_numbers_and_keys(kind):
    model, key = kind(TINY[kind]).eval(), random.key(0)
    for n, options, words in (
        (-1, {"key": key}, "n must be an int of at least 0, got -1"),
        (2.5, {"key": key}, "n must be an int of at least 0, got 2.5"),
        (2, {"key": key, "batch_size": 0}, "batch_size must be an int of at least 1, got 0"),
        (2, {"key": key, "batch_size": -1}, "batch_size must be an int of at least 1, got -1"),
        (2, {"key": 3}, "key must be an int64 tensor"),
        (2, {"key": random.split(key, 3)}, "needs one key or 2, got 3"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"{kind.__name__}: .*{words}"):
            model.sample(n, **options)


def test_no_sequences():
    model = models.GPT(models.GPTConfig(width=8, layers=1, heads=2, context=8))
    assert model.sample(0, length=4, key=random.key(0)).shape == (0, 4)
    assert model.log_prob(torch.zeros(0, 4, dtype=torch.uint8)).shape == (0,)
