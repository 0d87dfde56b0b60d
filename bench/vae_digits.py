"""A real training run, eager against genkern: a small convolutional VAE on scikit-learn's handwritten digits.

    python bench/vae_digits.py [--epochs 60]

Three copies of one model train in lockstep on the same batches: genkern's (reparameterize_kl), plain torch with the same keyed noise
(the same loss curve is expected), and plain torch with torch.randn_like (what people write: the baseline of the time). Their steps
are interleaved, so that the ratio holds on a noisy machine. Writes bench/results/vae_digits.{json,png}.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import genkern
from genkern.data import digits
from genkern.models import VAE, Output, VAEConfig

RESULTS = Path(__file__).parent / "results"
BATCH, LEARNING_RATE, SEED = 64, 6e-3, 0


class EagerVAE(VAE):
    """The same model in plain torch."""

    def noise(self, mu, key):
        return torch.randn_like(mu)

    def forward(self, batch, *, key):
        x = self._images(batch)
        mu, log_var = self.encoder(x).chunk(2, 1)
        z = mu + torch.exp(0.5 * log_var) * self.noise(mu, key)
        kl = -0.5 * (1 + log_var - mu.pow(2) - log_var.exp()).sum(1).mean()
        nll = F.binary_cross_entropy_with_logits(self.decoder(z), (x + 1) / 2, reduction="none").flatten(1).sum(1).mean()
        return Output(nll + kl, {"nll": nll.detach(), "kl": kl.detach()})


class KeyedVAE(EagerVAE):
    def noise(self, mu, key):
        return genkern.random.normal(key, mu.shape)


class Run:
    def __init__(self, kind, steps):
        torch.manual_seed(SEED)
        self.model = kind(VAEConfig(levels=16))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=1e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, LEARNING_RATE, total_steps=steps)
        self.losses, self.seconds = [], []

    def step(self, batch, key):
        start = time.perf_counter()
        loss = self.model(batch, key=key).loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())


def saved_bytes(model, batch, key):
    """What autograd keeps between forward and backward, parameters aside."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(batch, key=key).loss.backward()
    model.zero_grad()
    return sum(size for size, _ in kept.values())


def baseline(train, test):
    """-log p in nats per image of independent pixels, each with its mean over the training images."""
    mean = (train / 16).mean(0).clamp(1e-3, 1 - 1e-3)
    x = test / 16
    return -(x * mean.log() + (1 - x) * (1 - mean).log()).flatten(1).sum(1).mean().item()


@torch.no_grad()
def held_out(model, images):
    keys = genkern.random.split(genkern.random.key(SEED + 2), 32)
    return statistics.fmean(model(images, key=key).loss.item() for key in keys)


def plot(path, runs, model, figures):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, samples) = pyplot.subplots(1, 2, figsize=(11, 4.5))
    for name, style in (("eager, same noise", "-"), ("genkern", ":")):
        curves.plot(runs[name].losses, style, label=name)
    curves.axhline(figures["baseline_nats"], color="grey", linewidth=1, label="independent pixels")
    curves.set(xlabel="step", ylabel="-ELBO, nats per image", ylim=(20, 40))
    curves.legend()
    tiles = torch.nn.functional.pad(model.sample(64, key=genkern.random.key(SEED + 3)), (1, 1, 1, 1))
    grid = tiles.view(8, 8, 10, 10).permute(0, 2, 1, 3).reshape(80, 80)
    samples.imshow(grid, cmap="gray_r")
    samples.set_axis_off()
    samples.set_title("samples")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=60)
    epochs = parser.parse_args().epochs
    torch.set_num_threads(1)
    train, test = digits("train")[0], digits("test")[0]
    per_epoch = len(train) // BATCH
    kinds = {"eager": EagerVAE, "eager, same noise": KeyedVAE, "genkern": VAE}
    runs = {name: Run(kind, epochs * per_epoch) for name, kind in kinds.items()}
    order = list(runs.values())
    shuffle = torch.Generator().manual_seed(SEED)
    keys = iter(genkern.random.split(genkern.random.key(SEED + 1), epochs * per_epoch))
    genkern.reset_stats()
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train), generator=shuffle)].split(BATCH)[:per_epoch]:
            key = next(keys)
            for run in order:
                run.step(batch, key)
            order.append(order.pop(0))
    stats = {f"{op} on {backend}": calls for (op, backend), calls in genkern.stats().items()}
    if not stats.get("reparameterize_kl on cpu"):
        raise SystemExit("the native kernel did not run; see python -m genkern info")

    a, b = (torch.tensor(runs[name].losses) for name in ("eager, same noise", "genkern"))
    difference = (a / b - 1).abs()
    tail = (a[-5 * per_epoch :].mean() / b[-5 * per_epoch :].mean() - 1).abs().item()
    if not (difference[:50].max() < 1e-4 and tail < 5e-3):
        raise SystemExit(f"the loss curves differ: {difference[:50].max():.1e} in 50 steps, {tail:.1e} at the end")
    milliseconds = {name: 1e3 * statistics.median(run.seconds) for name, run in runs.items()}
    pairs = zip(runs["eager"].seconds, runs["genkern"].seconds, strict=True)
    ratio = statistics.median(eager / ours for eager, ours in pairs)  # of the same step, so that load cancels
    batch, key = train[:BATCH], genkern.random.key(9)
    figures = {
        "milliseconds_per_step": milliseconds,
        "ratio_to_eager": ratio,
        "saved_bytes_per_step": {name: saved_bytes(run.model, batch, key) for name, run in runs.items()},
        "curve_difference_first_50_steps": difference[:50].max().item(),
        "curve_difference_largest": difference.max().item(),
        "curve_difference_last_5_epochs_mean": tail,
        "held_out_nats": {name: held_out(run.model, test) for name, run in runs.items()},
        "importance_bound_nats": -runs["genkern"].model.log_prob(test, key=genkern.random.key(7)).mean().item(),
        "baseline_nats": baseline(train, test),
        "epochs": epochs,
        "threads": 1,
        "calls": stats,
        "machine": platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "genkern": genkern.__version__,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "vae_digits.json").write_text(json.dumps(figures, indent=2) + "\n")
    plot(RESULTS / "vae_digits.png", runs, runs["genkern"].model, figures)

    print(f"digits VAE, {epochs} epochs, one thread, {figures['instruction_set']}, torch {torch.__version__}")
    for name in runs:
        print(
            f"  {name:18} {milliseconds[name]:7.2f} ms/step  {figures['saved_bytes_per_step'][name] / 2**20:6.2f} MiB saved"
            f"  held-out -ELBO {figures['held_out_nats'][name]:.2f} nats"
        )
    print(f"  independent pixels: {figures['baseline_nats']:.2f} nats; importance bound {figures['importance_bound_nats']:.2f}")
    print(f"  same noise, same curve: {difference[:50].max():.1e} relative in 50 steps, {tail:.1e} over the last 5 epochs")
    print(
        f"  time against eager: {ratio:.2f}x. The convolutions and the optimizer take nearly all of a step; "
        "the latent is 64 x 8 numbers"
    )


if __name__ == "__main__":
    main()
