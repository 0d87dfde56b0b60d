"""Training checkpoints: one safetensors file that holds tensors and, in its header, one JSON object. Reading one executes nothing.

    checkpoint.save(path, tensors, state)            # whole or not at all: a temporary file, flushed, renamed
    tensors, state = checkpoint.load(path)           # ValueError names the file that is truncated, altered or something else
    checkpoint.restore(path, tensors, model=..., optimizers=..., ema=...)

A digest over the tensors and the JSON finds damage. It is no signature: whoever writes a checkpoint on purpose can give it other
numbers, but no code, no other tensors and no other shapes than those that the model and its optimizers expect.
"""

import hashlib
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from genkern.models._base import gathered, is_sharded, write

FORMAT = "genkern checkpoint 1"


def save(path, tensors, state):
    """tensors {name: tensor}; state: what JSON can hold. Where tensors are sharded each process must call it, the first one writes."""
    sharded, tensors = is_sharded(tensors.values()), gathered(tensors)
    if sharded and torch.distributed.get_rank() != 0:
        return
    text = json.dumps(state, allow_nan=False)
    header = {"format": FORMAT, "state": text, "digest": _digest(tensors, text)}
    write(Path(path), safetensors.torch.save(tensors, header))


def load(path):
    """(tensors on the CPU, state) of a file that save() wrote."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: there is no file {path}")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"its format is {header.get('format')!r}, expected {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("digest") != _digest(tensors, header["state"]):
            raise ValueError("its digest does not fit its content: the file was damaged or altered")
        state = json.loads(header["state"])
        if not isinstance(state, dict):
            raise ValueError("its state is no JSON object")
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"checkpoint: {path} cannot be used: {error}") from error
    return tensors, state


def collect(model, optimizers, ema=None):
    """The tensors of a training run. optimizers {objective: torch optimizer}; ema {parameter name: tensor}."""
    tensors = {f"model/{name}": x for name, x in model.state_dict().items()}
    for objective, optimizer in optimizers.items():
        for index, entries in optimizer.state_dict()["state"].items():
            for entry, x in entries.items():
                if x is not None:
                    tensors[f"optimizer/{objective}/{index}/{entry}"] = torch.as_tensor(x)
    tensors.update({f"ema/{name}": x for name, x in (ema or {}).items()})
    return tensors


def restore(path, tensors, model, optimizers, ema=None):
    """Put what collect() gave back, after every name, shape and dtype was compared: on an error nothing has changed."""
    parts = {"model": {}, "optimizer": {}, "ema": {}}
    for name, x in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise ValueError(f"checkpoint: {path} holds an unexpected tensor {name}")
        parts[part][rest] = x
    _compare(path, "model", parts["model"], model.state_dict())
    _compare(path, "ema", parts["ema"], ema or {})
    states = {objective: {} for objective in optimizers}
    for name, x in parts["optimizer"].items():
        objective, index, entry = ([*name.rsplit("/", 2), "", ""])[:3]
        parameters = [p for group in optimizers[objective].param_groups for p in group["params"]] if objective in optimizers else []
        if not index.isdecimal() or int(index) >= len(parameters):
            raise ValueError(f"checkpoint: {path} holds the optimizer state {name}, for which this model has no parameter")
        if x.dim() and x.shape != parameters[int(index)].shape:
            wanted = tuple(parameters[int(index)].shape)
            raise ValueError(f"checkpoint: {path} holds the optimizer state {name} of shape {tuple(x.shape)}, expected {wanted}")
        states[objective].setdefault(int(index), {})[entry] = _as_sharded(x, parameters[int(index)]) if x.dim() else x
    current = model.state_dict()
    model.load_state_dict({name: _as_sharded(x, current[name]) for name, x in parts["model"].items()})
    for objective, optimizer in optimizers.items():
        optimizer.load_state_dict({"state": states[objective], "param_groups": optimizer.state_dict()["param_groups"]})
    for name, x in (ema or {}).items():
        x.copy_(_as_sharded(parts["ema"][name], x))


def _as_sharded(x, like):
    """A whole tensor that every process has, divided as `like` is."""
    if not is_sharded([like]):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _compare(path, part, found, wanted):
    missing, unexpected = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unexpected:
        words = [f"lacks {', '.join(missing[:3])}"] if missing else []
        words += [f"has the unexpected {', '.join(unexpected[:3])}"] if unexpected else []
        raise ValueError(f"checkpoint: {path} is not of this model: its {part} {' and '.join(words)}")
    for name, x in wanted.items():
        if (found[name].shape, found[name].dtype) != (x.shape, x.dtype):
            got, want = (f"{t.dtype} {tuple(t.shape)}" for t in (found[name], x))
            raise ValueError(f"checkpoint: {path} is not of this model: its {part} has {name} of {got}, expected {want}")


def _digest(tensors, text):
    digest = hashlib.sha256(text.encode())
    for name, x in sorted(tensors.items()):
        digest.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
