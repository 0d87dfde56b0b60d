"""gated_activation: the gate of WaveNet and of Gated PixelCNN."""

import math

import torch

from genkern.core import Op
from genkern.ops._common import check_choice, check_device, check_float, check_int, expanded, in_working_type, promoted, same_precision
from genkern.testing._case import Case


def gated_activation(x, condition=None, *, colors=1, layout="grouped"):
    """tanh(a) sigmoid(b), where a and b are the two halves of dimension 1 of x + condition (van den Oord et al., 2016: WaveNet,
    equation 2 and, with a condition, 3; Gated PixelCNN, equation 2 and 4).

    x           (N, 2C, ...), a first
    condition   None, or a tensor that broadcasts to the shape of x, such as (N, 2C, 1); added in the same pass
    colors      of masked convolutions whose channels belong to colours: C must be divisible by it
    layout      where a colour's channels are. "grouped": the channels of a colour are neighbours, in x those of its a before those
                of its b, so that the result is grouped again; "interleaved": channel i belongs to colour i % colors, and a is the
                first half of all channels

    float32, float64, bfloat16, float16, also mixed; computed in float32 (float64), returned in the promoted type with shape
    (N, C, ...). TypeError, ValueError on anything else. Differentiable to any order.
    """
    op = "gated_activation"
    check_float(op, "x", x)
    check_choice(op, "layout", layout, ("grouped", "interleaved"))
    check_int(op, "colors", colors)
    if x.dim() < 2 or x.shape[1] % (2 * colors):
        raise ValueError(f"{op}: x must have shape (N, 2C, ...) with C divisible by colors {colors}, got {tuple(x.shape)}")
    if condition is not None:
        check_float(op, "condition", condition)
        check_device(op, "condition", condition, "x", x)
        condition = expanded(op, "condition", condition, "x", x.shape)
    x, condition = same_precision((x, condition))
    if layout == "interleaved" or colors == 1:
        return _op(x, condition)
    by_color = (x.shape[0] * colors, x.shape[1] // colors, *x.shape[2:])
    y = _op(*(None if t is None else t.reshape(by_color) for t in (x, condition)))
    return y.reshape(x.shape[0], x.shape[1] // 2, *x.shape[2:])


def _reference(x, condition):
    dtype = promoted(x, condition)
    x, condition = in_working_type(x, condition)
    a, b = (x if condition is None else x + condition).chunk(2, 1)
    return (torch.tanh(a) * torch.sigmoid(b)).to(dtype)


_op = Op(
    "gated_activation",
    "(Tensor x, Tensor? condition) -> Tensor",
    reference=_reference,
    fake=lambda x, condition: x.new_empty((x.shape[0], x.shape[1] // 2, *x.shape[2:]), dtype=promoted(x, condition)),
    differentiable=("x", "condition"),
)


def _eager(x, condition):
    a, b = (x + condition).chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


def _arguments(make, shape):
    n, c, *rest = (*shape, 1)[:4] if len(shape) < 3 else shape
    return {"x": make((n, 2 * c, *rest)), "condition": make((n, 2 * c, *rest))}


def _without_condition(make, shape):
    return {"x": _arguments(make, shape)["x"]}


def _condition_of_samples(make, shape):
    x = _without_condition(make, shape)["x"]
    return {"x": x, "condition": make((*x.shape[:2], *[1] * (x.dim() - 2)))}


CASES = (
    Case(
        gated_activation,
        _arguments,
        forms=(_without_condition, _condition_of_samples),
        shapes=((2, 3, 35), (1, 3), (0, 3, 4), (2, 6, 3, 5)),
        small=(1, 3, 2),
        variants=({}, {"colors": 3}),
        large=(3, 3, 5003),
        eager=_eager,
        bytes=lambda shape, size: 5 * size * math.prod(shape),
        bytes_backward=lambda shape, size: 9 * size * math.prod(shape),
        bench_shapes=((8, 64, 1024), (16, 128, 28, 28), (1, 64, 1)),
    ),
)
