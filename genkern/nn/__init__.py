"""Layers: parameters and initialisation around genkern.ops, with the arguments and state_dict keys of their twins in torch.nn."""

from genkern.nn.causal_attention import CausalAttention2d
from genkern.nn.causal_conv import CausalConv1d
from genkern.nn.group_norm import GroupNormAct
from genkern.nn.masked_conv import MaskedConv2d

__all__ = ["CausalAttention2d", "CausalConv1d", "GroupNormAct", "MaskedConv2d"]
