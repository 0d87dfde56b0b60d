"""Samplers by the names that people give them."""

import difflib
import inspect

from genkern.samplers import _samplers as s
from genkern.samplers._sampler import Sampler, check_schedule

# name: the classes that answer to it, of which the first that serves the schedule is taken, and their settings
SAMPLERS = {
    "ddpm": ((s.DDPM,), {}),
    "ddim": ((s.DDIM,), {}),
    "euler": ((s.Euler, s.FlowMatchEuler), {}),
    "euler_a": ((s.EulerAncestral,), {}),
    "heun": ((s.Heun, s.FlowMatchHeun), {}),
    "dpmpp_2m": ((s.DPMSolverMultistep,), {}),
    "dpmpp_2m_sde": ((s.DPMSolverMultistep,), {"stochastic": True}),
    "dpmpp_3m": ((s.DPMSolverMultistep,), {"order": 3}),
    "dpmpp_3m_sde": ((s.DPMSolverMultistep,), {"order": 3, "stochastic": True}),
    "unipc": ((s.UniPC,), {}),
    "lcm": ((s.LCM,), {}),
}


def by_name(name, schedule, steps=20, **options):
    """The Sampler of a name in SAMPLERS: by_name("dpmpp_2m", Schedule.cosine(), 20, clip=1.0). Options that are None are left out.

    ValueError for a name or a schedule, TypeError for an option that the sampler does not take.
    """
    if name not in SAMPLERS:
        close = difflib.get_close_matches(str(name).lower().replace("-", "_"), SAMPLERS, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"the names are {', '.join(SAMPLERS)}"
        raise ValueError(f"sampler: no sampler {name!r}; {hint}")
    check_schedule("sampler", schedule)
    kinds, settings = SAMPLERS[name]
    kind = next((kind for kind in kinds if schedule.kind in kind.kinds), None)
    if kind is None:
        fitting = [other for other, (classes, _) in SAMPLERS.items() if any(schedule.kind in c.kinds for c in classes)]
        raise ValueError(f"sampler: {name!r} does not serve a schedule of kind {schedule.kind}; those that do: {', '.join(fitting)}")
    options = {option: value for option, value in options.items() if value is not None}
    known = {p for c in kind.__mro__ if issubclass(c, Sampler) for p in inspect.signature(c).parameters}
    if unknown := sorted(options.keys() - known):
        raise TypeError(f"sampler: {name!r} takes no {', '.join(unknown)}")
    return kind(schedule, steps, **settings | options)
