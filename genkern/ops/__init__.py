"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.diffusion._denoising_loss import denoising_loss
from genkern.ops.diffusion._group_norm_act import group_norm_act
from genkern.ops.diffusion._q_sample import q_sample
from genkern.ops.diffusion._timestep_embedding import timestep_embedding
from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl

__all__ = [
    "denoising_loss",
    "gaussian_kl",
    "group_norm_act",
    "q_sample",
    "reparameterize",
    "reparameterize_kl",
    "timestep_embedding",
]
