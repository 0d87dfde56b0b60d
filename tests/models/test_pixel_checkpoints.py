"""The key layouts of published PixelCNN++ checkpoints: the network written down once more as published, on random weights."""

import pytest
import torch
import torch.nn.functional as F

from genkern.models import PixelCNNpp

WIDTH, BLOCKS, MIXTURES = 4, 2, 2


class Published:
    """OpenAI's model_spec; weights are made when first asked for, under pclucas14's name and under TensorFlow's count."""

    def __init__(self, layout):
        self.layout, self.weights, self.counts, self.generator = layout, {}, {}, torch.Generator().manual_seed(0)

    def layer(self, kind, name, out, channels, *size):
        """Effective weight in torch's order, and bias."""
        random = lambda *shape: torch.randn(shape, generator=self.generator)
        b = 0.1 * random(out)
        if self.layout == "pclucas14":
            v = random(*((channels, out) if kind == "deconv2d" else (out, channels)), *size)
            g = 0.5 + random(len(v), *[1] * (v.dim() - 1)).abs()
            self.weights |= {f"module.{name}.weight_v": v, f"module.{name}.weight_g": g, f"module.{name}.bias": b}
            return v * g / v.flatten(1).norm(dim=1).view_as(g), b
        number = self.counts[kind] = self.counts.get(kind, -1) + 1
        v = random(*size, *((out, channels) if kind == "deconv2d" else (channels, out)))
        g = 0.5 + random(out).abs()
        names = {"V": v, "g": g, "b": b}
        self.weights |= {f"model/{kind}_{number}/{part}": torch.zeros_like(value).numpy() for part, value in names.items()}
        self.weights |= {f"model/{kind}_{number}/{part}/ExponentialMovingAverage": value.numpy() for part, value in names.items()}
        if kind == "dense":
            return (v * g / v.norm(dim=0)).t(), b
        norm = v.square().sum((0, 1, 3) if kind == "deconv2d" else (0, 1, 2)).sqrt()
        return (v * (g / norm)[(..., None) if kind == "deconv2d" else ...]).permute(3, 2, 0, 1), b

    def conv(self, name, x, out, size, right, stride=1):
        side = (size[1] - 1) // 2 if not right else 0
        pad = (side, side, size[0] - 1, 0) if not right else (size[1] - 1, 0, size[0] - 1, 0)
        return F.conv2d(F.pad(x, pad), *self.layer("conv2d", f"{name}.conv", out, x.shape[1], *size), stride)

    def nin(self, name, x, out):
        weight, bias = self.layer("dense", f"{name}.lin_a", out, x.shape[1])
        return F.conv2d(x, weight[:, :, None, None], bias)

    def deconv(self, name, x, size, right):
        y = F.conv_transpose2d(x, *self.layer("deconv2d", f"{name}.deconv", WIDTH, WIDTH, *size), 2, output_padding=1)
        y = y[:, :, : y.shape[2] - 1]
        return y[..., :-1] if right else y[..., 1:-1]

    def block(self, name, x, a, right):
        elu, size = lambda t: F.elu(torch.cat([t, -t], 1)), (2, 2) if right else (2, 3)
        c = self.conv(f"{name}.conv_input", elu(x), WIDTH, size, right)
        if a is not None:
            c = c + self.nin(f"{name}.nin_skip", elu(a), WIDTH)
        a, b = self.conv(f"{name}.conv_out", elu(c), 2 * WIDTH, size, right).chunk(2, 1)
        return x + a * torch.sigmoid(b)

    def __call__(self, x):
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        down, right = lambda t: F.pad(t, (0, 0, 1, 0))[:, :, :-1], lambda t: F.pad(t, (1, 0))[..., :-1]
        us = [down(self.conv("u_init", x, WIDTH, (2, 3), False))]
        uls = [down(self.conv("ul_init.0", x, WIDTH, (1, 3), False)) + right(self.conv("ul_init.1", x, WIDTH, (2, 1), True))]
        for level in range(3):
            for i in range(BLOCKS):
                us.append(self.block(f"up_layers.{level}.u_stream.{i}", us[-1], None, False))
                uls.append(self.block(f"up_layers.{level}.ul_stream.{i}", uls[-1], us[-1], True))
            if level < 2:
                us.append(self.conv(f"downsize_u_stream.{level}", us[-1], WIDTH, (2, 3), False, 2))
                uls.append(self.conv(f"downsize_ul_stream.{level}", uls[-1], WIDTH, (2, 2), True, 2))
        u, ul = us.pop(), uls.pop()
        for level in range(3):
            for i in range(BLOCKS + (level > 0)):
                u = self.block(f"down_layers.{level}.u_stream.{i}", u, us.pop(), False)
                ul = self.block(f"down_layers.{level}.ul_stream.{i}", ul, torch.cat([u, uls.pop()], 1), True)
            if level < 2:
                u = self.deconv(f"upsize_u_stream.{level}", u, (2, 3), False)
                ul = self.deconv(f"upsize_ul_stream.{level}", ul, (2, 2), True)
        assert not us and not uls
        return self.nin("nin_out", F.elu(ul), 10 * MIXTURES)


@pytest.mark.parametrize("layout", ["pclucas14", "openai"])
def test_a_published_layout_gives_the_published_network(layout):
    published, x = Published(layout), torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    expected = published(x)
    model = PixelCNNpp.from_checkpoint(published.weights, size=8)
    assert (model.config.width, model.config.blocks, model.config.mixtures) == (WIDTH, BLOCKS, MIXTURES) and not model.training
    torch.testing.assert_close(model.predict(x), expected, rtol=1e-4, atol=1e-5)


def test_other_keys_are_refused_in_words():
    published = Published("pclucas14")
    published(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="lacks nin_out.lin_a.bias"):
        PixelCNNpp.from_checkpoint({name: w for name, w in published.weights.items() if name != "module.nin_out.lin_a.bias"})
    with pytest.raises(ValueError, match="no checkpoint"):
        PixelCNNpp.from_checkpoint({"encoder.weight": torch.zeros(3)})
    for wrong in ([1], {"u_init.conv.weight_v": "text"}, published.weights | {"module.u_init.conv.weight_g": torch.ones(5)}):
        with pytest.raises(ValueError, match="no checkpoint"):
            PixelCNNpp.from_checkpoint(wrong)
    with pytest.raises(ValueError, match="does not fit"):
        PixelCNNpp.from_checkpoint(published.weights, attention_heads=1)
