"""genkern: fused kernels for generative models in PyTorch."""

__version__ = "0.1.0"

from genkern import ops, random
from genkern.core import backend, explain, reset_stats, stats, strict

__all__ = ["backend", "explain", "ops", "random", "reset_stats", "stats", "strict"]
