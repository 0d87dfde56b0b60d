"""Layers over images in raster order, on whole maps or, with the same weights, on one row or one pixel at a time.

A layer takes (x, place). With place None x is a whole map (N, C, H, W). Else the layer is at a Place, x is what its input there has:
a row (N, C, 1, W) or a pixel (N, C), and the layer answers with its output there. It keeps of earlier rows and pixels what it will
look at again: a network that is run from pixel to pixel costs in all what one run over the whole map costs.
"""

import torch
import torch.nn.functional as F
from torch import nn

from genkern.nn import MaskedConv2d


class Place:
    """A pixel of a grid `width` pixels wide, and what the layers keep, by layer."""

    def __init__(self, width, row=0, column=0, kept=None):
        self.width, self.row, self.column, self.kept = width, row, column, {} if kept is None else kept

    def at(self, row, column):
        return Place(self.width, row, column, self.kept)

    def coarser(self):
        """The pixel of the grid of half the resolution that covers this one; None where another pixel was its first."""
        return None if self.row % 2 or self.column % 2 else Place(self.width // 2, self.row // 2, self.column // 2, self.kept)

    def window(self, layer, x, above, left, right):
        """Put x (N, C) here into the layer's input; what its kernel covers: (N, taps C), later pixels zero."""
        rows, row = self.kept.get(layer, (None, self.row))
        if rows is None:
            rows = x.new_zeros(len(x), above + 1, left + self.width + right, x.shape[1])
        if row != self.row:
            rows = torch.cat([rows[:, 1:], torch.zeros_like(rows[:, :1])], 1)
        self.kept[layer] = rows, self.row
        rows[:, -1, left + self.column] = x
        return rows[:, :, self.column : self.column + left + right + 1].flatten(1)

    def once(self, layer, make):
        """make(), kept for the layer: weights in another order."""
        name = (layer, "weights")
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]


def pointwise(conv, x):
    """A 1x1 convolution of a map or of a pixel (N, C)."""
    return F.linear(x, conv.weight.flatten(1), conv.bias) if x.dim() == 2 else conv(x)


def at_pixel(parameter):
    """(1, C, 1, 1) or (N, C, 1, 1), as it is added to maps, for a pixel: (N, C)."""
    return None if parameter is None else parameter.flatten(1)


class RasterConv(nn.Conv2d):
    """A convolution over its own row and `above` rows above, `left` and `right` columns beside; zeros beyond the edges.

    With right > 0 it is for maps whose row holds nothing of the same row of the image, and works on rows. With a stride of 2 the
    answer is None where the coarser grid has no pixel.
    """

    def __init__(self, channels, channels_out, above=0, left=0, right=0, stride=1):
        super().__init__(channels, channels_out, (above + 1, left + right + 1), stride)
        self.above, self.left, self.right = above, left, right

    def forward(self, x, place=None):
        step = self.stride[0]
        if place is None:
            return self._conv_forward(F.pad(x, (self.left, self.right, self.above, 0)), self.weight, self.bias)
        if x.dim() == 4:
            earlier = place.kept.get(self)
            rows = torch.cat([x.new_zeros(*x.shape[:2], self.above, x.shape[3]) if earlier is None else earlier, x], 2)
            place.kept[self] = rows[:, :, 1:]
            if place.row % step:
                return None
            return self._conv_forward(F.pad(rows, (self.left, self.right)), self.weight, self.bias)
        window = place.window(self, x, self.above, self.left, self.right)
        if place.row % step or place.column % step:
            return None
        return F.linear(window, place.once(self, lambda: self.weight.permute(0, 2, 3, 1).flatten(1).contiguous()), self.bias)


class Upsample(nn.ConvTranspose2d):
    """The transposed convolution (2, kernel_width) of stride 2 back to twice the resolution, the sides cut to fit.

    place is that of the finer grid; x None stands for a coarse pixel that was given before.
    """

    def __init__(self, channels, channels_out, kernel_width):
        super().__init__(channels, channels_out, (2, kernel_width), 2)

    def forward(self, x, place=None):
        if place is None:
            return self._map(x)
        if x is None:
            y = place.kept[self]
        elif x.dim() == 4:
            y = place.kept[self] = self._map(x)
        else:
            y = place.kept.get(self)
            if y is None:
                y = place.kept[self] = x.new_zeros(len(x), self.out_channels, 2, place.width)
            y[..., place.column : place.column + 2] = (x @ self.weight.flatten(1)).view(-1, self.out_channels, 2, 2) + self.bias[
                :, None, None
            ]
        row = place.row % 2
        return y[:, :, row : row + 1] if y is not None and self.kernel_size[1] == 3 else y[:, :, row, place.column]

    def _map(self, x):
        y = F.conv_transpose2d(x, self.weight, self.bias, 2)
        side = (self.kernel_size[1] - 1) // 2
        return y[..., side : side + 2 * x.shape[3]]


class RasterMasked(MaskedConv2d):
    """MaskedConv2d, at a Place too. Of type A it is for the image: x is the whole image in either case, as far as it is known."""

    def forward(self, x, place=None):
        if place is None:
            return super().forward(x)
        (above, side), size = self.padding, self.kernel_size
        if x.dim() == 4:
            padded = F.pad(x, (side, side, above, 0))
            window = padded[:, :, place.row : place.row + above + 1, place.column : place.column + size[1]]
            window = window.permute(0, 2, 3, 1).flatten(1)
        else:
            window = x if size == (1, 1) else place.window(self, x, above, side, side)
        weight = place.once(self, self._live)
        return F.linear(window[:, : weight.shape[1]], weight, self.bias)

    def _live(self):
        """The weights of the taps up to the centre in the order of a window, (C_out, taps C), the centre's colours masked."""
        out, channels, height, width = self.weight.shape
        taps = self.weight.permute(0, 2, 3, 1).flatten(1, 2)[:, : height // 2 * width + width // 2 + 1].clone()
        mine, seen = (self._color(n, self.weight.device) for n in (out, channels))
        allowed = mine[:, None] > seen if self.mask_type == "A" else mine[:, None] >= seen
        taps[:, -1] = torch.where(allowed, taps[:, -1], 0)
        return taps.flatten(1)

    def _color(self, channels, device):
        channel = torch.arange(channels, device=device)
        return channel * self.colors // channels if self.layout == "grouped" else channel % self.colors


def shifted_down(x):
    """Every row one further down, zeros above."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0))


def shifted_right(x):
    return F.pad(x[..., :-1], (1, 0))
