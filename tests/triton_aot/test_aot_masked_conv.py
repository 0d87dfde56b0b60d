"""Machine code of the Triton kernel of masked_conv2d: no stack, no spills, a register budget, tensor cores where they round nothing."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: kernels are not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from aot import compile_kernel  # noqa: E402

from genkern.ops.autoregressive import _masked_conv2d_triton as conv  # noqa: E402

INTEGERS = ("pixels", "height", "width")


@pytest.mark.parametrize("arch", [80, 90, 120])
@pytest.mark.parametrize("outputs, colors", [(64, 1), (96, 3), (30, 3)])
@pytest.mark.parametrize("dtype, pointer", [(torch.float32, "*fp32"), (torch.bfloat16, "*bf16")])
def test_masked_conv(dtype, pointer, outputs, colors, arch):
    rows, columns, depth, warps = conv.tile_of(outputs // colors, dtype)
    constants = dict(
        INPUTS=60, OUTPUTS=outputs, ABOVE=3, ASIDE=3, COLORS=colors, GROUPED=outputs != 30, OWN=True, BIAS=True,
        OPERAND=conv._OPERANDS[dtype], DTYPE=tl.float32, OFFSET=tl.int32, ROWS=rows, COLUMNS=columns, DEPTH=depth,
    )  # fmt: skip
    types = dict.fromkeys(("x", "weight", "bias", "y"), pointer) | dict.fromkeys(INTEGERS, "i32")
    code = compile_kernel(conv.conv_kernel, types, constants, arch, unaligned=INTEGERS, num_warps=warps)
    assert code.stack == 0 and code.registers <= 168
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    on_tensor_cores = any(o.startswith(("HMMA", "HGMMA")) for o in code.opcodes)
    assert on_tensor_cores == (dtype == torch.bfloat16)  # float32 on them would be cut to TF32
    assert ".tf32" not in code.ptx
