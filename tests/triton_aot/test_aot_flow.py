"""Machine code of the flow kernels for three architectures: no stack, no spills, a register budget."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: kernels are not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from aot import compile_kernel  # noqa: E402

from genkern.ops.flow import _affine_coupling_triton as coupling  # noqa: E402
from genkern.ops.flow._rational_quadratic_spline_triton import backward_kernel, forward_kernel  # noqa: E402

NUMBERS = ("bound", "min_width", "min_height", "min_slope")


@pytest.mark.parametrize("arch, inverse", [(80, False), (90, True), (120, False)])
@pytest.mark.parametrize("kernel", [forward_kernel, backward_kernel], ids=["forward", "backward"])
def test_rational_quadratic_spline(kernel, arch, inverse):
    tensors = ["x", "widths", "heights", "slopes"]
    tensors += ["y", "log_det"] if kernel is forward_kernel else ["to_y", "to_log_det", "d_x", "d_widths", "d_heights", "d_slopes"]
    types = {name: "*fp32" for name in tensors} | {f"{name}_stride": "i32" for name in tensors[1:4]}
    types |= {name: "i64" for name in NUMBERS} | {"count": "i32"}
    constants = dict(BINS=8, TAILS=1, INVERSE=inverse, DTYPE=tl.float32, BLOCK=128)
    if kernel is backward_kernel:
        constants["SLOPES"] = 7
    code = compile_kernel(kernel, types, constants, arch, unaligned=(*NUMBERS, "count", *(n for n in types if n.endswith("_stride"))))
    assert code.stack == 0
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    assert code.registers <= 192


@pytest.mark.parametrize("arch, inverse", [(80, False), (90, True)])
@pytest.mark.parametrize("kernel", [coupling.forward_kernel, coupling.backward_kernel], ids=["forward", "backward"])
def test_affine_coupling(kernel, arch, inverse):
    tensors = ["x", "shift", "raw", "chosen"]
    tensors += ["y", "log_det"] if kernel is coupling.forward_kernel else ["grad", "to_log_det", "d_x", "d_shift", "d_raw"]
    strides = [n for n in kernel.arg_names if n.endswith("_stride")]
    types = {name: "*fp32" for name in tensors} | {name: "i32" for name in (*strides, "kept", "rows", "width")} | {"limit": "i64"}
    for scale in (1, 6):
        constants = dict(SCALE=scale, SHIFT_FIRST=False, INVERSE=inverse, MASK=scale == 6, DTYPE=tl.float32, ROWS=1, COLUMNS=1024)
        given = types if scale == 6 else {n: t for n, t in types.items() if n != "chosen"}
        code = compile_kernel(kernel, given, constants, arch, unaligned=("limit", "to_log_det_stride", "rows"))
        assert code.stack == 0
        assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
        assert code.registers <= 128
