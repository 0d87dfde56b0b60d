"""Ops in Triton: streams, repeatability, empty tensors. Values, gradients and layouts of every case: tests/test_every_op.py."""

import numpy as np
import philox_oracle
import pytest
import torch

import genkern
from genkern import ops, random

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("shape", [(4, 1), (3, 37), (2, 1100), (2, 3, 5, 7), (5, 8)])
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_noise_has_the_bits_of_the_stream(shape, per_sample, dtype):
    """Also where a row does not begin on a counter's boundary."""
    key = random.split(random.key(5), shape[0]) if per_sample else random.key(5)
    n = int(np.prod(shape))
    if per_sample:
        expected = np.stack([philox_oracle.normal(k, n // shape[0], dtype) for k in key.tolist()])
    else:
        expected = philox_oracle.normal((5, 0), n, dtype)
    zero = torch.zeros(shape, dtype=torch.from_numpy(expected).dtype)
    halves = torch.zeros(shape[0], 2 * shape[1], *shape[2:], dtype=zero.dtype)
    for z in (
        ops.reparameterize(zero, zero, key=key),
        ops.reparameterize_kl(zero, zero, key=key)[0],
        ops.reparameterize(halves, key=key),
    ):
        np.testing.assert_array_equal(z.numpy().reshape(-1), expected.reshape(-1))


def test_moments_are_read_in_place():
    both = torch.randn(3, 8, 5)
    mu, log_var = both.chunk(2, 1)
    for f in (lambda *m: ops.reparameterize(*m, key=random.key(1)), ops.gaussian_kl):
        assert torch.equal(f(both), f(mu.contiguous(), log_var.contiguous()))
        assert torch.equal(f(both), f(mu, log_var))


def test_row_sums_are_deterministic_and_accurate():
    mu, log_var = torch.randn(2, 9000), torch.randn(2, 9000)
    first = ops.gaussian_kl(mu, log_var)
    assert torch.equal(first, ops.gaussian_kl(mu, log_var))
    with genkern.backend("reference"):
        torch.testing.assert_close(first.double(), ops.gaussian_kl(mu.double(), log_var.double()), rtol=3e-7, atol=0)


def test_gradient_of_one_output_alone():
    for pick in (0, 1):
        grads = []
        for backend in ("triton", "reference"):
            mu, log_var = (torch.linspace(-1, 1, 74).reshape(2, 37).requires_grad_() for _ in range(2))
            with genkern.backend(backend):
                ops.reparameterize_kl(mu, log_var, key=random.key(2))[pick].sum().backward()
            grads.append((mu.grad, log_var.grad))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_empty():
    for shape in ((0, 4), (3, 0)):
        mu = torch.zeros(shape, requires_grad=True)
        z, kl = ops.reparameterize_kl(mu, mu, key=random.key(1))
        assert z.shape == shape and kl.tolist() == [0.0] * shape[0]
        (z.sum() + kl.sum()).backward()
        assert mu.grad.shape == shape


def test_calls_are_counted_as_triton():
    genkern.reset_stats()
    mu = torch.randn(2, 8, requires_grad=True)
    ops.reparameterize(mu, mu, key=random.key(1)).sum().backward()
    assert genkern.stats() == {("reparameterize", "triton"): 1, ("reparameterize_backward", "triton"): 1}
