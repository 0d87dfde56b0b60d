"""masked_conv2d in Triton: a matrix product of the live weights with the inputs that they meet, gathered where they lie.

The depth is walked channel by channel, within one the live taps in raster order. Float32 is multiplied in full precision;
bfloat16 and float16 on tensor cores, summed in float32.
"""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes
from genkern.core._backends import INTERPRET

_OPERANDS = {torch.float64: tl.float64, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def conv_kernel(
    x, weight, bias, y, pixels, height, width,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, ABOVE: tl.constexpr, ASIDE: tl.constexpr, COLORS: tl.constexpr,
    GROUPED: tl.constexpr, OWN: tl.constexpr, BIAS: tl.constexpr, OPERAND: tl.constexpr, DTYPE: tl.constexpr,
    OFFSET: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of one colour at COLUMNS pixels. The kernel covers ABOVE rows above and ASIDE columns on either side."""
    size: tl.constexpr = 2 * ASIDE + 1
    taps: tl.constexpr = ABOVE * size + ASIDE  # before the centre
    live: tl.constexpr = taps + (OWN or COLORS > 1)
    of_color: tl.constexpr = OUTPUTS // COLORS
    blocks: tl.constexpr = (of_color + ROWS - 1) // ROWS
    color = tl.program_id(1) // blocks
    i = tl.program_id(1) % blocks * ROWS + tl.arange(0, ROWS)
    output = (color * of_color + i if GROUPED else i * COLORS + color)[:, None]
    rows = (i < of_color)[:, None]

    plane = height * width
    begin = tl.program_id(0).to(OFFSET) * COLUMNS
    p = begin + tl.arange(0, COLUMNS)
    columns = (p < pixels)[None, :]
    image = begin // plane  # of the first pixel; the others count from it
    x += image.to(tl.int64) * INPUTS * plane
    y += image.to(tl.int64) * OUTPUTS * plane
    at = p % plane
    line, place = at // width, at % width
    image = p // plane - image
    beyond = (image * INPUTS * plane + at)[None, :]
    total = tl.zeros([ROWS, COLUMNS], DTYPE)
    for first in range(0, INPUTS * live, DEPTH):
        k = first + tl.arange(0, DEPTH)
        c, tap = k // live, k % live
        its_color = c // (INPUTS // COLORS) if GROUPED else c % COLORS
        used = (c < INPUTS) & ((tap < taps) | (its_color < color + OWN))  # what is not used is never read
        up, left = ABOVE - tap // size, ASIDE - tap % size
        source = place[None, :] - left[:, None]
        inside = used[:, None] & columns & (line[None, :] >= up[:, None]) & (source >= 0) & (source < width)
        value = tl.load(x + (beyond + (c.to(OFFSET) * plane - up * width - left)[:, None]), mask=inside, other=0.0)
        at_weight = output * (INPUTS * size * (2 * ABOVE + 1)) + (c * (size * (2 * ABOVE + 1)) + tap)[None, :]
        w = tl.load(weight + at_weight, mask=rows & used[None, :], other=0.0)
        total = tl.dot(w.to(OPERAND), value.to(OPERAND), total, input_precision="ieee", out_dtype=DTYPE)
    if BIAS:
        total += tl.load(bias + output, mask=rows, other=0.0).to(DTYPE)
    tl.store(y + ((image * OUTPUTS * plane + at)[None, :] + output.to(OFFSET) * plane), total, mask=rows & columns)


def tile_of(of_color, dtype):
    """(outputs, pixels, depth, warps) of one program: as large as the registers allow."""
    outputs = max(16, min(64, triton.next_power_of_2(of_color)))
    if dtype.itemsize == 2:
        return outputs, 64, 32, 8 if outputs == 64 else 4
    return outputs if dtype == torch.float32 else 16, 32, 32, 4


@implements("triton", "masked_conv2d")
def masked_conv2d(x, weight, bias, own, colors, grouped):
    n, inputs, height, width = x.shape
    outputs = weight.shape[0]
    y = torch.empty((n, outputs, height, width), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, weight, bias = (None if t is None else t.contiguous() for t in (x, weight, bias))
    compute = lanes.working_type(x)[1]
    rows, columns, depth, warps = tile_of(outputs // colors, x.dtype)
    grid = triton.cdiv(n * height * width, columns), colors * triton.cdiv(outputs // colors, rows)
    with torch.cuda.device_of(x):
        conv_kernel[grid](
            x, weight, bias, y, n * height * width, height, width,
            INPUTS=inputs, OUTPUTS=outputs, ABOVE=weight.shape[2] // 2, ASIDE=weight.shape[3] // 2, COLORS=colors, GROUPED=grouped,
            OWN=own, BIAS=bias is not None, OPERAND=compute if INTERPRET else _OPERANDS[x.dtype], DTYPE=compute,
            OFFSET=tl.int64 if max(n, 2 * inputs, 2 * outputs) * height * width >= 2**30 else tl.int32,
            ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=warps, enable_fp_fusion=False,
        )  # fmt: skip
    return y
