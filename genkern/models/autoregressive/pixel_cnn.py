"""PixelCNN (van den Oord, Kalchbrenner & Kavukcuoglu, 2016): masked convolutions and a softmax over the levels of every value.

The first convolution is of type A: a value sees the pixels above, those to its left and the colours before its own. The others are of
type B and see themselves as well. A stack of such has a blind spot to the right above a pixel, which GatedPixelCNN has not.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from genkern.models._base import Training
from genkern.models.autoregressive._pixels import Levels, Pixels
from genkern.models.autoregressive._raster import RasterMasked


@dataclass
class PixelCNNConfig:
    channels: int = 1
    size: int = 8  # height and width
    levels: int = 255  # uint8 images hold 0..levels
    classes: int = 0  # 0: labels are not used
    width: int = 32  # channels within a block, twice as many between; a multiple of channels
    blocks: int = 4
    kernel: int = 3  # of the blocks
    first_kernel: int = 7
    dropout: float = 0.2


class PixelCNN(Pixels):
    """PixelCNN(PixelCNNConfig(levels=16)): images (N, channels, size, size), uint8 or float in [-1, 1]; figures in nats."""

    Config = PixelCNNConfig
    defaults = Training(epochs=30, batch_size=32, learning_rate=2e-3, schedule="cosine", ema=0.99)

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.width % c.channels:
            raise ValueError(f"PixelCNN: width must be a multiple of channels, got {c.width} and {c.channels}")
        self.head = Levels(c.channels, c.levels)
        masked = lambda a, b, kernel, kind="B": RasterMasked(a, b, kernel, mask_type=kind, colors=c.channels)
        self.first = masked(c.channels, 2 * c.width, c.first_kernel, "A")
        self.blocks = nn.ModuleList(
            nn.ModuleList([masked(2 * c.width, c.width, 1), masked(c.width, c.width, c.kernel), masked(c.width, 2 * c.width, 1)])
            for _ in range(c.blocks)
        )
        self.last = nn.ModuleList([masked(2 * c.width, 2 * c.width, 1), masked(2 * c.width, self.head.outputs, 1)])
        if c.classes:
            self.label = nn.Embedding(c.classes, 2 * c.width)

    def condition(self, labels):
        return None if labels is None else self.label(labels)[:, :, None, None]

    def vertical(self, x, condition, place):
        return None  # all in one stack

    def horizontal(self, x, features, condition, place):
        h = self.first(x, place)
        if condition is not None:
            h = h + (condition if h.dim() == 4 else condition.flatten(1))
        for block in self.blocks:
            y = h
            for conv in block:
                y = conv(F.relu(y), place)
            h = h + F.dropout(y, self.config.dropout, self.training)
        for conv in self.last:
            h = conv(F.relu(h), place)
        return h
