"""DCGAN: a GAN of convolutions (Radford et al., 2016)."""

from dataclasses import dataclass

from genkern.models._base import Training
from genkern.models.gan.gan import GAN, GANConfig


@dataclass
class DCGANConfig(GANConfig):
    network: str = "conv"
    norm: str = "batch"


class DCGAN(GAN):
    """DCGAN(DCGANConfig(levels=16)): as GAN; strided and transposed convolutions, batch norm in the generator.

    The discriminator has R1 in place of the paper's batch norm, which mixes the images that the penalty takes apart; r1=0 with
    critic_norm="batch" is that of the paper, and r1=0 with spectral_norm=True that of Miyato et al. (2018).
    """

    Config = DCGANConfig
    defaults = Training(epochs=60, batch_size=64, learning_rate=2e-3, ema=0.995)
