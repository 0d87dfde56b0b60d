"""Ops: functions on tensors, one file each, on every backend."""

from genkern.ops.autoregressive._causal_conv1d import causal_conv1d, causal_conv1d_update
from genkern.ops.autoregressive._discretized_mix_logistic import (
    discretized_mix_logistic_cdf,
    discretized_mix_logistic_nll,
    discretized_mix_logistic_sample,
)
from genkern.ops.autoregressive._gated_activation import gated_activation
from genkern.ops.autoregressive._gaussian_mixture import gaussian_mixture_nll, gaussian_mixture_sample
from genkern.ops.autoregressive._masked_conv2d import masked_conv2d
from genkern.ops.autoregressive._mu_law import mu_law_decode, mu_law_encode
from genkern.ops.autoregressive._sample_tokens import sample_tokens
from genkern.ops.diffusion._denoising_loss import denoising_loss
from genkern.ops.diffusion._group_norm_act import group_norm_act
from genkern.ops.diffusion._q_sample import q_sample
from genkern.ops.diffusion._sampler_step import dynamic_threshold, sampler_step
from genkern.ops.diffusion._sampler_step_moments import guidance_moments
from genkern.ops.diffusion._timestep_embedding import timestep_embedding
from genkern.ops.flow._actnorm import actnorm
from genkern.ops.flow._affine_coupling import additive_coupling, affine_coupling, affine_coupling_
from genkern.ops.flow._dequantize import dequantize
from genkern.ops.flow._gaussian_log_prob import gaussian_log_prob
from genkern.ops.flow._invertible_conv1x1 import invertible_conv1x1, plu_factors, plu_weight
from genkern.ops.flow._lu_linear import lu_linear
from genkern.ops.flow._made import made_inverse, made_masks, masked_linear
from genkern.ops.flow._rational_quadratic_spline import rational_quadratic_spline
from genkern.ops.flow._rational_quadratic_spline_coupling import rational_quadratic_spline_coupling
from genkern.ops.flow._squeeze import squeeze, unsqueeze
from genkern.ops.vae._gaussian_kl import gaussian_kl
from genkern.ops.vae._likelihood import bernoulli_nll, discretized_logistic_nll, gaussian_nll
from genkern.ops.vae._log_importance_weight import log_importance_weight
from genkern.ops.vae._reparameterize import reparameterize, reparameterize_kl
from genkern.ops.vae._total_correlation import total_correlation

__all__ = [
    "actnorm",
    "additive_coupling",
    "affine_coupling",
    "affine_coupling_",
    "bernoulli_nll",
    "causal_conv1d",
    "causal_conv1d_update",
    "denoising_loss",
    "dequantize",
    "discretized_logistic_nll",
    "discretized_mix_logistic_cdf",
    "discretized_mix_logistic_nll",
    "discretized_mix_logistic_sample",
    "dynamic_threshold",
    "gated_activation",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_mixture_nll",
    "gaussian_mixture_sample",
    "gaussian_nll",
    "group_norm_act",
    "guidance_moments",
    "invertible_conv1x1",
    "log_importance_weight",
    "lu_linear",
    "made_inverse",
    "made_masks",
    "masked_conv2d",
    "masked_linear",
    "mu_law_decode",
    "mu_law_encode",
    "plu_factors",
    "plu_weight",
    "q_sample",
    "rational_quadratic_spline",
    "rational_quadratic_spline_coupling",
    "reparameterize",
    "reparameterize_kl",
    "sample_tokens",
    "sampler_step",
    "squeeze",
    "timestep_embedding",
    "total_correlation",
    "unsqueeze",
]
