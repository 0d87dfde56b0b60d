"""CausalAttention2d: attention of every pixel over those strictly before it in raster order."""

import torch
import torch.nn.functional as F

from genkern.ops._common import check_float, check_shape


class CausalAttention2d(torch.nn.Module):
    """The attention of PixelSNAIL (Chen et al., 2018, section 3): y_p = sum over q < p of softmax_q(k_q . query_p / sqrt(d)) v_q.

    The first pixel has nothing before it: its sum is 0. In and out (N, channels, H, W); queries, keys and values are 1x1 convolutions
    of x, with two channels of its coordinates, (i - H / 2) / H and (j - W / 2) / W, added; one more goes to the output. A pixel's own x
    enters its query alone: where x sees the pixels up to its own, so does the result, and where it sees those before, so does that.

    Keys and values that are no finite numbers make those after them NaN and leave those before as they were, bit for bit.
    """

    def __init__(self, channels, *, heads=4, device=None, dtype=None):
        super().__init__()
        if heads < 1 or channels % heads:
            raise ValueError(f"CausalAttention2d: channels must be a multiple of heads, got {channels} and {heads}")
        self.heads = heads
        self.qkv = torch.nn.Conv2d(channels + 2, 3 * channels, 1, device=device, dtype=dtype)
        self.out = torch.nn.Conv2d(channels, channels, 1, device=device, dtype=dtype)

    def forward(self, x):
        check_float("CausalAttention2d", "x", x, 4)
        check_shape("CausalAttention2d", "x", x, (len(x), self.out.in_channels, *x.shape[2:]), "(N, channels, H, W)")
        n, channels, height, width = x.shape
        background = _coordinates(x).expand(n, -1, -1, -1)
        q, k, v = self.qkv(torch.cat([x, background], 1)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4).unbind(1)
        # query p against keys 0 .. p - 1 is the usual causal attention of the queries from 1 on
        finite = (k.isfinite() & v.isfinite()).all(3, keepdim=True)
        k, v = (torch.where(finite, t, 0)[:, :, :-1] for t in (k, v))
        y = F.pad(F.scaled_dot_product_attention(q[:, :, 1:], k, v, is_causal=True), (0, 0, 1, 0))
        spoiled = F.pad((~finite).long().cumsum(2)[:, :, :-1], (0, 0, 1, 0)) > 0
        y = torch.where(spoiled, torch.nan, y)
        return self.out(y.transpose(2, 3).reshape(n, channels, height, width))

    def step(self, x, state, position, size):
        """One pixel x (N, channels) at position (row, column) of an image of size (H, W): (its output, the state). None: the first.

        Equals forward() there up to the rounding of sums.
        """
        (row, column), (height, width) = position, size
        background = x.new_tensor([(row - height / 2) / height, (column - width / 2) / width]).expand(len(x), 2)
        qkv = F.linear(torch.cat([x, background], 1), self.qkv.weight.flatten(1), self.qkv.bias)
        q, k, v = qkv.unflatten(1, (3, self.heads, 1, -1)).unbind(1)  # (N, heads, 1, d)
        count = row * width + column
        if state is None:
            state = x.new_zeros(2, len(x), self.heads, height * width, k.shape[3])
        state[0, :, :, count], state[1, :, :, count] = k[:, :, 0], v[:, :, 0]
        y = F.scaled_dot_product_attention(q, state[0, :, :, :count], state[1, :, :, :count]) if count else torch.zeros_like(q)
        return F.linear(y.flatten(1), self.out.weight.flatten(1), self.out.bias), state


def _coordinates(x):
    height, width = x.shape[2:]
    rows = (torch.arange(height, device=x.device, dtype=x.dtype) - height / 2) / height
    columns = (torch.arange(width, device=x.device, dtype=x.dtype) - width / 2) / width
    return torch.stack([rows[:, None].expand(height, width), columns.expand(height, width)])[None]
