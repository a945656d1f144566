"""The rate at which a processor's vector units multiply and add, measured by a compiled loop.

A matrix product is no measure of it: the library behind torch's reaches half of it on some
processors.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import torch

from convgen.building.build import Library, build
from convgen.specialize import compile_commands

_SOURCE = Path(__file__).parents[1] / "templates/measuring/fma_peak.cpp"
_STEPS = 1 << 21
"""A few ms: no more than a time slice, so that a run may be undisturbed."""

_SECONDS = 1.0
"""Runs go on for so long: what disturbs a machine mostly ends sooner."""

_TYPES = {"f32": ctypes.c_float, "f64": ctypes.c_double}


def fma_peak(dtype: str) -> float:
    """Operations per second of ``"f32"`` or ``"f64"`` on torch's number of threads.

    The best of some hundred runs. An FMA is two operations.

    Raises:
        BuildError, ToolchainError: as :func:`convgen.building.build.build` does.
    """
    commands, _ = compile_commands("cpu", None)
    path = "src/fma_peak.cpp"
    library = Library("lib/fma_peak.so", (path,), commands)
    package = build("convgen_fma_peak", {path: _SOURCE.read_text()}, [library])
    function = getattr(ctypes.CDLL(str(package / library.path)), f"convgen_fma_{dtype}")
    real = _TYPES[dtype]
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.POINTER(real)]
    function.restype = ctypes.c_int64
    sink, best = real(), 0.0
    end = time.perf_counter() + _SECONDS
    while (start := time.perf_counter()) < end:
        operations = function(torch.get_num_threads(), _STEPS, ctypes.byref(sink))
        best = max(best, operations / (time.perf_counter() - start))
    return best
