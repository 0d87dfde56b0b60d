"""The fused steps of diffusers' schedulers: from an object and its timesteps to a table, and one sampler_step for each call of step."""

import copy
import functools
import inspect
import math
import sys

import torch
from diffusers.utils.torch_utils import randn_tensor

from genkern import random
from genkern.integrations._probe import NotLinear, probe, suspects
from genkern.ops import dynamic_threshold, sampler_step
from genkern.samplers import DDIM, DDPM, DPMSolverMultistep, Euler, EulerAncestral, UniPC
from genkern.samplers._schedule import Grid, estimate


def own_class(scheduler):
    """The class whose step is the original one."""
    return getattr(type(scheduler), "_genkern_original", type(scheduler))


def fused_step(scheduler):
    """The fused step of this scheduler, compared with its own."""
    own = own_class(scheduler)
    trial = copy.deepcopy(scheduler)
    vars(trial).pop("step", None)
    kind = _KINDS.get(own.__name__)
    if kind is not None and own.__module__.startswith("diffusers."):
        try:
            kind(trial).compare()
            return kind(scheduler)
        except ValueError:
            pass  # a configuration without a closed form may still be linear
    try:
        _Probed(trial).compare()
    except NotLinear as error:
        raise ValueError(f"fuse_scheduler: {error}") from None
    return _Probed(scheduler)


def _drawn_key(generator, device):
    """A key (2,), or one for each of a list of generators."""
    if isinstance(generator, (list, tuple)):
        return torch.stack([random.draw_key(g, device) for g in generator])
    return random.draw_key(generator, device)


def _bare(sampler, **options):
    """A sampler for its rows alone: the points come from the scheduler."""
    bare = sampler.__new__(sampler)
    vars(bare).update(options)
    return bare


def _run_or_refuse(scheduler, step, *args, **kwargs):
    try:
        return step(*args, **kwargs)
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        raise NotLinear(f"{type(scheduler).__name__} cannot be run on random data{suspects(scheduler)} ({cause})") from error


def _out(sample, m):
    """Where the next sample goes, of the model output's type. None where that is the sample's, for sampler_step to make."""
    return None if m.dtype == sample.dtype else torch.empty_like(sample, dtype=m.dtype, memory_format=torch.contiguous_format)


class _Fused:
    draws = True  # step() takes a generator
    keyed = False  # noise from keys
    doubled = learned = False  # the model returns twice the channels; of a learned range
    noise_dtype = None  # None: of the model's output
    clip = None

    def __init__(self, scheduler):
        self.scheduler, self.config = scheduler, scheduler.config
        self._timesteps = self._visited = None
        self.thresholds = bool(self.config.get("thresholding"))
        self._require("prediction_type", "epsilon", "sample", "v_prediction", "flow_prediction")

    def _require(self, name, *allowed):
        value = self.config.get(name)
        if value not in allowed:
            raise ValueError(f"fuse_scheduler: {name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

    def _estimate(self, alpha, sigma):
        """x_0 = a x + b m."""
        return estimate(self.config.prediction_type.replace("flow_prediction", "flow"), alpha, sigma)

    def compare(self):
        """NotLinear unless the fused step agrees with the scheduler's own on random data."""
        scheduler, results, original = self.scheduler, [], functools.partial(own_class(self.scheduler).step, self.scheduler)
        generator = torch.Generator().manual_seed(0)
        start, outputs = torch.randn(2, 3, 6, 6, generator=generator), torch.randn(64, 2, 6, 6, 6, generator=generator)
        outputs[:, :, 3:] = outputs[:, :, 3:].abs()  # may be a variance
        outputs = outputs if self.doubled else outputs[:, :, :3]
        for step in (functools.partial(_run_or_refuse, scheduler, original), self.step):
            scheduler.set_timesteps(16)
            generator, x, trace = torch.Generator().manual_seed(1), start, []
            for m, t in zip(outputs, scheduler.timesteps, strict=False):
                if hasattr(scheduler, "scale_model_input"):  # some insist on the call
                    scheduler.scale_model_input(x, t)
                x = step(m, t, x, **({"generator": generator} if self.draws else {}), return_dict=False)[0]
                trace.append(x)
            results.append(torch.stack(trace))
        original, fused = results
        error = ((original - fused).abs().amax() / original.abs().amax()).item()
        if not error < 1e-4:
            raise NotLinear(f"{type(scheduler).__name__} is not reproduced on random data (relative error {error:.1e})")

    def _prepare(self, device, options):
        """The table for the timesteps that are set, on the device."""
        scheduler = self.scheduler
        timesteps = scheduler.timesteps
        if timesteps is not self._timesteps:  # set anew, and mostly to what they were
            self._timesteps, self._index = timesteps, None
            others = [getattr(scheduler, name, None) for name in ("sigmas", "num_inference_steps", "custom_timesteps")]
            visited = [t.tolist() if isinstance(t, torch.Tensor) else t for t in (timesteps, *others)]
            if visited != self._visited:
                self._visited, self._tables = visited, {}
                self._at = {float(t): i for i, t in reversed(list(enumerate(visited[0])))}
        key = (device, *options)
        if key not in self._tables:
            table, noisy = self.table(*options)
            self._tables[key] = table.float().to(device), noisy
        return self._tables[key]

    def _step(self, m, sample, index, noise, generator, table, history=()):
        """The next sample, and under a history the next term of it: the estimate of x_0."""
        table, noisy = table
        noise, key = self._noise(m, generator, noise, sample.shape) if noisy[index] else (None, None)
        bound = None
        if self.thresholds:
            quantile, maximum = self.config.dynamic_thresholding_ratio, self.config.sample_max_value
            bound = dynamic_threshold(sample, m, table, index, quantile=quantile, maximum=maximum)
        return sampler_step(
            sample, m, table, index, *history, noise=noise, key=key, clip=self.clip, bound=bound, learned_variance=self.learned,
            out=_out(sample, m),
        )  # fmt: skip

    def _noise(self, m, generator, given, shape):
        """(noise, None) or (None, key)."""
        if given is not None:
            return given.to(m.device), None
        if self.keyed:
            return None, _drawn_key(generator, m.device)
        return randn_tensor(shape, generator=generator, device=m.device, dtype=self.noise_dtype or m.dtype), None

    def _clip(self):
        clips = self.config.get("clip_sample") and not self.config.get("thresholding")
        return float(self.config.get("clip_sample_range", 1.0)) if clips else None


class _Memoryless(_Fused):
    """Steps that depend on the sample and the model output alone."""

    def rows(self, *options):
        raise NotImplementedError

    def table(self, *options):
        sampler, rows = self.rows(*options)
        padded = [[*row[:8], 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0, *row[13:]] for row in sampler.table(rows).tolist()]  # h' = y
        return torch.tensor(padded, dtype=torch.float64), [row.noisy for row in rows]

    def _where(self, timestep):
        """Index of the timestep: looked up, or counted on where it lies on another device."""
        on_host = not isinstance(timestep, torch.Tensor) or timestep.device.type == "cpu"
        index = self._at[float(timestep)] if on_host or self._index is None else self._index
        self._index = index + 1 if index + 1 < len(self._at) else None
        return index

    def _result(self, pair, return_dict):
        if not return_dict:
            return pair
        output = _output_class(self.scheduler)
        return output(prev_sample=pair[0], pred_original_sample=pair[1])

    def _preserving(self, sampler, t, previous, final):
        bar = self.scheduler.alphas_cumprod
        now, before = float(bar[t]), float(bar[previous]) if previous >= 0 else final
        alpha, sigma = [math.sqrt(now), math.sqrt(before)], [math.sqrt(1 - now), math.sqrt(1 - before)]
        return sampler.rows(Grid([float(t)], alpha, sigma, [1.0, 1.0], [self._estimate(alpha[0], sigma[0])]))

    def _exploding(self, sampler):
        sigmas, rows = self.scheduler.sigmas.tolist(), []
        for t, s, S in zip(self.scheduler.timesteps.tolist(), sigmas, sigmas[1:], strict=False):
            alpha = 1 / math.sqrt(1 + s * s)
            a, b = self._estimate(alpha, s * alpha)
            rows += sampler.rows(Grid([t], [1.0, 1.0], [s, S], [alpha, 1.0], [(a * alpha, b)]))
        return sampler, rows

    def _indexed(self, model_output, timestep, sample, generator, return_dict):
        """A step of a scheduler that counts its steps itself."""
        scheduler = self.scheduler
        table = self._prepare(sample.device, ())
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
        pair = self._step(model_output, sample, scheduler.step_index, None, generator, table, (sample,))
        scheduler._step_index += 1
        return self._result(pair, return_dict)


class _DDPM(_Memoryless):
    def __init__(self, scheduler):
        super().__init__(scheduler)
        self._require("variance_type", "fixed_small", "fixed_large", "learned_range", "learned")
        self.learned = self.config.variance_type == "learned_range"
        self.doubled = self.config.variance_type.startswith("learned")
        self.clip = self._clip()

    def rows(self):
        sampler = _bare(DDPM, variance=self.config.variance_type.removeprefix("fixed_"), learned_variance=self.learned)
        rows = []
        for t in self.scheduler.timesteps.tolist():
            previous = int(self.scheduler.previous_timestep(t))
            rows += self._preserving(sampler, t, previous, 1.0)
            if t > 0 and previous < 0 and sampler.variance != "small":  # diffusers adds noise to the result unless t = 0
                rows[-1].sample["n"] = 1.0 if self.doubled else math.sqrt(1 - float(self.scheduler.alphas_cumprod[t]))
        return sampler, rows

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        table, index, noise = self._prepare(sample.device, ()), self._where(timestep), None
        if self.doubled and not self.learned:
            model_output, variance = model_output.chunk(2, 1)
            if table[1][index]:  # to diffusers' "learned" these channels are the variance, not its logarithm
                noise, key = self._noise(model_output, generator, None, sample.shape)
                if key is not None:
                    noise = random.normal(key, sample.shape, dtype=model_output.dtype, device=model_output.device)
                noise = noise * variance.sqrt()
        pair = self._step(model_output, sample, index, noise, generator, table, (sample,))
        return self._result(pair, return_dict)


class _DDIM(_Memoryless):
    def __init__(self, scheduler):
        super().__init__(scheduler)
        self.clip = self._clip()

    def rows(self, eta):
        sampler = _bare(DDIM, eta=eta)
        rows, scheduler = [], self.scheduler
        stride = self.config.num_train_timesteps // scheduler.num_inference_steps
        for t in scheduler.timesteps.tolist():  # diffusers steps to t - stride, which need not be the next timestep
            rows += self._preserving(sampler, t, t - stride, float(scheduler.final_alpha_cumprod))
        return sampler, rows

    def step(
        self, model_output, timestep, sample, eta=0.0, use_clipped_model_output=False, generator=None, variance_noise=None,
        return_dict=True,
    ):  # fmt: skip
        if use_clipped_model_output:
            return own_class(self.scheduler).step(
                self.scheduler, model_output, timestep, sample, eta, True, generator, variance_noise, return_dict
            )
        table = self._prepare(sample.device, (float(eta),))
        pair = self._step(model_output, sample, self._where(timestep), variance_noise, generator, table, (sample,))
        return self._result(pair, return_dict)


class _Euler(_Memoryless):
    def rows(self):
        return self._exploding(_bare(Euler))

    def step(
        self, model_output, timestep, sample, s_churn=0.0, s_tmin=0.0, s_tmax=float("inf"), s_noise=1.0, generator=None,
        return_dict=True,
    ):  # fmt: skip
        if s_churn:
            return own_class(self.scheduler).step(
                self.scheduler, model_output, timestep, sample, s_churn, s_tmin, s_tmax, s_noise, generator, return_dict
            )
        return self._indexed(model_output, timestep, sample, generator, return_dict)


class _EulerAncestral(_Memoryless):
    def rows(self):
        return self._exploding(_bare(EulerAncestral, eta=1.0))

    def step(self, model_output, timestep, sample, generator=None, return_dict=True):
        return self._indexed(model_output, timestep, sample, generator, return_dict)


class _Multistep(_Fused):
    """Solvers that keep earlier estimates of x_0, in float32."""

    short = math.inf  # with fewer timesteps lower_order_final counts

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self._first, self._past = 0, []

    def sampler(self):
        raise NotImplementedError

    def table(self, begin):
        scheduler, sampler = self.scheduler, self.sampler()
        sampler.lower_order_final = self.config.lower_order_final and len(scheduler.timesteps) < self.short
        sigmas = scheduler.sigmas.tolist()
        if self.config.get("use_flow_sigmas"):
            alpha, sigma = [1 - s for s in sigmas], sigmas
        else:
            alpha = [1 / math.sqrt(1 + s * s) for s in sigmas]
            sigma = [s * a for s, a in zip(sigmas, alpha, strict=True)]
        data = [self._estimate(a, s) for a, s in zip(alpha[:-1], sigma[:-1], strict=True)]
        grid = Grid(scheduler.timesteps.tolist(), alpha, sigma, [1.0] * len(sigmas), data)
        rows = sampler.rows(grid.since(begin))
        table = sampler.table(rows)
        skipped = table.new_zeros(begin, table.shape[1])
        return torch.cat([skipped, table]), [False] * begin + [row.noisy for row in rows]

    def _advance(self, model_output, timestep, sample, generator, noise, return_dict):
        scheduler = self.scheduler
        if scheduler.step_index is None:
            scheduler._init_step_index(timestep)
            count = self.sampler().history
            self._first, self._past = scheduler.step_index, [torch.zeros_like(sample, dtype=torch.float32) for _ in range(count)]
        table = self._prepare(sample.device, (self._first,))
        result = self._step(model_output, sample, scheduler.step_index, noise, generator, table, self._past)
        if self._past:
            result, newest = result
            self._past = [newest, *self._past[:-1]]
        scheduler._step_index += 1
        return _output_class(scheduler)(prev_sample=result) if return_dict else (result,)


class _DPMSolver(_Multistep):
    short = 15
    noise_dtype = torch.float32

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self._require("algorithm_type", "dpmsolver++", "sde-dpmsolver++")
        self._require("euler_at_final", False, None)
        self._require("variance_type", None, "learned", "learned_range")
        self.doubled = self.config.variance_type is not None and self.config.prediction_type == "epsilon"
        if self.config.solver_order == 3 and self.config.algorithm_type.startswith("sde"):
            raise ValueError("fuse_scheduler: sde-dpmsolver++ is served up to solver_order 2")

    def sampler(self):
        order = self.config.solver_order
        return _bare(
            DPMSolverMultistep, order=order, history=order - 1, solver=self.config.solver_type,
            stochastic=self.config.algorithm_type.startswith("sde"),
        )  # fmt: skip

    def step(self, model_output, timestep, sample, generator=None, variance_noise=None, return_dict=True):
        model_output = model_output[:, :3] if self.doubled else model_output  # the variance is not used
        return self._advance(model_output, timestep, sample, generator, variance_noise, return_dict)


class _UniPC(_Multistep):
    draws = False

    def __init__(self, scheduler):
        super().__init__(scheduler)
        self._require("predict_x0", True)
        self._require("solver_order", 1, 2, 3)
        self._require("solver_type", "bh1", "bh2")
        self._require("solver_p", None)
        if self.config.get("disable_corrector"):
            raise ValueError("fuse_scheduler: disable_corrector must be empty")

    def sampler(self):
        order = self.config.solver_order
        return _bare(UniPC, order=order, history=order, variant=self.config.solver_type)

    def step(self, model_output, timestep, sample, return_dict=True):
        return self._advance(model_output, timestep, sample, None, None, return_dict)


def _signature(own):
    """Of step: a subclass that passes everything on by *args has its parent's."""
    signatures = [inspect.signature(c.step) for c in own.__mro__ if "step" in vars(c)]
    return next((s for s in signatures if "sample" in s.parameters), signatures[0])


class _Probed(_Fused):
    """A scheduler that is a table because it was run."""

    def __init__(self, scheduler):
        self.scheduler, self.config = scheduler, scheduler.config
        self._signature = _signature(own_class(scheduler))
        self.draws = "generator" in self._signature.parameters
        self._timesteps, self._index, self._tables = None, 0, {}

    def step(self, *args, **kwargs):
        bound = self._signature.bind(self.scheduler, *args, **kwargs)
        bound.apply_defaults()
        _, m, timestep, sample, *_ = bound.arguments.values()
        arguments = dict(list(bound.arguments.items())[4:])
        generator, return_dict = arguments.pop("generator", None), arguments.pop("return_dict", True)
        given = [arguments.pop(name) for name in ("noise", "variance_noise") if name in arguments]
        given = next((noise for noise in given if noise is not None), None)
        scheduler = self.scheduler
        if scheduler.timesteps is not self._timesteps or self._index == len(self._noisy):
            self._start(timestep, sample, arguments)
        if arguments != self._arguments:
            raise ValueError(f"step: arguments may not change between steps of a fused scheduler, got {arguments}")
        if sample.device not in self._tables:
            self._tables[sample.device] = [t.float().to(sample.device) for t in (self._table, *self._extras)]
        table, *extras = self._tables[sample.device]
        index = self._index
        noise, key = self._noise(m, generator, given, m.shape) if self._noisy[index] else (None, None)
        past = [sample] if self._extra_is_history else self._past
        outputs = [sampler_step(sample, m, t, index, *past, noise=noise, key=key, out=_out(sample, m)) for t in (table, *extras)]
        if past:
            (first, newest), *rest = outputs
            outputs = [first, *(extra for extra, _ in rest)]
            if self._extra_is_history:
                outputs.append(newest)
            else:
                self._past = [newest, *past[:-1]]
        self._index += 1
        if getattr(scheduler, "_step_index", None) is not None:
            scheduler._step_index += 1
        return self._result(*outputs) if return_dict else tuple(outputs)

    def _start(self, timestep, sample, arguments):
        """The table of a run that begins at this timestep."""
        scheduler, own = self.scheduler, own_class(self.scheduler)
        untouched = copy.deepcopy(scheduler)
        vars(untouched).pop("step", None)
        begin = None
        if hasattr(scheduler, "_init_step_index"):
            if scheduler.step_index is None:
                scheduler._init_step_index(timestep)
            begin = scheduler.step_index
        if begin is None:
            begin = (scheduler.timesteps == timestep).nonzero()[0].item()
        table, self._noisy, extras = probe(own, untouched, begin, arguments)
        history = (table.shape[1] - 13) // 2
        self._extra_is_history = history == 0 and len(extras) == 1
        if self._extra_is_history:  # both in one launch
            absent = table.new_zeros(len(table), 1)
            table = torch.cat([table[:, :8], absent, extras.pop()[:, 4:8], absent, table[:, -1:]], 1)
        self._table, self._extras, self._tables = table, extras, {}
        self._past = [torch.zeros_like(sample, dtype=torch.float32) for _ in range(history)]
        self._timesteps, self._index, self._arguments = scheduler.timesteps, 0, arguments
        first = {name: value for name, value in arguments.items() if name in self._signature.parameters}
        shown = own.step(untouched, torch.zeros(1, 4, 2, 2), scheduler.timesteps[begin], torch.zeros(1, 4, 2, 2), **first)
        names = list(shown.keys()) if hasattr(shown, "keys") else []
        self._result = lambda *outputs: type(shown)(**dict(zip(names, outputs, strict=True))) if names else outputs


def _output_class(scheduler):
    """What the original step returns under return_dict=True."""
    module = sys.modules[type(scheduler).__module__]
    own = type(scheduler).__name__ + "Output"
    return getattr(module, own, None) or module.SchedulerOutput


_KINDS = {
    "DDPMScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "EulerDiscreteScheduler": _Euler,
    "EulerAncestralDiscreteScheduler": _EulerAncestral,
    "DPMSolverMultistepScheduler": _DPMSolver,
    "UniPCMultistepScheduler": _UniPC,
}
