"""setuptools' build backend, which asks for a torch to read headers from only where none is found.

Only headers are read and one binary fits torch 2.11 and later, so any torch that can be seen will do, whichever flavour. pip
and uv build in an environment of their own: pip's still tells where the target environment lies; uv's does not, but an
activated or project environment does. Where there is none (an empty environment) "torch>=2.11" joins the build requirements:
the wheel that the runtime dependency asks for anyway, so the client's cache holds it and nothing is downloaded twice.
GENKERN_BUILD=none, no C++ compiler, or a system other than Linux: nothing to compile, so nothing is asked for.
"""

import os
import pathlib
import re
import shlex
import shutil
import site
import sys
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks not changed here

ROOT = pathlib.Path(__file__).parent.resolve()


def find_compiler():
    """The C++ compiler's path, or None. CXX may hold arguments; its first word counts."""
    named = shlex.split(os.environ.get("CXX", ""))
    return next(filter(None, map(shutil.which, named[:1] or ("c++", "g++", "clang++"))), None)


def _site_folders():
    """(folder that may hold torch, what it is), the target environment first."""
    for kind in ("purelib", "platlib"):
        yield sysconfig.get_path(kind), "target environment"
    settings = pathlib.Path(sys.prefix, "pyvenv.cfg")
    if not settings.exists() or re.search(r"include-system-site-packages\s*=\s*true", settings.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        for kind in ("purelib", "platlib"):
            yield sysconfig.get_path(kind, vars=base), "system packages"
        yield site.getusersitepackages(), "user packages"
    for folder in sys.path:
        yield folder or ".", "build environment"
    prefixes = [os.environ.get("VIRTUAL_ENV"), os.environ.get("CONDA_PREFIX"), ROOT / ".venv"]
    prefixes += [pathlib.Path(folder).parent for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    for prefix in filter(None, prefixes):
        for folder in sorted(pathlib.Path(prefix).glob("lib/python3*/site-packages")):
            yield folder, f"neighbouring environment {prefix}"


def torch_version(folder):
    """(version, CUDA version or None) of the torch package in a folder, without importing it; None if none fit to build on."""
    folder = pathlib.Path(folder)
    if not (folder / "include/torch/csrc/stable/library.h").exists() or not (folder / "version.py").exists():
        return None
    names = {}
    exec((folder / "version.py").read_text(), names)
    version = names["__version__"]
    major, minor = map(int, re.match(r"(\d+)\.(\d+)", version).groups())
    return (version, names.get("cuda")) if (major, minor) >= (2, 11) else None


def find_torch():
    """(torch's directory, how it was found), without importing torch, or (None, why not)."""
    named = os.environ.get("GENKERN_TORCH_DIR")
    if named:
        return (pathlib.Path(named), "GENKERN_TORCH_DIR") if torch_version(named) else (None, f"GENKERN_TORCH_DIR={named}")
    for folder, how in _site_folders():
        if torch_version(pathlib.Path(folder, "torch")):
            return pathlib.Path(folder, "torch").resolve(), how
    return None, "in no environment that can be seen from here"


def _torch_to_ask_for():
    useless = os.environ.get("GENKERN_BUILD") == "none" or sys.platform != "linux" or not find_compiler()
    named = os.environ.get("GENKERN_TORCH_DIR")
    return [] if useless or named or find_torch()[0] else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_to_ask_for()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_to_ask_for()]


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    for old in (ROOT / "build").glob("lib*"):  # setuptools would carry modules deleted since into the wheel
        shutil.rmtree(old)
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
