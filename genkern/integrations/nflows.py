"""nflows on genkern's kernels: rational-quadratic splines, the layers made of them, affine couplings; LULinear and residual networks
with context in fewer calls.

    import genkern.integrations.nflows as fused
    fused.patch()        # every nflows spline, affine coupling, LULinear and ResidualNet, existing models too
    fused.unpatch()

Or call fused.rational_quadratic_spline and fused.unconstrained_rational_quadratic_spline, with the names, arguments, errors and
conventions of nflows.transforms.splines. Cubic, quadratic and linear splines stay nflows' own.
"""

import functools
import math

import torch
from nflows import transforms
from nflows.nn.nets import resnet
from nflows.transforms import splines
from nflows.transforms.splines import rational_quadratic

from genkern import ops
from genkern.integrations._splines import constrained, numbers_served, patched, unconstrained, unpatched

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
    changes += [(_SPLINE_COUPLING, "_piecewise_cdf", _piecewise_cdf), (_SPLINE_LAYER, "_elementwise", _elementwise)]
    changes += [(_SPLINE_COUPLING, "forward", _spline_coupling), (_SPLINE_COUPLING, "inverse", _spline_coupling_inverse)]
    changes += [(transforms.LULinear, "forward_no_cache", _lu_forward), (transforms.LULinear, "inverse_no_cache", _lu_inverse)]
    changes += [(resnet.ResidualBlock, "forward", _residual_block)]
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


# The layers gather and scatter features, cut the network's output into three and divide two of them in place, which costs more than
# the spline: several passes over the whole output, and as many again in the backward pass. Rows with linear tails are one call of an
# op; for what it does not know the output is divided by one vector and split.

_SPLINE_COUPLING = transforms.coupling.PiecewiseRationalQuadraticCouplingTransform
_SPLINE_LAYER = transforms.autoregressive.MaskedPiecewiseRationalQuadraticAutoregressiveTransform
_their_piecewise_cdf = _SPLINE_COUPLING._piecewise_cdf


def _spline_coupling(self, inputs, context=None):
    return _couple(self, inputs, context, False)


def _spline_coupling_inverse(self, inputs, context=None):
    return _couple(self, inputs, context, True)


def _couple(self, inputs, context, inverse):
    size = _width(self.transform_net)
    plain = type(self) is _SPLINE_COUPLING and self.unconditional_transform is None and size is not None
    if not plain or not _rows(self, inputs, self.features):
        base = super(_SPLINE_COUPLING, self)
        return (base.inverse if inverse else base.forward)(inputs, context)
    params = self.transform_net(inputs.index_select(1, self.identity_features), context)
    return _spline_of_rows(self, inputs, params, self.transform_features, size, inverse)


def _width(net):
    return getattr(net, "hidden_features", None) or getattr(net, "hidden_channels", None)


def _rows(self, inputs, features):
    """Whether rational_quadratic_spline_coupling knows the layer's spline of these inputs."""
    rows = inputs.dim() == 2 and inputs.shape[1] == features and inputs.is_floating_point()
    return rows and self.tails == "linear" and numbers_served(*_spline_numbers(self)) and self.min_derivative < 1


def _spline_numbers(self):
    return self.num_bins, self.tail_bound, self.min_bin_width, self.min_bin_height, self.min_derivative


def _spline_of_rows(self, inputs, params, changed, size, inverse):
    """size: the network's width; widths and heights are divided by its square root, where there is one."""
    bins, bound, *minima = _spline_numbers(self)
    names = ("min_bin_width", "min_bin_height", "min_derivative")
    options = {"bins": bins, "tail_bound": bound, "logit_scale": 1 / math.sqrt(size or 1)} | dict(zip(names, minima, strict=True))
    y, log_det = ops.rational_quadratic_spline_coupling(inputs, params, changed, inverse=inverse, **options)
    return y.to(inputs.dtype), log_det.to(inputs.dtype)


def _piecewise_cdf(self, inputs, transform_params, inverse=False):
    size = _width(self.transform_net)
    if size is None or transform_params.shape[-1] < 2 * self.num_bins:
        return _their_piecewise_cdf(self, inputs, transform_params, inverse)  # which warns
    return _split_spline(self, inputs, transform_params, size, inverse)


def _elementwise(self, inputs, autoregressive_params, inverse=False):
    size = getattr(self.autoregressive_net, "hidden_features", None)
    if _rows(self, inputs, inputs.shape[-1]):
        return _spline_of_rows(self, inputs, autoregressive_params, None, size, inverse)
    params = autoregressive_params.view(*inputs.shape[:2], self._output_dim_multiplier())
    y, log_det = _split_spline(self, inputs, params, size, inverse)
    return y, log_det.flatten(1).sum(1)


def _split_spline(self, inputs, params, size, inverse):
    bins, numbers = self.num_bins, params.shape[-1]
    if size is not None:  # logits are divided by the square root of the network's width
        divisors = params.new_full((numbers,), math.sqrt(size))
        divisors[2 * bins :] = 1
        params = params / divisors
    function = rational_quadratic_spline
    if self.tails is not None:
        function = functools.partial(unconstrained_rational_quadratic_spline, tails=self.tails, tail_bound=self.tail_bound)
    minima = {name: getattr(self, name) for name in ("min_bin_width", "min_bin_height", "min_derivative")}
    return function(inputs, *params.split([bins, bins, numbers - 2 * bins], -1), inverse=inverse, **minima)


def _lu_forward(self, inputs):
    return _lu(self, inputs, False)


def _lu_inverse(self, inputs):
    return _lu(self, inputs, True)


def _lu(self, inputs, inverse):
    y, log_det = ops.lu_linear(inputs, self.lower_entries, self.upper_entries, self.upper_diag, self.bias, inverse=inverse)
    return y, log_det.to(y.dtype)


# Of a block that sees a context, nflows joins what is gated and its gate, which F.glu cuts apart again: a fourth of the network's time.

_their_residual_block = resnet.ResidualBlock.forward


def _residual_block(self, inputs, context=None):
    if context is None:
        return _their_residual_block(self, inputs)
    temps = self.batch_norm_layers[0](inputs) if self.use_batch_norm else inputs
    temps = self.linear_layers[0](self.activation(temps))
    temps = self.batch_norm_layers[1](temps) if self.use_batch_norm else temps
    temps = self.linear_layers[1](self.dropout(self.activation(temps)))
    return torch.addcmul(inputs, temps, torch.sigmoid(self.context_layer(context)))
