"""Models: thin classes on the ops, one file each. Images are uint8 or float in [-1, 1], (N, C, H, W)."""

from genkern.models._base import Model, Output, Training, load
from genkern.models.autoregressive.char_lstm import CharLSTM, CharLSTMConfig
from genkern.models.autoregressive.gpt import GPT, GPTConfig
from genkern.models.diffusion.ddpm import DDPM, DDPMConfig
from genkern.models.vae.beta import BetaVAE, BetaVAEConfig
from genkern.models.vae.conditional import ConditionalVAE, ConditionalVAEConfig
from genkern.models.vae.iwae import IWAE, IWAEConfig
from genkern.models.vae.tc import TCVAE, TCVAEConfig
from genkern.models.vae.vae import VAE, VAEConfig

__all__ = [
    "BetaVAE",
    "BetaVAEConfig",
    "CharLSTM",
    "CharLSTMConfig",
    "ConditionalVAE",
    "ConditionalVAEConfig",
    "DDPM",
    "DDPMConfig",
    "GPT",
    "GPTConfig",
    "IWAE",
    "IWAEConfig",
    "load",
    "Model",
    "Output",
    "TCVAE",
    "TCVAEConfig",
    "Training",
    "VAE",
    "VAEConfig",
]
