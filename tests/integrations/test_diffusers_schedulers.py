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


@pytest.mark.parametrize("name, config", [("DDPM", {}), ("LCM", dict(clip_sample=False, **LATENT))], ids=["DDPM", "LCM"])
def test_keyed_noise(name, config):
    """The same generator gives the same samples, each generator of a list its own; the noise is that of a diffusion, not diffusers'."""

    def sample(generator, scheduler, count=2):
        scheduler.set_timesteps(4)
        x, m = torch.ones(count, 4, 8, 8), torch.zeros(count, 4, 8, 8)
        for t in scheduler.timesteps:
            x = scheduler.step(m, t, x, generator=generator).prev_sample
        return x

    seeded = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]
    scheduler = fuse_scheduler(make(name, config), keyed_noise=True)
    x = sample(seeded(1)[0], scheduler)
    assert torch.equal(x, sample(seeded(1)[0], scheduler)) and not torch.equal(x, sample(seeded(2)[0], scheduler))
    several = sample(seeded(5, 6), scheduler)
    assert torch.equal(several[1:], sample(seeded(6), scheduler, 1)) and not torch.equal(several[0], several[1])
    plain = sample(seeded(1)[0], make(name, config))
    assert not torch.equal(plain, x) and 0.7 < x.std() / plain.std() < 1.4
    with pytest.raises(ValueError, match="keyed_noise"):
        fuse_scheduler(type(scheduler), keyed_noise=True)


def test_copies_and_undoing():
    scheduler = fuse_scheduler(make("DPMSolverMultistep", LATENT))
    other = copy.deepcopy(scheduler)
    run(scheduler, 10)
    assert other.step_index is None  # its step is its own
    run(other, 10)
    assert unfuse_scheduler(scheduler).step.__func__ is type(scheduler).step


PROBED = [
    ("PNDM", dict(skip_prk_steps=True, steps_offset=1, **LATENT), 2),
    ("HeunDiscrete", LATENT, 2),
    ("DPMSolverMultistep", dict(algorithm_type="dpmsolver", final_sigmas_type="sigma_min", **LATENT), 1),
    ("DEISMultistep", dict(solver_order=3, **LATENT), 1),
    ("LCM", dict(clip_sample=False, **LATENT), 1),
    ("FlowMatchEulerDiscrete", dict(shift=3.0, stochastic_sampling=True), 1),
]


@pytest.mark.parametrize("name, config, launches", PROBED, ids=[c[0] for c in PROBED])
def test_any_linear_scheduler(name, config, launches):
    original, scheduler = make(name, config), fuse_scheduler(make(name, config))
    for steps, begin in ((12, 0), (10, 4), (12, 0)):
        results = []
        for s in (original, scheduler):
            s.set_timesteps(steps)
            if begin and hasattr(s, "set_begin_index"):
                s.set_begin_index(begin)
            generator, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
            outputs = torch.randn(2 * steps, 2, 4, 8, 8, generator=generator)
            x = torch.randn(2, 4, 8, 8, generator=generator)
            more = {} if name in ("PNDM", "HeunDiscrete", "DEISMultistep") else {"generator": draws}
            for m, t in zip(outputs, s.timesteps[begin:], strict=False):
                if hasattr(s, "scale_model_input"):
                    s.scale_model_input(x, t)
                last, as_tuple = (
                    (s.step(m, t, x, **more), None) if t == s.timesteps[-1] else (None, s.step(m, t, x, **more, return_dict=False))
                )
                x = last.prev_sample if last is not None else as_tuple[0]
            results.append(last)
        expected, got = results
        assert type(got) is type(expected)
        for field, value in expected.items():
            assert (got[field] - value).abs().max() <= 5e-6 * max(1.0, value.abs().max()), field


class Damped(diffusers.DDIMScheduler):
    """A user's own."""

    def step(self, *args, **kwargs):
        result = super().step(*args, **kwargs)
        return (result[0] * 0.9, *result[1:]) if isinstance(result, tuple) else result


class Saturated(diffusers.DDIMScheduler):
    def step(self, *args, **kwargs):
        return (super().step(*args, **{**kwargs, "return_dict": False})[0].tanh(),)


def test_a_subclass_of_the_user():
    config = dict(clip_sample=False, **LATENT)
    original, scheduler = Damped(**config), fuse_scheduler(Damped)(**config)
    assert type(scheduler).__name__ == "Damped" and isinstance(scheduler, Damped)
    for s in (original, scheduler):
        s.set_timesteps(8)
    x, m = torch.randn(2, 2, 4, 8, 8)
    y = x
    for t in original.timesteps:
        x, y = original.step(m, t, x, return_dict=False)[0], scheduler.step(m, t, y, return_dict=False)[0]
    torch.testing.assert_close(y, x, rtol=5e-6, atol=5e-6)


def test_classes_under_their_own_names(tmp_path):
    from genkern.integrations import diffusers as fused

    scheduler = fused.DPMSolverMultistepScheduler(**LATENT)
    assert type(scheduler).__name__ == "DPMSolverMultistepScheduler" and type(scheduler).__module__.startswith("diffusers.")
    scheduler.save_pretrained(tmp_path)
    plain = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    assert type(plain) is diffusers.DPMSolverMultistepScheduler and plain.to_json_string() == scheduler.to_json_string()
    other = fused.UniPCMultistepScheduler.from_config(scheduler.config)
    assert other.compatibles == diffusers.UniPCMultistepScheduler.from_config(scheduler.config).compatibles
    again = fused.DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    for s in (scheduler, again, copy.deepcopy(again)):
        torch.testing.assert_close(run(s, 8).prev_sample, run(plain, 8).prev_sample, rtol=5e-6, atol=5e-6)
    assert not hasattr(fused, "NoScheduler")


def test_clipping_and_thresholding():
    for name, config in [
        ("DDIM", dict(thresholding=True, sample_max_value=1.5, **LATENT)),
        ("DDPM", dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)),
        ("DPMSolverMultistep", dict(thresholding=True, sample_max_value=1.5, **LATENT)),
        ("UniPCMultistep", dict(thresholding=True, sample_max_value=1.5, **LATENT)),
    ]:
        expected, got = run(make(name, config), 10), run(fuse_scheduler(make(name, config)), 10)
        for field, value in expected.items():
            assert (got[field] - value).abs().max() <= 5e-6 * max(1.0, value.abs().max()), field


@pytest.mark.parametrize("name", ["DDPM", "DPMSolverMultistep"])
@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_learned_variance(name, variance):
    """To diffusers "learned" is the variance itself, not its logarithm; DPM-Solver++ leaves the second half aside."""
    original, scheduler = (make(name, dict(variance_type=variance)) for _ in range(2))
    fuse_scheduler(scheduler)
    results = []
    for s in (original, scheduler):
        s.set_timesteps(10)
        generator, draws, x = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2), torch.ones(2, 3, 8, 8)
        for t in s.timesteps:
            m = torch.randn(2, 6, 8, 8, generator=generator).clamp(-1, 1)
            m[:, 3:] = m[:, 3:].abs() if variance == "learned" else m[:, 3:]
            x = s.step(m, t, x, generator=draws).prev_sample
        results.append(x)
    torch.testing.assert_close(*results, rtol=5e-6, atol=5e-6)


def test_refusals():
    with pytest.raises(TypeError, match="fuse_scheduler: "):
        fuse_scheduler(torch.nn.Identity())
    for scheduler, cause in [
        (make("LCM", dict(clip_sample=True)), "clip_sample"),
        (make("DEISMultistep", dict(thresholding=True)), "thresholding"),
        (Saturated(clip_sample=False), "not linear"),
        (make("PNDM", {}), "history"),
    ]:
        with pytest.raises(ValueError, match=f"fuse_scheduler: {type(scheduler).__name__} .*{cause}"):
            fuse_scheduler(scheduler)


@pytest.mark.parametrize(
    "name, config", [("DDPM", {}), ("DPMSolverMultistep", LATENT), ("UniPCMultistep", LATENT), ("DEISMultistep", LATENT)]
)
def test_one_launch_and_no_sync_per_step(name, config, monkeypatch):
    """On a GPU, with the timesteps there as pipelines have them; their draw of the noise aside."""
    from genkern.integrations import _diffusers_steps
    from genkern.testing import count_launches

    scheduler = fuse_scheduler(make(name, config))
    with count_launches() as counts:
        monkeypatch.setattr(
            _diffusers_steps, "randn_tensor", lambda shape, generator, device, dtype: torch.empty(tuple(shape), device=device).zero_()
        )
        scheduler.set_timesteps(8, device="cuda")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        x, seen = torch.randn(2, 4, 8, 8, device="cuda"), []
        outputs = torch.randn(2, 4, 8, 8, device="cuda")
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            counts.reset()
            x = scheduler.step(outputs, t, x, return_dict=False)[0]
            seen.append(counts.reset())
        for step in seen[1:]:  # the first one makes the table
            assert [name for name in step.launches if name != "zero_"] == ["genkern::_sampler_step"]
            assert not step.syncs and not step.uploads
