import getpass
import os
import tempfile

import pytest
import torch

from genkern.core import load_library

if os.environ.get("GENKERN_EMULATED_LIBRARY"):  # the CUDA sources compiled for the CPU: backend "emulated"
    load_library("emulated", os.environ["GENKERN_EMULATED_LIBRARY"])

# Inductor's cache does not tell instruction sets apart: loops that step 16 floats would store vectors of 8, or write past the end.
if capability := os.environ.get("ATEN_CPU_CAPABILITY"):
    cache = os.path.join(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}_{capability}")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty is filled with NaN, also inside the compiled kernels: an output element never written shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(previous)


def pytest_report_header():
    from genkern.core import libraries
    from genkern.testing import backends

    return [f"genkern: {part}: {why or path}" for part, (path, why) in libraries().items()] + [f"backends tested: {backends()}"]
