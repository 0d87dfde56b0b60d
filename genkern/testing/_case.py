"""Case: what tests and benches need to know about one public function."""

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace

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

    function    called as function(**arguments(make, shape), **variant); its name is the name of its Op
    arguments   (Make, shape) -> keyword arguments. A shape is any tuple of sizes that `arguments` understands
    forms       other ways to give the arguments, as `arguments`: optional inputs, combined inputs
    shapes      of the tests: small, with empty, odd and prime sizes; the first one is the ordinary shape of most properties
    small       the shape of gradgradcheck
    large       the shape that several threads share: more than 16384 elements for those of csrc/include/rows_cpu.h
    variants    keyword arguments, each tested
    dtypes      of the tests
    constants   names of floating-point arguments without a gradient; None: the function has no gradient at all
    exact       the outputs equal those of the reference bit for bit
    eager       the code people write today, with the arguments' names: the baseline of the bench
    peers       {library: its function, called like eager}, made when called; libraries that are not installed are left out
    bytes       (shape, bytes per element) -> bytes a forward pass must move
    bytes_backward  the same for the backward pass
    bench_shapes    of the bench
    bench_variant   keyword arguments of `function` in the bench
    bench_modes     {mode: keyword arguments} of more forward passes in the bench, which `eager` and the peers take too
    bench_arguments arguments -> more of them, for what is timed alone, eager too: memory that every call writes anew
    """

    function: Callable
    arguments: Callable
    forms: tuple = ()
    shapes: tuple = ()
    small: tuple = (2, 3)
    large: tuple = (3, 12011)
    variants: tuple = ({},)
    dtypes: tuple = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    constants: tuple | None = ()
    exact: bool = False
    eager: Callable | None = None
    peers: Callable = dict
    bytes: Callable = lambda shape, size: 2 * size * math.prod(shape)
    bytes_backward: Callable = lambda shape, size: 3 * size * math.prod(shape)
    bench_shapes: tuple = ()
    bench_variant: dict = field(default_factory=dict)
    bench_modes: dict = field(default_factory=dict)
    bench_arguments: Callable = lambda arguments: {}

    @property
    def name(self):
        return self.function.__name__

    def differentiable(self, arguments):
        """Names of the arguments that have gradients."""
        return (
            []
            if self.constants is None
            else [n for n, a in arguments.items() if isinstance(a, torch.Tensor) and a.is_floating_point() and n not in self.constants]
        )

    def other_forms(self):
        """This case once for each other way to give its arguments, at fewer shapes."""
        return [replace(self, arguments=form, forms=(), shapes=self.shapes[::2]) for form in self.forms]


@functools.cache
def all_cases():
    """{name: Case} of every op of genkern: what the modules of genkern.ops list as CASES."""
    from genkern import ops  # which imports this module

    modules = [m.name for m in pkgutil.walk_packages(ops.__path__, "genkern.ops.") if not m.name.endswith("_triton")]
    return {case.name: case for name in modules for case in getattr(importlib.import_module(name), "CASES", ())}
