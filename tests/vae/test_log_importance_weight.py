"""log_importance_weight against torch.distributions, its running sum against a stack, its edges and refusals."""

import math

import pytest
import torch

import genkern
from genkern.ops import log_importance_weight
from genkern.testing import backends

each_backend = pytest.mark.parametrize("backend", ("reference", *backends(op="log_importance_weight")))


@each_backend
def test_densities_are_those_of_torch_distributions(backend):
    mu, log_var, nll = torch.randn(4, 3, 2), torch.randn(4, 3, 2), torch.rand(4) * 50
    z = mu + (log_var / 2).exp() * torch.randn(4, 3, 2)
    prior, posterior = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(mu, (log_var / 2).exp())
    expected = -nll + (prior.log_prob(z) - posterior.log_prob(z)).sum((1, 2))
    with genkern.backend(backend):
        torch.testing.assert_close(log_importance_weight(nll, z, mu, log_var), expected)
        torch.testing.assert_close(log_importance_weight(nll, z, torch.cat([mu, log_var], 1)), expected)


@each_backend
def test_running_sum_is_the_logsumexp_of_the_stack(backend):
    """Weights thousands of nats apart; the gradient is the softmax. A sum near 5000 rounds by 2^-12 in float32."""
    torch.manual_seed(0)
    log_ws = (torch.randn(6, 5) * torch.tensor([1.0, 3, 10, 100, 1000]) - 5000).requires_grad_()
    zero, log_sum = torch.zeros(5, 2), None
    with genkern.backend(backend):
        for log_w in log_ws:
            log_sum = log_importance_weight(-log_w, zero, zero, zero, log_sum=log_sum)
        (got,) = torch.autograd.grad(log_sum.sum(), log_ws)
    torch.testing.assert_close(log_sum, log_ws.logsumexp(0))
    torch.testing.assert_close(got, log_ws.softmax(0), rtol=6 * 2**-12, atol=1e-6)


@each_backend
def test_infinities_and_nan(backend):
    zero, inf = torch.zeros(6, 1), math.inf
    nll = torch.tensor([2.0, inf, inf, 0.0, math.nan, -inf])
    log_sum = torch.tensor([-inf, 1.0, -inf, 0.0, 0.0, inf])
    with genkern.backend(backend):
        got = log_importance_weight(nll, zero, zero, zero, log_sum=log_sum)
    torch.testing.assert_close(got, torch.tensor([-2.0, 1.0, -inf, math.log(2), math.nan, inf]), equal_nan=True)


def test_refusals():
    x, n = torch.zeros(2, 3), torch.zeros(2)
    for call, error, words in (
        (lambda: log_importance_weight(n, x.long(), x, x), TypeError, "z must be floating point"),
        (lambda: log_importance_weight(n, x[:, :2], x, x), ValueError, "z must have shape that of mu"),
        (lambda: log_importance_weight(x, x, x, x), ValueError, r"nll must have shape \(N,\)"),
        (lambda: log_importance_weight(None, x, x, x), TypeError, "nll must be a tensor"),
        (lambda: log_importance_weight(n, x, x, x, log_sum=torch.zeros(3)), ValueError, "log_sum"),
        (lambda: log_importance_weight(n, x, x), ValueError, "both moments"),
    ):
        with pytest.raises(error, match=words):
            call()
