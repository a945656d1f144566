"""The processor of this machine."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path

_VECTORS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_fp16", "asimd", "asimdhp", "bf16", "sve", "sve2"),
)
"""Sets of vector and matrix instructions under Linux's names, x86's and then Arm's."""


@cache
def vector_instructions() -> tuple[str, ...]:
    """This machine's sets of vector and matrix instructions, as Linux names them; empty elsewhere.

    What newer sets imply is left out: of AVX2's machine, SSE and AVX.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                found = set(line.split())
                implied = {"sse4_2", "avx"} if "avx2" in found else set()
                return tuple(name for name in _VECTORS if name in found - implied)
    return ()


@cache
def processor_name() -> str:
    """Name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform  # slow to import, and seldom needed

    return platform.processor() or platform.machine()
