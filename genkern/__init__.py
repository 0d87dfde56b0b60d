"""genkern: fused kernels for generative models in PyTorch."""

from genkern import models, ops, random, samplers
from genkern._version import __version__
from genkern.core import backend, explain, reset_stats, stats, strict
from genkern.models import load

__all__ = ["__version__", "backend", "explain", "load", "models", "ops", "random", "reset_stats", "samplers", "stats", "strict"]
