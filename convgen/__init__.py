"""convgen: kernels for (transposed) convolutions, specialized, compiled and handed back as modules.

``convgen.specialize(...)`` generates or finds a module, ``convgen.verify(module)`` checks one.
Importing this package imports neither torch nor a compiler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from convgen.build import BuildError as BuildError
    from convgen.spec import ConvSpec as ConvSpec
    from convgen.spec import SpecError as SpecError
    from convgen.specialize import specialize as specialize
    from convgen.toolchain import ToolchainError as ToolchainError
    from convgen.verify import verify as verify

_EXPORTS = {
    "BuildError": "convgen.build",
    "ConvSpec": "convgen.spec",
    "SpecError": "convgen.spec",
    "ToolchainError": "convgen.toolchain",
    "specialize": "convgen.specialize",
    "verify": "convgen.verify",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'convgen' has no attribute {name!r}")
    import importlib
    import sys

    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    # Importing convgen.specialize binds the submodule under the name of the function.
    setattr(sys.modules[__name__], name, value)
    return value
