"""masked_conv2d: a convolution over images that sees no pixel (and no colour) ahead in raster order."""

import torch
import torch.nn.functional as F

from genkern.ops._common import check_choice, check_device, check_float, check_shape, promoted


def masked_conv2d(x, weight, bias=None, *, mask_type, colors=1, layout="grouped"):
    """The masked convolution of PixelCNN (van den Oord, Kalchbrenner & Kavukcuoglu, 2016, section 3.4), of the size of x.

    An output pixel takes the rows above and the pixels to its left. Of its own pixel, type "A" takes the colours before its own
    and type "B" those and its own; with one colour "A" takes nothing and "B" takes it. Masked taps are skipped, not multiplied by
    zero: they cost nothing, and on the CPU an infinity or NaN in the future leaves the past bit for bit as it was.

    x           (N, C, H, W)
    weight      (C_out, C, K_h, K_w), odd sizes; what lies under the mask is ignored and has gradient zero
    bias        (C_out,) or None
    mask_type   "A" in the first layer of a model, "B" in those after it
    colors      3 orders R, G, B; C and C_out must be divisible by it
    layout      which channels are of one colour. "grouped": neighbours, C / colors of them; "interleaved": channel i is of colour
                i % colors

    float32, float64, bfloat16, float16; mixed types are promoted. Made of torch's convolutions over the live taps, so it runs on
    every device, follows autocast, and rounds the sums of its two or three parts to the result's type. On the CPU that is ahead of
    a convolution with a masked weight from 5x5 on with many channels, and behind it at 3x3 or with few. TypeError, ValueError on
    anything else. Differentiable to any order.
    """
    op = "masked_conv2d"
    check_float(op, "x", x, 4)
    check_float(op, "weight", weight, 4)
    check_device(op, "weight", weight, "x", x)
    check_channels(op, mask_type, colors, layout, x.shape[1], weight.shape[0])
    check_kernel(op, weight.shape[2:])
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight must have shape (C_out, {x.shape[1]}, K_h, K_w), got {tuple(weight.shape)}")
    if bias is not None:
        check_float(op, "bias", bias)
        check_shape(op, "bias", bias, weight.shape[:1], "(C_out,)")
        check_device(op, "bias", bias, "x", x)
    dtype = promoted(x, weight, bias)
    x, weight = x.to(dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    y = None
    for part, bias_left in _parts(x, weight, bias, mask_type, colors, layout):
        y, bias = part if y is None else y + part, bias_left
    if y is None:  # a 1x1 kernel of type A
        y = x.new_zeros(x.shape[0], weight.shape[0], *x.shape[2:])
    return y if bias is None else y + bias[:, None, None]


def check_channels(op, mask_type, colors, layout, channels, channels_out):
    check_choice(op, "mask_type", mask_type, ("A", "B"))
    check_choice(op, "layout", layout, ("grouped", "interleaved"))
    if isinstance(colors, bool) or not isinstance(colors, int) or colors < 1:
        raise ValueError(f"{op}: colors must be a positive integer, got {colors!r}")
    if channels % colors or channels_out % colors:
        raise ValueError(f"{op}: the channels must be divisible by colors {colors}, got {channels} in and {channels_out} out")


def check_kernel(op, size):
    if any(k % 2 == 0 for k in size):
        raise ValueError(f"{op}: the kernel sizes must be odd, got {tuple(size)}")


def _parts(x, weight, bias, mask_type, colors, layout):
    """The summands: rows above, the current row, and with colours the current pixel; each with the bias that it leaves to be added."""
    height, width = x.shape[2:]
    rows, columns = (k // 2 for k in weight.shape[2:])
    if rows and height > 1:  # the last row of x is above no other
        above = F.pad(x[:, :, : height - 1], (columns, columns, rows, 0))
        yield F.conv2d(above, weight[:, :, :rows].contiguous(), bias), None  # torch is slow on a strided weight
        bias = None
    row = weight[:, :, rows : rows + 1]
    if mask_type == "B" and colors == 1:
        yield F.conv2d(F.pad(x, (columns, 0)), row[..., : columns + 1].contiguous(), bias), None
        return
    if columns and width > 1:
        yield F.conv2d(F.pad(x[..., : width - 1], (columns, 0)), row[..., :columns].contiguous(), bias), None
        bias = None
    if colors > 1:
        yield _pixel(x, row[:, :, 0, columns], mask_type, colors, layout), bias


def _pixel(x, weight, mask_type, colors, layout):
    """The centre tap (C_out, C), one 1x1 convolution for each colour of the output over the colours that it may see."""
    n, _, height, width = x.shape
    grouped = layout == "grouped"
    dim = 1 if grouped else 2
    by_color = lambda channels: (colors, channels // colors) if grouped else (channels // colors, colors)
    x = x.reshape(n, *by_color(x.shape[1]), height, width)
    weight = weight.reshape(*by_color(weight.shape[0]), *by_color(weight.shape[1]))  # (out, out, in, in)
    outputs = []
    for color in range(colors):
        seen = color + (mask_type == "B")
        w = weight.select(dim - 1, color).narrow(dim, 0, seen).flatten(1)
        if seen == 0:
            outputs.append(x.new_zeros(n, w.shape[0], height, width))
        else:
            outputs.append(F.conv2d(x.narrow(dim, 0, seen).flatten(1, 2), w[:, :, None, None]))
    dtype = promoted(*outputs)
    return torch.stack([y.to(dtype) for y in outputs], dim).flatten(1, 2)
