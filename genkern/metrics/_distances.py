"""Distances between sets of feature vectors. No network, no download: whoever calls brings the features."""

from typing import NamedTuple

import torch

from genkern.ops._common import check_int

BLOCK = 1 << 22  # distances held at once


class PrecisionRecall(NamedTuple):
    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    density: float
    coverage: float


class Neighbours(NamedTuple):
    distance: torch.Tensor  # (N,) float64
    index: torch.Tensor  # (N,) int64, rows of the training data


def frechet_distance(a, b):
    """Squared Frechet distance of the Gaussians with the means and covariances of a (N, d) and b (M, d) (Heusel et al., 2017).

        |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)),  S with N - 1 and M - 1 in the denominator

    With the centred rows A = Q_a R_a, S_a = R_a' R_a / (N - 1), so the trace of the root is the sum of the singular values of
    R_a R_b' / sqrt((N - 1) (M - 1)): no covariance is formed and no root of a nearly singular matrix taken. Fewer rows than
    features are fine. Two finite samples of one distribution have a positive distance, which falls as 1/N: compare equal N.
    """
    a, b = _features("frechet_distance", "a", a, least=2), _features("frechet_distance", "b", b, least=2)
    _same_width("frechet_distance", a, b)
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b)]
    ra, rb = (torch.linalg.qr(x, mode="r")[1] for x in centred)
    spread = sum(float(x.square().sum()) for x in centred) - 2 * float(torch.linalg.svdvals(ra @ rb.T).sum())
    return float((a.mean(0) - b.mean(0)).square().sum()) + max(0.0, spread)  # rounding alone takes it below 0


def precision_recall(real, fake, k=3):
    """Improved precision and recall (Kynkaanniemi et al., 2019) of fake (M, d) against real (N, d), each in [0, 1].

    A set of points stands for the union of balls, one around each point, that reach its k-th nearest other point of the set.
    precision: the share of the fake points in the union of the real ones (are samples like the data?); recall: the share of the real
    points in the union of the fake ones (is all of the data sampled?).
    """
    real, fake = _pair("precision_recall", real, fake, k)
    inside = lambda points, centres: _count(points, centres, _radii(centres, k))[0].gt(0).double().mean()
    return PrecisionRecall(float(inside(fake, real)), float(inside(real, fake)))


def density_coverage(real, fake, k=5):
    """Density and coverage (Naeem et al., 2020) of fake (M, d) against real (N, d): less moved by outliers than precision and recall.

    density: the number of balls of real points in which a fake point lies, its mean over k; 1 for the data itself, and it may be
    larger. coverage: the share of the real points with a fake point in their ball.
    """
    real, fake = _pair("density_coverage", real, fake, k)
    balls, hits = _count(fake, real, _radii(real, k))
    return DensityCoverage(float(balls.double().mean()) / k, float(hits.gt(0).double().mean()))


def nearest_neighbours(samples, train):
    """Each sample's nearest row of train: .distance (Euclidean, float64) and .index, (N,) each; inputs of one shape are flattened.

    Memorising shows where samples lie nearer to the training data than held-out data does: call it for both. Images of uint8 count
    in their levels.
    """
    flat = lambda name, x: _features("nearest_neighbours", name, x.flatten(1) if isinstance(x, torch.Tensor) and x.dim() > 2 else x)
    samples, train = flat("samples", samples), flat("train", train)
    _same_width("nearest_neighbours", samples, train)
    found = [block.min(1) for _, block in _blocks(samples, train)]
    return Neighbours(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]))


def class_shares(labels, classes):
    """The share of each class among labels (N,), int64 in 0..classes - 1: float64 (classes,), its sum 1. A missing mode shows as 0."""
    check_int("class_shares", "classes", classes)
    labels = integers("class_shares", labels)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"class_shares: labels must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return torch.bincount(labels, minlength=classes).double() / len(labels)


def integers(name, labels, n=None):
    """Labels (N,) on the CPU; n: how many there must be, by default at least 1."""
    labels = _tensor(name, "labels", labels).cpu()
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) == 0 or n not in (None, len(labels)):
        wanted = "(N,), N at least 1" if n is None else f"({n},)"
        raise ValueError(f"{name}: labels must be integers {wanted}, got {labels.dtype} {tuple(labels.shape)}")
    return labels


def _tensor(name, which, x):
    try:
        return torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: {which} must be a tensor or an array of numbers, got {type(x).__name__}") from None


def _features(name, which, x, least=1):
    x = _tensor(name, which, x)
    if x.dim() != 2 or len(x) < least:
        raise ValueError(f"{name}: {which} must be (N, d) with N at least {least}, got {tuple(x.shape)}")
    x = x.detach().cpu().double()
    if not x.isfinite().all():
        raise ValueError(f"{name}: {which} holds numbers that are not finite")
    return x


def _same_width(name, a, b):
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{name}: both need the same number of features, got {a.shape[1]} and {b.shape[1]}")


def _pair(name, real, fake, k):
    check_int(name, "k", k)
    real, fake = _features(name, "real", real, k + 1), _features(name, "fake", fake, k + 1)
    _same_width(name, real, fake)
    return real, fake


def _blocks(a, b):
    """(slice, distances (rows, M)) over the rows of a. Differences are squared, not expanded: equal points are exactly 0 apart."""
    rows = max(1, BLOCK // len(b))
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        yield part, torch.cdist(a[part], b, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(x, k):
    """The distance from each point to its k-th nearest other one: the point itself is the first of k + 1."""
    return torch.cat([block.kthvalue(k + 1, 1).values for _, block in _blocks(x, x)])


def _count(points, centres, radii):
    """(in how many balls each point lies, how many points lie in each ball)."""
    balls, hits = torch.empty(len(points), dtype=torch.int64), torch.zeros(len(centres), dtype=torch.int64)
    for part, block in _blocks(points, centres):
        inside = block <= radii
        balls[part] = inside.sum(1)
        hits += inside.sum(0)
    return balls, hits
