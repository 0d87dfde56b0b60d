import json
import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
OP = """
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
using torch::stable::Tensor;
static Tensor same(const Tensor& x) { return torch::stable::empty_like(x); }
#include "launch.h"
GENKERN_LIBRARY(m) { m.impl("_same", TORCH_BOX(&same)); }
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the sources with one tiny op in place of all families: what is tested is the build, not the kernels."""
    tree = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    tree.mkdir()
    for name in ("genkern", "csrc/include", "csrc/host"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for name in ("setup.py", "build_backend.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "csrc/tiny").mkdir()
    (tree / "csrc/tiny/same.cpp").write_text(OP)
    return tree


@pytest.fixture
def install(tmp_path):
    """install(tree, isolated=False, VARIABLE=...) -> exit status, what pip printed, the build info, the installed folder."""

    def run(tree, isolated=False, **variables):
        target = tmp_path / "installed"
        command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", str(target), str(tree)]
        if not isolated:
            command.append("--no-build-isolation")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GENKERN_") and name != "CXX"}
        done = subprocess.run(command, env={**clean, **variables}, capture_output=True, text=True, check=False)
        recorded = target / "genkern/_build_info.json"
        info = json.loads(recorded.read_text()) if recorded.exists() else None
        return types.SimpleNamespace(status=done.returncode, text=done.stdout + done.stderr, info=info, target=target)

    return run
