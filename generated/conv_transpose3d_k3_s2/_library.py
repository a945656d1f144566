"""The shared libraries of the package: finding, checking and loading them.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from zlib import crc32

COMMAND = "convgen generate --kernel 3 --stride 2"

INTERPRETED = os.environ.get("CONVGEN_INTERPRET", "") not in ("", "0")
"""Whether the CUDA kernels serve the CPU's tensors, interpreted: to debug them, not to use them."""

VARIANT = f"_interpreted_{crc32((__name__ + __file__).encode()):08x}" if INTERPRETED else ""
"""Marks the operators of interpreted kernels: no other copy shares them, sources may be edited."""

FOLDERS = [Path(__file__).parent]
"""Folders with a copy of this package: kernels are loaded from the first whose library loads."""

_libraries: dict[str, ctypes.CDLL] = {}


def load(backend: str) -> ctypes.CDLL:
    """The library of a device type, loaded at the first call.

    Raises:
        RuntimeError: where no copy of the package has one that can be loaded.
    """
    if backend in _libraries:
        return _libraries[backend]
    if INTERPRETED and backend == "cpu":
        # Compiles src/cuda as it is on disk, with convgen's interpreter.
        from convgen.checking.interpreted import open_package

        _libraries[backend] = open_package(FOLDERS[0])
        _libraries[backend].convgen_error_string.restype = ctypes.c_char_p
        return _libraries[backend]
    file = f"lib/{backend}.so"
    refused = []
    for folder in FOLDERS:
        path = folder / file
        try:
            if not path.is_file():
                continue
            _check_digest(path)
            library = ctypes.CDLL(str(path))
            library.convgen_error_string.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            # Another copy of the package may have a library that serves.
            refused.append(f"{path} cannot be loaded ({error})")
            continue
        _libraries[backend] = library
        return library
    raise RuntimeError(
        f"{'; '.join(refused) or file}: it was compiled for another kind of machine, or is "
        f"damaged; run `{COMMAND} --backend auto`"
    )


def _check_digest(path: Path) -> None:
    """Raises OSError unless a library is what was linked: one cut short would end the process.

    Its SHA-256 is in a file beside it, which build.ninja writes as sha256sum does.
    """
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.is_file():
        raise OSError(f"{beside.name} is missing beside it")
    with path.open("rb") as library, beside.open("rb") as file:
        digest = hashlib.sha256()
        while block := library.read(1 << 20):
            digest.update(block)
        if file.read(64) != digest.hexdigest().encode():
            raise OSError(f"its {path.stat().st_size} bytes are not those that were linked")
