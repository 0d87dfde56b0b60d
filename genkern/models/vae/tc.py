"""TCVAE: a VAE that pays for correlated latents by name (Chen et al., 2018, "Isolating sources of disentanglement")."""

from dataclasses import dataclass

from genkern.models._base import Output
from genkern.models.vae.vae import VAE, VAEConfig
from genkern.ops import reparameterize_kl, total_correlation


@dataclass
class TCVAEConfig(VAEConfig):
    dataset_size: int = 60000  # training images, of which a batch is a part
    index_code: float = 1.0  # weight of the mutual information of latent and image (alpha)
    beta: float = 6.0  # weight of the total correlation
    dimensions: float = 1.0  # weight of the divergence of each dimension alone (gamma)
    sampling: str = "stratified"  # or "weighted": see genkern.ops.total_correlation


class TCVAE(VAE):
    """loss = nll + alpha index_code + beta correlation + gamma dimensions (equation 7): with all weights one, a VAE's -ELBO.

    The three parts of the divergence are estimated from each batch, so figures of different batch sizes do not compare.
    """

    Config = TCVAEConfig

    @classmethod
    def config_for(cls, data, **settings):
        return super().config_for(data, **{"dataset_size": len(data.train[0]), **settings})

    def forward(self, batch, *, key=None, generator=None, **conditions):
        """.loss as above, the mean over the batch, nats per image; .parts: nll, the analytic kl, and its three estimated parts."""
        c, x = self.config, self._images(batch)
        moments = self._moments(x, **conditions)
        z, kl = reparameterize_kl(moments, key=key, generator=generator)
        size = max(c.dataset_size, len(x))
        parts = total_correlation(z, *moments.chunk(2, 1), dataset_size=size, sampling=c.sampling)
        index_code, correlation, dimensions = (part.mean() for part in parts)
        nll = self._nll(x, z, **conditions).mean()
        loss = nll + c.index_code * index_code + c.beta * correlation + c.dimensions * dimensions
        named = {"nll": nll, "kl": kl.mean(), "index_code": index_code, "correlation": correlation, "dimensions": dimensions}
        return Output(loss, {name: value.detach() for name, value in named.items()})
