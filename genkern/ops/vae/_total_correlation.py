"""total_correlation: the three parts of the divergence of an aggregate posterior, estimated from a minibatch."""

import math

import torch

from genkern.core import Op
from genkern.ops._common import check_choice, check_float, check_like, in_working_type
from genkern.testing._case import Case

LOG_TWO_PI = math.log(2 * math.pi)


def total_correlation(z, mu, log_var, *, dataset_size, sampling="stratified"):
    """(index_code, correlation, dimensions): the parts of E KL(q(z|x) || N(0, I)) (Chen et al., 2018, equation 2), per sample.

    With q(z) the mean of q(z|x) over the data set,

        index_code   log q(z|x) - log q(z)                  mutual information of the latent and the image's index
        correlation  log q(z) - sum_d log q(z_d)            total correlation
        dimensions   sum_d log q(z_d) - log p(z)            divergence of each dimension from the prior

    at z ~ q(z|x): they add up to log q(z|x) - log p(z) exactly, whatever the estimate of q is. From a minibatch of B of N samples,
    q(z_i) is the sum of w_ij q(z_i|x_j), the same with each dimension alone, where w_ij is

        "stratified"  1 / N for j = i, else (N - 1) / (N (B - 1)): the estimate of q(z_i) is unbiased, and exact with B = N. These
                      are the paper's weights of minibatch stratified sampling (appendix C.2) averaged over which of the other
                      samples stands last there. (Published code gives 1 / N to j = 0 instead of j = i.)
        "weighted"    1 / (N B), minibatch weighted sampling (equation 4): a lower bound of log q in expectation

    The logarithm makes every estimate biased; with q that hardly overlap, log q(z) is near log q(z|x) - log N.

    z, mu, log_var  (B, D), float32, float64, bfloat16 or float16, also mixed
    dataset_size    N, at least B. A lone sample (B = 1) counts 1 / N in both

    Returns nats (B,), three times, float32 (float64 if an input is), differentiable in z, mu and log_var to any order. On the CPU
    no (B, B, D) tensor is made. TypeError, ValueError on anything else.
    """
    check_float("total_correlation", "z", z, 2)
    check_like("total_correlation", "mu", mu, "z", z)
    check_like("total_correlation", "log_var", log_var, "z", z)
    own, other = minibatch_weights(len(z), dataset_size, sampling)
    return _op(*in_working_type(z, mu, log_var), own, other)


def minibatch_weights(batch, dataset_size, sampling="stratified"):
    """(log w_ii, log w_ij): the logarithms of the weights that total_correlation() gives a sample itself and each other one."""
    check_choice("total_correlation", "sampling", sampling, ("stratified", "weighted"))
    if isinstance(dataset_size, bool) or not isinstance(dataset_size, int) or dataset_size < max(batch, 1):
        raise ValueError(f"total_correlation: dataset_size must be an int of at least the batch, {batch}, got {dataset_size!r}")
    if sampling == "weighted":
        return (-math.log(dataset_size * max(batch, 1)),) * 2
    others = (dataset_size - 1) / (dataset_size * (batch - 1)) if batch > 1 else 1.0
    return -math.log(dataset_size), math.log(others)


def _reference(z, mu, log_var, own, other):
    log_q = -0.5 * ((z.unsqueeze(1) - mu).square() * torch.exp(-log_var) + log_var + LOG_TWO_PI)  # [i, j, d]
    diagonal = torch.eye(len(z), dtype=torch.bool, device=z.device)
    log_w = torch.full(diagonal.shape, other, dtype=z.dtype, device=z.device).masked_fill(diagonal, own)
    log_posterior = -0.5 * ((z - mu).square() * torch.exp(-log_var) + log_var + LOG_TWO_PI).sum(1)
    log_prior = -0.5 * (z.square() + LOG_TWO_PI).sum(1)
    log_aggregate = (log_w + log_q.sum(2)).logsumexp(1)
    log_marginals = (log_w.unsqueeze(2) + log_q).logsumexp(1).sum(1)
    return log_posterior - log_aggregate, log_aggregate - log_marginals, log_marginals - log_prior


_op = Op(
    "total_correlation",
    "(Tensor z, Tensor mu, Tensor log_var, float own, float other) -> (Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=lambda z, *rest: tuple(z.new_empty(z.shape[0]) for _ in range(3)),
    differentiable=("z", "mu", "log_var"),
)


def _eager(z, mu, log_var, dataset_size):
    log_q = -0.5 * ((z[:, None] - mu[None]) ** 2 / log_var.exp()[None] + log_var[None] + LOG_TWO_PI)
    own, other = minibatch_weights(len(z), dataset_size)
    log_w = torch.full((len(z), len(z)), other).fill_diagonal_(own)
    log_posterior, log_prior = log_q.diagonal().sum(0), -0.5 * (z**2 + LOG_TWO_PI).sum(1)
    log_aggregate, log_marginals = (log_w + log_q.sum(2)).logsumexp(1), (log_w[:, :, None] + log_q).logsumexp(1).sum(1)
    return log_posterior - log_aggregate, log_aggregate - log_marginals, log_marginals - log_prior


def _arguments(make, shape):
    return {"z": make(shape), "mu": make(shape), "log_var": make(shape) - 1, "dataset_size": 10 * max(shape[0], 1)}


CASES = (
    Case(
        total_correlation,
        _arguments,
        shapes=((5, 7), (2, 1), (0, 4), (3, 0), (37, 3)),
        large=(67, 11),
        variants=({}, {"sampling": "weighted"}),
        eager=_eager,
        bytes=lambda shape, size: 3 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 6 * size * math.prod(shape),
        bench_shapes=((8, 8), (64, 10), (128, 10), (256, 32)),
    ),
)
