"""Machine code of the sampler step in Triton for three architectures: no stack, no spills, 16-byte accesses, a register budget."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: kernels are not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from aot import compile_kernel  # noqa: E402

from genkern.ops.diffusion import _group_norm_act_channels_last_triton as norm_last  # noqa: E402
from genkern.ops.diffusion import _group_norm_act_triton as norm  # noqa: E402
from genkern.ops.diffusion._q_sample_triton import q_sample_kernel  # noqa: E402
from genkern.ops.diffusion._sampler_step_moments_triton import moments_kernel  # noqa: E402
from genkern.ops.diffusion._sampler_step_triton import step_kernel  # noqa: E402


@pytest.mark.parametrize("dtype, arch", [("*fp32", 80), ("*fp32", 90), ("*fp32", 120), ("*bf16", 90)])
@pytest.mark.parametrize("history, key, device_steps", [(2, False, True), (0, True, False)], ids=["guided 3M", "keyed noise"])
def test_step(history, key, device_steps, dtype, arch):
    tensors = ["x", "u", "out"] + ["h1", "h2", "history_out"] * (history > 0) + ["c", "input_u", "input_c"] * (not key)
    types = {name: dtype for name in tensors} | {name + "_stride": "i32" for name in tensors}
    types |= {"table": "*fp32", "step": "i32", "table_rows": "i32", "clip": "i64", "rows": "i32", "width": "i32"}
    types |= {"key": "*i64"} if key else {}
    types |= {"steps": "*i64"} if device_steps else {}
    constants = dict(HISTORY=history, STEPS_STRIDE=0, DTYPE=tl.float32, KEY_STRIDE=0, ALIGNED=True, ROWS=1, COLUMNS=1024)
    code = compile_kernel(step_kernel, types, constants, arch, unaligned=("step", "table_rows", "clip", "rows"))
    _hold(code, "LDG.E.128", "STG.E.128")


@pytest.mark.parametrize("dtype, arch", [("*fp32", 80), ("*bf16", 90), ("*fp32", 120)])
def test_moments(dtype, arch):
    types = {"u": dtype, "c": dtype, "partial": "*fp32", "u_stride": "i32", "c_stride": "i32", "rows": "i32", "width": "i32"}
    constants = dict(DTYPE=tl.float32, ROWS=1, COLUMNS=1024)
    _hold(compile_kernel(moments_kernel, types, constants, arch, unaligned=("rows",)), "LDG.E.128")


def _hold(code, *accesses):
    assert code.stack == 0
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    assert code.registers <= 128
    for access in accesses:
        assert any(o.startswith(access) for o in code.opcodes)


@pytest.mark.parametrize("dtype, arch", [("*fp32", 80), ("*bf16", 90), ("*fp32", 120)])
def test_q_sample(dtype, arch):
    tensors = ("x0", "noisy", "target")
    types = {name: dtype for name in tensors} | {name + "_stride": "i32" for name in tensors}
    types |= {"alpha": "*fp32", "sigma": "*fp32", "key": "*i64", "rows": "i32", "width": "i32"}
    constants = dict(
        ON_X=0, SIGMA_ON_X=-1, ON_EPS=0, ALPHA_ON_EPS=1, DTYPE=tl.float32, KEY_STRIDE=0, ALIGNED=True, ROWS=1, COLUMNS=1024
    )
    _hold(compile_kernel(q_sample_kernel, types, constants, arch, unaligned=("rows",)), "LDG.E.128", "STG.E.128")


@pytest.mark.parametrize("dtype, arch", [("*fp32", 90), ("*bf16", 80)])
@pytest.mark.parametrize("kernel", ["statistics", "apply", "sums", "gradient"])
def test_group_norm_act(kernel, dtype, arch):
    function, silu = getattr(norm, kernel + "_kernel"), {"SILU": True, "CHUNKS": 64}
    known = {"partial": "*fp64", "sums": "*fp64", "means": "*fp64", "eps": "i64", "weight": "*fp32", "bias": "*fp32"}
    known |= {"x": dtype, "y": dtype, "grad": dtype, "grad_x": dtype, "scale": dtype, "shift": dtype}
    absent = {"x2": None, "pre_bias": None, "grad_x2": None}  # of one input, with an affine map and a condition
    constants = {"DTYPE": tl.float32, "CHUNK": 4096, "BLOCK": 1024, "PIXELS": 4096} | silu | absent
    names = function.arg_names
    types = {n: known.get(n, "i32") for n in names if n not in constants}
    constants = {n: c for n, c in constants.items() if n in names}
    code = compile_kernel(function, types, constants, arch, unaligned=("eps", "groups", "per_group", "chunks", "rows"))
    _hold(code, "LDG.E.128", *(("STG.E.128",) if "y" in names or "grad_x" in names else ()))


@pytest.mark.parametrize("dtype, arch", [("*fp32", 90), ("*bf16", 80)])
@pytest.mark.parametrize("kernel", ["moments", "coefficients", "apply", "sums", "gradient"])
def test_group_norm_act_channels_last(kernel, dtype, arch):
    function = getattr(norm_last, kernel + "_kernel")
    known = {"partial": "*fp64", "sums": "*fp64", "means": "*fp32", "coefficients": "*fp32", "eps": "i64", "weight": "*fp32"}
    known |= {"bias": "*fp32", "x": dtype, "y": dtype, "grad": dtype, "grad_x": dtype, "scale": dtype, "shift": dtype}
    constants = {"DTYPE": tl.float32, "PART": 64, "PIXELS": 8, "CHANNELS": 128, "PARTS": 64, "PER_GROUP": 16, "SILU": True}
    constants |= {"x2": None, "pre_bias": None, "grad_x2": None}
    names = function.arg_names
    types = {n: known.get(n, "i32") for n in names if n not in constants}
    constants = {n: c for n, c in constants.items() if n in names}
    code = compile_kernel(function, types, constants, arch, unaligned=("eps", "groups", "per_group", "parts", "pixels"))
    wide = kernel != "coefficients"  # that one reads a few numbers of each channel
    _hold(code, *(("LDG.E.128",) if wide else ()), *(("STG.E.128",) if "y" in names or "grad_x" in names else ()))
