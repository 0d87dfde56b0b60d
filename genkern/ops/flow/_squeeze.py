"""squeeze, unsqueeze: space into channels and back, for multi-scale flows. Their log-determinant is zero."""

from genkern.ops._common import check_choice, check_float, check_int

ORDERS = ("channel", "position")


def squeeze(x, factor=2, *, order="channel"):
    """(N, C, H, W) -> (N, C f^2, H / f, W / f): each f x f square becomes one pixel (RealNVP, Dinh et al., 2017, section 3.6).

    order   of the new channels: "channel": c f^2 + i f + j for row i and column j of the square, those of one old channel together,
            as torch's pixel_unshuffle, Glow and nflows; "position": (i f + j) C + c, those of one position together, so that
            halves of the channels are rows of the squares

    Any floating-point type. TypeError, ValueError on anything else. Differentiable to any order.
    """
    _check("squeeze", x, factor, order)
    if x.shape[2] % factor or x.shape[3] % factor:
        raise ValueError(f"squeeze: height and width must be divisible by {factor}, got shape {tuple(x.shape)}")
    n, c, h, w = x.shape
    squares = x.reshape(n, c, h // factor, factor, w // factor, factor)
    places = (0, 1, 3, 5, 2, 4) if order == "channel" else (0, 3, 5, 1, 2, 4)
    return squares.permute(places).reshape(n, c * factor**2, h // factor, w // factor)


def unsqueeze(x, factor=2, *, order="channel"):
    """(N, C f^2, H, W) -> (N, C, H f, W f): the inverse of squeeze, with the same arguments."""
    _check("unsqueeze", x, factor, order)
    if x.shape[1] % factor**2:
        raise ValueError(f"unsqueeze: the channels must be divisible by {factor**2}, got shape {tuple(x.shape)}")
    n, c, h, w = x.shape
    c //= factor**2
    if order == "channel":
        squares = x.reshape(n, c, factor, factor, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        squares = x.reshape(n, factor, factor, c, h, w).permute(0, 3, 4, 1, 5, 2)
    return squares.reshape(n, c, h * factor, w * factor)


def _check(op, x, factor, order):
    check_float(op, "x", x, 4)
    check_choice(op, "order", order, ORDERS)
    check_int(op, "factor", factor)
