"""GPT: a decoder-only transformer over bytes (Radford et al., 2019): pre-norm blocks of causal attention and a GELU network."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern.models._base import Model, Training
from genkern.models.autoregressive._tokens import Tokens, check_text


@dataclass
class GPTConfig:
    vocabulary: int = 256
    context: int = 256  # the greatest length of a sequence
    width: int = 128
    layers: int = 4
    heads: int = 4
    dropout: float = 0.0


class GPT(Tokens, Model):
    """GPT(GPTConfig()): sequences (N, T) of at most `context` tokens, figures in nats.

    Learned positions, the embedding tied to the output, residual projections initialised smaller by sqrt(2 layers). Steps keep keys
    and values of every layer, so that a token costs one pass over the weights; they are written in place into the state.
    """

    Config = GPTConfig
    defaults = Training(learning_rate=1e-3, weight_decay=0.1, clip_grad_norm=1.0)

    @classmethod
    def config_for(cls, data, **settings):
        check_text(cls.__name__, data)
        return cls.Config(**{"context": data.shape[0], **settings})

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.width % c.heads:
            raise ValueError(f"GPT: width must be a multiple of heads, got {c.width} and {c.heads}")
        self.embedding = nn.Embedding(c.vocabulary + 1, c.width)  # the last one is the start symbol
        self.position = nn.Parameter(torch.empty(c.context, c.width))
        self.blocks = nn.ModuleList(_Block(c) for _ in range(c.layers))
        self.norm = nn.LayerNorm(c.width)
        nn.init.normal_(self.position, std=0.02)
        for name, weight in self.named_parameters():
            if name.endswith("weight") and weight.dim() == 2:
                residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * c.layers) ** 0.5 if residual else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def _run(self, tokens, state):
        """state: (tokens seen, keys and values (layers, 2, N, heads, context, width / heads)); caches only where gradients are off."""
        tokens = self._inputs(tokens, state)
        n, length = tokens.shape
        c = self.config
        seen, cache = state or (0, None)
        self._check_length(seen + length)
        if cache is None and not torch.is_grad_enabled():
            cache = self.position.new_empty(c.layers, 2, n, c.heads, c.context, c.width // c.heads)
        x = self.embedding(tokens) + self.position[seen : seen + length]
        x = F.dropout(x, c.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i], seen)
        return F.linear(self.norm(x), self.embedding.weight[:-1]), (seen + length, cache)

    def _check_length(self, length):
        if length > self.config.context:
            raise ValueError(f"GPT: sequences must hold at most context = {self.config.context} tokens, got {length}")


class _Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.dropout = c.heads, c.dropout
        self.attention_norm, self.norm = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.qkv = nn.Linear(c.width, 3 * c.width)
        self.attention_out = nn.Linear(c.width, c.width)
        self.up, self.down = nn.Linear(c.width, 4 * c.width), nn.Linear(4 * c.width, c.width)

    def forward(self, x, cache, seen):
        n, length, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mask = None
        if cache is not None:
            cache[0, :, :, seen : seen + length], cache[1, :, :, seen : seen + length] = k, v
            k, v = cache[:, :, :, : seen + length]
        if seen and length > 1:  # query i sees keys 0 .. seen + i
            mask = torch.ones(length, seen + length, dtype=torch.bool, device=x.device).tril(seen)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=not seen)
        mixed = mixed.transpose(1, 2).reshape(n, length, width)
        x = x + F.dropout(self.attention_out(mixed), self.dropout, self.training)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), self.dropout, self.training)
