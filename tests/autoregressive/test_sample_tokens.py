import math

import pytest
import torch

import genkern
from genkern import core
from genkern.ops import sample_tokens
from genkern.testing import backends

BACKENDS = ["reference"] + ["cpu"] * (core.OPS["sample_tokens"].available("cpu")["cpu"] is None)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def logits(n=6, tokens=5003, scale=3.0, seed=0):
    return scale * torch.randn(n, tokens, generator=torch.Generator().manual_seed(seed))


def kept(x, temperature=1.0, top_k=None, top_p=None, min_p=None, order="joint"):
    """Boolean mask in float64, and the distribution it leaves."""
    p = (x.double() / temperature).softmax(1)
    mask = torch.ones_like(p, dtype=torch.bool)
    if top_k:
        mask &= p >= p.topk(top_k, 1).values[:, -1:]
    if min_p:
        mask &= p >= min_p * p.amax(1, keepdim=True)
    if top_p:
        base = torch.where(mask, p, 0) if order == "sequential" else p
        ordered, index = base.sort(1, descending=True)
        before = ordered.cumsum(1) - ordered
        mask &= torch.zeros_like(mask).scatter_(1, index, before < top_p * base.sum(1, keepdim=True))
    p = torch.where(mask, p, 0)
    return mask, p / p.sum(1, keepdim=True)


@each_backend
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5, "top_p": 0.9},
        {"top_k": 50},
        {"top_k": 400, "top_p": 0.8, "order": "sequential"},
        {"top_k": 400, "top_p": 0.8},
        {"min_p": 0.05},
    ],
)
def test_the_uniform_lies_in_the_interval_of_the_token(backend, settings):
    x = logits()
    _, p = kept(x, **settings)
    cumulative = p.cumsum(1)
    for u in (0.0, 0.1, 0.37, 0.5, 0.77, 0.999, 1 - 2**-24):
        with genkern.backend(backend):
            got = sample_tokens(x, uniforms=torch.full((6,), u), **settings).unsqueeze(1)
        assert (p.gather(1, got) > 0).all()
        high = cumulative.gather(1, got)
        low = high - p.gather(1, got)
        assert ((low <= u + 1e-6) & (u <= high + 1e-6)).all()


@each_backend
def test_frequencies(backend):
    x, n = logits(1, 8, 1.0), 40000
    with genkern.backend(backend):
        drawn = sample_tokens(x.expand(n, 8), top_p=0.95, key=genkern.random.key(3))
    _, p = kept(x, top_p=0.95)
    counts = torch.bincount(drawn, minlength=8).double()
    assert (counts[p[0] == 0] == 0).all()
    expected = n * p[0][p[0] > 0]
    chi2 = ((counts[p[0] > 0] - expected) ** 2 / expected).sum()
    assert chi2 < 30  # 7 degrees of freedom: probability 1e-4


@each_backend
def test_a_draw_does_not_depend_on_its_batch(backend):
    x, key = logits(7, 301), genkern.random.key(3)
    keys = genkern.random.split(key, 7)
    with genkern.backend(backend):
        assert torch.equal(sample_tokens(x, key=key)[:3], sample_tokens(x[:3], key=key))
        assert torch.equal(sample_tokens(x, key=keys)[2:5], sample_tokens(x[2:5], key=keys[2:5]))


@each_backend
def test_ties_are_kept_together(backend):
    x = torch.tensor([[2.0, 2.0, 2.0, 1.0, 0.0]]).expand(64, 5)
    u = torch.arange(64) / 64
    with genkern.backend(backend):
        for settings in ({"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.9}):
            assert set(sample_tokens(x, uniforms=u, **settings).tolist()) == {0, 1, 2}
        assert sample_tokens(x, temperature=0).unique().tolist() == [0]
        same = torch.zeros(4, 4099)
        assert sample_tokens(same, top_k=1, top_p=0.1, uniforms=torch.tensor([0, 0.25, 0.5, 0.75])).tolist() == [0, 1024, 2049, 3074]


@each_backend
@pytest.mark.parametrize("temperature, expected", [(1e-39, [2] * 4), (5e-324, [2] * 4), (1e39, [0, 1, 2, 3]), (1e300, [0, 1, 2, 3])])
def test_temperatures_beyond_the_range_of_float32(backend, temperature, expected):
    x = torch.tensor([[0.0, 1.0, 3.0, 2.0]]).expand(4, 4)
    with genkern.backend(backend):
        assert sample_tokens(x, temperature=temperature, uniforms=torch.arange(4) / 4 + 0.1).tolist() == expected


@each_backend
def test_forbidden_and_tiny_tokens_are_never_drawn(backend):
    x = torch.full((3, 40), -math.inf)
    x[:, 7], x[:, 9], x[:, 3] = 0.0, 1.0, -200.0
    with genkern.backend(backend):
        for u in (0.0, 0.5, 1 - 2**-24):
            for settings in ({}, {"top_k": 30}, {"top_p": 0.999}, {"temperature": 0.3, "top_k": 10}):
                got = sample_tokens(x, uniforms=torch.full((3,), u), **settings)
                assert set(got.tolist()) <= {7, 9}


@each_backend
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_without_a_distribution_are_refused(backend, value):
    x = logits(4, 50)
    x[2] = x[2] if value != -math.inf else value
    x[2, 11] = value
    with genkern.backend(backend):
        for temperature in (0, 1):
            with pytest.raises(ValueError, match="row 2"):
                sample_tokens(x, temperature=temperature)


@pytest.mark.parametrize("backend", [b for b in backends(op="sample_tokens") if b not in ("cpu", "reference")])
def test_gpu_kernels_draw_as_the_reference(backend):
    """Ties, forbidden and improbable tokens, a certain one, many blocks, and what the filters leave of them."""
    x = logits(6, 300)
    x[1] = torch.tensor([2.0, 1.0, 0.0]).repeat(100)
    x[2], x[2, 7], x[2, 9], x[2, 3] = -math.inf, 0.0, 1.0, -200.0
    x[3, 44] = 500.0
    u = torch.tensor([0.37, 0.903, 0.0, 0.5, 1 - 2**-24, 0.77])
    settings = (
        {"temperature": 0.0},
        {"temperature": 1e-39},
        {"temperature": 0.3, "top_k": 10},
        {"top_p": 0.3, "min_p": 1.0},
        {"top_k": 120, "top_p": 0.6, "order": "sequential"},
        {"top_k": 120, "top_p": 0.999},
    )
    for options in settings:
        drawn = []
        for name in ("reference", backend):
            with genkern.backend(name):
                drawn.append(sample_tokens(x, uniforms=u, **options).tolist())
        assert drawn[0] == drawn[1], options
    key, wide = genkern.random.key(3), logits(2, 9001)
    with genkern.backend(backend):
        both = sample_tokens(wide, top_p=0.9, key=key)
        assert torch.equal(both[:1], sample_tokens(wide[:1], top_p=0.9, key=key))
        x[4, 11] = math.nan
        with pytest.raises(ValueError, match="row 4"):
            sample_tokens(x[:5], top_k=3)


def test_repetition_penalty():
    x = torch.tensor([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0]])
    previous = torch.tensor([[0, 0, -1], [2, -1, -1]])
    assert sample_tokens(x, temperature=0, repetition_penalty=2.0, previous=previous).tolist() == [1, 0]


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"temperature": -1}, "temperature must be non-negative"),
        ({"top_k": 0}, "top_k must be an int of at least 1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"min_p": 2.0}, "min_p"),
        ({"order": "first"}, "'joint', 'sequential'"),
        ({"repetition_penalty": 2.0}, "needs previous"),
        ({"uniforms": torch.zeros(3)}, r"\(N,\) = \(6,\)"),
        ({"key": genkern.random.split(genkern.random.key(0), 2)}, r"key \(6, 2\)"),
        ({"key": genkern.random.key(0), "uniforms": torch.zeros(6)}, "one of key"),
    ],
)
def test_wrong_arguments_are_refused_in_words(settings, words):
    with pytest.raises(ValueError, match=words):
        sample_tokens(logits(6, 9), **settings)
