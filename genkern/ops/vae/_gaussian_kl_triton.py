"""gaussian_kl in Triton."""

from genkern.core import implements
from genkern.ops.vae import _latent_triton


def _mode(per_element):
    return "element" if per_element else "sum"


@implements("triton", "gaussian_kl")
def gaussian_kl(mu, log_var, prior_mu, prior_log_var, low, high, soft, free_bits, per_element):
    moments = mu, log_var, prior_mu, prior_log_var
    return _latent_triton.forward(*moments, None, low, high, soft, free_bits, _mode(per_element))[1]


@implements("triton", "gaussian_kl_backward")
def gaussian_kl_backward(grad, mu, log_var, prior_mu, prior_log_var, low, high, soft, free_bits, per_element):
    moments = mu, log_var, prior_mu, prior_log_var
    return _latent_triton.backward(None, grad, *moments, None, low, high, soft, free_bits, _mode(per_element))
