"""Sampler: from the rows of a subclass to a table, and the loop that calls the model and one fused step per evaluation."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from genkern import random
from genkern.ops.diffusion._sampler_step import _dynamic_threshold, _sampler_step
from genkern.ops.diffusion._sampler_step_moments import _guidance_moments
from genkern.samplers._schedule import Grid, Schedule


@dataclass(frozen=True)
class Row:
    """What one model evaluation is followed by, in coefficients of x, m, y, n, h1, h2, h3 (missing ones are zero)."""

    t: float  # what the model is told
    scale: float  # of the model's input
    data: tuple  # y = data[0] x + data[1] m
    level: tuple  # alpha and sigma of x
    sample: dict  # the next sample
    history: dict = field(default_factory=lambda: {"y": 1.0})  # the next history term
    log_variance: tuple = (0.0, 0.0)  # of a learned variance, where the second half of the channels is -1 and 1

    @property
    def noisy(self):
        return self.sample.get("n", 0.0) != 0.0


@dataclass(frozen=True)
class _Run:
    """What sample() needs to know of a run and does not depend on the data, on the device of the samples."""

    grid: Grid
    rows: list  # of the evaluations
    table: torch.Tensor
    times: tuple  # (samples of the model's input,) for each evaluation
    noisy: list  # whether a row draws noise
    early: bool  # a row weighs a history term before there is one: it is zero then
    unscaled: bool  # the model sees x as it is


_TERMS = ("x", "m", "y", "n", "h1", "h2", "h3")


def _without_gradients(function):
    """torch.no_grad() where it is not on already: entering it takes as long as a step of a small latent."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        if torch.is_grad_enabled():
            with torch.no_grad():
                return function(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class Sampler:
    """A sampler of a schedule in `steps` steps.

    schedule    Schedule, which also says what the model predicts
    steps       number of steps; None where the points are given below
    spacing, timesteps, sigmas, final, offset     which points of the schedule are visited: see Schedule.grid
    clip        None, or the bound of |x_0| (pixel models: 1.0)
    threshold   None, or the quantile of |x_0| to which each sample is clipped and by which it is divided, where that exceeds 1
                (dynamic thresholding; Saharia et al., 2022, section 2.3), at most threshold_max. Replaces clip

    The tables are float64 on the host; a step computes in float32 (float64 samples: float64). sample() keeps what it makes of them
    on the device for the next call with as many samples, the same guidance and type: from then on it neither waits nor uploads
    (given a key on the device), so that a whole run can be captured in a CUDA graph, for as long as the sampler is used for no
    more than eight of these.
    """

    history = 0  # history terms of a step
    exploding = False  # works on x_0 + sigma n
    learned_variance = False  # the model returns twice the channels
    spare = 0  # points laid out beyond the last step
    renoise_unconditional = False  # h1 is the model output without the condition
    kinds = ("preserving", "flow", "edm")

    def __init__(
        self, schedule, steps=20, *, spacing="trailing", timesteps=None, sigmas=None, final="zero", offset=0, clip=None,
        threshold=None, threshold_max=1.0,
    ):  # fmt: skip
        name = type(self).__name__
        check_schedule(name, schedule)
        if schedule.kind not in self.kinds:
            raise ValueError(f"{name}: serves schedules that are {' or '.join(self.kinds)}, got {schedule.kind}")
        if clip is not None and not clip > 0:
            raise ValueError(f"{name}: clip must be positive, got {clip}")
        if threshold is not None and not (0 < threshold <= 1 and threshold_max >= 1):
            raise ValueError(f"{name}: threshold must be in (0, 1], threshold_max at least 1, got {threshold} and {threshold_max}")
        self.schedule, self.clip = schedule, None if threshold is not None else clip
        self.threshold, self.threshold_max = threshold, float(threshold_max)
        self.grid = schedule.grid(
            steps, spacing=spacing, timesteps=timesteps, sigmas=sigmas, final=final, offset=offset,
            spare=self.spare, exploding=self.exploding,
        )  # fmt: skip
        self._kept = {}  # of _prepare

    def rows(self, grid):
        """The Rows of all model evaluations over a Grid."""
        raise NotImplementedError

    def table(self, rows, guidance=None):
        """float64 (evaluations, 13 + 2 history [+ 2]): rows as ops.sampler_step reads them; guidance: one weight per row, or None."""
        terms = _TERMS[: 4 + self.history]
        result = []
        for i, row in enumerate(rows):
            g = 1.0 if guidance is None else guidance[i]
            sample, history = ([row_of.get(term, 0.0) for term in terms] for row_of in (row.sample, row.history))
            variance = row.log_variance if self.learned_variance else ()
            result.append([1 - g, g, *row.data, *sample, *history, rows[i + 1].scale if i + 1 < len(rows) else 1.0, *variance])
        return torch.tensor(result, dtype=torch.float64)

    def _prepare(self, begin, interval, dtype, samples, device):
        """The _Run from point `begin` on, kept for who asks the same again."""
        asked = begin, interval, dtype, samples, device
        if (prepared := self._kept.get(asked)) is None:
            grid = self.grid.since(begin)
            rows = self.rows(grid)
            guidance = None
            if interval is not None:
                first, last, scale = interval
                guidance = [scale if first <= i / len(rows) <= last else 1.0 for i in range(len(rows))]
            wide = dtype == torch.float64
            times = torch.tensor([row.t for row in rows], dtype=torch.float64)
            times = times.long() if (times == times.round()).all() else times if wide else times.float()
            table = self.table(rows, guidance).to(torch.float64 if wide else torch.float32)
            early = [of.get(f"h{k}", 0.0) for i, row in enumerate(rows[:3]) for of in (row.sample, row.history) for k in (1, 2, 3)[i:]]
            if len(self._kept) >= 8:
                self._kept.clear()
            prepared = self._kept[asked] = _Run(
                grid, rows, table.to(device), times.to(device)[:, None].expand(-1, samples).unbind(),
                noisy=[row.noisy for row in rows], early=any(early), unscaled=all(row.scale == 1 for row in rows),
            )  # fmt: skip
        return prepared

    @_without_gradients
    def sample(
        self,
        model: Callable,
        shape=None,
        *,
        key=None,
        generator=None,
        start=None,
        image=None,
        strength=1.0,
        mask=None,
        noise=None,
        conditions=None,
        unconditional=None,
        guidance_scale=None,
        guidance_interval=(0.0, 1.0),
        guidance_rescale=0.0,
        guidance_parallel=1.0,
        guidance_max_norm=None,
        guidance_momentum=0.0,
        device=None,
        dtype=torch.float32,
        model_dtype=None,
        callback=None,
        progress=False,
    ):
        """Samples of the model's distribution, (N, ...) of type dtype.

        model           called as model(x, t, **conditions) once per evaluation, x of model_dtype, which it must not change and which
                        the next step overwrites; t (samples of x,): int64 where all timesteps are integers, else float32 (float64
                        samples: float64). Returns a tensor, or something whose attribute `sample` it is
        shape           (N, ...); or None where `start` or `image` gives it
        key             int64 (2,), or (N, 2) for one stream per sample, which then does not depend on its batch. The same key gives
                        the same samples on every device up to rounding. None: drawn from `generator` or torch's default one
        start           the initial sample, already of the first point's noise
        image, strength     noise is added to `image` (x_0) and the last `strength` part of the steps is taken (SDEdit; Meng et al.,
                        2022)
        mask            keeps `image` where it is 0 and samples where it is 1 (inpainting): after each step the rest is `image` with
                        the noise of that point. Broadcasts to shape
        noise           instead of draws: noise(i) returns the noise of evaluation i
        conditions      keyword arguments of the model
        unconditional   those without the condition: tensors of both are concatenated, (unconditional, conditional). None under
                        guidance: `conditions` are already doubled
        guidance_scale  None, or g of m = u + g (c - u) (classifier-free guidance): the model is called on a doubled batch
        guidance_interval   the part of the steps that is guided (Kynkaanniemi et al., 2024); outside g is 1
        guidance_rescale    the part by which m is brought to the deviation of c (Lin et al., 2023, eq. 15, 16), per sample
        guidance_parallel, guidance_max_norm, guidance_momentum     adaptive projected guidance (Sadat et al., 2024, algorithm 1): the
                        part that is kept of d = c - u where it is parallel to c, the largest norm of d, and d + momentum x (that of
                        the step before) in place of d, for which the paper takes -0.5; this last one is not part of the fused step
        dtype, model_dtype  of the state and of the model's inputs (default: the same)
        callback        called as callback(evaluation, t, x) after each step; x is overwritten by the next one
        progress        a progress bar; needs tqdm
        """
        name, guided = f"{type(self).__name__}.sample", guidance_scale is not None
        given = start if start is not None else image
        shape = _check_shapes(name, shape, start, image, mask, key)
        if not 0 < strength <= 1:
            raise ValueError(f"{name}: strength must be in (0, 1], got {strength}")
        model_dtype = model_dtype or dtype
        if (model_dtype == torch.float64) != (dtype == torch.float64):
            raise ValueError(f"{name}: float64 does not mix with narrower types, got dtype {dtype}, model_dtype {model_dtype}")
        if not guided and (unconditional is not None or guidance_momentum):
            raise ValueError(f"{name}: {'guidance_momentum' if guidance_momentum else 'unconditional'} needs guidance_scale")
        if not 0 <= guidance_rescale <= 1 or not (guidance_max_norm is None or guidance_max_norm > 0):
            got = f"{guidance_rescale} and {guidance_max_norm}"
            raise ValueError(f"{name}: guidance_rescale must be in [0, 1], guidance_max_norm positive, got {got}")
        learned = self.learned_variance
        if learned and len(shape) < 2:
            raise ValueError(f"{name}: a learned variance needs channels, got shape {tuple(shape)}")
        device = torch.device(device if device is not None else "cpu" if given is None else given.device)
        begin = len(self.grid) - max(1, round(len(self.grid) * strength)) if image is not None else 0
        interval = (*map(float, guidance_interval), float(guidance_scale)) if guided else None
        doubled = (shape[0] * (1 + guided), *shape[1:])
        run = self._prepare(begin, interval, dtype, doubled[0], device)
        rows, table, times, noisy = run.rows, run.table, run.times, run.noisy

        keys = _keys(key, generator, len(rows) + 1, device) if start is None or (any(noisy) and noise is None) else None
        x = self._initial(run.grid, shape, start, image, keys, device, dtype)
        if mask is not None:
            mask, image = mask.to(device, dtype), image.to(device, dtype)
            levels = [*(row.level for row in rows[1:]), (run.grid.alpha[-1], run.grid.sigma[-1])]
            first_noise = random.normal(keys[0], shape, dtype=dtype, device=device)
        difference = 0.0  # c - u with momentum
        adaptive = guided and (guidance_rescale != 0 or guidance_parallel != 1 or guidance_max_norm is not None)
        numbers = float(guidance_rescale), float(guidance_parallel), math.inf if guidance_max_norm is None else float(guidance_max_norm)
        expected = (doubled[0], 2 * shape[1], *shape[2:]) if learned else doubled
        conditions = self._conditions(conditions or {}, unconditional)
        # Where the model sees x as it is, x lies in the model's input: under guidance a step writes it once more, else not at all.
        shared = run.unscaled and mask is None and model_dtype == dtype
        doubles = shared and guided
        if doubles:
            model_input = torch.cat([x, x])
            x, input_out = model_input.chunk(2)
        else:
            x = x.clone() if x is start else x
            scaled = x if shared else (x * rows[0].scale).to(model_dtype)
            model_input = torch.cat([scaled, scaled]) if guided else scaled
            input_out = None if shared else model_input
        count = 0 if self.renoise_unconditional else self.history
        history = [torch.zeros_like(x) for _ in range(count)] if run.early else [x] * count  # the latest first; x stands in for none

        # What the ops would check holds by construction, and nothing that they choose by changes between steps.
        device, wide, samples, steps = x.device, dtype == torch.float64, shape[0], len(rows)
        backend, step = _sampler_step.bound(x, steps)
        given_moments = adaptive and (backend != "cpu" or self.threshold is not None)  # the CPU's step takes them itself
        options = math.inf if self.clip is None else float(self.clip), *numbers, learned
        plain = not (adaptive or learned) and self.clip is self.threshold is None
        absent = (None,) * (3 - max(count, self.renoise_unconditional))
        for i in _progress(range(steps), progress, type(self).__name__):
            m = model(model_input, times[i], **conditions)
            if not isinstance(m, torch.Tensor):
                m = getattr(m, "sample", m)
            if not isinstance(m, torch.Tensor):
                raise TypeError(f"{name}: the model must return a tensor, or it as .sample, got {type(m).__name__}")
            if m.shape != expected or m.device != device:
                got = f"{tuple(m.shape)} on {m.device}"
                raise ValueError(f"{name}: the model must return {tuple(expected)} on {x.device}, got {got}")
            if (m.dtype == torch.float64) != wide:
                m = m.to(dtype)
            if guidance_momentum:
                u, c = m.to(dtype).chunk(2)
                difference = c - u + guidance_momentum * difference
                m = torch.cat([c - difference, c])
            given = draw = moments = bound = None
            if noisy[i] and noise is None:
                draw = keys[i + 1]
            elif noisy[i]:
                given = noise(i).to(x)
                if given.shape != shape:
                    raise ValueError(f"{name}: noise must have shape {tuple(shape)}, got {tuple(given.shape)}")
            last = i + 1 == steps
            if given_moments:
                moments = _guidance_moments(m, learned)
            if self.threshold is not None:
                bound = _dynamic_threshold(x, m, table, None, i, moments, *numbers, self.threshold, self.threshold_max)
            past = (m[:samples],) if self.renoise_unconditional else history  # the outputs without the condition come first
            out, newest = x, None
            if history:  # the new term takes the place of the oldest
                newest = history[-1] if history[-1] is not x else torch.empty_like(x)
            if last and doubles:  # not half of a tensor
                out, newest = torch.empty_like(x) if newest is None else newest, None
            more = () if plain and not noisy[i] else (None, given, draw, moments, bound, *options)
            step(x, m, table, i, *past, *absent, out, newest, None if last else input_out, *more)
            x = out
            if history:
                history = [newest, *history[:-1]]
            if mask is not None:
                alpha, sigma = levels[i]
                x.mul_(mask).add_((alpha * image + sigma * first_noise) * (1 - mask))
                if not last:
                    model_input.copy_((x * rows[i + 1].scale).repeat(1 + guided, *(1,) * (x.dim() - 1)))
            if callback is not None:
                callback(i, times[i], x)
        return x

    def _initial(self, grid, shape, start, image, keys, device, dtype):
        if start is not None:
            return start.to(device, dtype).contiguous()
        noise = random.normal(keys[0], shape, dtype=dtype, device=device)
        if image is not None:
            return (grid.alpha[0] * image.to(device, dtype) + grid.sigma[0] * noise).contiguous()
        # Without x_0 the noise takes its place: a variance of 1 in a preserving schedule, of sigma^2 in the others.
        level = grid.sigma[0] if self.schedule.kind != "preserving" else 1 / grid.scale[0]
        return noise.mul_(level)

    @staticmethod
    def _conditions(conditions, unconditional):
        if unconditional is None:
            return conditions
        if set(conditions) != set(unconditional):
            raise ValueError(
                f"sample: conditions and unconditional must have the same names, got {set(conditions) ^ set(unconditional)}"
            )
        return {n: torch.cat([unconditional[n], c]) if isinstance(c, torch.Tensor) else c for n, c in conditions.items()}


def check_schedule(name, schedule):
    if not isinstance(schedule, Schedule):
        raise TypeError(f"{name}: schedule must be a Schedule, such as Schedule.cosine(), got {type(schedule).__name__}")


def _check_shapes(name, shape, start, image, mask, key):
    """The shape of the samples."""
    if start is not None and image is not None:
        raise ValueError(f"{name}: give start or image, not both")
    given = start if start is not None else image
    if shape is None and given is None:
        raise ValueError(f"{name}: give shape, start or image")
    shape = given.shape if shape is None else random.as_size(name, shape)
    if given is not None and given.shape != shape:
        raise ValueError(f"{name}: start and image must have shape {tuple(shape)}, got {tuple(given.shape)}")
    if mask is not None:
        if image is None:
            raise ValueError(f"{name}: mask needs image")
        if mask.dim() > len(shape) or not all(a in (1, b) for a, b in zip(reversed(mask.shape), reversed(shape), strict=False)):
            raise ValueError(f"{name}: mask must broadcast to {tuple(shape)}, got {tuple(mask.shape)}")
    if key is not None:
        random.check_key(name, key)
        if key.dim() == 2 and key.shape[0] != shape[0]:
            raise ValueError(f"{name}: one key per sample needs key ({shape[0]}, 2), got {tuple(key.shape)}")
    return shape


def _keys(key, generator, count, device):
    """(count, 2), on the host or on the device; (count, N, 2) on the device from one key per sample."""
    keys = random.split(random.draw_key(generator) if key is None else key, count)
    if keys.dim() == 3:
        return keys.transpose(0, 1).contiguous().to(device)
    return keys.to(device) if keys.device.type != "cpu" else keys


def _progress(steps, wanted, name):
    if not wanted:
        return steps
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(steps, desc=name)
