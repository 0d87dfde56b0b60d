"""total_correlation: exact on a whole data set, unbiased in its density, telescoping; published code's misplaced weight; refusals."""

import itertools
import math

import pytest
import torch

import genkern
from genkern.ops import total_correlation
from genkern.ops.vae._total_correlation import minibatch_weights
from genkern.testing import backends

each_backend = pytest.mark.parametrize("backend", ("reference", *backends(op="total_correlation")))
each_sampling = pytest.mark.parametrize("sampling", ("stratified", "weighted"))


def latents(n, d=3):
    generator = torch.Generator().manual_seed(5)
    mu, log_var = (torch.randn(n, d, generator=generator) for _ in range(2))
    return mu + (log_var / 2).exp() * torch.randn(n, d, generator=generator), mu, log_var


def densities(z, mu, log_var):
    """q(z_i|x_j) (n, n), and of each dimension alone (n, n, d), by torch.distributions in float64."""
    q = torch.distributions.Normal(mu.double(), (log_var.double() / 2).exp()).log_prob(z.double().unsqueeze(1))
    return q.sum(2), q


@each_backend
@each_sampling
def test_parts_on_the_whole_data_set(backend, sampling):
    z, mu, log_var = latents(9)
    joint, each = densities(z, mu, log_var)
    posterior, prior = joint.diagonal(), torch.distributions.Normal(0.0, 1.0).log_prob(z.double()).sum(1)
    low = math.log(9) if sampling == "weighted" else 0.0  # equation 4 divides by N once more: a bound from below
    aggregate, marginals = joint.exp().mean(1).log() - low, (each.exp().mean(1).log() - low).sum(1)
    with genkern.backend(backend):
        got = total_correlation(z, mu, log_var, dataset_size=9, sampling=sampling)
    expected = posterior - aggregate, aggregate - marginals, marginals - prior
    for part, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(part.double(), truth, rtol=1e-5, atol=1e-5)


@each_backend
@each_sampling
def test_the_decomposition_telescopes(backend, sampling):
    z, mu, log_var = latents(21)
    with genkern.backend(backend):
        parts = total_correlation(z, mu, log_var, dataset_size=5000, sampling=sampling)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    expected = densities(z, mu, log_var)[0].diagonal() - prior
    torch.testing.assert_close(sum(parts).double(), expected, rtol=1e-5, atol=1e-5)


def test_stratified_density_is_unbiased_over_all_batches():
    """The mean of sum_j w_ij q(z_i|x_j) over every batch that holds sample i is q(z_i): here for 3 of 6, one by one."""
    z, mu, log_var = latents(6)
    q = densities(z, mu, log_var)[0].exp()
    estimates = {i: [] for i in range(6)}
    for batch in itertools.combinations(range(6), 3):
        at = list(batch)
        parts = total_correlation(z[at].double(), mu[at].double(), log_var[at].double(), dataset_size=6)
        for i, index_code in zip(batch, parts[0], strict=True):
            estimates[i].append(q[i, i].item() * math.exp(-index_code.item()))
    for i, seen in estimates.items():
        assert sum(seen) / len(seen) == pytest.approx(q[i].mean().item(), rel=1e-6)


@each_backend
def test_the_sample_itself_weighs_one_part_of_the_data_set(backend):
    """Published code sets W.view(-1)[::M + 1] with M + 1 the batch, which is column 0 and not the diagonal.

    With posteriors that do not overlap only the sample itself counts, so log q(z) = log q(z|x) - log N for every sample. With the
    misplaced weight that held for the first alone.
    """
    n, size = 6, 1000
    mu = 1000.0 * torch.arange(n).unsqueeze(1).expand(n, 2)
    with genkern.backend(backend):
        index_code = total_correlation(mu.contiguous(), mu.contiguous(), torch.zeros(n, 2), dataset_size=size)[0]
    torch.testing.assert_close(index_code, torch.full((n,), math.log(size)))
    misplaced = torch.full((n, n), 1 / (n - 1))
    misplaced.view(-1)[::n] = 1 / size
    assert (misplaced.diagonal()[1:] != 1 / size).all()  # the trap is what it is said to be


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (2, 2), (2, 50), (7, 7), (7, 1000)])
def test_stratified_weights_sum_to_one(batch, size):
    own, other = minibatch_weights(batch, size)
    assert math.exp(own) == pytest.approx(1 / size)
    assert math.exp(own) + (batch - 1) * math.exp(other) == pytest.approx(1)


@each_backend
def test_far_and_narrow_posteriors_stay_finite(backend):
    mu = torch.tensor([[0.0], [1e4], [-1e4]]).requires_grad_()
    log_var = torch.tensor([[-20.0], [20.0], [0.0]]).requires_grad_()
    with genkern.backend(backend):
        parts = total_correlation(mu.detach() + 1e-5, mu, log_var, dataset_size=100)
        gradients = torch.autograd.grad(sum(p.sum() for p in parts), (mu, log_var))
    assert all(x.isfinite().all() for x in (*parts, *gradients))


def test_refusals():
    x = torch.zeros(4, 3)
    for call, error, words in (
        (lambda: total_correlation(x.long(), x, x, dataset_size=9), TypeError, "z must be floating point"),
        (lambda: total_correlation(x[0], x, x, dataset_size=9), ValueError, "2 dimensions"),
        (lambda: total_correlation(x, x[:2], x, dataset_size=9), ValueError, "mu must have the shape of z"),
        (lambda: total_correlation(x, x, x, dataset_size=3), ValueError, "at least the batch, 4, got 3"),
        (lambda: total_correlation(x, x, x, dataset_size=9.0), ValueError, "dataset_size must be an int"),
        (lambda: total_correlation(x, x, x, dataset_size=9, sampling="mss"), ValueError, "one of 'stratified', 'weighted'"),
    ):
        with pytest.raises(error, match=words):
            call()
