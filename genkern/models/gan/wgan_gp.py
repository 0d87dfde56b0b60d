"""WGANGP: a critic that estimates the Wasserstein distance, its slope kept near 1 (Gulrajani et al., 2017)."""

from dataclasses import dataclass

from genkern.models._base import Training
from genkern.models.gan.gan import GAN, GANConfig


@dataclass
class WGANGPConfig(GANConfig):
    network: str = "conv"
    norm: str = "group"
    critic_norm: str = "group"
    loss: str = "wasserstein"
    r1: float = 0.0
    gradient_penalty: float = 10.0
    critic_steps: int = 5


class WGANGP(GAN):
    """WGANGP(WGANGPConfig(levels=16)): as GAN, with 10 E (|grad critic| - 1)^2 between real and generated images in the critic's loss.

    The critic's group norm is genkern's fused op, which the penalty differentiates twice.
    """

    Config = WGANGPConfig
    defaults = Training(epochs=80, batch_size=64, learning_rate=5e-4, ema=0.995)
    betas = (0.0, 0.9)
