"""setuptools' build backend, which asks for a torch to read headers from only where no torch is installed.

pip and uv build in an environment of their own. pip's still tells where the target environment lies, and its torch is used; where
none is found (an empty environment, uv) a torch joins the build requirements: any will do, one binary fits torch 2.11 and later.
GENKERN_BUILD=none asks for nothing.
"""

import importlib.util
import os
import pathlib
import sysconfig

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks not changed here


def _torch():
    if os.environ.get("GENKERN_BUILD") == "none" or os.environ.get("GENKERN_TORCH_DIR"):
        return []
    places = [pathlib.Path(sysconfig.get_path(kind)) / "torch" for kind in ("purelib", "platlib")]
    visible = importlib.util.find_spec("torch") or any(place.exists() for place in places)
    return [] if visible else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch()]


def get_requires_for_build_editable(config_settings=None):
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch()]
