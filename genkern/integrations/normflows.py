"""normflows on genkern's kernels: rational-quadratic splines and affine couplings.

    import genkern.integrations.normflows as fused
    fused.patch()        # every normflows spline and AffineCoupling, existing models too
    fused.unpatch()

Or call fused.unconstrained_rational_quadratic_spline, with the arguments and conventions of normflows.utils.splines. Circular tails are
served; one kind of tail per feature and tensors as bounds go to normflows' own function, as do splines without tails.
"""

import torch
from normflows.flows.affine.coupling import AffineCoupling
from normflows.utils import splines

from genkern import ops
from genkern.integrations._splines import patched, unconstrained, unpatched

unconstrained_rational_quadratic_spline = unconstrained(splines.unconstrained_rational_quadratic_spline)
_forward, _inverse = AffineCoupling.forward, AffineCoupling.inverse


def patch():
    patched(
        "normflows",
        [
            (splines, "unconstrained_rational_quadratic_spline", unconstrained_rational_quadratic_spline),
            (AffineCoupling, "forward", _coupling_forward),
            (AffineCoupling, "inverse", _coupling_inverse),
        ],
    )


def unpatch():
    unpatched("normflows")


def _coupling_forward(self, z):
    return _coupling(self, z, False) if self.scale and self.scale_map in ("exp", "sigmoid", "sigmoid_inv") else _forward(self, z)


def _coupling_inverse(self, z):
    return _coupling(self, z, True) if self.scale and self.scale_map in ("exp", "sigmoid", "sigmoid_inv") else _inverse(self, z)


def _coupling(self, z, inverse):
    """forward is z -> x: z2 e^u + t, z2 / sigmoid(u + 2) + t or z2 sigmoid(u + 2) + t; params hold t and u in turn."""
    z1, z2 = z
    params = self.param_map(z1)
    if self.scale_map == "sigmoid":  # z2 / s - (-t) is the inverse of (x + (-t)) s
        params = torch.cat([-params[:, 0::2], params[:, 1::2]], 1)
        z2, log_det = ops.affine_coupling(z2, params, scale="sigmoid", shift_first=True, inverse=not inverse)
    else:
        scale = "exp" if self.scale_map == "exp" else "sigmoid"
        z2, log_det = ops.affine_coupling(z2, params, scale=scale, layout="interleaved", inverse=inverse)
    return [z1, z2], log_det.to(z2.dtype)
