"""Machine code of the Triton kernels of causal_conv1d and gated_activation: no stack, no spills, a register budget."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: kernels are not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from aot import compile_kernel  # noqa: E402

from genkern.ops.autoregressive import _causal_conv1d_triton as conv  # noqa: E402
from genkern.ops.autoregressive import _gated_activation_triton as gate  # noqa: E402
from genkern.ops.autoregressive._causal_conv1d_dense_triton import dense_kernel  # noqa: E402

each_arch = pytest.mark.parametrize("arch", [80, 90])
INTEGERS = ("rows", "width", "time", "channels", "count", "blocks")


def _hold(kernel, tensors, constants, arch, budget):
    types = tensors | {name: "i32" for name in kernel.arg_names if name in INTEGERS or name.endswith("_stride")}
    code = compile_kernel(kernel, types, constants, arch, unaligned=("rows", "count", "blocks"))
    assert code.stack == 0
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    assert code.registers <= budget
    assert ".approx.f32" not in code.ptx  # tl.exp and a plain division would be
    return code


@each_arch
@pytest.mark.parametrize("full", [False, True], ids=["plain", "state and sequences"])
@pytest.mark.parametrize(
    "name, own",
    [
        ("conv_kernel", ("x", "weight", "bias", "y")),
        ("activation_backward_kernel", ("grad", "x", "weight", "bias", "h")),
        ("input_backward_kernel", ("h", "weight", "d_x")),
        ("weight_backward_kernel", ("h", "x", "partial")),
    ],
)
def test_causal_conv(name, own, full, arch):
    kernel = getattr(conv, name)
    tensors = dict.fromkeys(own, "*fp32")
    if full:
        tensors |= {"seq": "*i32"} | {n: "*fp32" for n in ("state", "d_state") if n in kernel.arg_names}
    constants = dict(TAPS=4, DILATION=1, BIAS=True, STATE=full, SEQ=full, SILU=True, DTYPE=tl.float32, ROWS=1, COLUMNS=1024, BLOCK=1024)
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    _hold(kernel, tensors, constants, arch, 128)


@each_arch
@pytest.mark.parametrize("indices", [False, True], ids=["plain", "slots"])
def test_causal_conv_update(indices, arch):
    kernel = conv.update_kernel
    integers = ("x_sample", "x_channel", "x_time", "state_slot", "state_channel", "state_time", "channels", "rows", "time", "length")
    types = dict.fromkeys(("x", "state", "weight", "bias", "y"), "*fp32") | dict.fromkeys(integers, "i32")
    if indices:
        types["indices"] = "*i32"
    constants = dict(TAPS=4, DILATION=1, BIAS=True, INDICES=indices, SILU=True, DTYPE=tl.float32, ROWS=128, COLUMNS=4)
    code = compile_kernel(kernel, types, constants, arch, unaligned=integers)
    assert code.stack == 0 and code.registers <= 128
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    assert "BAR.SYNC" in "".join(code.opcodes)  # between reading and shifting a state
    assert ".approx.f32" not in code.ptx


@each_arch
@pytest.mark.parametrize("kernel", [gate.gate_kernel, gate.gate_backward_kernel], ids=["forward", "backward"])
def test_gate(kernel, arch):
    names = [n for n in ("grad", "x", "condition", "y", "d_x", "d_condition") if n in kernel.arg_names]
    constants = dict(CONDITION=True, DTYPE=tl.float32, ROWS=1, COLUMNS=1024)
    code = _hold(kernel, dict.fromkeys(names, "*fp32"), constants, arch, 128)
    for access in ("LDG.E.128", "STG.E.128"):
        assert any(o.startswith(access) for o in code.opcodes)


@each_arch
@pytest.mark.parametrize("gated", [False, True], ids=["dense", "gated"])
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
def test_dense(narrow, gated, arch):
    """Narrow types multiply on tensor cores; float32 never does, whatever TF32 is set to."""
    tensors = ["x", "state", "weight", "bias", "y"] + ["condition"] * gated
    types = dict.fromkeys(tensors, "*bf16" if narrow else "*fp32")
    integers = [n for n in dense_kernel.arg_names if n.startswith("condition_")]
    integers += ["outputs", "groups", "dilation", "time", "columns"]
    constants = dict(CHANNELS=64, TAPS=2, GATED=gated, DTYPE=tl.float32, FACTOR=tl.bfloat16 if narrow else tl.float32)
    constants |= dict(OUTPUTS=32 if gated else 64, DEPTH=32, COLUMNS=64)
    code = compile_kernel(dense_kernel, types | dict.fromkeys(integers, "i32"), constants, arch, unaligned=integers, num_warps=8)
    assert code.stack == 0
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    assert code.registers <= 224
    assert ".approx.f32" not in code.ptx
    assert ("mma" in code.ptx) == narrow


def test_dense_of_ones():
    """Arguments that are one reach the kernel as constants."""
    types = {n: "*fp32" for n in ("x", "state", "weight", "condition", "y")} | {"columns": "i32"}
    ones = {n: 1 for n in dense_kernel.arg_names if n.startswith("condition_") or n in ("outputs", "groups", "dilation", "time")}
    constants = dict(CHANNELS=1, TAPS=3, GATED=True, DTYPE=tl.float32, FACTOR=tl.float32, OUTPUTS=16, DEPTH=32, COLUMNS=64)
    assert compile_kernel(dense_kernel, types, constants | ones, 90, unaligned=("columns",), num_warps=8).stack == 0
