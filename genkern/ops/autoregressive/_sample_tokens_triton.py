"""sample_tokens in Triton: one program per row, the threshold by a search over the bits of the score instead of a sort."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes


@triton.jit
def _as_float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _mass_below(a, weight, cut, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The number of tokens, or their weight, at a <= cut."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.where(tl.load(a + i) <= cut, 1.0 if COUNT else tl.load(weight + i), 0.0)
    return tl.sum(total.to(tl.float64), 0)


@triton.jit
def _least_threshold(a, weight, above, target, COUNT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of the least threshold with at least `target` at or below it, given that those of `above` have, or of a greater one
    that keeps the same tokens. Non-negative floats are ordered as their bits: three cuts a pass quarter the interval, until no token
    lies strictly inside it. Sums are in one order, so they never fall as a cut grows."""
    below = above * 0 - 1
    while above - below > 1:
        step = tl.maximum((above - below) // 4, 1)
        bits0, bits1, bits2 = below + step, tl.minimum(below + 2 * step, above), tl.minimum(below + 3 * step, above)
        cut0, cut1, cut2, end = _as_float(bits0), _as_float(bits1), _as_float(bits2), _as_float(above)
        sum0, sum1, sum2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        nearest = tl.full([BLOCK], -1.0, tl.float32)
        for start in range(0, WIDTH, BLOCK):
            i = start + tl.arange(0, BLOCK)
            here = tl.load(a + i)
            mass = 1.0 if COUNT else tl.load(weight + i)
            sum0 += tl.where(here <= cut0, mass, 0.0)
            sum1 += tl.where(here <= cut1, mass, 0.0)
            sum2 += tl.where(here <= cut2, mass, 0.0)
            nearest = tl.where((here < end) & (here > nearest), here, nearest)
        enough0 = tl.sum(sum0.to(tl.float64), 0) >= target
        enough1 = tl.sum(sum1.to(tl.float64), 0) >= target
        enough2 = tl.sum(sum2.to(tl.float64), 0) >= target
        lower = tl.where(enough0, below, tl.where(enough1, bits0, tl.where(enough2, bits1, bits2)))
        upper = tl.where(enough0, bits0, tl.where(enough1, bits1, tl.where(enough2, bits2, above)))
        nothing = tl.max(nearest, 0).to(tl.int32, bitcast=True) <= below  # between below and above: what lies at above is needed
        below, above = tl.where(nothing, above - 1, lower), tl.where(nothing, above, upper)
    return above


@triton.jit(do_not_specialize=["inverse", "top_k", "top_p", "highest"])
def sample_kernel(
    logits, uniforms, scratch, tokens, stride, inverse, top_k, top_p, highest,
    GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, SEQUENTIAL: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x = logits + row * stride
    tops, unordered = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    for start in range(0, WIDTH, BLOCK):
        i = start + tl.arange(0, BLOCK)
        value = tl.load(x + i, mask=i < WIDTH, other=float("-inf")).to(tl.float32)
        tops = tl.where(value > tops, value, tops)
        unordered |= (value != value).to(tl.int32)
    top = tl.max(tops, 0)
    valid = (tl.max(unordered, 0) == 0) & (top < float("inf")) & (top > float("-inf"))
    chosen = tl.full([], WIDTH, tl.int32)
    if GREEDY:
        for start in range(0, WIDTH, BLOCK):
            i = start + tl.arange(0, BLOCK)
            value = tl.load(x + i, mask=i < WIDTH, other=float("-inf")).to(tl.float32)
            chosen = tl.minimum(chosen, tl.min(tl.where(value == top, i, WIDTH), 0))
    else:
        # a = (greatest logit - logit) / temperature and the weight e^-a; the padding has a = infinity and weight zero
        PADDED: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK * BLOCK
        a, weight = scratch + row * (2 * PADDED), scratch + row * (2 * PADDED) + PADDED
        inverse, limit = lanes.from_bits(inverse, tl.float32), lanes.from_bits(highest, tl.float32)
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            i = start + tl.arange(0, BLOCK)
            distance = (top - tl.load(x + i, mask=i < WIDTH, other=float("-inf")).to(tl.float32)) * inverse
            mass = lanes.exp(-distance)
            sums += mass
            tl.store(a + i, distance)
            tl.store(weight + i, mass)
        tl.debug_barrier()
        total = tl.sum(sums.to(tl.float64), 0)
        end = tl.full([], 0x42CFFFFF, tl.int32)  # the float before 104, from where on weights are zero
        if TOP_K:
            limit = tl.minimum(limit, _as_float(_least_threshold(a, weight, end, top_k.to(tl.float64), True, WIDTH, BLOCK)))
        if TOP_P:
            if SEQUENTIAL:
                end = tl.minimum(limit, _as_float(end)).to(tl.int32, bitcast=True)
                total = _mass_below(a, weight, _as_float(end), False, WIDTH, BLOCK)
            target = lanes.from_bits(top_p, tl.float64) * total
            limit = tl.minimum(limit, _as_float(_least_threshold(a, weight, end, target, False, WIDTH, BLOCK)))
        target = tl.load(uniforms + row).to(tl.float64) * _mass_below(a, weight, limit, False, WIDTH, BLOCK)
        # the block in which the cumulative weight passes the target: the last with a weight, should rounding let none
        first, running, before = tl.zeros([], tl.int32), total * 0.0, total * 0.0
        for start in range(0, WIDTH, BLOCK):
            i = start + tl.arange(0, BLOCK)
            block = tl.sum(tl.where(tl.load(a + i) <= limit, tl.load(weight + i), 0.0).to(tl.float64), 0)
            here = (running <= target) & (block > 0.0)
            first, before = tl.where(here, start, first), tl.where(here, running, before)
            running += block
        i = first + tl.arange(0, BLOCK)
        kept = tl.where(tl.load(a + i) <= limit, tl.load(weight + i), 0.0)
        passed = (before + tl.cumsum(kept.to(tl.float64), 0) > target) & (kept > 0.0)
        last = tl.max(tl.where(kept > 0.0, i, 0), 0)
        chosen = tl.minimum(tl.min(tl.where(passed, i, WIDTH), 0), last)
    tl.store(tokens + row, tl.where(valid, chosen, -1).to(tl.int64))


@implements("triton", "sample_tokens")
def sample_tokens(logits, uniforms, inverse_temperature, top_k, top_p, lowest, sequential):
    rows, width = logits.shape
    tokens = logits.new_empty(rows, dtype=torch.int64)
    if rows == 0:
        return tokens
    logits, greedy, block = lanes.as_rows(logits), inverse_temperature == 0, max(128, min(4096, triton.next_power_of_2(width)))
    scratch = logits.new_empty((rows, 0 if greedy else 2 * triton.cdiv(width, block) * block), dtype=torch.float32)
    constants = {"GREEDY": greedy, "TOP_K": top_k > 0, "TOP_P": top_p < 1, "SEQUENTIAL": bool(sequential and top_k)}
    constants |= {"WIDTH": width, "BLOCK": block, "num_warps": 16 if block > 1024 else 4, "enable_fp_fusion": False}
    scalars = lanes.real(inverse_temperature), top_k, lanes.real(top_p), lanes.real(0.0 - lowest)  # not -0.0: its bits are negative
    with torch.cuda.device_of(logits):
        sample_kernel[(rows,)](logits, uniforms, scratch, tokens, logits.stride(0), *scalars, **constants)
    return tokens
