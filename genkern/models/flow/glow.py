"""Glow: flows of actnorm, an invertible 1 x 1 convolution and an affine coupling, over several scales (Kingma & Dhariwal, 2018).

A level squeezes 2 x 2 pixels into channels, then repeats `steps` times

    x <- exp(a) x + b           per channel, set by the first batch
    x <- W x                    at every position, W = P L U
    x2 <- (x2 + t) s            (t, s) of a network that sees x1, s = sigmoid(u + 2)

and half of the channels leaves, as z = (x2 - mean(x1)) / std(x1): the learned prior is one more coupling. So all latents are N(0, I).
"""

from dataclasses import dataclass

from torch import nn

from genkern.models._base import Training
from genkern.models.flow._flow import FlowConfig, FlowModel
from genkern.models.flow.networks import Constants, ConvNet, ZeroConv
from genkern.nn import (
    ActNorm,
    ActNormConv1x1,
    AdditiveCoupling,
    AffineCoupling,
    InvertibleConv1x1,
    InvertibleSequence,
    Squeeze,
)  # fmt: skip


@dataclass
class GlowConfig(FlowConfig):
    scales: int = 2  # levels; height and width are multiples of 2^scales
    steps: int = 6  # of each level
    width: int = 48  # hidden channels of the networks
    coupling: str = "affine"  # or "additive"
    positions: bool = True  # the networks also learn a number per position; False: as in the paper, for images of anything anywhere
    plu: bool = True  # the 1 x 1 convolutions as P L U; False: as whole matrices


class Glow(FlowModel):
    """Glow(GlowConfig(shape=(3, 32, 32), scales=3, steps=16)): images; classes=10 makes the networks and the prior depend on labels."""

    Config = GlowConfig
    defaults = Training(epochs=30, batch_size=64, learning_rate=3e-3, schedule="cosine", clip_grad_norm=100.0, warmup=50, ema=0.99)

    @classmethod
    def config_for(cls, data, **settings):
        config = super().config_for(data, **settings)
        check_images(cls.__name__, config)
        return config

    def __init__(self, config):
        super().__init__(config)
        c = config
        check_images("Glow", c)
        if c.coupling not in ("affine", "additive"):
            raise ValueError(f"Glow: coupling must be affine or additive, got {c.coupling!r}")
        self.levels, (channels, height, width) = nn.ModuleList(), c.shape
        for level in range(c.scales):
            channels, height, width = 4 * channels, height // 2, width // 2
            size = (height, width) if c.positions else None
            layers = [Squeeze()]
            for _ in range(c.steps):
                layers += [ActNormConv1x1(channels)] if c.plu else [ActNorm(channels), InvertibleConv1x1(channels, plu=False)]
                layers.append(self._coupling(channels, size))
            layers.append(learned_prior(channels, self.context, size, last=level + 1 == c.scales))
            self.levels.append(InvertibleSequence(layers, backward=c.backward))
            channels -= channels // 2

    def _coupling(self, channels, size):
        c, kept = self.config, channels // 2
        changed = channels - kept
        if c.coupling == "additive":
            return AdditiveCoupling(ConvNet(kept, changed, c.width, self.context, size), channels)
        return AffineCoupling(ConvNet(kept, 2 * changed, c.width, self.context, size), channels, scale="sigmoid", shift_first=True)


def learned_prior(channels, context, size, last):
    """The coupling that makes the channels which leave a level standard normal: given those that stay, at the end given the context."""
    changed = channels if last else channels // 2
    network = Constants(2 * changed, context) if last else ZeroConv(channels - changed, 2 * changed, size)
    return AffineCoupling(network, channels, changed, scale="soft_clip")


def check_images(name, c):
    if len(c.shape) != 3:
        raise ValueError(f"{name}: needs images (channels, height, width), got inputs of shape {tuple(c.shape)}")
    if c.scales < 1 or c.shape[1] % 2**c.scales or c.shape[2] % 2**c.scales:
        raise ValueError(f"{name}: height and width must be multiples of 2^scales = {2**c.scales}, got {c.shape[1]} x {c.shape[2]}")
