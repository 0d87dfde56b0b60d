"""genkern: fused kernels for generative models in PyTorch."""

from genkern import ops, random
from genkern._version import __version__
from genkern.core import backend, explain, reset_stats, stats, strict

__all__ = ["__version__", "backend", "explain", "ops", "random", "reset_stats", "stats", "strict"]
