"""GatedPixelCNN (van den Oord et al., 2016): a vertical and a horizontal stack without a blind spot, gates, and classes.

The vertical stack sees the rows above a pixel, all of their width as the layers add up; the horizontal one the pixels to its left and,
through a 1x1 convolution before the gate, the vertical one. Both have gates tanh(a + Va h) sigmoid(b + Vb h) with h of the class.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from genkern.models._base import Training
from genkern.models.autoregressive._pixels import Levels, Pixels
from genkern.models.autoregressive._raster import RasterConv, RasterMasked, at_pixel, shifted_down
from genkern.ops import gated_activation


@dataclass
class GatedPixelCNNConfig:
    channels: int = 1
    size: int = 8  # height and width
    levels: int = 255  # uint8 images hold 0..levels
    classes: int = 0  # 0: labels are not used
    width: int = 48  # channels of either stack, a multiple of channels
    layers: int = 6
    kernel: int = 3  # of the layers after the first
    first_kernel: int = 7
    dropout: float = 0.2


class GatedPixelCNN(Pixels):
    """GatedPixelCNN(GatedPixelCNNConfig(levels=16, classes=10)): images (N, channels, size, size), uint8 or float in [-1, 1]."""

    Config = GatedPixelCNNConfig
    defaults = Training(epochs=15, batch_size=32, learning_rate=2e-3, schedule="cosine", ema=0.99)

    @classmethod
    def config_for(cls, data, **settings):
        return super().config_for(data, **{"classes": data.classes, **settings})

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.width % c.channels or c.kernel % 2 == 0 or c.first_kernel % 2 == 0:
            raise ValueError(
                "GatedPixelCNN: width must be a multiple of channels and the kernels odd, got "
                f"{c.width}, {c.kernel} and {c.first_kernel}"
            )
        self.head = Levels(c.channels, c.levels)
        self.layers = nn.ModuleList(_Layer(c, first=i == 0) for i in range(c.layers))
        masked = lambda a, b: RasterMasked(a, b, 1, mask_type="B", colors=c.channels)
        self.last = nn.ModuleList([masked(c.width, 2 * c.width), masked(2 * c.width, self.head.outputs)])
        if c.classes:
            self.label = nn.Embedding(c.classes, 4 * c.width * c.layers)

    def condition(self, labels):
        """For each layer (of the vertical gate, of the horizontal one), (N, 2 width, 1, 1) each."""
        if labels is None:
            return [(None, None)] * self.config.layers
        parts = self.label(labels)[:, :, None, None].chunk(2 * self.config.layers, 1)
        return list(zip(parts[0::2], parts[1::2], strict=True))

    def vertical(self, x, condition, place):
        if place is None:
            v = shifted_down(x)
        else:
            v = x[:, :, place.row - 1 : place.row] if place.row else x.new_zeros(*x.shape[:2], 1, x.shape[3])
        links = []
        for layer, (for_rows, _) in zip(self.layers, condition, strict=True):
            raw = layer.vertical(v, place)
            links.append(layer.link(raw))
            v = gated_activation(raw, for_rows)
        return links

    def horizontal(self, x, features, condition, place):
        c, h = self.config, x
        for i, (layer, link, (_, for_pixels)) in enumerate(zip(self.layers, features, condition, strict=True)):
            raw = layer.horizontal(h, place)
            if place is not None:
                link, for_pixels = link[:, :, 0, place.column], at_pixel(for_pixels)
            y = layer.out(gated_activation(raw + link, for_pixels, colors=c.channels), place)
            h = F.dropout(y, c.dropout, self.training) + h if i else y
        for conv in self.last:
            h = conv(F.relu(h), place)
        return h


class _Layer(nn.Module):
    def __init__(self, c, first):
        super().__init__()
        channels, side = (c.channels, c.first_kernel // 2) if first else (c.width, c.kernel // 2)
        masked = lambda a, b, kernel, kind: RasterMasked(a, b, kernel, mask_type=kind, colors=c.channels)
        # the rows of the vertical stack are shifted: its row i is the image's i - 1
        self.vertical = RasterConv(channels, 2 * c.width, above=side, left=side, right=side)
        self.link = nn.Conv2d(2 * c.width, 2 * c.width, 1)
        self.horizontal = masked(channels, 2 * c.width, (1, 2 * side + 1), "A" if first else "B")
        self.out = masked(c.width, c.width, 1, "B")
