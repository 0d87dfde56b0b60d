"""BetaVAE: a weight on the divergence, or a capacity it is held at (Higgins et al., 2017; Burgess et al., 2018)."""

from dataclasses import dataclass

import torch

from genkern.models.vae.vae import VAE, VAEConfig


@dataclass
class BetaVAEConfig(VAEConfig):
    beta: float = 4.0
    capacity: float | None = None  # nats at the end of the annealing; None: a fixed beta
    capacity_steps: int = 1000  # training steps over which the capacity grows from zero


class BetaVAE(VAE):
    """loss = nll + beta kl; with a capacity, nll + beta |kl - C|, C growing linearly to it (Burgess et al., 2018, equation 8).

    A large beta is for large images: on 8 x 8 digits, where a VAE's kl is 3.7 nats, beta 4 leaves nothing in the latent, while
    capacity 5 keeps 4 nats.
    """

    Config = BetaVAEConfig

    def __init__(self, config):
        super().__init__(config)
        if config.capacity is not None and not (config.capacity >= 0 and config.capacity_steps >= 1):
            raise ValueError(f"BetaVAE: needs capacity >= 0 and capacity_steps >= 1, got {config.capacity}, {config.capacity_steps}")
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # training steps so far

    def _objective(self, nll, kl):
        if self.config.capacity is None:
            return nll + self.config.beta * kl
        reached = self.config.capacity * (self.steps / self.config.capacity_steps).clamp(max=1)
        if self.training:
            self.steps += 1
        return nll + self.config.beta * (kl - reached).abs()
