"""ConditionalGAN: both networks see a label (Mirza & Osindero, 2014)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from genkern.models.gan.gan import GAN, GANConfig


@dataclass
class ConditionalGANConfig(GANConfig):
    classes: int = 10


class ConditionalGAN(GAN):
    """ConditionalGAN(ConditionalGANConfig(levels=16)): as GAN, every call with labels (N,), int64 in 0..classes - 1.

    The generator sees the label as ones and zeros behind the latent. The discriminator projects its features on a vector of the label
    (Miyato & Koyama, 2018): it scores how well image and label go together.
    """

    Config = ConditionalGANConfig
    conditions = ("labels",)

    @classmethod
    def config_for(cls, data, **settings):
        if not data.classes:
            raise ValueError(f"{cls.__name__}: needs labels, and {data.name} has none")
        return super().config_for(data, **{"classes": data.classes, **settings})

    def _code(self, z, *, labels):
        labels = self._checked(labels, len(z))
        return torch.cat([z, F.one_hot(labels, self.config.classes).to(z.dtype)], 1)

    def _checked(self, labels, n):
        name, classes = type(self).__name__, self.config.classes
        if not isinstance(labels, torch.Tensor) or labels.dtype != torch.int64 or labels.shape != (n,):
            got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, torch.Tensor) else repr(labels)
            raise ValueError(f"{name}: labels must be int64 ({n},), got {got}")
        if labels.device.type == "cpu" and not torch.compiler.is_compiling() and ((labels < 0) | (labels >= classes)).any():
            raise ValueError(f"{name}: labels must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
        return labels
