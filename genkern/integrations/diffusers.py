"""The step of diffusers' schedulers as one fused kernel, and the norms of their models.

    from genkern.integrations.diffusers import fuse
    fuse(pipe)                              # then use the pipeline as before; unfuse(pipe) undoes it
    fuse_scheduler(pipe.scheduler)          # the scheduler alone

The scheduler stays the same object of the same class; its coefficients are computed once per set_timesteps, in float64, so that a
step is one kernel without host synchronisation.
"""

import functools

import torch

try:
    import diffusers
except ImportError as error:  # pragma: no cover
    raise ImportError("genkern.integrations.diffusers needs diffusers: pip install diffusers") from error

from genkern.integrations._diffusers_steps import fused_step, own_class


def fuse(pipe, *, keyed_noise=False):
    """Fuse a pipeline in place, and return it: its scheduler, and group norm with SiLU in its UNets and autoencoders.

    The same generator gives the same images up to rounding. Objects, classes' names, weights, configurations, saving and training
    stay as they are: residual blocks take a fused forward, and time embeddings are added inside it. Norms keep channels_last images so.
    A scheduler that fuse_scheduler refuses is refused here, and nothing is changed.
    Also takes a single model. keyed_noise: see fuse_scheduler.
    """
    models = _models(pipe)
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is not None:
        fuse_scheduler(scheduler, keyed_noise=keyed_noise)
    from genkern.integrations._diffusers_norms import fuse_norms

    for model in models:
        fuse_norms(model)
    return pipe


def unfuse(pipe):
    """Undo fuse(pipe), and return it."""
    if getattr(pipe, "scheduler", None) is not None:
        unfuse_scheduler(pipe.scheduler)
    from genkern.integrations._diffusers_norms import unfuse_norms

    for model in _models(pipe):
        unfuse_norms(model)
    return pipe


def _models(pipe):
    if isinstance(pipe, torch.nn.Module):
        return [pipe]
    if not isinstance(getattr(pipe, "components", None), dict):
        raise TypeError(f"fuse: expects a diffusers pipeline or one of its models, got {type(pipe).__name__}")
    return [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]


def fuse_scheduler(scheduler, *, keyed_noise=False):
    """Replace the step of a scheduler by a fused one and return it; unfuse_scheduler undoes it. A class gives a class.

    scheduler   an object: it stays the same object of the same class. Or a class, also one of your own: the result is a subclass of
                the same name and configuration, whose objects are fused (genkern.integrations.diffusers.DDIMScheduler and the like
                are these)
    keyed_noise for an object: noise is made in registers from a key that each noisy step draws from the generator (a list: one for
                each sample), instead of by torch's generator itself: several times faster, and other noise than diffusers'

    DDPM (also with a learned variance or range of it), DDIM, Euler, Euler ancestral, DPM-Solver++ and UniPC have their coefficients in
    closed form, with clipping and dynamic thresholding. Any other scheduler is run on unit vectors once per set_timesteps, a fraction
    of a second, which gives the table of any step that is linear in the sample, the model outputs and the noise and keeps at most
    three history terms. Before it returns, the fused step is compared with the original one on random data.

    float32, bfloat16 and float16. Noise is drawn as diffusers draws it, so the same generator gives the same samples up to rounding.
    Calls with s_churn or use_clipped_model_output of the first kind take the original step. ValueError, with the cause, where a
    scheduler is not served: it is not linear, or needs more history. TypeError for what is no scheduler.
    """
    own = scheduler if isinstance(scheduler, type) else own_class(scheduler)
    if not all(hasattr(own, name) for name in ("step", "set_timesteps", "from_config")):
        raise TypeError(f"fuse_scheduler: expects a scheduler of diffusers, or its class, got {own.__name__}")
    if isinstance(scheduler, type):
        if keyed_noise:
            raise ValueError("fuse_scheduler: keyed_noise needs a scheduler object, got a class")
        return _fused_class(scheduler)
    fused = fused_step(scheduler)
    fused.keyed = bool(keyed_noise)
    scheduler.step = fused.step
    return scheduler


def unfuse_scheduler(scheduler):
    """Give a fused scheduler object its own step back."""
    vars(scheduler).pop("step", None)
    return scheduler


@functools.cache
def _fused_class(own):
    if hasattr(own, "_genkern_original"):
        return own

    def step(self, *args, **kwargs):
        self.step = fused_step(self).step  # from now on the object's own
        return self.step(*args, **kwargs)

    functools.update_wrapper(step, own.step)
    values = {"step": step, "_genkern_original": own, "__module__": own.__module__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), values)


def __getattr__(name):
    """Every scheduler class of diffusers, fused, under its own name."""
    if name.endswith("Scheduler") and isinstance(getattr(diffusers, name, None), type):
        return _fused_class(getattr(diffusers, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
