"""affine_coupling: arguments, inverse, log-determinant, masks, layouts, running sums, float32 streams with narrow parameters."""

import pytest
import torch

import genkern
from genkern.ops import additive_coupling, affine_coupling, affine_coupling_
from genkern.ops.flow._affine_coupling import SCALES
from genkern.testing import Make, backends

each_backend = pytest.mark.parametrize("backend", ["reference", *backends(op="affine_coupling")])


def arguments(masked=False, dtype=torch.float64, params_dtype=None):
    make = Make(dtype)
    x, params = make((3, 4, 5)), make((3, 8 if masked else 4, 5))
    mask = (torch.arange(4)[:, None] + torch.arange(5)) % 2 == 0 if masked else None
    return x, params.to(params_dtype or dtype), mask


@each_backend
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("masked", [False, True])
def test_inverse_and_log_det(backend, scale, masked):
    x, params, mask = arguments(masked)
    for shift_first in (False, True):
        function = lambda v, p=params, first=shift_first, **kw: affine_coupling(v, p, scale=scale, shift_first=first, mask=mask, **kw)
        with genkern.backend(backend):
            y, log_det = function(x)
            back, inverse_log_det = function(y, inverse=True)
            jacobian = torch.autograd.functional.jacobian(lambda v, f=function: f(v)[0], x)
        torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
        torch.testing.assert_close(inverse_log_det, -log_det)
        expected = torch.stack([torch.linalg.slogdet(jacobian[n, :, :, n].reshape(20, 20))[1] for n in range(3)])
        torch.testing.assert_close(log_det, expected, rtol=1e-10, atol=1e-10)
        unchanged = ~mask if masked else torch.arange(4)[:, None].expand(4, 5) < 2
        assert torch.equal(y[:, unchanged], x[:, unchanged])


@each_backend
def test_layouts_agree(backend):
    x, params, _ = arguments()
    shift, raw = params.chunk(2, 1)
    with genkern.backend(backend):
        expected = affine_coupling(x, params)
        for layout, other in (
            ("scale_shift", torch.cat([raw, shift], 1)),
            ("interleaved", torch.stack([shift, raw], 2).flatten(1, 2)),
        ):
            for a, b in zip(affine_coupling(x, other, layout=layout), expected, strict=True):
                assert torch.equal(a, b)


@each_backend
def test_running_log_det_and_narrow_parameters(backend):
    x, params, _ = arguments(dtype=torch.float32, params_dtype=torch.bfloat16)
    running = torch.arange(3.0)
    with genkern.backend(backend):
        y, log_det = affine_coupling(x, params, scale="sigmoid", log_det=running)
        wide = affine_coupling(x, params.float(), scale="sigmoid")
    assert y.dtype == log_det.dtype == torch.float32
    torch.testing.assert_close(y, wide[0])
    torch.testing.assert_close(log_det, wide[1] + running)
    doubled = running.double() + 1e-9  # wider than the op's own: added with all its digits
    with genkern.backend(backend):
        _, total = affine_coupling(x, params, scale="sigmoid", log_det=doubled)
    assert total.dtype == torch.float64
    torch.testing.assert_close(total, wide[1].double() + doubled, rtol=0, atol=1e-5)


@each_backend
def test_running_log_det_gets_its_gradient(backend):
    x, params, _ = arguments(dtype=torch.float32)
    running = torch.arange(3.0).requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5])
    with genkern.backend(backend):
        for log_det in (affine_coupling(x, params, log_det=running)[1], affine_coupling_(x.clone(), params, log_det=running)):
            (gradient,) = torch.autograd.grad(log_det, running, weights)
            assert torch.equal(gradient, weights)


@each_backend
def test_log_sigmoid_does_not_underflow(backend):
    """ln sigmoid(u + 2) is u + 2 far below zero, where the sigmoid itself is zero."""
    x, params = torch.zeros(1, 2), torch.tensor([[0.0, -200.0]], requires_grad=True)
    with genkern.backend(backend):
        _, log_det = affine_coupling(x, params, scale="sigmoid")
        log_det.sum().backward()
    assert log_det.tolist() == [-198.0] and params.grad.tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(2)}, ValueError, "params must have 1 dimensions"),
        ({"params": torch.zeros(2, 3)}, ValueError, "params must have shape"),
        ({"params": torch.zeros(2, 10)}, ValueError, "params must have shape"),
        ({"scale": "relu"}, ValueError, "scale must be one of"),
        ({"layout": "rows"}, ValueError, "layout must be one of"),
        ({"limit": 2.0}, ValueError, "limit must be positive"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be a boolean tensor"),
        ({"mask": torch.ones(4, dtype=torch.bool)}, ValueError, "with a mask all 4 channels"),
        ({"log_det": torch.zeros(3)}, ValueError, "log_det must have shape"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        affine_coupling(**({"x": torch.zeros(2, 4), "params": torch.zeros(2, 4)} | changes))


def test_additive_coupling():
    x, params, mask = arguments()
    shift = params[:, :2]
    y = additive_coupling(x, shift)
    assert torch.equal(y[:, :2], x[:, :2]) and torch.equal(y[:, 2:], x[:, 2:] + shift)
    torch.testing.assert_close(additive_coupling(y, shift, inverse=True), x)
    x, params, mask = arguments(masked=True, dtype=torch.float32, params_dtype=torch.bfloat16)
    y = additive_coupling(x, params[:, :4], mask=mask)
    assert y.dtype == torch.float32 and torch.equal(y, torch.where(mask, x + params[:, :4].float(), x))
    with pytest.raises(ValueError, match="shift must have shape"):
        additive_coupling(x, params)
    with pytest.raises(TypeError, match="mask must be a boolean tensor"):
        additive_coupling(x, params[:, :4], mask=mask.float())


@each_backend
def test_in_place(backend):
    """Only the transformed elements are written, also where rows do not lie densely."""
    x, params, mask = arguments(masked=True, dtype=torch.float32, params_dtype=torch.bfloat16)
    for settings in ({"mask": mask}, {"mask": None, "log_det": torch.arange(3.0)}):
        half = params if settings["mask"] is not None else params[:, :4]
        for y in (x.clone(), torch.cat([x, x], 1)[:, :4], x.transpose(0, 2).contiguous().transpose(0, 2)):
            version = y._version
            with genkern.backend(backend):
                log_det = affine_coupling_(y, half, scale="sigmoid", **settings)
                expected = affine_coupling(x, half, scale="sigmoid", **settings)
            assert torch.equal(y, expected[0]) and torch.equal(log_det, expected[1]) and y._version > version


def test_in_place_refuses_what_it_cannot_do():
    x, params, _ = arguments(dtype=torch.float32)
    with pytest.raises(ValueError, match="the gradient would need it"):
        affine_coupling_(x, params.requires_grad_())
    with torch.no_grad():
        affine_coupling_(x, params)
    with pytest.raises(TypeError, match="the promoted type"):
        affine_coupling_(x.bfloat16(), params.detach())


@pytest.mark.parametrize("backend", backends(op="affine_coupling"))
def test_rows_of_any_width_do_not_depend_on_their_neighbours(backend):
    make = Make(torch.float32)
    for changed in range(1, 19):  # about the lanes of a vector
        for kept in {0, 1, changed}:
            x, params, to_y, to_log_det = make((11, kept + changed)), make((11, 2 * changed)), make((11, kept + changed)), make((11,))
            with genkern.backend(backend):
                together, alone = [], []
                for rows, found in ((slice(0, 11), together), *((slice(i, i + 1), alone) for i in range(11))):
                    leaves = [t[rows].clone().requires_grad_() for t in (x, params)]
                    outputs = affine_coupling(*leaves, scale="tanh")
                    in_place = x[rows].clone()
                    affine_coupling_(in_place, params[rows], scale="tanh")
                    found.append((*outputs, *torch.autograd.grad(outputs, leaves, (to_y[rows], to_log_det[rows])), in_place))
            for a, b in zip(together[0], zip(*alone, strict=True), strict=True):
                assert torch.equal(a, torch.cat(b)), (changed, kept)
            assert torch.equal(together[0][-1], together[0][0])
