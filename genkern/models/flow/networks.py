"""The networks inside coupling layers. They may be anything; the last layer begins at zero, so each coupling begins as (nearly) the
identity. context (N, features), where there is one, moves the hidden units; so does a learned number per position where `size` is
given, the (height, width) of the images: what a convolution cannot know, and what counts in small images of centred things."""

import torch
import torch.nn.functional as F
from torch import nn


class ConvNet(nn.Module):
    """(N, inputs, H, W) -> (N, outputs, H, W): 3 x 3, 1 x 1 and 3 x 3 convolutions, as in Glow."""

    def __init__(self, inputs, outputs, width, context=0, size=None):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(width, *size)) if size else None
        self.second = nn.Conv2d(width, width, 1)
        self.last = _zero(nn.Conv2d(width, outputs, 3, padding=1))
        self.condition = nn.Linear(context, width) if context else None

    def forward(self, x, context=None):
        h = self.first(x) if self.position is None else self.first(x) + self.position
        if self.condition is not None:
            h = h + self.condition(context)[:, :, None, None]
        return self.last(F.relu(self.second(F.relu(h))))


class ResidualConvNet(nn.Module):
    """(N, inputs, H, W) -> (N, outputs, H, W): residual blocks of two 3 x 3 convolutions, as in RealNVP."""

    def __init__(self, inputs, outputs, width, blocks, context=0, size=None):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(width, *size)) if size else None
        self.condition = nn.Linear(context, width) if context else None
        self.blocks = nn.ModuleList(nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2)) for _ in range(blocks))
        self.last = _zero(nn.Conv2d(width, outputs, 1))

    def forward(self, x, context=None):
        h = self.first(x) if self.position is None else self.first(x) + self.position
        if self.condition is not None:
            h = h + self.condition(context)[:, :, None, None]
        for one, two in self.blocks:
            h = h + two(F.relu(one(F.relu(h))))
        return self.last(F.relu(h))


class MLP(nn.Module):
    """(N, inputs) -> (N, outputs): `depth` hidden layers."""

    def __init__(self, inputs, outputs, width, depth=2, context=0):
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.condition = nn.Linear(context, width) if context else None
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(depth - 1))
        self.last = _zero(nn.Linear(width, outputs))

    def forward(self, x, context=None):
        h = self.first(x)
        if self.condition is not None:
            h = h + self.condition(context)
        for layer in self.hidden:
            h = layer(F.relu(h))
        return self.last(F.relu(h))


class ZeroConv(nn.Conv2d):
    """A 3 x 3 convolution that begins at zero: a learned prior of the channels that leave given those that stay."""

    def __init__(self, inputs, outputs, size=None):
        super().__init__(inputs, outputs, 3, padding=1)
        self.position = nn.Parameter(torch.zeros(outputs, *size)) if size else None
        _zero(self)

    def forward(self, x, context=None):
        return super().forward(x) if self.position is None else super().forward(x) + self.position


class Constants(nn.Module):
    """Numbers per channel that depend on the context alone, at first zero: a learned prior, of each class where there are classes."""

    def __init__(self, outputs, context=0):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.condition = _zero(nn.Linear(context, outputs)) if context else None

    def forward(self, seen, context=None):
        """seen (N, 0, ...) -> (N, outputs, ...)"""
        h = self.bias.expand(len(seen), -1)
        if self.condition is not None:
            h = h + self.condition(context)
        return h.reshape(*h.shape, *[1] * (seen.dim() - 2)).expand(-1, -1, *seen.shape[2:])


def _zero(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
