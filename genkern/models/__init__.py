"""Models: thin classes on the ops, one file each. Images are uint8 or float in [-1, 1], (N, C, H, W)."""

from genkern.models._base import Model, Output, load
from genkern.models.diffusion.ddpm import DDPM, DDPMConfig
from genkern.models.vae.vae import VAE, VAEConfig

__all__ = ["DDPM", "VAE", "DDPMConfig", "Model", "Output", "VAEConfig", "load"]
