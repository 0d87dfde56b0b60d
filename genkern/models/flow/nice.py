"""NICE: additive couplings and one scale per dimension (Dinh et al., 2015). Images are seen as rows of numbers.

x2 <- x2 + m(x1)            `couplings` times, the halves taking turns
z <- exp(s) x               s learned
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern import random
from genkern.models._base import Training
from genkern.models.flow._flow import FlowConfig, FlowModel
from genkern.models.flow.networks import MLP
from genkern.nn import ActNorm, AdditiveCoupling, Flip, InvertibleSequence, Permute

BASES = ("logistic", "gaussian")


@dataclass
class NICEConfig(FlowConfig):
    couplings: int = 4
    width: int = 128  # hidden units of the networks
    depth: int = 3  # their hidden layers
    base: str = "logistic"  # distribution of the latents, or "gaussian"


class NICE(FlowModel):
    """NICE(NICEConfig(shape=(1, 8, 8), levels=16)): images or points with at least 2 numbers."""

    Config = NICEConfig
    defaults = Training(epochs=30, batch_size=64, learning_rate=3e-3, schedule="cosine", ema=0.99)
    flat = True

    def __init__(self, config):
        super().__init__(config)
        c, n = config, self.dimensions
        if n < 2:
            raise ValueError(f"NICE: needs at least 2 dimensions, got {n}")
        if c.base not in BASES:
            raise ValueError(f"NICE: base must be one of {', '.join(BASES)}, got {c.base!r}")
        layers = [ActNorm(n), Permute(torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2)]))]  # neighbours in different halves
        for i in range(c.couplings):
            network = MLP(n // 2, n - n // 2, c.width, c.depth, self.context)
            layers += [Flip()] * (i > 0) + [AdditiveCoupling(network, n)]
        self.levels = nn.ModuleList([InvertibleSequence([*layers, ActNorm(n)], backward=c.backward)])

    def _base_log_prob(self, z):
        if self.config.base == "gaussian":
            return super()._base_log_prob(z)
        return -(F.softplus(z) + F.softplus(-z)).sum(1)  # ln of e^-z / (1 + e^-z)^2

    def _base_sample(self, keys):
        if self.config.base == "gaussian":
            return super()._base_sample(keys)
        return random.logistic(keys, (len(keys), self.dimensions), dtype=self._dtype(), device=keys.device)
