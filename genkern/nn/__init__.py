"""Layers: parameters and initialisation around genkern.ops, with the arguments and state_dict keys of their twins in torch.nn."""

from genkern.nn.causal_attention import CausalAttention2d
from genkern.nn.causal_conv import CausalConv1d
from genkern.nn.flow_layers import (
    ActNorm,
    ActNormConv1x1,
    AdditiveCoupling,
    AffineCoupling,
    Flip,
    Inverse,
    InvertibleConv1x1,
    Permute,
    SplineCoupling,
    Squeeze,
)
from genkern.nn.group_norm import GroupNormAct
from genkern.nn.invertible_sequence import InvertibleSequence
from genkern.nn.masked_autoregressive import MADE, MaskedAutoregressive
from genkern.nn.masked_conv import MaskedConv2d

__all__ = [
    "MADE",
    "ActNorm",
    "ActNormConv1x1",
    "AdditiveCoupling",
    "AffineCoupling",
    "CausalAttention2d",
    "CausalConv1d",
    "Flip",
    "GroupNormAct",
    "Inverse",
    "InvertibleConv1x1",
    "InvertibleSequence",
    "MaskedAutoregressive",
    "MaskedConv2d",
    "Permute",
    "SplineCoupling",
    "Squeeze",
]
