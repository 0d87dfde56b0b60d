"""The gallery: trains a small default of every model that exists and writes one page of pictures with figures and times.

    make gallery                           # all of it, one part per core at a time: 19 minutes on two cores beside other work
    python bench/gallery.py vae glow       # these parts anew; the page keeps the others
    python bench/gallery.py vae --jobs 1   # one after the other, each with a progress bar of its own

Each part is `genkern train NAME --data DATA` with the settings of the table below, then held-out figures of the test split beside those
of simple baselines, samples, and of digits what an independent classifier says about 1080 of them (genkern.metrics.report).
Writes bench/results/gallery/: NAME.png, NAME.json, all.png, and README.md, the page.
"""

import argparse
import concurrent.futures
import dataclasses
import difflib
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch

import genkern
from genkern import cli, data, metrics, plots, train

FOLDER = Path(__file__).parent / "results" / "gallery"
PARTS = {  # name of the model: (data, settings beside its defaults, of Training or of its Config)
    "vae": ("digits", {"epochs": 60}),
    "beta-vae": ("digits", {"epochs": 60, "capacity": 5.0}),
    "conditional-vae": ("digits", {"epochs": 60}),
    "iwae": ("digits", {"epochs": 40}),
    "tcvae": ("digits", {"epochs": 60}),
    "ddpm": ("digits", {}),
    "latent-diffusion": ("digits32", {"epochs": 20}),
    "gan": ("digits", {}),
    "conditional-gan": ("digits", {}),
    "dcgan": ("digits", {}),
    "wgan": ("digits", {}),
    "wgangp": ("digits", {}),
    "nice": ("digits", {}),
    "real-nvp": ("digits", {}),
    "glow": ("digits", {"classes": 10}),
    "neural-spline-flow": ("digits", {}),
    "maf": ("digits", {}),
    "iaf": ("digits", {}),
    "made": ("digits", {}),
    "pixel-cnn": ("digits", {}),
    "gated-pixel-cnn": ("digits", {}),
    "pixel-rnn": ("digits", {}),
    "pixel-cnnpp": ("photos", {"width": 16, "epochs": 4, "learning_rate": 3e-3}),
    "char-lstm": ("topics", {}),
    "gpt": ("topics", {}),
    "wave-net": ("plucks", {}),
}


def run(name, progress=False):
    """Train one part; write its picture and figures; the seconds it took."""
    began = time.perf_counter()
    source_name, settings = PARTS[name]
    print(f"{name}: training on {source_name}", file=sys.stderr, flush=True)
    kind, source = cli.model_class(name), data.load(source_name)
    of_training = {field.name for field in dataclasses.fields(genkern.models.Training)}
    torch.manual_seed(0)
    model = kind(kind.config_for(source, **{k: v for k, v in settings.items() if k not in of_training}))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        history = train.fit(model, source, folder, progress=progress, **{k: v for k, v in settings.items() if k in of_training})
        model = genkern.models.load(folder)  # the best weights by validation loss
    seconds = time.perf_counter() - start
    held_out = model.evaluate(*source.test, key=genkern.random.key(1), likelihood=True)
    start = time.perf_counter()
    picture(name, model, source).save(FOLDER / f"{name}.png")
    facts = {
        "model": kind.__name__,
        "data": source_name,
        "settings": settings,
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": len(history),
        "training_seconds": round(seconds, 1),
        "sampling_seconds": round(time.perf_counter() - start, 1),
        "held_out": held_out,
        "baselines": metrics.baselines(source, "test", model) if "bits_per_dim" in held_out else {},
        "pictures": pictures(model, source),
        "judged": judged(model, source) if source_name == "digits" else {},
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "genkern": genkern.__version__,
    }
    (FOLDER / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    return time.perf_counter() - began


def pictures(model, source):
    """Of photographs the held-out bits per value of each, and its PNG's."""
    parts = source.by_class() if source.pictures else {}
    bits = {name: model.evaluate(*part.test, key=genkern.random.key(1), likelihood=True) for name, part in parts.items()}
    return {name: [bits[name]["bits_per_dim"], metrics.png_bits(part.pictures.values())] for name, part in parts.items()}


def judged(model, source, n=1080):
    labels = {"labels": cli.labels(model, n)} if "labels" in model.conditions else {}
    return metrics.report(model.sample(n, key=genkern.random.key(3), **labels), source, **labels)


def picture(name, model, source):
    """A PIL image of samples: a grid of images, lines of text, or waves."""
    key = genkern.random.key(2)
    images = len(source.shape) == 3
    n = 64 if images and source.shape[-1] < 32 else 16 if images else 4
    labels = {"labels": cli.labels(model, n)} if "labels" in model.conditions else {}
    samples = model.sample(n, key=key, **labels)
    if images:
        return plots.grid(samples, levels=source.levels)
    import io

    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(3.2, 3.2), dpi=100)
    if source.levels is None:
        for axes, wave in zip(figure.subplots(n, 1), samples.flatten(1), strict=True):
            axes.plot(wave, linewidth=0.6)
            axes.set_axis_off()
    else:
        lines = b"\n\n".join(bytes(x.tolist()) for x in samples).decode("latin-1").expandtabs(2).splitlines()
        text = "\n".join(part for line in lines for part in (line[i : i + 40] for i in range(0, max(1, len(line)), 40)))
        figure.text(0.02, 0.98, text.replace("$", r"\$"), family="monospace", size=7, va="top")
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return Image.open(file).convert("L")


def page():
    """README.md and all.png of the parts that have been run."""
    from matplotlib.figure import Figure
    from PIL import Image

    done = {name: json.loads((FOLDER / f"{name}.json").read_text()) for name in PARTS if (FOLDER / f"{name}.json").exists()}
    if not done:
        return
    lines = [
        "# Gallery",
        "",
        "Made by `make gallery`: small models, seconds to minutes of training on one core. Figures are means over the test split.",
        "",
    ]
    lines += ["Of digits an independent classifier judges 1080 samples; in brackets what it says of as many held-out digits.", ""]
    lines += ["| samples | model | held-out figures | samples judged | |", "|---|---|---|---|---|"]
    for name, facts in done.items():
        figures = [f"{title.replace('_', ' ')} {value:.3f}" for title, value in facts["held_out"].items()]
        figures = "<br>".join([*figures, *(f"*{title} {value:.3f}*" for title, value in facts["baselines"].items())])
        figures += "".join(f"<br>{title} {bits:.3f} (*PNG {png:.3f}*)" for title, (bits, png) in facts.get("pictures", {}).items())
        settings = "".join(f" --{k.replace('_', '-')} {v}" for k, v in facts["settings"].items())
        made = f"{facts['parameters']:,} parameters<br>{facts['epochs']} epochs in {facts['training_seconds']:.0f} s"
        command = f"`genkern train {name} --data {facts['data']}{settings}`"
        sample = f'<img src="{name}.png" width="240">'
        lines.append(f"| {sample} | **{facts['model']}**<br>{command} | {figures} | {verdict(facts['judged'])} | {made} |")
    (FOLDER / "README.md").write_text("\n".join(lines) + "\n")
    columns = 5
    rows = -(-len(done) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.4 * rows), dpi=90, layout="constrained")
    cells = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in cells:
        axes.set_axis_off()
    for axes, (name, facts) in zip(cells, done.items(), strict=False):
        axes.imshow(Image.open(FOLDER / f"{name}.png"), cmap="gray", interpolation="nearest")
        axes.set_title(f"{facts['model']}, {facts['training_seconds']:.0f} s", size=9)
    figure.savefig(FOLDER / "all.png")


def verdict(report):
    """The lines of a cell."""
    if not report:
        return ""
    pairs = [(name, report[name], report[f"{name}_real"]) for name in ("accuracy", "frechet", "precision", "recall") if name in report]
    lines = [f"{name} {value:.3f} ({real:.3f})" for name, value, real in pairs]
    shares = f"classes {min(report['shares']):.3f} to {max(report['shares']):.3f}"
    return "<br>".join([*lines, shares, f"copies {report['copies']:.3f} (0.010)"])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"by default all: {', '.join(PARTS)}")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="parts at a time, one thread each")
    given = parser.parse_args(argv)
    wanted = given.parts or list(PARTS)
    for name in wanted:
        if name not in PARTS:
            close = difflib.get_close_matches(name, PARTS, 1)
            parser.error(f"no part {name!r}" + (f"; did you mean {close[0]!r}?" if close else f"; the parts are {', '.join(PARTS)}"))
    FOLDER.mkdir(parents=True, exist_ok=True)
    start, failed = time.perf_counter(), []
    for i, (name, outcome) in enumerate(outcomes(wanted, min(given.jobs, len(wanted))), 1):
        try:
            print(f"[{i}/{len(wanted)}] {name}: {outcome():.0f} s", file=sys.stderr, flush=True)
        except Exception as error:  # the other parts are worth having
            failed.append(name)
            print(f"[{i}/{len(wanted)}] {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        page()
    print(f"wrote {FOLDER / 'README.md'} in {(time.perf_counter() - start) / 60:.1f} minutes")
    return f"failed: {', '.join(failed)}" if failed else 0


def outcomes(wanted, jobs):
    """(name, a function that returns what run(name) does), in the order in which they end."""
    if jobs <= 1:
        for name in wanted:
            yield name, functools.partial(run, name, progress=True)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,)) as pool:
        parts = {pool.submit(run, name): name for name in reversed(wanted)}  # the longest parts are the last of the table
        for part in concurrent.futures.as_completed(parts):
            yield parts[part], part.result


if __name__ == "__main__":
    sys.exit(main())
