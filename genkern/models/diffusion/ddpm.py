"""DDPM: denoising diffusion (Ho et al., 2020) with the choices that are usual today, and classifier-free guidance.

Data x0 in [-1, 1] is noised, x_t = alpha_t x0 + sigma_t eps, and a UNet learns to predict eps, x0, v or the flow from x_t and t; in a
preserving schedule alpha_t^2 = abar_t and sigma_t^2 = 1 - abar_t. A sample starts from noise and goes back through the times by any
sampler of genkern.samplers. In training the condition is dropped now and then, so one network knows the scores with and without it,
and guidance_scale w steers by without + w (with - without) (Ho & Salimans, 2021).
"""

from dataclasses import dataclass

import torch

from genkern import random, samplers
from genkern.models._base import Model, Output, Training, ink
from genkern.models.diffusion._process import process
from genkern.models.diffusion.unet import GROUPS, UNet
from genkern.ops import denoising_loss, q_sample


@dataclass
class DDPMConfig:
    channels: int = 1
    size: int = 8  # height and width, a multiple of 2^(resolutions - 1)
    levels: int = 255  # uint8 images hold 0..levels
    classes: int = 0  # 0: labels are not used
    tokens: int = 0  # 0: a label is one class; else a sequence of up to so many, attended to
    width: int = 32  # channels at full resolution, a multiple of 8; twice as many at every halving
    resolutions: int = 2
    blocks: int = 1  # residual blocks at each resolution
    heads: int = 4
    timesteps: int = 1000
    noise_schedule: str = "cosine"  # or "linear", "scaled_linear", "sigmoid", "flow", "edm" (genkern.samplers.Schedule)
    target: str | None = None  # what the network predicts: "v" (default), "eps", "x0"; "flow", "edm" with these schedules
    weighting: str | None = None  # of the loss (genkern.ops.denoising_loss): "min_snr", "p2", "edm"
    label_dropout: float = 0.1


class DDPM(Model):
    """DDPM(DDPMConfig(levels=16, classes=10)): images (N, channels, size, size), uint8 in 0..levels or float in [-1, 1].

    labels: int64 (N,), classes 0..classes - 1; or where config.tokens > 0 sequences (N, L) of these, padded by `classes`.
    """

    Config = DDPMConfig
    defaults = Training(epochs=60, batch_size=64, learning_rate=1e-3, clip_grad_norm=1.0, ema=0.995)
    conditions = ("labels",)
    sigma_data = 0.5  # deviation of what is diffused, for noise_schedule="edm"

    @classmethod
    def config_for(cls, data, **settings):
        channels, size = data.shape[0], data.shape[-1]
        labels = getattr(data, "train", (None, None))[1]
        tokens = labels.shape[1] if labels is not None and labels.dim() == 2 else 0
        fitted = {"channels": channels, "size": size, "levels": data.levels or 255, "classes": data.classes, "tokens": tokens}
        return cls.Config(**fitted | settings)

    def __init__(self, config):
        super().__init__(config)
        name, c = type(self).__name__, config
        if not 1 <= c.levels <= 255:
            raise ValueError(f"{name}: levels must be in 1..255, got {c.levels}")
        if c.width < GROUPS or c.width % GROUPS or c.width % c.heads:
            raise ValueError(f"{name}: width must be a multiple of {GROUPS} and of heads, got {c.width}")
        if c.tokens and not c.classes:
            raise ValueError(f"{name}: tokens need classes, the size of their vocabulary, got 0")
        channels, side, _ = self._diffused_shape()
        step = c.size // side << (c.resolutions - 1) if side and c.resolutions > 0 else 1  # the UNet halves `side` so often
        if c.resolutions < 1 or side < 1 or c.size % step:
            raise ValueError(f"{name}: size must be a multiple of {step}, and resolutions positive, got {c.size} and {c.resolutions}")
        if not c.classes:
            self.conditions = ()
        try:
            self.process = process(c.noise_schedule, c.target, c.timesteps, self.sigma_data)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        self.unet = UNet(channels, c.width, c.resolutions, c.blocks, c.classes, c.heads, c.tokens)
        for table in ("alphas", "sigmas", "times"):
            self.register_buffer(table, torch.tensor(getattr(self.process, table), dtype=torch.float32), persistent=False)

    def forward(self, batch, *, labels=None, key=None, generator=None):
        """.loss: the weighted squared error, the mean over the batch and the pixels. key (2,) or (N, 2)."""
        x0 = self._images(batch)
        return Output(self._denoising_loss(x0, labels, random.draw_key(generator, x0.device) if key is None else key), {})

    @torch.no_grad()
    def sample(
        self,
        n,
        *,
        labels=None,
        key=None,
        generator=None,
        batch_size=256,
        callback=None,
        sampler: str = "dpmpp_2m",
        steps: int = 20,
        guidance_scale: float = 1.0,
        guidance_rescale: float = 0.0,
        eta: float | None = None,
        sigmas: str | None = None,
        spacing: str = "trailing",
    ):
        """n images: uint8 in 0..levels.

        labels          (n,), or (n, L) tokens; one label for all; None: of no class
        sampler, steps  one of genkern.samplers.SAMPLERS, and its number of steps
        guidance_scale  1: none; above: more of the label, less variety. guidance_rescale: as in Sampler.sample
        eta             fresh noise of "ddim" and "euler_a"
        sigmas, spacing which points of the schedule are visited (Schedule.grid)
        callback        called with what the network sees, noise first, at every evaluation

        Each image has its own key, so image i depends on (key, i), not on n or batch_size (up to the rounding of sums).
        """
        name, c, shape = type(self).__name__, self.config, self._diffused_shape()
        if guidance_scale != 1 and not c.classes:
            raise ValueError(f"{name}: guidance_scale needs a model with classes")
        options = {"clip": self._clip(), "eta": eta, "sigmas": sigmas, "spacing": spacing}
        chain = samplers.by_name(sampler, self.process.schedule, steps, **options)
        keys = self.sample_keys(n, key, generator, batch_size)
        labels = self._labels(labels, n, keys.device)
        result = torch.empty(n, *shape, device=keys.device)

        def network(x, t, labels=None):
            if callback is not None:
                callback((x if guidance_scale == 1 else x[len(x) // 2 :]).clone())  # under guidance the batch is there twice
            return self._network(x, t, labels)

        for start in range(0, n, batch_size):
            k = keys[start : start + batch_size]
            settings = {}
            if c.classes:
                settings["conditions"] = {"labels": labels[start : start + batch_size]}
            if guidance_scale != 1:
                settings["unconditional"] = {"labels": torch.full_like(settings["conditions"]["labels"], c.classes)}
                settings |= {"guidance_scale": guidance_scale, "guidance_rescale": guidance_rescale}
            result[start : start + len(k)] = chain.sample(network, (len(k), *shape), key=k, device=k.device, **settings)
        return self._levels(result)

    @torch.no_grad()
    def denoising(self, n, *, columns=9, **options):
        """The way from noise to image, uint8 (n, columns, C, H, W): column 0 is noise, the last one what sample(n, **options) gives."""
        seen = []
        last = self.sample(n, **options, batch_size=max(n, 1), callback=seen.append)
        chosen = [seen[i * len(seen) // (columns - 1)] for i in range(columns - 1)]
        return torch.stack([*(self._levels(x) for x in chosen), last], 1)

    def labels_in_turn(self, n):
        """Labels of n images that show all classes, for pictures; None for a model without."""
        c, device = self.config, self.alphas.device
        if not c.classes:
            return None
        labels = (torch.arange(n, device=device)[:, None] + torch.arange(max(c.tokens, 1), device=device)) % c.classes
        return labels if c.tokens else labels[:, 0]

    # ---- what LatentDiffusion changes

    def _diffused_shape(self):
        """(C, H, W) of what is diffused."""
        return self.config.channels, self.config.size, self.config.size

    def _clip(self):
        """The bound of |x0|, which samplers keep."""
        return 1.0

    def _levels(self, x):
        """Of what is diffused, uint8 images."""
        return ((x.clamp(-1, 1) + 1) / 2 * self.config.levels).round().to(torch.uint8)

    # ---- pieces

    def _denoising_loss(self, x0, labels, key):
        c, p, n, device = self.config, self.process, len(x0), x0.device
        for_time, for_noise, for_labels = random.split(key, 3).unbind(-2)
        timesteps = (random.uniform(for_time, (n, 1), device=device)[:, 0] * c.timesteps).long()
        labels = self._labels(labels, n, device)
        if c.classes:
            dropped = random.uniform(for_labels, (n, 1), device=device)[:, 0] < c.label_dropout
            labels = labels.masked_fill(dropped if labels.dim() == 1 else dropped[:, None], c.classes)
        x0, table = x0 * p.scale if p.scale != 1 else x0, (self.alphas, self.sigmas)
        x_t, wanted = q_sample(x0, timesteps, table, key=for_noise, target=p.target)
        prediction = p.sign * self._network(x_t, self.times[timesteps], labels)
        how = {"target": p.target, "weighting": c.weighting}
        return denoising_loss(prediction, x0, timesteps, table, wanted=wanted, **how).mean()

    def _network(self, x, t, labels=None):
        """The UNet's prediction. Its embedding of the time is made for 0..1000; ln(sigma) / 4 of "edm" is stretched."""
        return self.unet(x, t * 250 if self.process.schedule.kind == "edm" else t, labels)

    def _labels(self, labels, n, device):
        """int64 (n,) or (n, L), the number of classes standing for no label and for padding; None for a model without classes."""
        name, classes, several = type(self).__name__, self.config.classes, self.config.tokens > 0
        if not classes:
            return None
        if labels is None:
            return torch.full((n, self.config.tokens) if several else (n,), classes, device=device)
        labels = torch.as_tensor(labels, device=device)
        labels = labels if labels.dim() > several else labels.expand(n, *labels.shape)
        good = labels.dim() == 1 + several and len(labels) == n and not labels.is_floating_point()
        if not good or (several and labels.shape[1] > self.config.tokens):
            wanted = f"({n}, at most {self.config.tokens})" if several else f"({n},)"
            raise ValueError(f"{name}: labels must be integers {wanted}, got {labels.dtype} {tuple(labels.shape)}")
        if device.type == "cpu" and not torch.compiler.is_compiling() and ((labels < 0) | (labels >= classes + several)).any():
            words = f"0..{classes - 1}" + f" or {classes} for padding" * several
            raise ValueError(f"{name}: labels must be in {words}, got {int(labels.min())}..{int(labels.max())}")
        return labels.long()

    def _images(self, images):
        """Images in [-1, 1]."""
        x = 2 * ink(images, self.config.levels) - 1
        expected = (self.config.channels, self.config.size, self.config.size)
        if tuple(x.shape[1:]) != expected:
            raise ValueError(f"{type(self).__name__}: images must be (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        return x
