"""PixelCNN++ (Salimans et al., 2017): shifted convolutions in two streams of a U shape, and a mixture of discretized logistics.

Stream u sees the rows above a pixel, stream ul the pixels to its left as well and u. Gated residual blocks at three resolutions go
down, then up with shortcuts. Nonlinearity: concat_elu(x) = elu([x, -x]). Weight normalisation is not a part of it here: loaded
checkpoints have theirs multiplied out.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern.models._base import Training
from genkern.models.autoregressive._pixels import Mixture, Pixels
from genkern.models.autoregressive._raster import RasterConv, Upsample, at_pixel, pointwise, shifted_down, shifted_right
from genkern.nn import CausalAttention2d


@dataclass
class PixelCNNppConfig:
    channels: int = 3  # 1 or 3
    size: int = 32  # height and width, a multiple of 2^(resolutions - 1)
    levels: int = 255  # uint8 images hold 0..levels
    classes: int = 0  # 0: labels are not used
    width: int = 32  # channels of either stream; 160 as published
    blocks: int = 1  # residual blocks at each resolution and direction; 5 as published
    resolutions: int = 3
    mixtures: int = 5  # 10 as published
    attention_heads: int = 0  # of an attention over all earlier pixels at the coarsest resolution (PixelSNAIL); 0: none, as published
    dropout: float = 0.0  # 0.5 as published


class PixelCNNpp(Pixels):
    """PixelCNNpp(PixelCNNppConfig()): images (N, channels, size, size), uint8 in 0..levels or float in [-1, 1]; figures in nats."""

    Config = PixelCNNppConfig
    defaults = Training(epochs=3, batch_size=8, learning_rate=2e-3, schedule="cosine", warmup=50, clip_grad_norm=1.0, ema=0.99)

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.channels not in (1, 3) or c.resolutions < 1 or c.size % (1 << (c.resolutions - 1)):
            raise ValueError(
                f"PixelCNNpp: channels must be 1 or 3 and size a multiple of {1 << max(0, c.resolutions - 1)}, "
                f"got {c.channels} and {c.size}"
            )
        self.head = Mixture(c.channels, c.levels, c.mixtures)
        self.u_init = RasterConv(c.channels + 1, c.width, above=1, left=1, right=1)
        self.ul_init = nn.ModuleList(
            [RasterConv(c.channels + 1, c.width, left=1, right=1), RasterConv(c.channels + 1, c.width, above=1)]
        )
        self.levels = nn.ModuleList(_Resolution(c, last=i == c.resolutions - 1) for i in range(c.resolutions))
        self.attention = CausalAttention2d(c.width, heads=c.attention_heads) if c.attention_heads else None
        self.out = nn.Conv2d(c.width, self.head.outputs, 1)
        if c.classes:
            blocks = sum(len(stream) for level in self.levels for stream in level.streams())
            self.label = nn.Embedding(c.classes, 2 * c.width * blocks)

    @classmethod
    def from_checkpoint(cls, weights, **settings):
        """The model of a published checkpoint: a state_dict of pclucas14's pixel-cnn-pp, or {name: array} of OpenAI's pixel-cnn.

        weights: of the first kind as torch.load(..., weights_only=True) gives it, of the second as a numpy .npz of the TensorFlow
        variables, whose averages (.../ExponentialMovingAverage) are taken where they are there. Settings of the Config that weights do
        not show, such as size and dropout, may be given; weight normalisation is multiplied out. ValueError on other keys.
        """
        try:
            weights = {name.removeprefix("module."): torch.as_tensor(value) for name, value in weights.items()}
            layers = _pclucas14(weights) if any(name.startswith("u_init.") for name in weights) else _openai(weights)
        except (AttributeError, TypeError, RuntimeError) as error:  # no names, no numbers, or tensors of sizes that do not go together
            raise ValueError(f"{cls.__name__}: no checkpoint of pclucas14 or OpenAI: {error}") from error
        width, inputs = layers["u_init"][0].shape[:2]
        blocks = sum(name.startswith("levels.0.u_up.") for name in layers) // 2
        channels, outputs = inputs - 1, layers["out"][0].shape[0]
        model = cls(
            cls.Config(
                **{
                    "channels": channels,
                    "width": width,
                    "blocks": blocks,
                    "resolutions": 3,
                    "mixtures": outputs // (10 if channels == 3 else 3),
                    **settings,
                }
            )
        )
        state = {f"{name}.{kind}": value for name, pair in layers.items() for kind, value in zip(("weight", "bias"), pair, strict=True)}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{cls.__name__}: the checkpoint does not fit: {' '.join(str(error).split())}") from error
        return model.eval()

    def condition(self, labels):
        """{block: (N, 2 width, 1, 1)}; {} without labels."""
        if labels is None:
            return {}
        blocks = [block for level in self.levels for stream in level.streams() for block in stream]
        return dict(zip(blocks, self.label(labels)[:, :, None, None].chunk(len(blocks), 1), strict=True))

    def vertical(self, x, condition, place):
        """{block of the ul stream: the u stream beside it}, and under "first" the part of ul that sees rows above only."""
        if place is None:
            x = _with_ones(x)
            u, first = shifted_down(self.u_init(x)), shifted_down(self.ul_init[0](x))
        elif place.row == 0:
            u = first = x.new_zeros(len(x), self.config.width, 1, x.shape[3])
        else:
            row = _with_ones(x[:, :, place.row - 1 : place.row])
            u, first = self.u_init(row, place), self.ul_init[0](row, place)
        features = {"first": first}
        self._vertical(list(self.levels), u, features, condition, place)
        return features

    def _vertical(self, levels, u, features, condition, place):
        level, shortcuts = levels[0], [u]
        for block, beside in zip(level.u_up, level.ul_up, strict=True):
            u = block(u, None, condition.get(block), place)
            features[beside] = u
            shortcuts.append(u)
        if len(levels) == 1:
            shortcuts.pop()
        else:
            y = level.u_coarser(u, place)
            if y is not None:
                y = self._vertical(levels[1:], y, features, condition, place and place.coarser())
            u = level.u_finer(y, place)
        for block, beside in zip(level.u_down, level.ul_down, strict=True):
            u = block(u, shortcuts.pop(), condition.get(block), place)
            features[beside] = u
        return u

    def horizontal(self, x, features, condition, place):
        if place is None:
            ul = features["first"] + shifted_right(self.ul_init[1](_with_ones(x)))
        else:
            ul = features["first"][:, :, 0, place.column]
            if place.column:
                left = _with_ones(x[:, :, place.row, place.column - 1])
                ul = ul + self.ul_init[1](left, place.at(place.row, place.column - 1))
        return pointwise(self.out, F.elu(self._horizontal(list(self.levels), ul, features, condition, place)))

    def _horizontal(self, levels, ul, features, condition, place):
        level, shortcuts = levels[0], [ul]
        beside = lambda block: features[block] if place is None else features[block][:, :, 0, place.column]
        for block in level.ul_up:
            ul = block(ul, beside(block), condition.get(block), place)
            shortcuts.append(ul)
        if len(levels) == 1:
            shortcuts.pop()
            if self.attention is not None:
                ul = ul + self._attend(ul, place)
        else:
            y = level.ul_coarser(ul, place)
            if y is not None:
                y = self._horizontal(levels[1:], y, features, condition, place and place.coarser())
            ul = level.ul_finer(y, place)
        for block in level.ul_down:
            ul = block(ul, torch.cat([beside(block), shortcuts.pop()], 1), condition.get(block), place)
        return ul

    def _attend(self, ul, place):
        if place is None:
            return self.attention(ul)
        y, place.kept[self.attention] = self.attention.step(
            ul, place.kept.get(self.attention), (place.row, place.column), (place.width, place.width)
        )
        return y


class _Resolution(nn.Module):
    def __init__(self, c, last):
        super().__init__()
        down = c.blocks + (not last)
        stream = lambda n, **kind: nn.ModuleList(_Block(c, **kind) for _ in range(n))
        self.u_up, self.ul_up = stream(c.blocks, right=1, shortcuts=0), stream(c.blocks, right=0, shortcuts=1)
        self.u_down, self.ul_down = stream(down, right=1, shortcuts=1), stream(down, right=0, shortcuts=2)
        if not last:
            self.u_coarser = RasterConv(c.width, c.width, above=1, left=1, right=1, stride=2)
            self.ul_coarser = RasterConv(c.width, c.width, above=1, left=1, stride=2)
            self.u_finer, self.ul_finer = Upsample(c.width, c.width, 3), Upsample(c.width, c.width, 2)

    def streams(self):
        return self.u_up, self.ul_up, self.u_down, self.ul_down


class _Block(nn.Module):
    """x + a sigmoid(b) with (a, b) of two convolutions; `shortcuts` other maps are added between them through a 1x1 convolution."""

    def __init__(self, c, right, shortcuts):
        super().__init__()
        self.conv_in = RasterConv(2 * c.width, c.width, above=1, left=1, right=right)
        self.conv_out = RasterConv(2 * c.width, 2 * c.width, above=1, left=1, right=right)
        self.shortcut = nn.Conv2d(2 * shortcuts * c.width, c.width, 1) if shortcuts else None
        self.dropout = c.dropout
        with torch.no_grad():
            self.conv_out.weight.mul_(0.1)  # a block begins near the identity

    def forward(self, x, others, condition, place):
        y = self.conv_in(_concat_elu(x), place)
        if others is not None:
            y = y + pointwise(self.shortcut, _concat_elu(others))
        y = self.conv_out(F.dropout(_concat_elu(y), self.dropout, self.training), place)
        if condition is not None:
            y = y + (condition if y.dim() == 4 else at_pixel(condition))
        a, b = y.chunk(2, 1)
        return x + a * torch.sigmoid(b)


def _concat_elu(x):
    return F.elu(torch.cat([x, -x], 1))


def _with_ones(x):
    """A channel of ones tells the image from the zeros around it."""
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


# ---- published checkpoints: {name of a layer here: (weight, bias)}


def _order(blocks):
    """(layer here, kind in TensorFlow, name there of pclucas14's) in the order in which OpenAI's code makes its variables."""
    yield "u_init", "conv2d", "u_init.conv"
    yield "ul_init.0", "conv2d", "ul_init.0.conv"
    yield "ul_init.1", "conv2d", "ul_init.1.conv"

    def block(here, there, shortcut):
        yield f"{here}.conv_in", "conv2d", f"{there}.conv_input.conv"
        if shortcut:
            yield f"{here}.shortcut", "dense", f"{there}.nin_skip.lin_a"
        yield f"{here}.conv_out", "conv2d", f"{there}.conv_out.conv"

    for level in range(3):
        for i in range(blocks):
            yield from block(f"levels.{level}.u_up.{i}", f"up_layers.{level}.u_stream.{i}", False)
            yield from block(f"levels.{level}.ul_up.{i}", f"up_layers.{level}.ul_stream.{i}", True)
        if level < 2:
            for stream in ("u", "ul"):
                yield f"levels.{level}.{stream}_coarser", "conv2d", f"downsize_{stream}_stream.{level}.conv"
    for level in (2, 1, 0):
        for i in range(blocks + (level < 2)):
            for stream in ("u", "ul"):
                yield from block(f"levels.{level}.{stream}_down.{i}", f"down_layers.{2 - level}.{stream}_stream.{i}", True)
        if level:
            for stream in ("u", "ul"):
                yield f"levels.{level - 1}.{stream}_finer", "deconv2d", f"upsize_{stream}_stream.{2 - level}.deconv"
    yield "out", "dense", "nin_out.lin_a"


def _normed(v, g, dim):
    """g v / |v|, the norm over all dimensions but dim."""
    others = [d for d in range(v.dim()) if d != dim]
    shape = [-1 if d == dim else 1 for d in range(v.dim())]
    return v * (g.reshape(shape) / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _pclucas14(weights):
    """Its weight norm is over dimension 0 everywhere, in transposed convolutions too, where that is the input."""
    blocks = len({name.split(".")[3] for name in weights if name.startswith("up_layers.0.u_stream.")})
    layers = {}
    for here, kind, there in _order(blocks):
        weight = _normed(_take(weights, f"{there}.weight_v"), _take(weights, f"{there}.weight_g"), 0)
        layers[here] = weight[:, :, None, None] if kind == "dense" else weight, _take(weights, f"{there}.bias")
    return layers


def _openai(weights):
    """V of convolutions is (height, width, in, out), of transposed ones (height, width, out, in), of dense layers (in, out)."""
    average = "/ExponentialMovingAverage"
    weights = {name.removesuffix(":0"): value for name, value in weights.items()}
    count = sum(re.fullmatch(r"model/conv2d_\d+/V", name) is not None for name in weights)
    blocks, rest = divmod(count - 15, 24)  # 3 + 4 + 2 (2 * 3 q + 2 * (3 q + 2)) convolutions
    if rest or blocks < 1:
        raise ValueError(f"PixelCNNpp: no checkpoint of pclucas14 and, with {count} variables model/conv2d_*/V, none of OpenAI")
    numbers, layers = {"conv2d": 0, "deconv2d": 0, "dense": 0}, {}
    for here, kind, _ in _order(blocks):
        name = f"model/{kind}_{numbers[kind]}/"
        numbers[kind] += 1
        v, g, b = (weights.get(name + part + average, weights.get(name + part)) for part in "Vgb")
        if v is None or g is None or b is None:
            raise ValueError(f"PixelCNNpp: the checkpoint lacks one of {name}V, g and b")
        weight = {
            "conv2d": lambda v, g: _normed(v, g, 3).permute(3, 2, 0, 1),
            "deconv2d": lambda v, g: _normed(v, g, 2).permute(3, 2, 0, 1),
            "dense": lambda v, g: _normed(v, g, 1).t()[:, :, None, None],
        }[kind](v, g)
        layers[here] = weight.contiguous(), b
    return layers


def _take(weights, name):
    if name not in weights:
        raise ValueError(f"PixelCNNpp: the checkpoint lacks {name}")
    return weights[name]
