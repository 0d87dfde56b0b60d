"""The masked convolution of CompressAI's context models, on genkern's kernel.

from genkern.integrations.compressai import MaskedConv2d  # in place of that of compressai.layers

model.context_prediction = MaskedConv2d.of(model.context_prediction)  # of a model that exists, such as a trained one
"""

import torch
from torch.nn.modules.utils import _pair

from genkern import nn


class MaskedConv2d(nn.MaskedConv2d):
    """compressai.layers.MaskedConv2d: the arguments of torch.nn.Conv2d and mask_type, the same state_dict, in which the mask is.

    Masked taps are skipped, not multiplied by zero. Their weights start at zero and stay there, and the buffer `mask` has the shape of
    weight, for the loops over pixels that multiply by it. ValueError for a size other than that of the input: a context model's
    convolution has stride, dilation and groups 1 and pads half its kernel.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        mask_type="A",
    ):
        super().__init__(in_channels, out_channels, kernel_size, mask_type=mask_type, bias=bias, device=device, dtype=dtype)
        given = (_pair(stride), _pair(dilation), groups, self.padding if padding == "same" else _pair(padding), padding_mode)
        if given != ((1, 1), (1, 1), 1, self.padding, "zeros"):
            raise ValueError(
                f"MaskedConv2d: needs stride, dilation and groups 1 and padding {self.padding} with zeros, got {stride}, {dilation}, "
                f"{groups} and {padding} with {padding_mode}"
            )
        height, width = self.kernel_size
        before = torch.arange(height * width, device=device) < height * width // 2 + (mask_type == "B")
        self.register_buffer("mask", before.view(height, width).expand(self.weight.shape).to(self.weight.dtype, copy=True))
        with torch.no_grad():
            self.weight.mul_(self.mask)

    @classmethod
    def of(cls, layer):
        """One with the weights of a layer of CompressAI."""
        height, width = layer.kernel_size
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        ours = cls(
            **{name: getattr(layer, name) for name in names},
            bias=layer.bias is not None,
            device=layer.weight.device,
            dtype=layer.weight.dtype,
            mask_type="B" if layer.mask[0, 0, height // 2, width // 2] else "A",
        )
        ours.load_state_dict(layer.state_dict())
        return ours.train(layer.training)
