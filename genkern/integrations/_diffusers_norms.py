"""Group norm and SiLU of diffusers' UNets and autoencoders as one op: modules change their class in place, and back."""

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D

from genkern.ops import group_norm_act
from genkern.ops.diffusion._group_norm_act import _op, _out_op


def fuse_norms(model):
    """Give every residual block, and every pair of output norm and activation, the fused forward; returns how many there were."""
    count = 0
    for module in model.modules():
        if type(module) is ResnetBlock2D and _serves(module):
            module.__class__ = _ResnetBlock2D
            count += 1
        pair = module.__dict__.get("_modules", {})
        norm, act = pair.get("conv_norm_out"), pair.get("conv_act")
        if type(norm) is torch.nn.GroupNorm and type(act) is torch.nn.SiLU:
            norm.__class__, act.__class__ = _GroupNormSiLU, _AlreadyApplied
            count += 1
    return count


def unfuse_norms(model):
    for module in model.modules():
        module.__class__ = _ORIGINAL.get(type(module), type(module))


def _serves(block):
    """Plain group norms and SiLU; other kinds keep their own forward."""
    norms = type(block.norm1) is type(block.norm2) is torch.nn.GroupNorm
    return norms and type(block.nonlinearity) is torch.nn.SiLU and block.time_embedding_norm in ("default", "scale_shift")


def _norm_silu(norm, x, *, pre_bias=None, scale=None, shift=None, out=None):
    weight, shape = norm.weight, x.shape
    usual = weight is not None and weight.dtype == x.dtype and weight.device == x.device and x.is_contiguous() and x.dim() > 1
    for per_channel in (pre_bias, scale, shift):
        usual = usual and (per_channel is None or per_channel.shape == shape[:2])
    if not usual or torch.compiler.is_compiling():
        return group_norm_act(
            x, norm.num_groups, weight, norm.bias, eps=norm.eps, activation="silu", pre_bias=pre_bias, scale=scale, shift=shift, out=out
        )  # fmt: skip
    # What else group_norm_act would check holds by construction; in a small model the checks take more time than the norm.
    arguments = x, None, weight, norm.bias, pre_bias, scale, shift, norm.num_groups, norm.eps, True
    if out is None:
        return _op(*arguments)
    _out_op(*arguments, out)
    return out


class _ResnetBlock2D(ResnetBlock2D):
    """x + conv2(act(norm2(conv1(act(norm1(x))) + time))): the time embedding, or its scale and shift, inside the second norm."""

    def forward(self, input_tensor, temb, *args, **kwargs):
        if temb is not None and self.time_emb_proj is None:
            return super().forward(input_tensor, temb, *args, **kwargs)
        x, h = input_tensor, _norm_silu(self.norm1, input_tensor)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            x, h = resample(x.contiguous()), resample(h)
        h = self.conv1(h)
        conditions = {}
        if temb is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else F.silu(temb))
            if self.time_embedding_norm == "scale_shift":
                conditions["scale"], conditions["shift"] = temb.chunk(2, 1)
            else:
                conditions["pre_bias"] = temb
        elif self.time_embedding_norm == "scale_shift":
            raise ValueError("ResnetBlock2D: a scale and shift need the time embedding, got None")
        in_place = {} if torch.is_grad_enabled() or not h.is_contiguous() else {"out": h}  # the convolution's result is nobody else's
        h = _norm_silu(self.norm2, h, **conditions, **in_place)
        h = self.conv2(self.dropout(h) if self.training else h)
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x.contiguous())
        return x + h if self.output_scale_factor == 1 else (x + h) / self.output_scale_factor


class _GroupNormSiLU(torch.nn.GroupNorm):
    def forward(self, x):
        return _norm_silu(self, x)


class _AlreadyApplied(torch.nn.SiLU):
    def forward(self, x):
        return x


_ORIGINAL = {_ResnetBlock2D: ResnetBlock2D, _GroupNormSiLU: torch.nn.GroupNorm, _AlreadyApplied: torch.nn.SiLU}
for _fused, _own in _ORIGINAL.items():
    _fused.__name__ = _fused.__qualname__ = _own.__name__
