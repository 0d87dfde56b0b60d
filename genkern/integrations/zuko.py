"""zuko's rational-quadratic spline on genkern's kernel.

    import genkern.integrations.zuko as fused
    fused.patch()        # every zuko.transforms.MonotonicRQSTransform, existing flows too
    fused.unpatch()

zuko clips its parameters softly and has no smallest bin; its parameters are mapped to those of genkern's function. The attributes
horizontal, vertical and derivatives are computed when somebody asks for them.
"""

import math

import torch
from zuko.transforms import MonotonicRQSTransform

from genkern import ops
from genkern.integrations._splines import patched, unpatched

_init = MonotonicRQSTransform.__init__
_NONE = 1e-30  # no smallest bin, no smallest slope


def rational_quadratic_spline(x, widths, heights, derivatives, bound=5.0, slope=1e-3, inverse=False):
    """(y, log |dy/dx|) of MonotonicRQSTransform(widths, heights, derivatives, bound, slope); x (...), broadcast with the parameters."""
    log_slope = math.log(slope)
    shape = torch.broadcast_shapes(x.shape, widths.shape[:-1])
    clipped = [raw / (1 + abs(2 * raw / log_slope)) for raw in (widths, heights)]
    d = derivatives / (1 + abs(derivatives / log_slope))
    slopes = torch.exp(d)
    slopes = slopes + torch.log(-torch.expm1(-slopes))  # whose softplus is exp(d)
    tensors = [p.expand(*shape, p.shape[-1]) for p in (*clipped, slopes)]
    minima = {"min_bin_width": _NONE, "min_bin_height": _NONE, "min_derivative": _NONE}
    y, log_det = ops.rational_quadratic_spline(x.expand(shape), *tensors, inverse=inverse, tail_bound=float(bound), **minima)
    return y, log_det.to(y.dtype)


def patch():
    names = {"__init__": _lazy_init, "_call": _call, "_inverse": _inverse, "call_and_ladj": _call_and_ladj}
    MonotonicRQSTransform.__getattr__ = _attributes
    patched("zuko", [(MonotonicRQSTransform, name, function) for name, function in names.items()])


def unpatch():
    unpatched("zuko")


def _lazy_init(self, widths, heights, derivatives, bound=5.0, slope=1e-3, **kwargs):
    super(MonotonicRQSTransform, self).__init__(**kwargs)
    self._raw = (widths, heights, derivatives, bound, slope)


def _attributes(self, name):
    """Reached for what is not there yet. It stays after unpatch, for the transforms that were made before it."""
    if name not in ("horizontal", "vertical", "derivatives") or "_raw" not in vars(self):
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
    raw = self._raw
    _init(self, *raw)
    self._raw = raw
    return vars(self)[name]


def _own(self, x, inverse):
    if "_raw" not in vars(self):  # made before patch: its parameters are gone, its knots are there
        return None
    return rational_quadratic_spline(x, *self._raw, inverse=inverse)


_ORIGINAL = {name: vars(MonotonicRQSTransform)[name] for name in ("_call", "_inverse", "call_and_ladj")}


def _call(self, x):
    found = _own(self, x, False)
    return _ORIGINAL["_call"](self, x) if found is None else found[0]


def _inverse(self, y):
    found = _own(self, y, True)
    return _ORIGINAL["_inverse"](self, y) if found is None else found[0]


def _call_and_ladj(self, x):
    found = _own(self, x, False)
    return _ORIGINAL["call_and_ladj"](self, x) if found is None else found
