"""Check and measure an op of your own against its reference, the way genkern's are.

    import math, torch
    import genkern.testing as gt
    from genkern import core

    op = core.Op(  # the reference serves wherever no kernel exists
        "scale", "(Tensor x, Tensor s) -> Tensor",
        reference=lambda x, s: x * torch.exp(s), fake=lambda x, s: torch.empty_like(x), differentiable=("x", "s"),
    )

    @core.implements("cpu", "scale")  # "triton": a launcher; C++ kernels register themselves
    def kernel(x, s):
        return x.contiguous() * s.exp()

    @core.implements("cpu", "scale_backward")
    def kernel_backward(grad, x, s):
        return [grad * s.exp(), grad * x * s.exp()]

    def scale(x, s):  # the function users call
        return op(x, s)

    CASE = gt.Case(
        scale,
        lambda make, shape: {"x": make(shape), "s": make(shape)},  # made for the type and layout under test
        shapes=((3, 5), (0, 4), (1, 1), (2, 1031)),
        eager=lambda x, s: x * torch.exp(s),  # what people write today: the baseline of the bench
        bytes=lambda shape, size: 3 * size * math.prod(shape),
    )
    for shape in CASE.shapes:
        for layout in gt.LAYOUTS:
            gt.check(CASE, "cpu", shape, torch.float32, layout=layout)  # AssertionError that names what is wrong
    gt.check_repeatable(CASE, "cpu")
    gt.check_second_order(CASE, "cpu")

A check compares a backend with the reference evaluated in float64 on the same inputs and noise: its error may be at
most twice that of the reference in the type under test, plus a few units in the last place; where the reference is
infinite or NaN, the backend must be too. Gradients likewise. Every tensor that the backend allocates lies between fences of
filled memory, so that a write out of bounds fails the check as well, and so does one into an argument; Fences does this for a
kernel of any kind. check_repeatable finds what depends on more than the arguments: races, the number of threads, values kept from an
earlier call, the neighbours in a batch. check_second_order compares first and second derivatives with finite differences.
"""

from genkern.testing._autoregressive import assert_autoregressive
from genkern.testing._case import LAYOUTS, Case, Make, all_cases
from genkern.testing._check import backends, check, float32_noise, refuse_wide_types, verify
from genkern.testing._fences import Fences
from genkern.testing._launches import count_launches
from genkern.testing._properties import check_repeatable, check_second_order

__all__ = [
    "LAYOUTS",
    "Case",
    "Fences",
    "Make",
    "all_cases",
    "assert_autoregressive",
    "backends",
    "check",
    "check_repeatable",
    "check_second_order",
    "count_launches",
    "float32_noise",
    "refuse_wide_types",
    "verify",
]
