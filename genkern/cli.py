"""The command `genkern`: info, build, verify, bench, and for models train, sample, eval, score, traverse."""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import types
import typing
from pathlib import Path

from genkern._version import __version__

COMMANDS = {}


def command(function):
    COMMANDS[function.__name__.rstrip("_")] = function
    return function


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        print(__version__)
        return 0
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: genkern COMMAND [options]\n")
        for name, function in COMMANDS.items():
            print(textwrap.fill(f"  {name:8} {function.__doc__.splitlines()[0]}", _width(), subsequent_indent=" " * 11))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        close = difflib.get_close_matches(argv[0], COMMANDS, 1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; the commands are {', '.join(COMMANDS)}"
        print(f"genkern: no command {argv[0]!r}{hint}", file=sys.stderr)
        return 2
    try:
        return int(COMMANDS[argv[0]](argv[1:]) or 0)
    except BrokenPipeError:  # the reader, such as head, has seen enough; Python would complain again on closing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@command
def info(argv):
    """Which backends exist here, which one each op uses, and why not another (--json for machines)."""
    parser = _Parser(prog="genkern info", description=info.__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments, report = parser.parse_args(argv), collect_info()
    if arguments.json:
        print(json.dumps(report, indent=1))
        return
    print(f"genkern {report['genkern']}, torch {report['torch']}, Python {report['python']}, {report['cpu_capability']}")
    build = report["build"]
    if build:
        stale = ", STALE: the sources have changed since; run python -m genkern build" if build.get("stale") else ""
        print(f"built {build['built_at']} with torch {build.get('torch_headers', '?')} headers{stale}")
    missing = {part: entry for part, entry in (build.get("parts") or {}).items() if not entry["built"]}
    for part, library in report["libraries"].items():
        if part not in missing:
            print(f"  {part:9} {library['why'] or 'loaded'}" + (f" ({library['path']})" if library["path"] else ""))
    for part, entry in missing.items():
        print(f"  {part:9} not built: {entry['why'].strip().splitlines()[-1]}\n            mend: {entry['mend']}")
    device_types = list(report["active"])
    width = max(map(len, report["ops"])) + 2
    print(f"\n{'op':{width}}" + "".join(f"{d:12}" for d in device_types) + "why not the fast one")
    for op in report["ops"]:
        active = [report["active"][d][op] for d in device_types]
        why = next((a["why"] for a in active if a["why"]), "")
        print(f"{op:{width}}" + "".join(f"{a['backend']:12}" for a in active) + why)


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
    _Parser(prog="genkern build", description=build.__doc__).parse_args(argv)
    from genkern.core import _build_info

    with _words("build"):
        return _build_info.rebuild()


@command
def verify(argv):
    """Check every kernel against its reference on this machine; on a GPU this is what switches the kernels on."""
    parser = _Parser(prog="genkern verify", description=verify.__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    arguments = parser.parse_args(argv)
    from genkern.testing import verify as run

    with _words("verify"):
        device = _device(arguments.device).split(":")[0]
    print(f"every kernel for {device} tensors against its reference, at small sizes; this takes a minute or a few", flush=True)
    verdicts = run(device, lambda name, verdict: print(f"{name:40} {verdict}", flush=True))
    failed = sum(verdict != "passed" for verdict in verdicts.values())
    print(f"{len(verdicts) - failed} passed, {failed} failed" if verdicts else f"no kernels exist for {device} tensors: genkern info")
    if device == "cuda":
        from genkern.core._verified import save_verdicts

        print("kept in", save_verdicts(verdicts))
    return failed or not verdicts


@command
def bench(argv):
    """Measure ops against eager PyTorch, torch.compile and the copy bandwidth, interleaved in one run."""
    from genkern.testing.bench import main as run

    with _words("bench"):
        return run(argv)


# ---- models


@command
def train(argv):
    """Train a model: genkern train vae --data digits --out run [--resume] [--epochs 20 ...]; under torchrun by several processes."""
    parser = _Parser(prog="genkern train", description=train.__doc__)
    parser.add_argument("name", help=f"of the model: {', '.join(model_names())}; conditional-vae is also cvae, and so on")
    parser.add_argument(
        "--data",
        required=True,
        help="digits, digits32, photos, topics, plucks, or a folder of images or .wav, a .npy, any file as text",
    )
    parser.add_argument("--window", type=int, help="length of the windows into which text or sound is cut")
    parser.add_argument("--out", required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on where the run in the folder stopped")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=_at_least(1), metavar="STEPS", help="checkpoints within an epoch")
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    if not argv or argv[0] in ("-h", "--help"):
        parser.parse_args(argv[:1])  # the help, or all that is missing
    if argv[0].startswith("-"):
        parser.error(f"the name of the model comes first, before {argv[0]}")
    with _words("train"):
        kind = model_class(argv[0])
    from genkern.models._base import Training

    of_training = _add_fields(parser.add_argument_group("training"), Training, kind.defaults)
    of_config = _add_fields(parser.add_argument_group(f"{kind.__name__}, by default fitted to the data"), kind.Config)
    arguments = vars(parser.parse_args(argv))
    given = lambda names: {name: arguments[name] for name in names if name in arguments}
    with _words("train"), _processes() as (rank, world):
        import torch

        from genkern import data
        from genkern.train import fit

        device = _device(arguments["device"], int(os.environ.get("LOCAL_RANK", 0)))
        source = data.load(arguments["data"], window=arguments["window"])
        torch.manual_seed(arguments["seed"])
        model = kind(kind.config_for(source, **given(of_config))).to(device)
        if rank == 0:
            count = sum(p.numel() for p in model.parameters())
            of = f"{len(source.train[0])} of shape {tuple(source.shape)}"
            print(f"{kind.__name__}, {count:,} parameters, on {of} from {source.name}, on {device}" + f" x {world}" * (world > 1))
        out = Path(arguments["out"])
        if arguments["resume"] and rank == 0 and not (out / "last.safetensors").exists():
            print(f"nothing to resume in {out}: beginning", file=sys.stderr)
        history = fit(model, source, out, **given(("resume", "seed", "save_every")), **given(of_training))
        if rank == 0 and history:
            best = load_run(out, device)[0] if (out / "config.json").exists() else None  # the first of two stages keeps no weights
            _report(best, source, history, out, arguments["seed"])


def _add_fields(group, owner, defaults=None):
    """An option for each field of a dataclass, which says what the comment behind the field says; the names of the fields."""
    hints, comments, names = typing.get_type_hints(owner), {}, []
    for kind in reversed(owner.__mro__[:-1]):
        with contextlib.suppress(OSError, TypeError):  # a class without a source file
            comments.update(re.findall(r"^    (\w+): [^#\n]*# (.*)$", inspect.getsource(kind), re.MULTILINE))
    for field in dataclasses.fields(owner):
        default = getattr(defaults, field.name) if defaults else field.default
        note = [] if default is dataclasses.MISSING else [f"(default: {default})"]
        note += [comments[field.name].replace("%", "%%")] if field.name in comments else []
        option = "--" + field.name.replace("_", "-")
        group.add_argument(option, type=_reader(hints[field.name]), default=argparse.SUPPRESS, help=" ".join(note), metavar="X")
        names.append(field.name)
    return names


def _report(best, source, history, out, seed):
    """What a training ends with: its last losses, pictures, and the figure of the best weights beside those of the baselines."""
    from genkern import plots, random

    print(plots.table([{name: x for name, x in history[-1].items() if name != "seconds"}], _width()))
    try:
        _save(out / "curves.png", plots.curves(history).savefig, dpi=120)
        if best and len(source.shape) == 3 and source.shape[0] in (1, 3):
            _save(out / "samples.png", _grid(best, _draw(best, 64, seed)).save)
            if hasattr(best, "denoising"):
                _save(out / "strip.png", _grid(best, _draw(best, 8, seed, strip=True)).save)
        elif best and source.shape == (2,) and hasattr(best, "log_prob"):
            _save(out / "density.png", plots.density(best, source.train[0]).savefig, dpi=120)
    except ImportError as error:  # the training is done all the same
        print(f"no pictures: {error}", file=sys.stderr)
    if hasattr(best, "bits_per_dim"):
        for part in (source, *(source.by_class().values() if source.pictures else ())):
            values = best.evaluate(*part.test, key=random.key(seed), likelihood=True)
            _print_against_baselines(values, part, "test", best)
    print(f"wrote {', '.join(sorted(p.name for p in out.iterdir()))} in {out}")


@command
def sample(argv):
    """Draw samples from a trained model into a PNG grid (or .npy, .txt, .wav): genkern sample run --n 64 [--label 3] --out grid.png"""
    parser = _run_parser("sample", sample)
    parser.add_argument("--n", type=int, help="default 64, of a strip 8")
    parser.add_argument(
        "--label",
        help="of the class, for a model of classes, or a sequence such as 3,1,4 for one of token sequences; by default all in turn",
    )
    parser.add_argument("--strip", action="store_true", help="a row for each image, from noise to image (diffusion models)")
    parser.add_argument("--out", default="samples.png", help="a .png; .npy for the numbers themselves; .txt for bytes as text; .wav")
    if not argv or argv[0].startswith("-"):
        parser.parse_args(argv)  # the help, or that the folder is missing; options may come first where the model adds none
    folder = parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0]
    with _words("sample"):
        model, _ = load_run(folder.folder, folder.device)
    group = parser.add_argument_group(f"of a {type(model).__name__}")
    for name, (read, default) in sample_options(model).items():
        option = "--" + name.replace("_", "-")
        group.add_argument(option, type=read, default=argparse.SUPPRESS, help=f"(default: {default})", metavar="X")
    arguments = parser.parse_args(argv)
    with _words("sample"):
        n = (8 if arguments.strip else 64) if arguments.n is None else arguments.n
        if n < 1:
            raise ValueError(f"--n must be at least 1, got {n}")
        if arguments.strip and not hasattr(model, "denoising"):
            raise ValueError(f"a {type(model).__name__} has no way from noise to image to show: leave --strip out")
        out = _writable(arguments.out, ".png", ".npy", ".txt", ".wav")
        sound = hasattr(model.config, "rate")
        if out.suffix == ".wav" and not sound:
            raise ValueError(f"the samples of a {type(model).__name__} are no sound")
        options = {name: value for name, value in vars(arguments).items() if name in sample_options(model)}
        values = _draw(model, n, arguments.seed, arguments.label, strip=arguments.strip, **options)
        if out.suffix == ".npy":
            import numpy as np

            _save(out, lambda file, **_: np.save(file, values.cpu().numpy()))
        elif out.suffix == ".txt":
            if values.dim() != 2 or values.is_floating_point():
                raise ValueError(f"the samples of a {type(model).__name__} are no text")
            text = b"\n\n".join(bytes(line) for line in values.tolist())
            _save(out, lambda file, **_: file.write(text + b"\n"))
        elif sound:
            _sound(out, values, model.config.rate)
        elif getattr(model.config, "shape", None) == (2,) and hasattr(model, "log_prob") and "labels" not in model.conditions:
            from genkern import plots

            _save(out, plots.density(model, values).savefig, dpi=120)
        else:
            _save(out, _grid(model, values).save)
        print(f"wrote {out}")


@command
def eval_(argv):
    """Evaluate a trained model on a split: its losses, and nats and bits per dimension where it has a likelihood (--json)."""
    parser = _run_parser("eval", eval_)
    parser.add_argument("--data", help="by default that of the training")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--by-class", action="store_true", help="also the inputs of each class alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    with _words("eval"):
        from genkern import plots, random

        model, run = load_run(arguments.folder, arguments.device)
        source = _data_of(arguments, run)
        parts = [source, *(source.by_class().values() if arguments.by_class else ())]
        measure = lambda part: model.evaluate(*part.split(arguments.split), key=random.key(arguments.seed), likelihood=True)
        found = [measure(part) for part in parts]
        if arguments.json:
            classes = dict(zip(source.class_names, found[1:], strict=False))
            facts = {"split": arguments.split, "n": len(source.split(arguments.split)[0]), **found[0]}
            print(json.dumps(facts | ({"classes": classes} if classes else {}), indent=1))
        else:
            rows = [{"on": f"{arguments.split} of {part.name}", **values} for part, values in zip(parts, found, strict=True)]
            print(plots.table(rows, _width()))
            for part, values in zip(parts, found, strict=True) if hasattr(model, "bits_per_dim") else ():
                _print_against_baselines(values, part, arguments.split, model)


@command
def score(argv):
    """The log-likelihood of each input under a trained model: genkern score run --data new.npy --out scores.npy

    In nats per input; of uint8 inputs the model's bound, with one key per input. Prints the spread and the inputs that surprise most.
    """
    parser = _run_parser("score", score)
    parser.add_argument("--data", help="by default that of the training")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test", "all"))
    parser.add_argument("--out", help="a .npy for the numbers, in the order of the inputs")
    parser.add_argument("--batch-size", type=_at_least(1), default=256)
    parser.add_argument("--lowest", type=_at_least(0), default=5, help="how many of the most surprising inputs are listed")
    arguments = parser.parse_args(argv)
    with _words("score"):
        import torch

        from genkern import plots, random

        if arguments.out:
            _writable(arguments.out, ".npy")
        model, run = load_run(arguments.folder, arguments.device)
        if not hasattr(model, "log_prob"):
            raise ValueError(f"a {type(model).__name__} has no log_prob")
        source = _data_of(arguments, run)
        parts = ("train", "validation", "test") if arguments.split == "all" else (arguments.split,)
        inputs = torch.cat([source.split(part)[0] for part in parts])
        labels = None if source.train[1] is None else torch.cat([source.split(part)[1] for part in parts])
        batches = model.batches(inputs, labels, random.key(arguments.seed), arguments.batch_size)
        with torch.no_grad():
            scores = torch.cat([model.log_prob(x, key=k, **conditions).double().cpu() for x, k, conditions in batches])
        order = scores.argsort()
        quantile = lambda q: float(scores[order[min(len(order) - 1, int(q * len(order)))]])
        row = {"inputs": len(scores), "mean": float(scores.mean()), "std": float(scores.std(correction=0))}
        print(plots.table([row | {"least": quantile(0), "5 %": quantile(0.05), "median": quantile(0.5), "most": float(scores.max())}]))
        listed = order[: arguments.lowest].tolist()
        if listed:
            of = lambda i: {} if labels is None else {"class": source.class_names[int(labels[i])]}
            print(plots.table([{"input": i, **of(i), "log_prob": float(scores[i])} for i in listed]))
        if arguments.out:
            import numpy as np

            _save(Path(arguments.out), lambda file, **_: np.save(file, scores.numpy()))
            print(f"wrote {arguments.out}")


@command
def traverse(argv):
    """Walk along each direction of a model's latent space, a row of images each: genkern traverse run --out traverse.png"""
    parser = _run_parser("traverse", traverse)
    parser.add_argument("--steps", type=_at_least(1), default=9)
    parser.add_argument("--out", default="traverse.png")
    arguments = parser.parse_args(argv)
    with _words("traverse"):
        from genkern import plots, random

        out = _writable(arguments.out, ".png")
        model, _ = load_run(arguments.folder, arguments.device)
        if not hasattr(model, "traverse"):
            raise ValueError(f"{type(model).__name__} has no latent directions to traverse")
        if len(getattr(model.config, "shape", (1, 1, 1))) != 3:
            raise ValueError(f"this {type(model).__name__} is not of images: there is nothing to show")
        images = model.traverse(steps=arguments.steps, key=random.key(arguments.seed))
        _save(out, plots.grid(images, levels=getattr(model.config, "levels", None)).save)
        print(f"wrote {out}")


def model_names():
    """{name at the command line: class}: BetaVAE is beta-vae."""
    from genkern.models._base import MODELS

    return dict(sorted((_kebab(name), kind) for name, kind in MODELS.items() if hasattr(kind, "Config")))


def model_class(name):
    """The class of a name; conditional-vae also answers to ConditionalVAE, conditionalvae and, where no other does, cvae."""
    names = model_names()
    plain = lambda text: re.sub("[-_]", "", text).lower()
    initials = lambda text: "".join(word[0] for word in text.split("-")[:-1]) + text.split("-")[-1]
    found = [kind for full, kind in names.items() if plain(full) == plain(name)]
    found = found or [kind for full, kind in names.items() if "-" in full and initials(full) == name.lower()]
    if len(found) == 1:
        return found[0]
    close = difflib.get_close_matches(name.lower(), [*names, *map(initials, names)], 1)
    raise ValueError(f"no model {name!r}; " + (f"did you mean {close[0]!r}?" if close else f"the models are {', '.join(names)}"))


def load_run(folder, device=None):
    """(the model, what run.json says) of a folder that fit() or save_pretrained() wrote."""
    from genkern import models

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if (folder / "run.json").exists() and not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder} holds a run that has not finished an epoch, or not its first stage")
    device, run = _device(device), {}
    if (folder / "run.json").exists():
        try:
            run = json.loads((folder / "run.json").read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{folder / 'run.json'} cannot be used: {error}") from error
        if not isinstance(run, dict) or not isinstance(run.get("data", ""), str):
            raise ValueError(f"{folder / 'run.json'} cannot be used: it must be an object, and its data a name")
    return models.load(folder).to(device), run


def _data_of(arguments, run):
    """The data set of --data, by default that of the training."""
    from genkern import data

    if not (name := arguments.data or run.get("data")):
        raise ValueError(f"{arguments.folder} does not name its data: give --data")
    return data.load(name, window=run.get("window"))


class _Parser(argparse.ArgumentParser):
    """argparse's, which says of a mistyped option which one may be meant and takes no part of one for it."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[a-z-]+)", message)
        close = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        super().error(message + (f"; did you mean {close[0]}?" if close else ""))


def _at_least(least):
    def read(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    read.__name__ = "int"  # what argparse names in its error
    return read


def _width():
    return shutil.get_terminal_size().columns


def _device(name, local=0):
    """The name of a device that is here: by default the GPU of this number, where there is one."""
    import torch

    if name is None:
        return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def _writable(out, *suffixes):
    """The path of --out, looked at before the work is done."""
    path = Path(out)
    if path.suffix not in suffixes:
        raise ValueError(f"--out must end in {' or '.join(suffixes)}, got {out}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}")
    if path.is_dir():
        raise IsADirectoryError(f"--out is a folder, expected a file: {out}")
    return path


def _run_parser(name, function):
    parser = _Parser(prog=f"genkern {name}", description=function.__doc__)
    parser.add_argument("folder", help="of the run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    return parser


def _print_against_baselines(values, source, split, model):
    """A model's figure on a split beside those of models that need no training loop."""
    from genkern.metrics import baselines

    if "bits_per_dim" in values:
        name, unit, own = "bits_per_dim", "bits per dimension", values["bits_per_dim"]
        scale = 1.0
    elif source.levels is None and "log_prob" in values:  # densities: nats per input
        name, unit, own = "log_prob", "nats per input, -log density", -values["log_prob"]
        scale = math.prod(source.shape) * math.log(2)
    else:
        return
    found = {f"the model ({name})": own, **{other: bits * scale for other, bits in baselines(source, split, model).items()}}
    print(f"{split} of {source.name}, {unit}: " + ", ".join(f"{who} {value:.3f}" for who, value in found.items()))


def sample_options(model):
    """{name: (reader of its text, default)} of what model.sample takes by keyword, beside what the command itself gives.

    Its annotation says of what type an option is, or else its default; what neither tells is not offered.
    """
    method, options = type(model).sample, {}
    own = {"folder", "seed", "device", "n", "label", "strip", "out"}
    given, hints = {"key", "generator", "batch_size", *own, *model.conditions}, typing.get_type_hints(method)
    for name, parameter in inspect.signature(method).parameters.items():
        hint = hints.get(name, type(parameter.default))
        kinds = typing.get_args(hint) or (hint,)
        if parameter.kind is parameter.KEYWORD_ONLY and name not in given and {int, float, str, bool} & set(kinds):
            options[name] = _reader(hint), parameter.default
    return options


def _draw(model, n, seed, label=None, strip=False, **options):
    """n samples; those of a model of classes with the given label (text), or with all in turn. strip: rows from noise to image."""
    from genkern import random

    draw, key = model.denoising if strip else model.sample, random.key(seed)
    if "labels" not in model.conditions:
        if label is not None:
            raise ValueError(f"{type(model).__name__} knows no labels: leave --label out")
        return draw(n, key=key, **options)
    return draw(n, key=key, labels=labels(model, n, label), **options)


def labels(model, n, label=None):
    """Labels of n samples, (n,) or (n, L) for a model of token sequences: all that of a text such as "3" or "3,1,4", or all in turn."""
    import torch

    classes, device = model.config.classes, next(model.parameters()).device
    if label is None:
        return model.labels_in_turn(n) if hasattr(model, "labels_in_turn") else torch.arange(n, device=device) % classes
    try:
        values = [int(part) for part in label.split(",")]
    except ValueError:
        raise ValueError(f"--label must be a number, or several as in 3,1,4, got {label!r}") from None
    sequence = getattr(model.config, "tokens", 0)
    if len(values) > max(sequence, 1):
        raise ValueError(f"--label: this model takes at most {max(sequence, 1)}, got {len(values)}")
    for value in values:
        if not 0 <= value < classes:
            raise ValueError(f"--label must be in 0..{classes - 1}, got {value}")
    return torch.tensor([values] * n, device=device) if sequence else torch.full((n,), values[0], device=device)


def _grid(model, values):
    from genkern import plots

    if values.dim() < 4:
        shape = tuple(values.shape[1:])
        raise ValueError(f"samples of {type(model).__name__} are no images but {shape}: give an --out of .npy, or .txt for text")
    return plots.grid(values, levels=getattr(model.config, "levels", None))


def _sound(path, sounds, rate):
    """sounds (N, 1, L) one behind the other into a .wav, and their spectrograms into the .png beside it; of a .png, that alone."""
    import wave

    import torch

    from genkern import plots

    if path.suffix == ".wav":
        row = torch.nn.functional.pad(sounds[:, 0].cpu().float(), (0, rate // 8)).flatten()  # a moment of silence behind each
        samples = (row.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().astype("<i2").tobytes()

        def save(file):
            with wave.open(file, "wb") as out:
                out.setnchannels(1)
                out.setsampwidth(2)
                out.setframerate(rate)
                out.writeframes(samples)

        _save(path, save)
    _save(path.with_suffix(".png") if path.suffix == ".wav" else path, plots.spectrograms(sounds).save)


def _save(path, save, **settings):
    """Through save(file), whole or not at all."""
    import io

    from genkern.models._base import write

    file = io.BytesIO()
    save(file, **({"format": "png"} if path.suffix == ".png" else {}), **settings)
    write(path, file.getvalue())


@contextlib.contextmanager
def _words(name):
    """What a user can mend is one line and exit status 2, no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if os.environ.get("GENKERN_TRACEBACK"):
            raise
        print(f"genkern {name}: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(f"genkern {name}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


@contextlib.contextmanager
def _processes():
    """(rank, number of processes), joined where torchrun or accelerate launch started several."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        yield 0, 1
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield torch.distributed.get_rank(), world
        torch.distributed.barrier()  # the first process keeps the store: it must not leave while another still talks
    finally:
        torch.distributed.destroy_process_group()


def _kebab(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower()


def _reader(hint):
    """From text to a value of an annotated type: int, float, str, bool, a tuple of numbers (1,2,2), or one of these or None."""
    kinds = list(typing.get_args(hint)) if typing.get_origin(hint) in (types.UnionType, typing.Union) else [hint]
    optional = type(None) in kinds
    kinds = [kind for kind in kinds if kind is not type(None)]

    def number(text):
        try:
            return int(text)
        except ValueError:
            return float(text)

    def read(text):
        if optional and text.lower() == "none":
            return None
        kind = typing.get_origin(kinds[0]) or kinds[0]
        if kind is bool:
            if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
                raise ValueError
            return text.lower() in ("true", "yes", "1")
        return tuple(number(part) for part in text.split(",") if part) if kind in (tuple, list) else kind(text)

    read.__name__ = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)  # what argparse names in its error
    return read
