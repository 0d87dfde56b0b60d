"""assert_autoregressive catches the mistakes that masked layers are known for."""

import pytest
import torch
import torch.nn.functional as F

from genkern import nn, ops
from genkern.testing import assert_autoregressive

IMAGE = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(1))


class Masked(torch.nn.Conv2d):
    """A layer as people write it: the weight times a mask, with a place for a mistake."""

    def __init__(self, channels, channels_out, kind, kernel=3, mistake=None):
        super().__init__(channels, channels_out, kernel, padding=kernel // 2)
        middle = kernel // 2
        mask = torch.zeros(channels_out, channels, kernel, kernel)
        mask[:, :, :middle] = 1
        mask[:, :, middle, :middle] = 1
        mask[:, :, middle, middle] = kind == "B"
        if mistake == "right of the centre":
            mask[:, :, middle, middle + 1 :] = 1
        if mistake == "row below":
            mask = mask.flip(2)
        if mistake == "columns for rows":
            mask = mask.mT.clone()
        self.register_buffer("mask", mask)
        self.mistake = mistake
        if mistake == "masked once":
            self.weight.data *= mask

    def forward(self, x):
        weight = self.weight if self.mistake == "masked once" else self.weight * self.mask
        return F.conv2d(x, weight, self.bias, padding=self.padding)


def raster(function, **options):
    assert_autoregressive(function, IMAGE, order="raster", **options)


def test_right_layers_pass():
    torch.manual_seed(0)
    raster(Masked(3, 4, "A"), poison=False)
    raster(Masked(3, 4, "B"), poison=False, strict=False)
    raster(nn.MaskedConv2d(3, 4, 3, mask_type="A"))


def test_mask_that_multiplies_lets_infinities_through():
    with pytest.raises(AssertionError, match="not autoregressive"):
        raster(Masked(3, 4, "A"))


@pytest.mark.parametrize("mistake", ["right of the centre", "row below", "columns for rows"])
def test_wrong_masks(mistake):
    with pytest.raises(AssertionError, match="become other values"):
        raster(Masked(3, 4, "A", mistake=mistake), poison=False)


def test_type_b_where_type_a_belongs():
    with pytest.raises(AssertionError, match="not autoregressive"):
        raster(nn.MaskedConv2d(3, 4, 3, mask_type="B"))


def test_weights_masked_once_are_dirtied_by_the_optimizer():
    layer = Masked(3, 4, "A", mistake="masked once")
    raster(layer, poison=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(IMAGE).square().sum().backward()
    optimizer.step()
    with pytest.raises(AssertionError, match="not autoregressive"):
        raster(layer, poison=False)


def test_colors_in_the_wrong_order():
    flipped = nn.MaskedConv2d(3, 6, 3, mask_type="A", colors=3)
    with pytest.raises(AssertionError, match="not autoregressive"):
        raster(lambda x: flipped(x.flip(1)).flip(1), colors=3)


def test_no_order_of_colors():
    with pytest.raises(AssertionError, match="not autoregressive"):
        raster(nn.MaskedConv2d(3, 6, 3, mask_type="B"), colors=3, strict=False)


@pytest.mark.parametrize("inside, outside", [("grouped", "interleaved"), ("interleaved", "grouped")])
def test_output_read_in_the_other_layout(inside, outside):
    with pytest.raises(AssertionError, match="not autoregressive"):
        raster(nn.MaskedConv2d(3, 6, 3, mask_type="A", colors=3, layout=inside), colors=3, layout=outside)


def test_gate_that_splits_across_colors():
    first = nn.MaskedConv2d(3, 12, 3, mask_type="A", colors=3)
    raster(lambda x: ops.gated_activation(first(x), colors=3), colors=3)
    with pytest.raises(AssertionError, match="not autoregressive"):
        raster(lambda x: ops.gated_activation(first(x)), colors=3)


def test_sequences():
    conv = nn.CausalConv1d(4, 4, 3, groups=4)
    x = torch.randn(2, 4, 12)
    assert_autoregressive(conv, x, strict=False)
    shifted = lambda x: F.pad(conv(x), (1, 0))[..., :-1]
    assert_autoregressive(shifted, x)
    with pytest.raises(AssertionError, match="not autoregressive"):
        assert_autoregressive(conv, x)
    with pytest.raises(AssertionError, match="not autoregressive"):
        assert_autoregressive(torch.nn.Conv1d(4, 4, 3, padding=1), x, strict=False)


def test_tokens():
    embedding = torch.nn.Embedding(7, 5)
    tokens = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(0))
    running = lambda t: embedding(t).cumsum(1)
    assert_autoregressive(running, tokens, strict=False, output_dim=1)
    with pytest.raises(AssertionError, match="not autoregressive"):
        assert_autoregressive(lambda t: running(t).flip(1), tokens, strict=False, output_dim=1)


@pytest.mark.parametrize("token", [0, 1, 2])
def test_every_token_is_replaced_by_another(token):
    """A look ahead at one value of three alone."""
    tokens = torch.tensor([[0, 1, 2, 2, 1, 0, 1, 2, 0]])
    ahead = lambda t: F.pad((t == token).float(), (0, 1))[:, 1:] + t.cumsum(1)
    with pytest.raises(AssertionError, match="not autoregressive"):
        assert_autoregressive(ahead, tokens, strict=False)


def test_what_cannot_be_judged_is_said():
    layer = nn.MaskedConv2d(3, 3, 3, mask_type="A")
    with pytest.raises(AssertionError, match="two calls with the same input differ"):
        raster(lambda x: F.dropout(layer(x), 0.5))
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        raster(lambda x: (layer(x),))
    with pytest.raises(ValueError, match="'grouped', 'interleaved'"):
        raster(layer, layout="thirds")
    with pytest.raises(ValueError, match="of images"):
        raster(lambda x: layer(x).flatten(2))


def test_a_constant_proves_nothing():
    with pytest.raises(AssertionError, match="does not depend"):
        assert_autoregressive(torch.zeros_like, torch.randn(1, 2, 5))
