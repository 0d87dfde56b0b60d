"""Triton kernels compiled ahead of time, without a GPU, and what their machine code uses."""

import os
import pathlib
import re
import subprocess
import tempfile
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin"  # cuobjdump and nvdisasm come with Triton


class Compiled(NamedTuple):
    registers: int
    stack: int  # bytes
    opcodes: set  # of the machine code, with suffixes: "LDG.E.128"
    ptx: str


def compile_kernel(kernel, types, constants, arch, unaligned=(), num_warps=4):
    """types {argument: "*fp32" or "i32" ...}; every argument named neither there nor in constants is None.

    As the launcher would, pointers and integers are declared divisible by 16, except those named in `unaligned`.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    constexprs = {name: constants.get(name) for name in names if name not in types}
    attributes = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in types and n not in unaligned}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "enable_fp_fusion": False},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = (_dump(flag, cubin.name) for flag in ("--dump-resource-usage", "-sass"))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK):(\d+)", usage)}
    opcodes = set(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)", sass, re.MULTILINE))
    return Compiled(used["REG"], used["STACK"], opcodes, compiled.asm["ptx"])


def _dump(flag, path):
    environment = {**os.environ, "PATH": f"{_TOOLS}:{os.environ.get('PATH', '')}"}  # cuobjdump calls nvdisasm
    command = [_TOOLS / "cuobjdump", flag, path]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
