"""Models: thin classes on the ops, one file each. Images are uint8 or float in [-1, 1], (N, C, H, W)."""

from genkern.models._base import Model, Output, Training, load
from genkern.models.vae.beta import BetaVAE, BetaVAEConfig
from genkern.models.vae.conditional import ConditionalVAE, ConditionalVAEConfig
from genkern.models.vae.iwae import IWAE, IWAEConfig
from genkern.models.vae.vae import VAE, VAEConfig

__all__ = [
    "IWAE",
    "VAE",
    "BetaVAE",
    "BetaVAEConfig",
    "ConditionalVAE",
    "ConditionalVAEConfig",
    "IWAEConfig",
    "Model",
    "Output",
    "Training",
    "VAEConfig",
    "load",
]
