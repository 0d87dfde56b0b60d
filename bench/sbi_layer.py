"""The spline layers of neural posterior estimation with sbi, in nflows: patched by genkern.integrations.nflows against unpatched.

    python bench/sbi_layer.py                     # batches of 200 and 1000 (training) and 10000 (scoring, sampling)
    python bench/sbi_layer.py --batch 200 --features 4

A layer is nflows' rational-quadratic coupling, its autoregressive layer, or the coupling and the LU linear map behind it that sbi puts
together: 10 bins on [-3, 3] with linear tails, a residual network of two blocks of 50 units that sees the context. Forward, inverse (of
the couplings), and forward with backward, the ways interleaved; "networks" is the share of the patched time that the patched network
takes alone. Processor time, medians. Prints a table and writes bench/results/sbi_layer.json.
"""

import argparse
import json
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import torch
from nflows.nn.nets import ResidualNet
from nflows.transforms import CompositeTransform, LULinear, MaskedPiecewiseRationalQuadraticAutoregressiveTransform
from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform as Coupling

import genkern
import genkern.integrations.nflows as fused

FILE = Path(__file__).parent / "results" / "sbi_layer.json"
SPLINE = {"num_bins": 10, "tails": "linear", "tail_bound": 3.0}


def layers(features, context):
    """{name: (layer, a function of (x, context): what its networks do alone)}"""
    network = lambda inputs, outputs: ResidualNet(inputs, outputs, 50, context_features=context, num_blocks=2)
    coupling = Coupling(torch.arange(features) % 2, network, **SPLINE)
    seen = lambda x, c: coupling.transform_net(x[:, : len(coupling.identity_features)], c)
    linear = LULinear(features, identity_init=True)
    made = MaskedPiecewiseRationalQuadraticAutoregressiveTransform(features, 50, context, num_blocks=2, **SPLINE)
    return {
        "coupling": (coupling, seen),
        "coupling, LU": (CompositeTransform([coupling, linear]), seen),
        "autoregressive": (made, made.autoregressive_net),
    }


def backward(results):
    sum(y.sum() for y in (results if isinstance(results, tuple) else (results,))).backward()


def measure(ways, rounds, calls):
    """{way: median milliseconds of a call} of [(way, set up, run)], interleaved."""
    times = {way: [] for way, *_ in ways}
    for _ in range(rounds):
        for way, prepare, run in ways:
            prepare()
            run()  # as in a loop that does nothing else
            start = time.process_time()
            for _ in range(calls):
                run()
            times[way].append(1e3 * (time.process_time() - start) / calls)
    fused.unpatch()
    return {way: statistics.median(found) for way, found in times.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = lambda text: tuple(int(n) for n in text.split(","))
    parser.add_argument("--batch", type=numbers, default=(200, 1000, 10000))
    parser.add_argument("--features", type=int, default=10)
    parser.add_argument("--context", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'layer':16}{'batch':>7} {'':22}{'nflows ms':>10}{'patched ms':>11}{'ratio':>7}{'networks':>9}")
    for batch in given.batch:
        torch.manual_seed(0)
        x, context = torch.randn(batch, given.features), torch.randn(batch, given.context)
        for name, (layer, networks) in layers(given.features, given.context).items():
            passes = {"forward": layer} | ({} if name == "autoregressive" else {"inverse": layer.inverse})
            runs = {title: (torch.no_grad()(f), torch.no_grad()(networks)) for title, f in passes.items()}
            runs["forward and backward"] = (lambda *a, f=layer: backward(f(*a)), lambda *a, f=networks: backward(f(*a)))
            for title, (run, alone) in runs.items():
                ways = [("nflows", fused.unpatch, run), ("patched", fused.patch, run), ("networks", fused.patch, alone)]
                ways = [(way, prepare, lambda f=f, x=x, c=context: f(x, c)) for way, prepare, f in ways]
                found = measure(ways, given.rounds, max(1, 2000 // batch))
                row = {"layer": name, "batch": batch, "pass": title} | {f"{way}_ms": round(ms, 4) for way, ms in found.items()}
                row["ratio"] = round(found["nflows"] / found["patched"], 2)
                row["networks_share"] = round(found["networks"] / found["patched"], 2)
                rows.append(row)
                print(f"{name:16}{batch:7} {title:22}{found['nflows']:10.2f}{found['patched']:11.2f}"
                      f"{row['ratio']:6.1f}x{row['networks_share']:9.0%}", flush=True)  # fmt: skip
    facts = {"features": given.features, "context": given.context, "threads": 1, "rows": rows}
    facts |= {"instruction_set": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    FILE.write_text(json.dumps(facts | {"nflows": version("nflows"), "genkern": genkern.__version__}, indent=1) + "\n")


if __name__ == "__main__":
    main()
