"""masked_conv2d: a convolution over images that sees no pixel (and no colour) ahead in raster order."""

import functools
import math

import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_weight

from genkern.core import Op, implements
from genkern.core._backends import BACKENDS
from genkern.ops._common import check_choice, check_device, check_float, check_int, check_shape, in_working_type, promoted, working_type
from genkern.testing._case import Case


def masked_conv2d(x, weight, bias=None, *, mask_type, colors=1, layout="grouped"):
    """The masked convolution of PixelCNN (van den Oord, Kalchbrenner & Kavukcuoglu, 2016, section 3.4), of the size of x.

    An output pixel takes the rows above and the pixels to its left. Of its own pixel, type "A" takes the colours before its own
    and type "B" those and its own; with one colour "A" takes nothing and "B" takes it. Masked taps are skipped, not multiplied by
    zero: they cost nothing, and in the kernels an infinity or NaN in the future leaves the past bit for bit as it was.

    x           (N, C, H, W)
    weight      (C_out, C, K_h, K_w), odd sizes; what lies under the mask is ignored and has gradient zero
    bias        (C_out,) or None
    mask_type   "A" in the first layer of a model, "B" in those after it
    colors      3 orders R, G, B; C and C_out must be divisible by it
    layout      which channels are of one colour. "grouped": neighbours, C / colors of them; "interleaved": channel i is of colour
                i % colors

    float32, float64, bfloat16, float16; mixed types are promoted. On the CPU one direct convolution over the live taps, in float32
    (float64); an output's bits do not depend on the batch, the size of the image or the number of threads. On a GPU autocast's type is
    taken where it is on, and one matrix product over the live taps: float32 in full precision, never TF32; bfloat16 and float16
    summed in float32, on tensor cores by Triton's kernel, without them by that in C++. The gradient to weight there is torch's, with
    the precision and determinism of its convolutions. Where no kernel serves, two or three of torch's convolutions, each rounded to
    the result's type. TypeError, ValueError on anything else. Differentiable to any order.
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
    dtype, own, grouped = promoted(x, weight, bias), mask_type == "B", layout == "grouped"
    if x.device.type == "cpu":
        return _op(*in_working_type(x, weight, bias), own, colors, grouped).to(dtype)
    if dtype != torch.float64 and torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return _op(*(None if t is None else t.to(dtype) for t in (x, weight, bias)), own, colors, grouped)


def check_channels(op, mask_type, colors, layout, channels, channels_out):
    check_choice(op, "mask_type", mask_type, ("A", "B"))
    check_choice(op, "layout", layout, ("grouped", "interleaved"))
    check_int(op, "colors", colors)
    if channels % colors or channels_out % colors:
        raise ValueError(f"{op}: the channels must be divisible by colors {colors}, got {channels} in and {channels_out} out")


def check_kernel(op, size):
    if any(k % 2 == 0 for k in size):
        raise ValueError(f"{op}: the kernel sizes must be odd, got {tuple(size)}")


def _reference(x, weight, bias, own, colors, grouped):
    """torch's convolutions over the live taps."""
    y = None
    if 0 not in (*x.shape[1:], *weight.shape):  # torch's convolutions refuse what has no channel or no pixel
        for part, bias_left in _parts(x, weight, bias, own, colors, grouped):
            y, bias = part if y is None else y + part, bias_left
    if y is None:  # no tap is live: sums of nothing, which have gradients
        y = x[:, :0].sum(1, keepdim=True) + weight[:, :0].sum((1, 2, 3))[:, None, None]
    return y if bias is None else y + bias[:, None, None]


def _parts(x, weight, bias, own, colors, grouped):
    """The summands: rows above, the current row, and with colours the current pixel; each with the bias that it leaves to be added."""
    height, width = x.shape[2:]
    rows, columns = (k // 2 for k in weight.shape[2:])
    if rows and height > 1:  # the last row of x is above no other
        above = F.pad(x[:, :, : height - 1], (columns, columns, rows, 0))
        yield F.conv2d(above, weight[:, :, :rows].contiguous(), bias), None  # torch is slow on a strided weight
        bias = None
    row = weight[:, :, rows : rows + 1]
    if own and colors == 1:
        yield F.conv2d(F.pad(x, (columns, 0)), row[..., : columns + 1].contiguous(), bias), None
        return
    if columns and width > 1:
        yield F.conv2d(F.pad(x[..., : width - 1], (columns, 0)), row[..., :columns].contiguous(), bias), None
        bias = None
    if colors > 1:
        yield _pixel(x, row[:, :, 0, columns], own, colors, grouped), bias


def _pixel(x, weight, own, colors, grouped):
    """The centre tap (C_out, C), one 1x1 convolution for each colour of the output over the colours that it may see."""
    n, _, height, width = x.shape
    dim = 1 if grouped else 2
    by_color = lambda channels: (colors, channels // colors) if grouped else (channels // colors, colors)
    x = x.reshape(n, *by_color(x.shape[1]), height, width)
    weight = weight.reshape(*by_color(weight.shape[0]), *by_color(weight.shape[1]))  # (out, out, in, in)
    outputs = []
    for color in range(colors):
        seen = color + own
        w = weight.select(dim - 1, color).narrow(dim, 0, seen).flatten(1)
        if seen == 0:
            outputs.append(x.new_zeros(n, w.shape[0], height, width))
        else:
            outputs.append(F.conv2d(x.narrow(dim, 0, seen).flatten(1, 2), w[:, :, None, None]))
    dtype = promoted(*outputs)
    return torch.stack([y.to(dtype) for y in outputs], dim).flatten(1, 2)


def _backward(forward, grad, x, weight, bias, own, colors, grouped):
    """On a GPU. To x: the masked convolution of the gradient turned around, in space and in the order of its channels, for then the
    pixels and colours after one come before it. By the kernel: torch's convolution would multiply masked weights by zero.
    To weight: two of torch's, over the rows above and over the current row up to its pixel, since only what is summed over pixels is
    masked here, and that may be thrown away: a kernel of ours would skip no more, and to fill a GPU it had to cut the sums."""
    d_x = forward(grad.flip(1, 2, 3), weight.transpose(0, 1).flip(0, 1), None, own, colors, grouped).flip(1, 2, 3)
    d_weight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    rows, columns = (k // 2 for k in weight.shape[2:])
    if grad.numel() and weight.numel():
        gradient = lambda padded, part: part.copy_(conv2d_weight(padded, part.shape, grad.contiguous()))
        if rows and x.shape[2] > 1:
            gradient(F.pad(x[:, :, :-1], (columns, columns, rows, 0)), d_weight[:, :, :rows])
        gradient(F.pad(x, (columns, 0)), d_weight[:, :, rows : rows + 1, : columns + 1])
        d_weight[:, :, rows, columns].masked_fill_(~_sees(weight, own, colors, grouped), 0)
    if bias is None:
        return [d_x, d_weight]
    return [d_x, d_weight, grad.sum((0, 2, 3), dtype=working_type(grad)).to(bias.dtype)]


def _sees(weight, own, colors, grouped):
    """(C_out, C): whether the centre tap of an output takes an input."""
    of_output, of_input = (torch.arange(n, device=weight.device) for n in weight.shape[:2])
    color = lambda i: i // (len(i) // colors) if grouped else i % colors
    return color(of_input) < color(of_output)[:, None] + own


_op = Op(
    "masked_conv2d",
    "(Tensor x, Tensor weight, Tensor? bias, bool own, int colors, bool grouped) -> Tensor",
    reference=_reference,
    fake=lambda x, weight, bias, own, colors, grouped: x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:]),
    differentiable=("x", "weight", "bias"),
    first="triton",
)

for _backend in ("cuda", "triton", "emulated"):
    _forward = getattr(torch.ops, BACKENDS[_backend].namespace)._masked_conv2d
    implements(_backend, "masked_conv2d_backward")(functools.partial(_backward, _forward))


def _of_type_a(x, weight, bias=None, mask_type="A", colors=1, layout="grouped"):
    return masked_conv2d(x, weight, bias, mask_type=mask_type, colors=colors, layout=layout)


_of_type_a.__name__ = "masked_conv2d"


def _arguments(make, shape):
    """A shape is (N, C, H, W), or with the outputs and the size of the kernel (N, C, H, W, C_out, K)."""
    n, c, h, w, outputs, size = (*shape, shape[1], 3)[:6]
    return {"x": make((n, c, h, w)), "weight": make((outputs, c, size, size), (c * size * size) ** -0.5), "bias": make((outputs,))}


def _interleaved_row(make, shape):
    c = shape[1]
    return {"x": make(shape[:4]), "weight": make((c, c, 1, 5), (5 * c) ** -0.5), "layout": "interleaved"}


def _eager(x, weight, bias):
    """A convolution with the masked weight, type A, as it is usually written: the mask is kept in a buffer."""
    return F.conv2d(x, weight * _mask(weight.shape[2], weight.dtype), bias, padding=weight.shape[2] // 2)


_masks: dict = {}  # a layer's buffer


def _mask(size, dtype):
    if (size, dtype) not in _masks:
        _masks[size, dtype] = (torch.arange(size * size) < size * size // 2).view(size, size).to(dtype)
    return _masks[size, dtype]


CASES = (
    Case(
        _of_type_a,
        _arguments,
        forms=(_interleaved_row,),
        shapes=((2, 3, 5, 6), (1, 3, 1, 1), (0, 3, 2, 2), (1, 6, 3, 19)),
        small=(1, 3, 2, 2, 3, 1),
        large=(3, 12, 19, 23),
        variants=({}, {"mask_type": "B", "colors": 3}),
        eager=_eager,
        bytes=lambda shape, size: size * shape[0] * math.prod(shape[2:4]) * (shape[1] + shape[4]),
        bytes_backward=lambda shape, size: 2 * size * shape[0] * math.prod(shape[2:4]) * (shape[1] + shape[4]),
        bench_shapes=((16, 64, 28, 28, 64, 7), (16, 1, 28, 28, 64, 7), (1, 192, 16, 16, 384, 5), (16, 64, 16, 16, 64, 3)),
    ),
)
