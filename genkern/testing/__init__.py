"""Check and measure an op of your own against its reference, the way genkern's are.

    import torch, genkern.testing as gt

    def scale(x, s):                       # the function users call; `genkern.core.Op` picks the backend inside
        return my_op(x, s)

    CASE = gt.Case(
        scale,
        lambda make, shape: dict(x=make(shape), s=make(shape)),    # tensors made for the type and layout under test
        shapes=[(3, 5), (0, 4), (1, 1), (2, 1031)],
        eager=lambda x, s: x * torch.exp(s),                       # what people write today: the baseline of the bench
        bytes=lambda shape, size: 3 * size * math.prod(shape),
    )
    gt.check(CASE, "cpu", (3, 5), torch.float32)                   # AssertionError that names the output or gradient that is wrong

A check compares a backend with the reference evaluated in float64 on the same inputs and noise: its error may be at most twice that
of the reference in the type under test, plus a few units in the last place. Gradients likewise.
"""

from genkern.testing._case import LAYOUTS, Case, Make, all_cases
from genkern.testing._check import backends, check, float32_noise, refuse_wide_types, verify

__all__ = ["LAYOUTS", "Case", "Make", "all_cases", "backends", "check", "float32_noise", "refuse_wide_types", "verify"]
