"""count_launches: what code would do on a GPU, counted without one."""

import contextlib
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from genkern import core

_FREE = {  # no kernel: views, and memory without values
    "aten::" + name
    for name in (
        "view", "_unsafe_view", "reshape", "_reshape_alias", "as_strided", "alias", "detach", "expand", "permute", "transpose", "t",
        "squeeze", "unsqueeze", "select", "slice", "narrow", "split", "split_with_sizes", "chunk", "unbind", "unfold", "diagonal",
        "view_as_real", "view_as_complex", "lift_fresh", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
    )
}  # fmt: skip
_WAITS = {
    "aten::" + name for name in ("nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive")
}


@dataclass
class Counts:
    """Names of what happened since count_launches() began, or since reset()."""

    launches: list = field(default_factory=list)  # kernels
    syncs: list = field(default_factory=list)  # where the host waits for the device: .item(), copies to the host, nonzero
    uploads: list = field(default_factory=list)  # copies from pageable host memory to the device, which also wait
    bytes: int = 0  # of all tensors that the kernels read or write

    def reset(self):
        """Forget what was counted, and return it."""
        seen = Counts(self.launches, self.syncs, self.uploads, self.bytes)
        self.launches, self.syncs, self.uploads, self.bytes = [], [], [], 0
        return seen


@contextlib.contextmanager
def count_launches():
    """Inside, device="cuda" works without a GPU, and what a GPU would be asked to do is counted. Yields Counts.

        with genkern.testing.count_launches() as counts:
            x = torch.randn(2, 4, 64, 64, device="cuda")
            counts.reset()
            step(x)                     # values are computed on the CPU
        assert len(counts.launches) == 1 and not counts.syncs and not counts.uploads

    A launch is one call of ATen (a composite one counts as the calls it is made of) or one of a genkern op that has a kernel. Tensors
    come to the device by creation or by .to("cuda"); modules do not, so give a model as a function of tensors. No gradients. Needs
    genkern's CPU library, whose kernels stand in for those of the GPU.
    """
    counts, missing = Counts(), core.Op._missing

    def stands_in(op, name, device_type):
        return missing(op, "cpu", "cpu") if (name, device_type) == ("cuda", "cuda") else missing(op, name, device_type)

    as_if = mock.patch.object(core.Op, "_missing", stands_in), core.backend("cuda")
    with torch.no_grad(), as_if[0], as_if[1], _Dispatch(counts), _Functions(counts):
        yield counts


class _OnDevice(torch.Tensor):
    """Says that it is on cuda:0; `values` on the CPU holds its numbers."""

    @staticmethod
    def __new__(cls, values):
        self = torch.Tensor._make_wrapper_subclass(cls, values.size(), strides=values.stride(), dtype=values.dtype, device="meta")
        self.values = values
        return self

    device = property(lambda self: torch.device("cuda", 0))
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __repr__(self):
        return f"{self.values!r} as if on cuda:0"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function}: a tensor of count_launches() was used after it ended")


def _is_cuda(device):
    return (isinstance(device, torch.device) and device.type == "cuda") or (isinstance(device, str) and device.split(":")[0] == "cuda")


def _size(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


class _Dispatch(TorchDispatchMode):
    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), function._schema.name
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        device = [t for t in tensors if isinstance(t, _OnDevice)]
        if not device:
            return function(*args, **kwargs)
        short = name.removeprefix("aten::")
        host = [t for t in tensors if not isinstance(t, _OnDevice) and t.dim() > 0]
        to_host = name == "aten::_to_copy" and torch.device(kwargs.get("device") or "cuda").type == "cpu"
        if name == "aten::copy_" and host:
            (self.counts.uploads if isinstance(args[0], _OnDevice) else self.counts.syncs).append(short)
        elif host and name.startswith("aten::"):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got tensors on cuda:0 and cpu")
        by_mask = name == "aten::index" and any(t.dtype in (torch.bool, torch.uint8) for t in device[1:])
        if name in _WAITS or name == "aten::_local_scalar_dense" or to_host or by_mask:
            self.counts.syncs.append("item" if name == "aten::_local_scalar_dense" else "to the host" if to_host else short)
        known = {id(t.values): t for t in device}
        values = lambda a: a.values if isinstance(a, _OnDevice) else torch.device("cpu") if _is_cuda(a) else a
        result = function(*tree_map(values, args), **tree_map(values, kwargs))
        if to_host or name == "aten::_local_scalar_dense":
            return result
        outputs = [t for t in tree_iter(result) if isinstance(t, torch.Tensor)]
        if name not in _FREE and not (name == "aten::copy_" and host):
            self.counts.launches.append(short)
            self.counts.bytes += _size(device) + _size(outputs)
        wrapped = lambda t: known[id(t)] if id(t) in known else _OnDevice(t)
        return tree_map(lambda t: wrapped(t) if isinstance(t, torch.Tensor) else t, result)


class _Functions(TorchFunctionMode):
    """Creation on the device and moves to it, which a torch without CUDA would refuse before they reach the dispatcher."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name == "cuda" and isinstance(args[0], torch.Tensor):
            function, name, args, kwargs = torch.Tensor.to, "to", (args[0], "cuda"), {}
        wanted = [a for a in (*args, *kwargs.values()) if _is_cuda(a)]
        if not wanted or function is torch.device:
            return function(*args, **kwargs)
        present = any(isinstance(t, _OnDevice) for t in tree_iter((args, kwargs)))
        if present:  # already there: the type may change, the device does not
            args, kwargs = [a for a in args if not _is_cuda(a)], {n: a for n, a in kwargs.items() if not _is_cuda(a)}
            return function(*args, **kwargs) if len(args) + len(kwargs) > 1 or name != "to" else args[0]
        on_host = lambda a: torch.device("cpu") if _is_cuda(a) else a
        result = function(*map(on_host, args), **{n: on_host(a) for n, a in kwargs.items()})
        if name in ("to", "tensor", "as_tensor"):
            self.counts.uploads.append(name)
            result = result.detach().clone()
        elif not name.startswith(("empty", "new_empty")):
            self.counts.launches.append(name)
            self.counts.bytes += _size([result])
        return _OnDevice(result)
