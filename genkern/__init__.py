"""genkern: fused kernels for generative models in PyTorch."""

from genkern import metrics, models, nn, ops, random, samplers, testing
from genkern._version import __version__
from genkern.core import backend, explain, reset_stats, stats, strict
from genkern.models import load

__all__ = [
    "__version__", "backend", "explain", "load", "metrics", "models", "nn", "ops", "random", "reset_stats", "samplers", "stats",
    "strict", "testing",
]  # fmt: skip
