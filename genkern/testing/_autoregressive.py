"""assert_autoregressive: an output depends on nothing at or after its own position."""

import torch

from genkern.ops._common import check_choice


def assert_autoregressive(
    function, x, *, order="time", strict=True, colors=1, layout="grouped", dim=-1, output_dim=-1, poison=True, cuts=24, seed=0
):
    """Raise AssertionError unless function(x) looks at no position ahead, nor (strict) at its own.

    Inputs from a position on are replaced by random values, by NaN and by infinities, for up to `cuts` positions spread over all;
    the outputs that must not see them have to stay as they are, bit for bit. A function that ignores x altogether fails too.

    function    a module or function of x that returns a tensor
    x           an example; integers (tokens) are replaced by other values among those of x, each by another than its own, and not
                poisoned
    order       "time": positions count dimension `dim` of x and `output_dim` of the output, which have one length; "raster": the
                pixels of images (N, C, H, W), row by row, and within a pixel the colours
    strict      True: an output sees the positions before its own, as a whole model or a layer of type A; False: its own as well, as
                a causal convolution or a layer of type B
    colors, layout
                of the channels of images, in x and in the output, as in genkern.ops.masked_conv2d
    poison      False: finite values alone; masks that multiply by zero are caught by NaN and infinities only
    """
    check_choice("assert_autoregressive", "order", order, ("time", "raster"))
    check_choice("assert_autoregressive", "layout", layout, ("grouped", "interleaved"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        expected = function(x)
        if not isinstance(expected, torch.Tensor):
            raise TypeError(f"assert_autoregressive: function must return a tensor, got {type(expected).__name__}")
        if not _same(function(x), expected).all():
            raise AssertionError("two calls with the same input differ: is dropout on?")
        position = _positions(x, order, colors, layout, dim)
        output_position = _positions(expected, order, colors, layout, output_dim)
        count = int(position.max()) + 1
        if count != int(output_position.max()) + 1:
            raise AssertionError(f"the input has {count} positions, the output {int(output_position.max()) + 1}")
        random = _other_values(x, generator)
        if torch.equal(function(random), expected):
            raise AssertionError("the output does not depend on the input")
        values = {"other values": random}
        if poison and x.is_floating_point():
            values |= {name: torch.full_like(x, float(name)) for name in ("nan", "inf", "-inf")}
        first = 0 if strict else 1
        for cut in sorted({first + i * (count - first) // cuts for i in range(cuts)} | {count - 1}):
            past = output_position <= cut if strict else output_position < cut
            for name, value in values.items():
                got = function(torch.where(position >= cut, value, x))
                changed = past & ~_same(got, expected)
                if changed.any():
                    where = changed.nonzero()[0].tolist()
                    raise AssertionError(
                        f"not autoregressive: output {where}, at position {int(output_position.expand_as(got)[tuple(where)])} of the "
                        f"order, changes when the inputs from position {cut} on become {name}"
                    )


def _positions(tensor, order, colors, layout, dim):
    """The place in the order of every element, as a tensor that broadcasts against it."""
    if order == "time":
        shape = [1] * tensor.dim()
        shape[dim] = tensor.shape[dim]
        return torch.arange(tensor.shape[dim], device=tensor.device).reshape(shape)
    if tensor.dim() != 4:
        raise ValueError(f"assert_autoregressive: order 'raster' is of images (N, C, H, W), got {tuple(tensor.shape)}")
    _, channels, height, width = tensor.shape
    if channels % colors:
        raise AssertionError(f"the channels must be divisible by colors {colors}, got {channels}")
    channel = torch.arange(channels, device=tensor.device)
    color = channel * colors // channels if layout == "grouped" else channel % colors
    pixel = torch.arange(height * width, device=tensor.device).reshape(height, width)
    return (pixel * colors + color[:, None, None])[None]


def _other_values(x, generator):
    if x.is_floating_point():
        return torch.randn(x.shape, generator=generator).to(x)
    values, index = x.unique(return_inverse=True)
    step = torch.randint(1, max(2, len(values)), x.shape, generator=generator).to(x.device)
    return values[(index + step) % len(values)]


def _same(got, expected):
    """Where both are equal, or NaN."""
    return (got == expected) | (got.isnan() & expected.isnan())
