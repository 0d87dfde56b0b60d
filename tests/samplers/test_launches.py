"""What a step costs on a GPU, counted without one: one launch, no synchronisation."""

import functools

import pytest
import torch

from genkern import random, samplers
from genkern.samplers import Schedule, _sampler
from genkern.testing import count_launches

SHAPE = (2, 4, 8, 8)
STEP = "genkern::_sampler_step"


def steps_of(sampler, **arguments):
    """Counts of each step of sample(), the model aside; and the samples."""
    guided = "guidance_scale" in arguments
    with count_launches() as counts:
        outputs = torch.randn((SHAPE[0] * (1 + guided), *SHAPE[1:]), device="cuda")
        seen = []

        def model(x, t):
            counts.reset()
            return outputs

        x = sampler.sample(
            model, SHAPE, key=random.key(0), device="cuda", callback=lambda i, t, x: seen.append(counts.reset()), **arguments
        )
        return seen, x.cpu()


PRESERVING, FLOW = Schedule.scaled_linear(), Schedule.flow()
SAMPLERS = [
    samplers.DDPM(PRESERVING, 4),
    samplers.DDIM(PRESERVING, 4, eta=0.5, clip=1.0),
    samplers.Euler(PRESERVING, 4),
    samplers.EulerAncestral(PRESERVING, 4),
    samplers.Heun(Schedule.edm(), 4),
    samplers.LCM(PRESERVING, 4),
    samplers.DPMSolverMultistep(PRESERVING, 4, order=3, stochastic=True),
    samplers.UniPC(PRESERVING, 4),
    samplers.FlowMatchHeun(FLOW, 4),
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
def test_one_launch_and_no_sync_per_step(sampler, guided):
    seen, x = steps_of(sampler, **({"guidance_scale": 7.5} if guided else {}))
    assert len(seen) >= 4 and x.isfinite().all()
    for counts in seen:
        assert (counts.launches, counts.syncs, counts.uploads) == ([STEP], [], [])


def test_adaptive_guidance_is_one_launch_more():
    sampler = samplers.DPMSolverMultistep(PRESERVING, 4)
    for arguments in ({"guidance_rescale": 0.7}, {"guidance_parallel": 0.0, "guidance_max_norm": 2.5}):
        for counts in steps_of(sampler, guidance_scale=7.5, **arguments)[0]:
            assert (counts.launches, counts.syncs, counts.uploads) == (["genkern::_guidance_moments", STEP], [], [])
    for counts in steps_of(samplers.DDPM(PRESERVING, 4, threshold=0.9), guidance_scale=7.5)[0]:
        assert (counts.launches, counts.syncs, counts.uploads) == (["genkern::_dynamic_threshold", STEP], [], [])


@pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
@pytest.mark.parametrize("sampler", [*SAMPLERS, samplers.DDPM(PRESERVING, 4, threshold=0.9)], ids=lambda s: type(s).__name__)
def test_a_whole_loop_can_be_captured(sampler, guided):
    """What a graph demands, as far as it shows without a GPU: after one call that warms up, a whole run with its first sample and
    the split of a key on the device neither waits nor uploads, and launches the same on other data, NaN too."""
    options, runs = {"guidance_scale": 7.5, "guidance_rescale": 0.7} if guided else {}, []
    with count_launches() as counts:
        key, scale = random.key(0).to("cuda"), torch.ones((), device="cuda")

        def model(x, t):  # of tensors alone
            assert x.device.type == t.device.type == "cuda"
            return x * scale + t.view(-1, 1, 1, 1)

        for value in (None, 1.0, 1e4, float("nan")):
            if value is not None:
                scale.fill_(value)
            counts.reset()
            samples = sampler.sample(model, (3, *SHAPE[1:]), key=key, device="cuda", **options)  # a shape new to the samplers
            runs.append(counts.reset())
        assert samples.device.type == "cuda"
    first, *others = runs
    assert first.uploads  # the tables, once
    for run in others:
        assert not run.syncs and not run.uploads
        assert run.launches == others[0].launches and run.bytes == others[0].bytes
        assert run.launches.count(STEP) == len(sampler.rows(sampler.grid))


def test_a_sync_anywhere_is_seen(monkeypatch):
    """The promise above is not empty: one .item() in the loop shows, and so does a launch."""
    bound = _sampler._sampler_step.bound

    def slow(tensor, calls):
        backend, step = bound(tensor, calls)
        return backend, lambda x, *rest: (step(x, *rest), x.abs().max().item())

    monkeypatch.setattr(_sampler._sampler_step, "bound", slow)
    seen, _ = steps_of(samplers.DDIM(PRESERVING, 4))
    assert all(counts.syncs == ["item"] and counts.launches == [STEP, "abs", "max"] for counts in seen)


def test_what_is_counted():
    with count_launches() as counts:
        x = torch.ones(3, device="cuda")
        assert x.device.type == "cuda" and counts.reset().launches == ["ones"]
        for wait in (
            x[0].item, x.tolist, x.cpu, x.nonzero, lambda: float(x[1]), lambda: bool(x[0] > 0), lambda: x[x > 0],
            lambda: [0, 1][x[0].int()],
            lambda: torch.empty(3).copy_(x), lambda: torch.equal(x, x), lambda: x.to("cpu", torch.float64),
        ):  # fmt: skip
            wait()
            assert len(counts.reset().syncs) == 1
        for upload in (lambda: torch.tensor([1.0], device="cuda"), lambda: torch.ones(3).to("cuda"), lambda: x.copy_(torch.ones(3))):
            upload()
            seen = counts.reset()
            assert len(seen.uploads) == 1 and not seen.launches and not seen.syncs
        for free in (
            lambda: x.view(3, 1)[1:].T,
            lambda: torch.empty(3, device=x.device),
            lambda: x.to("cuda"),
            lambda: torch.ones(3) + 1,
        ):
            free()
            assert counts.reset() == type(counts)()
        y = torch.cat([x, 2 * x]).add_(1)
        assert y.device.type == "cuda" and y.tolist() == [2, 2, 2, 3, 3, 3]
        assert counts.launches == ["mul", "cat", "add_"] and counts.bytes == 24 + 48 + 48
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
    with pytest.raises(RuntimeError, match="after it ended"):
        x + 1
    assert torch.ones(1).device.type == "cpu"


def test_values_are_those_of_the_cpu():
    sampler = samplers.DPMSolverMultistep(PRESERVING, 4, stochastic=True)
    model = functools.partial(torch.mul, 0.5)
    with count_launches():
        on_device = sampler.sample(lambda x, t: model(x), SHAPE, key=random.key(0), device="cuda").cpu()
    assert torch.equal(on_device, sampler.sample(lambda x, t: model(x), SHAPE, key=random.key(0)))
