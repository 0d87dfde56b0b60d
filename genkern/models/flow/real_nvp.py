"""RealNVP: affine couplings with checkerboard and channel masks over several scales (Dinh et al., 2017).

At each scale three couplings with a checkerboard mask, a squeeze of 2 x 2 pixels into channels and three couplings of halves of the
channels; then half of the channels leaves. The last scale is four checkerboard couplings. Points: couplings of halves in turns.
"""

from dataclasses import dataclass

import torch
from torch import nn

from genkern.models._base import Training
from genkern.models.flow._flow import FlowConfig, FlowModel
from genkern.models.flow.networks import MLP, ResidualConvNet
from genkern.nn import ActNorm, AffineCoupling, Flip, InvertibleSequence, Squeeze

SCALE = {"scale": "tanh", "learned_limit": True}


@dataclass
class RealNVPConfig(FlowConfig):
    scales: int = 2  # of images; height and width are multiples of 2^(scales - 1)
    couplings: int = 6  # of points
    width: int = 32  # hidden channels of the networks (units for points)
    positions: bool = True  # the networks of images also learn a number per position
    blocks: int = 2  # residual blocks of the networks (hidden layers for points)


class RealNVP(FlowModel):
    """RealNVP(RealNVPConfig(shape=(1, 8, 8), levels=16)): images, or points with at least 2 features. s = exp(l tanh(u)), l
    learned, one per changed channel, and an actnorm before each coupling where the paper has batch normalization: it works on any batch
    and is the same in evaluation."""

    Config = RealNVPConfig
    defaults = Training(epochs=30, batch_size=64, learning_rate=2e-3, schedule="cosine", clip_grad_norm=100.0, ema=0.99)

    @classmethod
    def config_for(cls, data, **settings):
        return super().config_for(data, **({"width": 64} if len(data.shape) == 1 else {}) | settings)

    def __init__(self, config):
        super().__init__(config)
        c = config
        if len(c.shape) == 1:
            self.levels = nn.ModuleList([InvertibleSequence(self._points(), backward=c.backward)])
            return
        channels, height, width = c.shape
        if c.scales < 1 or height % 2 ** (c.scales - 1) or width % 2 ** (c.scales - 1) or (c.scales > 1 and channels < 1):
            raise ValueError(f"RealNVP: height and width must be multiples of {2 ** (c.scales - 1)}, got {height} x {width}")
        self.levels = nn.ModuleList()
        for _ in range(c.scales - 1):
            layers = [layer for i in range(3) for layer in self._checkerboard(channels, height, width, i % 2)]
            channels, height, width = 4 * channels, height // 2, width // 2
            layers.append(Squeeze())
            for _ in range(3):
                layers += [ActNorm(channels), self._halves(channels, height, width), Flip()]
            self.levels.append(InvertibleSequence(layers, backward=c.backward))
            channels -= channels // 2
        layers = [layer for i in range(4) for layer in self._checkerboard(channels, height, width, i % 2)]
        self.levels.append(InvertibleSequence([*layers, ActNorm(channels)], backward=c.backward))

    def _checkerboard(self, channels, height, width, parity):
        mask = (torch.arange(height)[:, None] + torch.arange(width)) % 2 == parity
        network = ResidualConvNet(
            channels, 2 * channels, self.config.width, self.config.blocks, self.context, self._size(height, width)
        )
        return ActNorm(channels), AffineCoupling(network, channels, mask=mask.expand(channels, -1, -1), **SCALE)

    def _halves(self, channels, height, width):
        kept = channels // 2
        network = ResidualConvNet(
            kept, 2 * (channels - kept), self.config.width, self.config.blocks, self.context, self._size(height, width)
        )
        return AffineCoupling(network, channels, **SCALE)

    def _size(self, height, width):
        return (height, width) if self.config.positions else None

    def _points(self):
        c, n = self.config, self.dimensions
        if n < 2:
            raise ValueError(f"RealNVP: points need at least 2 features, got {n}")
        layers = []
        for _ in range(c.couplings):
            network = MLP(n // 2, 2 * (n - n // 2), c.width, c.blocks, self.context)
            layers += [ActNorm(n), AffineCoupling(network, n, **SCALE), Flip()]
        return [*layers, ActNorm(n)]
