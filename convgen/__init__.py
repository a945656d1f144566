"""convgen: kernels for (transposed) convolutions, specialized, compiled and handed back as modules.

``convgen.specialize(...)`` generates or finds a module, ``convgen.load(folder)`` imports one that
was generated, and ``convgen.verify(module)`` checks one. ``convgen.swap(model, inputs)`` lets
convgen compute what it computes faster of a network, and ``convgen.scan`` says what that is.
``convgen.export(...)`` and ``convgen.export_model(...)`` write files that need torch and a compiler
alone.
Importing this package imports neither torch nor a compiler.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from convgen.building.errors import BuildError as BuildError
    from convgen.building.folders import load as load
    from convgen.building.toolchain import ToolchainError as ToolchainError
    from convgen.checking.verify import verify as verify
    from convgen.exporting.errors import ExportError as ExportError
    from convgen.exporting.one_file import export as export
    from convgen.exporting.one_file import export_model as export_model
    from convgen.models.report import ScanReport as ScanReport
    from convgen.models.report import SwapReport as SwapReport
    from convgen.models.scan import scan as scan
    from convgen.models.swap import swap as swap
    from convgen.models.swap import unswap as unswap
    from convgen.spec import ConvSpec as ConvSpec
    from convgen.spec import SpecError as SpecError
    from convgen.specialize import specialize as specialize

_EXPORTS = {
    "BuildError": "convgen.building.errors",
    "ConvSpec": "convgen.spec",
    "ExportError": "convgen.exporting.errors",
    "ScanReport": "convgen.models.report",
    "SpecError": "convgen.spec",
    "SwapReport": "convgen.models.report",
    "ToolchainError": "convgen.building.toolchain",
    "export": "convgen.exporting.one_file",
    "export_model": "convgen.exporting.one_file",
    "load": "convgen.building.folders",
    "scan": "convgen.models.scan",
    "specialize": "convgen.specialize",
    "swap": "convgen.models.swap",
    "unswap": "convgen.models.swap",
    "verify": "convgen.checking.verify",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'convgen' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    setattr(sys.modules[__name__], name, value)
    return value


class _Package(ModuleType):
    """Keeps ``convgen.specialize`` the function, not the submodule.

    The import system binds a submodule under its name once it is loaded, whoever imports it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _EXPORTS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
