"""GroupNormAct: torch.nn.GroupNorm with what follows it in diffusion models."""

import torch
from torch import nn

from genkern.ops import group_norm_act
from genkern.ops._common import check_choice


class GroupNormAct(nn.Module):
    """act((norm(x + pre_bias) * weight + bias) * (1 + scale) + shift); arguments and state_dict keys as torch.nn.GroupNorm.

    forward(x, *, pre_bias=None, scale=None, shift=None): x (N, num_channels, ...), or a list of two tensors that hold these channels
    together; the others (N, num_channels).
    """

    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, activation="silu", device=None, dtype=None):
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(f"GroupNormAct: num_groups must divide num_channels, got {num_groups} and {num_channels}")
        check_choice("GroupNormAct", "activation", activation, (None, "silu"))
        self.num_groups, self.num_channels, self.eps, self.affine, self.activation = num_groups, num_channels, eps, affine, activation
        self.weight = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype)) if affine else None
        self.reset_parameters()

    def reset_parameters(self):
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x, *, pre_bias=None, scale=None, shift=None):
        options = {"eps": self.eps, "pre_bias": pre_bias, "scale": scale, "shift": shift, "activation": self.activation}
        return group_norm_act(x, self.num_groups, self.weight, self.bias, **options)

    def extra_repr(self):
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, activation={self.activation!r}"
