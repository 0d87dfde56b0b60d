"""ConditionalGAN: both networks see a label (Mirza & Osindero, 2014)."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from genkern.models._base import class_labels
from genkern.models.gan.gan import GAN, GANConfig


@dataclass
class ConditionalGANConfig(GANConfig):
    classes: int = 10  # labels are 0..classes - 1


class ConditionalGAN(GAN):
    """ConditionalGAN(ConditionalGANConfig(levels=16)): as GAN, every call with labels (N,) or one for all, integers in 0..classes - 1.

    The generator sees the label as ones and zeros behind the latent. The discriminator projects its features on a vector of the label
    (Miyato & Koyama, 2018): it scores how well image and label go together.
    """

    Config = ConditionalGANConfig
    defaults = replace(GAN.defaults, epochs=60)
    conditions = ("labels",)

    @classmethod
    def config_for(cls, data, **settings):
        if not data.classes:
            raise ValueError(f"{cls.__name__}: needs labels, and {data.name} has none")
        return super().config_for(data, **{"classes": data.classes, **settings})

    def _code(self, z, *, labels=None):
        labels = class_labels(type(self).__name__, labels, len(z), self.config.classes, z.device)
        return torch.cat([z, F.one_hot(labels, self.config.classes).to(z.dtype)], 1)
