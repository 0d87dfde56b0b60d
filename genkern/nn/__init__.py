"""Layers: parameters and initialisation around the ops; arguments and state_dict keys are those of their twins in torch.nn."""

from genkern.nn.group_norm import GroupNormAct

__all__ = ["GroupNormAct"]
