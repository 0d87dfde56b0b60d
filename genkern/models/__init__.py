"""Models: thin classes on the ops, one file each. Images are uint8 or float in [-1, 1], (N, C, H, W)."""

from genkern.models._base import Model, Output, Training, load
from genkern.models.autoregressive.char_lstm import CharLSTM, CharLSTMConfig
from genkern.models.autoregressive.gated_pixel_cnn import GatedPixelCNN, GatedPixelCNNConfig
from genkern.models.autoregressive.gpt import GPT, GPTConfig
from genkern.models.autoregressive.made import MADE, MADEConfig
from genkern.models.autoregressive.pixel_cnn import PixelCNN, PixelCNNConfig
from genkern.models.autoregressive.pixel_cnn_pp import PixelCNNpp, PixelCNNppConfig
from genkern.models.autoregressive.pixel_rnn import PixelRNN, PixelRNNConfig
from genkern.models.autoregressive.wavenet import WaveNet, WaveNetConfig
from genkern.models.diffusion.ddpm import DDPM, DDPMConfig
from genkern.models.diffusion.latent import LatentDiffusion, LatentDiffusionConfig
from genkern.models.diffusion.stable_diffusion import StableDiffusion
from genkern.models.flow.glow import Glow, GlowConfig
from genkern.models.flow.maf import IAF, MAF, IAFConfig, MAFConfig
from genkern.models.flow.neural_spline_flow import NeuralSplineFlow, NeuralSplineFlowConfig
from genkern.models.flow.nice import NICE, NICEConfig
from genkern.models.flow.real_nvp import RealNVP, RealNVPConfig
from genkern.models.gan.conditional import ConditionalGAN, ConditionalGANConfig
from genkern.models.gan.dcgan import DCGAN, DCGANConfig
from genkern.models.gan.gan import GAN, GANConfig
from genkern.models.gan.wgan import WGAN, WGANConfig
from genkern.models.gan.wgan_gp import WGANGP, WGANGPConfig
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
    "GatedPixelCNN",
    "GatedPixelCNNConfig",
    "Glow",
    "GlowConfig",
    "GPT",
    "GPTConfig",
    "IAF",
    "IAFConfig",
    "IWAE",
    "IWAEConfig",
    "LatentDiffusion",
    "LatentDiffusionConfig",
    "load",
    "MADE",
    "MADEConfig",
    "MAF",
    "MAFConfig",
    "Model",
    "NeuralSplineFlow",
    "NeuralSplineFlowConfig",
    "NICE",
    "NICEConfig",
    "Output",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelCNNpp",
    "PixelCNNppConfig",
    "PixelRNN",
    "PixelRNNConfig",
    "RealNVP",
    "RealNVPConfig",
    "StableDiffusion",
    "TCVAE",
    "TCVAEConfig",
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
