"""Models: thin classes on the ops, one file each. Images are uint8 or float in [-1, 1], (N, C, H, W)."""

from genkern.models._base import Model, Output, Training, load
from genkern.models.autoregressive.char_lstm import CharLSTM, CharLSTMConfig
from genkern.models.autoregressive.gpt import GPT, GPTConfig
from genkern.models.autoregressive.wavenet import WaveNet, WaveNetConfig
from genkern.models.diffusion.ddpm import DDPM, DDPMConfig
from genkern.models.diffusion.latent import LatentDiffusion, LatentDiffusionConfig
from genkern.models.gan.conditional import ConditionalGAN, ConditionalGANConfig
from genkern.models.gan.dcgan import DCGAN, DCGANConfig
from genkern.models.gan.gan import GAN, GANConfig
from genkern.models.gan.wgan import WGAN, WGANConfig
from genkern.models.gan.wgan_gp import WGANGP, WGANGPConfig
from genkern.models.vae.beta import BetaVAE, BetaVAEConfig
from genkern.models.vae.conditional import ConditionalVAE, ConditionalVAEConfig
from genkern.models.vae.iwae import IWAE, IWAEConfig
from genkern.models.vae.vae import VAE, VAEConfig

__all__ = [
    "BetaVAE",
    "BetaVAEConfig",
    "CharLSTM",
    "CharLSTMConfig",
    "ConditionalGAN",
    "ConditionalGANConfig",
    "ConditionalVAE",
    "ConditionalVAEConfig",
    "DCGAN",
    "DCGANConfig",
    "DDPM",
    "DDPMConfig",
    "GAN",
    "GANConfig",
    "GPT",
    "GPTConfig",
    "IWAE",
    "IWAEConfig",
    "LatentDiffusion",
    "LatentDiffusionConfig",
    "load",
    "Model",
    "Output",
    "Training",
    "VAE",
    "VAEConfig",
    "WaveNet",
    "WaveNetConfig",
    "WGAN",
    "WGANConfig",
    "WGANGP",
    "WGANGPConfig",
]
