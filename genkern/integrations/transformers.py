"""One fused sampler in place of the logits warpers of transformers, and the short convolution of its state space models.

from genkern.integrations.transformers import FusedSampler, fuse_causal_conv

sampler = FusedSampler(temperature=0.8, top_p=0.95)      # or FusedSampler.of(model.generation_config)
model.generate(**inputs, do_sample=False, logits_processor=[sampler])

fuse_causal_conv(model)                                  # Mamba and its relatives; unfuse_causal_conv(model) undoes it
"""

import functools
import inspect
import sys

import torch

from genkern import random
from genkern.integrations import causal_conv1d
from genkern.ops import sample_tokens

try:
    from transformers import LogitsProcessor
except ImportError as error:  # pragma: no cover
    raise ImportError("genkern.integrations.transformers needs transformers: pip install transformers") from error


class FusedSampler(LogitsProcessor):
    """Draws the next token in one pass without sorting, and forbids all others: pass it last, with do_sample=False.

    The distribution is that of transformers' warpers in their order: temperature, then top_k, then top_p of what it leaves, and min_p.
    Unlike top_p there, equally probable tokens are kept or dropped together.

    key         int64 (2,), or (N, 2) for one per sequence: the draws depend on it and on the number of calls. None: of each call drawn
                from `generator`, or torch's default generator, so that torch.manual_seed works
    """

    def __init__(self, *, temperature=1.0, top_k=None, top_p=None, min_p=None, key=None, generator=None):
        self.filters = {"temperature": temperature, "top_k": top_k or None, "top_p": top_p, "min_p": min_p, "order": "sequential"}
        self.key, self.generator, self.calls = key, generator, 0

    @classmethod
    def of(cls, generation_config, **options):
        """With the temperature, top_k, top_p and min_p of a GenerationConfig."""
        names = ("temperature", "top_k", "top_p", "min_p")
        found = {name: getattr(generation_config, name, None) for name in names}
        return cls(**{name: x for name, x in found.items() if x is not None}, **options)

    def __call__(self, input_ids, scores):
        key = self.key
        if key is not None:
            key = random.fold_in(key.to(scores.device), self.calls)
            self.calls += 1
        tokens = sample_tokens(scores, key=key, generator=self.generator, **self.filters)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


def fuse_causal_conv(model):
    """Let a model of the Mamba family call genkern's causal convolution, and return it.

    transformers calls it by a name of the module in which the model's class is defined: all models of that class are changed, until
    unfuse_causal_conv. Objects, weights and results (to rounding) stay as they are. Calls with other activations than SiLU or with
    arguments that are unknown here go to the original. ValueError for a model without such a convolution.
    """
    modules = _modules(model)
    if not modules:
        raise ValueError(f"fuse_causal_conv: {type(model).__name__} calls no causal_conv1d_fn: not of the Mamba family")
    for module in modules:
        for name, ours in (("causal_conv1d_fn", _fn), ("causal_conv1d_update", _update)):
            theirs = getattr(module, name, None)
            if callable(theirs) and not hasattr(theirs, "_genkern_original"):
                setattr(module, name, _swapped(theirs, ours))
    return model


def unfuse_causal_conv(model):
    """Undo fuse_causal_conv(model), and return it."""
    for module in _modules(model):
        for name in ("causal_conv1d_fn", "causal_conv1d_update"):
            original = getattr(getattr(module, name, None), "_genkern_original", None)
            if original is not None:
                setattr(module, name, original)
    return model


def _modules(model):
    """The Python modules of transformers that hold the model's layers and call a causal convolution by name."""
    names = dict.fromkeys(type(part).__module__ for part in model.modules())
    return [sys.modules[name] for name in names if name.startswith("transformers.") and hasattr(sys.modules[name], "causal_conv1d_fn")]


def _swapped(theirs, ours):
    known = inspect.signature(ours)

    @functools.wraps(theirs)
    def call(*args, **kwargs):
        kwargs = {name: x for name, x in kwargs.items() if x is not None or name in known.parameters}
        try:
            bound = known.bind(*args, **kwargs)
        except TypeError:
            return theirs(*args, **kwargs)
        if bound.arguments.get("activation") not in (None, "silu", "swish"):
            return theirs(*args, **kwargs)
        return ours(*args, **kwargs)

    call._genkern_original = theirs
    return call


def _fn(hidden_states, weight, bias=None, activation=None, *, seq_idx=None):
    return causal_conv1d.causal_conv1d_fn(hidden_states, weight, bias, seq_idx=seq_idx, activation=activation)


def _update(hidden_states, conv_state, weight, bias=None, activation=None):
    return causal_conv1d.causal_conv1d_update(hidden_states, conv_state, weight, bias, activation)
