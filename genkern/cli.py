"""The command `genkern`: info, build, verify, bench."""

import argparse
import difflib
import json
import platform
import sys

COMMANDS = {}


def command(function):
    COMMANDS[function.__name__] = function
    return function


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: genkern COMMAND [options]\n")
        for name, function in COMMANDS.items():
            print(f"  {name:8} {function.__doc__.splitlines()[0]}")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; the commands are {', '.join(COMMANDS)}"
        print(f"genkern: no command {argv[0]!r}{hint}", file=sys.stderr)
        return 2
    return int(COMMANDS[argv[0]](argv[1:]) or 0)


@command
def info(argv):
    """Which backends exist here, which one each op uses, and why not another (--json for machines)."""
    parser = argparse.ArgumentParser(prog="genkern info", description=info.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    report = collect_info() if not (arguments := parser.parse_args(argv)).json else None
    if arguments.json:
        print(json.dumps(collect_info(), indent=1))
        return
    print(f"genkern {report['genkern']}, torch {report['torch']}, Python {report['python']}, {report['cpu_capability']}")
    build = report["build"]
    if build:
        stale = ", STALE: the sources have changed since; run python -m genkern build" if build.get("stale") else ""
        print(f"built {build['built_at']} with torch {build.get('torch_headers', '?')} headers{stale}")
    for part, library in report["libraries"].items():
        print(f"  {part:9} {library['path'] or ''} {library['why'] or 'loaded'}")
    for part, entry in (build.get("parts") or {}).items():
        if not entry["built"]:
            print(f"  {part:9} not built: {entry['why'].strip().splitlines()[-1]}\n            mend: {entry['mend']}")
    device_types = list(report["active"])
    print(f"\n{'op':24}" + "".join(f"{d:12}" for d in device_types) + "why not the fast one")
    for op in report["ops"]:
        active = [report["active"][d][op] for d in device_types]
        why = next((a["why"] for a in active if a["why"]), "")
        print(f"{op:24}" + "".join(f"{a['backend']:12}" for a in active) + why)


def collect_info():
    """What `genkern info` prints, as a dict."""
    import torch

    import genkern
    from genkern.core import OPS, _build_info, libraries

    device_types = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    active = {}
    for device in device_types:
        choices = {name: op.default(device) for name, op in OPS.items()}
        active[device] = {name: {"backend": backend, "why": why} for name, (backend, why) in choices.items()}
    return {
        "genkern": genkern.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "build": _build_info.read(),
        "libraries": {part: {"path": path, "why": why} for part, (path, why) in libraries().items()},
        "ops": list(OPS),
        "active": active,
        "available": {name: {d: op.available(d) for d in device_types} for name, op in OPS.items()},
    }


@command
def build(argv):
    """Compile the C++ parts for the torch that is installed here."""
    argparse.ArgumentParser(prog="genkern build", description=build.__doc__).parse_args(argv)
    from genkern.core import _build_info

    return _build_info.rebuild()


@command
def verify(argv):
    """Check every kernel against its reference on this machine; on a GPU this is what switches the kernels on."""
    parser = argparse.ArgumentParser(prog="genkern verify", description=verify.__doc__)
    parser.add_argument("--device", default=None, help="cpu or cuda (default: cuda where there is one)")
    arguments = parser.parse_args(argv)
    import torch

    from genkern.testing import verify as run

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    verdicts = run(device)
    for name, verdict in verdicts.items():
        print(f"{name:40} {verdict}")
    if device == "cuda":
        from genkern.core._verified import save_verdicts

        print("kept in", save_verdicts(verdicts))
    return any(verdict != "passed" for verdict in verdicts.values())


@command
def bench(argv):
    """Measure ops against eager PyTorch, torch.compile and the copy bandwidth, interleaved in one run."""
    from genkern.testing.bench import main as run

    return run(argv)
