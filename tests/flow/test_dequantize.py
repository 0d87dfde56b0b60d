"""dequantize: values against float64, pixels come back, noise per sample, log-determinant, arguments."""

import math

import pytest
import torch

import genkern
from genkern import random
from genkern.ops import dequantize, squeeze
from genkern.testing import backends

each_backend = pytest.mark.parametrize("backend", ["reference", *backends(op="dequantize")])
KEY = random.key(3)
PIXELS = torch.arange(256, dtype=torch.uint8).repeat(3, 4).view(3, 1, 32, 32)


@each_backend
@pytest.mark.parametrize(("transform", "low", "high"), [("unit", 0, 0), ("logit", 0.05, 0), ("logit_symmetric", 1e-6, 1e-6)])
def test_values_and_log_det(backend, transform, low, high):
    alpha = max(low, 1e-9) if transform != "unit" else 0.05
    with genkern.backend(backend):
        y, log_det = dequantize(PIXELS, key=KEY, transform=transform, alpha=alpha)
    u = torch.floor(random.uniform(KEY, PIXELS.shape).double() * 65536) / 65536
    span = 1 - low - high
    v, rest = low + span * (PIXELS + u) / 256, high + span * (256 - (PIXELS + u)) / 256
    slope = torch.full_like(v, math.log(span / 256))
    expected = v if transform == "unit" else v.log() - rest.log()
    slope = slope if transform == "unit" else slope - v.log() - rest.log()
    torch.testing.assert_close(y, expected.float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(log_det, slope.flatten(1).sum(1).float(), rtol=1e-6, atol=1e-3)


@each_backend
def test_pixels_come_back_exactly(backend):
    """The noise never reaches the next pixel, not even by rounding."""
    with genkern.backend(backend):
        for dtype in (torch.float32, torch.float64):
            for k in range(20):
                y, _ = dequantize(PIXELS, key=random.key(k), transform="unit", dtype=dtype)
                assert torch.equal((y * 256).floor().to(torch.uint8), PIXELS) and y.dtype == dtype


@each_backend
def test_extreme_pixels_have_finite_logits(backend):
    x = torch.tensor([0, 255], dtype=torch.uint8).repeat(2, 50_000)
    with genkern.backend(backend):
        y, log_det = dequantize(x, key=KEY, transform="logit", alpha=1e-6)
    assert y.isfinite().all() and log_det.isfinite().all()


@each_backend
def test_noise_of_a_sample_does_not_depend_on_its_batch(backend):
    keys = random.split(KEY, 3)
    with genkern.backend(backend):
        y, log_det = dequantize(PIXELS, key=keys, squeeze=True)
        alone = dequantize(PIXELS[1:2], key=keys[1:2], squeeze=True)
        plain, _ = dequantize(PIXELS, key=keys)
    assert torch.equal(y[1:2], alone[0]) and torch.equal(log_det[1:2], alone[1]) and torch.equal(y, squeeze(plain))
    assert not torch.equal(y[0], y[1])


def test_the_default_generator_and_a_generator_rule():
    torch.manual_seed(1)
    first = dequantize(PIXELS)[0]
    torch.manual_seed(1)
    assert torch.equal(first, dequantize(PIXELS)[0]) and not torch.equal(first, dequantize(PIXELS)[0])
    draws = [dequantize(PIXELS, generator=torch.Generator().manual_seed(5))[0] for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": PIXELS.float()}, TypeError, "x must be uint8"),
        ({"levels": 257}, ValueError, "levels must be an int from 2 to 256"),
        ({"transform": "log"}, ValueError, "transform must be one of"),
        ({"transform": "logit", "alpha": 0.0}, ValueError, "alpha must lie between"),
        ({"transform": "logit_symmetric", "alpha": 0.5}, ValueError, "alpha must lie between"),
        ({"dtype": torch.int8}, TypeError, "dtype must be a floating-point type"),
        ({"x": PIXELS[..., :3], "squeeze": True}, ValueError, "must be even"),
        ({"x": PIXELS[0], "squeeze": True}, ValueError, "x must be"),
        ({"key": random.split(KEY, 2)}, ValueError, "one key per sample needs key"),
        ({"generator": torch.Generator()}, ValueError, "give key or generator"),
    ],
)
def test_bad_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        dequantize(**({"x": PIXELS, "key": KEY} | changes))
