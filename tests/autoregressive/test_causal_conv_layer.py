"""CausalConv1d and the functions named as those of the causal-conv1d package."""

import pytest
import torch
import torch.nn.functional as F

import genkern
from genkern import nn
from genkern.integrations.causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from genkern.testing import backends


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_layer_is_torch_conv_with_a_past(groups):
    twin = torch.nn.Conv1d(6, 6, 3, dilation=2, groups=groups)
    layer = nn.CausalConv1d(6, 6, 3, dilation=2, groups=groups)
    layer.load_state_dict(twin.state_dict())
    x = torch.randn(2, 6, 11)
    torch.testing.assert_close(layer(x), twin(F.pad(x, (4, 0))))
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            first, state = layer.step(x[..., :5])
            outputs = [first]
            for t in range(5, 11):
                y, state = layer.step(x[..., t], state)
                outputs.append(y[..., None])
            torch.testing.assert_close(torch.cat(outputs, 2), layer(x))


def test_steps_with_silu_have_the_bits_of_the_layer():
    layer, x = nn.CausalConv1d(5, 8, 3, dilation=2, activation="silu"), torch.randn(2, 5, 11)
    expected = layer(x)
    genkern.reset_stats()
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        first, state = layer.step(x[..., :5])
        outputs = [first]
        for t in range(5, 11):
            y, state = layer.step(x[..., t], state)
            outputs.append(y[..., None])
    assert torch.equal(torch.cat(outputs, 2), expected)
    if "cpu" in backends(op="causal_conv1d_dense_silu"):
        assert genkern.stats() == {("causal_conv1d_dense_silu", "cpu"): 8}


def test_layer_with_a_gate():
    layer, x, condition = nn.CausalConv1d(5, 8, 3, dilation=2, activation="gated"), torch.randn(2, 5, 11), torch.randn(2, 8, 11)
    expected = layer(x, condition)
    assert expected.shape == (2, 4, 11)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            first, state = layer.step(x[..., :5], None, condition[..., :5])
            outputs = [first]
            for t in range(5, 11):
                y, state = layer.step(x[..., t], state, condition[..., t])
                outputs.append(y[..., None])
            assert torch.equal(torch.cat(outputs, 2), expected)


@pytest.mark.parametrize("change", [{"stride": 2}, {"padding": 1}, {"padding_mode": "reflect"}, {"activation": "relu"}])
def test_layer_refuses_what_is_not_causal(change):
    with pytest.raises(ValueError, match="CausalConv1d"):
        nn.CausalConv1d(2, 2, 3, **change)


def _arguments():
    torch.manual_seed(0)
    return torch.randn(2, 5, 9), torch.randn(5, 4), torch.randn(5)


def test_fn():
    x, weight, bias = _arguments()
    expected = F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=5))
    torch.testing.assert_close(causal_conv1d_fn(x, weight, bias, activation="swish"), expected)
    states = torch.empty(2, 5, 3)
    options = {"return_final_states": True, "final_states_out": states, "activation": "silu"}
    out, final = causal_conv1d_fn(x.bfloat16(), weight, bias, initial_states=torch.zeros(2, 5, 3), **options)
    assert out.dtype == torch.bfloat16 and final is states
    torch.testing.assert_close(states, x[..., 6:].bfloat16().float())
    with pytest.raises(NotImplementedError, match="swish"):
        causal_conv1d_fn(x, weight, activation="gelu")


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("backend", ("reference", *backends(op="causal_conv1d_update")))
def test_update(ring, backend):
    x, weight, bias = _arguments()
    expected = causal_conv1d_fn(x, weight, bias, activation="silu")
    state = torch.zeros(4, 5, 6)
    slots, seen = torch.tensor([3, 1], dtype=torch.int32), 0
    outputs = []
    for part in x.split([1, 2, 6], 2):
        lengths = torch.full((2,), seen, dtype=torch.int32) if ring else None
        with genkern.backend(backend):
            y = causal_conv1d_update(part, state, weight, bias, "silu", cache_seqlens=lengths, conv_state_indices=slots)
        outputs.append(y)
        seen += part.shape[2]
    torch.testing.assert_close(torch.cat(outputs, 2), expected)
    last = [(t % 6 if ring else t - 3, t) for t in range(3, 9)]
    for place, t in last:
        assert torch.equal(state[3, :, place], x[0, :, t]) and torch.equal(state[1, :, place], x[1, :, t])
    assert (state[[0, 2]] == 0).all()
    one = causal_conv1d_update(x[..., 0], state, weight, conv_state_indices=torch.tensor([-1, 0], dtype=torch.int32))
    assert one.shape == (2, 5) and (one[0] == 0).all()
