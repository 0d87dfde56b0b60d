"""The figures that a density model must beat."""

import math

import pytest
import torch

from genkern.data import Data
from genkern.metrics import Gaussian, baselines, histogram_log_prob


def made(inputs, levels):
    n = len(inputs) // 4
    parts = [(x, None) for x in (inputs[2 * n :], inputs[:n], inputs[n : 2 * n])]
    return Data("made", *parts, shape=tuple(inputs.shape[1:]), levels=levels)


def test_gaussian_points_have_the_entropy_of_their_distribution():
    torch.manual_seed(0)
    factor = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.3, -1.0, 0.1]])
    data = made(torch.randn(40000, 3) @ factor.t(), None)
    nats = 1.5 * math.log(2 * math.pi * math.e) + math.log(2.0 * 0.5 * 0.1)
    found = baselines(data)
    assert found.keys() == {"full-covariance Gaussian"}
    assert found["full-covariance Gaussian"] == pytest.approx(nats / 3 / math.log(2), abs=0.02)


def test_histogram_is_a_distribution_and_the_gaussian_a_bound():
    torch.manual_seed(0)
    x = (torch.randn(400, 2, 1) + torch.randn(400, 2, 2)).mul(2).add(8).round().clamp(0, 16).to(torch.uint8)
    data = made(x.view(400, 1, 2, 2), 16)
    one = torch.zeros(17, 1, 2, 2, dtype=torch.uint8)
    one[:, 0, 0, 0] = torch.arange(17)
    rest = histogram_log_prob(data, one)  # of the first pixel, up to a constant
    assert torch.allclose(rest.logsumexp(0), rest.new_tensor(float(histogram_log_prob(data, one[:1])) - _first(data)), atol=1e-9)
    gaussian, inputs = Gaussian(data), data.test[0]
    exact = torch.distributions.MultivariateNormal(gaussian.mean, scale_tril=gaussian._factor)
    noisy = [exact.log_prob(inputs.flatten(1).double() + torch.rand(len(inputs), 4, dtype=torch.float64) - 0.5) for _ in range(500)]
    torch.testing.assert_close(gaussian.log_prob(inputs), torch.stack(noisy).mean(0), rtol=0, atol=0.2)
    found = baselines(data)
    assert 2 < found["per-pixel histogram"] < 4.1 and found["full-covariance Gaussian"] < found["per-pixel histogram"]


def _first(data):
    counts = torch.bincount(data.train[0][:, 0, 0, 0].long(), minlength=17) + 1
    return math.log(counts[0] / counts.sum())
