"""WGAN: a critic that estimates the Wasserstein distance, its weights clipped (Arjovsky et al., 2017)."""

from dataclasses import dataclass

import torch

from genkern.models._base import Training
from genkern.models.gan.gan import GAN, GANConfig


@dataclass
class WGANConfig(GANConfig):
    network: str = "conv"
    norm: str = "group"
    critic_norm: str = "group"
    loss: str = "wasserstein"
    r1: float = 0.0
    critic_steps: int = 2
    clip: float = 0.1  # the critic's weights lie in [-clip, clip]


class WGAN(GAN):
    """WGAN(WGANConfig(levels=16)): as GAN.

    The critic's loss is -(mean score of real images - mean score of generated ones); with clipped weights that difference is at most
    a constant times the Wasserstein distance of the two distributions, and training makes it as large as it gets. RMSprop, no momentum.
    The paper's critic takes five steps to one of the generator; in the time of a short training two of them gave better images.
    """

    Config = WGANConfig
    defaults = Training(epochs=90, batch_size=64, learning_rate=1e-3, ema=0.995)

    def __init__(self, config):
        super().__init__(config)
        if config.loss != "wasserstein":
            raise ValueError(f"WGAN: loss must be wasserstein, got {config.loss!r}; the clipped critic is no classifier")
        if not config.clip > 0:
            raise ValueError(f"WGAN: clip must be positive, got {config.clip}")
        self._clip()

    def optimizer(self, parameters, training):
        optimizer = torch.optim.RMSprop(parameters, training.learning_rate, weight_decay=training.weight_decay)
        optimizer.register_step_post_hook(lambda *_: self._clip())
        return optimizer

    @torch.no_grad()
    def _clip(self):
        for p in self.discriminator.parameters():
            p.clamp_(-self.config.clip, self.config.clip)

    def _check_lipschitz(self):
        """Clipping sees to it."""
