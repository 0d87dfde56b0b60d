import pytest


@pytest.fixture(autouse=True, scope="session")
def fresh_cache(tmp_path_factory):
    """What was compiled before is not looked up: a kernel is compiled from its source as it is now."""
    triton = pytest.importorskip("triton")
    previous = triton.knobs.cache.dir
    triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
    yield
    triton.knobs.cache.dir = previous
