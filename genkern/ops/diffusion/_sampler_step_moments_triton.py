"""guidance_moments in Triton: partial sums per tile, added up in float64."""

import torch
import triton
import triton.language as tl

from genkern.core import implements
from genkern.core import triton_lanes as lanes


@triton.jit
def moments_kernel(u, c, partial, u_stride, c_stride, rows, width, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, number, column, mask = lanes.tile(rows, width, ROWS, COLUMNS)
    a = lanes.load(u, u_stride, row, column, mask, DTYPE)
    b = lanes.load(c, c_stride, row, column, mask, DTYPE)
    d = b - a
    at = partial + (row * tl.cdiv(width, COLUMNS) + number) * 5
    tl.store(at, tl.sum(b, 1)[:, None], mask=row < rows)
    tl.store(at + 1, tl.sum(d, 1)[:, None], mask=row < rows)
    tl.store(at + 2, tl.sum(d * d, 1)[:, None], mask=row < rows)
    tl.store(at + 3, tl.sum(b * d, 1)[:, None], mask=row < rows)
    tl.store(at + 4, tl.sum(b * b, 1)[:, None], mask=row < rows)


@implements("triton", "guidance_moments")
def guidance_moments(model_output, learned):
    model_output = model_output.chunk(2, 1)[0] if learned else model_output
    work, dtype = lanes.working_type(model_output)
    if model_output.numel() == 0:
        return model_output.new_zeros((model_output.shape[0] // 2, 5), dtype=work)
    u, c = (lanes.as_rows(t) for t in model_output.chunk(2))
    rows, width = u.shape
    partial = u.new_empty((rows, triton.cdiv(width, lanes.tile_shape(width)[1]), 5), dtype=work)
    lanes.launch(moments_kernel, u, rows, width, u, c, partial, u.stride(0), c.stride(0), DTYPE=dtype)
    return partial.sum(1, dtype=torch.float64).to(work)
