"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.autoregressive._discretized_mix_logistic import discretized_mix_logistic_nll, discretized_mix_logistic_sample
from genkern.ops.autoregressive._mu_law import mu_law_decode, mu_law_encode
from genkern.ops.autoregressive._sample_tokens import sample_tokens
from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl

__all__ = [
    "discretized_mix_logistic_nll",
    "discretized_mix_logistic_sample",
    "gaussian_kl",
    "mu_law_decode",
    "mu_law_encode",
    "reparameterize",
    "reparameterize_kl",
    "sample_tokens",
]
