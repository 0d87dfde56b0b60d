"""sample_tokens: one token per row of logits, with temperature, top-k, top-p and min-p, without sorting."""

import math

import torch

from genkern import random
from genkern.core import Op
from genkern.core._op import transforming
from genkern.ops._common import check_choice, check_device, check_float, check_int, check_number, check_shape
from genkern.testing._case import Case

_FLOAT32 = torch.finfo(torch.float32)


def sample_tokens(
    logits,
    *,
    temperature=1.0,
    top_k=None,
    top_p=None,
    min_p=None,
    repetition_penalty=1.0,
    previous=None,
    order="joint",
    key=None,
    generator=None,
    uniforms=None,
):
    """One token per row, drawn from softmax(logits / temperature) restricted to its most probable tokens: int64 (N,).

    logits          (N, V); -inf forbids a token
    temperature     0: the most probable token, the lowest index among equals; nothing is drawn then
    top_k           keep the k most probable tokens (Fan et al., 2018)
    top_p           keep the fewest most probable tokens whose probabilities sum to at least p (Holtzman et al., 2020)
    min_p           keep tokens at least min_p times as probable as the most probable one (Nguyen et al., 2024)
    repetition_penalty, previous
                    tokens in previous, int64 (N, T), have their logit divided by the penalty if positive, else multiplied by it
                    (Keskar et al., 2019); negative entries of previous are ignored
    order           where top_k and top_p are both given. "joint": both look at the whole distribution; "sequential": top_p looks
                    at the distribution that top_k leaves, renormalised
    key             int64 (2,): row i's draw depends on the key and on i alone; or (N, 2), one key per row. None: drawn from
                    `generator`, or from torch's default generator
    uniforms        (N,) in [0, 1) instead of a key: the result is the first kept token at which the cumulative probability
                    exceeds the row's uniform

    Ties: kept tokens are those with a score (logit - greatest logit) / temperature, in float32, not below a threshold, so equal
    tokens are kept or dropped together, and top_k may keep more than k. Tokens of probability zero in float32 (score below -103)
    are never drawn.

    Thresholds are found by a search over their values on the CPU, and over their bits by Triton's kernel, which gives each row to one
    program and keeps 8 bytes a logit: no sort. Both sum in another order than the reference and each other, so a uniform within
    rounding of a token's edge may give its neighbour.

    float32, float64, bfloat16, float16; the arithmetic is float32. No gradient. TypeError, ValueError on anything else. A row that
    holds NaN or +inf, or -inf alone, is a ValueError on the CPU; on other devices and under torch.compile its token is -1.
    """
    op = "sample_tokens"
    check_float(op, "logits", logits, 2)
    n, tokens = logits.shape
    if tokens == 0:
        raise ValueError(f"{op}: logits must have at least one column, got shape {tuple(logits.shape)}")
    given = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
    for name, value in given.items():
        if value is not None or name in ("temperature", "repetition_penalty"):
            check_number(op, name, value)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"{op}: temperature must be non-negative and finite, got {temperature}")
    if top_k is not None:
        check_int(op, "top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"{op}: top_p must be in (0, 1], got {top_p}")
    if min_p is not None and not 0 <= min_p <= 1:
        raise ValueError(f"{op}: min_p must be in [0, 1], got {min_p}")
    check_choice(op, "order", order, ("joint", "sequential"))
    logits = logits.detach()
    if repetition_penalty != 1.0:
        logits = _penalised(op, logits, repetition_penalty, previous)
    u = _uniforms(op, logits, key, generator, uniforms, temperature)
    lowest = math.log(min_p) if min_p else -math.inf  # of the score
    k = 0 if top_k is None or top_k >= tokens else top_k
    p = 1.0 if top_p is None else float(top_p)
    logits = logits.float() if logits.dtype == torch.float64 else logits
    # zero stands for the most probable token: of temperatures beyond float32's range the reciprocal is still positive and finite
    inverse = min(max(1 / temperature, _FLOAT32.tiny), _FLOAT32.max) if temperature > 0 else 0.0
    result = _op(logits, u, inverse, k, p, lowest, order == "sequential")
    if result.device.type == "cpu" and not torch.compiler.is_compiling() and not transforming() and (result < 0).any():
        row = int((result < 0).nonzero()[0])
        raise ValueError(f"{op}: logits must hold a finite number and neither NaN nor +inf in each row, row {row} does not")
    return result


def _penalised(op, logits, penalty, previous):
    if not penalty > 0:
        raise ValueError(f"{op}: repetition_penalty must be positive, got {penalty}")
    if not isinstance(previous, torch.Tensor) or previous.dtype != torch.int64 or previous.dim() != 2:
        raise ValueError(f"{op}: repetition_penalty needs previous, an int64 tensor (N, T), got {previous!r}")
    check_shape(op, "previous", previous, (logits.shape[0], previous.shape[1]), "(N, T)")
    check_device(op, "previous", previous, "logits", logits)
    looked = previous.device.type == "cpu" and previous.numel() and not (torch.compiler.is_compiling() or transforming())
    if looked and previous.max() >= logits.shape[1]:
        raise ValueError(f"{op}: previous must hold tokens below {logits.shape[1]}, got {int(previous.max())}")
    index, given = previous.clamp(min=0), previous >= 0
    seen = torch.zeros(logits.shape, dtype=torch.float32, device=logits.device).scatter_add_(1, index, given.float()) > 0
    logits = logits.float()
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def _uniforms(op, logits, key, generator, uniforms, temperature):
    n = logits.shape[0]
    if (key is not None) + (generator is not None) + (uniforms is not None) > 1:
        raise ValueError(f"{op}: give one of key, generator and uniforms")
    if uniforms is not None:
        check_float(op, "uniforms", uniforms, 1)
        check_shape(op, "uniforms", uniforms, (n,), "(N,)")
        check_device(op, "uniforms", uniforms, "logits", logits)
        return uniforms.detach().float().contiguous()
    if temperature == 0:
        return torch.zeros(n, device=logits.device)
    if key is None:
        key = random.draw_key(generator, logits.device)
    random.check_key(op, key)
    if key.dim() == 1:
        return random.uniform(key, (n,), device=logits.device)
    if key.shape[0] != n:
        raise ValueError(f"{op}: one key per row needs key ({n}, 2), got {tuple(key.shape)}")
    return random.uniform(key, (n, 1), device=logits.device).reshape(n)


def _reference(logits, uniforms, inverse_temperature, top_k, top_p, lowest, sequential):
    x = logits.float()
    top = x.amax(1, keepdim=True)
    index = torch.arange(x.shape[1], device=x.device)
    valid = top.squeeze(1).isfinite()  # amax hands on NaN
    if inverse_temperature == 0:
        chosen = torch.where(x == top, index, x.shape[1]).amin(1)
        return torch.where(valid, chosen, -1)
    score = (x - top) * inverse_temperature
    weight = score.exp()
    threshold = torch.full_like(top, lowest)
    if top_k:
        threshold = torch.maximum(threshold, score.topk(top_k, 1).values[:, -1:])
    if top_p < 1:
        base = torch.where(score >= threshold, weight, 0) if sequential and top_k else weight
        ordered, at = score.sort(1, descending=True)
        cumulative = base.gather(1, at).cumsum(1)
        before = torch.cat([torch.zeros_like(top), cumulative[:, :-1]], 1)
        last = (before < top_p * cumulative[:, -1:]).sum(1, keepdim=True).clamp(min=1) - 1
        threshold = torch.maximum(threshold, ordered.gather(1, last))
    weight = torch.where(score >= threshold, weight, 0)
    cumulative = weight.cumsum(1)
    chosen = (cumulative <= uniforms.unsqueeze(1) * cumulative[:, -1:]).sum(1)
    last = torch.where(weight > 0, index, -1).amax(1)
    return torch.where(valid, torch.minimum(chosen, last), -1)


_op = Op(
    "sample_tokens",
    "(Tensor logits, Tensor uniforms, float inverse_temperature, int top_k, float top_p, float lowest, bool sequential) -> Tensor",
    reference=_reference,
    fake=lambda logits, uniforms, inverse_temperature, top_k, top_p, lowest, sequential: logits.new_empty(
        logits.shape[0], dtype=torch.int64
    ),
)


def _eager(logits, key=None):
    """Top-p with 0.9 as it is usually written."""
    ordered, index = logits.sort(-1, descending=True)
    probability = ordered.softmax(-1)
    probability = probability.masked_fill(probability.cumsum(-1) - probability > 0.9, 0.0)
    return index.gather(-1, torch.multinomial(probability, 1)).squeeze(-1)


CASES = (
    Case(
        sample_tokens,
        lambda make, shape: {"logits": make(shape, 3.0), "key": random.key(5, device=make.device)},
        forms=(
            lambda make, shape: {
                "logits": make(shape, 3.0),
                "key": random.split(random.key(5, device=make.device), shape[0]),
            },
        ),
        shapes=((5, 37), (0, 4), (1, 1), (4, 4099)),
        variants=(
            {},
            {"temperature": 0.0},
            {"temperature": 0.7, "top_p": 0.9},
            {"top_k": 5, "min_p": 0.05},
            {"top_k": 20, "top_p": 0.8, "order": "sequential"},
        ),
        constants=None,
        eager=_eager,
        bytes=lambda shape, size: size * math.prod(shape),
        bench_shapes=((16, 256), (1, 50257), (16, 50257)),
        bench_variant={"top_p": 0.9},
    ),
)
