"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.autoregressive._causal_conv import causal_conv1d, causal_conv1d_update
from genkern.ops.diffusion._group_norm_act import group_norm_act
from genkern.ops.diffusion._sampler_step import sampler_step
from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "gaussian_kl",
    "group_norm_act",
    "reparameterize",
    "reparameterize_kl",
    "sampler_step",
]
