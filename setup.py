"""Builds the compiled parts with CMake, each on its own, and records what was built and why a part is missing.

GENKERN_BUILD       auto (default) | none | parts such as cpu | cpu,cuda | cpu,emulated      what to try
GENKERN_REQUIRE     cpu | cpu,cuda         fail the install without these (cpu: every instruction set of this machine type)
GENKERN_TORCH_DIR   the torch to read headers from (the package folder); default: the one of the target environment
GENKERN_CUDA_ARCHS  such as "90-real;120"; default: the visible GPU, else every architecture of CMakeLists.txt
GENKERN_SANITIZE    such as address,undefined, for the torch-facing parts
CXX, CUDACXX, MAX_JOBS
"""

import contextlib
import datetime
import fcntl
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))
from build_backend import find_compiler, find_torch, torch_version  # noqa: E402

AGAIN = "python -m genkern build"
X86 = platform.machine() in ("x86_64", "AMD64")
CPU_PARTS = ["cpu_base", *(["cpu_avx2", "cpu_avx512"] if X86 else [])]


class CannotBuild(Exception):
    def __init__(self, why, mend=AGAIN):
        super().__init__(why)
        self.why, self.mend = why, mend


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        errors = re.search(r"^.*(\berror:|CMake Error)", done.stdout, re.MULTILINE)  # not the warnings before it
        text = done.stdout[errors.start() :] if errors else done.stdout
        raise CannotBuild(text[:2000].strip() or f"{command[0]} failed")
    return done.stdout


def find_tool(name):
    """cmake or ninja: of the wheel, if that is installed here, else of the system, else None."""
    wheel = importlib.import_module(name) if importlib.util.find_spec(name) else None
    folder = getattr(wheel, "CMAKE_BIN_DIR", None) or getattr(wheel, "BIN_DIR", None)
    return folder and shutil.which(name, path=folder) or shutil.which(name)


def release(compiler):
    """The line of `compiler --version` that names the version."""
    lines = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")
    return next((line for line in lines if "release" in line), lines[0]).strip()


def cuda_architectures(nvcc):
    """What to compile for: GENKERN_CUDA_ARCHS, else the visible GPUs, else "" (the default of CMakeLists.txt)."""
    if os.environ.get("GENKERN_CUDA_ARCHS"):
        return os.environ["GENKERN_CUDA_ARCHS"]
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    visible = {major + minor for major, minor in re.findall(r"^(\d+)\.(\d)$", found, re.MULTILINE)}
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=False).stdout
    return ";".join(sorted(visible & set(re.findall(r"compute_(\d+)$", known, re.MULTILINE))))


def target_of(part):
    return "_host" if part == "host" else f"_C_{part}"


class Build(build_ext):
    def run(self):
        start = time.monotonic()
        in_place = self.inplace or getattr(self, "editable_mode", False)
        self.out = (ROOT if in_place else pathlib.Path(self.build_lib).resolve()) / "genkern"
        self.out.mkdir(parents=True, exist_ok=True)
        (ROOT / "build").mkdir(exist_ok=True)
        self.info = {
            "built_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "source_hash": runpy.run_path(str(ROOT / "genkern/core/_build_info.py"))["source_hash"](ROOT),
            "parts": {},
        }
        self.wanted = os.environ.get("GENKERN_BUILD", "auto").split(",")
        with open(ROOT / "build/lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two installs from one checkout take turns
            self.build_group(CPU_PARTS, self.configure_torch_parts)
            self.build_group(["host"], self.configure_host)
            self.build_group(["cuda"], self.configure_cuda)
            if "emulated" in self.wanted:
                self.build_group(["emulated"], self.configure_torch_parts)
        self.info["seconds"] = round(time.monotonic() - start, 1)
        for part, outcome in self.info["parts"].items():
            print(f"genkern: {part}: " + ("built" if outcome["built"] else outcome["why"]))
        temporary = self.out / "_build_info.json.new"
        temporary.write_text(json.dumps(self.info, indent=1) + "\n")
        temporary.replace(self.out / "_build_info.json")
        required = [part for part in os.environ.get("GENKERN_REQUIRE", "").split(",") if part]
        for name, outcome in self.info["parts"].items():
            if not outcome["built"] and (name in required or name.split("_")[0] in required):
                raise SystemExit(f"genkern: GENKERN_REQUIRE={','.join(required)}, but {name} was not built: {outcome['why']}\n"
                                 f"mend: {outcome['mend']}")  # fmt: skip

    def build_group(self, parts, configure):
        """Parts that share one CMake configuration; whatever goes wrong is recorded, and stops nothing else."""
        try:
            if sys.platform != "linux":
                raise CannotBuild(f"compiled parts are built on Linux only, this is {sys.platform}", "none, the references run")
            asked = {"auto", parts[0].split("_")[0]} & set(self.wanted) or (parts == ["host"] and self.wanted != ["none"])
            if not asked:
                raise CannotBuild(f"GENKERN_BUILD={','.join(self.wanted)}", f"env -u GENKERN_BUILD {AGAIN}")
            build_dir = configure()
        except CannotBuild as error:
            for part in parts:
                self.record(part, error=error)
        else:
            with contextlib.suppress(CannotBuild):  # all at once: no core waits for the last file of a part
                self.make(parts, build_dir, "--", "-k0")
            for part in parts:  # then each alone, to hear which one failed and why
                self.build_part(part, build_dir)

    @staticmethod
    def make(parts, build_dir, *more):
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        targets = [target_of(part) for part in parts]
        run([find_tool("cmake"), "--build", build_dir, "--target", *targets, "-j", jobs, *more])

    def build_part(self, part, build_dir):
        target = target_of(part)
        try:
            self.make([part], build_dir)
            (library,) = pathlib.Path(build_dir).glob(f"{target}*.so")
        except CannotBuild as error:
            self.record(part, error=error)
            return
        temporary = self.out / (library.name + ".new")
        shutil.copy2(library, temporary)
        temporary.replace(self.out / library.name)  # a process that runs the old library keeps it
        self.record(part, flags=self.flags(build_dir, target))

    def record(self, part, error=None, **details):
        if error:
            for old in self.out.glob("_host*.so" if part == "host" else f"_C_{part}.so"):
                old.unlink()
            details = {"why": error.why, "mend": error.mend}
        self.info["parts"][part] = {"built": error is None, **details}

    def torch(self):
        """(directory, CUDA version or None) of the torch whose headers are read, recorded."""
        directory, how = find_torch()
        if directory is None:
            raise CannotBuild(f"no torch >= 2.11 with headers was found ({how})", f"pip install 'torch>=2.11' && {AGAIN}")
        version, cuda = torch_version(directory)
        self.info.update(torch_headers=version, torch_found_in=how)
        return directory, cuda

    def configure_torch_parts(self):
        directory, _ = self.torch()
        options = [f"-DGENKERN_TORCH_DIR={directory}", "-DGENKERN_HOST=OFF", "-DGENKERN_EMULATED=ON"]
        return self.configure(*options, f"-DGENKERN_SANITIZE={os.environ.get('GENKERN_SANITIZE', '')}")

    def configure_host(self):
        pybind11 = importlib.util.find_spec("pybind11")
        if not pybind11:
            raise CannotBuild("pybind11 is not installed", f"pip install 'pybind11>=2.13' && {AGAIN}")
        folder = pathlib.Path(pybind11.origin).parent / "share/cmake/pybind11"
        return self.configure(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={folder}")

    def configure_cuda(self):
        nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
        if not nvcc:
            named = os.environ.get("CUDACXX")
            why = f"CUDACXX={named} cannot be run" if named else "nvcc was not found"
            raise CannotBuild(why, f"install the CUDA toolkit, or name its compiler: CUDACXX=/usr/local/cuda/bin/nvcc {AGAIN}")
        directory, torch_cuda = self.torch()
        if self.wanted == ["auto"] and torch_cuda is None:
            raise CannotBuild("this torch is built without CUDA", f"GENKERN_BUILD=cpu,cuda {AGAIN}")
        archs = cuda_architectures(nvcc)
        self.info.update(nvcc=f"{nvcc}: {release(nvcc)}", cuda_archs=archs or "default")
        options = [f"-DGENKERN_TORCH_DIR={directory}", "-DGENKERN_HOST=OFF", "-DGENKERN_CUDA=ON"]
        options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", *([f"-DCMAKE_CUDA_ARCHITECTURES={archs}"] if archs else [])]
        return self.configure(*options)

    def configure(self, *options):
        """Configure CMake in a folder of its own per set of options, so that a second build compiles only what changed."""
        compiler, cmake, ninja = find_compiler(), find_tool("cmake"), find_tool("ninja")
        if not compiler:
            named = os.environ.get("CXX")
            why = f"CXX={named} cannot be run" if named else "no C++ compiler was found"
            raise CannotBuild(why, f"install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++) && {AGAIN}")
        if not cmake or not ninja:
            raise CannotBuild(f"{'ninja' if cmake else 'cmake'} was not found", f"pip install cmake ninja pybind11 && {AGAIN}")
        self.info.update(compiler=f"{compiler}: {release(compiler)}")
        key = repr((options, compiler, os.environ.get("CXX"), os.environ.get("CXXFLAGS")))
        build_dir = str(ROOT / "build" / f"cmake-{hashlib.sha256(key.encode()).hexdigest()[:8]}")
        command = [cmake, "-S", str(ROOT), "-B", build_dir, "-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *options]
        if not os.environ.get("CXX"):
            command.append(f"-DCMAKE_CXX_COMPILER={compiler}")
        run(command)
        return build_dir

    @staticmethod
    def flags(build_dir, target):
        """The flags CMake really used for a target, from the first of its compile commands."""
        commands = json.loads(pathlib.Path(build_dir, "compile_commands.json").read_text())
        used = next(shlex.split(c["command"]) for c in commands if f"CMakeFiles/{target}.dir/" in c["command"])
        return " ".join(f for f in used[1:] if f.startswith("-") and not f.startswith(("-I", "-o", "-c", "-isystem")))

    def get_source_files(self):
        return []

    def get_outputs(self):
        return []


setup(
    ext_modules=[Extension("genkern._parts", sources=[])],  # makes the wheel one of this platform and runs Build
    cmdclass={"build_ext": Build},
)
