"""One training loop for every model.

    import genkern.data, genkern.train
    from genkern.models import VAE

    data = genkern.data.load("digits")
    model = VAE(VAE.config_for(data))
    history = genkern.train.fit(model, data, out="run", epochs=20)     # or: genkern train vae --data digits --out run --epochs 20
    best = genkern.load("run")

Order and noise come from (seed, epoch, step) by genkern.random, one stream per sample. So a run that was killed and resumed ends with
the weights of an unbroken one, bit for bit on the same machine (on a GPU as far as its kernels are deterministic). And the processes
that torchrun starts train together as one does, up to the rounding of sums: each takes its slice of every batch, and the gradients
are averaged. Buffers such as running means stay those of the first process.

A model that one device cannot hold is divided by FSDP before fit(): each process then keeps a part of every weight, gradient, average
and optimizer state, and what is written is the same as ever. Which parts are gathered at a time is the caller's choice:

    for part in (model.encoder, model.decoder, model): torch.distributed.fsdp.fully_shard(part)
    fit(model, data, out="run")                                                                  # genkern.load("run"): one whole model

A model is a plain torch module, so accelerate (the extra `distributed`) goes around it too, in a loop of one's own with the keys of
this process's samples:

    model, optimizer = accelerator.prepare(model, optimizer)
    keys = random.split(random.fold_in(key, step), batch_size)[rank * n : (rank + 1) * n]        # n = batch_size / world
    accelerator.backward(model(batch[rank * n : (rank + 1) * n], key=keys).loss)                 # gradients of the whole batch

The folder `out` holds config.json and model.safetensors (the best weights by validation loss, for load()), last.safetensors (all that
resuming needs), run.json (the settings) and history.json.
"""

import contextlib
import dataclasses
import json
import math
import sys
import time
from pathlib import Path

import torch

from genkern import checkpoint, random
from genkern._version import __version__
from genkern.data import check_data
from genkern.models._base import Model, Training, is_sharded, write
from genkern.ops._common import check_choice, check_int, check_number

FILES = ("config.json", "model.safetensors", "last.safetensors", "run.json", "history.json")


def fit(model, data, out=None, *, resume=False, seed=0, save_every=None, validate=True, progress=True, **training):
    """Train on data.train, keep the best weights by the loss on data.validation; the history, one dict per epoch.

    model: a genkern model, also one inside torch.compile or divided by fully_shard; it is trained where it lies. Left in evaluation
    mode with its last weights (their average where `ema` is set); the best ones are in `out`.
    out: a folder; None writes nothing. resume: go on from out/last.safetensors, or begin where there is none. seed: of order and noise.
    validate: False leaves data.validation alone, and the loss in training says which weights are best. progress: lines on stderr.
    save_every: steps between checkpoints within an epoch, beside the one after it. training: the fields of Training,
    by default the model's own. Each epoch leaves out the last len(train) % batch_size samples of its shuffled order.
    """
    core = _core("fit", model)
    check_data("fit", data)
    settings = _settings(core, training)
    shuffle, noise, validation = random.split(random.key(seed), 3)
    if save_every is not None:
        check_int("fit", "save_every", save_every)
    if resume and out is None:
        raise ValueError("fit: resume needs the folder `out`")
    inputs, labels = data.train
    if "labels" in core.conditions and labels is None:
        raise ValueError(f"fit: {type(core).__name__} needs labels, and {data.name} has none")
    rank, world = _rank_and_world()
    batch_size = min(settings.batch_size, len(inputs)) // world * world
    if batch_size == 0 or settings.batch_size % world:
        raise ValueError(f"fit: the batch of {settings.batch_size} must divide into {world} processes")
    run = _Run(core, settings, seed, len(inputs) // batch_size)
    folder = None if out is None else Path(out)
    facts = {"genkern": __version__, "class": core.kind, "data": data.name, "window": data.window, "seed": seed}
    facts.update(training=dataclasses.asdict(settings), config=dataclasses.asdict(core.config))
    facts = json.loads(json.dumps(facts))  # tuples are lists, as they come back
    _begin(run, folder, facts, resume)
    device = next(core.parameters()).device
    sharded = is_sharded(core.parameters())
    takes_part = sharded or rank == 0  # in evaluating and saving: a sharded model needs all its parts
    evaluate = _gathering(core, "evaluate") if sharded else core.evaluate
    save = (lambda: run.save(folder, facts)) if folder is not None and takes_part else lambda: None
    bar = _bar(run, settings.epochs, progress and rank == 0)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), contextlib.closing(bar):
        while run.epoch < settings.epochs:
            order = torch.argsort(random.bits(random.fold_in(shuffle, run.epoch), (len(inputs),), dtype=torch.int64))
            start = time.perf_counter()
            core.train()
            while run.step < run.steps_per_epoch:
                step = run.epoch * run.steps_per_epoch + run.step
                mine = slice(rank * batch_size // world, (rank + 1) * batch_size // world)
                index = order[run.step * batch_size : (run.step + 1) * batch_size][mine]
                step_key = random.fold_in(noise, step)
                keys = random.split(step_key, batch_size)[mine]
                conditions = {"labels": labels[index].to(device)} if "labels" in core.conditions else {}
                torch.manual_seed(int(step_key[0]) ^ rank)  # for what draws without a key, such as dropout
                run.train_step(model, inputs[index].to(device), keys.to(device), conditions, step, world)
                bar.step(run)
                if save_every and run.step % save_every == 0 and run.step < run.steps_per_epoch:
                    run.share_sums(world)
                    save()
            run.share_sums(world)
            core.eval()
            row = {"epoch": run.epoch + 1, **run.means()}
            if takes_part:
                with run.averaged_weights():
                    found = evaluate(*data.validation, key=validation) if validate else {}
                    row.update({f"validation_{name}": x if math.isfinite(x) else None for name, x in found.items()})
                    row["seconds"] = time.perf_counter() - start
                    run.finish_epoch(row)
                    measure = row.get("validation_loss", row["loss"])
                    better = measure is not None and (run.best is None or measure < run.best)
                    if _first_decides(lambda better=better: better, device) if sharded else better:
                        run.best = measure
                        if folder is not None:
                            core.save_pretrained(folder)  # before `last`, which says that it exists
                save()
                bar.epoch(row)
            else:
                run.finish_epoch(row)
            if world > 1:
                torch.distributed.barrier()
    run.keep_average()
    core.eval()
    return run.history


def sample(model, n, *, key, batch_size=256, **conditions):
    """model.sample(n, key=key, ...) with the work divided among the processes: each returns all n samples, the same as one alone.

    For models whose sample() takes one key per sample. conditions: tensors with n rows, or the same for all. With a sharded model,
    whose parts come together for each layer, all processes draw all samples.
    """
    model = _core("sample", model)
    check_int("sample", "n", n, 0)
    if is_sharded(model.parameters()):
        return _gathering(model, "sample")(n, key=random.split(key, n), batch_size=batch_size, **conditions)
    rank, world = _rank_and_world()
    share = -(-n // world)
    mine = slice(min(n, rank * share), min(n, (rank + 1) * share))
    rows = {name: x[mine] if isinstance(x, torch.Tensor) and x.dim() and len(x) == n else x for name, x in conditions.items()}
    part = model.sample(mine.stop - mine.start, key=random.split(key, n)[mine], batch_size=batch_size, **rows)
    if world == 1:
        return part
    padded = part.new_zeros((share, *part.shape[1:]))  # a gather needs equal parts
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in range(world)]
    torch.distributed.all_gather(parts, padded)
    return torch.cat(parts)[:n]


def _core(name, model):
    """The genkern model inside torch.compile's or DistributedDataParallel's."""
    core = getattr(model, "_orig_mod", model)
    core = core.module if isinstance(core, torch.nn.parallel.DistributedDataParallel) else core
    if not isinstance(core, Model):
        raise TypeError(f"{name}: model must be one of genkern.models, got {type(core).__name__}")
    return core


class _Run:
    """What changes in training, and so what a checkpoint holds."""

    def __init__(self, model, settings, seed, steps_per_epoch):
        self.model, self.settings, self.steps_per_epoch = model, settings, steps_per_epoch
        self.objectives = {name: list(parameters) for name, parameters in model.objectives().items()}
        self.optimizers = {name: model.optimizer(parameters, settings) for name, parameters in self.objectives.items()}
        self.rates = {name: [g["lr"] for g in o.param_groups] for name, o in self.optimizers.items()}
        self.epoch, self.step, self.best, self.history = 0, 0, None, []
        self.sums, self.counts = {}, {}  # of this epoch's losses, tensors on the device: no wait per step; and of how many steps
        self.restart_ema()

    def restart_ema(self):
        named = self.model.averaged() if self.settings.ema is not None else {}
        self.ema = {name: p.detach().clone() for name, p in named.items()}

    def train_step(self, model, x, keys, conditions, step, world):
        several, total = len(self.objectives) > 1, self.settings.epochs * self.steps_per_epoch
        for name, parameters in self.objectives.items():
            if not self.model.due(name, step):
                continue
            with torch.autocast(x.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"):
                loss, parts = model(x, key=keys, **conditions, **({"objective": name} if several else {}))
            self.model.zero_grad(set_to_none=True)
            loss.backward()
            if world > 1:
                _average([p.grad for p in parameters if p.grad is not None and not is_sharded([p])], world)
            if self.settings.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip_grad_norm)
            optimizer = self.optimizers[name]
            for group, rate in zip(optimizer.param_groups, self.rates[name], strict=True):
                group["lr"] = rate * _scale(self.settings, step, total)
            optimizer.step()
            for part, value in {name: loss.detach(), **parts}.items():
                value = torch.as_tensor(value, device=x.device).detach().to(_wide(x.device))
                self.sums[part] = self.sums[part] + value if part in self.sums else value
                self.counts[part] = self.counts.get(part, 0) + 1
        self.model.zero_grad(set_to_none=True)
        if self.ema:
            with torch.no_grad():
                for name, p in self.model.averaged().items():
                    self.ema[name].lerp_(p, 1 - self.settings.ema)
        self.step += 1

    def share_sums(self, world):
        """The mean over the processes; an error if a loss has become no number, before it is kept."""
        if world > 1:
            together = torch.stack(list(self.sums.values()))
            torch.distributed.all_reduce(together)
            self.sums = dict(zip(self.sums, together / world, strict=True))
        for name, total in self.sums.items():
            if not math.isfinite(total):
                words = "try a smaller learning_rate or clip_grad_norm"
                raise FloatingPointError(f"fit: {name} is {float(total)} in epoch {self.epoch + 1}; {words}")

    def means(self):
        values = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        return {"loss": values.get(next(iter(self.objectives))), **values}  # None: not trained in this epoch

    def finish_epoch(self, row):
        self.history.append(row)
        self.epoch, self.step, self.sums, self.counts = self.epoch + 1, 0, {}, {}

    def averaged_weights(self):
        return _Swapped(self.model, self.ema)

    def keep_average(self):
        with torch.no_grad():
            for name, p in self.model.averaged().items():
                if name in self.ema:
                    p.copy_(self.ema[name])

    def save(self, folder, facts):
        state = {"run": facts, "epoch": self.epoch, "step": self.step, "best": self.best, "history": self.history,
                 "sums": {name: float(total) for name, total in self.sums.items()}, "counts": self.counts}  # fmt: skip
        checkpoint.save(folder / "last.safetensors", checkpoint.collect(self.model, self.optimizers, self.ema), state)
        if _rank_and_world()[0] == 0:
            self.write_history(folder)

    def write_history(self, folder):
        write(folder / "history.json", (json.dumps(self.history, indent=1) + "\n").encode())

    def restore(self, path, facts):
        tensors, state = checkpoint.load(path)
        try:
            stored = _flat(state["run"])
            counts = [state[name] for name in ("epoch", "step")]
            if not all(type(n) is int and n >= 0 for n in counts) or counts[1] >= self.steps_per_epoch:
                raise ValueError(f"epoch and step are {counts}")
            if not isinstance(state["history"], list) or len(state["history"]) != counts[0]:
                raise ValueError("its history does not fit its epoch")
            sums = {str(name): torch.tensor(float(total), dtype=torch.float64) for name, total in state["sums"].items()}
            steps = {name: int(state["counts"][name]) for name in sums}
            best = None if state["best"] is None else float(state["best"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"checkpoint: {path} cannot be used: {error}") from error
        wanted = _flat(facts)
        for name in sorted(wanted.keys() - {"genkern"} - ({"epochs"} if self.settings.schedule == "constant" else set())):
            if stored.get(name) != wanted[name]:
                raise ValueError(f"fit: {path} was begun with {name} {stored.get(name)!r}, got {wanted[name]!r}: resume with the same")
        checkpoint.restore(path, tensors, self.model, self.optimizers, self.ema)
        device = next(self.model.parameters()).device
        self.sums = {name: total.to(device, _wide(device)) for name, total in sums.items()}
        self.counts = steps
        (self.epoch, self.step), self.best, self.history = counts, best, state["history"]


class _Swapped:
    """The averaged weights inside `with`, the trained ones after it."""

    def __init__(self, model, ema):
        self.pairs = [(p, ema[name]) for name, p in model.averaged().items() if name in ema]

    def __enter__(self):
        self._swap()

    def __exit__(self, *_):
        self._swap()

    def _swap(self):
        for p, average in self.pairs:
            trained = p.detach().clone()
            p.data.copy_(average)
            average.copy_(trained)


def _settings(model, training):
    known = {field.name for field in dataclasses.fields(Training)}
    if unknown := sorted(training.keys() - known):
        raise TypeError(f"fit: no setting {', '.join(unknown)}; Training has {', '.join(sorted(known))}")
    s = dataclasses.replace(model.defaults, **training)
    for name, least in (("epochs", 1), ("batch_size", 1), ("warmup", 0)):
        check_int("fit", name, getattr(s, name), least)
    for name in ("learning_rate", "weight_decay", "clip_grad_norm", "ema"):
        if (value := getattr(s, name)) is not None:
            check_number("fit", name, value)
            if not 0 <= value < (1 if name == "ema" else math.inf):
                raise ValueError(f"fit: {name} must be at least 0{' and below 1' if name == 'ema' else ''}, got {value!r}")
    if s.clip_grad_norm == 0:
        raise ValueError("fit: clip_grad_norm must be positive, got 0: no weight would ever change")
    check_choice("fit", "schedule", s.schedule, ("constant", "cosine"))
    check_choice("fit", "precision", s.precision, ("float32", "bfloat16"))
    return s


def _begin(run, folder, facts, resume):
    """Where the run in the folder stopped, or from the weights of the first process."""
    rank, world = _rank_and_world()
    if folder is not None and _first_decides(lambda: _prepare(folder, facts, resume), next(run.model.parameters()).device):
        run.restore(folder / "last.safetensors", facts)
        if rank == 0:
            run.write_history(folder)  # a kill may have come before it
    elif world > 1:
        for x in run.model.state_dict().values():
            if not is_sharded([x]):
                torch.distributed.broadcast(x, 0)
        run.restart_ema()


def _prepare(folder, facts, resume):
    """Make the folder ready; whether it holds a run to resume."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"fit: {folder} is a file, expected a folder")
    exists = (folder / "last.safetensors").exists()
    if not resume and any((folder / name).exists() for name in FILES):
        raise FileExistsError(f"fit: {folder} holds a run: resume it (resume=True, --resume) or choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES:  # what a killed write left
        for leftover in folder.glob(f"{name}.????????"):
            leftover.unlink()
    if not exists:
        write(folder / "run.json", (json.dumps(facts, indent=2) + "\n").encode())
    return exists


def _flat(facts):
    """The facts of run.json in one level."""
    return {**{name: x for name, x in facts.items() if name not in ("training", "config")}, **facts["training"], **facts["config"]}


def _first_decides(question, device):
    """The answer of the first process, for all: the others would see what it has written meanwhile."""
    rank, world = _rank_and_world()
    if world == 1:
        return question()
    answer, error = torch.full((), 2, device=device), None
    if rank == 0:
        try:
            answer.fill_(int(question()))
        except OSError as caught:
            error = caught
    torch.distributed.broadcast(answer, 0)
    if answer == 2:
        raise error or RuntimeError("fit: the first process could not use the folder")
    return bool(answer)


def _gathering(model, name):
    """The method `name` of a sharded model as a forward pass: weights are gathered for it, and divided again behind it."""
    from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

    if name not in vars(model):
        register_fsdp_forward_method(model, name)

    def call(*args, **kwargs):
        result = getattr(model, name)(*args, **kwargs)
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        return result

    return call


def _wide(device):
    return torch.float32 if device.type == "mps" else torch.float64


def _scale(settings, step, total):
    scale = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    return scale * (0.5 + 0.5 * math.cos(math.pi * step / total)) if settings.schedule == "cosine" else scale


def _rank_and_world():
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if group else (0, 1)


def _average(gradients, world):
    """The mean over the processes, in one transfer per dtype."""
    for dtype in {g.dtype: None for g in gradients}:
        some = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.reshape(-1) for g in some])
        torch.distributed.all_reduce(flat)
        for g, mean in zip(some, (flat / world).split([g.numel() for g in some]), strict=True):
            g.copy_(mean.view_as(g))


class _bar:
    """tqdm on a terminal where it is installed, else one line per epoch."""

    def __init__(self, run, epochs, shown):
        self.shown, self.bar, self.epochs, self.objectives = shown, None, epochs, list(run.objectives)
        if shown and sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                return
            done = run.epoch * run.steps_per_epoch + run.step
            self.bar = tqdm(total=epochs * run.steps_per_epoch, initial=done, unit="step", dynamic_ncols=True)

    def step(self, run):
        if self.bar is not None:
            self.bar.update()

    def epoch(self, row):
        if not self.shown:
            return
        trained = ["loss"] if row.get("loss") is not None else [name for name in self.objectives if name in row]
        names = [*trained, *(["validation_loss"] if row.get("validation_loss") is not None else [])]
        text = "  ".join(f"{name.replace('_', ' ')} {row[name]:.4f}" for name in names)
        line = f"epoch {row['epoch']:4}/{self.epochs}  {text}  {row.get('seconds', 0):.1f} s"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self):
        if self.bar is not None:
            self.bar.close()
