"""Memory and time of training a deep flow: genkern.nn.InvertibleSequence against torch.utils.checkpoint and normflows.

    python bench/invertible_sequence.py                        # K = 4, 16, 64 Glow steps on (8, 12, 16, 16), networks of 64 channels
    python bench/invertible_sequence.py --k 64 --shape 8,12,32,32 --width 128

One forward and backward pass over K Glow steps. For every way to get the activations back it prints the bytes that autograd holds
between forward and backward (unique storages, parameters left out), the most that it allocates at a time (gradients of the parameters
among it), and the median processor time, the ways interleaved. normflows is measured where it is installed.
"""

import argparse
import itertools
import math
import statistics
import time

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from genkern.models.flow.networks import ConvNet
from genkern.nn import ActNormConv1x1, AffineCoupling, InvertibleSequence

WAYS = ("store", "torch checkpoint, each step", "torch checkpoint, sqrt(K) segments", "invert", "normflows")


def steps(k, shape, width):
    torch.manual_seed(0)
    channels, layers = shape[1], []
    for _ in range(k):
        network = ConvNet(channels // 2, 2 * (channels - channels // 2), width)
        with torch.no_grad():
            network.last.weight.normal_().mul_(0.02)  # as after some training
        layers.append([ActNormConv1x1(channels), AffineCoupling(network, channels, shift_first=True)])
    return layers


def make(way, k, shape, width):
    """(a function x -> (y, log_det), its parameters)"""
    if way == "normflows":
        from normflows.flows import GlowBlock

        torch.manual_seed(0)
        blocks = torch.nn.ModuleList(GlowBlock(shape[1], width, init_zeros=False, scale_map="sigmoid") for _ in range(k))

        def run(x):
            total = 0.0
            for block in reversed(blocks):
                x, log_det = block.inverse(x)
                total = total + log_det
            return x, total

        return run, blocks
    layers = steps(k, shape, width)
    sequence = InvertibleSequence([layer for step in layers for layer in step], backward="invert" if way == "invert" else "store")
    if not way.startswith("torch"):
        return sequence, sequence
    size = 1 if way.endswith("step") else math.ceil(math.sqrt(k))
    groups = [InvertibleSequence([layer for step in layers[i : i + size] for layer in step]) for i in range(0, k, size)]

    def run(x):
        log_det = x.new_zeros(len(x))
        for group in groups:
            x, log_det = checkpoint(group, x, log_det, use_reentrant=False)
        return x, log_det

    return run, sequence


def once(run, modules, x):
    y, log_det = run(x)
    (0.5 * y.square().flatten(1).sum(1) - log_det).mean().backward()
    for p in modules.parameters():
        p.grad = None


def kept(run, modules, x):
    """Bytes between forward and backward."""
    own = {p.untyped_storage().data_ptr() for p in [*modules.parameters(), *modules.buffers()]}
    storages = {}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            storages[s.data_ptr()] = s
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(x)
    return sum(s.nbytes() for s in storages.values())


def peak(run, modules, x):
    """Most bytes allocated at a time in one pass, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        once(run, modules, x)
    events = sorted((e.start_ns(), e.nbytes()) for e in found.profiler.kineto_results.events() if e.name() == "[memory]")
    return max(itertools.accumulate(n for _, n in events))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: tuple(int(n) for n in text.split(","))
    parser.add_argument("--k", type=numbers, default=(4, 16, 64))
    parser.add_argument("--shape", type=numbers, default=(8, 12, 16, 16))
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = list(WAYS)
    try:
        import normflows  # noqa: F401
    except ImportError:
        ways.remove("normflows")
    for k in arguments.k:
        x = torch.randn(arguments.shape).requires_grad_()
        runs = {way: make(way, k, arguments.shape, arguments.width) for way in ways}
        times = {way: [] for way in ways}
        for way in ways:
            once(*runs[way], x)  # warm, and the actnorms know their data
        for _ in range(arguments.rounds):
            for way in ways:
                start = time.process_time()
                once(*runs[way], x)
                times[way].append(time.process_time() - start)
        machine = f"{torch.backends.cpu.get_cpu_capability()}, one thread"
        print(f"\nK = {k}, {arguments.shape}, networks of {arguments.width} channels, {machine}")
        print(f"{'':36}{'kept MB':>10}{'peak MB':>10}{'CPU ms':>10}")
        for way in ways:
            kept_mb, peak_mb = kept(*runs[way], x) / 1e6, peak(*runs[way], x) / 1e6
            print(f"{way:36}{kept_mb:10.2f}{peak_mb:10.1f}{1e3 * statistics.median(times[way]):10.1f}")
        if "invert" in runs:
            print(f"largest relative error of an input computed back: {runs['invert'][1].reconstruction_error:.1e}")


if __name__ == "__main__":
    main()
