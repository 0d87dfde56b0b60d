"""Judge of a trained conditional model of digits, by measures that are independent of it.

    genkern train ddpm --data digits --out run
    python bench/judge_digits.py run [--n 1000] [--set guidance_scale=1.5 --set steps=50 ...]

Any run folder of a model that samples by label, on --data digits (DDPM, conditional VAE, conditional GAN) or digits32
(LatentDiffusion). A support vector machine trained on real digits says whether a sample shows its label; the Frechet distance,
precision, recall, density and coverage are on features of a small perceptron trained on them (genkern.metrics); beside them stand
those of the held-out images. A sample of digits32 is cut into its quarters, each brought back to 8 x 8, and the real digits are
doubled and halved alike: each quarter must show its token, or be empty where there is none. Prints a table, writes FOLDER/judge.json.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

import genkern
from genkern import cli, data, metrics

PAIRS = {  # measure: (of the samples, of held-out images, what it says)
    "accuracy": ("accuracy", "accuracy_real", "show their label"),
    "Frechet distance": ("frechet", "frechet_real", "to the training images"),
    "precision": ("precision", "precision_real", "like the training images"),
    "recall": ("recall", "recall_real", "as varied as they"),
    "density": ("density", "density_real", ""),
    "coverage": ("coverage", "coverage_real", ""),
    "nearest training image": ("nearest", "nearest_real", "median, root mean square of ink"),
    "copies": ("copies", None, "nearer to one than 99 % of held-out images: 0.01 expected"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=X", help="an option of the model's sample()")
    arguments = parser.parse_args(argv)
    try:
        model, run = cli.load_run(arguments.folder, "cpu")
        settings = read_options(model, arguments.set)
        found = judge(model, run.get("data"), arguments.n, arguments.seed, settings)
    except (ValueError, OSError, TypeError) as error:
        parser.error(str(error))
    print(table(found))
    (arguments.folder / "judge.json").write_text(json.dumps(found, indent=1) + "\n")


def read_options(model, texts):
    known, settings = cli.sample_options(model), {}
    for text in texts:
        name, _, value = text.partition("=")
        name = name.replace("-", "_")
        if name not in known:
            raise ValueError(f"no option {name!r} of {type(model).__name__}.sample; it has {', '.join(known) or 'none'}")
        settings[name] = known[name][0](value)
    return settings


def judge(model, source_name, n, seed=0, settings=None):
    """The figures of n samples with their labels, as a dict."""
    if "labels" not in model.conditions:
        raise ValueError(f"{type(model).__name__} does not sample by label")
    if source_name not in ("digits", "digits32"):
        raise ValueError(f"the run must be of digits or digits32, got {source_name!r}")
    digits, composed = data.load("digits"), source_name == "digits32"
    if composed:
        digits = dataclasses.replace(digits, **{split: softened(digits.split(split)) for split in data.SPLITS})
    labels = prompts(n) if composed else torch.arange(n) % 10
    start = time.perf_counter()
    samples = model.sample(n, labels=labels, key=genkern.random.key(seed), **(settings or {}))
    seconds = time.perf_counter() - start
    classifier = metrics.Classifier.of(digits)
    facts = {"model": type(model).__name__, "data": source_name, "n": n, "seed": seed, "settings": settings or {}}
    if composed:
        facts["empty_quarters_empty"], samples, labels = quarters(samples, labels)
    figures = metrics.report(samples, digits, labels, classifier=classifier)
    return facts | {"sampling_seconds": round(seconds, 1), "threads": torch.get_num_threads()} | figures


def prompts(n):
    """(n, 4) of one to four digits in turn, padded by 10."""
    labels = (torch.arange(n)[:, None] * torch.tensor([1, 3, 7, 9]) + torch.tensor([0, 1, 2, 3])) % 10
    return labels.masked_fill(torch.arange(4) >= 1 + torch.arange(n)[:, None] // 10 % 4, 10)


def softened(part):
    """Digits doubled and halved in size, as those of digits32 are in quarters()."""
    images, labels = part
    large = torch.nn.functional.interpolate(images.float(), scale_factor=2, mode="bilinear")
    return torch.nn.functional.avg_pool2d(large, 2).round().to(torch.uint8), labels


def quarters(samples, labels):
    """(share of the quarters without a token that are empty, the others as 8 x 8 images of the levels 0..16, their labels)."""
    tiles = samples.float().unfold(2, 16, 16).unfold(3, 16, 16).reshape(-1, 1, 16, 16)  # (N, 1, 2, 2, 16, 16), in reading order
    small = (torch.nn.functional.avg_pool2d(tiles, 2) * (16 / 255)).round().to(torch.uint8)
    filled = labels.flatten() != 10
    empty = small[~filled].flatten(1).float().mean(1) < 0.5  # of 16 levels; a digit has about 5
    return float(empty.double().mean()), small[filled], labels.flatten()[filled]


def table(found):
    lines = [
        f"{found['model']}, {found['n']} samples of {found['data']} in {found['sampling_seconds']:.0f} s {found['settings'] or ''}"
    ]
    lines += [f"{'':24}{'samples':>9}{'held out':>10}"]
    for title, (mine, real, note) in PAIRS.items():
        lines.append(f"{title:24}{found[mine]:9.3f}" + (f"{found[real]:10.3f}" if real else " " * 10) + f"  {note}".rstrip())
    lines.append(f"classes, share of each: {' '.join(f'{share:.3f}' for share in found['shares'])}")
    if "empty_quarters_empty" in found:
        lines.append(f"quarters without a token that are empty: {found['empty_quarters_empty']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
