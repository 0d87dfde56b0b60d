"""Fused schedulers of diffusers: the same object, steps equal to its own, refusals."""

import copy

import pytest
import torch

import genkern

diffusers = pytest.importorskip("diffusers")
from genkern.integrations.diffusers import fuse_scheduler, unfuse_scheduler  # noqa: E402

LATENT = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
CASES = [
    ("DDPM", {}, {}),
    ("DDPM", dict(variance_type="fixed_large", prediction_type="v_prediction", timestep_spacing="trailing"), {}),
    ("DDIM", dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1, **LATENT), {}),
    ("DDIM", dict(timestep_spacing="linspace", prediction_type="sample", **LATENT), dict(eta=0.6)),
    ("EulerDiscrete", LATENT, {}),
    ("EulerDiscrete", dict(prediction_type="v_prediction", use_karras_sigmas=True, timestep_spacing="trailing", **LATENT), {}),
    ("EulerAncestralDiscrete", LATENT, {}),
    ("UniPCMultistep", LATENT, {}),
    ("UniPCMultistep", dict(solver_type="bh1", final_sigmas_type="sigma_min", use_karras_sigmas=True, **LATENT), {}),
    ("UniPCMultistep", dict(solver_order=3, **LATENT), {}),
    ("UniPCMultistep", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), {}),
    ("DPMSolverMultistep", LATENT, {}),
    ("DPMSolverMultistep", dict(solver_order=3, use_karras_sigmas=True, **LATENT), {}),
    ("DPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++", solver_type="heun", final_sigmas_type="sigma_min", **LATENT), {}),
    ("DPMSolverMultistep", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), {}),
]


def make(name, config):
    return getattr(diffusers, name + "Scheduler")(**config)


def run(scheduler, steps=20, begin=0, dtype=torch.float32, **arguments):
    scheduler.set_timesteps(steps)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    generator, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    x, outputs = torch.randn(2, 4, 8, 8, generator=generator).to(dtype), torch.randn(steps, 2, 4, 8, 8, generator=generator).to(dtype)
    for i, t in enumerate(scheduler.timesteps[begin:]):
        scheduler.scale_model_input(x, t)
        result = scheduler.step(outputs[i], t, x, **arguments | ({} if "UniPC" in type(scheduler).__name__ else {"generator": draws}))
        x = result.prev_sample
    return result


@pytest.mark.parametrize("name, config, arguments", CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_equals_its_own_step(name, config, arguments):
    original, scheduler = make(name, config), make(name, config)
    assert fuse_scheduler(scheduler) is scheduler and type(scheduler).__name__ == name + "Scheduler"
    genkern.reset_stats()
    for steps, begin in ((20, 0), (12, 5), (20, 0)):
        expected, got = (run(s, steps, begin, **arguments) for s in (original, scheduler))
        assert type(got) is type(expected)
        for field, value in expected.items():
            assert (got[field] - value).abs().max() <= 5e-6 * max(1.0, value.abs().max()), field
    assert sum(genkern.stats().values()) == 20 + 7 + 20
    low = run(scheduler, 20, dtype=torch.bfloat16, **arguments).prev_sample
    assert low.dtype == torch.bfloat16 and low.isfinite().all()


def test_copies_and_undoing():
    scheduler = fuse_scheduler(make("DPMSolverMultistep", LATENT))
    other = copy.deepcopy(scheduler)
    run(scheduler, 10)
    assert other.step_index is None  # its step is its own
    run(other, 10)
    assert unfuse_scheduler(scheduler).step.__func__ is type(scheduler).step


def test_refusals():
    for error, name, config in [
        (TypeError, "LCM", {}),
        (ValueError, "DDPM", dict(thresholding=True)),
        (ValueError, "DDPM", dict(variance_type="learned_range")),
        (ValueError, "DPMSolverMultistep", dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min")),
    ]:
        with pytest.raises(error, match="fuse_scheduler: "):
            fuse_scheduler(make(name, config))
    with pytest.raises(RuntimeError, match="not reproduced"):

        class DDIMScheduler(diffusers.DDIMScheduler):
            def step(self, *args, **kwargs):
                return (super().step(*args, **kwargs)[0] * 1.1,)

        fuse_scheduler(DDIMScheduler())
