"""The drop-in for CompressAI's masked convolution, against the layer as that library has it."""

import pytest
import torch
import torch.nn.functional as F

from genkern.integrations.compressai import MaskedConv2d


class Original(torch.nn.Conv2d):
    """Its weights, multiplied by the mask in its buffer at each call."""

    def __init__(self, *args, mask_type="A", **kwargs):
        super().__init__(*args, **kwargs)
        mask = torch.ones_like(self.weight)
        rows, columns = (k // 2 for k in self.kernel_size)
        mask[:, :, rows, columns + (mask_type == "B") :] = 0
        mask[:, :, rows + 1 :] = 0
        self.register_buffer("mask", mask)

    def forward(self, x):
        self.weight.data *= self.mask
        return super().forward(x)


@pytest.mark.parametrize("mask_type", ["A", "B"])
@pytest.mark.parametrize("kernel_size, padding", [(5, 2), ((3, 5), (1, 2))])
def test_equals_the_original(mask_type, kernel_size, padding):
    torch.manual_seed(0)
    theirs = Original(6, 9, kernel_size, padding=padding, stride=1, mask_type=mask_type).eval()
    ours, x = MaskedConv2d.of(theirs), torch.randn(2, 6, 7, 5)
    upstream = torch.randn(2, 9, 7, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    for layer in (ours, theirs):
        layer(x).backward(upstream)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad * theirs.mask)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)
    assert torch.equal(ours.mask, theirs.mask) and not ours.training
    theirs.load_state_dict(ours.state_dict())
    fresh = MaskedConv2d(6, 9, kernel_size, 1, padding, mask_type=mask_type)
    assert torch.equal(fresh.weight, fresh.weight * fresh.mask) and fresh.weight.any()


def test_decoding_pixel_by_pixel():
    """As CompressAI decodes: crops, convolved with the layer's weights alone."""
    torch.manual_seed(0)
    layer, y = MaskedConv2d(4, 8, kernel_size=5, padding=2), torch.randn(1, 4, 3, 4)
    padded, whole = F.pad(y, (2, 2, 2, 2)), layer(y)
    for row in range(3):
        for column in range(4):
            padded[:, :, row + 2, column + 2 :] = padded[:, :, row + 3 :] = 0  # not decoded yet
            for weight in (layer.weight, layer.weight * layer.mask):
                pixel = F.conv2d(padded[:, :, row : row + 5, column : column + 5], weight, layer.bias)
                torch.testing.assert_close(pixel[:, :, 0, 0], whole[:, :, row, column])
            padded[:, :, 2:5, 2:6] = y


@pytest.mark.parametrize(
    "settings",
    [{}, {"padding": 1}, {"padding": 2, "stride": 2}, {"padding": 2, "groups": 2}, {"padding": 2, "padding_mode": "reflect"}],
)
def test_other_sizes_are_refused_in_words(settings):
    with pytest.raises(ValueError, match=r"MaskedConv2d: needs stride, dilation and groups 1 and padding \(2, 2\)"):
        MaskedConv2d(4, 8, 5, **settings)
    assert MaskedConv2d(4, 8, 5, padding="same", bias=False).bias is None
