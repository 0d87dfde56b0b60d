"""Models: thin classes on the ops, one file each. Images are uint8 or float in [-1, 1], (N, C, H, W)."""

from genkern.models._base import Model, Output, load
from genkern.models.autoregressive.char_lstm import CharLSTM, CharLSTMConfig
from genkern.models.autoregressive.gpt import GPT, GPTConfig
from genkern.models.vae.vae import VAE, VAEConfig

__all__ = ["GPT", "VAE", "CharLSTM", "CharLSTMConfig", "GPTConfig", "Model", "Output", "VAEConfig", "load"]
