"""rational_quadratic_spline_coupling: rational_quadratic_spline of some columns, whatever the number of rows and of columns."""

import pytest
import torch

import genkern
from genkern import ops

BINS = 5


def given(rows, width, changed, dtype=torch.float64, tails="linear"):
    torch.manual_seed(0)
    numbers = 3 * BINS - (tails == "linear")
    x, params = 2 * torch.randn(rows, width, dtype=dtype), torch.randn(rows, len(changed) * numbers, dtype=dtype)
    return x, params, torch.tensor(changed)


@pytest.mark.parametrize("tails", ["linear", "circular"])
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("rows, width, changed", [(1, 1, [0]), (17, 3, [1]), (33, 4, [0, 1, 3]), (16, 2, [0, 1])])
def test_is_the_spline_of_the_changed_columns(rows, width, changed, inverse, tails):
    """In float64, where nothing is left to rounding but the order of sums; with gradients."""
    x, params, changed = given(rows, width, changed, tails=tails)
    wanted, found = [t.clone().requires_grad_() for t in (x, params)], [t.clone().requires_grad_() for t in (x, params)]
    options = {"inverse": inverse, "tails": tails, "tail_bound": 2.0}
    y, log_det = ops.rational_quadratic_spline_coupling(*found, changed, bins=BINS, logit_scale=0.5, **options)
    widths, heights, slopes = wanted[1].unflatten(1, (len(changed), -1)).tensor_split([BINS, 2 * BINS], -1)
    own, own_log_det = ops.rational_quadratic_spline(
        wanted[0][:, changed], widths / 2, heights / 2, slopes, log_det="sample", **options
    )
    expected = wanted[0].index_copy(1, changed, own)
    torch.testing.assert_close((y, log_det), (expected, own_log_det), rtol=1e-12, atol=1e-12)
    (y.sin().sum() + log_det.sum()).backward()
    (expected.sin().sum() + own_log_det.sum()).backward()
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_the_last_features_change_by_default():
    x, params, changed = given(20, 5, [3, 4], torch.float32)
    for one, other in zip(*(ops.rational_quadratic_spline_coupling(x, params, c, bins=BINS) for c in (changed, None)), strict=True):
        assert torch.equal(one, other)


def test_a_row_does_not_depend_on_the_others():
    x, params, changed = given(50, 3, [0, 2], torch.float32)
    y, log_det = ops.rational_quadratic_spline_coupling(x, params, changed, bins=BINS)
    one, own = ops.rational_quadratic_spline_coupling(x[7:8], params[7:8], changed, bins=BINS)
    assert torch.equal(one, y[7:8]) and torch.equal(own, log_det[7:8])


@pytest.mark.parametrize("changed", [[0, 3], [-1, 0], [1, 0], [1, 1]])
def test_positions_out_of_order_or_range(changed):
    x, params, changed = given(4, 3, changed)
    with pytest.raises(ValueError, match="increasing positions"):
        ops.rational_quadratic_spline_coupling(x, params, changed, bins=BINS)


def test_a_compiled_call_writes_nothing_outside():
    """The values of `changed` are then not read in Python."""
    if genkern.core.OPS["rational_quadratic_spline_coupling"].available("cpu")["cpu"] is not None:
        pytest.skip("no CPU kernel here")
    x, params, _ = given(4, 3, [0, 1], torch.float32)
    with pytest.raises(RuntimeError, match="out of range"):
        torch.ops.genkern._rational_quadratic_spline_coupling(
            x, params, torch.tensor([0, 3]), False, BINS, 1, 1.0, 1e-3, 1e-3, 1e-3, 1.0
        )
