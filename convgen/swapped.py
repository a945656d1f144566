"""Where the classes of swapped layers are imported from: see :mod:`convgen.models.classes`.

``convgen.swapped.<specification>__<arguments>`` has one class, of layers whose convolution is that
specification. Its arguments are in the name, so that a pickled network loads wherever convgen is
installed: the kernels are found in the cache there, or compiled.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType

from convgen.building import requests

__path__: list[str] = []


class _Loader(Loader):
    """Fills a module with the class that its name asks for."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        request = requests.read(module.__name__.rpartition(".")[2])
        assert request is not None
        # Imported here: torch takes a second, and modules import this one before they need it.
        classes = importlib.import_module("convgen.models.classes")
        layer_class = classes.requested(request, module.__name__)
        setattr(module, layer_class.__name__, layer_class)


class _Finder:
    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        parent, _, name = fullname.rpartition(".")
        if parent != __name__ or requests.read(name) is None:
            return None
        return ModuleSpec(fullname, _Loader())


sys.meta_path.insert(0, _Finder)
