"""DCGAN: a GAN of convolutions (Radford et al., 2016)."""

from dataclasses import dataclass

from genkern.models._base import Training
from genkern.models.gan.gan import GAN, GANConfig


@dataclass
class DCGANConfig(GANConfig):
    network: str = "conv"
    norm: str = "batch"
    spectral_norm: bool = True


class DCGAN(GAN):
    """DCGAN(DCGANConfig(levels=16)): as GAN; strided and transposed convolutions, batch norm in the generator.

    The discriminator has the spectral norm of Miyato et al. (2018), which came after the paper and made such networks stable; with
    spectral_norm=False and critic_norm="batch" it is that of the paper.
    """

    Config = DCGANConfig
    defaults = Training(epochs=100, batch_size=64, learning_rate=2e-4, ema=0.995)
