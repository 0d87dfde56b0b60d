"""The only machinery: define an op, load the compiled libraries, choose a backend, wire autograd."""

from genkern.core._backends import BACKENDS, backend, libraries, load_library, reset_stats, stats, strict
from genkern.core._op import OPS, Op, explain, implements

__all__ = [
    "BACKENDS",
    "OPS",
    "Op",
    "backend",
    "explain",
    "implements",
    "libraries",
    "load_library",
    "reset_stats",
    "stats",
    "strict",
]
