"""Layers of flows. Each maps (x, log_det, context) to (y, log_det + its own); inverse() maps back, with that map's log-determinant.

x is (N, C, ...), log_det (N,) or None for zero; context, such as an embedded label (N, features), goes to the networks inside.
`safe_inverse` says that x can be computed back from y with nearly the digits of the stream (InvertibleSequence).
"""

import torch
from torch import nn

from genkern import ops
from genkern.ops._common import check_choice, check_int
from genkern.ops.flow._affine_coupling import SCALES
from genkern.ops.flow._squeeze import ORDERS


class ActNorm(nn.Module):
    """y = x exp(log_scale) + shift for each channel (Glow, section 3.1). The first batch in training mode, of all processes together,
    sets both so that its y has mean 0 and variance 1. `initialized` is part of the state_dict: it happens once, also after a reload.
    """

    safe_inverse = True

    def __init__(self, channels):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(False))
        self._known = False  # the buffer, without asking the device at every step

    def forward(self, x, log_det=None, context=None):
        self.see(x)
        return ops.actnorm(x, self.log_scale, self.shift, log_det=log_det)

    def inverse(self, y, log_det=None, context=None):
        return ops.actnorm(y, self.log_scale, self.shift, inverse=True, log_det=log_det)

    def see(self, x):
        """Let the first batch in training mode set the parameters."""
        _check_channels(self, x, len(self.shift))
        if self.training and not self._known:
            if not self.initialized:
                self._initialize(x.detach())
            self._known = True

    def settled(self):
        """Whether the next batch leaves the parameters as they are."""
        return self._known or not self.training

    @torch.no_grad()
    def _initialize(self, x):
        x = x.transpose(0, 1).flatten(1).float()  # (C, values)
        moments = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1)])
        _sum_over_processes(moments)
        count, mean = moments[0], moments[1] / moments[0]
        squares = (x - mean[:, None]).square().sum(1)
        _sum_over_processes(squares)
        std = (squares / count).sqrt()
        std = torch.where(std > 1e-6, std, torch.ones_like(std))  # a constant channel is only moved
        self.log_scale.copy_(-std.log())
        self.shift.copy_(-mean / std)
        self.initialized.fill_(True)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._known = False


class InvertibleConv1x1(nn.Module):
    """y = W x at every position (Glow, section 3.2), W at first a random rotation. Also for points (N, C).

    plu     W = P L (U + diag(sign exp(log_diagonal))), P and sign fixed: the log-determinant is a sum. False: W is the parameter,
            its log-determinant a torch.linalg.slogdet at every step
    """

    safe_inverse = True

    def __init__(self, channels, plu=True):
        super().__init__()
        weight = torch.linalg.qr(torch.randn(channels, channels))[0]
        self.plu = plu
        if plu:
            permutation, lower, upper, sign, log_diagonal = ops.plu_factors(weight)
            self.register_buffer("permutation", permutation)
            self.register_buffer("sign", sign)
            self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper)
            self.log_diagonal = nn.Parameter(log_diagonal)
        else:
            self.weight = nn.Parameter(weight)

    def forward(self, x, log_det=None, context=None):
        return self._apply_to(x, log_det, inverse=False)

    def inverse(self, y, log_det=None, context=None):
        return self._apply_to(y, log_det, inverse=True)

    def _apply_to(self, x, log_det, inverse):
        if not self.plu:
            return ops.invertible_conv1x1(x, self.weight, inverse=inverse, log_det=log_det)
        weight, _, log_abs_det = ops.plu_weight(*self.factors(), inverse=inverse)
        return ops.invertible_conv1x1(x, weight, log_abs_det=log_abs_det, log_det=log_det)

    def factors(self):
        """The arguments of genkern.ops.plu_weight."""
        return self.permutation, self.lower, self.upper, self.sign, self.log_diagonal


class ActNormConv1x1(nn.Module):
    """InvertibleConv1x1(ActNorm(x)) in one matrix product, y = W diag(exp(log_scale)) x + W shift, W = P L U: a Glow step reads x once
    for both. `norm` and `conv` hold the parameters.
    """

    safe_inverse = True

    def __init__(self, channels):
        super().__init__()
        self.norm, self.conv = ActNorm(channels), InvertibleConv1x1(channels)

    def forward(self, x, log_det=None, context=None, prepared=None):
        self.norm.see(x)
        return self._product(x, log_det, *(prepared or ops.plu_weight(*self.factors())))

    def inverse(self, y, log_det=None, context=None, prepared=None):
        return self._product(y, log_det, *(prepared or ops.plu_weight(*self.factors(), inverse=True)))

    def factors(self):
        """The arguments of genkern.ops.plu_weight."""
        return *self.conv.factors(), self.norm.log_scale, self.norm.shift

    def _product(self, x, log_det, weight, bias, log_abs_det=0):
        return ops.invertible_conv1x1(x, weight, bias, log_abs_det=log_abs_det, log_det=log_det)

    @staticmethod
    def prepare(layers, inverse=False):
        """{layer: {"prepared": (weight, bias)}}, what a call of each of the layers of this class takes: those of one size in one batch,
        the first of which also gets their log_abs_det all together, since layers of a sequence with as many channels have as many
        positions. The others are left out, and so are layers whose first batch is still to come."""
        sizes, found = {}, {}
        for layer in layers:
            if isinstance(layer, ActNormConv1x1) and (inverse or layer.norm.settled()):
                weight = layer.conv.lower
                sizes.setdefault((weight.shape, weight.dtype, weight.device), []).append(layer)
        for same in sizes.values():
            batch = [torch.stack(parts) for parts in zip(*(layer.factors() for layer in same), strict=True)]
            weights, biases, log_abs_dets = ops.plu_weight(*batch, inverse=inverse)
            prepared = zip(same, weights.unbind(), biases.unbind(), strict=True)
            found.update((layer, {"prepared": (weight, bias)}) for layer, weight, bias in prepared)
            found[same[0]]["prepared"] += (log_abs_dets.sum(),)
        return found


class _Coupling(nn.Module):
    """One part of x is changed by functions of the other: of the last `changed` channels, by default the larger half, or of the
    elements where a boolean mask of the shape of a sample is True. `network(kept, context)` gives the parameters.

    The first channels, or x times not mask, are what the network sees.
    """

    def __init__(self, network, channels, changed=None, mask=None):
        super().__init__()
        self.network = network
        changed = (channels if mask is not None else channels - channels // 2) if changed is None else changed
        if not 1 <= changed <= channels:
            raise ValueError(f"{type(self).__name__}: changed must be in 1..{channels}, the number of channels, got {changed}")
        self.kept, self.changed = channels - changed, changed
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, log_det=None, context=None):
        return self._couple(x, self._parameters_of(self._seen(x), context), False, log_det)

    def inverse(self, y, log_det=None, context=None):
        return self._couple(y, self._parameters_of(self._seen(y), context), True, log_det)

    def retrace(self, y, context):
        """(x, leaves, y, log_det) for the backward pass of InvertibleSequence: the network runs once, for the inverse and its graph."""
        zero = y.new_zeros(len(y))
        if self.mask is None:
            kept = y[:, : self.kept].detach().requires_grad_()
            params = self._parameters_of(kept, context)
            with torch.no_grad():
                x, _ = self._couple(y, params, True, None)
            rest = x[:, self.kept :].detach().requires_grad_()
            out, log_det = self._couple(torch.cat([kept, rest], 1), params, False, zero)
            return x, [kept, rest], out, log_det
        with torch.no_grad():
            leaf = y.detach().clone()
        leaf.requires_grad_()
        params = self._parameters_of(self._seen(leaf), context)  # sees the kept elements alone, equal in x and y
        with torch.no_grad():
            leaf.data, _ = self._couple(y, params, True, None)
        out, log_det = self._couple(leaf, params, False, zero)
        return leaf.detach(), [leaf], out, log_det

    def _seen(self, x):
        _check_channels(self, x, self.kept + self.changed)
        return x[:, : self.kept] if self.mask is None else x * (~self.mask).to(x.dtype)

    def _parameters_of(self, seen, context):
        return self.network(seen, context)

    def _couple(self, x, params, inverse, log_det):
        raise NotImplementedError


class AdditiveCoupling(_Coupling):
    """y = x + t (NICE, Dinh et al., 2015): the network gives `changed` channels. Volume is preserved."""

    safe_inverse = True

    def _couple(self, x, params, inverse, log_det):
        y = ops.additive_coupling(x, params, inverse=inverse, mask=self.mask)
        return y, x.new_zeros(len(x)) if log_det is None else log_det


class AffineCoupling(_Coupling):
    """y = x s + t (RealNVP, Dinh et al., 2017): the network gives 2 `changed` channels, shifts and then raw scales u, which
    `scale` maps to s as in genkern.ops.affine_coupling.

    learned_limit   s = exp(limit tanh(u)) with a learned limit for each changed channel, `limit` at first (RealNVP, section 4.1): what
                    the bounded scale may reach is left to the data. Takes scale="tanh"
    """

    safe_inverse = True

    def __init__(
        self, network, channels, changed=None, mask=None, *, scale="sigmoid", shift_first=False, limit=None, learned_limit=False
    ):
        super().__init__(network, channels, changed, mask)
        check_choice("AffineCoupling", "scale", scale, SCALES)
        if learned_limit and scale != "tanh":
            raise ValueError(f'AffineCoupling: learned_limit is of scale="tanh", got {scale!r}')
        self.limit = nn.Parameter(torch.full((self.changed,), 2.0 if limit is None else float(limit))) if learned_limit else None
        self.options = {"scale": scale, "shift_first": shift_first, "limit": limit}
        if learned_limit:
            self.options.update(scale="exp", limit=None)  # of limit tanh(u)

    def _parameters_of(self, seen, context):
        params = self.network(seen, context)
        if self.limit is None:
            return params
        shift, raw = params.chunk(2, 1)
        return torch.cat([shift, self.limit.view(-1, *[1] * (raw.dim() - 2)) * torch.tanh(raw)], 1)

    def _couple(self, x, params, inverse, log_det):
        return ops.affine_coupling(x, params, inverse=inverse, mask=self.mask, log_det=log_det, **self.options)

    def extra_repr(self):
        scale = self.options["scale"] if self.limit is None else "tanh, learned limit"
        return f"kept={self.kept}, changed={self.changed}, scale={scale!r}"


class SplineCoupling(_Coupling):
    """Each changed element through a rational-quadratic spline of its own on [-bound, bound], the identity outside (Neural Spline
    Flows, Durkan et al., 2019): the network gives (3 bins - 1) numbers per changed channel, those of one channel together.
    """

    safe_inverse = False  # where a slope is small, y has too few digits to give x back

    def __init__(self, network, channels, changed=None, *, bins=8, bound=3.0):
        super().__init__(network, channels, changed)
        check_int("SplineCoupling", "bins", bins)
        if not bound > 0:
            raise ValueError(f"SplineCoupling: bound must be positive, got {bound!r}")
        self.bins, self.bound = bins, bound

    def _couple(self, x, params, inverse, log_det):
        y, own = splined(x, params, self.changed, self.bins, self.bound, inverse)
        return y.to(x.dtype), own if log_det is None else log_det + own

    def extra_repr(self):
        return f"kept={self.kept}, changed={self.changed}, bins={self.bins}, bound={self.bound}"


def splined(x, params, changed, bins, bound, inverse):
    """(y, log_det): the last `changed` channels of x (N, C, ...) through rational-quadratic splines by params
    (N, changed (3 bins - 1), ...)."""
    wanted = changed * (3 * bins - 1)
    if params.shape[1] != wanted:
        raise ValueError(f"a spline of {changed} channels and {bins} bins needs {wanted} parameters, got shape {tuple(params.shape)}")
    if x.dim() == 2:
        return ops.rational_quadratic_spline_coupling(x, params, bins=bins, inverse=inverse, tail_bound=bound)
    kept, x = x.tensor_split([x.shape[1] - changed], 1)
    params = params.unflatten(1, (changed, 3 * bins - 1)).movedim(2, -1)
    widths, heights, slopes = params.split([bins, bins, bins - 1], -1)
    y, log_det = ops.rational_quadratic_spline(x, widths, heights, slopes, inverse=inverse, tail_bound=bound, log_det="sample")
    return torch.cat([kept, y.to(kept.dtype)], 1), log_det


class Flip(nn.Module):
    """The channels in reverse order, so that the next coupling changes the others."""

    safe_inverse = True

    def forward(self, x, log_det=None, context=None):
        return x.flip(1), _or_zero(log_det, x)

    inverse = forward


class Permute(nn.Module):
    """The channels in another order, fixed."""

    safe_inverse = True

    def __init__(self, order):
        super().__init__()
        order = torch.as_tensor(order)
        if order.dim() != 1 or not torch.equal(order.sort().values, torch.arange(len(order), device=order.device)):
            raise ValueError(f"Permute: order must be 0 ... C - 1 in some order, got {order.tolist()}")
        self.register_buffer("order", order, persistent=False)

    def forward(self, x, log_det=None, context=None):
        _check_channels(self, x, len(self.order))
        return x[:, self.order], _or_zero(log_det, x)

    def inverse(self, y, log_det=None, context=None):
        _check_channels(self, y, len(self.order))
        return y[:, self.order.argsort()], _or_zero(log_det, y)


class Squeeze(nn.Module):
    """2 x 2 squares of pixels into channels: genkern.ops.squeeze."""

    safe_inverse = True

    def __init__(self, order="channel"):
        super().__init__()
        check_choice("Squeeze", "order", order, ORDERS)
        self.order = order

    def forward(self, x, log_det=None, context=None):
        return ops.squeeze(x, order=self.order), _or_zero(log_det, x)

    def inverse(self, y, log_det=None, context=None):
        return ops.unsqueeze(y, order=self.order), _or_zero(log_det, y)


class Inverse(nn.Module):
    """A layer the other way round."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.safe_inverse = False

    def forward(self, x, log_det=None, context=None):
        return self.layer.inverse(x, log_det, context)

    def inverse(self, y, log_det=None, context=None):
        return self.layer(y, log_det, context)


def _check_channels(layer, x, channels):
    name = type(layer).__name__
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name}: x must be a tensor, got {type(x).__name__}")
    if x.dim() < 2 or x.shape[1] != channels:
        raise ValueError(f"{name}: x must be (N, {channels}, ...), got shape {tuple(x.shape)}")


def _or_zero(log_det, x):
    return x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32)) if log_det is None else log_det


def _sum_over_processes(x):
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
