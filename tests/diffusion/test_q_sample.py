import math

import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern import random
from genkern.ops import denoising_loss, q_sample, timestep_embedding
from genkern.testing import backends

TABLE = torch.linspace(0.99, 0.0, 11)  # the last step has no signal at all
each_backend = pytest.mark.parametrize("backend", ["reference", *backends(op="q_sample")])


@each_backend
@pytest.mark.parametrize("target", ["eps", "x0", "v", "flow"])
def test_the_loss_is_that_of_the_target(backend, target):
    key, x0, t = random.key(3), torch.randn(4, 2, 5, 7), torch.tensor([0, 10, 3, 7])
    with genkern.backend(backend):
        x_t, wanted = q_sample(x0, t, TABLE, key=key, target=target)
        assert denoising_loss(wanted, x0, t, TABLE, key=key, target=target).abs().max() < 1e-12
        loss = denoising_loss(torch.zeros_like(x0), x0, t, TABLE, key=key, target=target)
    torch.testing.assert_close(loss, wanted.square().flatten(1).mean(1))
    eps = random.normal(key, x0.shape)
    assert torch.equal(x_t[1], eps[1])  # pure noise where alphas_cumprod is 0


@each_backend
def test_coefficients_are_float32_for_bfloat16_data(backend):
    """Between steps of a fine schedule alphas_cumprod differ by less than bfloat16 resolves."""
    table, key, x0 = torch.linspace(0.9, 0.9002, 2), random.key(1), torch.full((2, 4096), 100.0, dtype=torch.bfloat16)
    with genkern.backend(backend):
        x_t, _ = q_sample(x0, torch.tensor([0, 1]), table, key=key)
    exact = table.double().sqrt()[:, None] * 100 + (1 - table.double()).sqrt()[:, None] * random.normal(key, (2, 4096)).double()
    assert (x_t.double() - exact).abs().max() <= 0.2501  # half a step of bfloat16 near 100


def test_a_pair_of_tables_is_any_process():
    key, x0, t = random.key(3), torch.randn(3, 9), torch.tensor([0, 2, 4])
    s = torch.linspace(0, 1, 5)
    x_t, target = q_sample(x0, t, (1 - s, s), key=key, target="flow")
    torch.testing.assert_close(x_t - s[t][:, None] * target, x0)


@pytest.mark.parametrize("weighting", ["min_snr", "p2", "edm"])
def test_weights_of_the_targets_agree_on_the_error_of_x0(weighting):
    """The same denoiser stated as eps, x0 and v has the same weighted loss."""
    key, x0, t = random.key(3), torch.randn(3, 50, dtype=torch.float64), torch.tensor([0, 4, 8])
    denoised = x0 + 0.1 * torch.randn_like(x0)
    alpha, sigma = TABLE.double()[t].sqrt()[:, None], (1 - TABLE.double()[t]).sqrt()[:, None]
    x_t, _ = q_sample(x0, t, TABLE.double(), key=key)
    eps = (x_t - alpha * denoised) / sigma
    stated = {"eps": eps, "x0": denoised, "v": alpha * eps - sigma * denoised}
    losses = [denoising_loss(p, x0, t, TABLE.double(), key=key, target=n, weighting=weighting) for n, p in stated.items()]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_min_snr_without_signal_or_noise():
    """(Hang et al., 2023): min(snr, g) / snr, min(snr, g), min(snr, g) / (snr + 1), finite at snr 0 and infinity."""
    x0, key, t = torch.zeros(3, 8), random.key(1), torch.tensor([0, 1, 2])
    table, snr = torch.tensor([1.0, 0.5, 0.0]), [math.inf, 1.0, 0.0]
    expected = {"eps": [0.0, 1.0, 1.0], "x0": [min(s, 5.0) for s in snr], "v": [0.0, 0.5, 0.0]}
    for target, weights in expected.items():
        _, wanted = q_sample(x0, t, table, key=key, target=target)
        loss = denoising_loss(wanted + 1, x0, t, table, key=key, target=target, weighting="min_snr")
        torch.testing.assert_close(loss, torch.tensor(weights), atol=1e-6, rtol=1e-5)


def test_one_key_per_sample_does_not_depend_on_the_batch():
    keys, x0, t = random.split(random.key(3), 4), torch.randn(4, 33), torch.tensor([0, 9, 3, 7])
    whole = q_sample(x0, t, TABLE, key=keys)[0]
    assert torch.equal(whole[2:], q_sample(x0[2:], t[2:], TABLE, key=keys[2:])[0])


def test_timestep_embedding_has_both_orders_and_both_frequencies():
    t = torch.tensor([0, 3, 999])
    e = timestep_embedding(t, 8)
    assert torch.equal(timestep_embedding(t, 8, order="sin_cos"), e.roll(4, 1))
    for shift in (0, 1):
        w = [10000 ** (-k / (4 - shift)) for k in range(4)]
        expected = [[math.cos(s * f) for f in w] + [math.sin(s * f) for f in w] for s in (0, 3, 999)]
        torch.testing.assert_close(timestep_embedding(t, 8, shift=shift), torch.tensor(expected), atol=1e-4, rtol=0)
    assert timestep_embedding(t.to(torch.bfloat16), 9).dtype == torch.float32 and timestep_embedding(t, 9).shape == (3, 9)
    with pytest.raises(ValueError, match="order"):
        timestep_embedding(t, 8, order="cos")
    with pytest.raises(ValueError, match="exceed shift"):
        timestep_embedding(t, 2, shift=1)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"timesteps": torch.tensor([0.0, 1.0])}, TypeError, "int64"),
        ({"timesteps": torch.tensor([0])}, ValueError, r"\(N,\) = \(2,\)"),
        ({"timesteps": torch.tensor([0, 11])}, IndexError, r"timesteps must be in 0 .. 10"),
        ({"timesteps": torch.tensor([0, -1])}, IndexError, r"timesteps must be in 0 .. 10"),
        ({"table": TABLE[None]}, ValueError, "1 dimensions"),
        ({"target": "score"}, ValueError, "'score'"),
        ({"x0": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "floating point"),
        ({"key": random.split(random.key(1), 3)}, ValueError, r"\(2, 2\)"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change, error, words):
    arguments = {"x0": torch.zeros(2, 3), "timesteps": torch.tensor([0, 1]), "table": TABLE, "key": random.key(1), **change}
    with pytest.raises(error, match=words):
        q_sample(**arguments)
    if "target" not in change:
        arguments["prediction"] = torch.zeros(2, 3).to(arguments["x0"].dtype)
        with pytest.raises(error, match=words):
            denoising_loss(**arguments)


def test_the_loss_needs_the_target_or_the_key_of_its_noise():
    zeros, t = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(TypeError, match="key"):
        denoising_loss(zeros, zeros, t, TABLE)
    with pytest.raises(ValueError, match="not both"):
        denoising_loss(zeros, zeros, t, TABLE, wanted=zeros, key=random.key(1))
    with pytest.raises(TypeError, match="timesteps must be an int64 tensor, got NoneType"):
        denoising_loss(zeros, wanted=zeros, weighting="min_snr")
    with pytest.raises(ValueError, match="prediction must have the shape of wanted"):
        denoising_loss(zeros[:1], wanted=zeros)


@each_backend
@pytest.mark.parametrize("weighting", [None, "min_snr"])
@pytest.mark.parametrize("target", ["eps", "v"])
def test_a_given_target_and_one_made_again_agree(backend, target, weighting):
    """Losses and gradients, also with respect to x0, which reaches a given target through q_sample."""
    generator = torch.Generator().manual_seed(1)
    start, prediction = (torch.randn(4, 3, 67, generator=generator).requires_grad_() for _ in range(2))
    key, t, seen = random.key(3), torch.tensor([0, 10, 3, 7]), []
    with genkern.backend(backend):
        for given in (True, False):
            _, wanted = q_sample(start, t, TABLE, key=key, target=target)
            how = {"wanted": wanted} if given else {"key": key}
            loss = denoising_loss(prediction, start, t, TABLE, **how, target=target, weighting=weighting)
            seen.append((loss, *torch.autograd.grad(loss.sum(), (prediction, start), materialize_grads=True)))
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_nothing_is_written_for_a_target_without_a_gradient():
    prediction, wanted = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5)
    plain = denoising_loss(prediction, wanted=wanted)
    torch.testing.assert_close(plain, F.mse_loss(prediction, wanted, reduction="none").mean(1))
    assert plain.grad_fn.next_functions[1][0] is None
    plain.sum().backward()
    torch.testing.assert_close(prediction.grad, 2 / 5 * (prediction - wanted).detach())
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p, w: denoising_loss(p, wanted=w), (x, x.detach().flip(0).requires_grad_()))
