"""VAE: the variational autoencoder of Kingma & Welling (2014) for small images, and its conditional and importance-weighted kin.

A latent z ~ N(0, I) is decoded to a distribution of each pixel; an encoder gives q(z|x), a diagonal Gaussian near the posterior.
Training maximises the evidence lower bound

    log p(x) >= E_q [log p(x|z)] - KL(q(z|x) || N(0, I)).

The decoder's distribution is one of
    bernoulli               a grey pixel counts as the probability x in [0, 1] of a black-and-white one: log p(x|z) = sum of
                            x log p + (1 - x) log(1 - p). The bound stays a bound, on the mean log-probability of the black-and-white
                            images drawn with these probabilities, not on that of the grey levels
    gaussian                a density of the pixels in [-1, 1], with one learned variance per channel
    discretized_logistic    a probability of the grey levels themselves, with one learned scale per channel: gives bits per dimension
"""

import math
import operator
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genkern import random
from genkern.models._base import Model, Output, Training, check_tensor, of_each, signed, square_images
from genkern.ops import (
    bernoulli_nll,
    discretized_logistic_nll,
    gaussian_nll,
    log_importance_weight,
    reparameterize,
    reparameterize_kl,
)
from genkern.ops._common import check_int, check_number

LIKELIHOODS = ("bernoulli", "gaussian", "discretized_logistic")


@dataclass
class VAEConfig:
    channels: int = 1
    size: int = 8  # height and width, a multiple of 2
    levels: int = 255  # uint8 images hold 0..levels
    latent: int = 8  # dimensions of z
    width: int = 16  # conv: channels at full resolution
    hidden: int = 256  # units of the layers between pixels or channels and the latent
    beta: float = 1.0  # weight of the divergence in the loss (Higgins et al., 2017)
    likelihood: str = "bernoulli"  # or "gaussian", "discretized_logistic"
    network: str = "conv"  # or "mlp"


class VAE(Model):
    """VAE(VAEConfig(levels=16)): images (N, channels, size, size), uint8 in 0..levels or float in [-1, 1]; figures in nats."""

    Config = VAEConfig
    defaults = Training(epochs=100, batch_size=64, learning_rate=1e-3)

    @classmethod
    def config_for(cls, data, **settings):
        return cls.Config(**{**square_images(cls.__name__, data), **settings})

    def __init__(self, config):
        super().__init__(config)
        name, c = type(self).__name__, config
        if c.size < 2 or c.size % 2:
            raise ValueError(f"{name}: size must be a multiple of 2, got {c.size}")
        if not 1 <= c.levels <= 255:
            raise ValueError(f"{name}: levels must be in 1..255, got {c.levels}")
        if c.likelihood not in LIKELIHOODS:
            raise ValueError(f"{name}: likelihood must be one of {', '.join(LIKELIHOODS)}, got {c.likelihood!r}")
        if c.network not in NETWORKS:
            raise ValueError(f"{name}: network must be one of {', '.join(NETWORKS)}, got {c.network!r}")
        check_number(name, "beta", c.beta)
        if not 0 <= c.beta < math.inf:
            raise ValueError(f"{name}: beta must be at least 0, got {c.beta}")
        self.encoder, self.decoder = NETWORKS[c.network](c, self._code_size())
        if c.likelihood != "bernoulli":  # ln of the variance, or of the logistic scale
            self.log_scale = nn.Parameter(torch.full((c.channels, 1, 1), -2.0))

    def forward(self, batch, *, key=None, generator=None, **conditions):
        """.loss: -ELBO, the mean over the batch, nats per image; .parts: its two terms, nll and kl. key (2,) or (N, 2)."""
        x = self._images(batch)
        z, kl = reparameterize_kl(self._moments(x, **conditions), key=key, generator=generator)
        nll, kl = self._nll(x, z, **conditions).mean(), kl.mean()
        return Output(self._objective(nll, kl), {"nll": nll.detach(), "kl": kl.detach()})

    def encode(self, images, **conditions):
        """(mu, log_var) of q(z|x), each (N, latent)."""
        return self._moments(self._images(images), **conditions).chunk(2, 1)

    def decode(self, z, **conditions):
        """The mean image of p(x|z), float in [-1, 1]."""
        if not isinstance(z, torch.Tensor) or z.shape[1:] != (self.config.latent,):
            got = tuple(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
            raise ValueError(f"{type(self).__name__}: latents must be (N, {self.config.latent}), got {got}")
        raw = self.decoder(self._code(z, **conditions))
        return 2 * torch.sigmoid(raw) - 1 if self.config.likelihood == "bernoulli" else raw.clamp(-1, 1)

    @torch.no_grad()
    def sample(self, n, *, key=None, generator=None, batch_size=256, **conditions):
        """n mean images of z ~ N(0, I): uint8 in 0..levels.

        Each image has its own key, so image i depends on (key, i), not on n or batch_size. (Its latent bit for bit; for another
        batch the decoder may sum in another order, which rounding hides unless a pixel lies on the edge of two levels.)
        """
        keys = self.sample_keys(n, key, generator, batch_size)
        images = []
        for part in (slice(i, i + batch_size) for i in range(0, max(n, 1), batch_size)):
            images.append(self.decode(self._prior(keys[part]), **of_each(conditions, operator.itemgetter(part))))
        return self._levels(torch.cat(images))

    @torch.no_grad()
    def log_prob(self, images, *, samples=64, key=None, generator=None, **conditions):
        """Importance-sampled lower bound of log p(x) (Burda et al., 2016): (N,) in nats. With samples=1 it is the ELBO."""
        check_tensor(type(self).__name__, images)
        key = random.draw_key(generator, images.device) if key is None else key
        return self._importance_bound(self._images(images), samples, key, **conditions)

    def bits_per_dim(self, images, **options):
        """-log_prob / (dimensions ln 2), (N,). NaN unless the likelihood is discretized: no other is a probability of the levels."""
        check_tensor(type(self).__name__, images)
        if self.config.likelihood != "discretized_logistic":
            return torch.full((len(images),), math.nan)
        return -self.log_prob(images, **options) / (math.prod(images.shape[1:]) * math.log(2))

    @torch.no_grad()
    def reconstruct(self, images, **conditions):
        """The mean image of the mean latent of each image: uint8 in 0..levels."""
        return self._levels(self.decode(self.encode(images, **conditions)[0], **conditions))

    @torch.no_grad()
    def traverse(self, z=None, *, steps=9, span=3.0, key=None, **conditions):
        """Mean images along each latent direction: uint8 (latent, steps, C, H, W).

        In row i z[i] goes from -span to span; the rest is as in z (latent,), by default 0.
        """
        name, latent = type(self).__name__, self.config.latent
        check_int(name, "steps", steps)
        check_number(name, "span", span)
        z = torch.zeros(latent, device=next(self.parameters()).device) if z is None else z
        if not isinstance(z, torch.Tensor) or z.shape != (latent,):
            got = tuple(z.shape) if isinstance(z, torch.Tensor) else type(z).__name__
            raise ValueError(f"{name}: z must be one latent ({latent},), got {got}")
        walks = z.repeat(latent, steps, 1)
        for i in range(latent):
            walks[i, :, i] = torch.linspace(-span, span, steps)
        conditions = of_each(conditions, lambda x: x.expand(latent * steps))
        return self._levels(self.decode(walks.flatten(0, 1), **conditions)).unflatten(0, (-1, steps))

    @torch.no_grad()
    def interpolate(self, a, b, *, steps=9, **conditions):
        """Mean images between the mean latents of images a and b, each (N, C, H, W): uint8 (N, steps, C, H, W)."""
        check_int(type(self).__name__, "steps", steps)
        first, last = self.encode(a, **conditions)[0], self.encode(b, **conditions)[0]
        if first.shape != last.shape:
            raise ValueError(f"{type(self).__name__}: interpolate needs as many images in a as in b, got {len(first)} and {len(last)}")
        weights = torch.linspace(0, 1, steps, device=first.device).view(1, -1, 1)
        walks = first.unsqueeze(1) * (1 - weights) + last.unsqueeze(1) * weights
        conditions = of_each(conditions, lambda x: x.repeat_interleave(steps))
        return self._levels(self.decode(walks.flatten(0, 1), **conditions)).unflatten(0, (-1, steps))

    # ---- what the relatives below change

    def _code_size(self):
        """Numbers that the decoder takes."""
        return self.config.latent

    def _moments(self, x):
        """Both moments of q(z|x) as halves (N, 2 latent), x in [-1, 1]."""
        return self.encoder(x)

    def _code(self, z):
        """What the decoder takes."""
        return z

    def _objective(self, nll, kl):
        return nll + self.config.beta * kl

    # ---- pieces

    def _images(self, images):
        """Images in [-1, 1]."""
        return signed(type(self).__name__, images, self.config)

    def _nll(self, x, z, **conditions):
        raw = self.decoder(self._code(z, **conditions))
        if self.config.likelihood == "bernoulli":
            return bernoulli_nll(raw, (x + 1) / 2)
        if self.config.likelihood == "gaussian":
            return gaussian_nll(raw, self.log_scale.expand(raw.shape), x)
        return discretized_logistic_nll(raw, self.log_scale.expand(raw.shape), x, levels=self.config.levels + 1)

    def _importance_bound(self, x, samples, key, *, recompute=False, **conditions):
        """log 1/K sum of p(x, z_k) / q(z_k|x) with z_k ~ q(z|x): (N,) (Burda et al., 2016, equation 8).

        The sum runs along with the samples, so without gradients memory does not grow with K. With gradients the decoder's
        activations of every sample are kept, unless recompute: then of one, and the backward pass decodes each sample again.
        """
        check_int(type(self).__name__, "samples", samples)
        moments = self._moments(x, **conditions)
        if samples == 1:
            z, kl = reparameterize_kl(moments, key=random.split(key, 1).select(-2, 0))
            return -self._nll(x, z, **conditions) - kl
        recompute, log_sum = recompute and torch.is_grad_enabled(), None
        for k in random.split(key, samples).unbind(-2):
            z = reparameterize(moments, key=k)
            nll = partial(self._nll, x, **conditions)
            nll = checkpoint(nll, z, use_reentrant=False, preserve_rng_state=False) if recompute else nll(z)
            log_sum = log_importance_weight(nll, z, moments, log_sum=log_sum)
        return log_sum - math.log(samples)

    def _prior(self, keys):
        return random.normal(keys, (len(keys), self.config.latent), device=keys.device)

    def _levels(self, images):
        return ((images + 1) / 2 * self.config.levels).round().to(torch.uint8)


def _conv(c, code_size):
    half = c.size // 2
    encoder = nn.Sequential(
        nn.Conv2d(c.channels, c.width, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(c.width, 2 * c.width, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(2 * c.width * half**2, c.hidden),
        nn.SiLU(),
        nn.Linear(c.hidden, 2 * c.latent),
    )
    decoder = nn.Sequential(
        nn.Linear(code_size, c.hidden),
        nn.SiLU(),
        nn.Linear(c.hidden, 2 * c.width * half**2),
        nn.SiLU(),
        nn.Unflatten(1, (2 * c.width, half, half)),
        nn.ConvTranspose2d(2 * c.width, c.width, 4, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(c.width, c.channels, 3, padding=1),
    )
    return encoder, decoder


def _mlp(c, code_size):
    pixels = c.channels * c.size**2
    layers = lambda a, b: [nn.Linear(a, c.hidden), nn.SiLU(), nn.Linear(c.hidden, c.hidden), nn.SiLU(), nn.Linear(c.hidden, b)]
    encoder = nn.Sequential(nn.Flatten(), *layers(pixels, 2 * c.latent))
    decoder = nn.Sequential(*layers(code_size, pixels), nn.Unflatten(1, (c.channels, c.size, c.size)))
    return encoder, decoder


NETWORKS = {"conv": _conv, "mlp": _mlp}
