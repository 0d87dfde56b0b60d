"""The spline of VITS in transformers on genkern's kernel.

    import genkern.integrations.vits as fused
    fused.patch()            # the duration predictor of every VitsModel, existing ones too
    fused.unpatch()

Or call fused.unconstrained_rational_quadratic_spline, with the arguments of the function in transformers.models.vits.modeling_vits.
"""

from transformers.models.vits import modeling_vits

from genkern.integrations._splines import patched, spline, unpatched

_original = modeling_vits._unconstrained_rational_quadratic_spline


def unconstrained_rational_quadratic_spline(
    inputs,
    unnormalized_widths,
    unnormalized_heights,
    unnormalized_derivatives,
    reverse=False,
    tail_bound=5.0,
    min_bin_width=1e-3,
    min_bin_height=1e-3,
    min_derivative=1e-3,
):
    """inputs (batch, channels, length), widths and heights (..., K), derivatives (..., K - 1): (outputs, log_abs_det) like inputs.
    Inputs that all lie outside the bound are left as they are, where the original fails on an empty selection."""
    minima = (min_bin_width, min_bin_height, min_derivative)
    for name, value in (("width", min_bin_width), ("height", min_bin_height)):
        if value * unnormalized_widths.shape[-1] > 1:
            raise ValueError(f"Minimal bin {name} {value} too large for the number of bins {unnormalized_widths.shape[-1]}")
    if min(minima) <= 0:
        return _original(inputs, unnormalized_widths, unnormalized_heights, unnormalized_derivatives, reverse, tail_bound, *minima)
    parameters = (unnormalized_widths, unnormalized_heights, unnormalized_derivatives)
    return spline(inputs, *parameters, reverse, "linear", tail_bound, minima)


def patch():
    patched("vits", [(modeling_vits, "_unconstrained_rational_quadratic_spline", unconstrained_rational_quadratic_spline)])


def unpatch():
    unpatched("vits")
