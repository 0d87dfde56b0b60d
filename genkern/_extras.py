"""Optional dependencies."""

import importlib


def extra(what, module, package):
    """The module, or an ImportError that names who needs it and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{what}: needs {package}, of the extra "models": pip install "genkern[models]"') from error
