"""Machine code of sample_tokens in Triton: no stack, no spills, a register budget, wide accesses."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: kernels are not compiled", allow_module_level=True)

from aot import compile_kernel  # noqa: E402

from genkern.ops.autoregressive._sample_tokens_triton import sample_kernel  # noqa: E402


@pytest.mark.parametrize("dtype, arch", [("*fp32", 80), ("*bf16", 90), ("*fp32", 120)])
@pytest.mark.parametrize("width, filters", [(50304, True), (256, False)], ids=["filtered", "plain"])
def test_sample(width, filters, dtype, arch):
    types = {"logits": dtype, "uniforms": "*fp32", "scratch": "*fp32", "tokens": "*i64", "stride": "i32", "top_k": "i32"}
    types |= {name: "i64" for name in ("inverse", "top_p", "highest")}
    block = min(4096, width)
    constants = dict(GREEDY=False, TOP_K=filters, TOP_P=filters, SEQUENTIAL=filters, WIDTH=width, BLOCK=block)
    scalars = ("top_k", "inverse", "top_p", "highest")
    code = compile_kernel(sample_kernel, types, constants, arch, unaligned=scalars, num_warps=16 if block > 1024 else 4)
    assert code.stack == 0
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    assert code.registers <= 128
    assert ".approx.f32" not in code.ptx  # tl.exp would be
    if filters:
        assert any(o.startswith("LDG.E.128") for o in code.opcodes) and any(o.startswith("STG.E.128") for o in code.opcodes)
