"""gated_activation: colours stay apart, and bad arguments."""

import pytest
import torch

from genkern import ops


@pytest.mark.parametrize("layout", ["grouped", "interleaved"])
def test_colors_stay_apart(layout):
    """A result depends on channels of its own colour alone."""
    colors, c = 3, 6
    color_of = lambda channels: torch.arange(channels) * colors // channels if layout == "grouped" else torch.arange(channels) % colors
    x = torch.randn(1, 2 * c, 2)
    expected = ops.gated_activation(x, colors=colors, layout=layout)
    for color in range(colors):
        poisoned = x.clone()
        poisoned[:, color_of(2 * c) == color] = float("nan")
        y = ops.gated_activation(poisoned, colors=colors, layout=layout)
        own = color_of(c) == color
        assert y[:, own].isnan().all() and torch.equal(y[:, ~own], expected[:, ~own])


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"x": torch.zeros(2, 3)}, ValueError, "x must have shape"),
        ({"x": torch.zeros(2, 4), "colors": 3}, ValueError, "divisible by colors"),
        ({"x": torch.zeros(2, 4), "colors": 0}, ValueError, "colors must be"),
        ({"x": torch.zeros(2, 4), "layout": "thirds"}, ValueError, "layout must be"),
        ({"x": torch.zeros(2, 4), "condition": torch.zeros(2, 2)}, ValueError, "must broadcast"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "floating point"),
    ],
)
def test_bad_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        ops.gated_activation(**arguments)
