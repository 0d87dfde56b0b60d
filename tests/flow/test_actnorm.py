"""actnorm, invertible_conv1x1 and its weights, squeeze: values, log-determinants against slogdet of the Jacobian, arguments."""

import pytest
import torch
import torch.nn.functional as F

from genkern.ops import actnorm, invertible_conv1x1, plu_factors, plu_weight, squeeze, unsqueeze
from genkern.testing import Make

SHAPES = ((3, 4), (3, 4, 5), (2, 4, 3, 2))


def jacobian_log_det(function, x):
    jacobian = torch.autograd.functional.jacobian(lambda v: function(v)[0], x).flatten(x.dim() + 1)
    size = x[0].numel()
    jacobian = jacobian.reshape(len(x), size, len(x), size)
    return torch.stack([torch.linalg.slogdet(jacobian[n, :, n])[1] for n in range(len(x))])


def well_conditioned(make, *shape):
    return torch.linalg.qr(make(shape))[0] * 1.5 + 0.1 * make(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_actnorm(shape):
    make = Make(torch.float64)
    x, log_scale, shift = make(shape), make((4,)), make((4,))
    y, log_det = actnorm(x, log_scale, shift)
    torch.testing.assert_close(y[:, 2], x[:, 2] * log_scale[2].exp() + shift[2])
    torch.testing.assert_close(log_det, jacobian_log_det(lambda v: actnorm(v, log_scale, shift), x))
    back, total = actnorm(y, log_scale, shift, inverse=True, log_det=log_det)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(actnorm, [t.requires_grad_() for t in (x, log_scale, shift)])
    narrow = actnorm(x.bfloat16(), log_scale.bfloat16(), shift.bfloat16())
    assert narrow[0].dtype == torch.bfloat16 and narrow[1].dtype == torch.float32
    assert actnorm(x[:0], log_scale, shift)[1].shape == (0,)


@pytest.mark.parametrize("shape", SHAPES)
def test_invertible_conv1x1(shape):
    make = Make(torch.float64)
    x, weight, bias = make(shape), well_conditioned(make, 4, 4), make((4,))
    y, log_det = invertible_conv1x1(x, weight, bias)
    torch.testing.assert_close(y, torch.einsum("ij,nj...->ni...", weight, x) + bias.view(-1, *[1] * (len(shape) - 2)))
    torch.testing.assert_close(log_det, jacobian_log_det(lambda v: invertible_conv1x1(v, weight, bias), x))
    back, total = invertible_conv1x1(y, weight, bias, inverse=True, log_det=log_det)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(invertible_conv1x1, [t.requires_grad_() for t in (x, weight, bias)])
    outside = invertible_conv1x1(x.float(), weight.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(invertible_conv1x1(x.float(), weight.float())[0], outside[0])


def test_weights_of_a_level_in_one_batch_with_actnorm_folded_in():
    make = Make(torch.float64)
    weights, log_scale, shift, x = well_conditioned(make, 5, 4, 4), make((5, 4)), make((5, 4)), make((2, 4, 3))
    factors = plu_factors(weights)
    same, bias, log_abs_det = plu_weight(*factors)
    assert bias is None
    torch.testing.assert_close(same, weights)
    torch.testing.assert_close(log_abs_det, torch.linalg.slogdet(weights)[1])
    folded, bias, log_abs_det = plu_weight(*factors, log_scale, shift)
    for k in range(5):
        expected, log_det = actnorm(x, log_scale[k], shift[k])
        expected, log_det = invertible_conv1x1(expected, weights[k], log_det=log_det)
        y, got = invertible_conv1x1(x, folded[k], bias[k], log_abs_det=log_abs_det[k])
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(got, log_det)
        assert torch.equal(invertible_conv1x1(x, folded[k], bias[k], log_abs_det=0, log_det=log_det)[1], log_det)  # counted elsewhere
        assert torch.equal(invertible_conv1x1(x, folded[k], bias[k], log_abs_det=0)[1], torch.zeros(2, dtype=torch.float64))
    for rest in ((), (log_scale, shift)):
        there, b, log_abs_det = plu_weight(*factors, *rest)
        back, c, negative = plu_weight(*factors, *rest, inverse=True)
        torch.testing.assert_close(back @ there, torch.eye(4, dtype=torch.float64).expand(5, 4, 4))
        torch.testing.assert_close(negative, -log_abs_det)
        if rest:
            torch.testing.assert_close((back @ b[..., None])[..., 0], -c)
    leaves = [f.detach().requires_grad_() for f in (*factors[1:3], factors[4], log_scale, shift)]
    for inverse in (False, True):
        function = lambda lower, upper, *rest, i=inverse: plu_weight(factors[0], lower, upper, factors[3], *rest, inverse=i)
        assert torch.autograd.gradcheck(function, leaves)


def test_squeeze():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    assert torch.equal(squeeze(x), F.pixel_unshuffle(x, 2))
    by_position = squeeze(x, order="position")
    assert torch.equal(by_position[:, :3], x[:, :, ::2, ::2]) and torch.equal(by_position[:, 3:6], x[:, :, ::2, 1::2])
    for order in ("channel", "position"):
        assert torch.equal(unsqueeze(squeeze(x, order=order), order=order), x)
    assert squeeze(x[:0]).shape == (0, 12, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: actnorm(x, torch.zeros(3), torch.zeros(4)), ValueError, "log_scale must have shape"),
        (lambda x: actnorm(x[0, 0, 0], torch.zeros(3), torch.zeros(3)), ValueError, "x must be"),
        (lambda x: actnorm(x, torch.zeros(4), torch.zeros(4), log_det=torch.zeros(1)), ValueError, "log_det must have shape"),
        (lambda x: invertible_conv1x1(x, torch.zeros(3, 4)), ValueError, "weight must have shape"),
        (lambda x: invertible_conv1x1(x.int(), torch.zeros(4, 4)), TypeError, "x must be floating point"),
        (lambda x: plu_weight(*plu_factors(torch.eye(4)), torch.zeros(4)), ValueError, "given together"),
        (lambda x: plu_factors(torch.zeros(3, 4)), ValueError, "weight must be"),
        (lambda x: squeeze(x), ValueError, "divisible by 2"),
        (lambda x: unsqueeze(x[:, :3]), ValueError, "divisible by 4"),
        (lambda x: squeeze(x, order="row"), ValueError, "order must be one of"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 4, 3, 3))
