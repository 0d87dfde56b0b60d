"""The compiled libraries that are installed here keep to the stable ABI and hide everything else."""

import pathlib
import platform
import re
import shutil
import subprocess

import pytest

import genkern
from genkern.core import _build_info

PACKAGE = pathlib.Path(genkern.__file__).parent
LIBRARIES = sorted(path.name for path in PACKAGE.glob("_C_*.so"))


def symbols(library, *options):
    if not shutil.which("nm"):
        pytest.skip("nm is missing (binutils)")
    listed = subprocess.run(["nm", "-D", "-C", *options, PACKAGE / library], capture_output=True, text=True, check=True).stdout
    return [line.split(maxsplit=2 if "--defined-only" in options else 1)[-1].strip() for line in listed.splitlines()]


@pytest.mark.parametrize("library", LIBRARIES)
def test_only_the_stable_abi_is_used(library):
    needed = symbols(library, "--undefined-only")
    assert any("aoti_torch_" in name for name in needed)
    outside = [name for name in needed if re.search(r"\b(c10|at|torch|caffe2)::", name)]
    assert outside == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_is_exported(library):
    """A visible inline function of one instruction set could otherwise be called by another library."""
    exported = [name for name in symbols(library, "--defined-only") if not name.startswith(("_init", "_fini"))]
    assert exported == []


@pytest.mark.parametrize("library", LIBRARIES)
def test_no_wide_instructions_below_their_set(library):
    if platform.machine() != "x86_64" or not shutil.which("objdump"):
        pytest.skip("needs x86-64 and objdump")
    forbidden = {"_C_cpu_base.so": r"%[yz]mm", "_C_cpu_avx2.so": r"%zmm"}.get(library)
    if forbidden is None:
        pytest.skip("every instruction is allowed here")
    code = subprocess.run(["objdump", "-d", PACKAGE / library], capture_output=True, text=True, check=True).stdout
    assert re.findall(rf".*{forbidden}\d+.*", code)[:3] == []


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32 with 10 rounds."""
    host = pytest.importorskip("genkern._host", reason="the host module was not built")
    f = 0xFFFFFFFF
    assert host.philox4x32(0, 0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    assert host.philox4x32(f, f, f, f, f, f) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    words = host.philox4x32(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    assert words == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_build_info_is_told():
    info = _build_info.read()
    if not info:
        pytest.skip("nothing was ever compiled here")
    assert set(info["parts"]) >= {"cpu_base", "host", "cuda"}
    for part, outcome in info["parts"].items():
        missing = _build_info.why_missing(part)
        assert (missing is None) == outcome["built"]
        assert outcome["built"] or ("mend: " in missing and outcome["why"] in missing)


def test_rebuild_command_is_complete():
    command = _build_info.rebuild_text()
    assert "install --no-deps" in command and "GENKERN_TORCH_DIR=" in command
