"""GAN: generative adversarial networks (Goodfellow et al., 2014) for small images, with conditional, convolutional and Wasserstein kin.

A generator turns a latent z ~ N(0, I) into an image; a discriminator scores how real an image looks. Each has a loss of its own
(losses.py), which the other one's weights do not follow: two objectives, two optimizers. At every training step the discriminator moves
once, and the generator at each `critic_steps`-th.

What is kept: neither loss says how good the samples are, since each is measured against a moving opponent. So evaluate() returns as
its "loss" the Frechet distance between generated images and the real ones it is given, in the plain space of pixels, and fit() keeps
the weights where that is least on the validation images. It sees means and covariances only, which is enough to tell a collapsed or
diverged generator; genkern.metrics judges with an independent classifier. The generator that is evaluated, kept and sampled from is
the average over training (Training.ema).
"""

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.func import functional_call

from genkern import random
from genkern.metrics._distances import frechet_distance
from genkern.models._base import Model, Output, Training, of_each, signed, square_images
from genkern.models.gan.losses import LOSSES, discriminator_loss, generator_loss, gradient_penalty, r1_penalty
from genkern.models.gan.networks import NETWORKS, NORMS, Discriminator, generator

OBJECTIVES = ("discriminator", "generator")
DRAWN = 1024  # generated images of an evaluation, at least: with fewer, the noise between two epochs hides their difference


@dataclass
class GANConfig:
    channels: int = 1
    size: int = 8  # height and width; for "conv" a multiple of 2^resolutions
    levels: int = 255  # uint8 images hold 0..levels
    latent: int = 32  # dimensions of z
    network: str = "mlp"  # "mlp" or "conv"
    hidden: int = 256  # mlp: units of a layer
    width: int = 32  # conv: channels at full resolution; twice as many at every halving but the first
    resolutions: int = 2  # conv: how often the size is halved
    norm: str = "none"  # of the generator: "none", "batch" or "group"
    critic_norm: str = "none"  # of the discriminator, where spectral_norm is off
    loss: str = "non_saturating"  # "non_saturating", "minimax", "hinge" or "wasserstein": losses.py
    spectral_norm: bool = False  # of the discriminator's layers (Miyato et al., 2018)
    gradient_penalty: float = 0.0  # weight of (|grad| - 1)^2 between real and generated images
    r1: float = 1.0  # weight of |grad|^2 / 2 on real images: without it, these small networks collapse
    critic_steps: int = 1  # of the discriminator to one of the generator


class GAN(Model):
    """GAN(GANConfig(levels=16)): images (N, channels, size, size), uint8 in 0..levels or float in [-1, 1]."""

    Config = GANConfig
    defaults = Training(epochs=150, batch_size=64, learning_rate=2e-3, ema=0.995)
    betas = (0.5, 0.999)  # of Adam

    @classmethod
    def config_for(cls, data, **settings):
        return cls.Config(**{**square_images(cls.__name__, data), **settings})

    def __init__(self, config):
        super().__init__(config)
        name, c = type(self).__name__, config
        for field, known in (("network", NETWORKS), ("norm", NORMS), ("critic_norm", NORMS), ("loss", LOSSES)):
            if getattr(c, field) not in known:
                raise ValueError(f"{name}: {field} must be one of {', '.join(known)}, got {getattr(c, field)!r}")
        if not 1 <= c.levels <= 255:
            raise ValueError(f"{name}: levels must be in 1..255, got {c.levels}")
        if c.network == "conv" and (c.resolutions < 1 or c.size < 1 << c.resolutions or c.size % (1 << c.resolutions)):
            raise ValueError(f"{name}: size must be a multiple of {1 << max(1, c.resolutions)}, got {c.size}")
        if c.gradient_penalty < 0 or c.r1 < 0:
            raise ValueError(f"{name}: gradient_penalty and r1 must be at least 0, got {c.gradient_penalty} and {c.r1}")
        if (c.gradient_penalty or c.r1) and c.critic_norm == "batch" and not c.spectral_norm:
            raise ValueError(f"{name}: gradient_penalty and r1 need a critic that scores each image alone: critic_norm none or group")
        self._check_lipschitz()
        classes = getattr(c, "classes", 0)
        self.generator = generator(c, c.latent + classes)
        self.discriminator = Discriminator(c, classes)

    def objectives(self):
        return {name: list(getattr(self, name).parameters()) for name in OBJECTIVES}

    def due(self, objective, step):
        return objective == "discriminator" or (step + 1) % self.config.critic_steps == 0

    def averaged(self):
        """The generator only: its parameters, and the statistics of its batch norms, which belong to them."""
        return {f"generator.{name}": x for name, x in self.generator.state_dict(keep_vars=True).items() if x.is_floating_point()}

    def optimizer(self, parameters, training):
        return torch.optim.Adam(parameters, training.learning_rate, self.betas, weight_decay=training.weight_decay)

    def forward(self, batch, *, objective, key=None, generator=None, **conditions):
        """.loss of the objective "discriminator" or "generator", a mean over the batch; .parts: mean scores and penalties."""
        if objective not in OBJECTIVES:
            raise ValueError(f"{type(self).__name__}: objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
        c, real = self.config, self._images(batch)
        key = random.draw_key(generator, real.device) if key is None else key
        for_latent, for_mix = random.split(random.fold_in(key, OBJECTIVES.index(objective)), 2).unbind(-2)
        code = self._code(random.normal(for_latent, (len(real), c.latent), device=real.device).to(real.dtype), **conditions)
        if objective == "generator":
            return Output(generator_loss(c.loss, self._judged(self.generator(code), **conditions)), {})

        with torch.no_grad():
            fake = self.generator(code)
        critic = lambda x: self.discriminator(x, **conditions)
        on_real, on_fake = critic(real), critic(fake)
        loss = discriminator_loss(c.loss, on_real, on_fake)
        parts = {"real": on_real.detach().mean(), "fake": on_fake.detach().mean()}
        if c.gradient_penalty:
            mix = random.uniform(for_mix, (len(real), 1), device=real.device).to(real.dtype)
            penalty = gradient_penalty(critic, real, fake, mix)
            loss, parts["penalty"] = loss + c.gradient_penalty * penalty, penalty.detach()
        if c.r1:
            penalty = r1_penalty(critic, real)
            loss, parts["r1"] = loss + c.r1 * penalty, penalty.detach()
        return Output(loss, parts)

    def decode(self, z, **conditions):
        """The images of latents z (N, latent): float in [-1, 1]."""
        return self.generator(self._code(z, **conditions))

    @torch.no_grad()
    def sample(self, n, *, key=None, generator=None, batch_size=256, **conditions):
        """n images of z ~ N(0, I): uint8 in 0..levels.

        In evaluation mode image i depends on (key, i), not on n or batch_size (up to the rounding of sums).
        """
        keys = self.sample_keys(n, key, generator, batch_size)
        images = []
        for part in (slice(i, i + batch_size) for i in range(0, max(n, 1), batch_size)):
            z = random.normal(keys[part], (len(keys[part]), self.config.latent), device=keys.device)
            images.append(self.decode(z, **of_each(conditions, operator.itemgetter(part))))
        return ((torch.cat(images) + 1) / 2 * self.config.levels).round().to(torch.uint8)

    @torch.no_grad()
    def evaluate(self, inputs, labels=None, *, key, batch_size=256, likelihood=False):
        """As Model.evaluate, but "loss" is the Frechet distance of pixels: what fit() keeps the best of (the head of this file)."""
        found = super().evaluate(inputs, labels, key=key, batch_size=batch_size, likelihood=likelihood)
        n = max(DRAWN, len(inputs))
        conditions = {}
        if "labels" in self.conditions:
            conditions["labels"] = labels.repeat(-(-n // len(labels)))[:n].to(next(self.parameters()).device)
        drawn = self.sample(n, key=random.fold_in(key, n), batch_size=batch_size, **conditions)
        found["loss"] = frechet_distance(*(_coarse(self._images(x).cpu()) for x in (drawn, inputs)))
        return found

    # ---- pieces

    def _code(self, z):
        """What the generator takes."""
        return z

    def _check_lipschitz(self):
        c = self.config
        if c.loss == "wasserstein" and not (c.spectral_norm or c.gradient_penalty):
            raise ValueError(f"{type(self).__name__}: the wasserstein loss needs spectral_norm or gradient_penalty")

    def _judged(self, images, **conditions):
        """The scores of a discriminator that holds still: the gradient reaches the images, none is computed for its weights."""
        still = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, still, (images,), conditions)

    def _images(self, images):
        """Images in [-1, 1]."""
        return signed(type(self).__name__, images, self.config)


def _coarse(x):
    """Rows of at most 16 x 16 pixels per channel."""
    return (F.adaptive_avg_pool2d(x, 16) if x.shape[-1] > 16 else x).flatten(1)
