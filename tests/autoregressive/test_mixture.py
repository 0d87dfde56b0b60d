import math

import pytest
import torch

import genkern
from genkern.ops import discretized_mix_logistic_cdf as cdf
from genkern.ops import discretized_mix_logistic_nll as nll
from genkern.ops import discretized_mix_logistic_sample as sample
from genkern.ops import gaussian_mixture_nll, gaussian_mixture_sample
from genkern.ops.autoregressive._discretized_mix_logistic import _eager
from genkern.testing import backends

each_backend = pytest.mark.parametrize("backend", ["reference", *backends(op="discretized_mix_logistic_nll")])


def data(n=2, k=5, size=6, scale=0.7, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (n, 3, size, size), generator=generator).to(dtype) / 127.5 - 1
    return x, (scale * torch.randn(n, 10 * k, size, size, generator=generator)).to(dtype)


@each_backend
@pytest.mark.parametrize("shift", [-9.0, -7.0, -3.0, 0.0, 5.0])
def test_the_probabilities_of_all_levels_sum_to_one(backend, shift):
    for levels in (256, 32):
        params = torch.randn(1, 12, 1, generator=torch.Generator().manual_seed(1))
        params[:, 8:] += shift
        x = 2 * torch.arange(levels) / (levels - 1) - 1
        with genkern.backend(backend):
            total = torch.exp(-nll(x.view(levels, 1, 1), params.expand(levels, 12, 1), levels=levels).double()).sum()
        assert abs(total - 1) < 2e-6


@each_backend
def test_colours_sum_to_one(backend):
    """All 5^3 colours of one pixel: the coupling of the colours keeps the mass."""
    levels = 5
    grid = torch.cartesian_prod(*[2 * torch.arange(levels) / (levels - 1) - 1] * 3).view(-1, 3, 1, 1)
    params = torch.randn(1, 20, 1, 1, generator=torch.Generator().manual_seed(2)).expand(len(grid), 20, 1, 1)
    with genkern.backend(backend):
        assert abs(torch.exp(-nll(grid, params, levels=levels).double()).sum() - 1) < 2e-6


@each_backend
def test_openai_mode_is_the_published_rule(backend):
    x, params = data(dtype=torch.float64)
    params[:, 5:] *= 2
    with genkern.backend(backend):
        torch.testing.assert_close(nll(x, params, mode="openai"), _eager(x, params), rtol=1e-9, atol=0)
        torch.testing.assert_close(nll(x.float(), params.float(), mode="openai").double(), _eager(x, params), rtol=1e-5, atol=0)


@each_backend
def test_the_two_modes_differ_where_the_published_rule_approximates(backend):
    x, params = torch.zeros(1, 1, 1), torch.tensor([0.0, 0.02, -7.0]).view(1, 3, 1)
    with genkern.backend(backend):
        assert 2.1 < nll(x, params, mode="openai") - nll(x, params, mode="exact") < 2.2


@each_backend
def test_extreme_parameters_stay_finite(backend):
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0]).view(1, 1, 4)
    for mean in (-50.0, 0.0, 50.0):
        for log_scale in (-20.0, 0.0, 60.0):
            params = torch.tensor([0.0, mean, log_scale]).view(1, 3, 1).repeat(1, 1, 4).requires_grad_()
            with genkern.backend(backend):
                for mode in ("exact", "openai"):
                    loss = nll(x, params, mode=mode).sum()
                    assert loss.isfinite() and torch.autograd.grad(loss, params)[0].isfinite().all()


@each_backend
def test_audio_and_five_bit_images(backend):
    x, params = torch.linspace(-1, 1, 7).view(1, 1, 7), torch.zeros(1, 6, 7)
    with genkern.backend(backend):
        got = nll(x, params, levels=65536)
    edge = torch.sigmoid(torch.tensor(-1 + 1 / 65535, dtype=torch.float64)).log()
    inner = torch.linspace(-1, 1, 7, dtype=torch.float64)[1:-1]
    expected = -(2 * edge + (torch.sigmoid(inner) * torch.sigmoid(-inner) * 2 / 65535).log().sum())
    torch.testing.assert_close(got.double(), expected.view(1), rtol=1e-5, atol=0)


@each_backend
@pytest.mark.parametrize("channels, k, pixels", [(3, 12, 3), (1, 30, 3), (3, 1, 300)], ids=["mixtures", "audio", "pixels"])
def test_more_mixtures_and_pixels_than_a_kernel_holds(backend, channels, k, pixels):
    generator, both = torch.Generator().manual_seed(0), []
    x = torch.randint(0, 256, (2, channels, pixels), generator=generator) / 127.5 - 1
    params = torch.randn(2, (10 if channels == 3 else 3) * k, pixels, generator=generator)
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaf = params.to(dtype).requires_grad_()
        with genkern.backend(name):
            loss = nll(x.to(dtype), leaf)
            both.append((loss.double(), torch.autograd.grad(loss, leaf, torch.tensor([1.0, -2.0], dtype=dtype))[0].double()))
    torch.testing.assert_close(both[0][0], both[1][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(both[0][1], both[1][1], rtol=1e-5, atol=1e-5)


@each_backend
def test_bins_far_narrower_and_wider_than_the_logistic(backend):
    """Where both exponentials of a bin underflow in float32, and where a bin's probability is its width alone."""
    x = torch.tensor([-1.0, -1 / 3, 1 / 3, 1.0]).repeat(3).view(1, 1, 12)
    params = torch.tensor([0.0, 0.3, -6.0]).view(1, 3, 1).repeat(1, 1, 12)
    params[:, 1, 4:8], params[:, 2, 8:] = 2.0, 25.0
    both = []
    for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
        leaf = params.to(dtype).requires_grad_()
        with genkern.backend(name):
            loss = nll(x.to(dtype), leaf, levels=4)
            both.append([v.double() for v in (loss, torch.autograd.grad(loss.sum(), leaf)[0])])
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_samples_have_the_distribution_they_claim():
    n = 20000
    params = torch.tensor([0.3, -0.4, -0.5, 0.4, -2.0, -1.5]).view(1, 6, 1).expand(n, 6, 1)
    x = sample(params, channels=1, key=genkern.random.key(0))
    assert x.shape == (n, 1, 1) and x.abs().max() <= 1
    for point in (-0.6, -0.2, 0.3):
        p = torch.softmax(torch.tensor([0.3, -0.4]), 0)
        scale = torch.exp(torch.tensor([2.0, 1.5]))
        expected = (p * torch.sigmoid((point - torch.tensor([-0.5, 0.4])) * scale)).sum()
        assert abs((x < point).float().mean() - expected) < 0.015
    keys = genkern.random.split(genkern.random.key(1), 4)
    assert torch.equal(sample(params[:4], channels=1, key=keys)[2:], sample(params[2:4], channels=1, key=keys[2:]))


def test_samples_of_colours_couple_and_are_given_by_uniforms():
    params = torch.zeros(1, 10, 1, 1)
    params[0, 1], params[0, 2] = 0.5, -30.0  # red: mean, a scale that is clamped to e^-7
    params[0, 5], params[0, 8] = -30.0, -30.0
    params[0, 3], params[0, 6], params[0, 9] = 1.0, -1.0, 2.0
    red, green, blue = sample(params, uniforms=torch.full((1, 4, 1, 1), 0.5)).flatten().tolist()
    assert math.isclose(red, 0.5, rel_tol=1e-6) and math.isclose(green, 0.5 * math.tanh(1), rel_tol=1e-6)
    assert math.isclose(blue, 0.5 * math.tanh(-1) + green * math.tanh(2), rel_tol=1e-5)
    cold = sample(params, temperature=1e-3, min_log_scale=0.0, uniforms=torch.full((1, 4, 1, 1), 0.9))
    assert abs(cold[0, 0, 0, 0] - 0.5) < 0.01  # a low temperature narrows


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda x, p: (x, p[:, :-1]), r"\(N, 10 K, ...\) for 3 channel"),
        (lambda x, p: (x[:, :2], p), r"x must be \(N, 3, ...\) or \(N, 1, ...\)"),
        (lambda x, p: (x[..., :-1], p), "params must have shape"),
        (lambda x, p: (x.clone().requires_grad_(), p), "detach"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        nll(*change(*data()))
    with pytest.raises(ValueError, match="'exact', 'openai'"):
        nll(*data(), mode="paper")
    with pytest.raises(TypeError, match="floating point"):
        nll(data()[0].byte(), data()[1])
    for temperature in (0, math.inf, math.nan):
        with pytest.raises(ValueError, match="positive and finite"):
            sample(data()[1], temperature=temperature)
        with pytest.raises(ValueError, match="positive and finite"):
            gaussian_mixture_sample(torch.zeros(1, 6, 2), temperature=temperature)


def test_the_distribution_function_of_each_colour_gives_the_likelihood():
    levels, x = 9, torch.tensor([[8, 0, 3], [4, 7, 8], [0, 5, 1]]).view(3, 3, 1) / 4.0 - 1
    params = torch.randn(3, 20, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    log_p = torch.zeros(3, dtype=torch.float64)
    for color in range(3):
        below = cdf(params, x[:, :color], levels=levels)
        assert below.shape == (3, levels, 1) and (below.diff(dim=1) >= 0).all() and (below[:, -1] == 1).all()
        index = ((x[:, color] + 1) * 4).round().long().unsqueeze(1)
        log_p += torch.log(torch.diff(below, dim=1, prepend=torch.zeros(3, 1, 1)).gather(1, index)).flatten()
    torch.testing.assert_close(-log_p, nll(x, params, levels=levels), rtol=1e-9, atol=0)
    sound = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(3))
    steps = cdf(sound, channels=1, levels=4).diff(dim=1)
    lows = torch.full((2, 1, 5), 1 / 3)  # the third level
    torch.testing.assert_close(-torch.log(steps[:, 1]).sum(1), nll(lows, sound, levels=4))
    with pytest.raises(ValueError, match="at most 2 of 3"):
        cdf(params, x)


def test_samples_of_levels_have_the_probabilities_of_the_likelihood():
    n, levels = 40000, 3
    params = torch.randn(1, 20, 1, generator=torch.Generator().manual_seed(4))
    x = sample(params.expand(n, 20, 1), levels=levels, key=genkern.random.key(0))
    every = torch.cartesian_prod(*[torch.arange(levels) - 1.0] * 3).unsqueeze(2)
    expected = torch.exp(-nll(every, params.expand(27, 20, 1), levels=levels))
    found = (x.view(n, 1, 3) == every.view(1, 27, 3)).all(2).sum(0)
    assert found.sum() == n and (found / n - expected).abs().max() < 0.01


def test_a_mixture_of_normals_is_that_of_torch_and_its_samples_are_its_own():
    x, params = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(3, 24, 5, dtype=torch.float64)
    logits, means, log_scales = params.view(3, 3, 2, 4, 5).transpose(3, 4).unbind(1)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits), torch.distributions.Normal(means, log_scales.exp())
    )
    torch.testing.assert_close(gaussian_mixture_nll(x, params), -mixture.log_prob(x).sum((1, 2)))
    params = torch.tensor([0.3, -0.4, -1.0, 2.0, -0.5, -1.5]).view(1, 6, 1).expand(20000, 6, 1)
    drawn = gaussian_mixture_sample(params, key=genkern.random.key(0))
    weight = torch.softmax(torch.tensor([0.3, -0.4]), 0)
    mean = (weight * torch.tensor([-1.0, 2.0])).sum()
    assert drawn.shape == (20000, 1, 1) and abs(drawn.mean() - mean) < 0.05
    half = gaussian_mixture_sample(params[:1], temperature=1e-3, uniforms=torch.full((1, 3, 1), 0.5))
    assert abs(half - (-1.0)) < 1e-6
    with pytest.raises(ValueError, match=r"3 K C"):
        gaussian_mixture_nll(x, params[:3, :5])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given", ["key", "keys", "uniforms"])
def test_drawn_levels_are_those_of_the_reference(channels, given):
    """The kernel's logarithms differ in the last bit: now and then a value falls on the other side of an edge."""
    torch.manual_seed(0)
    params, key = torch.randn(2, (10 if channels == 3 else 3) * 4, 9, 37), genkern.random.key(3)
    noise = {"key": key, "keys": genkern.random.split(key, 2), "uniforms": torch.rand(2, 4 + channels, 9, 37)}[given]
    options = {"channels": channels, "levels": 256, "temperature": 0.8, given.removesuffix("s") if given == "keys" else given: noise}
    with genkern.backend("reference"):
        expected = sample(params, **options)
    for backend in backends(op="discretized_mix_logistic_sample"):
        with genkern.backend(backend):
            drawn = sample(params, **options)
        assert (drawn == expected).float().mean() > 0.999
        level = (drawn + 1) * 127.5
        assert (level - level.round()).abs().max() < 1e-4 and level.unique().numel() > 100


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given", ["key", "keys", "uniforms"])
@pytest.mark.parametrize("pixels", [1, 5])
def test_draws_of_few_pixels_do_not_depend_on_the_batch(pixels, given, channels):
    """A kernel may put the pixels of several rows side by side: as cached samplers call it, pixel after pixel."""
    torch.manual_seed(0)
    n, per = 70, 10 if channels == 3 else 3
    wide = torch.randn(n, per * 2 + 1, pixels)
    params, key = wide[:, : per * 2], genkern.random.key(3)  # rows that do not touch
    name = given.removesuffix("s") if given == "keys" else given
    noise = {"key": key, "keys": genkern.random.split(key, n), "uniforms": torch.rand(n, 2 + channels, pixels)}[given]
    draw = lambda params, noise: sample(params, channels=channels, levels=256, **{name: noise})
    with genkern.backend("reference"):
        expected = draw(params, noise)
    for backend in backends(op="discretized_mix_logistic_sample"):
        with genkern.backend(backend):
            drawn = draw(params, noise)
            assert (drawn == expected).float().mean() > 0.98
            if given == "key":
                assert torch.equal(draw(params[:3], noise), drawn[:3])
            else:
                assert torch.equal(draw(params[66:69], noise[66:69]), drawn[66:69])
            narrow = draw(params.bfloat16(), noise)
            assert torch.equal(narrow, draw(params.bfloat16().float(), noise))
