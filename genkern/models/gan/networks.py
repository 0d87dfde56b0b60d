"""The networks of a GAN, small and plain: this file is where fused layers will replace torch's.

A generator maps codes (N, code_size) to images in [-1, 1]; a discriminator maps images to one score each, (N,).
"""

import math

import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from genkern.nn import GroupNormAct

NETWORKS = ("mlp", "conv")
NORMS = ("none", "batch", "group")
GROUPS = 8


def generator(c, code_size):
    shape = (c.channels, c.size, c.size)
    if c.network == "mlp":
        layers = [nn.Linear(code_size, c.hidden), *_norm_act(c, c.norm, c.hidden), nn.Linear(c.hidden, c.hidden)]
        return nn.Sequential(
            *layers, *_norm_act(c, c.norm, c.hidden), nn.Linear(c.hidden, math.prod(shape)), nn.Tanh(), nn.Unflatten(1, shape)
        )
    small, wide = c.size >> c.resolutions, c.width << (c.resolutions - 1)
    layers = [nn.Linear(code_size, wide * small**2), nn.Unflatten(1, (wide, small, small)), *_norm_act(c, c.norm, wide)]
    for level in reversed(range(c.resolutions)):  # twice the size, half the channels
        last = c.width << max(0, level - 1)
        layers += [nn.ConvTranspose2d(wide, last, 4, stride=2, padding=1), *_norm_act(c, c.norm, last)]
        wide = last
    return nn.Sequential(*layers, nn.Conv2d(wide, c.channels, 3, padding=1), nn.Tanh())


class Discriminator(nn.Module):
    """score(x) = w . h(x) + b, and with labels (N,) also embedding(label) . h(x): a projection (Miyato & Koyama, 2018, equation 3)."""

    def __init__(self, c, classes=0):
        super().__init__()
        wrap = spectral_norm if c.spectral_norm else lambda layer: layer
        norm = "none" if c.spectral_norm else c.critic_norm
        if c.network == "mlp":
            layers, features = [nn.Flatten()], c.channels * c.size**2
            for _ in range(2):
                layers += [wrap(nn.Linear(features, c.hidden)), *_norm_act(c, norm, c.hidden)]
                features = c.hidden
        else:
            layers, wide = [wrap(nn.Conv2d(c.channels, c.width, 3, padding=1)), nn.SiLU()], c.width
            for level in range(c.resolutions):  # half the size, twice the channels
                following = c.width << level
                layers += [wrap(nn.Conv2d(wide, following, 4, stride=2, padding=1)), *_norm_act(c, norm, following)]
                wide = following
            layers, features = [*layers, nn.Flatten()], wide * (c.size >> c.resolutions) ** 2
        self.features = nn.Sequential(*layers)
        self.head = wrap(nn.Linear(features, 1))
        self.label = None
        if classes:
            self.label = nn.Embedding(classes, features)
            nn.init.normal_(self.label.weight, std=features**-0.5)
            self.label = wrap(self.label)

    def forward(self, x, labels=None):
        h = self.features(x)
        score = self.head(h).squeeze(1)
        if self.label is None:
            return score
        labels = torch.as_tensor(labels, device=h.device).long().expand(len(h))  # one for all, or one for each
        return score + (self.label(labels) * h).sum(1)


def _norm_act(c, norm, width):
    """The layers after a linear one of `width` channels."""
    if norm == "group":
        return [GroupNormAct(math.gcd(GROUPS, width), width)]
    batch = nn.BatchNorm1d if c.network == "mlp" else nn.BatchNorm2d
    return [*([batch(width)] if norm == "batch" else []), nn.SiLU()]
