"""Fences: filled memory on both sides of what a kernel may write, looked at afterwards. They find a write out of bounds without a
sanitizer, on every backend."""

import math
import warnings

import torch

_BYTES = 256  # on either side: several of the widest vectors, and no change of alignment
_FILL = 0xA5


class Fences:
    """While open, every tensor that is allocated on this device type, in C++ too, lies between two fences.

    with Fences("cpu") as fences:
        inputs = fences.around(x)       # a contiguous copy between fences, for what is written in place or given as out=
        outputs = kernel(inputs)
    fences.check("kernel")              # AssertionError where a fence was written to
    """

    def __init__(self, device_type="cpu"):
        self._key, self._memory = device_type.upper(), []

    def __enter__(self):
        self._library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*previously registered kernel")
            self._library.impl("empty.memory_format", self._empty, self._key)
        return self

    def __exit__(self, *error):
        self._library._destroy()

    def around(self, x):
        return self._between(x.shape, x.dtype, x.device).copy_(x)

    def check(self, where):
        for memory, size in self._memory:
            for side, fence in (("before", memory[:_BYTES]), ("behind", memory[_BYTES + size :])):
                changed = (fence != _FILL).sum().item()
                assert not changed, f"{where}: {changed} bytes {side} a tensor of {size} bytes were written to"
        self._memory.clear()

    def _empty(self, size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
        dtype = dtype or torch.get_default_dtype()
        if memory_format in (None, torch.contiguous_format) and layout in (None, torch.strided) and not pin_memory:
            return self._between(size, dtype, device)
        like = torch.empty(size, dtype=dtype, layout=layout, device="meta", memory_format=memory_format)
        return torch.empty_strided(size, like.stride(), dtype=dtype, device=device, pin_memory=pin_memory)

    def _between(self, shape, dtype, device):
        count, margin = math.prod(shape), _BYTES // dtype.itemsize
        if count == 0:  # often there to be resized, which may grow over a fence
            return torch.empty_strided(shape, torch.empty(shape, device="meta").stride(), dtype=dtype, device=device)
        memory = torch.empty_strided((count + 2 * margin,), (1,), dtype=dtype, device=device)
        inside = torch.empty_strided((0,), (1,), dtype=dtype, device=device).set_(memory.untyped_storage(), margin, shape)
        memory, size = memory.view(torch.uint8), count * dtype.itemsize
        memory[:_BYTES] = memory[_BYTES + size :] = _FILL
        self._memory.append((memory, size))
        return inside
