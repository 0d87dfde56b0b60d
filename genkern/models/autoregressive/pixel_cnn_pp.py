"""PixelCNN++ (Salimans et al., 2017): shifted convolutions in two streams of a U shape, and a mixture of discretized logistics.

Stream u sees the rows above a pixel, stream ul the pixels to its left as well and u. Gated residual blocks at three resolutions go
down, then up with shortcuts. Nonlinearity: concat_elu(x) = elu([x, -x]). Weight normalisation is not a part of it here: loaded
checkpoints have theirs multiplied out.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern.models._base import Training
from genkern.models.autoregressive._pixels import Mixture, Pixels
from genkern.models.autoregressive._raster import RasterConv, Upsample, at_pixel, pointwise, shifted_down, shifted_right


@dataclass
class PixelCNNppConfig:
    channels: int = 3  # 1 or 3
    size: int = 32  # height and width, a multiple of 2^(resolutions - 1)
    levels: int = 255  # uint8 images hold 0..levels
    classes: int = 0  # 0: labels are not used
    width: int = 32  # channels of either stream; 160 as published
    blocks: int = 1  # residual blocks at each resolution and direction; 5 as published
    resolutions: int = 3
    mixtures: int = 5  # 10 as published
    dropout: float = 0.0  # 0.5 as published


class PixelCNNpp(Pixels):
    """PixelCNNpp(PixelCNNppConfig()): images (N, channels, size, size), uint8 in 0..levels or float in [-1, 1]; figures in nats."""

    Config = PixelCNNppConfig
    defaults = Training(epochs=10, batch_size=16, learning_rate=2e-3, schedule="cosine", warmup=50, clip_grad_norm=1.0, ema=0.99)

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.channels not in (1, 3) or c.resolutions < 1 or c.size % (1 << (c.resolutions - 1)):
            raise ValueError(
                f"PixelCNNpp: channels must be 1 or 3 and size a multiple of {1 << max(0, c.resolutions - 1)}, "
                f"got {c.channels} and {c.size}"
            )
        self.head = Mixture(c.channels, c.levels, c.mixtures)
        self.u_init = RasterConv(c.channels + 1, c.width, above=1, left=1, right=1)
        self.ul_init = nn.ModuleList(
            [RasterConv(c.channels + 1, c.width, left=1, right=1), RasterConv(c.channels + 1, c.width, above=1)]
        )
        self.levels = nn.ModuleList(_Resolution(c, last=i == c.resolutions - 1) for i in range(c.resolutions))
        self.out = nn.Conv2d(c.width, self.head.outputs, 1)
        if c.classes:
            blocks = sum(len(stream) for level in self.levels for stream in level.streams())
            self.label = nn.Embedding(c.classes, 2 * c.width * blocks)

    def condition(self, labels):
        """{block: (N, 2 width, 1, 1)}; {} without labels."""
        if labels is None:
            return {}
        blocks = [block for level in self.levels for stream in level.streams() for block in stream]
        return dict(zip(blocks, self.label(labels)[:, :, None, None].chunk(len(blocks), 1), strict=True))

    def vertical(self, x, condition, place):
        """{block of the ul stream: the u stream beside it}, and under "first" the part of ul that sees rows above only."""
        if place is None:
            x = _with_ones(x)
            u, first = shifted_down(self.u_init(x)), shifted_down(self.ul_init[0](x))
        elif place.row == 0:
            u = first = x.new_zeros(len(x), self.config.width, 1, x.shape[3])
        else:
            row = _with_ones(x[:, :, place.row - 1 : place.row])
            u, first = self.u_init(row, place), self.ul_init[0](row, place)
        features = {"first": first}
        self._vertical(list(self.levels), u, features, condition, place)
        return features

    def _vertical(self, levels, u, features, condition, place):
        level, shortcuts = levels[0], [u]
        for block, beside in zip(level.u_up, level.ul_up, strict=True):
            u = block(u, None, condition.get(block), place)
            features[beside] = u
            shortcuts.append(u)
        if len(levels) == 1:
            shortcuts.pop()
        else:
            y = level.u_coarser(u, place)
            if y is not None:
                y = self._vertical(levels[1:], y, features, condition, place and place.coarser())
            u = level.u_finer(y, place)
        for block, beside in zip(level.u_down, level.ul_down, strict=True):
            u = block(u, shortcuts.pop(), condition.get(block), place)
            features[beside] = u
        return u

    def horizontal(self, x, features, condition, place):
        if place is None:
            ul = features["first"] + shifted_right(self.ul_init[1](_with_ones(x)))
        else:
            ul = features["first"][:, :, 0, place.column]
            if place.column:
                left = _with_ones(x[:, :, place.row, place.column - 1])
                ul = ul + self.ul_init[1](left, place.at(place.row, place.column - 1))
        return pointwise(self.out, F.elu(self._horizontal(list(self.levels), ul, features, condition, place)))

    def _horizontal(self, levels, ul, features, condition, place):
        level, shortcuts = levels[0], [ul]
        beside = lambda block: features[block] if place is None else features[block][:, :, 0, place.column]
        for block in level.ul_up:
            ul = block(ul, beside(block), condition.get(block), place)
            shortcuts.append(ul)
        if len(levels) == 1:
            shortcuts.pop()
        else:
            y = level.ul_coarser(ul, place)
            if y is not None:
                y = self._horizontal(levels[1:], y, features, condition, place and place.coarser())
            ul = level.ul_finer(y, place)
        for block in level.ul_down:
            ul = block(ul, torch.cat([beside(block), shortcuts.pop()], 1), condition.get(block), place)
        return ul


class _Resolution(nn.Module):
    def __init__(self, c, last):
        super().__init__()
        down = c.blocks + (not last)
        stream = lambda n, **kind: nn.ModuleList(_Block(c, **kind) for _ in range(n))
        self.u_up, self.ul_up = stream(c.blocks, right=1, shortcuts=0), stream(c.blocks, right=0, shortcuts=1)
        self.u_down, self.ul_down = stream(down, right=1, shortcuts=1), stream(down, right=0, shortcuts=2)
        if not last:
            self.u_coarser = RasterConv(c.width, c.width, above=1, left=1, right=1, stride=2)
            self.ul_coarser = RasterConv(c.width, c.width, above=1, left=1, stride=2)
            self.u_finer, self.ul_finer = Upsample(c.width, c.width, 3), Upsample(c.width, c.width, 2)

    def streams(self):
        return self.u_up, self.ul_up, self.u_down, self.ul_down


class _Block(nn.Module):
    """x + a sigmoid(b) with (a, b) of two convolutions; `shortcuts` other maps are added between them through a 1x1 convolution."""

    def __init__(self, c, right, shortcuts):
        super().__init__()
        self.conv_in = RasterConv(2 * c.width, c.width, above=1, left=1, right=right)
        self.conv_out = RasterConv(2 * c.width, 2 * c.width, above=1, left=1, right=right)
        self.shortcut = nn.Conv2d(2 * shortcuts * c.width, c.width, 1) if shortcuts else None
        self.dropout = c.dropout
        with torch.no_grad():
            self.conv_out.weight.mul_(0.1)  # a block begins near the identity

    def forward(self, x, others, condition, place):
        y = self.conv_in(_concat_elu(x), place)
        if others is not None:
            y = y + pointwise(self.shortcut, _concat_elu(others))
        y = self.conv_out(F.dropout(_concat_elu(y), self.dropout, self.training), place)
        if condition is not None:
            y = y + (condition if y.dim() == 4 else at_pixel(condition))
        a, b = y.chunk(2, 1)
        return x + a * torch.sigmoid(b)


def _concat_elu(x):
    return F.elu(torch.cat([x, -x], 1))


def _with_ones(x):
    """A channel of ones tells the image from the zeros around it."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)
