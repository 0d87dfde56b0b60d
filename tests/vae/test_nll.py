import math

import pytest
import torch

from genkern import ops


def test_bernoulli_is_finite_and_right_for_extreme_logits():
    logits = torch.tensor([[100.0, -100.0, 80.0, 0.0]], requires_grad=True)
    nll = ops.bernoulli_nll(logits, torch.tensor([[0.0, 1.0, 1.0, 0.5]]))
    torch.testing.assert_close(nll, torch.tensor([200 + math.log(2)]))
    nll.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0, 0.0]]))


def test_gaussian_is_the_density_of_torch_distributions():
    mu, log_var, x = torch.randn(3, 4, 9)
    expected = -torch.distributions.Normal(mu, (log_var / 2).exp()).log_prob(x).sum(1)
    torch.testing.assert_close(ops.gaussian_nll(mu, log_var, x), expected)
    torch.testing.assert_close(ops.gaussian_nll(mu, None, x), ops.gaussian_nll(mu, torch.zeros_like(mu), x))


def test_one_learned_variance_gets_the_sum_of_the_gradients():
    mu, x = torch.randn(2, 4, 9)
    log_var = torch.tensor(0.3, requires_grad=True)
    ops.gaussian_nll(mu, log_var, x).sum().backward()
    expected = 0.5 * (1 - (x - mu).square() * math.exp(-0.3)).sum()
    torch.testing.assert_close(log_var.grad, expected)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x: ops.bernoulli_nll(x, x[:1]), ValueError, "x must have the shape of logits"),
        (lambda x: ops.bernoulli_nll(x, x.byte()), TypeError, "uint8"),
        (lambda x: ops.bernoulli_nll(x[0], x[0]), ValueError, "at least 2 dimensions"),
        (lambda x: ops.bernoulli_nll(x, x.clone().requires_grad_()), ValueError, "detach"),
        (lambda x: ops.gaussian_nll(x, x[:, :2], x), ValueError, "log_var must expand"),
        (lambda x: ops.gaussian_nll(x, 0.5, x), TypeError, "log_var must be a tensor"),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.ones(3, 5))
