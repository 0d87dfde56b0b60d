"""ConditionalVAE: a VAE whose encoder and decoder see a label (Sohn et al., 2015)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern.models._base import class_labels
from genkern.models.vae.vae import VAE, VAEConfig


@dataclass
class ConditionalVAEConfig(VAEConfig):
    classes: int = 10  # labels are 0..classes - 1


class ConditionalVAE(VAE):
    """ConditionalVAE(ConditionalVAEConfig(levels=16)): as VAE, every call with labels (N,) or one for all, integers in 0..classes - 1.

    The encoder sees a learned image of the label added to the input, the decoder the label as ones and zeros behind the latent.
    """

    Config = ConditionalVAEConfig
    conditions = ("labels",)

    @classmethod
    def config_for(cls, data, **settings):
        if not data.classes:
            raise ValueError(f"{cls.__name__}: needs labels, and {data.name} has none")
        return super().config_for(data, **{"classes": data.classes, **settings})

    def __init__(self, config):
        super().__init__(config)
        self.label_image = nn.Embedding(config.classes, config.channels * config.size**2)

    def traverse(self, z=None, *, labels=0, **options):
        """As VAE.traverse, of one label, an int or (1,)."""
        return super().traverse(z, labels=self._checked(labels, 1), **options)

    def _code_size(self):
        return self.config.latent + self.config.classes

    def _moments(self, x, *, labels=None):
        return self.encoder(x + self.label_image(self._checked(labels, len(x))).view(x.shape))

    def _code(self, z, *, labels=None):
        labels = self._checked(labels, len(z))
        return torch.cat([z, F.one_hot(labels, self.config.classes).to(z.dtype)], 1)

    def _checked(self, labels, n):
        return class_labels(type(self).__name__, labels, n, self.config.classes, next(self.parameters()).device)
