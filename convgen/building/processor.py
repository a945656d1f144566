"""The processor of this machine."""

from __future__ import annotations

import contextlib
from functools import cache
from pathlib import Path


@cache
def processor_name() -> str:
    """Name of this machine's processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    import platform  # slow to import, and seldom needed

    return platform.processor() or platform.machine()
