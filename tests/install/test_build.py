"""Installs with something missing: the rest is built, and _build_info.json names the reason and the mending command."""

import pathlib
import platform
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

pytestmark = pytest.mark.install
CPU = ["cpu_base", "cpu_avx2", "cpu_avx512"] if platform.machine() == "x86_64" else ["cpu_base"]


def built(info):
    return {part for part, outcome in info["parts"].items() if outcome["built"]}


def test_everything_at_hand(checkout, install):
    done = install(checkout, GENKERN_REQUIRE="cpu,host")
    assert done.status == 0, done.text
    assert built(done.info) >= {*CPU, "host"}
    assert done.info["torch_found_in"] == "target environment"
    assert "-ffp-contract=off" in done.info["parts"]["cpu_base"]["flags"]
    assert {path.name for path in done.target.glob("genkern/_C_*.so")} >= {f"_C_{part}.so" for part in CPU}


def test_no_compiler(checkout, install):
    done = install(checkout, CXX="/nonexistent/c++")
    assert done.status == 0, done.text
    assert built(done.info) == set()
    for part in (*CPU, "host"):
        assert done.info["parts"][part]["why"] == "CXX=/nonexistent/c++ cannot be run"
        assert "g++" in done.info["parts"][part]["mend"] and "python -m genkern build" in done.info["parts"][part]["mend"]
    assert not list(done.target.glob("genkern/*.so"))


def test_required_part_missing_is_an_install_error(checkout, install):
    done = install(checkout, CXX="/nonexistent/c++", GENKERN_REQUIRE="cpu")
    assert done.status != 0 and done.info is None
    assert "GENKERN_REQUIRE=cpu, but cpu_base was not built: CXX=/nonexistent/c++ cannot be run" in done.text


def test_no_nvcc(checkout, install):
    done = install(checkout, GENKERN_BUILD="cuda", CUDACXX="/nonexistent/nvcc")
    assert done.status == 0, done.text
    assert built(done.info) == {"host"}
    assert done.info["parts"]["cuda"]["why"] == "CUDACXX=/nonexistent/nvcc cannot be run"
    assert "CUDA toolkit" in done.info["parts"]["cuda"]["mend"]
    assert done.info["parts"]["cpu_base"]["why"] == "GENKERN_BUILD=cuda"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is missing")
def test_cuda_is_built_without_a_gpu(checkout, install):
    done = install(checkout, GENKERN_BUILD="cuda", GENKERN_CUDA_ARCHS="90-real", GENKERN_REQUIRE="cuda")
    assert done.status == 0, done.text
    assert built(done.info) == {"host", "cuda"} and done.info["cuda_archs"] == "90-real"


def test_no_torch_headers(checkout, install, tmp_path):
    done = install(checkout, GENKERN_TORCH_DIR=str(tmp_path))
    assert done.status == 0, done.text
    assert built(done.info) == {"host"}
    for part in CPU:
        assert "no torch >= 2.11 with headers was found" in done.info["parts"][part]["why"]
        assert done.info["parts"][part]["mend"] == "pip install 'torch>=2.11' && python -m genkern build"


def test_syntax_error_stops_only_its_part(checkout, install):
    (checkout / "csrc/tiny/broken_cpu.cpp").write_text("int broken( { return 0; }\n")
    done = install(checkout, GENKERN_BUILD="cpu,emulated")
    assert done.status == 0, done.text
    assert built(done.info) == {"host", "emulated"}
    for part in CPU:
        assert "broken_cpu.cpp:1" in done.info["parts"][part]["why"] and "error:" in done.info["parts"][part]["why"]


def test_nothing_wanted(checkout, install):
    done = install(checkout, GENKERN_BUILD="none")
    assert done.status == 0, done.text
    assert built(done.info) == set()
    assert {outcome["why"] for outcome in done.info["parts"].values()} == {"GENKERN_BUILD=none"}


def test_backend_asks_for_torch_only_where_it_is_of_use(checkout, tmp_path):
    """A Python that sees no torch: an isolated one of its own prefix, with setuptools alone on its path."""
    import setuptools

    def required(**variables):
        code = "import build_backend; print(build_backend.get_requires_for_build_wheel())"
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(packages), "HOME": str(tmp_path), **variables}
        python = [str(tmp_path / "empty/bin/python"), "-c", code]
        return subprocess.run(python, env=environment, cwd=checkout, capture_output=True, text=True, check=True).stdout

    subprocess.check_call([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "empty")])
    packages = tmp_path / "packages"
    packages.mkdir()
    found = pathlib.Path(setuptools.__path__[0]).parent
    for path in [found / "_distutils_hack", *found.glob("setuptools*")]:
        (packages / path.name).symlink_to(path)
    assert "torch>=2.11" in required()
    assert "torch" not in required(GENKERN_BUILD="none")
    assert "torch" not in required(CXX="/nonexistent/c++")
    assert "torch" not in required(VIRTUAL_ENV=sys.prefix)


def test_sdist_holds_what_a_build_needs(checkout, install, tmp_path):
    code = "import build_backend, sys; print(build_backend.build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=checkout, check=True, capture_output=True)
    (archive,) = tmp_path.glob("genkern-*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.split("/", 1)[-1] for name in files.getnames()}
    assert {"csrc/tiny/same.cpp", "csrc/include/launch.h", "CMakeLists.txt", "build_backend.py", "genkern/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_info.json"))]
    done = install(archive, GENKERN_REQUIRE="cpu", GENKERN_BUILD="cpu")
    assert done.status == 0, done.text


def test_wheel_takes_nothing_from_older_builds(checkout, tmp_path):
    (checkout / "genkern/_C_cpu_base.so").write_text("left by an editable install")
    (checkout / "build/lib.old/genkern").mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), str(checkout)]
    subprocess.run(command, env={"PATH": "/usr/bin:/bin", "GENKERN_BUILD": "none"}, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "genkern/_build_info.json" in names and "genkern/core/_build_info.py" in names
    assert not [name for name in names if name.endswith(".so")]
    assert (checkout / "genkern/_C_cpu_base.so").exists()
