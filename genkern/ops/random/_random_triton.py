"""Draws from the keyed stream in Triton: out = value * scale + shift."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes


@triton.jit(do_not_specialize=["a", "b"])
def fill_kernel(
    key, out, a, b, rows, width,
    DISTRIBUTION: tl.constexpr, DIGITS: tl.constexpr, DTYPE: tl.constexpr, KEY_STRIDE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    seed, offset = lanes.stream(key, row, rows, KEY_STRIDE)
    first = number * COLUMNS
    high, low = lanes.words(seed, offset, first, COLUMNS, DTYPE)
    if DISTRIBUTION == "bits":
        if tl.float64 == DTYPE:  # noqa: SIM108 - taken at compile time, the types differ
            value = (high.to(tl.int64) << 32) | low.to(tl.int64)
        else:
            value = high.to(tl.int32, bitcast=True)
    elif DISTRIBUTION == "bernoulli":
        value = (high.to(tl.int64) < b).to(tl.float32)
    else:
        if DISTRIBUTION == "normal":
            value = lanes.normals(seed, offset, first, COLUMNS, True, DTYPE)
        elif DISTRIBUTION == "uniform":
            value = lanes.uniform(high, low, DIGITS, DTYPE)
        elif DISTRIBUTION == "exponential":
            value = lanes.exponential(high, low, DTYPE)
        elif DISTRIBUTION == "gumbel":
            value = lanes.gumbel(high, low, DTYPE)
        else:
            value = lanes.logistic(high, low, DTYPE)
        value = value * lanes.from_bits(a, DTYPE) + lanes.from_bits(b, DTYPE)
    tl.store(out + row * width + column, value, mask=mask)


_DIGITS = {torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def _fill(distribution):
    def launch(key, out, a, b):
        if out.numel() == 0:
            return
        rows = key.shape[0] if key.dim() == 2 else 1
        # Bernoulli: words below b give 1
        scalars = (0, int(a * 2.0**32 + 0.5)) if distribution == "bernoulli" else (lanes.real(a), lanes.real(b))
        lanes.launch(
            fill_kernel, out, rows, out.numel() // rows,
            key.to(out.device), out.view(torch.uint8) if out.dtype == torch.bool else out, *scalars,
            DISTRIBUTION=distribution, DIGITS=_DIGITS.get(out.dtype, 24),
            DTYPE=tl.float64 if out.dtype.itemsize == 8 else tl.float32, KEY_STRIDE=2 if rows > 1 else 0,
        )  # fmt: skip

    return launch


for _name in ("bits", "uniform", "normal", "bernoulli", "exponential", "gumbel", "logistic"):
    implements("triton", f"random_{_name}")(_fill(_name))
