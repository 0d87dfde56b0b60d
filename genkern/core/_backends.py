"""Which backends exist, which compiled library is loaded, and what the caller forces on this thread."""

import contextlib
import functools
import os
import pathlib
import threading
from typing import NamedTuple

import torch

from genkern.core import _build_info


class Backend(NamedTuple):
    namespace: str  # of the raw ops that hold its kernels
    device: str  # the device type whose tensors it serves
    key: str  # the dispatch key its kernels are registered under


INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels then run in its interpreter, on CPU tensors

BACKENDS = {
    "cpu": Backend("genkern", "cpu", "CPU"),
    "cuda": Backend("genkern", "cuda", "CUDA"),
    "triton": Backend("genkern_triton", "cpu" if INTERPRET else "cuda", "CPU" if INTERPRET else "CUDA"),
    "emulated": Backend("genkern_emulated", "cpu", "CPU"),
}
# Backends that may serve a device type without being forced, best first.
PREFERENCE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

# ---- what a caller forces: thread-local, because a ContextVar breaks fullgraph compilation and a global leaks to other threads


def _check_name(name):
    if name is not None and name != "reference" and name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, expected one of {['reference', *BACKENDS]}")
    return name


class _State(threading.local):  # class attributes: what a thread starts with, found faster than a default of getattr
    forced = _check_name(os.environ.get("GENKERN_BACKEND") or None)
    strict = os.environ.get("GENKERN_STRICT") == "1"


_state = _State()


def forced():
    return _state.forced


def is_strict():
    return _state.strict


@contextlib.contextmanager
def backend(name):
    """Force a backend on this thread: "reference", "cpu", "cuda", "triton" or "emulated".

    It binds tensors of the backend's own device type ("reference": all); others keep their default. A call whose forced backend
    is missing raises with the reason. The choice made in the forward pass is kept for its backward pass. The environment
    variable GENKERN_BACKEND sets the default.
    """
    previous = forced()
    _state.forced = _check_name(name)
    try:
        yield
    finally:
        _state.forced = previous


@contextlib.contextmanager
def strict(enabled=True):
    """Turn a call that would silently take the slow path into an error that says why (GENKERN_STRICT=1: everywhere)."""
    previous = is_strict()
    _state.strict = enabled
    try:
        yield
    finally:
        _state.strict = previous


# ---- counts of eager calls

_counts: dict = {}


def count(name, choice, calls=1):
    call = name, choice
    _counts[call] = _counts.get(call, 0) + calls


def stats():
    """Eager calls so far: {(op, backend): calls}; backward passes count as "<op>_backward". Compiled graphs are not counted."""
    return dict(_counts)


def reset_stats():
    _counts.clear()


# ---- compiled libraries

_PACKAGE = pathlib.Path(__file__).parents[1]
_libraries: dict = {}  # part -> (path or None, None or why it is not loaded)


def load_library(part, path):
    """Load one compiled library; the outcome is kept in libraries(), an error is not raised."""
    try:
        torch.ops.load_library(str(path))
        _libraries[part] = (str(path), None)
    except OSError as error:
        _libraries[part] = (str(path), f"failed to load: {error.__cause__ or error}")


def _cpu_library():
    """The widest CPU library this machine and ATEN_CPU_CAPABILITY allow, or None. GENKERN_CPU_LIBRARY names another one."""
    if os.environ.get("GENKERN_CPU_LIBRARY"):
        return pathlib.Path(os.environ["GENKERN_CPU_LIBRARY"])
    capability = torch.backends.cpu.get_cpu_capability()
    names = {"AVX512": ("avx512", "avx2", "base"), "AVX2": ("avx2", "base")}.get(capability, ("base",))
    paths = (_PACKAGE / f"_C_cpu_{name}.so" for name in names)
    return next((path for path in paths if path.exists()), None)


@functools.cache
def libraries():
    """{part: (path or None, None or the reason it is not loaded)}; the first call loads what is there."""
    for part, path in (("cpu", _cpu_library()), ("cuda", _PACKAGE / "_C_cuda.so")):
        if path is not None and part == "cpu" and not path.exists():
            _libraries[part] = (str(path), "GENKERN_CPU_LIBRARY names no file")
        elif path is None or not path.exists():
            _libraries[part] = (None, _build_info.why_missing(part) or "not built")
        elif part == "cuda" and torch.version.cuda is None:
            _libraries[part] = (str(path), "this torch has no CUDA")
        else:
            load_library(part, path)
    return _libraries
