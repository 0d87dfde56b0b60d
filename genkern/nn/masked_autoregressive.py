"""MADE, a masked network, and the autoregressive layer of flows made of it."""

import torch
import torch.nn.functional as F
from torch import nn

from genkern import ops
from genkern.nn.flow_layers import splined
from genkern.ops._common import check_int


class MADE(nn.Module):
    """A network (N, features) -> (N, per_input features) whose numbers about feature d see only the features before d (Germain et al.,
    2015): linear layers with masks and ReLUs.

    hidden      widths of the hidden layers
    context     features of a condition, which all outputs see; 0: none
    layout      of the outputs: "blocks": per_input blocks of `features`; "interleaved": those of one feature together
    """

    def __init__(self, features, per_input, hidden=(64, 64), context=0, layout="blocks"):
        super().__init__()
        for name, values in (("features", [features]), ("per_input", [per_input]), ("hidden", hidden)):
            for value in values or [0]:
                check_int("MADE", name, value)
        degrees = [torch.arange(1, features + 1)]
        for width in hidden:  # as even as they can be, sorted: what made_inverse runs fastest
            degrees.append(torch.arange(width) * max(1, features - 1) // width + 1)
        self.features, self.layout, self.degrees = features, layout, degrees
        sizes = [features, *hidden, per_input * features]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:], strict=False))
        for i, mask in enumerate(ops.made_masks(degrees, per_input, layout)):
            self.register_buffer(f"mask{i}", mask, persistent=False)
        self.condition = nn.Linear(context, hidden[0], bias=False) if context else None
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x, context=None):
        condition = self._condition(context)
        for i, layer in enumerate(self.layers):
            x = ops.masked_linear(x, layer.weight, getattr(self, f"mask{i}"), layer.bias)
            if i == 0 and condition is not None:
                x = x + condition
            if i + 1 < len(self.layers):
                x = F.relu(x)
        return x

    def generate(self, element, n, context=None):
        """(x (n, features), outputs), x_d = element(d, the outputs about feature d), at about the cost of one pass; no gradient."""
        layers = [(layer.weight, layer.bias) for layer in self.layers]
        bias = self._condition(context)
        return ops.made_inverse(element, n, layers, self.degrees, layout=self.layout, bias_of_sample=bias)

    def _condition(self, context):
        """What the context adds to the first hidden layer (N, width), None without one."""
        features = 0 if self.condition is None else self.condition.in_features
        got = 0 if context is None else context.shape[-1]
        if got != features:
            raise ValueError(f"MADE: made for a context of {features} features, got one of {got}")
        return None if context is None else self.condition(context)


class MaskedAutoregressive(nn.Module):
    """A layer of a flow on (N, features): each feature is scaled and shifted, or goes through a spline, as a MADE says that has seen
    the features before it (MAF, Papamakarios et al., 2017; with bins, the autoregressive neural spline flow, Durkan et al., 2019).

    forward is one pass of the network. inverse is sequential; without gradients it costs about one pass too, with gradients as many
    passes as there are features. bins None: y = x s + t, s = exp(u / (1 + |u| / 6.9)).
    """

    safe_inverse = False

    def __init__(self, features, hidden=(64, 64), context=0, *, bins=None, bound=3.0):
        super().__init__()
        self.bins, self.bound = bins, bound
        per_input, layout = (2, "blocks") if bins is None else (3 * bins - 1, "interleaved")
        self.network = MADE(features, per_input, hidden, context, layout)

    def forward(self, x, log_det=None, context=None):
        return self._transform(x, self.network(x, context), False, log_det)

    def inverse(self, y, log_det=None, context=None):
        if torch.is_grad_enabled() and (y.requires_grad or any(p.requires_grad for p in self.parameters())):
            x = torch.zeros_like(y)
            for _ in range(y.shape[1]):  # after pass d the first d features are right
                x, own = self._transform(y, self.network(x, context), True, None)
            return x, own if log_det is None else log_det + own
        element = lambda d, params: self._transform(y[:, d : d + 1], params.contiguous(), True, None)[0][:, 0]
        _, params = self.network.generate(element, len(y), context)
        return self._transform(y, params, True, log_det)

    def _transform(self, x, params, inverse, log_det):
        if self.bins is None:
            return ops.affine_coupling(x, params, scale="soft_clip", inverse=inverse, log_det=log_det)
        y, own = splined(x, params, x.shape[1], self.bins, self.bound, inverse)
        return y, own if log_det is None else log_det + own
