"""Images pixel by pixel: what PixelCNN, GatedPixelCNN, PixelCNNpp and PixelRNN share."""

import math

import torch
import torch.nn.functional as F

from genkern import random
from genkern.models._base import Model, Output, class_labels, ink
from genkern.models.autoregressive._raster import Place
from genkern.ops import discretized_mix_logistic_nll, discretized_mix_logistic_sample, sample_tokens


class State:
    """Where a step stands: the image so far in [-1, 1] (N, C, H, W), the layers' Place, and the number of steps taken."""

    def __init__(self, image, labels, place):
        self.image, self.labels, self.place, self.steps = image, labels, place, -1


class Pixels(Model):
    """p(x) = product over the pixels, row by row, and where the distribution says so over their colours, of p(value | those before).

    A model has a config with channels, size, levels and classes, a distribution in self.head (Levels or Mixture), and a network in
    vertical(x, condition, place) -> features of each row, which see the rows above, and
    horizontal(x, features, condition, place) -> (N, head.outputs, ...), which sees the pixels to the left as well:
    with place None for the whole image x in [-1, 1], else for a row and a pixel of it.
    condition(labels) -> what both take of the labels, None without classes.
    """

    @classmethod
    def config_for(cls, data, **settings):
        if data.levels is None or len(data.shape) != 3 or data.shape[1] != data.shape[2]:
            raise ValueError(f"{cls.__name__}: needs square images of uint8, got {data.name} of shape {tuple(data.shape)}")
        return cls.Config(**{"channels": data.shape[0], "size": data.shape[1], "levels": data.levels, **settings})

    def __init__(self, config):
        super().__init__(config)
        if config.size < 1 or config.channels < 1 or not 1 <= config.levels <= 255 or config.classes < 0:
            raise ValueError(
                f"{type(self).__name__}: size and channels must be positive, levels in 1..255 and classes not negative, got "
                f"{config.size}, {config.channels}, {config.levels} and {config.classes}"
            )
        if config.classes:
            self.conditions = ("labels",)

    def forward(self, batch, *, labels=None, key=None, generator=None):
        """.loss: -log p per value, the mean over the batch, nats; .parts: nll, the same per image.

        batch (N, C, H, W): uint8 in 0..levels, or float in [-1, 1], which is rounded to these. key, generator: of the shared training
        loop; the loss draws nothing but dropout, from torch's generator.
        """
        nll = -self.log_prob(batch, labels=labels).mean()
        return Output(nll / batch.shape[1:].numel(), {"nll": nll.detach()})

    def log_prob(self, batch, *, labels=None, key=None):
        """log p(x), exact, nats per image: (N,). With gradients of the parameters."""
        index, x = self._images(batch)
        return -self.head.nll(self.predict(x, labels), index)

    def bits_per_dim(self, batch, *, labels=None, key=None):
        """-log p / (values of an image ln 2): (N,)."""
        nats = -self.log_prob(batch, labels=labels)
        return nats / (batch.shape[1:].numel() * math.log(2))

    def predict(self, x, labels=None):
        """The parameters of every pixel's distribution, of x (N, C, H, W) in [-1, 1]: (N, head.outputs, H, W)."""
        condition = self.condition(self._labels(labels, len(x), x.device))
        return self.horizontal(x, self.vertical(x, condition, None), condition, None)

    @torch.no_grad()
    def sample(self, n, *, labels=None, key=None, generator=None, known=None, mask=None, temperature=1.0, cached=True, batch_size=256):
        """n images: uint8 in 0..levels, drawn value by value.

        labels          (n,) or one int for all, for a model with classes
        known, mask     for completion: where mask is True the values of `known` stand, images as forward takes them; both broadcast to
                        (n, C, H, W). What is known behind a pixel does not move it: it is drawn given those before it
        temperature     below 1: nearer to the most probable values
        cached          False: the whole network again for every pixel, as plain code does; the samples are the same (unless rounding
                        moves a value over the edge of two levels)

        Each image has its own key, so image i depends on (key, i), not on n or batch_size.
        """
        c = self.config
        keys = self.sample_keys(n, key, generator, batch_size)
        labels = self._labels(labels, n, keys.device)
        shape = (n, c.channels, c.size, c.size)
        if (known is None) != (mask is None):
            raise ValueError(f"{type(self).__name__}: known and mask go together")
        if known is not None:
            known, mask = self._completion(known, mask, shape)
            known, mask = known.to(keys.device), mask.to(keys.device)
        images = [keys.new_empty(0, *shape[1:], dtype=torch.uint8)]
        for start in range(0, n, batch_size):
            part = slice(start, start + batch_size)
            rows = [None if rows is None else rows[part] for rows in (labels, known, mask)]
            images.append(self._draw(keys[part], *rows, temperature, cached))
        return torch.cat(images)

    def _draw(self, keys, labels, known, mask, temperature, cached):
        c, head = self.config, self.head
        shape = (len(keys), c.channels, c.size, c.size)
        steps = c.size**2 * head.steps
        uniforms = random.uniform(keys, (len(keys), steps, head.noise), device=keys.device)
        state = self.start(len(keys), labels=labels)
        images, values = torch.zeros(shape, dtype=torch.long, device=keys.device), None
        for t in range(steps):
            (row, column), colors = self._position(t)
            if cached:
                output, state = self.step(values, state)
            else:
                output = head.of_step(self.predict(self._signed(images), labels)[:, :, row, column], t)
            values = head.draw(output, uniforms[:, t], temperature)
            if mask is not None:
                values = torch.where(mask[:, colors, row, column], known[:, colors, row, column], values)
            images[:, colors, row, column] = values
        return images.to(torch.uint8)

    def start(self, n, *, labels=None):
        """The state of n images of which nothing is decided."""
        c, parameter = self.config, next(self.parameters())
        image = parameter.new_zeros(n, c.channels, c.size, c.size)
        return State(image, self.condition(self._labels(labels, n, parameter.device)), Place(c.size))

    @torch.no_grad()
    def step(self, values, state):
        """(parameters of the next value's distribution, the state). values: integers in 0..levels, those decided since, None at first.

        Levels: one value a step, (N,) or (N, 1), answer (N, levels + 1) logits. Mixture: one pixel a step, (N, C), answer
        (N, head.outputs). Equals predict() at that pixel up to the rounding of torch's matrix products, which sum in another order than
        its convolutions: about 1e-6 of the numbers in float32. A state is used up by the step that takes it.
        """
        if state.steps + 1 >= self.config.size**2 * self.head.steps:
            raise ValueError(f"{type(self).__name__}: step: the image has no more values to decide")
        if values is not None:
            (row, column), colors = self._position(state.steps)
            state.image[:, colors, row, column] = self._signed(values.reshape(len(values), -1))
        state.steps += 1
        (row, column), _ = self._position(state.steps)
        state.place = place = state.place.at(row, column)
        if column == 0 and state.steps % self.head.steps == 0:
            place.kept["vertical"] = self.vertical(state.image, state.labels, place)
        output = self.horizontal(state.image, place.kept["vertical"], state.labels, place)
        return self.head.of_step(output, state.steps), state

    def condition(self, labels):
        return None

    def _position(self, t):
        """Of step t: (row, column), and the slice of its colours."""
        pixel, color = divmod(t, self.head.steps)
        return divmod(pixel, self.config.size), slice(color, color + 1) if self.head.steps > 1 else slice(None)

    def _images(self, images):
        """The levels of images, int64, and the images in [-1, 1]."""
        c = self.config
        index = (ink(images, c.levels) * c.levels).round()
        if tuple(index.shape[1:]) != (c.channels, c.size, c.size):
            raise ValueError(f"{type(self).__name__}: images must be (N, {c.channels}, {c.size}, {c.size}), got {tuple(images.shape)}")
        return index.long(), self._signed(index)

    def _signed(self, index):
        """Levels as the network takes them: in [-1, 1], in its type."""
        return 2 * index.to(next(self.parameters()).dtype) / self.config.levels - 1

    def _completion(self, known, mask, shape):
        """The levels of what is known, and the mask, of this shape."""
        name = type(self).__name__
        if not isinstance(mask, torch.Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"{name}: mask must be a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        known = self._images(known)[0]
        try:
            return known.expand(shape), mask.expand(shape)
        except RuntimeError:
            found = f"{tuple(known.shape)} and {tuple(mask.shape)}"
            raise ValueError(f"{name}: known and mask must broadcast to {shape}, got {found}") from None

    def _labels(self, labels, n, device):
        """int64 (n,); None for a model without classes."""
        classes, name = self.config.classes, type(self).__name__
        if not classes:
            if labels is not None:
                raise ValueError(f"{name}: a model with classes=0 takes no labels")
            return None
        return class_labels(name, labels, n, classes, device)


class Levels:
    """A softmax over the levels of each value, colour after colour: outputs C (levels + 1), the levels of a colour neighbours."""

    noise = 1  # uniforms a step

    def __init__(self, channels, levels):
        self.steps, self.levels, self.outputs = channels, levels + 1, channels * (levels + 1)

    def nll(self, output, index):
        logits = output.unflatten(1, (self.steps, self.levels)).transpose(1, 2)
        return F.cross_entropy(logits.float(), index, reduction="none").flatten(1).sum(1)

    def of_step(self, output, t):
        color = t % self.steps
        return output[:, color * self.levels : (color + 1) * self.levels]

    def draw(self, logits, uniforms, temperature):
        return sample_tokens(logits, uniforms=uniforms[:, 0], temperature=temperature).unsqueeze(1)


class Mixture:
    """A mixture of discretized logistics of each pixel, all colours at once (Salimans et al., 2017): outputs 10 K, or 3 K if grey."""

    steps = 1  # a pixel

    def __init__(self, channels, levels, mixtures):
        self.channels, self.levels, self.outputs = channels, levels, mixtures * (10 if channels == 3 else 3)
        self.noise = mixtures + channels

    def nll(self, output, index):
        x = 2 * index.to(torch.promote_types(output.dtype, torch.float32)) / self.levels - 1  # narrow types do not hold all levels
        return discretized_mix_logistic_nll(x, output, levels=self.levels + 1)

    def of_step(self, output, t):
        return output

    def draw(self, params, uniforms, temperature):
        values = discretized_mix_logistic_sample(
            params, channels=self.channels, temperature=temperature, uniforms=uniforms, levels=self.levels + 1
        )
        return ((values + 1) / 2 * self.levels).round().long()
