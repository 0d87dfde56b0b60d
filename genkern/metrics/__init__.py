"""Figures: baselines that a model is compared with."""

from genkern.metrics._baselines import baselines, lpc_bits, ngram_bits

__all__ = ["baselines", "lpc_bits", "ngram_bits"]
