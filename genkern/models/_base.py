"""What models share: the output of forward, images in and out, saving and loading."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

from genkern._version import __version__

MODELS: dict = {}  # class name -> class, for load()


class Output(NamedTuple):
    """What forward returns: the loss to differentiate and its named parts, for logging."""

    loss: torch.Tensor
    parts: dict


@dataclasses.dataclass(frozen=True)
class Training:
    """Defaults with which `genkern train` trains a model; every one of them is an option there."""

    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    clip_grad_norm: float | None = None
    ema: float | None = None  # decay of the averaged weights that are evaluated, sampled from and kept; None: the weights themselves


class Model(torch.nn.Module):
    """A module made from one config dataclass, which `Config` names, and saved as config.json and model.safetensors.

    What a model states about itself for the shared tools (genkern.train and the command line):
    training    its Training defaults
    conditions  names of the keyword arguments of forward, sample and log_prob that a data set supplies, such as ("labels",)
    """

    Config: type
    training = Training()
    conditions: tuple = ()

    @classmethod
    def config_for(cls, data, **settings):
        """The Config for a genkern.data set (its shape, levels and classes), with the user's settings on top."""
        raise TypeError(f"{cls.__name__} does not say how it fits a data set: construct it from {cls.Config.__name__}")

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        MODELS.setdefault(cls.__name__, cls)

    def __init__(self, config):
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"{type(self).__name__}: config must be a {self.Config.__name__}, got {type(config).__name__}")
        self.config = config

    def save_pretrained(self, folder):
        """Write the weights and the config. Each file appears whole or not at all; a reader never sees half of one."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: x.detach().cpu().contiguous() for name, x in self.state_dict().items()}
        config = {"class": type(self).__name__, "genkern": __version__, "config": dataclasses.asdict(self.config)}
        _write(folder / "model.safetensors", safetensors.torch.save(weights))
        _write(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())

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
        model = cls(cls.Config(**stored["config"]))
        model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
        return model.eval()


def load(folder):
    """The model of whatever class save_pretrained(folder) wrote."""
    name = _read_config(Path(folder))["class"]
    if name not in MODELS:
        raise ValueError(f"load: {folder} holds a {name}, which is none of {', '.join(sorted(MODELS))}")
    return MODELS[name].from_pretrained(folder)


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


def _read_config(folder):
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: not a folder that save_pretrained wrote")
    stored = json.loads(path.read_text())
    if not isinstance(stored, dict) or not isinstance(stored.get("class"), str) or not isinstance(stored.get("config"), dict):
        raise ValueError(f'{path} must hold "class" and "config"')
    return stored


def _write(path, data):
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
