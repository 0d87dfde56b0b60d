"""WaveNetSteps: layers, weights and state of a WaveNet in flat tensors, for one native call per step."""

import torch

from genkern.ops.autoregressive._causal_conv1d_dense import dense, pack_dense
from genkern.ops.autoregressive._wavenet_step import pack_weights, wavenet_step


class WaveNetSteps:
    """The step of `layers` (with conv, conv1x1_out, conv1x1_skip and, unless None, conv1x1c and conv1x1g) and of the two convolutions
    `last` behind them, in float32 on the CPU. Weights are those at the start.

    states  {conv: the state that CausalConv1d.step returned}; those missing are zeros
    """

    def __init__(self, layers, last, n, states):
        conv = layers[0].conv
        self.convs, self.time = [layer.conv for layer in layers], 0
        self.sizes = [layer.conv.dilation[0] * (conv.kernel_size[0] - 1) for layer in layers]
        self.dilations = [c.dilation[0] for c in self.convs]
        joined = [(layer.conv1x1_out, layer.conv1x1_skip) for layer in layers]
        pieces = []
        for layer, both in zip(layers, joined, strict=True):
            pieces += [pack_weights(layer.conv.weight, layer.conv.bias)]
            pieces += [pack_weights(torch.cat([c.weight for c in both]), torch.cat([c.bias for c in both]))]
        self.weights = torch.cat(pieces + [pack_weights(c.weight, c.bias) for c in last])
        self.numbers = {"taps": conv.kernel_size[0], "gate": conv.out_channels, "skip": last[0].in_channels}
        self.numbers["outputs"] = last[1].out_channels
        self.past = conv.weight.new_zeros(n, sum(self.sizes), conv.in_channels)
        for conv, ring in zip(self.convs, self.past.split(self.sizes, 1), strict=True):
            if conv in states and ring.numel():
                ring.copy_(states[conv].past().mT)
        self.projections = [_all_at_once([getattr(layer, name) for layer in layers]) for name in ("conv1x1c", "conv1x1g")]

    def step(self, x, *conditions):
        """(N, outputs, 1) from x (N, R, 1) and the conditions of conv1x1c and conv1x1g, (N, channels, 1) or None."""
        if len(x) != len(self.past):
            raise ValueError(f"WaveNet: the state is of a batch of {len(self.past)}, the step of {len(x)}")
        condition = None
        for given, projection in zip(conditions, self.projections, strict=True):
            if given is not None:
                more = dense(given, None, projection[0], None, projection[1], 1, 1).view(len(x), len(self.sizes), -1)
                condition = more if condition is None else condition + more
        y = wavenet_step(x[..., 0].contiguous(), self.past, self.weights, condition, self.dilations, time=self.time, **self.numbers)
        self.time += 1
        return y[..., None]

    def states(self):
        """{conv: its past (N, R, (taps - 1) dilation)}, as CausalConv1d.step takes it."""
        rings = zip(self.convs, self.sizes, self.past.split(self.sizes, 1), strict=True)
        return {conv: ring.roll(-(self.time % size), 1).mT for conv, size, ring in rings if size}


def _all_at_once(convolutions):
    if convolutions[0] is None:
        return None
    weight = torch.cat([c.weight.detach() for c in convolutions])
    return weight, pack_dense(weight)
