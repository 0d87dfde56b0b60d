"""What the build recorded: which part was compiled, from which sources, why another is missing, and how to build again.

Standard library only: setup.py runs this file by its path, where neither torch nor genkern can be imported.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request

PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def source_hash(root=PACKAGE.parent):
    """Hash of everything the compiled parts are made from, or None where the sources are not beside the package."""
    files = [path for path in pathlib.Path(root, "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    if not files or not pathlib.Path(root, "CMakeLists.txt").exists():
        return None
    digest = hashlib.sha256()
    for path in sorted([pathlib.Path(root, "CMakeLists.txt"), *files]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def read():
    """_build_info.json as a dict, with "stale" added (the sources have changed since); {} if nothing was ever built."""
    try:
        info = json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    now = source_hash()
    return {**info, "stale": now is not None and now != info.get("source_hash")}


def why_missing(part):
    """Why a part ("cpu", "cpu_avx2", "cuda", "host", ...) was not built, with the mending command; None if all of it was."""
    parts = read().get("parts")
    if not parts:
        return f"nothing was ever compiled here; mend: {rebuild_text()}"
    named = {name: entry for name, entry in parts.items() if name == part or name.startswith(part + "_")}
    missing = [entry for entry in named.values() if not entry["built"]]
    return f"{missing[0]['why']}; mend: {missing[0]['mend']}" if missing else None


def _has_build_requirements():
    modules = all(map(importlib.util.find_spec, ("setuptools", "cmake", "ninja", "pybind11")))
    return modules and int(importlib.metadata.version("setuptools").split(".")[0]) >= 77


def rebuild_command():
    """(argv, environment) that builds and installs this genkern again from where it came, by the tool that installed it."""
    try:
        installed = importlib.metadata.distribution("genkern")
        origin = json.loads(installed.read_text("direct_url.json") or "{}")
        installer = (installed.read_text("INSTALLER") or "").strip()
    except importlib.metadata.PackageNotFoundError:  # imported straight from a checkout
        installed, origin, installer = None, {"url": PACKAGE.parent.as_uri(), "dir_info": {"editable": True}}, ""
    source = [f"genkern=={installed.version}", "--no-binary", "genkern"] if not origin else [origin["url"]]
    if origin.get("url", "").startswith("file:"):
        source = [urllib.request.url2pathname(urllib.parse.urlparse(origin["url"]).path)]
        if not pathlib.Path(source[0], "CMakeLists.txt").exists():
            raise FileNotFoundError(f"genkern came from {source[0]}, which holds no sources: install a checkout or sdist")
        if origin.get("dir_info", {}).get("editable"):
            source.insert(0, "-e")
    if installer == "uv" and shutil.which("uv"):
        command = ["uv", "pip", "install", "--python", sys.executable, "--no-deps", "--reinstall", "--refresh"]
    else:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall", "--no-cache-dir"]
    if _has_build_requirements():
        command.append("--no-build-isolation")  # nothing to download, so it works without a network too
    torch = importlib.util.find_spec("torch")
    return command + source, {"GENKERN_TORCH_DIR": os.path.dirname(torch.origin)} if torch else {}


def rebuild_text():
    """rebuild_command() as one line of shell."""
    try:
        command, environment = rebuild_command()
    except FileNotFoundError as error:
        return str(error)
    return shlex.join([*(f"{name}={value}" for name, value in environment.items()), *command])


def rebuild():
    """Build the compiled parts again; its exit status. Variables such as GENKERN_BUILD keep their meaning."""
    command, environment = rebuild_command()
    print(rebuild_text(), flush=True)
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
