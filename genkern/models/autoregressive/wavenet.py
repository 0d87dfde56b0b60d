"""WaveNet: sound, one sample after another, by dilated causal convolutions (van den Oord et al., 2016)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern import random
from genkern.models._base import Model, Output, Training
from genkern.nn import CausalConv1d
from genkern.nn.wavenet_steps import WaveNetSteps
from genkern.ops import (
    discretized_mix_logistic_nll,
    discretized_mix_logistic_sample,
    mu_law_decode,
    mu_law_encode,
    sample_tokens,
)

HEADS = ("softmax", "logistic", "gaussian")


@dataclass
class WaveNetConfig:
    head: str = "softmax"  # over mu-law levels; "logistic": a mixture over evenly spaced levels; "gaussian": a density
    levels: int = 256  # of the amplitude; "gaussian" has none
    rounding: str = "nearest"  # of mu-law: "nearest", or "floor" as in r9y9's WaveNet
    mixtures: int = 10
    min_log_scale: float = -12.0  # of "logistic" and "gaussian"
    layers: int = 16
    stacks: int = 2  # the dilations 1, 2, 4, ... begin anew in each
    kernel_size: int = 2
    residual: int = 32  # channels between layers
    gate: int = 64  # channels before the gate, which halves them
    skip: int = 64  # channels of the sum of all layers
    dropout: float = 0.0
    condition: int = 0  # channels of a local condition
    classes: int = 0  # of a global condition
    class_width: int = 16
    rate: int = 16000  # samples per second: of the data, for what is written of the samples


class WaveNet(Model):
    """p(x) = product over t of p(x_t | x_1 .. x_{t-1}) of sound (N, 1, L), float in [-1, 1].

    Layer l: z = tanh(W_a * h + c_a) sigmoid(W_b * h + c_b), the next h = (h + W_out z) sqrt(1/2), and W_skip z is summed over the
    layers; * is a causal convolution with dilation 2^(l mod layers / stacks), c the projected conditions. Two more 1x1 convolutions
    with ReLU give the parameters of p.

    labels      (N,) int64, of a model with classes: the global condition
    condition   (N, channels, L), of a model with a local condition, at the rate of the sound: column t conditions sample t

    Modules are named as in r9y9's wavenet_vocoder; from_r9y9() takes its state dict. All convolutions are genkern's own on the CPU, so
    that in float32 step() gives the bits of the parallel pass, for chunks of any length, any batch and any number of threads.
    """

    Config = WaveNetConfig
    defaults = Training(epochs=12, batch_size=8, learning_rate=3e-3, schedule="cosine", clip_grad_norm=1.0)

    @classmethod
    def config_for(cls, data, **settings):
        if len(data.shape) != 2 or data.shape[0] != 1 or data.levels is not None:
            raise ValueError(
                f"{cls.__name__}: needs sound of one channel, (N, 1, length) float (a folder of .wav files, or --data plucks), "
                f"got {data.name} of shape {tuple(data.shape)}"
            )
        return cls.Config(**{"classes": data.classes, **({"rate": data.rate} if data.rate else {}), **settings})

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.head not in HEADS:
            raise ValueError(f"WaveNet: head must be one of {', '.join(HEADS)}, got {c.head!r}")
        if c.layers % c.stacks or c.gate % 2:
            raise ValueError(f"WaveNet: layers must be a multiple of stacks, and gate even, got {c.layers}, {c.stacks} and {c.gate}")
        self.conditions = ("labels",) if c.classes else ()
        self.out_channels = {"softmax": c.levels, "logistic": 3 * c.mixtures, "gaussian": 2}[c.head]
        self.first_conv = CausalConv1d(c.levels if c.head == "softmax" else 1, c.residual, 1)
        self.conv_layers = nn.ModuleList(_Layer(c, 2 ** (i % (c.layers // c.stacks))) for i in range(c.layers))
        self.last_conv_layers = nn.Sequential(
            nn.ReLU(), CausalConv1d(c.skip, c.skip, 1), nn.ReLU(), CausalConv1d(c.skip, self.out_channels, 1)
        )
        if c.classes:
            self.embed_speakers = nn.Embedding(c.classes, c.class_width)
        for module in self.modules():
            if isinstance(module, CausalConv1d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.conv_layers[-1].conv1x1_out.requires_grad_(False)  # of the last layer nothing but the sum is used
        nn.init.zeros_(self.last_conv_layers[-1].weight)
        if c.head == "logistic":  # the mixtures begin spread over the amplitudes
            with torch.no_grad():
                self.last_conv_layers[-1].bias[c.mixtures : 2 * c.mixtures] = torch.linspace(-0.5, 0.5, c.mixtures)
                self.last_conv_layers[-1].bias[2 * c.mixtures :] = -2

    @property
    def receptive_field(self):
        """How many samples, the last ones, the distribution of the next depends on: 1 + (kernel_size - 1) sum of the dilations."""
        return 1 + (self.config.kernel_size - 1) * sum(layer.conv.dilation[0] for layer in self.conv_layers)

    # ---- likelihood

    def forward(self, batch, *, key=None, labels=None, condition=None):
        """.loss: -log p per sample of the sound, the mean over the batch, nats; .parts: nll, the same. key: nothing is drawn."""
        nll = -self.log_prob(batch, labels=labels, condition=condition).mean() / batch.shape[2]
        return Output(nll, {"nll": nll.detach()})

    def log_prob(self, batch, *, key=None, labels=None, condition=None):
        """log p(x), nats per sound: (N,). Of the levels nearest to x, a discrete probability; with head "gaussian" of x, a density."""
        x = self.quantized(self._checked(batch))
        params = self.network(x[..., :-1], labels=labels, condition=condition)[0]
        c = self.config
        if c.head == "softmax":
            return -F.cross_entropy(params, self._index(x)[:, 0], reduction="none").sum(1)
        if c.head == "logistic":
            return -discretized_mix_logistic_nll(x, params, levels=c.levels, min_log_scale=c.min_log_scale)
        mean, log_scale = params[:, :1], params[:, 1:].clamp(min=c.min_log_scale)
        nll = 0.5 * ((x - mean) * torch.exp(-log_scale)) ** 2 + log_scale + 0.5 * math.log(2 * math.pi)
        return -nll.flatten(1).sum(1)

    def bits_per_dim(self, batch, *, key=None, labels=None, condition=None):
        """-log2 p(x) per sample of the sound, (N,), of its levels; NaN with head "gaussian", which has none."""
        self._checked(batch)
        if self.config.head == "gaussian":
            return batch.new_full((len(batch),), float("nan"))
        return -self.log_prob(batch, labels=labels, condition=condition) / (batch.shape[2] * math.log(2))

    def quantized(self, x):
        """The amplitudes of the levels nearest to x, of the same shape: what the model has a distribution of."""
        c = self.config
        if c.head == "softmax":
            return mu_law_decode(mu_law_encode(x, c.levels, rounding=c.rounding), c.levels, dtype=x.dtype)
        if c.head == "logistic":
            return ((x + 1) * ((c.levels - 1) / 2)).round() * (2 / (c.levels - 1)) - 1
        return x

    # ---- one sample after another

    @torch.no_grad()
    def step(self, x, state=None, *, labels=None, condition=None):
        """(parameters of the distribution of the samples after x, (N, P, T'), new state). x (N, 1, T), samples of quantized sound.

        state None: the sound begins here; a silent sample is put before it and T' = T + 1, else T' = T. condition: (N, channels, T'),
        those of the samples that are predicted. The parameters have the bits of network() over the whole sound, in float32 on the CPU.
        A state is used up by the step that takes it.
        """
        return self.network(x, {} if state is None else state, labels, condition, begins=state is None)

    @torch.no_grad()
    def sample(
        self, n, *, length=1024, known=None, temperature=1.0, labels=None, condition=None, key=None, generator=None, batch_size=32
    ):
        """n sounds (n, 1, length), each with a key of its own.

        known       (n, 1, K) or (1, 1, K): how the sounds begin; they are continued to the whole length
        temperature of the distribution: 1 draws from the model; smaller is tamer
        """
        keys, start = self.sample_keys(n, key, generator, batch_size), next(self.parameters())
        known = start.new_empty(n, 1, 0) if known is None else self.quantized(self._checked(known)).to(start).expand(n, -1, -1)
        if known.shape[2] > length:
            raise ValueError(f"WaveNet: known must have at most length = {length} samples, got {known.shape[2]}")
        parts = []
        for i in range(0, n, batch_size):
            some = slice(i, i + batch_size)
            of_part = {"labels": None if labels is None else labels[some]}
            window = lambda a, b, some=some: None if condition is None else condition[some, :, a:b]
            sound = [known[some]]
            draws = random.split(keys[some], length).unbind(1)  # draw t: what fold_in(keys, t) would give
            new, state, at = known[some], None, 0
            for t in range(known.shape[2], length):
                params, state = self.step(new, state, condition=window(at, t + 1), **of_part)
                new, at = self.draw(params[..., -1], draws[t].contiguous(), temperature), t + 1
                sound.append(new)
            parts.append(torch.cat(sound, 2))
        return torch.cat(parts) if parts else known

    def draw(self, params, key, temperature=1.0):
        """Samples (N, 1, 1) from the distributions of params (N, P), one key (N, 2) for each."""
        c = self.config
        if c.head == "softmax":
            return mu_law_decode(sample_tokens(params, temperature=temperature, key=key), c.levels, dtype=params.dtype)[:, None, None]
        if c.head == "logistic":
            x = discretized_mix_logistic_sample(
                params[..., None], channels=1, temperature=temperature, min_log_scale=c.min_log_scale, key=key
            )
            return self.quantized(x)
        scale = temperature * torch.exp(params[:, 1:].clamp(min=c.min_log_scale))
        noise = random.normal(key, (len(params), 1), dtype=params.dtype, device=params.device)
        return (params[:, :1] + scale * noise).clamp(-1, 1)[..., None]

    # ---- the network

    def network(self, x, state=None, labels=None, condition=None, *, begins=True):
        """(parameters (N, P, T'), state) of the samples after x (N, 1, T), quantized; begins: a silent one is before x, T' = T + 1.

        state: {convolution, or two: its own}, empty at first; None: a parallel pass, which has gradients and keeps none. Single samples
        take one native call, whose state is that of "steps".
        """
        c = self.config
        if begins:
            silence = self.quantized(x.new_zeros(1)).item() if c.head == "softmax" else 0.0
            x = F.pad(x, (1, 0), value=silence)
        self._check_conditions(labels, condition, x.shape[2])

        def through(convolution, x, *condition):
            if state is None:
                return convolution(x, *condition)
            out, state[convolution] = convolution.step(x, state.get(convolution), *condition)
            return out

        def joined(a, b, x):  # two 1x1 convolutions of one input: steps take them as one
            if state is None:
                return a(x), b(x)
            both, its_state = state.get((a, b)) or (_joined(a, b), None)
            out, its_state = both.step(x, its_state)
            state[a, b] = both, its_state
            return out.split([a.out_channels, b.out_channels], 1)

        if c.head == "softmax":  # what the 1x1 convolution does with one-hot vectors
            first = self.first_conv
            x = F.embedding(self._index(x)[:, 0], first.weight[..., 0].t()).transpose(1, 2) + first.bias[:, None]
        else:
            x = through(self.first_conv, x)
        g = self.embed_speakers(labels)[..., None] if c.classes else None
        relu, one, _, two = self.last_conv_layers
        if state is not None and x.shape[2] == 1 and self._steps_natively(x):
            if "steps" not in state:
                state = {"steps": WaveNetSteps(self.conv_layers, (one, two), len(x), state)} | state
            return state["steps"].step(x, condition, g), state
        if state and "steps" in state:
            state |= state.pop("steps").states()
        total = 0
        for layer in self.conv_layers:
            x, skip = layer(x, condition, g, through, joined)
            total = total + skip
        return through(two, relu(through(one, relu(total * math.sqrt(1 / c.layers))))), state

    def _steps_natively(self, x):
        training = self.training and self.config.dropout > 0
        return not torch.is_grad_enabled() and not training and x.device.type == "cpu" and x.dtype == torch.float32

    def _check_conditions(self, labels, condition, length):
        c = self.config
        if (labels is None) != (not c.classes) or (condition is None) != (not c.condition):
            raise ValueError(f"WaveNet: labels and condition must be given where the model has classes and condition: {c}")
        if condition is not None and (condition.dim() != 3 or condition.shape[1:] != (c.condition, length)):
            raise ValueError(
                f"WaveNet: condition must be (N, {c.condition}, {length}), a column per sample, got {tuple(condition.shape)}"
            )

    def _index(self, x):
        """Levels of amplitudes that are quantized already."""
        return mu_law_encode(x, self.config.levels)

    def _checked(self, x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise TypeError(f"WaveNet: sound must be a float tensor in [-1, 1], got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 3 or x.shape[1] != 1 or x.shape[2] == 0:
            raise ValueError(f"WaveNet: sound must be (N, 1, L) with L at least 1, got {tuple(x.shape)}")
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not (x.abs() <= 1).all():
            raise ValueError(f"WaveNet: sound must be in [-1, 1], found [{x.min():g}, {x.max():g}]")
        return x

    # ---- checkpoints of r9y9's wavenet_vocoder

    @classmethod
    def from_r9y9(cls, state_dict, *, head, stacks, **settings):
        """The model of a state dict of wavenet_vocoder, with or without weight norm, in evaluation mode.

        head and stacks do not show in it, nor do settings such as rounding, min_log_scale or levels (of head "logistic", 65536 by
        default there). The upsampling network of its local condition is left out: give conditions at the rate of the sound.
        """
        weights = {name: x for name, x in state_dict.items() if not name.startswith("upsample_net.")}
        for name in [name for name in weights if name.endswith(".weight_g")]:
            v = weights.pop(name[:-1] + "v")
            weights[name[:-2]] = v * (weights.pop(name) / v.flatten(1).norm(dim=1).view(-1, 1, 1))
        try:
            first, conv = weights["first_conv.weight"], weights["conv_layers.0.conv.weight"]
            out = weights["last_conv_layers.3.weight"].shape[0]
        except KeyError as error:
            raise ValueError(f"WaveNet: not a state dict of wavenet_vocoder: it has no {error.args[0]}") from None
        found = {
            "head": head, "stacks": stacks, "rounding": "floor", "residual": conv.shape[1], "gate": conv.shape[0],
            "kernel_size": conv.shape[2], "skip": weights["conv_layers.0.conv1x1_skip.weight"].shape[0],
            "layers": len({name.split(".")[1] for name in weights if name.startswith("conv_layers.")}),
        }  # fmt: skip
        found |= {"softmax": {"levels": first.shape[1]}, "logistic": {"levels": 65536, "mixtures": out // 3}}.get(head, {})
        if "embed_speakers.weight" in weights:
            found["classes"], found["class_width"] = weights["embed_speakers.weight"].shape
        if "conv_layers.0.conv1x1c.weight" in weights:
            found["condition"] = weights["conv_layers.0.conv1x1c.weight"].shape[1]
        model = cls(cls.Config(**{**found, **settings}))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"WaveNet: the state dict cannot be used: {' '.join(str(error).split())}") from error
        return model.eval()


class _Layer(nn.Module):
    def __init__(self, c, dilation):
        super().__init__()
        self.conv = CausalConv1d(c.residual, c.gate, c.kernel_size, dilation=dilation, activation="gated")
        self.conv1x1c = CausalConv1d(c.condition, c.gate, 1, bias=False) if c.condition else None
        self.conv1x1g = CausalConv1d(c.class_width, c.gate, 1, bias=False) if c.classes else None
        self.conv1x1_out = CausalConv1d(c.gate // 2, c.residual, 1)
        self.conv1x1_skip = CausalConv1d(c.gate // 2, c.skip, 1)
        self.dropout = c.dropout

    def forward(self, x, condition, g, through, joined):
        """(next x (N, residual, T), skip (N, skip, T)); through(convolution, input) and joined() are parallel passes or steps."""
        projected = [through(one, c) for one, c in ((self.conv1x1c, condition), (self.conv1x1g, g)) if one is not None]
        condition = sum(projected[1:], projected[0]) if projected else None
        z = through(self.conv, F.dropout(x, self.dropout, self.training), condition)
        out, skip = joined(self.conv1x1_out, self.conv1x1_skip, z)
        return (out + x) * math.sqrt(0.5), skip


def _joined(a, b):
    both = CausalConv1d(a.in_channels, a.out_channels + b.out_channels, 1).requires_grad_(False)
    both.weight.data, both.bias.data = torch.cat([a.weight, b.weight]), torch.cat([a.bias, b.bias])
    return both
