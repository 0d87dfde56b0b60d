"""Samples per second of WaveNet: step() against the cached loop that people write today.

    python bench/wavenet_sampling.py [--samples 200] [--rounds 5]

The loop keeps a buffer of inputs per layer that is shifted with every sample, and multiplies matrices by torch.nn.functional.linear,
as the incremental forward pass of wavenet_vocoder does; same weights, same uniforms, interleaved, one thread.
"""

import argparse
import math
import time

import torch
import torch.nn.functional as F

from genkern import random
from genkern.models import WaveNet, WaveNetConfig

CONFIGS = {
    "24 layers, 128/256/128, kernel 3, mixture of logistics": WaveNetConfig(
        head="logistic", levels=65536, layers=24, stacks=4, kernel_size=3, residual=128, gate=256, skip=128
    ),
    "20 layers, 64/128/256, kernel 2, 256 levels": WaveNetConfig(layers=20, stacks=2, residual=64, gate=128, skip=256),
}


class Loop:
    """The loop of today: one sample at a time, (N, C)."""

    def __init__(self, model):
        self.model, self.buffers, self.weights = model, {}, {}

    def convolution(self, layer, x):
        taps, dilation = layer.kernel_size[0], layer.dilation[0]
        if taps == 1:
            return F.linear(x, layer.weight[..., 0], layer.bias)
        if layer not in self.buffers:
            self.buffers[layer] = x.new_zeros(len(x), (taps - 1) * dilation + 1, x.shape[1])
            self.weights[layer] = layer.weight.transpose(1, 2).reshape(len(layer.weight), -1)
        buffer = self.buffers[layer]
        buffer[:, :-1] = buffer[:, 1:].clone()
        buffer[:, -1] = x
        rows = buffer[:, ::dilation].reshape(len(x), -1)
        return F.linear(rows, self.weights[layer], layer.bias)

    def __call__(self, x):
        m, c = self.model, self.model.config
        if c.head == "softmax":
            x = F.one_hot(m._index(x), c.levels).float()
        x, skips = self.convolution(m.first_conv, x), 0
        for layer in m.conv_layers:
            a, b = self.convolution(layer.conv, x).chunk(2, 1)
            z = torch.tanh(a) * torch.sigmoid(b)
            skips = skips + self.convolution(layer.conv1x1_skip, z)
            x = (self.convolution(layer.conv1x1_out, z) + x) * math.sqrt(0.5)
        x = F.relu(skips * math.sqrt(1 / c.layers))
        x = F.relu(self.convolution(m.last_conv_layers[1], x))
        return self.convolution(m.last_conv_layers[3], x)


@torch.no_grad()
def today(model, samples, key):
    loop, draws = Loop(model), random.split(random.split(key, 1), samples)
    x = model.quantized(torch.zeros(1, 1, 1)) if model.config.head == "softmax" else torch.zeros(1, 1, 1)
    sound = []
    for t in range(samples):
        params = loop(x[:, 0] if model.config.head != "softmax" else x[:, 0, 0])
        x = model.draw(params, draws[:, t].contiguous())
        sound.append(x)
    return torch.cat(sound, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = WaveNet(config).eval()
        torch.nn.init.normal_(model.last_conv_layers[-1].weight, std=0.05)
        best = {"today": math.inf, "step": math.inf}
        for _ in range(arguments.rounds):
            for kind, draw in (("today", today), ("step", lambda m, n, key: m.sample(1, length=n, key=key))):
                start = time.perf_counter()
                sound = draw(model, arguments.samples, random.key(1))
                best[kind] = min(best[kind], time.perf_counter() - start)
                if kind == "today":
                    expected = sound
        same = float((sound == expected).float().mean())
        rates = {kind: arguments.samples / seconds for kind, seconds in best.items()}
        print(
            f"{name}: today {rates['today']:.0f}/s, step {rates['step']:.0f}/s, "
            f"{rates['step'] / rates['today']:.1f}x; {same:.0%} of samples equal"
        )


if __name__ == "__main__":
    main()
