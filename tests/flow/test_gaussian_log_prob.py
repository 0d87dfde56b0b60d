"""gaussian_log_prob: against torch.distributions, broadcasting, arguments. Everything else: tests/test_every_op.py."""

import pytest
import torch

from genkern.ops import gaussian_log_prob
from genkern.testing import Make


def test_against_torch_distributions():
    make = Make()
    x, mean, log_std = make((3, 4, 5)), make((4, 5)), make((4, 1), 0.5)
    for given in ((None, None), (mean, None), (None, log_std), (mean, log_std)):
        loc, scale = 0 if given[0] is None else mean, 1 if given[1] is None else log_std.exp()
        expected = torch.distributions.Normal(loc, scale).log_prob(x).flatten(1).sum(1)
        torch.testing.assert_close(gaussian_log_prob(x, *given), expected)


def test_gradient_of_a_broadcast_mean():
    make = Make(torch.float64)
    leaves = [t.requires_grad_() for t in (make((3, 4)), make((4,)), make(()))]
    assert torch.autograd.gradcheck(gaussian_log_prob, leaves)


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch dimension"):
        gaussian_log_prob(torch.zeros(()))
    with pytest.raises(ValueError, match="mean must broadcast"):
        gaussian_log_prob(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(TypeError, match="log_std must be a tensor"):
        gaussian_log_prob(torch.zeros(2, 3), None, 1.0)
