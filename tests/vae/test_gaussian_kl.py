"""gaussian_kl and denoising_loss of samples that are one number each."""

import pytest
import torch

import genkern
from genkern.ops import denoising_loss, gaussian_kl
from genkern.testing import backends


@pytest.mark.parametrize("backend", ("reference", *backends(op="gaussian_kl")))
@pytest.mark.parametrize("function", (gaussian_kl, lambda x, y: denoising_loss(x, wanted=y)), ids=("gaussian_kl", "denoising_loss"))
def test_samples_of_one_number(backend, function):
    """Of shape (N,): values and gradients are those of (N, 1)."""
    pair = torch.randn(2, 5, requires_grad=True).unbind()
    with genkern.backend(backend):
        flat, columns = function(*pair), function(*(x[:, None] for x in pair))
        torch.testing.assert_close(flat, columns)
        for a, b in zip(*(torch.autograd.grad(x.sum(), pair) for x in (flat, columns)), strict=True):
            torch.testing.assert_close(a, b)
