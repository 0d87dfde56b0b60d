"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.autoregressive._sample_tokens import sample_tokens
from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl

__all__ = ["gaussian_kl", "reparameterize", "reparameterize_kl", "sample_tokens"]
