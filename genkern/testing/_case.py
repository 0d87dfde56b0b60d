"""Case: what tests and benches need to know about one public function."""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

# A layout takes a contiguous tensor and returns one of equal values that lies differently in memory.
LAYOUTS = {
    "contiguous": lambda x: x,
    "offset": lambda x: torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape),
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x,
    "channel_slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]] if x.dim() > 1 else x,
}


class Make:
    """Makes tensors of standard normal values for one type, device and layout; the values depend on the order of calls alone."""

    def __init__(self, dtype=torch.float32, device="cpu", layout="contiguous", seed=0):
        self.dtype, self.device, self.layout = dtype, device, LAYOUTS[layout]
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape, scale=1.0):
        values = torch.randn(shape, generator=self._generator, dtype=torch.float64) * scale
        return self.layout(values.to(self.dtype).to(self.device))


@dataclass(frozen=True)
class Case:
    """One public function with its inputs, shapes and costs.

    function    called as function(**arguments(make, shape), **variant)
    arguments   (Make, shape) -> keyword arguments; its floating-point tensors are the ones differentiated
    forms       other ways to give the arguments, as `arguments`: optional inputs, combined inputs
    shapes      of the tests: small, with empty, odd and prime sizes
    variants    keyword arguments, each tested
    eager       the code people write today, with the arguments' names: the baseline of the bench
    bytes       (shape, bytes per element) -> bytes a forward pass must move
    bytes_backward  the same for the backward pass
    bench_shapes    of the bench
    """

    function: Callable
    arguments: Callable
    forms: tuple = ()
    shapes: tuple = ()
    variants: tuple = ({},)
    eager: Callable | None = None
    bytes: Callable = lambda shape, size: 2 * size * math.prod(shape)
    bytes_backward: Callable = lambda shape, size: 3 * size * math.prod(shape)
    bench_shapes: tuple = ()

    @property
    def name(self):
        return self.function.__name__

    def other_forms(self):
        """This case once for each other way to give its arguments, at fewer shapes."""
        return [replace(self, arguments=form, forms=(), shapes=self.shapes[::2]) for form in self.forms]


_MODULES = ("genkern.ops.vae._reparameterize", "genkern.ops.vae._gaussian_kl")


def all_cases():
    """{name: Case} of every op of genkern that is a differentiable function of tensors."""
    return {case.name: case for module in _MODULES for case in importlib.import_module(module).CASES}
