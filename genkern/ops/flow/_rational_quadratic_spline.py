"""rational_quadratic_spline: the monotonic spline of neural spline flows, from raw network outputs, with its log-determinant."""

import contextlib
import math

import torch
import torch.nn.functional as F

from genkern.core import Op
from genkern.core._op import transforming
from genkern.ops._common import (
    check_choice,
    check_float,
    check_like,
    check_number,
    in_working_type,
    promoted,
    same_precision,
    working_type,
)
from genkern.testing._case import Case

TAILS = (None, "linear", "circular")  # positions are the numbers of the raw op
_NAME = "rational_quadratic_spline"


def rational_quadratic_spline(
    x,
    widths,
    heights,
    derivatives,
    *,
    inverse=False,
    tails="linear",
    tail_bound=1.0,
    min_bin_width=1e-3,
    min_bin_height=1e-3,
    min_derivative=1e-3,
    log_det="element",
):
    """(y, log_det): each element of x through a monotonic rational-quadratic spline of its own on [-tail_bound, tail_bound]
    (Durkan et al., Neural Spline Flows, 2019, equations 4-8), and log |dy/dx|.

    The K bins have widths 2 tail_bound (min_bin_width + (1 - K min_bin_width) softmax(widths)), heights likewise, and slopes
    min_derivative + softplus(derivatives) at the knots: the parameters are the network's raw outputs, laid out as in nflows. Slices
    of one tensor, params.split([K, K, K - 1], -1), are read in place.

    x               (...), any shape
    widths, heights (..., K)
    derivatives     (..., K - 1) for tails="linear", (..., K) for "circular", (..., K + 1) for None
    inverse         the inverse function, and its log-determinant
    tails           outside the interval: "linear": y = x with slope 1, also at the two end knots; "circular": y = x, and the first
                    and last knot share one slope; None: no x lies outside (a ValueError on the CPU; NaN on a GPU and under
                    torch.compile and torch.func). The ends of the interval belong to it and map to themselves exactly
    tail_bound      half the interval
    min_bin_width, min_bin_height
                    smallest bins, in (0, 1 / K], as parts of the interval
    min_derivative  smallest slope, above 0
    log_det         "element": the shape of x; "sample": (N,), summed over all but dimension 0

    float32, float64, bfloat16, float16, also mixed; computed in float32 with knots in float64, or all in float64. y has the promoted
    type, log_det is float32 (float64 if an input is). TypeError, ValueError on anything else. Differentiable to any order; the
    backward pass starts from the inputs, nothing else is kept. A NaN in x makes that element of y and log_det NaN.
    """
    _check(x, widths, heights, derivatives, tails, tail_bound, min_bin_width, min_bin_height, min_derivative, log_det)
    if tails is None and x.device.type == "cpu" and not (torch.compiler.is_compiling() or transforming()):
        outside = x.detach().abs() > tail_bound
        if outside.any():
            raise ValueError(
                f"{_NAME}: without tails, x must lie in [-{tail_bound}, {tail_bound}], got {x.detach()[outside][0].item()}"
            )
    tensors = same_precision((x, widths, heights, derivatives))
    numbers = (float(tail_bound), float(min_bin_width), float(min_bin_height), float(min_derivative))
    y, log_slope = _op(*tensors, inverse, TAILS.index(tails), *numbers)
    return y, log_slope.flatten(1).sum(1) if log_det == "sample" else log_slope


def _check(x, widths, heights, derivatives, tails, tail_bound, min_bin_width, min_bin_height, min_derivative, log_det):
    check_float(_NAME, "x", x)
    check_float(_NAME, "widths", widths)
    check_choice(_NAME, "tails", tails, TAILS)
    check_choice(_NAME, "log_det", log_det, ("element", "sample"))
    if log_det == "sample" and x.dim() < 1:
        raise ValueError(f'{_NAME}: log_det="sample" needs x with a dimension of samples, got shape ()')
    if widths.shape[:-1] != x.shape or widths.dim() != x.dim() + 1 or widths.shape[-1] == 0:
        raise ValueError(f"{_NAME}: widths must have shape (*x.shape, bins), got {tuple(widths.shape)} for x {tuple(x.shape)}")
    check_like(_NAME, "heights", heights, "widths", widths)
    check_float(_NAME, "derivatives", derivatives)
    bins = widths.shape[-1]
    slopes = bins + {None: 1, "linear": -1, "circular": 0}[tails]
    if derivatives.shape != (*x.shape, slopes):
        got = tuple(derivatives.shape)
        raise ValueError(f"{_NAME}: derivatives must have shape {(*x.shape, slopes)} with {bins} bins and tails={tails!r}, got {got}")
    for name, tensor in (("widths", widths), ("derivatives", derivatives)):
        if tensor.device != x.device:
            raise ValueError(f"{_NAME}: {name} must be on the device of x, got {x.device} and {tensor.device}")
    _check_numbers(_NAME, bins, tails, tail_bound, min_bin_width, min_bin_height, min_derivative)


def _check_numbers(op, bins, tails, tail_bound, min_bin_width, min_bin_height, min_derivative):
    sizes = ("min_bin_width", min_bin_width), ("min_bin_height", min_bin_height)
    slopes_and_bound = ("tail_bound", tail_bound), ("min_derivative", min_derivative)
    for name, value in (*sizes, *slopes_and_bound):
        check_number(op, name, value)
    for name, value in slopes_and_bound:
        if not (0 < value < math.inf):
            raise ValueError(f"{op}: {name} must be positive and finite, got {value}")
    for name, value in sizes:
        if not 0 < value * bins <= 1:
            raise ValueError(f"{op}: {name} must lie in (0, 1 / bins], got {value} with {bins} bins")
    if tails == "linear" and min_derivative >= 1:
        raise ValueError(f"{op}: min_derivative must be below 1, the slope of the linear tails, got {min_derivative}")


def _bins(raw, min_size, bound):
    """(sizes, left ends) of the bins along an axis."""
    sizes = 2 * bound * (min_size + (1 - min_size * raw.shape[-1]) * raw.softmax(-1))
    return sizes, F.pad(sizes.cumsum(-1)[..., :-1], (1, 0)) - bound


def _fraction(x, start, size):
    """How far x is through its bin, in [0, 1] in spite of rounding, with the derivatives of the exact value."""
    t = (x - start) / size
    return t + (t.clamp(0, 1) - t).detach()


def _reference(x, widths, heights, derivatives, inverse, tails, bound, min_width, min_height, min_derivative):
    dtype = promoted(x, widths, heights, derivatives)
    x, widths, heights, derivatives = in_working_type(x, widths, heights, derivatives)
    width, left = _bins(widths, min_width, bound)
    height, lower = _bins(heights, min_height, bound)
    slopes = min_derivative + torch.logaddexp(derivatives, torch.zeros_like(derivatives))
    if TAILS[tails] == "linear":
        slopes = F.pad(slopes, (1, 1), value=1.0)
    elif TAILS[tails] == "circular":
        slopes = torch.cat([slopes, slopes[..., :1]], -1)
    inside = (x >= -bound) & (x <= bound)
    z = torch.where(inside, x, torch.zeros_like(x))
    bin = (z.unsqueeze(-1) >= (lower if inverse else left)[..., 1:]).sum(-1, keepdim=True)
    width, left, height, lower, d0 = (a.gather(-1, bin).squeeze(-1) for a in (width, left, height, lower, slopes))
    d1 = slopes.gather(-1, bin + 1).squeeze(-1)
    s = height / width
    if inverse:
        v = _fraction(z, lower, height)
        q, product = d0 * (1 - v) - d1 * v, 4 * s * s * v * (1 - v)  # the discriminant is q^2 + product
        root = torch.sqrt(q * q + product)
        g = torch.where(q < 0, product / (root + q.abs()), q + root)
        t, u = 2 * s * v / (2 * s * v + g), g / (2 * s * v + g)
    else:
        t = _fraction(z, left, width)
        u = 1 - t
    n, d = d1 * t * t + 2 * s * t * u + d0 * u * u, s * (t * t + u * u) + (d0 + d1) * t * u
    log_det = torch.log(s * s * n / (d * d)) * (-1 if inverse else 1)
    y = left + width * t if inverse else lower + height * (s * t * t + d0 * t * u) / d
    y = torch.where(z.abs() == bound, y + (z - y).detach(), y)
    edge = torch.full_like(x, math.nan) if TAILS[tails] is None else x
    y = torch.where(inside, y, edge)
    log_det = torch.where(inside, log_det, torch.where(edge.isnan(), edge, torch.zeros_like(x)).detach())
    return y.to(dtype), log_det


def _fake(x, widths, heights, derivatives, *_):
    tensors = x, widths, heights, derivatives
    return x.new_empty(x.shape, dtype=promoted(*tensors)), x.new_empty(x.shape, dtype=working_type(*tensors))


_op = Op(
    _NAME,
    "(Tensor x, Tensor widths, Tensor heights, Tensor derivatives, bool inverse, int tails, float bound, float min_width, "
    "float min_height, float min_derivative) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
    differentiable=("x", "widths", "heights", "derivatives"),
)


def _eager(x, widths, heights, derivatives, inverse=False):
    """As people write it: boolean indexing, searchsorted, gather."""
    y, log_det = x.clone(), torch.zeros_like(x)
    inside = x.abs() <= 1.0
    z, derivatives = x[inside], F.pad(derivatives, (1, 1), value=math.log(math.expm1(1 - 1e-3)))
    (w, left), (h, lower) = (_bins(raw[inside], 1e-3, 1.0) for raw in (widths, heights))
    slopes = 1e-3 + F.softplus(derivatives[inside])
    bin = torch.searchsorted((lower if inverse else left).detach(), z.detach().unsqueeze(-1), right=True) - 1
    w, left, h, lower, d0 = (a.gather(-1, bin).squeeze(-1) for a in (w, left, h, lower, slopes))
    d1 = slopes.gather(-1, bin + 1).squeeze(-1)
    s = h / w
    if inverse:
        curved = (z - lower) * (d0 + d1 - 2 * s)
        b, c = h * d0 - curved, -s * (z - lower)
        t = 2 * c / (-b - torch.sqrt(b * b - 4 * (h * (s - d0) + curved) * c))
    else:
        t = (z - left) / w
    d = s + (d0 + d1 - 2 * s) * t * (1 - t)
    y[inside] = left + w * t if inverse else lower + h * (s * t * t + d0 * t * (1 - t)) / d
    log_slope = torch.log(s * s * (d1 * t * t + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2)) - 2 * torch.log(d)
    log_det[inside] = -log_slope if inverse else log_slope
    return y, log_det


def _peers():
    """nflows with the arguments of the case; zuko, whose bins have no smallest size: the same work, other values."""
    peers = {}
    with contextlib.suppress(ImportError):
        from nflows.transforms.splines import unconstrained_rational_quadratic_spline

        peers["nflows"] = lambda *, inverse=False, **tensors: unconstrained_rational_quadratic_spline(
            *tensors.values(), inverse=inverse, tail_bound=1.0
        )
    with contextlib.suppress(ImportError):
        from zuko.transforms import MonotonicRQSTransform

        def zuko(x, inverse=False, **params):
            transform = MonotonicRQSTransform(*params.values(), bound=1.0)
            return (transform.inv if inverse else transform).call_and_ladj(x)

        peers["zuko"] = zuko
    return peers


def _arguments(make, shape, bins=8):
    params = {"widths": make((*shape, bins)), "heights": make((*shape, bins)), "derivatives": make((*shape, bins - 1))}
    return {"x": make(shape)} | params


def _slices_of_one(make, shape):
    widths, heights, derivatives = make((*shape, 15)).split(5, -1)
    return {"x": make(shape), "widths": widths, "heights": heights, "derivatives": derivatives, "tails": "circular"}


def _no_tails(make, shape):
    return _arguments(make, shape, 3) | {"x": make(shape).tanh(), "derivatives": make((*shape, 4)), "tails": None}


CASES = (
    Case(
        rational_quadratic_spline,
        _arguments,
        forms=(_slices_of_one, _no_tails),
        shapes=((5, 7), (1, 1), (0, 4), (2, 3, 5), (3, 37)),
        large=(3, 1031),
        # float64: in tests/flow, against long double. In narrow bins two results in double differ by more than the common rule allows.
        dtypes=(torch.float32, torch.bfloat16, torch.float16),
        variants=({}, {"inverse": True}, {"tail_bound": 3.0, "log_det": "sample"}),
        eager=_eager,
        peers=_peers,
        bytes=lambda shape, size: (23 + 3) * size * math.prod(shape),
        bytes_backward=lambda shape, size: (2 * 23 + 4) * size * math.prod(shape),
        bench_shapes=((64, 8), (1024, 8), (4096, 16)),
        bench_modes={"inverse": {"inverse": True}},
    ),
)
