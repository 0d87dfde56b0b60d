"""What the flows share: x -> z is invertible, z ~ N(0, I), and log p(x) = log N(z) + log |det dz/dx| exactly.

Images are uint8 (N, C, H, W), or float in [-1, 1]; points are float (N, features), or uint8. A uint8 level l counts as l + u with
u uniform in [0, 1), so that log_prob is a lower bound of the log-probability of the levels, the uniform dequantization bound (Theis et
al., 2016); of float inputs it is the log-density itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from genkern import ops, random
from genkern.models._base import Model, Output, check_tensor, class_labels
from genkern.ops._common import check_int, check_number

TRANSFORMS = ("center", "logit")
_ALPHA = 0.05  # logit(alpha + (1 - 2 alpha) v): what keeps the ends finite
_EMBEDDED = 16  # features of a label


@dataclass
class FlowConfig:
    shape: tuple = (1, 8, 8)  # of one input: (channels, height, width), or (features,)
    levels: int | None = 255  # uint8 inputs hold 0..levels; None: float inputs
    classes: int = 0  # labels 0..classes - 1 condition the model; 0: they are not used
    context: int = 0  # so do vectors of as many numbers; 0: none
    transform: str = "logit"  # of v in [0, 1): "logit" of 0.05 + 0.9 v (RealNVP), or "center": v - 1/2 (Glow)
    backward: str = "store"  # or "invert" or "checkpoint": less memory in training (genkern.nn.InvertibleSequence)


class FlowModel(Model):
    """A flow of `levels`, each an InvertibleSequence. After each but the last, the second half of the channels leaves: it is done.

    A subclass builds self.levels. flat: images are seen as rows of numbers.

    labels      (N,), or one int for all, where the model has classes: p(x | label)
    context     (N, context), or (context,) for all, float, where it has a context, such as the observation of which a posterior is
                wanted: p(x | context). The networks see it as it is given: numbers of about unit size serve them best
    """

    flat = False

    @classmethod
    def config_for(cls, data, **settings):
        if len(data.shape) not in (1, 3):
            raise ValueError(f"{cls.__name__}: needs images or points, got {data.name} of shape {tuple(data.shape)}")
        return cls.Config(**{"shape": tuple(data.shape), "levels": data.levels, **settings})

    def __init__(self, config):
        super().__init__(config)
        c, name = config, type(self).__name__
        if not isinstance(c.shape, (tuple, list)) or len(c.shape) not in (1, 3) or min(c.shape) < 1:
            raise ValueError(f"{name}: shape must be (channels, height, width) or (features,), got {c.shape}")
        if c.levels is not None and not 1 <= c.levels <= 255:
            raise ValueError(f"{name}: levels must be in 1..255 or None, got {c.levels}")
        if c.transform not in TRANSFORMS:
            raise ValueError(f"{name}: transform must be one of {', '.join(TRANSFORMS)}, got {c.transform!r}")
        check_int(name, "classes", c.classes, 0)
        check_int(name, "context", c.context, 0)
        self.context = (_EMBEDDED if c.classes else 0) + c.context  # features: an embedded label, then the numbers given
        if c.classes:
            self.conditions = ("labels",)
            self.embedding = nn.Embedding(c.classes, _EMBEDDED)
        self.dimensions = math.prod(c.shape)
        self.bounded = c.levels is not None or len(c.shape) == 3  # inputs lie in an interval

    def forward(self, batch, *, labels=None, context=None, key=None, generator=None):
        """.loss: -log_prob, the mean over the batch, in nats; .parts: bits_per_dim of uint8 inputs. key (2,) or (N, 2)."""
        loss = -self.log_prob(batch, labels=labels, context=context, key=key, generator=generator).mean()
        discrete = self.config.levels is not None and not batch.is_floating_point()
        return Output(loss, {"bits_per_dim": loss.detach() / (self.dimensions * math.log(2))} if discrete else {})

    def encode(self, x, *, labels=None, context=None, key=None, generator=None):
        """(z, log_det): latents (N, D), of N(0, I) where the model is right, and log |det dz/dx| (N,). The key is of the
        dequantization of uint8 inputs."""
        context = self._context(labels, context, len(x))
        x, log_det = self._continuous(x, key, generator)
        x = x.flatten(1) if self.flat else x
        parts = []
        for level in self.levels:
            x, log_det = level(x, log_det, context)
            if level is not self.levels[-1]:
                x, done = x.split([x.shape[1] - x.shape[1] // 2, x.shape[1] // 2], 1)
                parts.append(done.flatten(1))
        return torch.cat([*parts, x.flatten(1)], 1), log_det

    def decode(self, z, *, labels=None, context=None):
        """The inputs of latents (N, D): float, images in about [-1, 1]; those of uint8 inputs lie between two levels."""
        return self._data(self._decode(z, self._context(labels, context, len(z))))

    def log_prob(self, x, *, labels=None, context=None, samples=1, key=None, generator=None):
        """(N,) in nats: of float inputs the log-density; of uint8 inputs the dequantization bound of the log-probability, with
        samples > 1 the tighter importance-weighted one (the logarithm of the mean over as many draws of u)."""
        check_tensor(type(self).__name__, x)
        check_int(type(self).__name__, "samples", samples)
        key = random.draw_key(generator, x.device) if key is None else key
        keys = [key] if samples == 1 else random.split(key, samples).unbind(-2)
        found = []
        for k in keys:
            z, log_det = self.encode(x, labels=labels, context=context, key=k)
            found.append(self._base_log_prob(z) + log_det)
        return found[0] if samples == 1 else torch.stack(found).logsumexp(0) - math.log(samples)

    def bits_per_dim(self, x, **options):
        """-log_prob / (dimensions ln 2), (N,): an upper bound for uint8 inputs, NaN for float ones, which have a density only."""
        check_tensor(type(self).__name__, x)
        if self.config.levels is None or x.is_floating_point():
            return torch.full((len(x),), math.nan)
        return -self.log_prob(x, **options) / (self.dimensions * math.log(2))

    @torch.no_grad()
    def sample(self, n, *, labels=None, context=None, temperature=1.0, key=None, generator=None, batch_size=256):
        """n samples: uint8 in 0..levels, or float where the model is of float inputs.

        labels, context as above: (n, ...), or one for all
        temperature     factor on the latents: below 1, samples nearer to the mode and less varied (Glow, section 6)

        Each has its own key, so sample i depends on (key, i), not on n or batch_size (up to the rounding of sums).
        """
        keys = self.sample_keys(n, key, generator, batch_size)
        check_number(type(self).__name__, "temperature", temperature)
        if temperature < 0:
            raise ValueError(f"{type(self).__name__}: temperature must not be negative, got {temperature}")
        context = self._context(labels, context, n)
        samples = []
        for start in range(0, max(n, 1), batch_size):
            part = slice(start, start + batch_size)
            z = self._base_sample(keys[part]) * temperature
            samples.append(self._domain(self._decode(z, context if context is None else context[part])))
        return torch.cat(samples)

    @torch.no_grad()
    def interpolate(self, a, b, *, labels=None, context=None, steps=9, key=None):
        """Inputs between a and b, each (N, ...), through the latents: (N, steps, ...).

        The latents ((1 - w) z_a + w z_b) / sqrt((1 - w)^2 + w^2) keep the ends, and the variance of independent ones.
        """
        key = random.draw_key(None, a.device) if key is None else key
        (first, _), (last, _) = (
            self.encode(x, labels=labels, context=context, key=k) for x, k in zip((a, b), random.split(key, 2), strict=True)
        )
        return self._between(first, last, labels, context, steps)

    @torch.no_grad()
    def traverse(self, *, steps=9, rows=8, temperature=0.7, context=None, key=None):
        """Samples on the way between two samples, a row for each pair, of one class where there are classes: (rows, steps, ...)."""
        keys = self.sample_keys(2 * rows, key)
        labels = torch.arange(rows, device=keys.device) % self.config.classes if self.config.classes else None
        first, last = (temperature * self._base_sample(keys)).chunk(2)
        return self._between(first, last, labels, context, steps)

    # ---- what a subclass may change

    def _base_log_prob(self, z):
        return ops.gaussian_log_prob(z)

    def _base_sample(self, keys):
        return random.normal(keys, (len(keys), self.dimensions), dtype=self._dtype(), device=keys.device)

    # ---- pieces

    def _decode(self, z, context):
        shapes = self._shapes()
        if z.shape[1:] != (self.dimensions,):
            raise ValueError(f"{type(self).__name__}: latents must be (N, {self.dimensions}), got {tuple(z.shape)}")
        parts = [part.unflatten(1, shape) for part, shape in zip(z.split([math.prod(s) for s in shapes], 1), shapes, strict=True)]
        x, _ = self.levels[-1].inverse(parts[-1], None, context)
        for level, done in zip(reversed(self.levels[:-1]), reversed(parts[:-1]), strict=True):
            x, _ = level.inverse(torch.cat([x, done], 1), None, context)
        return x.unflatten(1, self.config.shape) if self.flat else x

    def _shapes(self):
        """The shapes of what leaves after each level."""
        shape = (self.dimensions,) if self.flat else tuple(self.config.shape)
        shapes = []
        for level in self.levels:
            for layer in level.layers:
                if isinstance(layer, nn.Module) and type(layer).__name__ == "Squeeze":
                    shape = (4 * shape[0], shape[1] // 2, shape[2] // 2)
            leaving = shape if level is self.levels[-1] else (shape[0] // 2, *shape[1:])
            shapes.append(leaving)
            shape = (shape[0] - shape[0] // 2, *shape[1:])
        return shapes

    def _between(self, first, last, labels, context, steps):
        w = torch.linspace(0, 1, steps, dtype=first.dtype, device=first.device).view(1, -1, 1)
        z = ((1 - w) * first.unsqueeze(1) + w * last.unsqueeze(1)) / torch.sqrt((1 - w) ** 2 + w**2)
        context = self._context(labels, context, len(first))
        context = context if context is None else context.repeat_interleave(steps, 0)
        return self._domain(self._decode(z.flatten(0, 1), context)).unflatten(0, (-1, steps))

    def _dtype(self):
        return next(self.parameters()).dtype

    def _continuous(self, x, key, generator):
        """(y, log |det dy/dx|): inputs as the layers take them."""
        c, name = self.config, type(self).__name__
        check_tensor(name, x)
        if tuple(x.shape[1:]) != tuple(c.shape):
            raise ValueError(f"{name}: inputs must be (N, {', '.join(map(str, c.shape))}), got {tuple(x.shape)}")
        if x.dtype == torch.uint8 and c.levels is not None:
            if x.device.type == "cpu" and not torch.compiler.is_compiling() and x.numel() and x.max() > c.levels:
                raise ValueError(f"{name}: inputs of uint8 must be in [0, {c.levels}], found [{x.min()}, {x.max()}]")
            transform = "logit_symmetric" if c.transform == "logit" else c.transform
            options = {"key": key, "generator": None if key is not None else generator, "dtype": self._dtype()}
            return ops.dequantize(x, levels=c.levels + 1, transform=transform, alpha=_ALPHA, **options)
        if not x.is_floating_point():
            wanted = "float" if c.levels is None else f"uint8 in 0..{c.levels} or float"
            raise TypeError(f"{name}: inputs must be {wanted}, got {x.dtype}")
        x = x.to(self._dtype())  # numpy's points are float64; a stream of half precision could not be inverted
        if not self.bounded:
            return x, x.new_zeros(len(x))
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not (x.detach().abs() <= 1).all():
            raise ValueError(f"{name}: inputs of {x.dtype} must be in [-1, 1], found [{x.min():g}, {x.max():g}]")
        v = (x + 1) / 2
        log_det = x.new_full((len(x),), -self.dimensions * math.log(2))
        if c.transform == "center":
            return v - 0.5, log_det
        v = _ALPHA + (1 - 2 * _ALPHA) * v
        slopes = math.log(1 - 2 * _ALPHA) - torch.log(v) - torch.log1p(-v)
        return torch.logit(v), log_det + slopes.flatten(1).sum(1)

    def _data(self, y):
        """Inputs as float, from what the layers give."""
        if not self.bounded:
            return y
        if self.config.transform == "center":
            return 2 * y
        return 2 * (torch.sigmoid(y) - _ALPHA) / (1 - 2 * _ALPHA) - 1

    def _domain(self, y):
        """Inputs as the data have them."""
        x = self._data(y)
        if self.config.levels is not None:
            return ((x + 1) / 2 * (self.config.levels + 1)).floor().clamp(0, self.config.levels).to(torch.uint8)
        return x.clamp(-1, 1) if self.bounded else x

    def _context(self, labels, context, n):
        """What the networks see (n, self.context): the embedded labels and the numbers given; None for a model without either."""
        classes, name = self.config.classes, type(self).__name__
        if not classes:
            if labels is not None:
                raise ValueError(f"{name}: this model has no classes: leave labels out")
            return self._given(context, n)
        embedded = self.embedding(class_labels(name, labels, n, classes, self.embedding.weight.device))
        given = self._given(context, n)
        return embedded if given is None else torch.cat([embedded, given], 1)

    def _given(self, context, n):
        """The context (n, features) in the model's type, checked; None for a model without one."""
        name, features = type(self).__name__, self.config.context
        if context is None and not features:
            return None
        if not features:
            raise ValueError(f"{name}: this model has no context: leave it out, or construct the model with context=features")
        if context is None:
            raise ValueError(f"{name}: a model with a context needs context ({n}, {features})")
        if not isinstance(context, torch.Tensor) or not context.is_floating_point():
            raise TypeError(f"{name}: context must be a float tensor, got {getattr(context, 'dtype', type(context).__name__)}")
        if context.shape not in ((features,), (n, features)):
            raise ValueError(f"{name}: context must be ({n}, {features}), or ({features},) for all, got {tuple(context.shape)}")
        return context.to(self._dtype()).expand(n, -1)
