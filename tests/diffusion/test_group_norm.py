import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern.nn import GroupNormAct
from genkern.ops import group_norm_act
from genkern.testing import backends

each_backend = pytest.mark.parametrize("backend", ["reference", *backends(op="group_norm_act")])
each_kernel = pytest.mark.parametrize("backend", backends(op="group_norm_act"))


def draw(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@each_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_mean_costs_only_the_rounding_of_the_input(backend, dtype):
    """Mean 1000 (20 in bfloat16) and deviation 1: sums of squares minus squares of sums would lose five digits in float32."""
    (x,) = draw((2, 6, 37, 41))
    x = (x + (1000 if dtype == torch.float32 else 20)).to(dtype)
    with genkern.backend(backend):
        y = group_norm_act(x, 3)
    exact = F.group_norm(x.double(), 3)
    assert (y.double() - exact).abs().max() < (3e-6 if dtype == torch.float32 else 2e-2)


@each_kernel
def test_groups_of_very_different_tiles(backend):
    """A first tile far from all others: merging the tiles must not lose the variance of the rest."""
    (x,) = draw((1, 2, 64 * 1024))
    x[0, :, :700] += 3000
    with genkern.backend(backend):
        y = group_norm_act(x, 2)
    torch.testing.assert_close(y.double(), F.group_norm(x.double(), 2), rtol=1e-5, atol=2e-6)


@each_backend
def test_two_inputs_are_their_concatenation(backend):
    x1, x2, weight, bias, pre_bias, scale, shift = draw((2, 4, 5, 3), (2, 8, 5, 3), (12,), (12,), (2, 12), (2, 12), (2, 12))
    rest = {"pre_bias": pre_bias, "scale": scale, "shift": shift, "activation": "silu"}
    with genkern.backend(backend):
        assert torch.equal(
            group_norm_act([x1, x2], 3, weight, bias, **rest), group_norm_act(torch.cat([x1, x2], 1), 3, weight, bias, **rest)
        )


@each_backend
def test_slices_of_a_batch(backend):
    (x,) = draw((6, 8, 4, 5))
    with genkern.backend(backend):
        for given in (x[::2], x[:, 2:6]):
            assert torch.equal(group_norm_act(given, 2), group_norm_act(given.contiguous(), 2))


@pytest.mark.parametrize("backend", ["reference", *backends(op="group_norm_act_channels_last")])
def test_channels_last_stays_channels_last(backend):
    """A batch of one kind is read in place; one whose inputs lie differently becomes contiguous."""
    x, x3, weight = draw((3, 8, 4, 5), (3, 8, 2, 2, 3), (16,))
    last = x.to(memory_format=torch.channels_last)
    with genkern.backend(backend):
        genkern.reset_stats()
        y = group_norm_act(last.requires_grad_(), 2, activation="silu")
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, group_norm_act(x, 2, activation="silu"))
        y.sum().backward()
        assert last.grad.is_contiguous(memory_format=torch.channels_last)
        assert group_norm_act(x3.to(memory_format=torch.channels_last_3d), 4).is_contiguous(memory_format=torch.channels_last_3d)
        assert ("group_norm_act_channels_last", backend) in genkern.stats()
        mixed = group_norm_act([x, last.detach()], 4, weight)
        assert mixed.is_contiguous()
        torch.testing.assert_close(mixed, group_norm_act([x, x], 4, weight))


@each_kernel
def test_nan_stays_in_its_group_and_sample(backend):
    (x,) = draw((2, 4, 9))
    x[0, 1, 3] = float("nan")
    with genkern.backend(backend):
        y = group_norm_act(x, 2, activation="silu")
    assert y[0, :2].isnan().all() and not y[0, 2:].isnan().any() and not y[1].isnan().any()


@each_kernel
def test_parameters_stay_in_float32_beside_bfloat16_features(backend):
    (x,), (weight, bias) = draw((2, 8, 6, 6), dtype=torch.bfloat16), draw((8,), (8,))
    with genkern.backend(backend):
        y = group_norm_act(x, 2, weight.requires_grad_(), bias)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_the_layer_takes_the_state_of_torchs():
    (x,) = draw((2, 8, 5, 5))
    theirs = torch.nn.GroupNorm(4, 8, eps=1e-6)
    torch.nn.init.normal_(theirs.weight)
    ours = GroupNormAct(4, 8, eps=1e-6)
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), F.silu(theirs(x)))
    assert not GroupNormAct(4, 8, affine=False).state_dict()
    with pytest.raises(ValueError, match="num_groups"):
        GroupNormAct(3, 8)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"groups": 4}, ValueError, "divides the 6 channels, got 4"),
        ({"groups": 2.0}, ValueError, "positive int"),
        ({"x": torch.zeros(3)}, ValueError, r"\(N, C, ...\)"),
        ({"x": torch.zeros(2, 6, dtype=torch.int64)}, TypeError, "floating point"),
        ({"x": [torch.zeros(2, 6, 3), torch.zeros(2, 6, 4)]}, ValueError, "channels only"),
        ({"x": [torch.zeros(2, 2)] * 3}, ValueError, "list of two, got 3"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight must have shape \(C,\) = \(6,\), got \(5,\)"),
        ({"scale": torch.zeros(6)}, ValueError, r"scale must have shape \(N, C\) = \(2, 6\), got \(6,\)"),
        ({"activation": "relu"}, ValueError, "'silu', got 'relu'"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change, error, words):
    with pytest.raises(error, match=words):
        group_norm_act(**{"x": torch.zeros(2, 6, 3), "groups": 2, **change})


def test_into_out_and_in_place():
    make = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))
    x, weight, bias, condition = make(2, 8, 5, 7), make(8), 1 + make(8), make(2, 8)
    arguments = dict(groups=4, weight=weight, bias=bias, pre_bias=condition, activation="silu")
    expected = group_norm_act(x, **arguments)
    last = lambda x: x.to(memory_format=torch.channels_last)
    for given, out in ((last(x), torch.empty_like(last(x))), (x, torch.empty_like(last(x))), (last(x), torch.empty_like(x))):
        genkern.reset_stats()
        assert group_norm_act(given, **arguments | {"out": out}) is out
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        name = "group_norm_act_out" if out.is_contiguous() else "group_norm_act_channels_last_out"
        assert [op for op, _ in genkern.stats()] == [name]
    for out in (torch.empty_like(x), torch.empty(2, 9, 5, 7)[:, :8], torch.empty_like(x, dtype=torch.bfloat16), x):
        version = out._version
        assert group_norm_act(x, **arguments, out=out) is out and out._version > version
        torch.testing.assert_close(out, expected.to(out.dtype), rtol=1e-6 if out.dtype == torch.float32 else 1e-2, atol=1e-6)
    for change in (
        {"out": torch.empty(2, 8, 5)},
        {"out": torch.empty_like(x).double()},
        {"out": torch.empty_like(x).transpose(2, 3).contiguous().transpose(2, 3)},
        {"weight": weight.clone().requires_grad_(), "out": torch.empty_like(x)},
        {"x": [x[:, :4], x[:, 4:]], "out": x},
    ):
        with pytest.raises(ValueError, match="group_norm_act: "):
            group_norm_act(**{"x": x, **arguments, **change})
