"""Samplers on Gaussian data, whose score and whose probability-flow ODE have closed forms; closed formulas of steps; the loop."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from genkern import random
from genkern.ops import sampler_step
from genkern.samplers import (
    DDIM,
    DDPM,
    LCM,
    DPMSolverMultistep,
    Euler,
    EulerAncestral,
    FlowMatchEuler,
    FlowMatchHeun,
    Heun,
    Schedule,
    UniPC,
)  # fmt: skip

MEAN, STD = 0.7, 0.4  # of the data
PRESERVING, EDM, FLOW = Schedule.scaled_linear(), Schedule.edm(sigma_max=20.0), Schedule.flow(shift=2.0)


def level(schedule, t):
    """(alpha, sigma) of what the model is told."""
    t = float(t)
    if schedule.kind == "edm":
        return 1.0, math.exp(4 * t) if schedule.prediction == "edm" else t
    if schedule.kind == "flow":
        return 1 - t / schedule.timesteps, t / schedule.timesteps
    bar = schedule.alphas_cumprod
    if t == int(t):
        return math.sqrt(bar[int(t)]), math.sqrt(1 - bar[int(t)])
    ratio = math.exp(np.interp(t, np.arange(len(bar)), np.log(np.sqrt((1 - bar) / bar))))
    return 1 / math.sqrt(1 + ratio**2), ratio / math.sqrt(1 + ratio**2)


def exact_model(schedule):
    """The model of N(MEAN, STD^2) data that predicts what the schedule says, without error."""

    def model(x, t):
        alpha, sigma = level(schedule, t[0])
        scale = 1 / math.sqrt(sigma**2 + schedule.sigma_data**2) if schedule.prediction == "edm" else 1.0
        x = x / scale
        noise = sigma * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        data = (x - sigma * noise) / alpha if alpha else torch.full_like(x, MEAN)
        if schedule.prediction == "edm":
            total, d = sigma**2 + schedule.sigma_data**2, schedule.sigma_data
            return (data - d**2 / total * x) * math.sqrt(total) / (sigma * d)
        return {
            "epsilon": noise, "sample": data, "v_prediction": alpha * noise - sigma * data, "flow": noise - data,
        }[schedule.prediction]  # fmt: skip

    return model


def ode_error(make, schedule, steps):
    """Distance of the sampler from the exact solution of the probability-flow ODE."""
    sampler = make(schedule, steps)
    grid = sampler.grid
    start = torch.tensor([[-1.0], [0.3], [1.4]], dtype=torch.float64) * max(1.0, grid.sigma[0])
    deviation = [math.sqrt(a**2 * STD**2 + s**2) for a, s in zip(grid.alpha, grid.sigma, strict=True)]
    exact = grid.alpha[-1] * MEAN + deviation[-1] / deviation[0] * (start - grid.alpha[0] * MEAN)
    got = sampler.sample(exact_model(schedule), start=start, dtype=torch.float64)
    return (got - exact).abs().max().item()


SMOOTH = dict(sigmas="exponential", final="first")  # ends where the noise is small, in equal steps of lambda


@pytest.mark.parametrize(
    "make, schedule, order",
    [
        (functools.partial(DDIM, **SMOOTH), PRESERVING, 1),
        (functools.partial(Euler, **SMOOTH), PRESERVING, 1),
        (Euler, EDM, 1),
        (functools.partial(Heun, **SMOOTH), PRESERVING, 2),
        (Heun, EDM, 2),
        (FlowMatchEuler, FLOW, 1),
        (FlowMatchHeun, FLOW, 2),
        (functools.partial(DPMSolverMultistep, order=1, **SMOOTH), PRESERVING, 1),
        (functools.partial(DPMSolverMultistep, order=2, **SMOOTH), PRESERVING, 2),
        (functools.partial(DPMSolverMultistep, order=2, solver="heun", **SMOOTH), PRESERVING, 2),
        (functools.partial(DPMSolverMultistep, order=3, **SMOOTH), PRESERVING, 2),  # see its docstring
        (functools.partial(UniPC, order=1, **SMOOTH), PRESERVING, 2),
        (functools.partial(UniPC, order=2, **SMOOTH), PRESERVING, 3),
        (functools.partial(UniPC, order=2, variant="bh1", **SMOOTH), PRESERVING, 3),
        (functools.partial(UniPC, order=3, **SMOOTH), PRESERVING, 4),
    ],
)
def test_order_of_convergence(make, schedule, order):
    errors = [ode_error(make, schedule, n) for n in (40, 80, 160)]
    assert math.log2(errors[1] / errors[2]) > order - 0.25, errors


def test_higher_orders_of_dpm_solver_are_more_precise():
    errors = [ode_error(functools.partial(DPMSolverMultistep, order=k, **SMOOTH), PRESERVING, 40) for k in (1, 2, 3)]
    assert errors[0] > 3 * errors[1] and errors[1] > 2 * errors[2], errors


@pytest.mark.parametrize(
    "sampler, tolerance",
    [
        (DDPM(PRESERVING, 200), 0.02),
        (DDIM(PRESERVING, 200, eta=1.0), 0.02),
        (EulerAncestral(PRESERVING, 200), 0.03),
        (DPMSolverMultistep(PRESERVING, 80, stochastic=True), 0.02),
        (DPMSolverMultistep(PRESERVING, 80, stochastic=True, order=3), 0.02),
        (UniPC(FLOW, 20), 0.02),
        (DPMSolverMultistep(EDM, 20), 0.02),
        (Euler(EDM, 100), 0.02),
    ],
    ids=lambda s: type(s).__name__,
)
def test_distribution_of_the_samples(sampler, tolerance):
    x = sampler.sample(exact_model(sampler.schedule), (1, 20000), key=random.key(0))
    assert abs(x.mean().item() - MEAN) < tolerance and abs(x.std().item() - STD) < tolerance


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_predictions_agree(prediction):
    """The same data distribution, whatever the model predicts: the same sample."""
    start = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = DPMSolverMultistep(PRESERVING, 10).sample(exact_model(PRESERVING), start=start, dtype=torch.float64)
    schedule = Schedule.scaled_linear(prediction=prediction)
    got = DPMSolverMultistep(schedule, 10).sample(exact_model(schedule), start=start, dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# ---- closed formulas


def one_step(sampler, x, m, n):
    """The first step from x with model output m and noise n."""
    seen = []
    sampler.sample(lambda *_: m, start=x, noise=lambda i: n, dtype=torch.float64, callback=lambda i, t, x: seen.append(x.clone()))
    return seen[0]


def test_steps_by_their_papers():
    x, m, n = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bar = PRESERVING.alphas_cumprod
    now, before = bar[999], bar[899]
    data = (x - math.sqrt(1 - now) * m) / math.sqrt(now)
    beta, alpha = 1 - now / before, now / before
    mean = math.sqrt(before) * beta / (1 - now) * data + math.sqrt(alpha) * (1 - before) / (1 - now) * x  # Ho et al., eq. 7
    torch.testing.assert_close(one_step(DDPM(PRESERVING, 10), x, m, n), mean + math.sqrt((1 - before) / (1 - now) * beta) * n)
    torch.testing.assert_close(one_step(DDPM(PRESERVING, 10, variance="large"), x, m, n), mean + math.sqrt(beta) * n)
    clipped = one_step(DDPM(PRESERVING, 10, clip=1.0), x, m, n) - one_step(DDPM(PRESERVING, 10), x, m, n)
    torch.testing.assert_close(clipped, math.sqrt(before) * beta / (1 - now) * (data.clamp(-1, 1) - data))

    d = 0.5 * math.sqrt((1 - before) / (1 - now) * (1 - now / before))  # Song et al., eq. 12 and 16
    ddim = math.sqrt(before) * data + math.sqrt(1 - before - d**2) * m + d * n
    torch.testing.assert_close(one_step(DDIM(PRESERVING, 10, eta=0.5), x, m, n), ddim)

    torch.testing.assert_close(one_step(FlowMatchEuler(Schedule.flow(), 4), x, m, n), x - 0.25 * m)
    torch.testing.assert_close(one_step(FlowMatchEuler(Schedule.flow(), 4, stochastic=True), x, m, n), 0.25 * (x - m) + 0.75 * n)


def test_schedules():
    torch.testing.assert_close(Schedule.linear(10, 0.1, 0.2).alphas_cumprod, np.cumprod(1 - np.linspace(0.1, 0.2, 10)))
    cosine = Schedule.cosine(100).alphas_cumprod
    assert cosine[49] == pytest.approx((math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)) ** 2)
    zero = Schedule.linear(prediction="v_prediction", zero_snr=True).alphas_cumprod
    assert zero[-1] == 0 and zero[0] == pytest.approx(Schedule.linear().alphas_cumprod[0])
    assert [g.t for g in (PRESERVING.grid(4, spacing=s) for s in ("trailing", "leading", "linspace"))] == [
        [999, 749, 499, 249], [750, 500, 250, 0], [999, 666, 333, 0],
    ]  # fmt: skip
    assert all(PRESERVING.grid(n).t[-1] >= 0 and len(PRESERVING.grid(n)) == n for n in (242, 466, 970, 998))
    assert FLOW.grid(4).sigma == [1.0, pytest.approx(6 / 7), pytest.approx(2 / 3), pytest.approx(0.4), 0.0]
    karras = PRESERVING.grid(5, sigmas="karras")
    roots = np.diff([(s / a) ** (1 / 7) for a, s in zip(karras.alpha[:-1], karras.sigma[:-1], strict=True)])
    np.testing.assert_allclose(roots, roots[0])


def test_beta_spacing():
    stats = pytest.importorskip("scipy.stats")
    grid = PRESERVING.grid(9, sigmas="beta")
    ratios = np.array(grid.sigma[:-1]) / np.array(grid.alpha[:-1])
    u = (ratios - ratios[-1]) / (ratios[0] - ratios[-1])
    np.testing.assert_allclose(u, stats.beta.ppf(np.linspace(1, 0, 9), 0.6, 0.6), atol=1e-4)


@pytest.mark.parametrize("make", [DDIM, DDPM, Euler, EulerAncestral, Heun, DPMSolverMultistep, UniPC])
def test_pure_noise_start(make):
    """Zero terminal signal-to-noise ratio: finite, and close to a start just before it."""
    schedule = Schedule.scaled_linear(prediction="v_prediction", zero_snr=True)
    x = make(schedule, 20).sample(exact_model(schedule), (2, 3), key=random.key(1))
    assert x.isfinite().all()
    with pytest.raises(ValueError, match="zero_snr"):
        make(Schedule.scaled_linear(zero_snr=True), 20)


@pytest.mark.parametrize("make", [DPMSolverMultistep, functools.partial(DPMSolverMultistep, order=3), UniPC])
def test_equal_last_sigmas(make):
    x = make(PRESERVING, 20, sigmas="karras", final="first").sample(exact_model(PRESERVING), (2, 3), key=random.key(1))
    assert x.isfinite().all()


# ---- the loop


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x, t, context):
        assert t.shape == x.shape[:1] and t.dtype == torch.int64
        return self.linear(x) + context * t[:, None] / 1000


def test_guidance_is_a_doubled_batch():
    torch.manual_seed(0)
    net, context, start = Net(), torch.randn(3, 4), torch.randn(3, 4)
    for make in (DDIM, DPMSolverMultistep, UniPC, Euler):
        sampler = make(PRESERVING, 6)
        got = sampler.sample(
            net, start=start, conditions={"context": context}, unconditional={"context": torch.zeros(3, 4)}, guidance_scale=3.0
        )
        mixed = lambda x, t: net(x, t, torch.zeros(3, 4)) + 3.0 * (net(x, t, context) - net(x, t, torch.zeros(3, 4)))
        torch.testing.assert_close(got, sampler.sample(mixed, start=start), rtol=1e-4, atol=1e-4)
        doubled = {"context": torch.cat([torch.zeros(3, 4), context])}
        assert torch.equal(got, sampler.sample(net, start=start, conditions=doubled, guidance_scale=3.0))
        off = sampler.sample(net, start=start, conditions=doubled, guidance_scale=3.0, guidance_interval=(0.5, 0.4))
        torch.testing.assert_close(off, sampler.sample(net, start=start, conditions={"context": context}), rtol=1e-4, atol=1e-4)


def test_guidance_rescale():
    torch.manual_seed(0)
    net, contexts, start = Net(), torch.randn(6, 4), torch.randn(3, 4)

    def rescaled(x, t):
        u, c = net(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
        m = u + 5.0 * (c - u)
        return m * (0.7 * c.std(1, keepdim=True) / m.std(1, keepdim=True) + 0.3)

    sampler = DPMSolverMultistep(PRESERVING, 5)
    got = sampler.sample(net, start=start, conditions={"context": contexts}, guidance_scale=5.0, guidance_rescale=0.7)
    torch.testing.assert_close(got, sampler.sample(rescaled, start=start), rtol=1e-4, atol=1e-4)


def test_projected_guidance():
    """Sadat et al., 2024, algorithm 1 without momentum, and rescaled."""
    torch.manual_seed(0)
    net, contexts, start = Net(), torch.randn(6, 4), torch.randn(3, 4)

    def projected(x, t):
        u, c = net(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
        d = c - u
        d = d * (1.5 / d.norm(dim=1, keepdim=True)).clamp(max=1)
        along = (d * c).sum(1, keepdim=True) / (c * c).sum(1, keepdim=True) * c
        m = c + 4.0 * (d - along + 0.3 * along)
        return m * (0.2 * c.std(1, keepdim=True) / m.std(1, keepdim=True) + 0.8)

    sampler = DPMSolverMultistep(PRESERVING, 5)
    got = sampler.sample(
        net, start=start, conditions={"context": contexts}, guidance_scale=5.0, guidance_rescale=0.2, guidance_parallel=0.3,
        guidance_max_norm=1.5,
    )  # fmt: skip
    torch.testing.assert_close(got, sampler.sample(projected, start=start), rtol=1e-4, atol=1e-4)


def test_projected_guidance_with_momentum():
    """Sadat et al., 2024, algorithm 1: the difference of a step goes on in the next one."""
    torch.manual_seed(0)
    net, contexts, start, before = Net(), torch.randn(6, 4), torch.randn(3, 4), []

    def projected(x, t):
        u, c = net(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
        d = c - u - (0.5 * before[-1] if before else 0.0)
        before.append(d)
        return c + 4.0 * d * (1.5 / d.norm(dim=1, keepdim=True)).clamp(max=1)

    sampler = DPMSolverMultistep(PRESERVING, 5)
    settings = dict(start=start, conditions={"context": contexts}, guidance_scale=5.0, guidance_max_norm=1.5)
    got = sampler.sample(net, **settings, guidance_momentum=-0.5)
    torch.testing.assert_close(got, sampler.sample(projected, start=start), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="guidance_momentum needs"):
        sampler.sample(projected, start=start, guidance_momentum=-0.5)


def test_cfg_plus_plus():
    """Chung et al., 2024, algorithm 2: the guided x_0, the noise without the condition."""
    torch.manual_seed(0)
    net, contexts, x = Net(), torch.randn(6, 4), torch.randn(3, 4)
    sampler = DDIM(PRESERVING, 5, cfg_plus_plus=True)
    got = sampler.sample(net, start=x, conditions={"context": contexts}, guidance_scale=0.6)
    alpha, sigma = sampler.grid.alpha, sampler.grid.sigma
    for i, t in enumerate(sampler.grid.t):
        u, c = net(torch.cat([x, x]), torch.full((6,), int(t)), contexts).detach().chunk(2)
        x = alpha[i + 1] * (x - sigma[i] * (u + 0.6 * (c - u))) / alpha[i] + sigma[i + 1] * u
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    plain = DDIM(PRESERVING, 5).sample(exact_model(PRESERVING), start=x)  # without guidance there is one output
    torch.testing.assert_close(sampler.sample(exact_model(PRESERVING), start=x), plain)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_inverse_of_ddim(prediction):
    """To noise and back; the error of both ways falls with the steps, and the way there is the formula's."""
    schedule, start = Schedule.scaled_linear(prediction=prediction), torch.tensor([[0.1], [0.7], [1.1]], dtype=torch.float64)
    model, errors = exact_model(schedule), []
    for steps in (50, 200):
        noise = DDIM(schedule, steps, inverse=True).sample(model, start=start, dtype=torch.float64)
        errors.append((DDIM(schedule, steps).sample(model, start=noise, dtype=torch.float64) - start).abs().max().item())
    assert errors[1] < 0.3 * errors[0] and errors[1] < 0.02, errors  # of first order
    grid, seen = DDIM(schedule, 4, inverse=True).grid, []
    constant = torch.full((1, 3), 0.3, dtype=torch.float64)
    DDIM(schedule, 4, inverse=True).sample(
        lambda x, t: seen.append(int(t[0])) or constant,
        start=constant,
        callback=lambda i, t, x: seen.append(x.clone()),
        dtype=torch.float64,
    )
    assert seen[::2] == [249, 499, 749, 999] and grid.alpha[0] == 1
    torch.testing.assert_close(seen[1], grid.alpha[1] * constant + grid.sigma[1] * constant)  # without noise both outputs are eps
    with pytest.raises(ValueError, match="inverse needs"):
        DDIM(Schedule.scaled_linear(prediction="sample"), 4, inverse=True)


def test_keys_per_sample_do_not_depend_on_the_batch():
    sampler, model = EulerAncestral(PRESERVING, 5), exact_model(PRESERVING)
    keys = random.split(random.key(2), 3)
    together = sampler.sample(model, (3, 7), key=keys)
    for i in range(3):
        torch.testing.assert_close(sampler.sample(model, (1, 7), key=keys[i : i + 1]), together[i : i + 1])


def test_image_to_image_takes_the_last_steps():
    image, model, seen = torch.full((2, 5), MEAN), exact_model(PRESERVING), []
    sampler = DPMSolverMultistep(PRESERVING, 10)
    sampler.sample(model, image=image, strength=0.3, key=random.key(0), callback=lambda i, t, x: seen.append(int(t[0])))
    assert seen == [int(t) for t in sampler.grid.t[-3:]]
    kept = sampler.sample(model, image=image, strength=0.1, key=random.key(0))
    assert (kept - image).abs().max() < 1.0


@pytest.mark.parametrize("make", [DDIM, EulerAncestral, DPMSolverMultistep, Heun])
def test_inpainting_keeps_the_image_outside_the_mask(make):
    image, mask = torch.linspace(-1, 1, 5).expand(2, 5), torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0])
    inputs, sampler = [], make(PRESERVING, 8)
    exact = exact_model(PRESERVING)

    def model(x, t):
        inputs.append(x.clone())
        return exact(x, t)

    x = sampler.sample(model, image=image, mask=mask, key=random.key(0))
    torch.testing.assert_close(x * (1 - mask), image * (1 - mask))
    assert ((x - image).abs() * mask > 1e-3).any()
    rows, n = sampler.rows(sampler.grid), random.normal(random.split(random.key(0), len(inputs) + 1)[0], image.shape)
    for row, given in zip(rows, inputs, strict=True):
        noisy = row.scale * (row.level[0] * image + row.level[1] * n)
        torch.testing.assert_close(given * (1 - mask), noisy * (1 - mask), rtol=1e-4, atol=1e-4)


def test_samples_at_different_steps_of_different_schedules():
    """One call for a batch whose samples are elsewhere: as each of them alone."""
    solvers = [DPMSolverMultistep(PRESERVING, 8), DPMSolverMultistep(Schedule.linear(), 5), UniPC(FLOW, 6, order=1)]
    tables = [s.table(s.rows(s.grid)).float() for s in solvers]
    first = [0, len(tables[0]), len(tables[0]) + len(tables[1])]
    at = torch.tensor([first[0] + 3, first[1] + 1, first[2] + 4, first[0] + 7])
    x, m, h = torch.randn(3, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    keys = random.split(random.key(1), 4)
    new, kept = sampler_step(x, m, torch.cat(tables), at, h, noise=True, key=keys)
    for i, (solver, row) in enumerate([(0, 3), (1, 1), (2, 4), (0, 7)]):
        alone = sampler_step(*(t[i : i + 1] for t in (x, m)), tables[solver], row, h[i : i + 1], noise=True, key=keys[i : i + 1])
        assert torch.equal(new[i : i + 1], alone[0]) and torch.equal(kept[i : i + 1], alone[1])


def test_low_precision_models_and_no_gradients():
    start, seen, net = torch.randn(2, 6), [], torch.nn.Linear(6, 6)

    def model(x, t):
        seen.append(x.dtype)
        return net(x.float()).to(x.dtype)

    x = DDIM(PRESERVING, 4).sample(model, start=start, model_dtype=torch.bfloat16)
    assert x.dtype == torch.float32 and set(seen) == {torch.bfloat16} and not x.requires_grad and torch.is_grad_enabled()


@pytest.mark.parametrize("make", [DDIM, DDPM, Euler, DPMSolverMultistep, UniPC, functools.partial(DDIM, cfg_plus_plus=True)])
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("steps", [1, 2, 6])
def test_buffers_are_the_samplers_own(make, guided, steps):
    """A model may return its very input, which steps overwrite; start is not changed; samples hold no more memory than they need."""
    start, seen, sampler = torch.randn(2, 5), [], make(PRESERVING, steps)
    options = dict(key=random.key(0), start=start.clone(), **({"guidance_scale": 2.0} if guided else {}))
    expected = sampler.sample(lambda x, t: x.clone(), **options)
    got = sampler.sample(lambda x, t: x, callback=lambda i, t, x: seen.append(x.clone()), **options)
    assert torch.equal(got, expected) and torch.equal(seen[-1], got) and len(seen) == steps
    assert torch.equal(options["start"], start) and got.untyped_storage().nbytes() == got.nbytes
    assert got.data_ptr() != options["start"].data_ptr()


def test_history_begins_at_zero():
    """A sampler of one's own may weigh a history term that is not there yet."""

    class Averaged(FlowMatchEuler):
        history = 1

        def rows(self, grid):
            rows = super().rows(grid)
            return [dataclasses.replace(r, sample={**r.sample, "h1": 0.5}, history={"y": 0.1, "h1": 0.9}) for r in rows]

    x, model = torch.randn(2, 5), exact_model(FLOW)
    sampler, h, y = Averaged(FLOW, 4), 0.0, x
    for row in sampler.rows(sampler.grid):
        m = model(y, torch.tensor([row.t]))
        data, of = row.data[0] * y + row.data[1] * m, row.sample
        y = of.get("x", 0.0) * y + of.get("m", 0.0) * m + of.get("y", 0.0) * data + 0.5 * h
        h = 0.1 * data + 0.9 * h
    torch.testing.assert_close(sampler.sample(model, start=x), y, rtol=1e-4, atol=1e-4)


def test_torch_seed_rules_without_a_key():
    outputs = []
    for _ in range(2):
        torch.manual_seed(5)
        outputs.append(DDPM(PRESERVING, 4).sample(exact_model(PRESERVING), (2, 3)))
    assert torch.equal(*outputs)


def test_refusals():
    model = exact_model(PRESERVING)
    for error, call in [
        (ValueError, lambda: Euler(FLOW)),
        (ValueError, lambda: FlowMatchEuler(PRESERVING)),
        (ValueError, lambda: DDIM(PRESERVING, 0)),
        (ValueError, lambda: DDIM(PRESERVING, 2000)),
        (ValueError, lambda: DDIM(PRESERVING, spacing="none")),
        (ValueError, lambda: DDIM(PRESERVING, timesteps=[1, 2])),
        (ValueError, lambda: LCM(PRESERVING, 60)),
        (ValueError, lambda: Schedule([0.5, 0.6])),
        (ValueError, lambda: DDIM(PRESERVING).sample(model)),
        (ValueError, lambda: DDIM(PRESERVING).sample(model, (2, 3), strength=0.0)),
        (ValueError, lambda: DDIM(PRESERVING).sample(model, (2, 3), unconditional={})),
        (ValueError, lambda: DDIM(PRESERVING).sample(model, (2, 3), mask=torch.ones(3))),
        (ValueError, lambda: DDIM(PRESERVING).sample(lambda x, t: x[:1], (2, 3))),
        (ValueError, lambda: DDIM(PRESERVING).sample(model, image=torch.zeros(2, 3), mask=torch.ones(4, 2, 3))),
        (ValueError, lambda: DDIM(PRESERVING, threshold=1.5)),
        (ValueError, lambda: DDIM(PRESERVING).sample(model, (2, 3), guidance_scale=2.0, guidance_rescale=1.5)),
        (ValueError, lambda: DDIM(PRESERVING, clip=-1.0)),
        (ValueError, lambda: DDPM(PRESERVING, 4).sample(model, start=torch.zeros(3, 2), key=random.split(random.key(0), 2))),
        (ValueError, lambda: DDPM(PRESERVING, 4).sample(model, start=torch.zeros(3, 2), noise=lambda i: torch.zeros(1, 2))),
        (ValueError, lambda: DDIM(PRESERVING).sample(model, start=torch.zeros(3, 2), image=torch.zeros(3, 2))),
    ]:
        with pytest.raises(error):
            call()
