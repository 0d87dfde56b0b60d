"""What a likelihood model must beat: figures of models that need no training loop."""

import math

import torch

from genkern.data import check_data
from genkern.metrics._coders import lpc_bits, ngram_bits, png_bits
from genkern.metrics._densities import Gaussian, histogram_log_prob
from genkern.ops import mu_law_decode


def baselines(data, split="test", model=None):
    """{name: bits per dimension} on a split of a genkern.data set, fitted on its training split.

    Images and points: "per-pixel histogram" (uint8 only; every pixel apart from the others, the counts of its levels plus one) and
    "full-covariance Gaussian" (of float inputs a density's figure, which may be below 0). Of patches of pictures also "PNG" of the
    pictures' whole held-out parts, on any split.
    Text: "bigram" and "5-gram" counts. Sound: "linear prediction" of the levels that `model` gives probabilities of, where it does.
    """
    check_data("baselines", data)
    train, held_out = data.train[0], data.split(split)[0]
    if data.window is None:
        nats = {"full-covariance Gaussian": Gaussian(data).log_prob(held_out)}
        if data.levels is not None:
            nats = {"per-pixel histogram": histogram_log_prob(data, held_out), **nats}
        found = {name: -float(x.mean()) / (math.prod(data.shape) * math.log(2)) for name, x in nats.items()}
        return found | ({"PNG": png_bits(data.pictures.values())} if data.pictures else {})
    if data.levels is not None:
        return {name: ngram_bits(train, held_out, n) for name, n in (("bigram", 2), ("5-gram", 5))}
    head = getattr(getattr(model, "config", None), "head", None)
    if head not in ("softmax", "logistic"):
        return {}
    index = torch.arange(model.config.levels)
    amplitudes = mu_law_decode(index, len(index)) if head == "softmax" else index * (2 / (len(index) - 1)) - 1
    levels = torch.bucketize(model.quantized(held_out).flatten(1), (amplitudes[1:] + amplitudes[:-1]) / 2)
    return {"linear prediction": lpc_bits(levels, amplitudes)}
