"""InvertibleSequence: layers of a flow in a row, trained in little memory."""

import contextlib
import math
import warnings

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from genkern.nn.flow_layers import ActNormConv1x1

BACKWARDS = ("invert", "checkpoint", "store")


class InvertibleSequence(nn.Module):
    """Layers of a flow in a row. A layer maps (x, log_det, context) to (y, log_det + its own), and inverse() maps back.

    backward    how training gets the activations for the backward pass:
                "store"       they are kept, as torch does
                "checkpoint"  the input of each layer is kept (torch.utils.checkpoint), the rest computed again
                "invert"      the input of every `every`-th layer is kept; the inputs between are computed back from the outputs
                              (i-RevNet, Jacobsen et al., 2018), each network once. Layers that do not say `safe_inverse = True`,
                              such as splines, whose inverse loses digits in any precision of the stream, are checkpointed
    every       layers between two kept inputs
    tolerance   largest difference of an input that was computed back from the kept one, relative to the largest element. It is
                measured in the first `trials` passes and in every 16th after them. Where it is larger, the gradients of that pass are
                computed from the kept input, a warning says so and the sequence goes on with half of `every`, at last with "checkpoint"

    The stream x must be float32 or float64 for "invert": in bfloat16 no layer can be inverted well enough. The networks inside may
    run under autocast. Random draws of the networks (dropout) are repeated. Gradients of gradients need "store".
    """

    def __init__(self, layers, *, backward="store", every=32, tolerance=1e-3, trials=10):
        super().__init__()
        if backward not in BACKWARDS:
            raise ValueError(f"InvertibleSequence: backward must be one of {', '.join(BACKWARDS)}, got {backward!r}")
        if every < 1 or not tolerance > 0:
            raise ValueError(f"InvertibleSequence: every and tolerance must be positive, got {every} and {tolerance}")
        self.layers = nn.ModuleList(layers)
        self.backward, self.every, self.tolerance, self.trials = backward, every, tolerance, trials
        self.reconstruction_error = 0.0  # the largest of those measured
        self._passes = 0

    def forward(self, x, log_det=None, context=None):
        """(y, log_det): log |det dy/dx| per sample, added to log_det (N,) where it is given."""
        log_det = x.new_zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32)) if log_det is None else log_det
        if self.backward == "invert" and x.dtype not in (torch.float32, torch.float64):
            raise TypeError(f'InvertibleSequence: backward="invert" needs a float32 or float64 stream, got {x.dtype}')
        if self.backward == "store" or not torch.is_grad_enabled():
            return _run(self.layers, x, log_det, context)
        measured = self.backward == "invert" and self._measures()
        for layers in self._segments():
            if self.backward == "invert" and all(getattr(layer, "safe_inverse", False) for layer in layers):
                parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
                x, log_det = _Inverted.apply(self, layers, measured, x, log_det, context, *parameters)
            else:
                x, log_det = _checkpointed(layers, x, log_det, context)
        return x, log_det

    def inverse(self, y, log_det=None, context=None):
        """(x, log_det): the way back, with the log-determinant of that map."""
        log_det = y.new_zeros(len(y), dtype=torch.promote_types(y.dtype, torch.float32)) if log_det is None else log_det
        prepared = ActNormConv1x1.prepare(self.layers, inverse=True)
        for layer in reversed(self.layers):
            y, log_det = layer.inverse(y, log_det, context, **prepared.get(layer, {}))
        return y, log_det

    def _segments(self):
        """Runs of layers that can be inverted, no longer than `every`, and the others one by one."""
        runs = []
        for layer in self.layers:
            safe = getattr(layer, "safe_inverse", False)
            if safe and runs and len(runs[-1]) < self.every and getattr(runs[-1][-1], "safe_inverse", False):
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return runs

    def _measures(self):
        self._passes += 1
        return self._passes <= self.trials or self._passes % 16 == 0

    def extra_repr(self):
        return f"backward={self.backward!r}, every={self.every}, tolerance={self.tolerance}"


def _run(layers, x, log_det, context):
    _settle(layers, x, context)
    prepared = ActNormConv1x1.prepare(layers)
    for layer in layers:
        x, log_det = layer(x, log_det, context, **prepared.get(layer, {}))
    return x, log_det


def _settle(layers, x, context):
    """Let the first batch set the actnorms whose weights will be prepared, so that this pass is like the later ones: a checkpoint
    around the layers needs both of its runs alike."""
    if all(layer.norm.settled() for layer in layers if isinstance(layer, ActNormConv1x1)):
        return
    with torch.no_grad(), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
        for layer in layers:
            x, _ = layer(x, None, context)


def _checkpointed(layers, x, log_det, context):
    for layer in layers:
        x, log_det = checkpoint(layer, x, log_det, context, use_reentrant=False)
    return x, log_det


class _Inverted(torch.autograd.Function):
    """A run of layers that keeps its input and its output."""

    @staticmethod
    def forward(ctx, sequence, layers, measured, x, log_det, context, *parameters):
        ctx.sequence, ctx.layers, ctx.draws = sequence, layers, []
        ctx.measured, ctx.every = measured, sequence.every
        ctx.autocast = _autocast(x.device.type)
        y, prepared = x, ActNormConv1x1.prepare(layers)
        before = _random_state(x.device)
        for layer in layers:
            y, log_det = layer(y, log_det, context, **prepared.get(layer, {}))
            after = _random_state(x.device)
            ctx.draws.append(None if _equal(before, after) else before)
            before = after
        ctx.save_for_backward(x, y, context, *parameters)
        return y, log_det

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_log_det):
        start, y, context, *parameters = ctx.saved_tensors
        sequence, x, sums = ctx.sequence, y, dict.fromkeys(parameters)
        grad_output, grad_context = grad, None
        with torch.enable_grad():
            prepared, whole = ActNormConv1x1.prepare(ctx.layers), {}  # the weights of all layers; of each leaf the one with the graph
        inverses = ActNormConv1x1.prepare(ctx.layers, inverse=True)
        for layer, draws in zip(reversed(ctx.layers), reversed(ctx.draws), strict=True):
            mine, options = [p for p in layer.parameters() if p.requires_grad], {}
            if layer in prepared:
                leaves = [w.detach().requires_grad_(w.requires_grad) for w in prepared[layer]["prepared"]]
                whole.update(zip(leaves, prepared[layer]["prepared"], strict=True))
                mine, options = [leaf for leaf in leaves if leaf.requires_grad], {"prepared": leaves}
                sums.update(dict.fromkeys(mine))
            with _replayed(draws, x.device), ctx.autocast(), torch.enable_grad():
                condition = context if context is None else context.detach().requires_grad_(context.requires_grad)
                x, inputs, out, log_det = _retraced(layer, x, condition, inverses.get(layer, {}), options)
                wanted = [*inputs, *mine, *([condition] if condition is not None and condition.requires_grad else [])]
                pairs = [(o, g) for o, g in ((out, grad), (log_det, grad_log_det)) if o.requires_grad]
                found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
            grad = _joined(found[: len(inputs)], inputs)
            for p, g in zip(mine, found[len(inputs) :], strict=False):
                sums[p] = g if sums[p] is None else sums[p] if g is None else sums[p] + g
            if len(wanted) > len(inputs) + len(mine) and found[-1] is not None:
                grad_context = found[-1] if grad_context is None else grad_context + found[-1]
        pairs = [(w, g) for leaf, w in whole.items() if (g := sums.pop(leaf, None)) is not None]
        if pairs:
            weights, gradients = zip(*pairs, strict=True)
            theirs = [p for layer in prepared for p in layer.parameters() if p.requires_grad]
            sums.update(zip(theirs, torch.autograd.grad(weights, theirs, gradients, allow_unused=True), strict=True))
        if ctx.measured:
            error = float((x - start).abs().amax() / start.abs().amax().clamp(min=1e-30)) if x.numel() else 0.0
            error = math.inf if math.isnan(error) else error
            sequence.reconstruction_error = max(sequence.reconstruction_error, error)
            if not error <= sequence.tolerance:
                _fall_back(sequence, ctx.every, error)
                return _recomputed(ctx, start, context, parameters, grad_output, grad_log_det)
        return None, None, None, grad, grad_log_det, grad_context, *sums.values()


def _retraced(layer, y, context, inverse, options):
    """(x, the leaves it was made of, y again, log_det): the input of a layer from its output, and the layer's graph."""
    if hasattr(layer, "retrace"):  # a coupling runs its network once for both
        return layer.retrace(y, context)
    with torch.no_grad():
        x, _ = layer.inverse(y, y.new_zeros(len(y)), context, **inverse)
    x.requires_grad_()
    out, log_det = layer(x, y.new_zeros(len(y)), context, **options)
    return x.detach(), [x], out, log_det


def _joined(grads, inputs):
    """The gradient of the input, whose leaves are its channels in order."""
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)]
    return grads[0] if len(grads) == 1 else torch.cat(grads, 1)


def _fall_back(sequence, every, error):
    """Keep more: once for a pass, which ran with `every`."""
    if sequence.backward != "invert" or sequence.every != every:
        return
    if every >= 4:
        sequence.every = every // 2
        then = f"it goes on with the input of every {sequence.every}th layer"
    else:
        sequence.backward = "checkpoint"
        then = "it goes on with checkpoints"
    warnings.warn(
        f"InvertibleSequence: inputs computed back differ by {error:.1e} of the largest element, more than {sequence.tolerance:.0e}; "
        f"{then}, which needs more memory (smaller scales help)",
        RuntimeWarning,
        stacklevel=2,
    )


def _recomputed(ctx, start, context, parameters, grad, grad_log_det):
    """The gradients from the kept input."""
    with _replayed(next((d for d in ctx.draws if d is not None), None), start.device), ctx.autocast(), torch.enable_grad():
        x = start.detach().requires_grad_()
        condition = context if context is None else context.detach().requires_grad_(context.requires_grad)
        out, log_det = _checkpointed(ctx.layers, x, x.new_zeros(len(x)), condition)
        wanted = [x, *([condition] if condition is not None and condition.requires_grad else []), *parameters]
        pairs = [(o, g) for o, g in ((out, grad), (log_det, grad_log_det)) if o.requires_grad]
        found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    rest = found[-len(parameters) :] if parameters else ()
    return None, None, None, found[0], grad_log_det, found[1] if len(found) > 1 + len(parameters) else None, *rest


# ---- the state of random numbers and of autocast, for the second run of a network


def _random_state(device):
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _equal(before, after):
    return all(a is None or torch.equal(a, b) for a, b in zip(before, after, strict=True))


@contextlib.contextmanager
def _replayed(state, device):
    if state is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], device)
        yield


def _autocast(device_type):
    enabled, dtype = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype, enabled=enabled)
