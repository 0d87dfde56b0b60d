"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.autoregressive._causal_conv import causal_conv1d, causal_conv1d_update
from genkern.ops.autoregressive._gated_activation import gated_activation
from genkern.ops.autoregressive._masked_conv import masked_conv2d
from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_activation",
    "gaussian_kl",
    "masked_conv2d",
    "reparameterize",
    "reparameterize_kl",
]
