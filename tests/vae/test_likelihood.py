"""Likelihoods against independent formulas, their tails, and their refusals."""

import math

import pytest
import torch

import genkern
from genkern.ops import bernoulli_nll, discretized_logistic_nll, gaussian_nll
from genkern.testing import backends

BACKENDS = ("reference", *backends(op="gaussian_nll"))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
def test_agrees_with_torch_distributions(backend):
    logits, mu, log_var = torch.randn(3, 4, 5, 5), torch.randn(4, 7), torch.randn(4, 7)
    bits, x = torch.bernoulli(torch.full_like(logits, 0.4)), torch.randn(4, 7)
    with genkern.backend(backend):
        got = bernoulli_nll(logits, bits)
        torch.testing.assert_close(got, -torch.distributions.Bernoulli(logits=logits).log_prob(bits).flatten(1).sum(1))
        expected = -torch.distributions.Normal(mu, (0.5 * log_var).exp()).log_prob(x).sum(1)
        torch.testing.assert_close(gaussian_nll(mu, log_var, x), expected)
        torch.testing.assert_close(gaussian_nll(mu, None, x), -torch.distributions.Normal(mu, 1.0).log_prob(x).sum(1))


@each_backend
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize(("mu", "log_scale"), [(0.1, -2.0), (-0.98, -4.0), (3.0, -1.0), (0.0, -7.0), (0.3, 2.0)])
def test_probabilities_of_all_levels_sum_to_one(backend, levels, mu, log_scale):
    x = torch.linspace(-1, 1, levels, dtype=torch.float64).reshape(-1, 1)
    with genkern.backend(backend):
        nll = discretized_logistic_nll(torch.full_like(x, mu), torch.full_like(x, log_scale), x, levels=levels)
    assert torch.exp(-nll).sum().item() == pytest.approx(1, abs=1e-12)


@each_backend
def test_far_from_the_data_the_gradient_still_points_back(backend):
    """A difference of two sigmoids is zero there, and its logarithm a constant without gradient."""
    for at in (-50.0, 50.0):
        mu = torch.full((1, 1), at, requires_grad=True)
        log_scale = torch.full((1, 1), -3.0, requires_grad=True)
        with genkern.backend(backend):
            nll = discretized_logistic_nll(mu, log_scale, torch.full((1, 1), 1 / 255))
        assert nll.item() == pytest.approx(50 * math.exp(3), rel=0.01)
        d_mu, d_log_scale = torch.autograd.grad(nll, (mu, log_scale))
        assert d_mu.item() == pytest.approx(math.copysign(math.exp(3), at), rel=1e-3)
        assert d_log_scale.item() == pytest.approx(-50 * math.exp(3), rel=0.01)


@each_backend
def test_one_learned_variance_gets_the_sum_of_the_gradients(backend):
    mu, x = torch.randn(5, 6), torch.randn(5, 6)
    log_var = torch.tensor(0.3, requires_grad=True)
    with genkern.backend(backend):
        gaussian_nll(mu, log_var, x).sum().backward()
    expected = 0.5 * (1 - (x - mu).square() * math.exp(-0.3)).sum()
    torch.testing.assert_close(log_var.grad, expected, rtol=1e-5, atol=1e-5)


@each_backend
def test_extreme_logits(backend):
    logits = torch.tensor([[1e4, -1e4, 100.0, -100.0]], requires_grad=True)
    with genkern.backend(backend):
        nll = bernoulli_nll(logits, torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
        (gradient,) = torch.autograd.grad(nll, logits)
    assert nll.item() == pytest.approx(200, abs=1e-4)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 0.0, 1.0, -1.0]]), rtol=0, atol=1e-30)


@pytest.mark.parametrize("backend", backends(op="bernoulli_nll"))
def test_small_terms_keep_their_digits(backend):
    """Pixels that are nearly certain: each term is e^-|l|, below the rounding of 1, and not lost beside l or 1."""
    size = torch.linspace(0, 80, 5)[:, None] + torch.rand(5, 1031)
    logits, x = torch.cat([size, -size]).requires_grad_(), torch.cat([torch.ones_like(size), torch.zeros_like(size)])
    with genkern.backend(backend):
        nll = bernoulli_nll(logits, x)
        (gradient,) = torch.autograd.grad(nll.sum(), logits)
    expected = torch.log1p(torch.exp(-logits.detach().double().abs())).sum(1)
    torch.testing.assert_close(nll.detach().double(), expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(gradient[5:].double(), torch.sigmoid(-size.double()), rtol=1e-6, atol=0)


def test_data_that_needs_a_gradient_gets_it():
    x = torch.full((2, 3), 0.2, requires_grad=True)
    logits = torch.randn(2, 3, requires_grad=True)
    d_logits, d_x = torch.autograd.grad(bernoulli_nll(logits, x).sum(), (logits, x))
    torch.testing.assert_close(d_x, -logits.detach())
    torch.testing.assert_close(d_logits, torch.sigmoid(logits.detach()) - 0.2)


def test_refusals():
    x = torch.zeros(2, 3)
    for call, error, words in (
        (lambda: bernoulli_nll(x.long(), x), TypeError, "logits must be floating point"),
        (lambda: bernoulli_nll(x, x[:, :2]), ValueError, "x must have the shape of logits"),
        (lambda: bernoulli_nll(torch.tensor(0.0), torch.tensor(0.0)), ValueError, "batch dimension"),
        (lambda: gaussian_nll(x, torch.zeros(4), x), ValueError, "broadcast"),
        (lambda: gaussian_nll(x, 0.0, x), TypeError, "log_var must be a tensor"),
        (lambda: discretized_logistic_nll(x, x, x, levels=1), ValueError, "levels"),
    ):
        with pytest.raises(error, match=words):
            call()
