"""The bench: genkern, eager PyTorch and torch.compile in turn, in one process, so that ratios hold on a noisy machine.

Every round times each contender once; a ratio is the median over rounds of eager's time over the contender's in the same round.
Before a case is timed its check must pass, and stats() must show that the named backend ran; else the case is refused.
"""

import argparse
import difflib
import functools
import itertools
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

import genkern
from genkern import core, random
from genkern.testing._case import Make, all_cases
from genkern.testing._check import check, same_draw

SCHEMA = 2  # 1: one number of threads, in "machine"
ROUND_SECONDS = 0.004


def _draw(name, *parameters):
    draw = getattr(random, name)
    return lambda key, out: draw(key, *parameters, out.shape, out=out, dtype=out.dtype)


DRAWS = {  # name -> (genkern's draw into out, the torch call it replaces)
    "random_normal": (_draw("normal"), lambda out: out.normal_()),
    "random_uniform": (_draw("uniform"), lambda out: out.uniform_()),
    "random_bernoulli": (_draw("bernoulli", 0.3), lambda out: out.bernoulli_(0.3)),
    "random_exponential": (_draw("exponential"), lambda out: out.exponential_()),
}
DRAW_SHAPES = ((64,), (4096,), (1 << 20,))


@dataclass
class Row:
    """What is measured together: {contender: call}, one of them "eager"."""

    op: str
    shape: tuple
    dtype: torch.dtype
    mode: str  # "forward", "forward+backward" or one of the case's bench_modes
    bytes: int
    calls: dict[str, Callable]


# ---- timing


def time_interleaved(calls, rounds, round_seconds=ROUND_SECONDS, device="cpu"):
    """{contender: [seconds per call, one for each round]}; on a GPU a round ends when the device has finished."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    number = {}
    for name, call in calls.items():
        call()
        wait()
        start = time.perf_counter()
        call()
        wait()
        number[name] = max(1, int(round_seconds / max(time.perf_counter() - start, 1e-7)))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            n = number[name]
            start = time.perf_counter()
            for _ in range(n):
                call()
            wait()
            times[name].append((time.perf_counter() - start) / n)
    return times


def peak_bytes(call, device="cpu"):
    """The most memory that one call holds in tensors beyond what was there before; its result counts, kernels' own scratch does not."""
    call()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks otherwise
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    held = peak = 0
    for event in profile.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def summarize(row, times, peaks, threads=1):
    copy = times["copy"]
    result = {}
    for name, seconds in times.items():
        ratios = [e / s for e, s in zip(times["eager"], seconds, strict=True)]
        quantiles = statistics.quantiles(ratios, n=5)
        ours = times["genkern"]
        result[name] = {
            "us": statistics.median(seconds) * 1e6,
            "ratio": statistics.median(ratios),
            "ratio_p20": quantiles[0],
            "ratio_p80": quantiles[-1],
            "genkern_ratio": statistics.median(s / o for s, o in zip(seconds, ours, strict=True)),  # ours against this one
            "of_copy": statistics.median(c / s for c, s in zip(copy, seconds, strict=True)),
            "peak_bytes": peaks[name],
        }
    gigabytes = row.bytes / statistics.median(copy) / 1e9
    return {
        "op": row.op, "shape": list(row.shape), "dtype": str(row.dtype).split(".")[1], "mode": row.mode, "threads": threads,
        "bytes": row.bytes, "copy_gb_per_s": gigabytes, "contenders": result,
    }  # fmt: skip


# ---- what is measured


def _copy_of(size, device):
    source = torch.ones(max(1, size // 8), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _call(function, arguments, leaves):
    """The call to time; with the names of leaves it includes the backward pass to them."""
    if not leaves:
        return lambda: function(**arguments)
    arguments = {n: a.detach().requires_grad_() if n in leaves else a for n, a in arguments.items()}
    wanted = [arguments[n] for n in leaves]
    outputs = function(**arguments)
    grads = [torch.ones_like(o) for o in outputs] if isinstance(outputs, tuple) else torch.ones_like(outputs)
    return lambda: torch.autograd.grad(function(**arguments), wanted, grads)


def _compiled(function):
    def run(**arguments):
        return function(**arguments)

    return torch.compile(run)


def case_rows(case, backend, shapes, dtype, compiled, device="cpu"):
    for shape in shapes:
        given = case.arguments(Make(dtype, device), shape)
        given.pop("key", None)  # a fair race: both sides draw fresh noise in every call
        leaves = case.differentiable(given)
        for extra in ({}, *case.bench_modes.values()):
            check(case, backend, shape, dtype, variant=case.bench_variant | extra, device=device)
        given |= case.bench_arguments(given)
        modes = {"forward": {}} | ({"forward+backward": {}} if leaves else {}) | case.bench_modes
        for mode, extra in modes.items():
            arguments, wanted = given | extra, leaves if mode == "forward+backward" else ()
            genkern.reset_stats()
            total = case.bytes(shape, dtype.itemsize) + (case.bytes_backward(shape, dtype.itemsize) if wanted else 0)
            calls = {
                "eager": _call(case.eager, arguments, wanted),
                "genkern": _call(functools.partial(case.function, **case.bench_variant), arguments, wanted),
                "copy": _copy_of(total, device),
            }
            calls["genkern"]()
            _must_have_run(case.name + ("_backward" if wanted else ""), backend)
            if compiled:
                torch._dynamo.reset()
                calls["compile"] = _call(_compiled(case.eager), arguments, wanted)
            calls |= {library: _call(function, arguments, wanted) for library, function in case.peers().items()}
            yield Row(case.name, shape, dtype, mode, total, calls)


def draw_rows(name, backend, shapes, dtype, device="cpu"):
    ours, theirs = DRAWS[name]
    for shape in shapes:
        key, out = random.key(1, device=device), torch.empty(shape, dtype=dtype, device=device)
        with genkern.backend("reference"):
            expected = ours(key, torch.empty_like(out)).clone()
        genkern.reset_stats()
        if not same_draw(expected, ours(key, out)):
            raise AssertionError(f"{name} on {backend}: its bits are not those of the stream; nothing is measured")
        _must_have_run(name, backend)
        total = out.numel() * out.element_size()
        calls = {
            "eager": lambda out=out: theirs(out),
            "genkern": lambda k=key, out=out: ours(k, out),
            "copy": _copy_of(2 * total, device),
        }
        yield Row(name, shape, dtype, "forward", total, calls)


def _must_have_run(name, backend):
    if not genkern.stats().get((name, backend)):
        raise AssertionError(f"{name}: backend {backend!r} was named but did not run: {genkern.stats()}; nothing is measured")


# ---- report


def machine(device="cpu", threads=(1,)):
    """Where and with what a run was made."""
    names = (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    cpu = next(names, platform.processor())
    describe = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(describe, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent)
    return {
        "schema": SCHEMA, "date": time.strftime("%Y-%m-%d"), "cpu": cpu, "cores": os.cpu_count(), "threads": list(threads),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "instruction_set": torch.backends.cpu.get_cpu_capability(), "commit": git.stdout.strip() or None,
        "genkern": genkern.__version__, "torch": torch.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _lines(path):
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:
        return []


def print_header(facts):
    versions = f"torch {facts['torch']}, genkern {facts['genkern']}"
    print(f"{facts.get('gpu') or facts['cpu']}, {facts['instruction_set']}, {versions}")
    print("x eager: how many times faster than eager PyTorch in the same round (median; 20th-80th percentile)")
    print("fwd: forward, +bwd: forward and backward, inv: forward of the inverse")
    print("compile: the same against torch.compile")
    print("copy: speed as a part of copying as many bytes; mem: peak bytes as a part of eager's; t: threads\n")
    columns = f"{'eager us':>8} {'ours us':>8} {'x eager':>7} {'(p20-p80)':>11} {'compile':>7} {'copy':>4} {'mem':>4}"
    print(f"{'op':18} {'shape':11} {'mode':4} t {columns}")


def print_row(result):
    c = result["contenders"]
    ours, compiled = c["genkern"], c.get("compile")
    shape = "x".join(map(str, result["shape"]))
    spread = "({}-{})".format(*(f"{ours[q]:.{int(ours[q] < 100)}f}" for q in ("ratio_p20", "ratio_p80")))
    against = f"{compiled['genkern_ratio']:7.1f}" if compiled else f"{'':7}"
    memory = f"{ours['peak_bytes'] / c['eager']['peak_bytes']:4.0%}" if c["eager"]["peak_bytes"] else f"{'':4}"
    slower = " slower" if ours["ratio"] < 1 else ""
    columns = f"{c['eager']['us']:8.1f} {ours['us']:8.1f} {ours['ratio']:7.1f} {spread:>11} {against}"
    mode = {"forward": "fwd", "forward+backward": "+bwd", "inverse": "inv"}[result["mode"]]
    peers = "".join(f"  {n} {v['genkern_ratio']:.1f}x" for n, v in c.items() if n not in ("eager", "genkern", "copy", "compile"))
    print(
        f"{result['op']:18} {shape:11} {mode:4} {result['threads']} {columns} {ours['of_copy']:4.0%} {memory}{slower}{peers}",
        flush=True,
    )


def compare(old, new, threshold=0.1):
    """Lines that name each (op, shape, mode) whose ratio to eager fell by more than the threshold from one run to another."""
    key = lambda r: (r["op"], tuple(r["shape"]), r["dtype"], r["mode"], r.get("threads", 1))
    before = {key(r): r["contenders"]["genkern"]["ratio"] for r in old["results"]}
    lines = []
    for r in new["results"]:
        was, now = before.get(key(r)), r["contenders"]["genkern"]["ratio"]
        if was and now < was * (1 - threshold):
            lines.append(f"{r['op']} {'x'.join(map(str, r['shape']))} {r['mode']}: {was:.2f}x eager before, {now:.2f}x now")
    return lines


def table(results):
    """Lines of Markdown: times faster than eager PyTorch, torch.compile and peers; a row for each op, shape and number of threads."""
    rivals = {"eager": "eager", "compile": "`torch.compile`"}
    times = [f"{mode}, x {rival}" for rival in rivals.values() for mode in ("forward", "with backward")]
    head = ["op", "shape", "threads", *times, "x peers"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    measured = {}
    for r in _with_inverses(results):
        measured.setdefault((r["op"], tuple(r["shape"]), r.get("threads", 1)), {})[r["mode"]] = r["contenders"]
    for (op, shape, threads), modes in measured.items():
        cells = [f"`{op}`", " x ".join(map(str, shape)), str(threads)]
        for rival, mode in itertools.product(rivals, ("forward", "forward+backward")):
            contenders = modes.get(mode, {})
            cells.append(_times(contenders[rival]["genkern_ratio"]) if rival in contenders else "–")
        peers = {}
        for contenders in modes.values():
            for name in contenders.keys() - {"eager", "genkern", "copy", "compile"}:
                peers.setdefault(name, []).append(_times(contenders[name]["genkern_ratio"]))
        cells.append(", ".join(f"{name} {' and '.join(ratios)}" for name, ratios in sorted(peers.items())) or "–")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _with_inverses(results):
    """The inverse of an op as an op of its own."""
    return [r | {"op": f"{r['op']} inverse", "mode": "forward"} if r["mode"] == "inverse" else r for r in results]


def _times(ratio):
    return f"{ratio:.1f}x" if ratio < 99.95 else f"{ratio:.0f}x"


def plot(results, path):
    """Draw a line for each op, a point for each shape: times faster than eager and torch.compile with the fewest threads measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    threads = min(r.get("threads", 1) for r in results)
    results = [r for r in _with_inverses(results) if r.get("threads", 1) == threads]
    ops = list(dict.fromkeys(r["op"] for r in results))
    figure, panels = pyplot.subplots(1, 2, sharey=True, figsize=(9, 0.2 * len(ops) + 1.2), layout="constrained")
    for axes, rival in zip(panels, ("eager", "compile"), strict=True):
        for mode, marker in (("forward", "o"), ("forward+backward", "D")):
            rows = [r for r in results if r["mode"] == mode and rival in r["contenders"]]
            ratios = [r["contenders"][rival]["genkern_ratio"] for r in rows]
            colors = ["tab:blue" if ratio >= 1 else "tab:red" for ratio in ratios]
            inside = colors if mode == "forward" else "none"
            axes.scatter(ratios, [ops.index(r["op"]) for r in rows], 18, inside, marker=marker, edgecolors=colors, label=mode)
        axes.axvline(1, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.grid(alpha=0.3)
        axes.set_xlabel("times faster than " + {"eager": "eager PyTorch", "compile": "torch.compile"}[rival])
    panels[0].set_yticks(range(len(ops)), ops)
    panels[0].invert_yaxis()
    panels[1].legend(loc="lower right")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _files(parser, words):
    needed = 1 if words[0] == "table" else 2
    if len(words) != needed + 1:
        parser.error(f"{words[0]} needs {needed} file{'s' * (needed > 1)}, got {len(words) - 1}")
    return words[1:]


def _counts(text):
    counts = [int(n) for n in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"thread counts must be at least 1, got {text}")
    return counts


def _read(path):
    try:
        run = json.loads(pathlib.Path(path).read_text())
        return run | {"results": run["results"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is no result of genkern bench --json") from None


def main(argv=None):
    """Run the command; 0, or 1 where a ratio fell (compare) or a case was refused."""
    lower = (
        "A lower instruction set, for PyTorch, its libraries and genkern alike: "
        "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 genkern bench ..."
    )
    parser = argparse.ArgumentParser(prog="genkern bench", description=__doc__.splitlines()[0], epilog=lower)
    words = "names; or: compare A.json B.json (fails where a ratio fell by 10 %%); plot A.json FILE; table A.json (Markdown)"
    parser.add_argument("ops", nargs="*", help=words)
    parser.add_argument("--shape", action="append", help="such as 256x4096; may be repeated")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--backend", choices=list(core.BACKENDS), help="the backend to measure; default: the one the op uses")
    parser.add_argument("--threads", type=_counts, default=[1], metavar="N[,N]", help="such as 1,2: a row for each (default: 1)")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--quick", action="store_true", help="few rounds at the smaller sizes, without torch.compile")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", metavar="FILE", help="write the results")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios (needs matplotlib)")
    arguments = parser.parse_args(argv)
    if arguments.ops[:1] == ["compare"]:
        lines = compare(*map(_read, _files(parser, arguments.ops)))
        print("\n".join(lines) or "no ratio fell")
        return int(bool(lines))
    if arguments.ops[:1] == ["plot"]:
        source, target = _files(parser, arguments.ops)
        plot(_read(source)["results"], target)
        return 0
    if arguments.ops[:1] == ["table"]:
        print("\n".join(table(_read(*_files(parser, arguments.ops))["results"])))
        return 0
    if arguments.quick:
        arguments.rounds, arguments.no_compile = min(arguments.rounds, 5), True
    cases = all_cases()
    known = [*DRAWS, *cases]
    unknown = [name for name in arguments.ops if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, 1)
        parser.error(f"no op {unknown[0]!r}; " + (f"did you mean {close[0]!r}?" if close else f"benched are {', '.join(known)}"))
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda cannot be used here: torch sees no GPU")
    wrong = [text for text in arguments.shape or () if not all(size.isdecimal() for size in text.split("x"))]
    if wrong or arguments.rounds < 2:
        parser.error(f"--shape must be such as 256x4096, got {wrong[0]}" if wrong else "needs --rounds 2 at least")
    shapes = [tuple(map(int, s.split("x"))) for s in arguments.shape or ()]
    dtype = getattr(torch, arguments.dtype)
    torch._inductor.config.fallback_random = True  # its own generator is several times slower on a CPU
    warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated.*")
    facts, results, refused = machine(arguments.device, arguments.threads), [], {}
    print_header(facts)
    for name, threads in itertools.product(arguments.ops or known, arguments.threads):
        torch.set_num_threads(threads)
        sizes = shapes or (DRAW_SHAPES if name in DRAWS else cases[name].bench_shapes)
        sizes = sizes[:2] if arguments.quick and not shapes else sizes
        backend = arguments.backend or core.OPS[name].default(arguments.device)[0]
        try:
            if backend == "reference":
                raise AssertionError(f"there is nothing to measure: {core.OPS[name].default(arguments.device)[1]}")
            if name in DRAWS:
                rows = draw_rows(name, backend, sizes, dtype, arguments.device)
            else:
                rows = case_rows(cases[name], backend, sizes, dtype, not arguments.no_compile, arguments.device)
            with genkern.backend(arguments.backend):
                for row in rows:
                    times = time_interleaved(row.calls, arguments.rounds, device=arguments.device)
                    peaks = {name: peak_bytes(call, arguments.device) for name, call in row.calls.items()}
                    results.append(summarize(row, times, peaks, threads))
                    print_row(results[-1])
        except (AssertionError, RuntimeError) as error:  # a wrong result, or no such backend here
            refused[name] = str(error)
            print(f"{name:18} REFUSED: {error}", flush=True)
    if arguments.json:
        path = pathlib.Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": facts, "results": results, "refused": refused}, indent=1) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)
    return int(bool(refused))
