"""gaussian_kl: the divergence of a diagonal Gaussian from a standard or a learned Gaussian prior."""

from genkern.core import Op
from genkern.ops.vae import _latent


def gaussian_kl(mu, log_var=None, prior_mu=None, prior_log_var=None, *, clamp=None, free_bits=0.0, reduction="sample"):
    """Kullback-Leibler divergence KL(N(mu, e^log_var) || prior) of a diagonal Gaussian latent, in nats.

    Per element 1/2 (mu^2 + e^log_var - 1 - log_var) to the standard normal (Kingma & Welling, 2014, appendix B), and with
    d = log_var - prior_log_var, 1/2 ((mu - prior_mu)^2 e^-prior_log_var + e^d - 1 - d) to a learned prior. Evaluated without
    cancellation near zero, summed in double precision.

    mu, log_var     (N, ...) mean and log-variance (twice the log standard deviation); or log_var=None and mu (N, 2C, ...) holding
                    both moments as halves of dimension 1, read in place
    prior_mu, prior_log_var
                    the same for a learned prior; None: the standard normal
    clamp           None; (low, high): log_var is clamped first, its gradient is zero outside; "soft5": 5 tanh(x / 5) on mu and on
                    the log standard deviation (NVAE, Vahdat & Kautz, 2020). The prior is not clamped
    free_bits       at least this many nats per element count, without gradient below (Kingma et al., 2016)
    reduction       "sample": (N,), "element": the shape of the latent, "total": one number

    float32, float64, bfloat16, float16, also mixed; the result is float32 (float64 if an input is). TypeError, ValueError on
    anything else. Differentiable to any order.
    """
    _latent.check_moments("gaussian_kl", mu, log_var)
    _latent.check_prior("gaussian_kl", mu, log_var, prior_mu, prior_log_var)
    low, high, soft = _latent.check_clamp("gaussian_kl", clamp)
    per_element = _latent.check_reduction("gaussian_kl", reduction, free_bits)
    tensors = _latent.same_precision((mu, log_var, prior_mu, prior_log_var))
    kl = _op(*tensors, low, high, soft, float(free_bits), per_element)
    return kl.sum() if reduction == "total" else kl


def _reference(mu, log_var, prior_mu, prior_log_var, low, high, soft, free_bits, per_element):
    mu, log_var = _latent.in_working_type(*_latent.moments(mu, log_var))
    mu, log_var = _latent.clamped(mu, log_var, low, high, soft)
    return _latent.divergence(mu, log_var, prior_mu, prior_log_var, free_bits, per_element)


_op = Op(
    "gaussian_kl",
    "(Tensor mu, Tensor? log_var, Tensor? prior_mu, Tensor? prior_log_var, float low, float high, bool soft, float free_bits, "
    "bool per_element) -> Tensor",
    reference=_reference,
    fake=lambda mu, log_var, prior_mu, prior_log_var, low, high, soft, free_bits, per_element: _latent.empty_kl(
        mu, log_var, per_element
    ),
    differentiable=("mu", "log_var", "prior_mu", "prior_log_var"),
)
