"""UNet: the denoiser of a diffusion model for small images (Ho et al., 2020, with the adaptive norms of Dhariwal & Nichol, 2021).

Every norm is one group_norm_act: with its SiLU, with the scale and shift that time and class give, and on the way up on the
concatenation of a feature map and its skip connection, which is never written. A condition is a class, added to the embedding of the
time, or a sequence of tokens, to which every residual block's pixels attend (Rombach et al., 2022, section 3.3).
"""

import torch
import torch.nn.functional as F
from torch import nn

from genkern.nn import GroupNormAct
from genkern.ops import timestep_embedding

GROUPS = 8


class UNet(nn.Module):
    """forward(x, timesteps, labels): x (N, channels, size, size), timesteps (N,).

    labels: (N,), one class each, where `classes` stands for none; with `tokens` > 0 (N, up to tokens), where `classes` is padding.
    """

    def __init__(self, channels, width, levels, blocks, classes, heads, tokens=0):
        super().__init__()
        embedding = 4 * width
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.label = nn.Embedding(classes + 1, embedding) if classes and not tokens else None
        self.tokens = Tokens(classes, tokens, embedding) if tokens else None
        block = lambda c_in, c_skip, c_out: ResidualBlock(c_in, c_skip, c_out, embedding, heads if tokens else 0)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = width, [width]
        for level in range(levels):
            for _ in range(blocks):
                self.down.append(block(c, 0, width << level))
                c = width << level
                skips.append(c)
            if level + 1 < levels:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([block(c, 0, c), Attention(c, heads), block(c, 0, c)])
        for level in reversed(range(levels)):
            for _ in range(blocks + 1):
                self.up.append(block(c, skips.pop(), width << level))
                c = width << level
            if level:
                self.up.append(Upsample(c))
        self.norm = GroupNormAct(GROUPS, c)
        self.last = _zero(nn.Conv2d(c, channels, 3, padding=1))

    def forward(self, x, timesteps, labels=None):
        embedding = self.time(timestep_embedding(timesteps, self.width).to(x.dtype))
        if self.label is not None:
            embedding = embedding + self.label(labels)
        given = (F.silu(embedding), None if self.tokens is None else self.tokens(labels))
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, *given) if isinstance(layer, ResidualBlock) else layer(h)
            skips.append(h)
        before, attention, after = self.middle
        h = after(attention(before(h, *given)), *given)
        for layer in self.up:
            h = layer(h, *given, skips.pop()) if isinstance(layer, ResidualBlock) else layer(h)
        return self.last(self.norm(h))


class ResidualBlock(nn.Module):
    """(N, c_in, H, W) and, on the way up, a skip connection (N, c_skip, H, W) to (N, c_out, H, W); with heads, attention to tokens."""

    def __init__(self, c_in, c_skip, c_out, embedding, heads=0):
        super().__init__()
        self.norm1 = GroupNormAct(GROUPS, c_in + c_skip)
        self.conv1 = nn.Conv2d(c_in + c_skip, c_out, 3, padding=1)
        self.embed = nn.Linear(embedding, 2 * c_out)
        self.norm2 = GroupNormAct(GROUPS, c_out)
        self.conv2 = _zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Identity() if c_in == c_out and not c_skip else nn.Conv2d(c_in, c_out, 1)
        self.skip = nn.Conv2d(c_skip, c_out, 1, bias=False) if c_skip else None
        self.attention = CrossAttention(c_out, embedding, heads) if heads else None

    def forward(self, x, embedding, tokens=None, skip=None):
        h = self.conv1(self.norm1(x if skip is None else [x, skip]))
        scale, shift = self.embed(embedding).chunk(2, 1)
        h = self.shortcut(x) + self.conv2(self.norm2(h, scale=scale, shift=shift))
        h = h if skip is None else h + self.skip(skip)
        return h if self.attention is None else self.attention(h, *tokens)


class Tokens(nn.Module):
    """labels (N, L), L up to `length`, to (context (N, 1 + L, c), mask (N, 1, 1, 1 + L), false at padding).

    The first column is learned and always there: what the pixels attend to where all tokens are padding, as without a condition.
    """

    def __init__(self, vocabulary, length, c):
        super().__init__()
        self.padding = vocabulary
        self.token = nn.Embedding(vocabulary, c)
        self.place = nn.Embedding(length + 1, c)

    def forward(self, labels):
        kept = labels != self.padding
        context = self.token(labels.clamp_max(self.padding - 1)) + self.place.weight[1 : labels.shape[1] + 1]
        first = self.place.weight[:1].expand(len(labels), 1, -1)
        mask = torch.cat([torch.ones_like(kept[:, :1]), kept], 1) if labels.shape[1] else kept.new_ones(len(labels), 1)
        return torch.cat([first, context], 1), mask[:, None, None]


class CrossAttention(nn.Module):
    """Every pixel attends to the tokens that are no padding, added to the input."""

    def __init__(self, c, c_context, heads):
        super().__init__()
        self.heads = heads
        self.norm = GroupNormAct(GROUPS, c, activation=None)
        self.query = nn.Conv2d(c, c, 1)
        self.key_value = nn.Linear(c_context, 2 * c)
        self.out = _zero(nn.Conv2d(c, c, 1))

    def forward(self, x, context, mask):
        n, c, height, width = x.shape
        query = self.query(self.norm(x)).view(n, self.heads, c // self.heads, height * width).transpose(-1, -2)
        key, value = self.key_value(context).view(n, -1, 2, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)  # (n, heads, pixels, c / heads)
        return x + self.out(h.transpose(-1, -2).reshape(n, c, height, width))


class Attention(nn.Module):
    """Every pixel attends to every pixel, added to the input."""

    def __init__(self, c, heads):
        super().__init__()
        self.heads = heads
        self.norm = GroupNormAct(GROUPS, c, activation=None)
        self.qkv = nn.Conv2d(c, 3 * c, 1)
        self.out = _zero(nn.Conv2d(c, c, 1))

    def forward(self, x):
        n, c, height, width = x.shape
        qkv = self.qkv(self.norm(x)).view(n, 3, self.heads, c // self.heads, height * width).transpose(-1, -2)
        h = F.scaled_dot_product_attention(*qkv.unbind(1))  # (n, heads, pixels, c / heads)
        return x + self.out(h.transpose(-1, -2).reshape(n, c, height, width))


class Upsample(nn.Module):
    def __init__(self, c, c_out=None):
        super().__init__()
        self.conv = nn.Conv2d(c, c_out or c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _zero(layer):
    """Weights zero at the start, so that a block begins as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer
