"""Triton kernels in Triton's interpreter, on CPU tensors. TRITON_INTERPRET is read once per process, so these run in their own:

TRITON_INTERPRET=1 python -m pytest tests/triton
"""

import importlib.util

import pytest

import genkern
from genkern.core._backends import INTERPRET


@pytest.fixture(autouse=True)
def on_triton():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    if not INTERPRET:
        pytest.skip("TRITON_INTERPRET=1 is not set")
    with genkern.backend("triton"):
        yield
