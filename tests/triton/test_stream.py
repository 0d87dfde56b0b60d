"""The random stream in Triton, bit for bit."""

import numpy as np
import philox_oracle
import pytest
import torch

from genkern import random

pytestmark = pytest.mark.triton

KEYS = [(42, 0), (-5, 2**32 - 100), (123456789012345678, -50)]  # the counters cross 2^32 and 2^64
TYPES = {torch.float32: np.float32, torch.float64: np.float64}


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("distribution", ["uniform", "normal", "exponential", "gumbel", "logistic"])
@pytest.mark.parametrize("dtype", TYPES)
def test_draws_have_the_bits_of_the_definition(distribution, key, dtype):
    got = getattr(random, distribution)(torch.tensor(key), (2503,), dtype=dtype)
    np.testing.assert_array_equal(got.numpy(), getattr(philox_oracle, distribution)(key, 2503, TYPES[dtype]))


@pytest.mark.parametrize("key", KEYS)
def test_bits_and_bernoulli(key):
    for dtype, expected in ((torch.int32, np.int32), (torch.int64, np.int64)):
        got = random.bits(torch.tensor(key), (1501,), dtype=dtype)
        np.testing.assert_array_equal(got.numpy(), philox_oracle.bits(key, 1501, expected))
    for p in (0.0, 2.0**-32, 0.3, 1.0):
        expected = philox_oracle.bernoulli(key, 1501, np.float32, p)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool):
            got = random.bernoulli(torch.tensor(key), p, (1501,), dtype=dtype)
            np.testing.assert_array_equal(got.float().numpy(), expected)


def test_narrow_uniforms():
    for dtype, digits in ((torch.float16, 11), (torch.bfloat16, 8)):
        got = random.uniform(random.key(7), (1501,), dtype=dtype)
        np.testing.assert_array_equal(got.float().numpy(), philox_oracle.uniform((7, 0), 1501, np.float32, digits))


def test_scale_and_shift_keep_their_precision():
    """They are float64 numbers, though Triton passes Python floats in float32."""
    got = random.normal(random.key(7), (101,), 0.1, 0.3, dtype=torch.float64)
    np.testing.assert_array_equal(got.numpy(), philox_oracle.normal((7, 0), 101, np.float64) * 0.3 + 0.1)


@pytest.mark.parametrize("width", [1, 3, 37, 1030])
def test_one_stream_per_row(width):
    keys = random.split(random.key(9), 5)
    for dtype in TYPES:
        got = random.normal(keys, (5, width), dtype=dtype).numpy()
        for key, row in zip(keys.tolist(), got, strict=True):
            np.testing.assert_array_equal(row, philox_oracle.normal(key, width, TYPES[dtype]))


def test_nothing_outside_is_written():
    memory = torch.full((2080,), -7.0)
    random.normal(random.key(1), (1051,), out=memory[16 : 16 + 1051])
    assert (memory[:16] == -7).all() and (memory[16 + 1051 :] == -7).all()
    assert random.normal(random.key(1), (3, 0)).shape == (3, 0)
