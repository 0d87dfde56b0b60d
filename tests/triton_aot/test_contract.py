"""Machine code of every Triton kernel for three architectures: no stack, no spills, 16-byte accesses, a register budget.

Compiled ahead of time, so without a GPU, in a process without TRITON_INTERPRET.
"""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: kernels are not compiled", allow_module_level=True)

import triton.language as tl  # noqa: E402
from aot import compile_kernel  # noqa: E402

from genkern.ops.random._random_triton import fill_kernel  # noqa: E402
from genkern.ops.vae import _likelihood_triton, _log_importance_weight_triton  # noqa: E402
from genkern.ops.vae._latent_triton import backward_kernel, forward_kernel  # noqa: E402

each_arch = pytest.mark.parametrize("arch", [80, 90, 120])
SCALARS = ("a", "b", "low", "high", "free_bits", "half", "rows")  # not declared divisible by 16


def _hold(kernel, types, constants, arch, budget):
    code = compile_kernel(kernel, types, constants, arch, unaligned=SCALARS)
    assert code.stack == 0
    assert not [o for o in code.opcodes if o.startswith(("LDL", "STL"))]
    assert code.registers <= budget
    return code


@each_arch
@pytest.mark.parametrize("distribution", ["bits", "uniform", "normal", "bernoulli", "exponential", "gumbel", "logistic"])
@pytest.mark.parametrize("wide", [False, True], ids=["32-bit", "64-bit"])
def test_draws(distribution, wide, arch):
    floating = "*fp64" if wide else "*fp32"
    out = ("*i64" if wide else "*i32") if distribution == "bits" else floating
    types = dict(key="*i64", out=out, a="i64", b="i64", rows="i32", width="i32")
    constants = dict(
        DISTRIBUTION=distribution, DIGITS=24, DTYPE=tl.float64 if wide else tl.float32, KEY_STRIDE=0, ROWS=1, COLUMNS=1024
    )  # fmt: skip
    code = _hold(fill_kernel, types, constants, arch, 128 if wide else 64)
    assert any(o.startswith("STG.E.128") for o in code.opcodes)
    assert "fma.rn" not in code.ptx  # the bits of the stream allow no contraction
    assert ".approx" not in code.ptx and "div.full" not in code.ptx


def _latent(kernel, kl, prior, soft, dtype, tile, aligned):
    """(types, constants) of a latent kernel that makes z and, unless kl is "", the divergence."""
    forward = kernel is forward_kernel
    tensors = ["mu", "log_var"] + (["z"] if forward else ["grad_z", "d_mu", "d_log_var"])
    if prior:
        tensors += ["prior_mu", "prior_log_var"] + ([] if forward else ["d_prior_mu", "d_prior_log_var"])
    types = {name: dtype for name in tensors}
    if kl:
        types["kl" if forward else "grad_kl"] = "*fp64" if dtype == "*fp64" else "*fp32"
    types |= {name + "_stride": "i32" for name in types}
    types |= dict(key="*i64", low="i64", high="i64", free_bits="i64", rows="i32", width="i32")
    constants = dict(
        NOISE=True, KL=kl, PRIOR=prior, SOFT=soft, DTYPE=tl.float64 if dtype == "*fp64" else tl.float32, KEY_STRIDE=0,
        ALIGNED=aligned, ROWS=tile[0], COLUMNS=tile[1],
    )  # fmt: skip
    return types, constants


@pytest.mark.parametrize("dtype, arch", [("*fp32", 80), ("*fp32", 90), ("*fp32", 120), ("*bf16", 90)])
@pytest.mark.parametrize("kernel", [forward_kernel, backward_kernel], ids=["forward", "backward"])
@pytest.mark.parametrize(
    "kl, prior, soft, tile, aligned",
    [
        ("", False, False, (1, 1024), True),
        ("sum", False, False, (1, 1024), True),
        ("sum", False, True, (16, 64), True),
        ("sum", False, False, (1, 1024), False),
        ("sum", True, False, (1, 1024), True),
        ("element", True, False, (1, 1024), True),
    ],
)
def test_latent(kernel, kl, prior, soft, tile, aligned, dtype, arch):
    code = _hold(kernel, *_latent(kernel, kl, prior, soft, dtype, tile, aligned), arch, 128)
    for access in ("LDG.E.128", "STG.E.128"):
        assert any(o.startswith(access) for o in code.opcodes)
    assert ".approx.f32" not in code.ptx  # tl.exp would be


def _strided(tensors, floating):
    types = {name: floating for name in tensors}
    return types | {name + "_stride": "i32" for name in types} | dict(rows="i32", width="i32")


@pytest.mark.parametrize("dtype, arch", [("*fp32", 80), ("*fp32", 90), ("*fp32", 120), ("*bf16", 90)])
@pytest.mark.parametrize("density", ["bernoulli", "gaussian", "discretized_logistic"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_likelihood(density, backward, dtype, arch):
    second = ["v"] if density != "bernoulli" else []
    tensors = ["a", "x", *second] + ([f"d_{n}" for n in ("a", *second)] if backward else [])
    types = _strided([*tensors, "grad" if backward else "nll"], dtype) | {"half": "i64", "grad" if backward else "nll": "*fp32"}
    constants = dict(DENSITY=density, SECOND=bool(second), DTYPE=tl.float32, ROWS=1, COLUMNS=1024)
    kernel = _likelihood_triton.backward_kernel if backward else _likelihood_triton.forward_kernel
    code = _hold(kernel, types, constants, arch, 128)
    assert any(o.startswith("LDG.E.128" if dtype == "*fp32" else "LDG.E") for o in code.opcodes)


@each_arch
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_log_importance_weight(backward, arch):
    moments = ["z", "mu", "log_var"]
    tensors = ["grad", *moments, *(f"d_{n}" for n in moments)] if backward else [*moments, "ratio"]
    module = _log_importance_weight_triton
    kernel = module.backward_kernel if backward else module.forward_kernel
    code = _hold(kernel, _strided(tensors, "*fp32"), dict(DTYPE=tl.float32, ROWS=1, COLUMNS=1024), arch, 64)
    assert any(o.startswith("LDG.E.128") for o in code.opcodes)
