"""No kernel is trusted unseen: verdicts of `python -m genkern verify`, one file per GPU, driver, torch and Triton version."""

import functools
import hashlib
import importlib
import importlib.util
import json
import os
import pathlib

import torch

COMMAND = "run `python -m genkern verify` once on this machine"


def verdict_path(device=None):
    """The verdict file of this machine's GPU and software, in the user's cache."""
    properties = torch.cuda.get_device_properties(device)
    triton = importlib.util.find_spec("triton")
    facts = (properties.name, properties.major, properties.minor, torch.__version__, torch.version.cuda)
    version = importlib.import_module("triton").__version__ if triton else None
    digest = hashlib.sha256(repr((*facts, version, _kernel_hash())).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    return cache / "genkern" / f"verified-{digest}.json"


def _kernel_hash():
    """Changes whenever a kernel may have: the CUDA library and the Triton sources."""
    package = pathlib.Path(__file__).parents[1]
    files = [*sorted(package.rglob("*triton*.py")), package / "_C_cuda.so"]
    digest = hashlib.sha256()
    for file in files:
        if file.exists():
            digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _verdicts():
    try:
        return json.loads(verdict_path().read_text())
    except (OSError, ValueError):
        return {}


def untrusted(op, backend):
    """None if this kernel passed on this machine, else the reason it is not the default."""
    verdict = _verdicts().get(f"{op}/{backend}")
    if verdict is None:
        return f"its kernels were never checked on this GPU; {COMMAND} to verify and switch them on"
    return None if verdict == "passed" else f"verify found: {verdict}"


def save_verdicts(verdicts):
    path = verdict_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(verdicts, indent=1))
    os.replace(partial, path)
    _verdicts.cache_clear()
    return path
