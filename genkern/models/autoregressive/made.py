"""MADE: one masked network for all the conditionals of an autoregressive model, in several orderings (Germain et al., 2015)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern import random
from genkern.models._base import Model, Output, Training, check_tensor
from genkern.ops import made_inverse, made_masks, masked_linear, sample_tokens


@dataclass
class MADEConfig:
    shape: tuple = (1, 8, 8)  # of one input: an image, or (features,)
    levels: int | None = None  # inputs are uint8 0 .. levels, 1 for binary ones; None: float inputs, each conditional a normal one
    hidden: tuple = (512, 512)
    orderings: int = 4
    dropout: float = 0.0


class MADE(Model):
    """p(x) = product over d of p(x_d | the x before it in an ordering), all D factors by one pass of a masked network; of several
    orderings the mean: p(x) = (1 / K) sum over k of p_k(x), which sums to one as each of them does.

    Hidden unit j of degree m_j sees inputs whose place in the ordering is at most m_j, an output those of lower place than its own. The
    first ordering is that of the memory, others are random; all share the weights. Training takes one ordering per batch; sampling
    takes one per sample and computes each hidden unit once (genkern.ops.made_inverse): about the cost of one pass, not of D.
    """

    Config = MADEConfig
    defaults = Training(epochs=60, learning_rate=1e-3, schedule="cosine")

    @classmethod
    def config_for(cls, data, **settings):
        if len(data.shape) == 2:
            raise ValueError(f"{cls.__name__}: needs images or points, got {data.name} of shape {tuple(data.shape)}")
        return cls.Config(**{"shape": tuple(data.shape), "levels": data.levels, **settings})

    def __init__(self, config):
        super().__init__(config)
        c = config
        inputs = math.prod(c.shape)
        if inputs < 1 or not c.hidden or c.orderings < 1:
            raise ValueError(f"MADE: needs inputs, a hidden layer and an ordering, got {c}")
        self.per_input = 2 if c.levels is None else c.levels + 1  # mean and log scale, or logits
        sizes = [inputs, *c.hidden, inputs * self.per_input]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        degrees = [1 + torch.arange(width) * max(1, inputs - 1) // width for width in c.hidden]  # 1 .. D - 1, evenly
        keys, self.degrees = random.split(random.key(2015), c.orderings), []
        for k in range(c.orderings):
            order = torch.arange(inputs) if k == 0 else torch.argsort(random.bits(keys[k], (inputs,), dtype=torch.int64))
            self.degrees.append([order.argsort() + 1, *degrees])
            for i, mask in enumerate(made_masks(self.degrees[k], self.per_input, layout="interleaved")):
                self.register_buffer(f"mask_{k}_{i}", mask, persistent=False)

    def forward(self, batch, *, key):
        """.loss: -log p per input dimension, the mean over the batch, nats; .parts: nll, the same.

        key: in training it chooses the ordering of the batch.
        """
        if self.training:
            ordering = int(key.flatten()[0].remainder(self.config.orderings))
            log_prob = self._log_prob_in(self._checked(batch), ordering)
        else:
            log_prob = self.log_prob(batch)
        nll = -log_prob.mean() / math.prod(self.config.shape)
        return Output(nll, {"nll": nll.detach()})

    def log_prob(self, batch, *, key=None):
        """log p(x), nats per sample: (N,), exact. With gradients."""
        x = self._checked(batch)
        of_each = torch.stack([self._log_prob_in(x, k) for k in range(self.config.orderings)])
        return of_each.logsumexp(0) - math.log(self.config.orderings)

    def bits_per_dim(self, batch, *, key=None):
        """-log2 p(x) per input dimension, (N,); NaN for float inputs, whose p is a density."""
        self._checked(batch)
        if self.config.levels is None:
            return batch.new_full((len(batch),), float("nan"))
        return -self.log_prob(batch) / (math.prod(self.config.shape) * math.log(2))

    @torch.no_grad()
    def sample(self, n, *, temperature=1.0, key=None, generator=None, batch_size=256):
        """n samples like the data, uint8 0 .. levels or float, each with a key of its own, which also chooses its ordering."""
        keys, c = self.sample_keys(n, key, generator, batch_size), self.config
        ordering = random.bits(random.fold_in(keys, 0), (n, 1), dtype=torch.int64)[:, 0].remainder(c.orderings)
        dtype = self.layers[0].weight.dtype
        result = keys.new_empty(n, *c.shape, dtype=dtype if c.levels is None else torch.uint8)
        for k in range(c.orderings):
            for some in (ordering == k).nonzero()[:, 0].split(batch_size):
                x, _ = made_inverse(
                    lambda d, params, some=some: self._draw(params, random.fold_in(keys[some], d + 1), temperature),
                    len(some),
                    [(layer.weight, layer.bias) for layer in self.layers],
                    [degree.to(keys.device) for degree in self.degrees[k]],
                    layout="interleaved",
                )
                if c.levels is not None:
                    x = ((x + 1) * (c.levels / 2)).round().to(torch.uint8)
                result[some] = x.view(-1, *c.shape)
        return result

    def _draw(self, params, key, temperature):
        """x (N,), as the network takes it, from params (N, P)."""
        levels = self.config.levels
        if levels is None:
            noise = random.normal(key, (len(params), 1), dtype=params.dtype, device=params.device)[:, 0]
            return params[:, 0] + temperature * torch.exp(params[:, 1]) * noise
        return sample_tokens(params.contiguous(), temperature=temperature, key=key).to(params.dtype) * (2 / levels) - 1

    def _log_prob_in(self, x, ordering):
        """log p of x (N, D), checked, in one ordering."""
        levels = self.config.levels
        h = x.to(self.layers[0].weight.dtype)
        h = h if levels is None else h * (2 / levels) - 1
        for i, layer in enumerate(self.layers):
            if i:
                h = F.dropout(F.relu(h), self.config.dropout, self.training)
            h = masked_linear(h, layer.weight, getattr(self, f"mask_{ordering}_{i}"), layer.bias)
        params = h.view(*x.shape, self.per_input).float()
        if levels is not None:
            return -F.cross_entropy(params.transpose(1, 2), x.long(), reduction="none").sum(1)
        mean, log_scale = params.unbind(2)
        nll = 0.5 * ((x - mean) * torch.exp(-log_scale)) ** 2 + log_scale + 0.5 * math.log(2 * math.pi)
        return -nll.sum(1)

    def _checked(self, x):
        c = self.config
        check_tensor("MADE", x)
        if tuple(x.shape[1:]) != tuple(c.shape):
            raise ValueError(f"MADE: inputs must be (N, {', '.join(map(str, c.shape))}), got {tuple(x.shape)}")
        if c.levels is None and not x.is_floating_point() or c.levels is not None and x.dtype != torch.uint8:
            expected = "float" if c.levels is None else f"uint8 in 0..{c.levels}"
            raise TypeError(f"MADE: inputs must be {expected}, got {x.dtype}")
        if c.levels is not None and x.device.type == "cpu" and not torch.compiler.is_compiling() and (x > c.levels).any():
            raise ValueError(f"MADE: inputs must be in 0..{c.levels}, found {int(x.max())}")
        return x.flatten(1)
