"""IWAE: a VAE trained on the importance-weighted bound (Burda et al., 2016)."""

from dataclasses import dataclass

from genkern import random
from genkern.models._base import Output
from genkern.models.vae.vae import VAE, VAEConfig


@dataclass
class IWAEConfig(VAEConfig):
    samples: int = 5  # per image; with 1 the bound is the ELBO
    recompute: bool = False  # keep the decoder's activations of one sample, not of all, and decode twice


class IWAE(VAE):
    """loss = -E log 1/K sum_k p(x, z_k) / q(z_k|x), z_k ~ q(z|x): tighter with every sample, log p(x) in the limit."""

    Config = IWAEConfig

    def forward(self, batch, *, key=None, generator=None, **conditions):
        """.loss: minus the bound, the mean over the batch, nats per image; no parts. key (2,) or (N, 2)."""
        key = random.draw_key(generator, batch.device) if key is None else key
        c, x = self.config, self._images(batch)
        return Output(-self._importance_bound(x, c.samples, key, recompute=c.recompute, **conditions).mean(), {})
