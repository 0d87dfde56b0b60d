"""Samplers against the schedulers of the installed diffusers: 20 steps of the same random model outputs and noise, in float32."""

import sys

import numpy as np
import pytest
import torch

from genkern import samplers
from genkern.samplers import Schedule

diffusers = pytest.importorskip("diffusers")
LATENT = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
V = dict(prediction_type="v_prediction")
STEPS, SHAPE = 20, (2, 4, 8, 8)


def preserving(scheduler):
    return Schedule(scheduler.alphas_cumprod.double(), scheduler.config.prediction_type)


def flow(scheduler):
    return Schedule.flow(shift=3.0)


CASES = [  # scheduler, configuration, arguments of set_timesteps and step; schedule, sampler, arguments
    ("DDPM", dict(clip_sample=False, timestep_spacing="trailing"), {}, {}, preserving, "DDPM", {}),
    ("DDPM", dict(clip_sample=False, timestep_spacing="trailing", **V), {}, {}, preserving, "DDPM", {}),
    (
        "DDPM", dict(variance_type="fixed_large", prediction_type="sample"), {}, {}, preserving, "DDPM",
        dict(spacing="leading", variance="large", clip=1.0),
    ),
    ("DDIM", dict(clip_sample=False, timestep_spacing="trailing", **LATENT), {}, {}, preserving, "DDIM", {}),
    (
        "DDIM", dict(clip_sample=False, steps_offset=1, set_alpha_to_one=False, **LATENT, **V), {}, dict(eta=0.7), preserving, "DDIM",
        dict(spacing="leading", offset=1, final="first", eta=0.7),
    ),
    ("EulerDiscrete", dict(timestep_spacing="trailing", **LATENT), {}, {}, preserving, "Euler", {}),
    ("EulerAncestralDiscrete", dict(timestep_spacing="trailing", **LATENT, **V), {}, {}, preserving, "EulerAncestral", {}),
    ("HeunDiscrete", dict(timestep_spacing="trailing", **LATENT), {}, {}, preserving, "Heun", {}),
    ("DPMSolverMultistep", LATENT, {}, {}, preserving, "DPMSolverMultistep", dict(spacing="linspace")),
    (
        "DPMSolverMultistep", dict(solver_type="heun", use_karras_sigmas=True, **LATENT, **V), {}, {}, preserving, "DPMSolverMultistep",
        dict(solver="heun", sigmas="karras"),
    ),
    (
        "DPMSolverMultistep", dict(solver_order=3, timestep_spacing="leading", steps_offset=1, **LATENT), {}, {}, preserving,
        "DPMSolverMultistep", dict(order=3, spacing="leading", offset=1),
    ),
    (
        "DPMSolverMultistep", dict(algorithm_type="sde-dpmsolver++", final_sigmas_type="sigma_min", **LATENT), {}, {}, preserving,
        "DPMSolverMultistep", dict(stochastic=True, spacing="linspace", final="first"),
    ),
    (
        "DPMSolverMultistep", dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0), {}, {}, flow,
        "DPMSolverMultistep", {},
    ),
    ("UniPCMultistep", LATENT, {}, {}, preserving, "UniPC", dict(spacing="linspace")),
    (
        "UniPCMultistep", dict(solver_type="bh1", final_sigmas_type="sigma_min", **LATENT), {}, {}, preserving, "UniPC",
        dict(variant="bh1", final="first", spacing="linspace"),
    ),
    ("UniPCMultistep", dict(solver_order=3, **LATENT), {}, {}, preserving, "UniPC", dict(order=3, spacing="linspace")),
    (
        "UniPCMultistep", dict(solver_order=3, solver_type="bh1", final_sigmas_type="sigma_min", **LATENT), {}, {}, preserving, "UniPC",
        dict(order=3, variant="bh1", final="first", spacing="linspace"),
    ),
    (
        "DDPM", dict(thresholding=True, sample_max_value=1.5, timestep_spacing="trailing"), {}, {}, preserving, "DDPM",
        dict(threshold=0.995, threshold_max=1.5),
    ),
    (
        "DPMSolverMultistep", dict(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=3.0, **LATENT), {}, {},
        preserving, "DPMSolverMultistep", dict(threshold=0.9, threshold_max=3.0, spacing="linspace"),
    ),
    (
        "DDPM", dict(variance_type="learned_range"), {}, {}, preserving, "DDPM",
        dict(variance="learned_range", clip=1.0, spacing="leading"),
    ),
    ("DDPM", dict(variance_type="learned"), {}, {}, preserving, "DDPM", dict(variance="learned", clip=1.0, spacing="leading")),
    ("LCM", dict(clip_sample=False, **LATENT), {}, {}, preserving, "LCM", {}),
    ("FlowMatchEulerDiscrete", dict(shift=3.0), dict(sigmas=list(np.linspace(1, 1 / STEPS, STEPS))), {}, flow, "FlowMatchEuler", {}),
    (
        "FlowMatchEulerDiscrete", dict(shift=3.0, stochastic_sampling=True), dict(sigmas=list(np.linspace(1, 1 / STEPS, STEPS))), {},
        flow, "FlowMatchEuler", dict(stochastic=True),
    ),
    ("EDMEuler", {}, {}, {}, lambda _: Schedule.edm(), "Euler", {}),
    ("EDMDPMSolverMultistep", {}, {}, {}, lambda _: Schedule.edm(), "DPMSolverMultistep", {}),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_equals_diffusers(case, monkeypatch):
    name, config, points, step_arguments, schedule, sampler, arguments = case
    scheduler = getattr(diffusers, name + "Scheduler")(**config)
    scheduler.set_timesteps(**points or dict(num_inference_steps=STEPS))
    generator = torch.Generator().manual_seed(0)
    variance = config.get("variance_type", "")
    channels = SHAPE[1] * (2 if variance.startswith("learned") else 1)
    outputs = torch.randn(2 * STEPS, SHAPE[0], channels, *SHAPE[2:], generator=generator)
    noises = torch.randn(2 * STEPS, *SHAPE, generator=generator)
    start = torch.randn(SHAPE, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    now = 0
    module = sys.modules[type(scheduler).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noises[now])
    x, expected = start, []
    for now, t in enumerate(scheduler.timesteps):  # noqa: B007
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        m = outputs[now]
        if variance == "learned":  # the logarithm of the variance to Nichol & Dhariwal, the variance itself to diffusers
            m = torch.cat([m[:, : SHAPE[1]], m[:, SHAPE[1] :].exp()], 1)
        x = scheduler.step(m, t, x, return_dict=False, **step_arguments)[0]
        expected.append(x)
    got, calls = [], iter(outputs)
    getattr(samplers, sampler)(schedule(scheduler), STEPS, **arguments).sample(
        lambda x, t: next(calls), start=start, noise=lambda i: noises[i], callback=lambda i, t, x: got.append(x.clone())
    )
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= 5e-6 * b.abs().max()


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid"])
def test_schedules_equal_diffusers(name):
    config = dict(linear="linear", scaled_linear="scaled_linear", cosine="squaredcos_cap_v2", sigmoid="sigmoid")[name]
    bounds = {} if name == "cosine" else dict(beta_start=1e-4, beta_end=0.02)
    theirs = diffusers.DDPMScheduler(beta_schedule=config, **bounds).alphas_cumprod.double().numpy()
    ours = getattr(Schedule, name)(**({} if name == "cosine" else dict(start=1e-4, end=0.02))).alphas_cumprod
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)  # theirs is a float32 product
