"""Machine code of discretized_mix_logistic_nll and _sample in Triton: no stack, no spills, a register budget."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: kernels are not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from aot import compile_kernel  # noqa: E402

from genkern.ops.autoregressive import _discretized_mix_logistic_triton as mixture  # noqa: E402

NUMBERS = (
    "half_bin", "edge", "lowest", "log_width", "temperature", "inverse_temperature", "levels_per_unit", "level_size",
)  # fmt: skip


@pytest.mark.parametrize("dtype, arch, openai", [("*fp32", 80, False), ("*bf16", 90, True)])
@pytest.mark.parametrize("name", ["nll", "nll_backward", "sample"])
def test_mixture(name, dtype, arch, openai):
    kernel = getattr(mixture, name + "_kernel")
    types = {n: "i64" for n in NUMBERS} | {
        n: "i32" for n in kernel.arg_names if n.endswith("_stride") or n in ("rows", "pixels", "count")
    }
    types |= {"x": "*fp32", "params": dtype, "d_params": dtype, "nll": "*fp32", "grad": "*fp32", "out": "*fp32", "key": "*i64"}
    types = {n: t for n, t in types.items() if n in kernel.arg_names}
    constants = dict(K=10, COLOURS=3, OPENAI=openai, KEY_STRIDE=0, DTYPE=tl.float32, ROWS=1, COLUMNS=256, MIXTURES=16, PIXELS=16)
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    code = compile_kernel(kernel, types, constants, arch, unaligned=(*NUMBERS, "rows", "grad_stride"), num_warps=8)
    assert code.stack == 0
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    assert code.registers <= 80
    assert ".approx.f32" not in code.ptx and "div.full" not in code.ptx  # tl.exp and a plain division would be
