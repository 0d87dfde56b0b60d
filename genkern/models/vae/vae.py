"""VAE: the variational autoencoder of Kingma & Welling (2014) for small images with grey levels.

A latent z ~ N(0, I) is decoded to one probability per pixel, p(x|z) = Bernoulli(sigmoid(decoder(z))); an encoder gives
q(z|x), a diagonal Gaussian near the posterior. Training maximises the evidence lower bound

    log p(x) >= E_q [log p(x|z)] - KL(q(z|x) || N(0, I)).

A grey pixel counts as the probability x in [0, 1] of a black-and-white one: log p(x|z) = sum of x log p + (1 - x) log(1 - p),
the mean over all black-and-white images drawn with these probabilities. The bound stays a bound: on the mean log-probability
of those images, not on that of the grey levels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern import random
from genkern.models._base import Model, Output, ink
from genkern.ops import reparameterize_kl


@dataclass
class VAEConfig:
    channels: int = 1
    size: int = 8  # height and width, a multiple of 2
    levels: int = 255  # uint8 images hold 0..levels
    latent: int = 8
    width: int = 16
    hidden: int = 256
    beta: float = 1.0  # weight of the divergence in the loss (Higgins et al., 2017)


class VAE(Model):
    """VAE(VAEConfig(levels=16)): images (N, channels, size, size), uint8 in 0..levels or float in [-1, 1]; figures in nats."""

    Config = VAEConfig

    def __init__(self, config):
        super().__init__(config)
        c, half = config, config.size // 2
        if c.size < 2 or c.size % 2:
            raise ValueError(f"VAE: size must be a multiple of 2, got {c.size}")
        if not 1 <= c.levels <= 255:
            raise ValueError(f"VAE: levels must be in 1..255, got {c.levels}")
        self.encoder = nn.Sequential(
            nn.Conv2d(c.channels, c.width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(c.width, 2 * c.width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * c.width * half**2, c.hidden),
            nn.SiLU(),
            nn.Linear(c.hidden, 2 * c.latent),
        )
        self.decoder = nn.Sequential(
            nn.Linear(c.latent, c.hidden),
            nn.SiLU(),
            nn.Linear(c.hidden, 2 * c.width * half**2),
            nn.SiLU(),
            nn.Unflatten(1, (2 * c.width, half, half)),
            nn.ConvTranspose2d(2 * c.width, c.width, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(c.width, c.channels, 3, padding=1),
        )

    def forward(self, batch, *, key=None, generator=None):
        """.loss: -ELBO, the mean over the batch, nats per image; .parts: its two terms, nll and kl. key (2,) or (N, 2)."""
        x = self._ink(batch)
        z, kl = reparameterize_kl(self.encoder(2 * x - 1), key=key, generator=generator)
        nll, kl = -self._log_likelihood(x, z).mean(), kl.mean()
        return Output(nll + self.config.beta * kl, {"nll": nll.detach(), "kl": kl.detach()})

    def encode(self, images):
        """(mu, log_var) of q(z|x), each (N, latent)."""
        return self.encoder(2 * self._ink(images) - 1).chunk(2, 1)

    def decode(self, z):
        """The mean image of p(x|z), float in [-1, 1]."""
        return 2 * torch.sigmoid(self.decoder(z)) - 1

    @torch.no_grad()
    def sample(self, n, *, key=None, generator=None, batch_size=256):
        """n mean images of z ~ N(0, I): uint8 in 0..levels.

        Each image has its own key, so image i depends on (key, i), not on n or batch_size. (Its latent bit for bit; for another
        batch the decoder may sum in another order, which rounding hides unless a pixel lies on the edge of two levels.)
        """
        device = next(self.parameters()).device
        keys = random.split(random.draw_key(generator, device) if key is None else key, n)
        batches = [self.decode(self._prior(k, device)) for k in keys.split(batch_size)]
        images = torch.cat(batches) if batches else self.decode(self._prior(keys, device))
        return ((images + 1) / 2 * self.config.levels).round().to(torch.uint8)

    @torch.no_grad()
    def log_prob(self, images, *, samples=64, key=None, generator=None):
        """Importance-sampled lower bound of log p(x) (Burda et al., 2016): (N,) in nats. With samples=1 it is the ELBO."""
        x = self._ink(images)
        mu, log_var = self.encoder(2 * x - 1).chunk(2, 1)
        key = random.draw_key(generator, x.device) if key is None else key
        log_weights = []
        for k in random.split(key, samples):
            z = reparameterize_kl(mu, log_var, key=k)[0]
            log_prior = _log_normal(z, torch.zeros_like(z), torch.zeros_like(z))
            log_weights.append(self._log_likelihood(x, z) + log_prior - _log_normal(z, mu, log_var))
        return torch.stack(log_weights).logsumexp(0) - math.log(samples)

    def _ink(self, images):
        x = ink(images, self.config.levels)
        expected = (self.config.channels, self.config.size, self.config.size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"VAE: images must be (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        return x

    def _log_likelihood(self, x, z):
        return -F.binary_cross_entropy_with_logits(self.decoder(z), x, reduction="none").flatten(1).sum(1)

    def _prior(self, keys, device):
        return random.normal(keys, (len(keys), self.config.latent), device=device)


def _log_normal(z, mu, log_var):
    return -0.5 * ((z - mu).square() * torch.exp(-log_var) + log_var + math.log(2 * math.pi)).sum(1)
