"""Density models that need no training loop."""

import math

import torch

from genkern.data import check_data
from genkern.ops._common import check_tensor

SHRINKAGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)


def histogram_log_prob(data, inputs):
    """(N,) float64 in nats: each pixel by its own histogram over data.train, every count one larger."""
    check_data("histogram_log_prob", data)
    if data.levels is None:
        raise ValueError(f"histogram_log_prob: needs uint8 data, and {data.name} is float")
    inputs = _rows("histogram_log_prob", inputs, math.prod(data.shape))
    train, levels = data.train[0].flatten(1).long(), data.levels + 1
    counts = torch.ones(train.shape[1], levels, dtype=torch.float64)
    counts.scatter_add_(1, train.t(), torch.ones(train.t().shape, dtype=torch.float64))
    log_p = (counts / counts.sum(1, keepdim=True)).log()
    return log_p.gather(1, inputs.long().t()).sum(0)


class Gaussian:
    """A normal distribution with a full covariance, fitted to the training split of a genkern.data set.

    Its covariance is (1 - s) C + s diag(C), C that of the training data and s of SHRINKAGES the best on data.validation. uint8
    inputs x count as x + u, u uniform in [0, 1) (so I / 12 is added to the covariance), and log_prob is the mean over u of the
    log-density, a lower bound of the log-probability of x as those of the flows are (Theis et al., 2016), here in closed form.
    """

    def __init__(self, data):
        check_data("Gaussian", data)
        train = data.train[0].flatten(1).double()
        self.mean = train.mean(0)
        centred = train - self.mean
        covariance = centred.t() @ centred / len(train)
        variance = covariance.diagonal().clone()
        self.noise = 1 / 12 if data.levels is not None else 0.0  # the variance of u
        added = self.noise if self.noise else 1e-9 * float(variance.mean()) + 1e-30  # invertible in spite of rounding
        best = None
        for s in SHRINKAGES:
            shrunk = (1 - s) * covariance
            shrunk.diagonal().copy_(variance + added)
            factor, failed = torch.linalg.cholesky_ex(shrunk)
            if failed:
                continue
            self.shrinkage, self._factor = s, factor
            score = float(self.log_prob(data.validation[0]).mean())
            if best is None or score > best[0]:
                best = score, s, factor
        if best is None:
            raise ValueError("Gaussian: the covariance of the data is not positive")
        _, self.shrinkage, self._factor = best

    def log_prob(self, inputs):
        """(N,) float64 in nats."""
        x = _rows("Gaussian", inputs, len(self.mean)).double()
        whitened = torch.linalg.solve_triangular(self._factor, (x - self.mean).t(), upper=False)
        squares = whitened.square().sum(0)
        if self.noise:  # the mean of u' P u is the trace of P / 12
            inverse = torch.cholesky_inverse(self._factor)
            squares = squares + self.noise * inverse.diagonal().sum()
        log_det = 2 * self._factor.diagonal().log().sum()
        return -0.5 * (squares + log_det + x.shape[1] * math.log(2 * math.pi))


def _rows(name, inputs, width):
    """(N, width): the numbers of each input."""
    check_tensor(name, "inputs", inputs)
    if inputs.dim() < 2 or inputs[:1].numel() not in (0, width):
        raise ValueError(f"{name}: inputs must be (N, ...) of {width} numbers each, got {tuple(inputs.shape)}")
    return inputs.flatten(1)
