"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._nll import bernoulli_nll, gaussian_nll
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl

__all__ = ["bernoulli_nll", "gaussian_kl", "gaussian_nll", "reparameterize", "reparameterize_kl"]
