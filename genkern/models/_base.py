"""What models share: the output of forward, images in and out, saving and loading."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from genkern import random
from genkern._version import __version__
from genkern.ops._common import check_int

MODELS: dict = {}  # class name -> class, for load()


class Output(NamedTuple):
    """What forward returns: the loss to differentiate and its named parts, for logging."""

    loss: torch.Tensor
    parts: dict


@dataclasses.dataclass(frozen=True)
class Training:
    """Defaults with which `genkern train` trains a model; every one of them is an option there."""

    epochs: int = 100  # passes over the training data
    batch_size: int = 64  # of all processes together
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup: int = 0  # steps over which the learning rate rises from 0
    schedule: str = "constant"  # or "cosine": falls to 0 over all steps
    clip_grad_norm: float | None = None  # the largest norm of a gradient, of all weights together
    ema: float | None = None  # decay of the averaged weights that are evaluated, sampled from and kept; None: the weights themselves
    precision: str = "float32"  # or "bfloat16": forward under autocast


class Model(torch.nn.Module):
    """A module made from one config dataclass, which `Config` names, and saved as config.json and model.safetensors.

    What a model states about itself for the shared tools (genkern.train and the command line):
    defaults     its Training: how it is trained where the user says nothing else
    conditions   names of the keyword arguments of forward, sample and log_prob that a data set supplies, such as ("labels",)
    config_for   how it fits a data set
    objectives   its losses and their parameters, where there are several; due: which of them is trained at a step
    forward(batch, *, key, **conditions) -> Output; key (2,), or (N, 2) for noise per sample that no batch size changes
    sample(n, *, key, batch_size, **conditions); key as sample_keys() takes it
    and where they make sense:
    log_prob(inputs, *, key, **conditions)      (N,) in nats
    bits_per_dim(inputs, *, key, **conditions)  (N,), for uint8 inputs with a discrete log-probability or a named bound of it
    reconstruct(inputs, *, key, **conditions)   like inputs
    traverse(*, steps, key, **conditions)       (rows, steps, C, H, W): one row per direction of the latent space
    """

    Config: type
    defaults = Training()
    conditions: tuple = ()

    @classmethod
    def config_for(cls, data, **settings):
        """The Config for a genkern.data set (its shape, levels and classes), with the user's settings on top."""
        raise TypeError(f"{cls.__name__} does not say how it fits a data set: construct it from {cls.Config.__name__}")

    def objectives(self):
        """{name: parameters}: one by default. With several, forward also takes objective=name and trains only its parameters."""
        return {"loss": [p for p in self.parameters() if p.requires_grad]}

    def due(self, objective, step):
        """Whether training step 0, 1, ... trains an objective: a GAN's critic may take several steps to one of its generator's, and a
        model of two stages trains one after the other. In an epoch without the first objective there is no training "loss".
        """
        return True

    def averaged(self):
        """{name in state_dict: tensor}: what Training.ema averages; all parameters by default."""
        return dict(self.named_parameters())

    def optimizer(self, parameters, training):
        """A torch optimizer for the parameters of one objective; the shared loop sets its learning rate at every step."""
        return torch.optim.AdamW(parameters, training.learning_rate, weight_decay=training.weight_decay)

    def sample_keys(self, n, key=None, generator=None, batch_size=1):
        """One key per sample (n, 2) on the model's device: of one key (2,) by split(), drawn anew from `generator`, or (n, 2) as they
        are. ValueError, TypeError for a number of samples, a key or a batch_size that is none."""
        device, name = next(self.parameters()).device, type(self).__name__
        for what, value, least in (("n", n, 0), ("batch_size", batch_size, 1)):
            check_int(f"{name}: sample", what, value, least)
        key = random.draw_key(generator, device) if key is None else key
        random.check_key(f"{name}: sample", key)
        if key.dim() == 2 and len(key) != n:
            raise ValueError(f"{name}: sample of {n} needs one key or {n}, got {len(key)}")
        return (key if key.dim() == 2 else random.split(key, n)).to(device)

    @torch.no_grad()
    def evaluate(self, inputs, labels=None, *, key, batch_size=256, likelihood=False):
        """{"loss": ..., and each part}: means over the inputs. A smaller loss is a better model: fit() keeps the best one.

        likelihood: also the means of log_prob and bits_per_dim, where the model has them. Noise is one stream per sample.
        """
        names, sums = list(self.objectives()), {}
        for x, k, conditions in self.batches(inputs, labels, key, batch_size):
            values = {}
            for name in reversed(names):  # the first objective's loss is "loss"
                output = self(x, key=k, **conditions, **({"objective": name} if len(names) > 1 else {}))
                values.update({**output.parts, **({name: output.loss} if len(names) > 1 else {}), "loss": output.loss})
            if likelihood:
                for name in ("log_prob", "bits_per_dim"):
                    if hasattr(self, name):
                        values[name] = getattr(self, name)(x, key=k, **conditions).mean()
                if values.get("bits_per_dim") is not None and values["bits_per_dim"].isnan():
                    del values["bits_per_dim"]  # the likelihood is no probability of the levels
            for name, value in values.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(x)
        return {name: total / len(inputs) for name, total in sums.items()}

    def batches(self, inputs, labels, key, batch_size=256):
        """(inputs, keys, conditions) of one batch after the other, on the model's device; one key per input, (n, 2), from key (2,)."""
        name, needed = type(self).__name__, "labels" in self.conditions
        check_tensor(name, inputs)
        check_int(name, "batch_size", batch_size)
        if inputs.dim() == 0 or len(inputs) == 0:
            raise ValueError(f"{name}: there are no inputs")
        if needed and (not isinstance(labels, torch.Tensor) or labels.dim() == 0 or len(labels) != len(inputs)):
            got = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise ValueError(f"{name}: needs labels of the {len(inputs)} inputs, a tensor, got {got}")
        device, keys = next(self.parameters()).device, random.split(key, len(inputs))
        for part in (slice(i, i + batch_size) for i in range(0, len(inputs), batch_size)):
            yield inputs[part].to(device), keys[part].to(device), {"labels": labels[part].to(device)} if needed else {}

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.__bases__[0].__name__ != "FSDPModule":  # fully_shard makes a class for the object that it shards
            MODELS.setdefault(cls.__name__, cls)

    def __init__(self, config):
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"{type(self).__name__}: config must be a {self.Config.__name__}, got {type(config).__name__}")
        for field in dataclasses.fields(config):  # what counts something by default must count something
            value = getattr(config, field.name)
            counts = field.type in (int, "int") and type(field.default) is int and field.default > 0  # not int | None
            if counts:
                check_int(type(self).__name__, field.name, value)
        self.config, self.kind = config, type(self).__name__

    def save_pretrained(self, folder):
        """Write the weights and the config. Each file appears whole or not at all; a reader never sees half of one.

        Of a model that fully_shard divided among processes, each must call this; the first one writes the whole weights.
        """
        folder, state = Path(folder), self.state_dict()
        weights = gathered(state)
        if is_sharded(state.values()) and torch.distributed.get_rank() != 0:
            return
        folder.mkdir(parents=True, exist_ok=True)
        config = {"class": self.kind, "genkern": __version__, "config": dataclasses.asdict(self.config)}
        write(folder / "model.safetensors", safetensors.torch.save(weights))
        write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())

    @classmethod
    def from_pretrained(cls, folder):
        """The model that save_pretrained(folder) wrote, in evaluation mode, on the CPU. Nothing in the folder is executed."""
        folder = Path(folder)
        stored = _read_config(folder)
        if stored["class"] != cls.__name__:
            raise ValueError(f"{cls.__name__}: {folder} holds a {stored['class']}; genkern.models.load() finds the class")
        known = {field.name for field in dataclasses.fields(cls.Config)}
        unknown = sorted(stored["config"].keys() - known)
        if unknown:
            raise ValueError(f"{cls.__name__}: {folder / 'config.json'} has unknown settings {', '.join(unknown)}")
        try:
            model = cls(cls.Config(**{name: _tuples(value) for name, value in stored["config"].items()}))
        except (TypeError, ValueError, RuntimeError, MemoryError, OverflowError) as error:  # such as a model larger than the memory
            raise ValueError(f"{cls.__name__}: {folder / 'config.json'} cannot be used: {' '.join(str(error).split())}") from error
        weights = folder / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{folder} holds no model.safetensors")
        try:
            model.load_state_dict(safetensors.torch.load_file(weights))
        except (safetensors.SafetensorError, RuntimeError) as error:
            raise ValueError(f"{cls.__name__}: {weights} cannot be used: {' '.join(str(error).split())}") from error
        return model.eval()


def load(folder):
    """The model of whatever class save_pretrained(folder) wrote."""
    name = _read_config(Path(folder))["class"]
    if name not in MODELS:
        raise ValueError(f"load: {folder} holds a {name}, which is none of {', '.join(sorted(MODELS))}")
    return MODELS[name].from_pretrained(folder)


def check_tensor(name, inputs):
    if not isinstance(inputs, torch.Tensor):
        raise TypeError(f"{name}: inputs must be a tensor, got {type(inputs).__name__}")


def ink(images, levels):
    """Images as numbers in [0, 1]: uint8 0..levels are divided by levels, float in [-1, 1] is moved and halved.

    ValueError names the range found where it is another, on the CPU; elsewhere and under torch.compile, where looking would
    stop the device or break the graph, such pixels become NaN.
    """
    if not isinstance(images, torch.Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if images.dim() != 4:
        raise ValueError(f"images must be (N, C, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        low, high, x = 0, levels, images.to(torch.get_default_dtype())
    elif images.is_floating_point():
        low, high, x = -1, 1, images
    else:
        raise TypeError(f"images must be uint8 in 0..{levels} or float in [-1, 1], got {images.dtype}")
    outside = ~((x >= low) & (x <= high))
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        x = x.masked_fill(outside, float("nan"))
    elif outside.any():
        raise ValueError(f"images of {images.dtype} must be in [{low}, {high}], found [{x.min():g}, {x.max():g}]")
    return (x - low) / (high - low)


def square_images(name, data):
    """What a Config says of a genkern.data set of square uint8 images, which the model `name` needs."""
    if not hasattr(data, "levels"):
        raise TypeError(f"{name}: needs a genkern.data set, got {type(data).__name__}")
    if data.levels is None or len(data.shape) != 3 or data.shape[1] != data.shape[2]:
        got = f"{'float' if data.levels is None else 'uint8'} {tuple(data.shape)} of {data.name}"
        raise ValueError(f"{name}: needs square images of uint8, got {got}")
    return {"channels": data.shape[0], "size": data.shape[1], "levels": data.levels}


def of_each(conditions, change):
    """The conditions, those with a row for each sample changed: a number is of all samples, and stays."""
    return {name: change(x) if isinstance(x, torch.Tensor) and x.dim() else x for name, x in conditions.items()}


def signed(name, images, config):
    """Images of the model `name` as numbers in [-1, 1]: (N, channels, size, size) of its config, as ink() takes them."""
    x = 2 * ink(images, config.levels) - 1
    expected = (config.channels, config.size, config.size)
    if tuple(x.shape[1:]) != expected:
        raise ValueError(f"{name}: images must be (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
    return x


def class_labels(name, labels, n, classes, device):
    """Labels of n samples of the model `name` as int64 (n,) on the device, from (n,) integers or one int for all, in 0..classes - 1.

    ValueError names what is wrong; their range is looked at on the CPU only, where looking does not stop the device.
    """
    if labels is None:
        raise ValueError(f"{name}: a model of {classes} classes needs labels")
    labels = torch.as_tensor(labels, device=device)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape not in ((), (n,)):
        raise ValueError(f"{name}: labels must be integers ({n},), got {labels.dtype} {tuple(labels.shape)}")
    looked = labels.device.type == "cpu" and not torch.compiler.is_compiling()
    if looked and ((labels < 0) | (labels >= classes)).any():
        raise ValueError(f"{name}: labels must be in 0..{classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return labels.long().expand(n)


def is_sharded(tensors):
    """Whether fully_shard (FSDP) divided one of the tensors among the processes."""
    return any(hasattr(x, "full_tensor") for x in tensors)


def gathered(tensors):
    """{name: a whole, contiguous copy on the CPU}. Of a sharded tensor all processes must ask, and the first one gets it."""
    copies = {}
    for name, x in tensors.items():
        x, sharded = x.detach(), is_sharded([x])
        x = x.full_tensor() if sharded else x
        if not sharded or torch.distributed.get_rank() == 0:
            copies[name] = x.cpu().clone(memory_format=torch.contiguous_format)
    return copies


def _read_config(folder):
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a folder that save_pretrained wrote")
    try:
        stored = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("class"), str) or not isinstance(stored.get("config"), dict):
        raise ValueError(f'{path} must hold "class" and "config"')
    return stored


def _tuples(value):
    """JSON knows lists only; a config holds tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def write(path, data):
    """Write to a file beside it, flush to the disk, then rename: atomic on one file system."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)  # the rename itself lies in the folder
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
