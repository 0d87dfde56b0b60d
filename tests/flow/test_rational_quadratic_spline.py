"""rational_quadratic_spline: arguments, inverse, log-determinant, the ends of the interval, extreme parameters, float64."""

import numpy as np
import pytest
import torch

import genkern
from genkern.ops import rational_quadratic_spline as spline
from genkern.testing import Make, all_cases, backends
from genkern.testing._check import _outputs_and_gradients

NAME = "rational_quadratic_spline"
TAILS = {"linear": -1, "circular": 0, None: 1}
each_backend = pytest.mark.parametrize("backend", ["reference", *backends(op=NAME)])
each_tails = pytest.mark.parametrize("tails", TAILS)


def parameters(*shape, bins=6, tails="linear", dtype=torch.float64, scale=1.0):
    make = Make(dtype)
    return make((*shape, bins), scale), make((*shape, bins), scale), make((*shape, bins + TAILS[tails]), scale)


@each_backend
@each_tails
def test_inverse_and_log_det(backend, tails):
    x = torch.linspace(-1.9, 1.9, 42, dtype=torch.float64).reshape(6, 7)
    params = parameters(6, 7, tails=tails)
    with genkern.backend(backend):
        y, log_det = spline(x, *params, tails=tails, tail_bound=2.0)
        back, inverse_log_det = spline(y, *params, tails=tails, tail_bound=2.0, inverse=True)
        summed = spline(x, *params, tails=tails, tail_bound=2.0, log_det="sample")[1]
        jacobian = torch.autograd.functional.jacobian(lambda v: spline(v, *params, tails=tails, tail_bound=2.0)[0].flatten(), x)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=0, atol=1e-11)
    torch.testing.assert_close(summed, log_det.sum(1), rtol=1e-12, atol=1e-12)
    _, expected = torch.linalg.slogdet(jacobian.reshape(42, 42))
    torch.testing.assert_close(log_det.sum(), expected, rtol=1e-10, atol=1e-10)


@each_backend
def test_round_trip_in_float32_within_the_rounding_of_y(backend):
    """y is stored in float32: half a unit of it moves x by that over the slope."""
    x = torch.linspace(-3, 3, 4000).reshape(400, 10)
    params = parameters(400, 10, dtype=torch.float32)
    with genkern.backend(backend):
        y, log_det = spline(x, *params, tail_bound=2.5)
        back, _ = spline(y, *params, tail_bound=2.5, inverse=True)
    limit = 1e-6 * (1 + torch.exp(-log_det)) if backend != "reference" else 1e-5 * (1 + torch.exp(-log_det))
    assert ((back - x).abs() <= limit).all()


def with_more_digits(x, widths, heights, derivatives, inverse, bound=1.0):
    """(y, log_det) with linear tails in NumPy's types, complex ones too, that of the conditions being the real part."""
    least = np.longdouble(1e-3)
    bins = widths.shape[-1]

    def axis(raw):
        weight = np.exp(raw - raw.real.max(-1, keepdims=True))
        size = 2 * bound * (least + (1 - least * bins) * weight / weight.sum(-1, keepdims=True))
        return size, np.concatenate([0 * size[..., :1], size.cumsum(-1)[..., :-1]], -1) - bound

    (width, left), (height, lower) = axis(widths), axis(heights)
    one = np.ones_like(width[..., :1])
    slopes = np.concatenate([one, least + np.log1p(np.exp(derivatives)), one], -1)
    inside = np.abs(x.real) <= bound
    z = np.where(inside, x, 0)
    bin = (z.real[..., None] >= (lower if inverse else left).real[..., 1:]).sum(-1)[..., None]
    pick = lambda a, shift=0: np.take_along_axis(a, bin + shift, -1)[..., 0]
    width, left, height, lower, d0, d1 = pick(width), pick(left), pick(height), pick(lower), pick(slopes), pick(slopes, 1)
    s = height / width
    if inverse:
        v = (z - lower) / height
        q = d0 * (1 - v) - d1 * v
        root = np.sqrt(q * q + 4 * s * s * v * (1 - v))
        t = np.where(q.real < 0, (root - q) / (root - q + 2 * s * (1 - v)), 2 * s * v / (2 * s * v + root + q))
    else:
        t = (z - left) / width
    d = s + (d0 + d1 - 2 * s) * t * (1 - t)
    y = left + width * t if inverse else lower + height * (s * t * t + d0 * t * (1 - t)) / d
    log_det = np.log(s * s * (d1 * t * t + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2) / (d * d))
    return np.where(inside, y, x), np.where(inside, -log_det if inverse else log_det, 0)


@each_backend
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.skipif(np.finfo(np.longdouble).eps > 2e-19, reason="long double has no more digits than double here")
def test_float64(backend, inverse):
    """Against long double, gradients by a complex step: as near as plain torch at most elements, and never far where narrow bins
    magnify its rounding. Two results in double, the common rule's, differ there by more than a few units in the last place."""
    shape = (40, 25)
    arguments = all_cases()[NAME].arguments(Make(torch.float64), shape)
    exact = [a.numpy().astype(np.clongdouble) for a in arguments.values()]
    outputs = with_more_digits(*exact, inverse)
    truth = {"output 0": outputs[0].real, "output 1": outputs[1].real}
    weights = torch.linspace(-1, 1.5, 1000).reshape(shape).double().numpy()  # those of _outputs_and_gradients
    step = np.longdouble(1e-60)
    for i, name in enumerate(arguments):
        gradient = np.zeros(exact[i].shape, np.longdouble).reshape(*shape, -1)
        for k in range(gradient.shape[-1]):
            moved = [a.copy() for a in exact]
            moved[i].reshape(*shape, -1)[..., k] += 1j * step
            gradient[..., k] = sum(weights * o.imag for o in with_more_digits(*moved, inverse)) / step
        truth[f"gradient of {name}"] = gradient.reshape(exact[i].shape)
    errors = {}
    for chosen in ("reference", backend):
        with genkern.backend(chosen):
            results = _outputs_and_gradients(lambda **k: spline(**k, inverse=inverse), arguments, list(arguments))
        errors[chosen] = {name: np.abs(results[name].numpy() - exact).astype(float) for name, exact in truth.items()}
    for name, value in truth.items():
        error, plain, unit = errors[backend][name], errors["reference"][name], 16 * 2.3e-16 * max(1, float(np.abs(value).max()))
        assert np.quantile(plain, 0.5) <= unit
        for quantile, times in ((0.5, 2), (0.9, 2), (0.99, 2), (1, 20)):
            allowed = times * np.quantile(plain, quantile) + 1e-16
            assert np.quantile(error, quantile) <= allowed + (unit if quantile == 1 else 0), (name, quantile)


@each_backend
@each_tails
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bound", [1.0, 64.0])
def test_ends_of_the_interval(backend, tails, dtype, bound):
    """They belong to it in every type, map to themselves, and have the gradient of a point inside."""
    x = torch.tensor([[-bound, bound]], dtype=dtype)
    params = [p.requires_grad_() for p in parameters(1, 2, tails=tails, dtype=dtype)]
    for inverse in (False, True):
        leaf = x.clone().requires_grad_()
        with genkern.backend(backend):
            y, log_det = spline(leaf, *params, tails=tails, tail_bound=bound, inverse=inverse)
            (slope,) = torch.autograd.grad(y.sum(), leaf, retain_graph=True)
            grads = torch.autograd.grad((y.float().sum() + log_det.sum()), [leaf, *params])
        assert torch.equal(y, x)
        torch.testing.assert_close(slope.float().log(), log_det, rtol=0, atol=2 * torch.finfo(dtype).eps + 1e-5)
        assert all(g.isfinite().all() for g in grads)
        if tails == "linear":
            assert log_det.abs().max() < 1e-6


@each_backend
def test_just_outside(backend):
    x = torch.nextafter(torch.tensor([[-1.0, 1.0]]), torch.tensor([[-2.0, 2.0]])).requires_grad_()
    params = [p.requires_grad_() for p in parameters(1, 2, dtype=torch.float32)]
    with genkern.backend(backend):
        y, log_det = spline(x, *params)
        gradients = torch.autograd.grad(y.sum() + log_det.sum(), [x, *params])
    assert torch.equal(y, x) and log_det.tolist() == [[0.0, 0.0]]
    assert gradients[0].tolist() == [[1.0, 1.0]] and not any(g.any() for g in gradients[1:])


@each_backend
@pytest.mark.parametrize("inverse", [False, True])
def test_extreme_parameters_stay_finite(backend, inverse):
    x = torch.linspace(-1, 1, 60).reshape(6, 10).requires_grad_()
    params = [(50 * p.sign()).requires_grad_() for p in parameters(6, 10, dtype=torch.float32)]
    with genkern.backend(backend):
        y, log_det = spline(x, *params, inverse=inverse)
        gradients = torch.autograd.grad(y.sum() + log_det.sum(), [x, *params])
    assert all(t.isfinite().all() for t in (y, log_det, *gradients))
    assert (y.abs() <= 1).all()


@each_backend
def test_nan_stays_where_it_is(backend):
    x = torch.linspace(-1.5, 1.5, 40).reshape(4, 10)
    params = parameters(4, 10, dtype=torch.float32)
    with genkern.backend(backend):
        clean = spline(x, *params)
        x[1, 3] = float("nan")
        dirty = spline(x, *params)
    for a, b in zip(clean, dirty, strict=True):
        assert b.isnan().nonzero().tolist() == [[1, 3]]
        assert torch.equal(a[~b.isnan()], b[~b.isnan()])


def test_out_of_the_domain_without_tails():
    x = torch.tensor([[0.0, 1.5]])
    params = parameters(1, 2, tails=None, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"must lie in \[-1.0, 1.0\], got 1.5"):
        spline(x, *params, tails=None)
    compiled = torch.compile(lambda x: spline(x, *params, tails=None), backend="aot_eager")
    y, log_det = compiled(x)
    assert y.isnan().tolist() == log_det.isnan().tolist() == [[False, True]]


def test_same_function_as_nflows():
    nflows = pytest.importorskip("nflows.transforms.splines")
    x, (w, h, d) = 1.3 * Make(torch.float64)((50, 3)), parameters(50, 3)
    y, log_det = spline(x, w, h, d)
    expected = nflows.unconstrained_rational_quadratic_spline(x, w, h, d, tail_bound=1.0)
    torch.testing.assert_close(y, expected[0], rtol=0, atol=1e-6)  # nflows shifts the last knot by 1e-6
    torch.testing.assert_close(log_det, expected[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(3, dtype=torch.int64)}, TypeError, "x must be floating point"),
        ({"widths": torch.zeros(2, 4)}, ValueError, "widths must have shape"),
        ({"heights": torch.zeros(3, 5)}, ValueError, "heights must have the shape of widths"),
        ({"derivatives": torch.zeros(3, 4)}, ValueError, "derivatives must have shape"),
        ({"tails": "cubic"}, ValueError, "tails must be one of"),
        ({"tail_bound": 0.0}, ValueError, "tail_bound must be positive"),
        ({"min_bin_width": 0.3}, ValueError, "min_bin_width must lie in"),
        ({"min_derivative": 1.0}, ValueError, "min_derivative must be below 1"),
        ({"log_det": "batch"}, ValueError, "log_det must be one of"),
    ],
)
def test_bad_arguments(changes, error, message):
    arguments = {"x": torch.zeros(3), "widths": torch.zeros(3, 4), "heights": torch.zeros(3, 4), "derivatives": torch.zeros(3, 3)}
    with pytest.raises(error, match=message):
        spline(**(arguments | changes))
