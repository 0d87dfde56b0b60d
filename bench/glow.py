"""Glow trained and judged: on 32 x 32 RGB patches of two photographs, and on digits with their classes.

    python bench/glow.py            # both parts, some minutes each on one thread
    python bench/glow.py photos --runs runs        # keeps the runs there, and goes on with one that was broken off

photos: bits per dimension of each photograph's held-out quarter, for Glow (its dequantization bound, and the tighter one of 16 draws)
and for two models that need no training loop, all fitted to the other three quarters of both photographs.
digits: the same figures of a class-conditional Glow, and what an independent classifier says of 1080 samples, as many of each class.
Writes bench/results/glow.json, and glow_photos.png and glow_digits.png: samples (of digits a column for each class) and, in the last
rows, ways through the latent space between two samples.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path

import torch

import genkern
from genkern import data, metrics, plots, random, train
from genkern.models import Glow, Training

FOLDER = Path(__file__).parent / "results"
PARTS = {
    "photos": {
        "scales": 4,
        "steps": 6,
        "width": 32,
        "positions": False,
        "transform": "center",
        "epochs": 14,
        "batch_size": 32,
    },
    "digits": {"classes": 10},
}


def run(part, settings, runs):
    """Train one part; its figures, and a picture."""
    source, of_training = data.load(part), {field.name for field in dataclasses.fields(Training)}
    torch.manual_seed(0)
    model = Glow(Glow.config_for(source, **{k: v for k, v in settings.items() if k not in of_training}))
    with contextlib.nullcontext(runs) if runs else tempfile.TemporaryDirectory() as folder:
        folder = Path(folder) / part
        cpu = time.process_time()
        history = train.fit(model, source, folder, resume=True, **{k: v for k, v in settings.items() if k in of_training})
        cpu = time.process_time() - cpu
        model = genkern.load(folder)  # the best weights by validation loss
    facts = {
        "command": f"genkern train glow --data {part}" + "".join(f" --{k.replace('_', '-')} {v}" for k, v in settings.items()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": len(history),
        "training_cpu_seconds": round(cpu, 1),
        "test_bits_per_dim": figures(model, source),
    }
    if model.config.classes:
        asked = torch.arange(1080) % model.config.classes
        facts["judged"] = metrics.report(model.sample(1080, labels=asked, key=random.key(3)), source, labels=asked)
    picture(model, source).save(FOLDER / f"glow_{part}.png")
    return facts


def figures(model, source):
    """{class, or "all": {who: bits per dimension}} on the test split."""
    inputs, labels = source.test
    keys, conditions = random.split(random.key(1), len(inputs)), {"labels": labels} if model.config.classes else {}
    with torch.no_grad():
        nats = {
            "glow": model.log_prob(inputs, key=keys, **conditions),
            "glow, 16 draws": model.log_prob(inputs, key=keys, samples=16, **conditions),
            "full-covariance Gaussian": metrics.Gaussian(source).log_prob(inputs),
            "per-pixel histogram": metrics.histogram_log_prob(source, inputs),
        }
    groups = {name: labels == i for i, name in enumerate(source.class_names)} | {"all": labels >= 0}
    bits = lambda x: round(-float(x.double().mean()) / (math.prod(source.shape) * math.log(2)), 4)
    return {name: {who: bits(x[chosen]) for who, x in nats.items()} for name, chosen in groups.items()}


def picture(model, source):
    """Five rows of samples and three of ways between two of them."""
    classes = model.config.classes
    columns = classes or 9
    labels = {"labels": torch.arange(5 * columns) % classes} if classes else {}
    samples = model.sample(5 * columns, key=random.key(2), temperature=0.8, **labels)
    between = model.traverse(steps=columns, rows=3, key=random.key(4)).flatten(0, 1)
    return plots.grid(torch.cat([samples, between]), levels=source.levels, columns=columns)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=PARTS, default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--runs", help="a folder for the runs; by default they are thrown away")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = FOLDER / "glow.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for part in arguments.parts:
        found[part] = run(part, PARTS[part], arguments.runs)
        facts = {"torch": torch.__version__, "genkern": genkern.__version__, "threads": 1}
        found[part] |= facts | {"instruction_set": torch.backends.cpu.get_cpu_capability()}
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found[part], indent=1))


if __name__ == "__main__":
    main()
