"""What a generated package loads instead of ``lib/cuda.so`` when it is interpreted.

``CONVGEN_INTERPRET=1`` (or a mode of :data:`convgen.checking.interpret.MODES`) in the environment
lets a package's CUDA kernels serve the CPU's tensors: its ``_library.py`` then calls
:func:`open_package`.
"""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from convgen.building import folders
from convgen.building.build import Progress
from convgen.building.errors import BuildError
from convgen.checking.interpret import MODES, package_library
from convgen.engines.abi import CALL, EPILOGUE, POINTERS, RESULTS, TENSORS
from convgen.spec import ConvSpec, Geometry, SpecError, documents
from convgen.spec.documents import DocumentError
from convgen.spec.dtypes import DTYPES
from convgen.spec.dtypes import MODES as MATH_MODES

VARIABLE = "CONVGEN_INTERPRET"

_OUTPUT, _INPUT, _INOUT = 0, 1, 2
"""What ``convgen_interpret_register`` is told of a tensor's contents."""


class InterpretedWarning(UserWarning):
    """Results come from the interpreter: the CUDA kernels, on the CPU."""


def load(package: Path, mode: str = "checked", *, progress: Progress | None = None) -> ModuleType:
    """Imports a package folder such that its CUDA kernels serve the CPU's tensors, interpreted.

    Args:
        package: a folder that convgen generated, with CUDA sources.
        mode: of :data:`convgen.checking.interpret.MODES`.
        progress: as for :func:`convgen.building.build.build`.

    Raises:
        BuildError, ToolchainError: as :func:`open_package` does.
    """
    package_library(package, mode, progress=progress)
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = mode
    try:
        module = folders.load(package)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InterpretedWarning)
            # Its kernels are opened now, while the variable is set.
            module._library.load("cpu")
        return module
    finally:
        os.environ.pop(VARIABLE)
        if before is not None:
            os.environ[VARIABLE] = before


def chosen_mode() -> str | None:
    """The mode that the environment asks for, None if it asks for no interpreter.

    Raises:
        ValueError: for a mode that cannot run inside a Python process, or that does not exist.
    """
    value = os.environ.get(VARIABLE, "")
    if value in ("", "0"):
        return None
    mode = "plain" if value == "1" else value
    possible = [name for name in MODES if name != "address"]
    if mode not in possible:
        raise ValueError(f"{VARIABLE}={value}: give 1, or one of {', '.join(possible)}")
    return mode


def open_package(folder: Path) -> Any:
    """The interpreted kernels of a package folder, compiled unless the cache has them.

    Returns:
        What ``_runtime.py`` uses of a ``ctypes.CDLL``: functions by their symbols, and
        ``convgen_error_string``.

    Raises:
        BuildError, ToolchainError: if it has no CUDA sources, or they do not compile.
        ValueError: for an unknown mode.
    """
    mode = chosen_mode() or "plain"
    warnings.warn(
        f"{folder.name}: {VARIABLE}={os.environ.get(VARIABLE, '')}, so the CUDA kernels are "
        f"interpreted on the CPU ({mode}: {MODES[mode].description})",
        InterpretedWarning,
        stacklevel=2,
    )
    try:
        described = documents.read(folder / "spec.json")
        spec = ConvSpec.from_dict(described["spec"])
    except (OSError, DocumentError, SpecError, KeyError, TypeError) as error:
        raise BuildError(f"{folder / 'spec.json'} cannot be read: {error}") from error
    return InterpretedLibrary(package_library(folder, mode), spec.geometry)


class InterpretedLibrary:
    """An interpreted library; its functions take a packed ConvgenCall, as the compiled ones do."""

    def __init__(self, path: Path, geometry: Geometry) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.convgen_interpret_register.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_char_p,
            ctypes.c_int,
        ]
        self._geometry = geometry
        self.convgen_error_string = self._library.convgen_error_string

    def __getitem__(self, symbol: str) -> Any:
        function = self._library[symbol]
        function.argtypes = [ctypes.c_char_p]
        if symbol.endswith(("_workspace", "_expected", "_takes_layout")):
            function.restype = ctypes.c_int64
            return _Function(lambda call: int(function(_on_device(call))))
        is_packed = symbol.endswith("_packed")  # by an earlier call, in the same workspace
        kernel = symbol.removesuffix("_packed")
        _, contraction, dtype, *_ = kernel.split("_")  # and a family
        workspace = self._library[f"{kernel}_workspace"]
        workspace.argtypes, workspace.restype = [ctypes.c_char_p], ctypes.c_int64

        def run(call: bytes) -> int:
            call = _on_device(call)
            # What a checked build may touch; the others do not care.
            sizes = self._sizes(contraction, dtype, call, int(workspace(call)))
            for name, size_bytes in sizes.items():
                address = CALL.unpack(call)[TENSORS.index(name)]
                if address and size_bytes:
                    access = _INPUT
                    if name in ("workspace", RESULTS[contraction]):
                        access = _INOUT if is_packed and name == "workspace" else _OUTPUT
                    self._library.convgen_interpret_register(
                        address, size_bytes, name.encode(), access
                    )
            flags, *beside = EPILOGUE.unpack(call[-EPILOGUE.size :])
            for name, bit, address, access in (
                ("residual", 2, beside[0], _INPUT),
                ("preactivation", 4, beside[1], _OUTPUT),
            ):
                if flags & bit:
                    self._library.convgen_interpret_register(
                        address, sizes[RESULTS[contraction]], name.encode(), access
                    )
            try:
                return int(function(call))
            finally:
                self._library.convgen_interpret_forget()

        return _Function(run)

    def _sizes(
        self, contraction: str, dtype: str, call: bytes, workspace_bytes: int
    ) -> dict[str, int]:
        """Bytes of each tensor of a call."""
        fields = CALL.unpack(call)
        batch, coarse, fine = fields[7:10]
        elements = {
            "coarse": batch * coarse * math.prod(fields[10:13]),
            "fine": batch * fine * math.prod(fields[13:16]),
            "weight": coarse * (fine // self._geometry.groups) * self._geometry.taps,
            "bias": fine if contraction == "dgrad" else coarse,
        }
        size = (DTYPES | MATH_MODES)[dtype].size_bytes
        return {name: n * size for name, n in elements.items()} | {"workspace": workspace_bytes}


class _Function:
    """A callable to which ``argtypes`` and ``restype`` can be assigned, as to a ctypes function."""

    argtypes: Any = None
    restype: Any = None

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, call: bytes) -> int:
        result: int = self._call(call)
        return result


def _on_device(call: bytes) -> bytes:
    """The call on device 0: for the CPU, the field holds a number of threads."""
    at = POINTERS.size
    return call[:at] + bytes(8) + call[at + 8 :]
