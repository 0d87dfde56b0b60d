"""wavenet_step: one sample's way through all layers of WaveNet, from a flat description of layers, weights and state."""

import math

import torch
import torch.nn.functional as F

from genkern.core import Op
from genkern.ops._common import promoted
from genkern.ops.autoregressive._causal_conv1d_dense import pack_dense
from genkern.testing._case import Case


def wavenet_step(x, past, weights, condition, dilations, *, taps, gate, skip, outputs, time):
    """One step of the gated residual layers of WaveNet (van den Oord et al., 2016, figure 4) and of the two convolutions behind them.

    x           (N, R), the input of the first layer
    past        (N, sum of (taps - 1) dilations, R): rings of the inputs of the layers; the newest is written over the oldest. Zeros
                at time 0; what came before a time t of (taps - 1) dilation inputs stands in order where t is a multiple of that
    weights     (all of them,): for each layer those of the dilated convolution (gate, R, taps) and of the two 1x1 convolutions of the
                gate's result, to the next layer and to the sum, as one (R + skip, gate / 2, 1); then (skip, skip, 1) and (outputs,
                skip, 1). Each as pack_weights() gives it
    condition   (N, layers, gate), added before the gate, or None
    dilations   one number per layer
    time        how many steps came before this one

    Returns (N, outputs). No checks: the caller is WaveNet. All tensors contiguous, of one type, float32 or float64. In float32 on
    the CPU the bits are those of causal_conv1d at that position. A kernel exists on the CPU alone: tensors on other devices take the
    reference, about ten of torch's operations a layer, within rounding the same.
    """
    return _op(x, past, weights, condition, dilations, taps, gate, skip, outputs, time)


def pack_weights(weight, bias):
    """weight (C_out, C, K) and bias (C_out,) of a convolution as wavenet_step reads them."""
    return torch.cat([pack_dense(weight).flatten(), F.pad(bias.detach(), (0, -len(bias) % 16))])


def _reference(x, past, weights, condition, dilations, taps, gate, skip, outputs, time):
    at, row, residual = 0, 0, x.shape[1]

    def linear(x, width):  # by the weights that come next
        nonlocal at
        depth, blocks = x.shape[1], -(-width // 16)
        matrix, bias = weights[at : at + 16 * blocks * (depth + 1)].split([16 * blocks * depth, 16 * blocks])
        at += 16 * blocks * (depth + 1)
        return F.linear(x, matrix.view(blocks, depth, 16).mT.reshape(-1, depth)[:width], bias[:width])

    total = x.new_zeros(x.shape[0], skip)
    for layer, dilation in enumerate(dilations):
        size = (taps - 1) * dilation
        ring = past[:, row : row + size]
        window = [ring[:, (time + k * dilation) % size] for k in range(taps - 1)] + [x]
        h = linear(torch.cat(window, 1), gate)
        if size:
            ring[:, time % size] = x
        a, b = (h if condition is None else h + condition[:, layer]).chunk(2, 1)
        out, more = linear(torch.tanh(a) * torch.sigmoid(b), residual + skip).split([residual, skip], 1)
        x, total, row = (out + x) * math.sqrt(0.5), total + more, row + size
    return linear(F.relu(linear(F.relu(total * math.sqrt(1 / len(dilations))), skip)), outputs)


_op = Op(
    "wavenet_step",
    "(Tensor x, Tensor(a!) past, Tensor weights, Tensor? condition, int[] dilations, int taps, int gate, int skip, int outputs, "
    "int time) -> Tensor",
    reference=_reference,
    fake=lambda x, past, weights, condition, dilations, taps, gate, skip, outputs, time: x.new_empty(x.shape[0], outputs),
)


_TAPS, _GATE, _SKIP, _OUTPUTS = 3, 10, 7, 5


def _on_a_copy(x, past, weights, condition=None, time=37):
    """Of layers with dilations 1, 2, 4, ..., as many as the past has room for."""
    dtype = promoted(x, past, weights, condition)
    x, weights, condition = (None if t is None else t.to(dtype).contiguous() for t in (x, weights, condition))
    past = past.to(dtype).clone(memory_format=torch.contiguous_format)
    dilations = [2**i for i in range(int(math.log2(past.shape[1] // (_TAPS - 1) + 1)))]
    sizes = {"taps": _TAPS, "gate": _GATE, "skip": _SKIP, "outputs": _OUTPUTS, "time": time}
    return wavenet_step(x, past, weights, condition, dilations, **sizes), past


_on_a_copy.__name__ = "wavenet_step"


def _arguments(make, shape):
    n, residual, layers = (*shape, 3)[:3]
    sizes = [(_GATE, _TAPS * residual), (residual + _SKIP, _GATE // 2)] * layers + [(_SKIP, _SKIP), (_OUTPUTS, _SKIP)]
    pieces = [pack_weights(make((o, depth, 1), depth**-0.5), make((o,))) for o, depth in sizes]
    return {"x": make((n, residual)), "past": make((n, (_TAPS - 1) * (2**layers - 1), residual)), "weights": torch.cat(pieces)}


def _with_condition(make, shape):
    arguments = _arguments(make, shape)
    return arguments | {"condition": make((arguments["x"].shape[0], 3, _GATE))}


CASES = (
    Case(
        _on_a_copy,
        _arguments,
        forms=(_with_condition,),
        shapes=((2, 6), (0, 3), (7, 20)),
        large=(64, 31),
        dtypes=(torch.float32, torch.float64),
        constants=None,
    ),
)
