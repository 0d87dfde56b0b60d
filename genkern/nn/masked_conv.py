"""MaskedConv2d: torch.nn.Conv2d that sees no pixel and no colour ahead."""

import torch

from genkern import ops
from genkern.ops.autoregressive._masked_conv2d import check_channels, check_kernel


class MaskedConv2d(torch.nn.Conv2d):
    """The masked convolution of PixelCNN, of the size of its input: genkern.ops.masked_conv2d, where mask_type, colors and layout are
    described. Keys and shapes of the state_dict, and the initialisation, are those of torch.nn.Conv2d.
    """

    def __init__(
        self, in_channels, out_channels, kernel_size, *, mask_type, colors=1, layout="grouped", bias=True, device=None, dtype=None
    ):
        check_channels("MaskedConv2d", mask_type, colors, layout, in_channels, out_channels)
        size = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        check_kernel("MaskedConv2d", size)
        super().__init__(in_channels, out_channels, size, padding=tuple(k // 2 for k in size), bias=bias, device=device, dtype=dtype)
        self.mask_type, self.colors, self.layout = mask_type, colors, layout

    def forward(self, input):
        return ops.masked_conv2d(input, self.weight, self.bias, mask_type=self.mask_type, colors=self.colors, layout=self.layout)

    def extra_repr(self):
        return f"{super().extra_repr()}, mask_type={self.mask_type!r}, colors={self.colors}, layout={self.layout!r}"
