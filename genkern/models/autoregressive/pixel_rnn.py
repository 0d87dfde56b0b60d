"""PixelRNN (van den Oord, Kalchbrenner & Kavukcuoglu, 2016): LSTMs over images, of two kinds.

row         Row LSTM. All of a row at once: the gates of row i are a masked 1 x k convolution of the row's input and a 1 x k convolution
            of the hidden row above. A pixel sees a triangle above it.
diagonal    Diagonal BiLSTM. A pixel's gates are those of its input and of the hidden pixels to the left and above; all pixels of a
            diagonal at once. A second LSTM comes from the right, its result one row down so that nothing ahead is seen. Together they
            see every pixel before, but for the last of the row above where the first convolution does not reach it.

A diagonal of a contiguous map of width W is every (W - 1)-th of its pixels, a strided view: no skewed copy is made. Gates: o, f, i are
sigmoids, g a tanh; c = f c + i g; h = o tanh(c) (equation 3). The recurrence is plain torch: its time goes into matrix products.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from genkern.models._base import Training
from genkern.models.autoregressive._pixels import Levels, Pixels
from genkern.models.autoregressive._raster import RasterMasked, shifted_down


@dataclass
class PixelRNNConfig:
    channels: int = 1
    size: int = 8  # height and width
    levels: int = 255  # uint8 images hold 0..levels
    classes: int = 0  # 0: labels are not used
    width: int = 24  # of the hidden states, twice as many channels between the layers; a multiple of channels
    layers: int = 2
    kind: str = "diagonal"  # or "row"
    kernel: int = 3  # of a Row LSTM
    first_kernel: int = 7
    dropout: float = 0.2


class PixelRNN(Pixels):
    """PixelRNN(PixelRNNConfig(levels=16)): images (N, channels, size, size), uint8 or float in [-1, 1]; figures in nats."""

    Config = PixelRNNConfig
    defaults = Training(epochs=12, batch_size=32, learning_rate=3e-3, schedule="cosine", clip_grad_norm=1.0, ema=0.99)

    def __init__(self, config):
        super().__init__(config)
        c = config
        if c.kind not in KINDS:
            raise ValueError(f"PixelRNN: kind must be one of {', '.join(KINDS)}, got {c.kind!r}")
        if c.width % c.channels:
            raise ValueError(f"PixelRNN: width must be a multiple of channels, got {c.width} and {c.channels}")
        self.head = Levels(c.channels, c.levels)
        masked = lambda a, b, kernel, kind="B": RasterMasked(a, b, kernel, mask_type=kind, colors=c.channels)
        self.first = masked(c.channels, 2 * c.width, c.first_kernel, "A")
        self.layers = nn.ModuleList(KINDS[c.kind](c) for _ in range(c.layers))
        self.outs = nn.ModuleList(masked(c.width, 2 * c.width, 1) for _ in range(c.layers))
        self.last = nn.ModuleList([masked(2 * c.width, 2 * c.width, 1), masked(2 * c.width, self.head.outputs, 1)])
        if c.classes:
            self.label = nn.Embedding(c.classes, 2 * c.width)

    def condition(self, labels):
        return None if labels is None else self.label(labels)[:, :, None, None]

    def vertical(self, x, condition, place):
        return None  # the layers look above by themselves

    def horizontal(self, x, features, condition, place):
        h = self.first(x, place)
        if condition is not None:
            h = h + (condition if h.dim() == 4 else condition.flatten(1))
        for layer, out in zip(self.layers, self.outs, strict=True):
            h = h + F.dropout(out(layer(h, place), place), self.config.dropout, self.training)
        for conv in self.last:
            h = conv(F.relu(h), place)
        return h


def _cell(gates, c, colors):
    """(h, c) from gates (N, 4 width, ...), those of a colour neighbours, and the cells before."""
    o, f, i, g = (part.flatten(1, 2) for part in gates.unflatten(1, (colors, 4, -1)).unbind(2))
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class RowLSTM(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.colors, self.width, self.kernel = c.channels, c.width, c.kernel
        self.input = RasterMasked(2 * c.width, 4 * c.width, (1, c.kernel), mask_type="B", colors=c.channels)
        self.state = nn.Conv1d(c.width, 4 * c.width, c.kernel, padding=c.kernel // 2, bias=False)

    def forward(self, x, place):
        gates = self.input(x, place)
        if place is not None:
            return self._pixel(gates, place)
        n, _, height, width = x.shape
        h = c = x.new_zeros(n, self.width, width)
        rows = []
        for row in gates.unbind(2):
            h, c = _cell(row + self.state(h), c, self.colors)
            rows.append(h)
        return torch.stack(rows, 2)

    def _pixel(self, gates, place):
        row, recurrent, c, new_h, new_c = place.kept.get((self, "row"), (None,) * 5)
        if row is None:
            new_h = new_c = gates.new_zeros(len(gates), self.width, place.width)
        if row != place.row:  # what was the current row is now the one above
            recurrent, c = self.state(new_h), new_c
            new_h, new_c = torch.zeros_like(new_h), torch.zeros_like(new_c)
            place.kept[self, "row"] = place.row, recurrent, c, new_h, new_c
        j = place.column
        new_h[..., j], new_c[..., j] = _cell(gates + recurrent[..., j], c[..., j], self.colors)
        return new_h[..., j]


class DiagonalBiLSTM(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.left, self.right = _Diagonal(c), _Diagonal(c)

    def forward(self, x, place):
        if place is None:
            return self.left(x) + shifted_down(self.right(x.flip(3)).flip(3))
        rows, row = place.kept.get(self, (None, None))
        if rows is None:
            rows = x.new_zeros(len(x), x.shape[1], place.width)
        if row != place.row:
            above = x.new_zeros(len(x), self.right.width, place.width)
            if place.row:  # from the right over the row above, now that it is known
                for j in range(place.width):
                    above[..., -1 - j] = self.right.pixel(rows[..., -1 - j], place.at(place.row - 1, j))
            place.kept[self, "above"] = above
        rows[..., place.column] = x
        place.kept[self] = rows, place.row
        return self.left.pixel(x, place) + place.kept[self, "above"][..., place.column]


class _Diagonal(nn.Module):
    """From the left."""

    def __init__(self, c):
        super().__init__()
        self.colors, self.width = c.channels, c.width
        self.input = RasterMasked(2 * c.width, 4 * c.width, 1, mask_type="B", colors=c.channels)
        self.state = nn.Linear(2 * c.width, 4 * c.width, bias=False)  # of the hidden pixels above and to the left

    def forward(self, x):
        n, _, height, width = x.shape
        gates = self.input(x).flatten(2)
        h = c = x.new_zeros(n, self.width, height + 1)  # by row, the first one above the image: where each row stands
        diagonals = []
        for d in range(height + width - 1):
            top, bottom = max(0, d - width + 1), min(d, height - 1) + 1
            here = gates[..., top * (width - 1) + d :: max(1, width - 1)][..., : bottom - top]
            before = torch.cat([h[..., top:bottom], h[..., top + 1 : bottom + 1]], 1)
            new_h, new_c = _cell(
                here + F.linear(before.transpose(1, 2), self.state.weight).transpose(1, 2), c[..., top + 1 : bottom + 1], self.colors
            )
            join = lambda old, new, top=top, bottom=bottom: torch.cat([old[..., : top + 1], new, old[..., bottom + 1 :]], 2)
            h, c = join(h, new_h), join(c, new_c)
            diagonals.append(new_h)
        return _unskewed(diagonals, height, width)

    def pixel(self, x, place):
        gates = self.input(x, place)
        row, above, h, c = place.kept.get(self, (None,) * 4)
        if row is None:
            h = gates.new_zeros(len(gates), self.width, place.width + 1)  # one to the left of the image
        if row != place.row:
            above, h, c = h, torch.zeros_like(h), torch.zeros_like(h)
            place.kept[self] = place.row, above, h, c
        j = place.column + 1
        before = torch.cat([above[..., j], h[..., j - 1]], 1)
        h[..., j], c[..., j] = _cell(gates + self.state(before), c[..., j - 1], self.colors)
        return h[..., j]


def _unskewed(diagonals, height, width):
    """The map of its diagonals: pixel (i, j) is in diagonal i + j, whose first row is max(0, i + j - width + 1)."""
    starts, total = [], 0
    for d, values in enumerate(diagonals):
        starts.append(total - max(0, d - width + 1))
        total += values.shape[2]
    index = torch.tensor([starts[i + j] + i for i in range(height) for j in range(width)], device=diagonals[0].device)
    return torch.cat(diagonals, 2)[..., index].unflatten(2, (height, width))


KINDS = {"row": RowLSTM, "diagonal": DiagonalBiLSTM}
