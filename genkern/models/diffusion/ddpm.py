"""DDPM: denoising diffusion (Ho et al., 2020) with the choices that are usual today, and classifier-free guidance.

Data x0 in [-1, 1] is noised, x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps, and a UNet learns to predict eps, x0 or v from x_t and t.
A sample starts from noise and goes back through the times. In training a label is dropped now and then, so one network knows the
scores with and without it, and guidance_scale w steers by without + w (with - without) (Ho & Salimans, 2021).
"""

import math
from dataclasses import dataclass

import torch

from genkern import random
from genkern.models._base import Model, Output, Training, ink
from genkern.models.diffusion.unet import GROUPS, UNet
from genkern.ops import denoising_loss, q_sample

SCHEDULES = ("cosine", "linear")
TARGETS = ("eps", "x0", "v")


@dataclass
class DDPMConfig:
    channels: int = 1
    size: int = 8  # height and width, a multiple of 2^(resolutions - 1)
    levels: int = 255  # uint8 images hold 0..levels
    classes: int = 0  # 0: labels are not used
    width: int = 32  # channels at full resolution, a multiple of 8; twice as many at every halving
    resolutions: int = 2
    blocks: int = 1  # residual blocks at each resolution
    heads: int = 4
    timesteps: int = 1000
    noise_schedule: str = "cosine"  # Nichol & Dhariwal (2021); or "linear": the betas of Ho et al. (2020)
    target: str = "v"  # what the network predicts: "eps", "x0" or "v" (genkern.ops.q_sample)
    weighting: str | None = None  # of the loss (genkern.ops.denoising_loss)
    label_dropout: float = 0.1


class DDPM(Model):
    """DDPM(DDPMConfig(levels=16, classes=10)): images (N, channels, size, size), uint8 in 0..levels or float in [-1, 1]."""

    Config = DDPMConfig
    defaults = Training(epochs=60, batch_size=64, learning_rate=1e-3, clip_grad_norm=1.0, ema=0.995)
    conditions = ("labels",)

    @classmethod
    def config_for(cls, data, **settings):
        channels, size = data.shape[0], data.shape[-1]
        fitted = {"channels": channels, "size": size, "levels": data.levels or 255, "classes": data.classes}
        return cls.Config(**fitted | settings)

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.size < 1 or c.resolutions < 1 or c.size % (1 << (c.resolutions - 1)):
            raise ValueError(f"DDPM: size must be a multiple of {1 << max(0, c.resolutions - 1)}, got {c.size}")
        if not 1 <= c.levels <= 255:
            raise ValueError(f"DDPM: levels must be in 1..255, got {c.levels}")
        if c.width < GROUPS or c.width % GROUPS or c.width % c.heads:
            raise ValueError(f"DDPM: width must be a multiple of {GROUPS} and of heads, got {c.width}")
        for name, value, known in (("noise_schedule", c.noise_schedule, SCHEDULES), ("target", c.target, TARGETS)):
            if value not in known:
                raise ValueError(f"DDPM: {name} must be one of {', '.join(known)}, got {value!r}")
        self.unet = UNet(c.channels, c.width, c.resolutions, c.blocks, c.classes, c.heads)
        table = torch.tensor(alphas_cumprod(c.noise_schedule, c.timesteps), dtype=torch.float32)
        self.register_buffer("alphas_cumprod", table, persistent=False)

    def forward(self, batch, *, labels=None, key=None, generator=None):
        """.loss: the weighted squared error, the mean over the batch and the pixels. key (2,) or (N, 2)."""
        c, x0 = self.config, 2 * self._ink(batch) - 1
        n, device = len(x0), x0.device
        key = random.draw_key(generator, device) if key is None else key
        for_time, for_noise, for_labels = random.split(key, 3).unbind(-2)
        timesteps = (random.uniform(for_time, (n, 1), device=device)[:, 0] * c.timesteps).long()
        labels = self._labels(labels, n, device)
        if c.classes:
            dropped = random.uniform(for_labels, (n, 1), device=device)[:, 0] < c.label_dropout
            labels = labels.masked_fill(dropped, c.classes)
        x_t, _ = q_sample(x0, timesteps, self.alphas_cumprod, key=for_noise, target=c.target)
        prediction = self.unet(x_t, timesteps, labels)
        loss = denoising_loss(
            prediction, x0, timesteps, self.alphas_cumprod, key=for_noise, target=c.target, weighting=c.weighting
        ).mean()
        return Output(loss, {})

    @torch.no_grad()
    def sample(self, n, *, labels=None, key=None, generator=None, steps=50, eta=0.0, guidance_scale=1.0, batch_size=256):
        """n images: uint8 in 0..levels.

        labels          (n,) or one int for all; None: of no class
        steps, eta      number of times visited; eta 0: DDIM (Song et al., 2021), 1: ancestral sampling
        guidance_scale  1: none; above: more of the label, less variety

        Each image has its own key, so image i depends on (key, i), not on n or batch_size (up to the rounding of sums).
        """
        c, device = self.config, self.alphas_cumprod.device
        if not 1 <= steps <= c.timesteps:
            raise ValueError(f"DDPM: steps must be in 1..{c.timesteps}, got {steps}")
        if guidance_scale != 1 and not c.classes:
            raise ValueError("DDPM: guidance_scale needs a model with classes")
        keys = random.split(random.draw_key(generator, device) if key is None else key, n).to(device)
        labels = self._labels(labels, n, device)
        x = torch.empty(n, c.channels, c.size, c.size, device=device)
        for start in range(0, n, batch_size):
            part = slice(start, start + batch_size)
            x[part] = self._denoise(keys[part], labels if labels is None else labels[part], steps, eta, guidance_scale)
        return ((x + 1) / 2 * c.levels).round().clamp(0, c.levels).to(torch.uint8)

    def predict(self, x, t, labels, guidance_scale):
        """The network's prediction at the timestep t, an int, guided where guidance_scale is not 1."""
        timesteps = torch.full((len(x),), t, device=x.device)
        if guidance_scale == 1:
            return self.unet(x, timesteps, labels)
        both = torch.cat([torch.full_like(labels, self.config.classes), labels])
        without, with_label = self.unet(torch.cat([x, x]), timesteps.repeat(2), both).chunk(2)
        return torch.lerp(without, with_label, guidance_scale)

    def _denoise(self, keys, labels, steps, eta, guidance_scale):
        c, table = self.config, alphas_cumprod(self.config.noise_schedule, self.config.timesteps)
        shape = (len(keys), c.channels, c.size, c.size)
        times = [round((c.timesteps - 1) * (1 - i / steps)) for i in range(steps)]
        x = random.normal(random.fold_in(keys, 0), shape, device=keys.device)
        for i, t in enumerate(times):
            now, following = table[t], table[times[i + 1]] if i + 1 < steps else 1.0
            alpha, sigma = math.sqrt(now), math.sqrt(1 - now)
            prediction = self.predict(x, t, labels, guidance_scale)
            x0 = {
                "eps": lambda p, x=x, a=alpha, s=sigma: (x - s * p) / a,
                "x0": lambda p: p,
                "v": lambda p, x=x, a=alpha, s=sigma: a * x - s * p,
            }[c.target](prediction).clamp(-1, 1)
            eps = (x - alpha * x0) / sigma
            fresh = eta * math.sqrt((1 - following) / (1 - now) * (1 - now / following))
            x = math.sqrt(following) * x0 + math.sqrt(max(0.0, 1 - following - fresh**2)) * eps
            if fresh:
                x = x + fresh * random.normal(random.fold_in(keys, i + 1), shape, device=keys.device)
        return x

    def _labels(self, labels, n, device):
        """int64 (n,), the number of classes standing for no label; None for a model without classes."""
        classes = self.config.classes
        if not classes:
            return None
        if labels is None:
            return torch.full((n,), classes, device=device)
        labels = torch.as_tensor(labels, device=device)
        if labels.is_floating_point() or labels.dim() > 1 or (labels.dim() == 1 and len(labels) != n):
            raise ValueError(f"DDPM: labels must be integers ({n},), got {labels.dtype} {tuple(labels.shape)}")
        if device.type == "cpu" and not torch.compiler.is_compiling() and ((labels < 0) | (labels >= classes)).any():
            raise ValueError(f"DDPM: labels must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
        return labels.long().expand(n)

    def _ink(self, images):
        x = ink(images, self.config.levels)
        expected = (self.config.channels, self.config.size, self.config.size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"DDPM: images must be (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        return x


def alphas_cumprod(schedule, timesteps):
    """[product of 1 - beta_s for s <= t], one number per timestep; every beta is at most 0.999."""
    if schedule == "linear":  # stated for 1000 steps; fewer ones are larger
        scale, last = 1000 / timesteps, max(1, timesteps - 1)
        betas = [min(0.999, scale * (1e-4 + (0.02 - 1e-4) * t / last)) for t in range(timesteps)]
    else:
        angle = lambda t: math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = [min(0.999, 1 - angle(t + 1) / angle(t)) for t in range(timesteps)]
    table, product = [], 1.0
    for beta in betas:
        product *= 1 - beta
        table.append(product)
    return table
