import pytest
import torch

from genkern.nn import CausalAttention2d
from genkern.testing import assert_autoregressive


def small(channels=6, heads=2):
    torch.manual_seed(0)
    return CausalAttention2d(channels, heads=heads)


def test_it_is_the_formula():
    layer, x = small().double(), torch.randn(2, 6, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows, columns = (torch.arange(3) - 1.5) / 3, (torch.arange(4) - 2) / 4
    background = torch.stack([rows[:, None].expand(3, 4), columns.expand(3, 4)]).double().expand(2, 2, 3, 4)
    q, k, v = layer.qkv(torch.cat([x, background], 1)).flatten(2).chunk(3, 1)
    y = torch.zeros(2, 6, 12, dtype=torch.float64)
    for head in (slice(0, 3), slice(3, 6)):
        for p in range(1, 12):
            scores = torch.einsum("nd,ndq->nq", q[:, head, p], k[:, head, :p]) / 3**0.5
            y[:, head, p] = torch.einsum("nq,ndq->nd", scores.softmax(1), v[:, head, :p])
    torch.testing.assert_close(layer(x), layer.out(y.view(2, 6, 3, 4)))


def test_no_later_pixel_is_seen_and_of_its_own_the_query_alone():
    layer, x = small(), torch.randn(1, 6, 4, 5, generator=torch.Generator().manual_seed(1))
    assert_autoregressive(layer, x, order="raster", strict=False)
    x[0, 0, 2, 1] = torch.nan  # a pixel that is no number spoils itself and all later ones
    assert torch.equal(layer(x).isnan().any(1).flatten(), torch.arange(20) >= 11)


def test_steps_equal_the_whole_and_one_pixel_is_enough():
    layer, x, state = small(), torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(1)), None
    whole = layer(x)
    for p in range(20):
        y, state = layer.step(x[:, :, p // 5, p % 5], state, (p // 5, p % 5), (4, 5))
        torch.testing.assert_close(y, whole[:, :, p // 5, p % 5], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x[:, :, :1, :1])[0, :, 0, 0], layer.out.bias)
    with pytest.raises(ValueError, match="multiple of heads"):
        CausalAttention2d(6, heads=4)
