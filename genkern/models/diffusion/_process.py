"""The noise process of a diffusion model: a schedule of genkern.samplers, and the tables that training reads at its timesteps."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from genkern.samplers import Schedule

SCHEDULES = ("cosine", "linear", "scaled_linear", "sigmoid", "flow", "edm")
_PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "flow": "flow", "edm": "edm"}
_TARGETS = {"preserving": ("v", "eps", "x0"), "flow": ("flow", "x0"), "edm": ("edm",)}  # the first is the default
_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "sigmoid": (1e-4, 0.02)}  # first and last, of 1000 timesteps


@dataclass(frozen=True)
class Process:
    """x_t = alpha_t x + sigma_t eps at the timesteps 0 ... T - 1, where x is the data times `scale`.

    For `edm`, x_0 + sigma n with the preconditioning of Karras et al. (2022), all of it is divided by sqrt(sigma^2 + sigma_data^2):
    what the network sees is then x_t of alpha = sigma_data / sqrt(...) and x = x_0 / sigma_data, and what it predicts is -v.
    """

    schedule: Schedule
    alphas: list
    sigmas: list
    times: list  # what the network is told
    target: str  # of genkern.ops.q_sample
    sign: float  # the network's prediction is sign x target
    scale: float


def process(noise_schedule, target, timesteps, sigma_data):
    """The Process of these settings; target None is the usual one of the schedule."""
    if noise_schedule not in SCHEDULES:
        raise ValueError(f"noise_schedule must be one of {', '.join(SCHEDULES)}, got {noise_schedule!r}")
    if timesteps < 2:
        raise ValueError(f"timesteps must be at least 2, got {timesteps}")
    kind = noise_schedule if noise_schedule in ("flow", "edm") else "preserving"
    target = _TARGETS[kind][0] if target is None else target
    if target not in _TARGETS[kind]:
        raise ValueError(f"target must be one of {', '.join(_TARGETS[kind])} with the schedule {noise_schedule}, got {target!r}")
    prediction, steps = _PREDICTIONS[target], range(timesteps)
    if kind == "flow":
        sigmas = [(i + 1) / timesteps for i in steps]
        schedule = Schedule.flow(timesteps=timesteps, prediction=prediction)
        return Process(schedule, [1 - s for s in sigmas], sigmas, [timesteps * s for s in sigmas], target, 1.0, 1.0)
    if kind == "edm":  # ln sigma ~ N(-1.2, 1.2^2), the noise of Karras et al. (2022), table 1, at equal steps of probability
        noise = [math.exp(NormalDist(-1.2, 1.2).inv_cdf((i + 0.5) / timesteps)) for i in steps]
        total = [math.hypot(s, sigma_data) for s in noise]
        schedule = Schedule.edm(sigma_min=noise[0], sigma_max=noise[-1], sigma_data=sigma_data)
        alphas, sigmas = [sigma_data / q for q in total], [s / q for s, q in zip(noise, total, strict=True)]
        return Process(schedule, alphas, sigmas, [math.log(s) / 4 for s in noise], "v", -1.0, 1 / sigma_data)
    settings = {}
    if noise_schedule in _BETAS:  # fewer timesteps are larger ones
        settings = dict(zip(("start", "end"), (min(b * 1000 / timesteps, 0.999) for b in _BETAS[noise_schedule]), strict=True))
    schedule = getattr(Schedule, noise_schedule)(timesteps, prediction=prediction, **settings)
    table = schedule.alphas_cumprod.tolist()
    return Process(schedule, [a**0.5 for a in table], [(1 - a) ** 0.5 for a in table], list(map(float, steps)), target, 1.0, 1.0)
