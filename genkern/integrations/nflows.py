"""nflows on genkern's kernels: rational-quadratic splines and affine couplings.

    import genkern.integrations.nflows as fused
    fused.patch()        # every nflows spline and affine coupling, existing models too
    fused.unpatch()

Or call fused.rational_quadratic_spline and fused.unconstrained_rational_quadratic_spline, with the names, arguments, errors and
conventions of nflows.transforms.splines. Cubic, quadratic and linear splines stay nflows' own.
"""

from nflows import transforms
from nflows.transforms import splines
from nflows.transforms.splines import rational_quadratic

from genkern import ops
from genkern.integrations._splines import constrained, patched, unconstrained, unpatched

rational_quadratic_spline = constrained(rational_quadratic.rational_quadratic_spline, transforms.base.InputOutsideDomain)
unconstrained_rational_quadratic_spline = unconstrained(rational_quadratic.unconstrained_rational_quadratic_spline)


def patch():
    changes = [
        (module, function.__name__, function)
        for module in (rational_quadratic, splines, transforms.autoregressive)  # each holds a name of its own
        for function in (rational_quadratic_spline, unconstrained_rational_quadratic_spline)
    ]
    coupling = transforms.coupling.AffineCouplingTransform
    changes += [(coupling, "_coupling_transform_forward", _forward), (coupling, "_coupling_transform_inverse", _inverse)]
    patched("nflows", changes)


def unpatch():
    unpatched("nflows")


def _affine(self, inputs, transform_params, inverse):
    own = type(self)._scale_and_shift
    if own is not transforms.coupling.AffineCouplingTransform._scale_and_shift:  # a subclass with another scale
        scale, shift = own(self, transform_params)
        log_det = scale.log().flatten(1).sum(1)
        return ((inputs - shift) / scale, -log_det) if inverse else (inputs * scale + shift, log_det)
    y, log_det = ops.affine_coupling(inputs, transform_params, scale="sigmoid_floor", inverse=inverse)
    return y, log_det.to(inputs.dtype)


def _forward(self, inputs, transform_params):
    return _affine(self, inputs, transform_params, False)


def _inverse(self, inputs, transform_params):
    return _affine(self, inputs, transform_params, True)
