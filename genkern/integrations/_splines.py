"""What the drop-ins for libraries of flows share: the functions of nflows' rational-quadratic spline on genkern's, and patching."""

import math

import torch

from genkern import ops

_PATCHED = {}  # library: [(object, name, what it was, None: inherited)]


def patched(library, changes):
    """Put [(object, name, new value)] in place; once, however often it is asked for."""
    if library not in _PATCHED:
        _PATCHED[library] = [(owner, name, vars(owner).get(name)) for owner, name, _ in changes]
        for owner, name, value in changes:
            setattr(owner, name, value)


def unpatched(library):
    for owner, name, value in _PATCHED.pop(library, ()):
        if value is None:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def spline(inputs, widths, heights, derivatives, inverse, tails, tail_bound, minima):
    """genkern.ops.rational_quadratic_spline with both results in the type of the inputs, as those libraries give them."""
    names = ("min_bin_width", "min_bin_height", "min_derivative")
    y, log_det = ops.rational_quadratic_spline(
        inputs,
        widths,
        heights,
        derivatives,
        inverse=inverse,
        tails=tails,
        tail_bound=tail_bound,
        **dict(zip(names, minima, strict=True)),
    )
    return y.to(inputs.dtype), log_det.to(inputs.dtype)


def unconstrained(original):
    """Their unconstrained_rational_quadratic_spline. What genkern's does not know (a tail per feature, tensors as bounds, minima of
    zero) goes to theirs."""

    def unconstrained_rational_quadratic_spline(
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse=False,
        tails="linear",
        tail_bound=1.0,
        min_bin_width=1e-3,
        min_bin_height=1e-3,
        min_derivative=1e-3,
    ):
        bins, minima = unnormalized_widths.shape[-1], (min_bin_width, min_bin_height, min_derivative)
        slopes = {"linear": bins - 1, "circular": bins}.get(tails if isinstance(tails, str) else None)
        tensors = (inputs, unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
        if not _served(*tensors, slopes, tail_bound, minima, bins) or (tails == "linear" and min_derivative >= 1):
            return original(*tensors, inverse=inverse, tails=tails, tail_bound=tail_bound, min_bin_width=min_bin_width,
                            min_bin_height=min_bin_height, min_derivative=min_derivative)  # fmt: skip
        return spline(*tensors, inverse, tails, tail_bound, minima)

    return unconstrained_rational_quadratic_spline


def constrained(original, outside=None):
    """Their rational_quadratic_spline on [left, right] x [bottom, top], where both are equally long; other domains go to theirs.

    outside: the error that an input outside raises, None where the library does not look.
    """

    def rational_quadratic_spline(
        inputs,
        unnormalized_widths,
        unnormalized_heights,
        unnormalized_derivatives,
        inverse=False,
        left=0.0,
        right=1.0,
        bottom=0.0,
        top=1.0,
        min_bin_width=1e-3,
        min_bin_height=1e-3,
        min_derivative=1e-3,
    ):
        bins, minima = unnormalized_widths.shape[-1], (min_bin_width, min_bin_height, min_derivative)
        tensors = (inputs, unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
        numbers = not any(isinstance(x, torch.Tensor) for x in (left, right, bottom, top))
        low, high = (bottom, top) if inverse and outside is None else (left, right)  # nflows looks at left and right both ways
        served = numbers and outside is not None and right - left == top - bottom
        if not served or not _served(*tensors, bins + 1, right - left, minima, bins):
            return original(*tensors, inverse=inverse, left=left, right=right, bottom=bottom, top=top, min_bin_width=min_bin_width,
                            min_bin_height=min_bin_height, min_derivative=min_derivative)  # fmt: skip
        if inputs.numel() and (inputs.min() < low or inputs.max() > high):
            raise outside()
        half, middle_x, middle_y = (right - left) / 2, (right + left) / 2, (top + bottom) / 2
        source, target = (middle_y, middle_x) if inverse else (middle_x, middle_y)
        y, log_det = spline((inputs - source).clamp(-half, half), *tensors[1:], inverse, None, half, minima)
        return y + target, log_det

    return rational_quadratic_spline


def _served(inputs, widths, heights, derivatives, slopes, bound, minima, bins):
    """Whether genkern's function takes these as they are; else the library's own says what is wrong, or knows what to do."""
    floats = all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in (inputs, widths, heights, derivatives))
    if not floats or not numbers_served(bins, bound, *minima):
        return False
    return widths.shape == heights.shape == (*inputs.shape, bins) and derivatives.shape == (*inputs.shape, slopes or -1)


def numbers_served(bins, bound, min_width, min_height, min_derivative):
    if isinstance(bound, torch.Tensor) or not 0 < bound < math.inf:
        return False
    return 0 < min_width * bins <= 1 and 0 < min_height * bins <= 1 and min_derivative > 0
