"""Samplers of diffusion and flow models: tables of coefficients, and one fused kernel per step (genkern.ops.sampler_step).

    schedule = Schedule.scaled_linear(prediction="epsilon")
    x = DPMSolverMultistep(schedule, steps=20).sample(model, (4, 4, 64, 64), key=genkern.random.key(0), guidance_scale=7.5,
                                                      conditions={"context": text}, unconditional={"context": empty})
    by_name("dpmpp_2m", schedule, 20)                # the same sampler by its name, one of SAMPLERS

Another sampler is a subclass of Sampler that says in rows() what each evaluation of the model is followed by.
"""

from genkern.samplers._names import SAMPLERS, by_name
from genkern.samplers._sampler import Sampler
from genkern.samplers._samplers import (
    DDIM,
    DDPM,
    LCM,
    DPMSolverMultistep,
    Euler,
    EulerAncestral,
    FlowMatchEuler,
    FlowMatchHeun,
    Heun,
    UniPC,
)  # fmt: skip
from genkern.samplers._schedule import Schedule

__all__ = [
    "DDIM", "DDPM", "DPMSolverMultistep", "Euler", "EulerAncestral", "FlowMatchEuler", "FlowMatchHeun", "Heun", "LCM", "SAMPLERS",
    "Sampler", "Schedule", "UniPC", "by_name",
]  # fmt: skip
