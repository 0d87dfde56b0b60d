"""wavenet_step: a GPU, which has no kernel of it, takes the reference, on its device alone."""

import pytest
import torch

import genkern
from genkern.core import OPS
from genkern.ops.autoregressive import _wavenet_step as module
from genkern.testing import Make, backends


def _steps(arguments, steps, backend):
    """The outputs of some steps, whose rings come around, and the past after them."""
    past, outputs = arguments["past"].clone(), []
    dilations, sizes = [1, 2, 4], {"taps": module._TAPS, "gate": module._GATE, "skip": module._SKIP}
    with genkern.backend(backend):
        for time in range(steps):
            x, condition = arguments["x"] + time, arguments["condition"]
            y = module.wavenet_step(
                x, past, arguments["weights"], condition, dilations, outputs=module._OUTPUTS, time=time, **sizes
            )  # fmt: skip
            outputs.append(y)
    return torch.stack(outputs), past


@pytest.mark.parametrize("backend", backends(op="wavenet_step"))
def test_reference_is_the_kernel(backend):
    arguments = module._with_condition(Make(), (3, 6))
    for a, b in zip(_steps(arguments, 11, "reference"), _steps(arguments, 11, backend), strict=True):
        torch.testing.assert_close(a, b)


def test_other_devices_take_the_reference():
    """Tensors of the meta device: an operation that met one of another device would fail."""
    op = OPS["wavenet_step"]
    assert all(op.available("cuda").values())
    arguments = {n: t.to("meta") for n, t in module._with_condition(Make(), (3, 6)).items()}
    genkern.reset_stats()
    y, past = _steps(arguments, 2, None)
    assert y.shape == (2, 3, module._OUTPUTS) and y.is_meta and past.is_meta
    assert genkern.stats() == {("wavenet_step", "reference"): 2}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    arguments = module._with_condition(Make(torch.float64), (3, 6))
    there = _steps({n: t.cuda() for n, t in arguments.items()}, 11, None)
    for a, b in zip(there, _steps(arguments, 11, "reference"), strict=True):
        torch.testing.assert_close(a.cpu(), b)
