import math
import time

import pytest
import torch

import genkern
import genkern.data
from genkern import metrics

linalg = pytest.importorskip("scipy.linalg")
pytest.importorskip("sklearn")


def normals(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exact(mean, covariance, n=200):
    """Points whose sample mean and covariance are these, to rounding."""
    x = normals(n, len(mean), 0)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / (n - 1))).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def by_roots(a, b):
    """The distance by the symmetric root, from the covariances."""
    root = lambda s: (lambda e: (e[1] * e[0].clamp(min=0).sqrt()) @ e[1].T)(torch.linalg.eigh(s))
    sa, sb = torch.cov(a.T), torch.cov(b.T)
    cross = torch.linalg.eigvalsh(root(sa) @ sb @ root(sa)).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + sa.trace() + sb.trace() - 2 * cross)


def test_frechet_distance_of_known_gaussians():
    one, eye = torch.ones(3).double(), torch.eye(3).double()
    assert metrics.frechet_distance(exact(one, eye), exact(-one, eye)) == pytest.approx(12, abs=1e-9)
    a, b = torch.tensor([1.0, 4.0, 9.0]).double(), torch.tensor([4.0, 1.0, 0.25]).double()  # (sqrt a - sqrt b)^2 per axis
    assert metrics.frechet_distance(exact(one, a.diag()), exact(one, b.diag())) == pytest.approx(1 + 1 + 6.25)
    x = normals(50, 4, 1)
    assert metrics.frechet_distance(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("n, m, d", [(300, 200, 16), (20, 30, 40), (2, 30, 5)])
def test_frechet_distance_is_that_of_the_covariances(n, m, d):
    a, b = normals(n, d, 1) @ normals(d, d, 2), normals(m, d, 3) @ normals(d, d, 4) + 1
    got = metrics.frechet_distance(a, b)
    assert got == pytest.approx(by_roots(a, b), rel=1e-6) and got == pytest.approx(metrics.frechet_distance(b, a))
    if min(n, m) > d:
        sa, sb = torch.cov(a.T).numpy(), torch.cov(b.T).numpy()
        trace = sa.trace() + sb.trace() - 2 * linalg.sqrtm(sa @ sb).real.trace()
        assert got == pytest.approx(float((a.mean(0) - b.mean(0)).square().sum()) + trace, rel=1e-8)


def test_frechet_distance_survives_what_float32_and_roots_do_not():
    """Features far from 0, one of them constant, two equal: a small shift is found all the same."""
    x = normals(500, 6, 5)
    x[:, 1], x[:, 3] = 0, x[:, 2]
    assert metrics.frechet_distance(x + 1e4, x + 1e4 + 0.01) == pytest.approx(6e-4, rel=1e-6)


def test_precision_and_recall_count_balls():
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])  # radii for k = 1: 1, 1, 1, 8
    fake = torch.tensor([[0.5], [3.5], [30.0]])  # radii: 3, 3, 26.5
    assert metrics.precision_recall(real, fake, k=1) == (2 / 3, 1.0)  # 3.5 is in the ball of 10; 30 in none
    assert metrics.precision_recall(fake, real, k=1) == (1.0, 2 / 3)
    # 0.5 lies in the balls of 0 and 1, 3.5 in that of 10
    assert metrics.density_coverage(real, fake, k=1) == (1.0, 0.75)
    assert metrics.precision_recall(real, real + 100, k=3) == (0.0, 0.0)
    assert metrics.density_coverage(real, real + 100, k=3) == (0.0, 0.0)


def test_a_lost_mode_costs_recall_and_a_foreign_one_precision():
    centres = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    both = torch.cat([normals(200, 2, i) + centres[i] for i in range(2)])
    again = torch.cat([normals(200, 2, 2 + i) + centres[i] for i in range(2)])
    precision, recall = metrics.precision_recall(both, again)
    assert precision > 0.85 and recall > 0.85
    assert metrics.precision_recall(both, again[:200])[1] == pytest.approx(recall / 2, abs=0.03)
    assert metrics.precision_recall(both[:200], again)[0] == pytest.approx(precision / 2, abs=0.03)
    assert metrics.density_coverage(both, again[:200])[1] < 0.51
    assert metrics.density_coverage(both, both, k=5)[1] == 1.0


def test_blocks_change_nothing(monkeypatch):
    a, b = normals(100, 3, 1), normals(70, 3, 2)
    measures = lambda: (metrics.precision_recall(a, b), metrics.density_coverage(a, b), *metrics.nearest_neighbours(a, b))
    whole = measures()
    monkeypatch.setattr(metrics._distances, "BLOCK", 700)
    for x, y in zip(whole, measures(), strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))


def test_nearest_neighbours():
    train = torch.tensor([[[[0, 0]]], [[[10, 200]]]], dtype=torch.uint8)
    found = metrics.nearest_neighbours(torch.tensor([[[[3, 4]]], [[[10, 200]]]], dtype=torch.uint8), train)
    assert found.distance.tolist() == [5.0, 0.0] and found.index.tolist() == [0, 1]


def test_class_shares():
    assert metrics.class_shares(torch.tensor([0, 2, 2, 3]), 5).tolist() == [0.25, 0, 0.5, 0.25, 0]
    with pytest.raises(ValueError, match=r"0\.\.1, got 0\.\.2"):
        metrics.class_shares([0, 2], 2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x: metrics.frechet_distance(x[:1], x), r"a must be \(N, d\) with N at least 2, got \(1, 4\)"),
        (lambda x: metrics.frechet_distance(x, x[:, :3]), "same number of features, got 4 and 3"),
        (lambda x: metrics.frechet_distance(x, x.log()), "b holds numbers that are not finite"),
        (lambda x: metrics.precision_recall(x[:3], x), "N at least 4"),
        (lambda x: metrics.density_coverage(x, x, k=0), "k must be an int of at least 1, got 0"),
        (lambda x: metrics.nearest_neighbours(x[0], x), r"samples must be \(N, d\)"),
    ],
)
def test_wrong_features_are_refused_in_words(call, words):
    with pytest.raises(ValueError, match=words):
        call(normals(9, 4, 0))


@pytest.fixture(scope="module")
def digits():
    return genkern.data.load("digits")


@pytest.fixture(scope="module")
def judge(digits):
    return metrics.Classifier.of(digits)


def test_the_classifier_knows_digits_it_has_not_seen(digits, judge):
    images, labels = digits.test
    assert judge.accuracy(images, labels) > 0.97
    assert judge.accuracy(images / 8.0 - 1, labels) == judge.accuracy(images, labels)
    assert judge.accuracy(images, (labels + 1) % 10) < 0.03
    assert torch.equal(judge.shares(images), metrics.class_shares(judge.labels(images), 10))
    features = judge.features(images)
    assert features.shape == (180, 64) and features.dtype == torch.float64
    assert torch.equal(metrics.Classifier.of(digits).features(images), features)


def test_the_report_tells_copies_from_new_images_and_noise(digits, judge):
    begin = time.process_time()
    held = torch.cat([digits.validation[0], digits.test[0]])
    real = metrics.report(held, digits, torch.cat([digits.validation[1], digits.test[1]]), classifier=judge)
    assert time.process_time() - begin < 10
    for name in ("accuracy", "frechet", "precision", "recall", "density", "coverage", "nearest"):
        assert real[name] == real[f"{name}_real"], name
    assert 0 < real["copies"] <= 0.02 and real["nearest"] > 0.05 and math.isclose(sum(real["shares"]), 1)

    copies = metrics.report(digits.train[0][:400], digits, classifier=judge)
    assert copies["copies"] == 1 and copies["nearest"] == 0 and "accuracy" not in copies
    noise = genkern.random.uniform(genkern.random.key(0), held.shape, 0, 17).to(torch.uint8)
    noise = metrics.report(noise, digits, classifier=judge)
    assert noise["frechet"] > 20 * noise["frechet_real"] and noise["precision"] < 0.05 and noise["copies"] == 0


def test_wrong_images_are_refused_in_words(digits, judge):
    with pytest.raises(ValueError, match=r"\(N, 1, 8, 8\), got \(2, 1, 4, 4\)"):
        judge.features(torch.zeros(2, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"in \[0, 16\]"):
        judge.labels(digits.test[0] + 100)
    with pytest.raises(ValueError, match="needs at least 360 samples"):
        metrics.report(digits.test[0], digits)
    with pytest.raises(ValueError, match="each at least once"):
        metrics.Classifier(digits.test[0], torch.full((180,), 3))
