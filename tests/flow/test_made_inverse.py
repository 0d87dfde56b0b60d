"""masked_linear, made_inverse: masks, the D-pass loop's samples, several layers, orders, layouts, conditions, arguments."""

import pytest
import torch
import torch.nn.functional as F

from genkern.ops import made_inverse, made_masks, masked_linear
from genkern.testing import Make


def network(degrees, per_input=1, layout="blocks", dtype=torch.float64):
    """(layers, function of x and of a condition's part) of a random MADE."""
    make, masks = Make(dtype), made_masks(degrees, per_input, layout)
    layers = [(make(m.shape, m.shape[1] ** -0.5), make((len(m),))) for m in masks]

    def run(x, added=0):
        for i, ((weight, bias), mask) in enumerate(zip(layers, masks, strict=True)):
            x = masked_linear(x, weight, mask, bias) + (added if i == 0 else 0)
            x = F.relu(x) if i + 1 < len(layers) else x
        return x

    return layers, run


def random_degrees(inputs, *hidden):
    generator = torch.Generator().manual_seed(1)
    ends = torch.tensor([0, inputs, 0])  # units that see nothing, or that nothing sees
    draw = lambda n: torch.cat([torch.randint(0, inputs + 1, (n - 3,), generator=generator), ends])
    return [torch.randperm(inputs, generator=generator) + 1, *map(draw, hidden)]


@pytest.mark.parametrize("layout", ["blocks", "interleaved"])
@pytest.mark.parametrize("hidden", [(), (31,), (20, 17)])
def test_inverse_of_an_autoregressive_flow(layout, hidden):
    degrees = random_degrees(7, *hidden)
    layers, run = network(degrees, 2, layout)
    make = Make(torch.float64)
    z = make((5, 7))
    added = make((5, len(layers[0][0])))
    x, params = made_inverse(
        lambda d, p: z[:, d] * p[:, 1].tanh().exp() + p[:, 0], 5, layers, degrees, layout=layout, bias_of_sample=added
    )
    expected = run(x, added)
    torch.testing.assert_close(params, expected)
    shift, log_scale = expected.chunk(2, 1) if layout == "blocks" else (expected[:, 0::2], expected[:, 1::2])
    torch.testing.assert_close((x - shift) * torch.exp(-log_scale.tanh()), z)


def test_the_samples_of_the_loop():
    degrees = [torch.arange(1, 41), torch.arange(300) % 39 + 1]
    layers, run = network(degrees, dtype=torch.float32)
    uniform = torch.rand(16, 40, generator=torch.Generator().manual_seed(0))
    x, logits = made_inverse(lambda d, p: (uniform[:, d] < torch.sigmoid(p[:, 0])).float(), 16, layers, degrees)
    looped = torch.zeros(16, 40)
    for d in range(40):
        looped[:, d] = (uniform[:, d] < torch.sigmoid(run(looped)[:, d])).float()
    assert torch.equal(x, looped)
    torch.testing.assert_close(logits, run(x), rtol=1e-5, atol=1e-5)


def test_an_output_sees_only_the_inputs_before_it():
    degrees = random_degrees(6, 23, 19)
    _, run = network(degrees, 1)
    jacobian = torch.autograd.functional.jacobian(lambda v: run(v), torch.zeros(6, dtype=torch.float64))
    before = degrees[0][:, None] > degrees[0][None, :]
    assert (jacobian[~before] == 0).all() and (jacobian != 0).any()


def test_what_lies_under_the_masks_is_not_read():
    degrees = random_degrees(6, 23)
    layers, _ = network(degrees)
    poisoned = [(w.masked_fill(~m, float("nan")), b) for (w, b), m in zip(layers, made_masks(degrees), strict=True)]
    element = lambda d, p: p[:, 0]
    assert torch.equal(made_inverse(element, 3, poisoned, degrees)[0], made_inverse(element, 3, layers, degrees)[0])


def test_masked_linear():
    make = Make()
    x, weight, bias = make((2, 3, 5)), make((4, 5)), make((4,))
    mask = make((4, 5)) > 0
    torch.testing.assert_close(masked_linear(x, weight, mask, bias), F.linear(x, weight * mask, bias))
    torch.testing.assert_close(masked_linear(x, weight, mask.float()), F.linear(x, weight * mask))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch": -1}, ValueError, "batch must be an int of at least 0"),
        ({"degrees": [torch.arange(1, 4)]}, ValueError, "degrees must be of the inputs and of each hidden layer"),
        ({"degrees": [torch.arange(3), torch.ones(4)]}, ValueError, "must be a permutation of 1"),
        ({"layers": [(torch.zeros(4, 2), None), (torch.zeros(3, 4), None)]}, ValueError, "weight 0 must have shape"),
        ({"layers": [(torch.zeros(4, 3), None), (torch.zeros(4, 4), None)]}, ValueError, "weight 1 must have shape"),
        ({"layers": [(torch.zeros(4, 3), torch.zeros(3)), (torch.zeros(3, 4), None)]}, ValueError, "bias 0 must have shape"),
        ({"bias_of_sample": torch.zeros(2, 3)}, ValueError, "bias_of_sample must have shape"),
        ({"layout": "rows"}, ValueError, "layout must be one of"),
    ],
)
def test_bad_arguments(changes, error, message):
    good = {"batch": 2, "layers": [(torch.zeros(4, 3), None), (torch.zeros(3, 4), None)]}
    good["degrees"] = [torch.arange(1, 4), torch.ones(4, dtype=torch.long)]
    with pytest.raises(error, match=message):
        made_inverse(lambda d, p: p[:, 0], **(good | changes))


def test_masked_linear_arguments():
    with pytest.raises(ValueError, match="mask must have shape"):
        masked_linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(3, 4))
    with pytest.raises(TypeError, match="mask must be a boolean"):
        masked_linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.ones(4, 3, dtype=torch.int))
