"""reparameterize and reparameterize_kl in Triton: eps comes from the key in registers, in both directions, and is never stored."""

from genkern.core import implements
from genkern.ops.vae import _latent, _latent_triton


@implements("triton", "reparameterize")
def reparameterize(mu, log_var, key, low, high, soft):
    return _latent_triton.forward(mu, log_var, None, None, key, low, high, soft, 0.0, "")[0]


@implements("triton", "reparameterize_backward")
def reparameterize_backward(grad, mu, log_var, key, low, high, soft):
    return _latent_triton.backward(
        grad, None, mu, log_var, None, None, key, low, high, soft, 0.0, "", _latent.passes(log_var, low, high, soft)
    )


@implements("triton", "reparameterize_kl")
def reparameterize_kl(mu, log_var, prior_mu, prior_log_var, key, low, high, soft, free_bits, per_element):
    moments = mu, log_var, prior_mu, prior_log_var
    return _latent_triton.forward(*moments, key, low, high, soft, free_bits, "element" if per_element else "sum")


@implements("triton", "reparameterize_kl_backward")
def reparameterize_kl_backward(grad_z, grad_kl, mu, log_var, prior_mu, prior_log_var, key, low, high, soft, free_bits, per_element):
    moments = mu, log_var, prior_mu, prior_log_var
    kl = "element" if per_element else "sum"
    return _latent_triton.backward(grad_z, grad_kl, *moments, key, low, high, soft, free_bits, kl)
