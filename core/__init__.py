"""The ground floor: configuration, processes, files, images. Imports none of the other packages."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__version__ = "0.2.0"


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's `__getattr__`, which imports each exported name on its first use.

    modules: The module that defines each name. Importing a light module of the package, e.g. a
    configuration to print its help, then does not import torch.
    """

    def load(name: str) -> Any:  # noqa: ANN401 - any of the exported names
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(modules[name]), name)

    return load
