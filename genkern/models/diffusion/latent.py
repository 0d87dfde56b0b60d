"""LatentDiffusion: diffusion in the latent space of an autoencoder (Rombach et al., 2022).

An autoencoder makes an image (C, size, size) a latent (latent_channels, size / reduction, size / reduction) with q(z|x) a diagonal
Gaussian, and is trained on -log p(x|z) + kl_weight KL(q(z|x) || N(0, I)), p(x|z) normal with one learned variance per channel. Then it
rests, and the model of DDPM learns the latents, moved and scaled to mean 0 and variance 1 per channel. Attention and
convolutions over pixels, the costly part of diffusion, are paid for 1 / reduction^2 of the positions.

Both stages are one run: steps 0 ... autoencoder_steps - 1 train the objective "autoencoder", all later ones "diffusion". The latents'
mean and deviation are running averages over the first stage, kept as buffers with the weights.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from genkern import random
from genkern.models._base import Output, Training
from genkern.models.diffusion.ddpm import DDPM, DDPMConfig
from genkern.models.diffusion.unet import GROUPS, Upsample
from genkern.nn import GroupNormAct
from genkern.ops import gaussian_nll, reparameterize_kl


@dataclass
class LatentDiffusionConfig(DDPMConfig):
    size: int = 32  # a multiple of reduction x 2^(resolutions - 1)
    reduction: int = 4  # a power of 2: latents are so many times smaller on each side
    latent_channels: int = 4
    autoencoder_width: int = 32  # channels after the first halving, a multiple of 8; twice as many at every further one
    kl_weight: float = 0.1
    autoencoder_steps: int = 600  # of the training: its first stage


class LatentDiffusion(DDPM):
    """LatentDiffusion(LatentDiffusionConfig(classes=10)): images and labels as for DDPM, whose sampling it shares."""

    Config = LatentDiffusionConfig
    defaults = Training(epochs=40, batch_size=64, learning_rate=1e-3, clip_grad_norm=1.0, ema=0.995)
    sigma_data = 1.0

    def __init__(self, config):
        c = config
        if c.reduction < 2 or c.reduction & (c.reduction - 1):
            raise ValueError(f"LatentDiffusion: reduction must be a power of 2, 2 or more, got {c.reduction}")
        if c.autoencoder_width < GROUPS or c.autoencoder_width % GROUPS:
            raise ValueError(f"LatentDiffusion: autoencoder_width must be a multiple of {GROUPS}, got {c.autoencoder_width}")
        super().__init__(config)
        w, z, halvings = c.autoencoder_width, c.latent_channels, c.reduction.bit_length() - 1
        down, up = [], []
        for i in range(halvings):
            c_in, c_out = w << i >> 1 if i else c.channels, w << i
            down += [nn.Conv2d(c_in, c_out, 4, stride=2, padding=1), Block(c_out)]
            up = [Block(c_out), *([Upsample(c_out, w << i >> 1)] if i else []), *up]
        deepest = w << (halvings - 1)
        self.encoder = nn.Sequential(*down, GroupNormAct(GROUPS, deepest), nn.Conv2d(deepest, 2 * z, 3, padding=1))
        self.decoder = nn.Sequential(  # the last doubling is four pixels at each place: no feature map is as large as the image
            nn.Conv2d(z, deepest, 3, padding=1),
            *up,
            GroupNormAct(GROUPS, w),
            nn.Conv2d(w, 4 * c.channels, 3, padding=1),
            nn.PixelShuffle(2),
        )
        self.log_variance = nn.Parameter(torch.full((c.channels, 1, 1), -2.0))
        self.register_buffer("latent_mean", torch.zeros(c.latent_channels, 1, 1))
        self.register_buffer("latent_deviation", torch.zeros(c.latent_channels, 1, 1))  # 0: not measured yet

    def objectives(self):
        autoencoder = [*self.encoder.parameters(), *self.decoder.parameters(), self.log_variance]
        return {"diffusion": list(self.unet.parameters()), "autoencoder": autoencoder}

    def due(self, objective, step):
        return (objective == "autoencoder") == (step < self.config.autoencoder_steps)

    def averaged(self):
        return {f"unet.{name}": p for name, p in self.unet.named_parameters()}

    @torch.no_grad()
    def evaluate(self, inputs, labels=None, **options):
        """As Model.evaluate. In the first stage "loss" and "diffusion" are NaN, so that fit() keeps no such weights as the best."""
        found = super().evaluate(inputs, labels, **options)
        begun = bool(self.unet.last.weight.any())  # zero until it is trained
        return found if begun else found | {"loss": math.nan, "diffusion": math.nan}

    def forward(self, batch, *, labels=None, key=None, generator=None, objective="diffusion"):
        """.loss of one objective; .parts of "autoencoder": nll and kl, nats per image, and the root mean square error of pixels."""
        x = self._images(batch)
        key = random.draw_key(generator, x.device) if key is None else key
        for_latent, for_diffusion = random.split(key, 2).unbind(-2)
        if objective == "diffusion":
            with torch.no_grad():
                z, _ = reparameterize_kl(self.encoder(x), key=for_latent)
                z = self._scaled(z)
            return Output(self._denoising_loss(z, labels, for_diffusion), {})
        z, kl = reparameterize_kl(self.encoder(x), key=for_latent)
        if self.training:
            self._measure(z.detach())
        mean = self.decoder(z)
        nll, kl = gaussian_nll(mean, self.log_variance.expand(mean.shape), x).mean(), kl.mean()
        error = (mean.detach() - x).square().mean().sqrt()
        return Output(nll + self.config.kl_weight * kl, {"nll": nll.detach(), "kl": kl.detach(), "error": error})

    def encode(self, images):
        """The mean latents (N, latent_channels, size / reduction, size / reduction), where samples of q(z|x) have variance 1."""
        return self._scaled(self.encoder(self._images(images)).chunk(2, 1)[0])

    def decode(self, z):
        """Images in [-1, 1] of latents such as encode() gives."""
        return self.decoder(z * self._deviation() + self.latent_mean).clamp(-1, 1)

    @torch.no_grad()
    def reconstruct(self, images, *, key=None, labels=None):
        """decode(encode(images)): uint8 in 0..levels."""
        return super()._levels(self.decode(self.encode(images)))

    # ---- what differs from DDPM

    def _diffused_shape(self):
        side = self.config.size // self.config.reduction
        return self.config.latent_channels, side, side

    def _clip(self):
        return None

    def _levels(self, z):
        return super()._levels(torch.cat([self.decode(part) for part in z.split(256)]) if len(z) else self.decode(z))

    # ---- pieces

    def _scaled(self, z):
        return (z - self.latent_mean) / self._deviation()

    def _deviation(self):
        return torch.where(self.latent_deviation > 0, self.latent_deviation, 1.0)

    @torch.no_grad()
    def _measure(self, z):
        """Move the latents' mean and deviation towards those of a batch; the first batch sets them."""
        rate = torch.where(self.latent_deviation > 0, 0.02, 1.0)
        mean = z.mean((0, 2, 3))[:, None, None]
        self.latent_mean.lerp_(mean, rate)
        self.latent_deviation.lerp_((z - self.latent_mean).square().mean((0, 2, 3)).sqrt()[:, None, None], rate)


class Block(nn.Module):
    """x + a convolution of the normalised x, (N, c, H, W)."""

    def __init__(self, c):
        super().__init__()
        self.norm = GroupNormAct(GROUPS, c)
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return x + self.conv(self.norm(x))
