"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.diffusion._sampler_step import sampler_step
from genkern.ops.diffusion._sampler_step_moments import guidance_moments
from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl

__all__ = ["gaussian_kl", "guidance_moments", "reparameterize", "reparameterize_kl", "sampler_step"]
