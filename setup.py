"""Builds the compiled parts with CMake, each on its own, and records what was built and why a part is missing.

GENKERN_BUILD     auto (default) | none | cpu | cpu,cuda      what to try
GENKERN_REQUIRE   cpu | cpu,cuda                              fail the install without these
GENKERN_TORCH_DIR, GENKERN_CUDA_ARCHS ("90-real;120"), CXX, CUDACXX, MAX_JOBS
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig
import time

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).parent.resolve()
MEND = "pip install --no-build-isolation --no-deps --force-reinstall genkern  (from a checkout: python -m genkern build)"


def find_torch():
    """torch's directory without importing it: pip's isolated build hides site-packages from sys.path, not from sysconfig."""
    named = os.environ.get("GENKERN_TORCH_DIR")
    if named:
        candidates = [(named, "GENKERN_TORCH_DIR")]
    else:
        spec = importlib.util.find_spec("torch")
        candidates = [(os.path.dirname(spec.origin), "sys.path")] if spec and spec.origin else []
        candidates += [(os.path.join(sysconfig.get_path(k), "torch"), f"sysconfig {k}") for k in ("purelib", "platlib")]
    for directory, how in candidates:
        if (pathlib.Path(directory) / "include/torch/csrc/stable/library.h").exists():
            return pathlib.Path(directory), how
    return None, None


def source_hash():
    digest = hashlib.sha256()
    for file in sorted([ROOT / "CMakeLists.txt", *(ROOT / "csrc").rglob("*.*")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-1500:])


def visible_gpu_archs():
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ";".join(sorted({line.strip().replace(".", "") for line in found.stdout.split()})) if found.returncode == 0 else ""


class Build(build_ext):
    def run(self):
        self.info = {"built_at": time.strftime("%Y-%m-%d %H:%M:%S"), "python": platform.python_version(),
                     "source_hash": source_hash(), "parts": {}}  # fmt: skip
        in_place = self.inplace or getattr(self, "editable_mode", False)
        self.out = (ROOT if in_place else pathlib.Path(self.build_lib).resolve()) / "genkern"
        self.out.mkdir(parents=True, exist_ok=True)
        wanted = os.environ.get("GENKERN_BUILD", "auto").split(",")
        sets = ("base", "avx2", "avx512") if platform.machine() in ("x86_64", "AMD64") else ("base",)
        parts = [*(f"cpu_{s}" for s in sets), "host", "cuda"]
        try:
            targets = self.configure(wanted)
        except Exception as error:
            targets = {part: str(error) for part in parts}
        for part in parts:
            self.build_part(part, targets.get(part))
        for part in filter(None, os.environ.get("GENKERN_REQUIRE", "").split(",")):
            missing = {p: i["why"] for p, i in self.info["parts"].items() if p.split("_")[0] == part and not i["built"]}
            if missing:
                raise SystemExit(f"genkern: GENKERN_REQUIRE={part}, but it was not built: {missing}")
        (self.out / "_build_info.json").write_text(json.dumps(self.info, indent=1))
        for part, outcome in self.info["parts"].items():
            print(f"genkern: {part}: " + (f"built in {outcome['seconds']} s" if outcome["built"] else outcome["why"][-300:]))

    def configure(self, wanted):
        """Configure once; {part: None if it can be tried, else why not}."""
        if wanted == ["none"]:
            raise RuntimeError("GENKERN_BUILD=none")
        if sys.platform != "linux":
            raise RuntimeError(f"compiled parts are built on Linux only, this is {sys.platform}")
        torch_dir, found_by = find_torch()
        if torch_dir is None:
            raise RuntimeError("no torch >= 2.11 with headers was found; install torch first, then build again")
        version = {}
        exec((torch_dir / "version.py").read_text(), version)
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        compiler = shutil.which(os.environ.get("CXX") or "c++") or (not os.environ.get("CXX") and shutil.which("g++"))
        nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc")
        if not cmake:
            raise RuntimeError("cmake was not found")
        if not compiler:
            raise RuntimeError(f"no C++ compiler was found (CXX={os.environ.get('CXX', '')})")
        self.info.update(torch_headers=version["__version__"], torch_found_by=found_by, compiler=compiler, nvcc=nvcc or "")
        cuda_why = None
        if wanted == ["auto"] and not version.get("cuda"):
            cuda_why = "this torch has no CUDA (GENKERN_BUILD=cpu,cuda builds it all the same)"
        elif wanted != ["auto"] and "cuda" not in wanted:
            cuda_why = f"GENKERN_BUILD={','.join(wanted)}"
        elif not nvcc:
            cuda_why = "nvcc was not found"
        archs = os.environ.get("GENKERN_CUDA_ARCHS") or visible_gpu_archs()
        self.build_dir = pathlib.Path(self.build_temp).resolve()
        command = [cmake, "-S", str(ROOT), "-B", str(self.build_dir), f"-DGENKERN_TORCH_DIR={torch_dir}",
                   f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={compiler}"]  # fmt: skip
        command += [f"-DGENKERN_CUDA={'OFF' if cuda_why else 'ON'}"]
        command += [f"-DCMAKE_CUDA_ARCHITECTURES={archs}"] if archs and not cuda_why else []
        command += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        pybind = importlib.util.find_spec("pybind11")
        command += [f"-Dpybind11_DIR={pathlib.Path(pybind.origin).parent / 'share/cmake/pybind11'}"] if pybind else []
        self.info["cuda_archs"] = "" if cuda_why else archs or "default"
        run(command)
        return {"cuda": cuda_why}

    def build_part(self, part, why_not):
        target = "_host" if part == "host" else f"_C_{part}"
        start = time.time()
        if why_not is None:
            try:
                run(["cmake", "--build", str(self.build_dir), "--target", target, "-j", os.environ.get("MAX_JOBS", "2")])
                for library in self.build_dir.glob(f"{target}*.so"):
                    shutil.copy2(library, self.out / library.name)
            except Exception as error:
                why_not = str(error)
        outcome = {"built": why_not is None, "seconds": round(time.time() - start, 1)}
        if why_not is not None:
            outcome.update(why=why_not, mend=MEND)
        self.info["parts"][part] = outcome

    def get_source_files(self):
        return []

    def get_outputs(self):
        return []


setup(
    ext_modules=[Extension("genkern._parts", sources=[])],  # makes the wheel one of this platform and runs Build
    cmdclass={"build_ext": Build},
)
