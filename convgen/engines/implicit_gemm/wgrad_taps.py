"""wgrad of strides, of kernels of one tap, and of patches.

See ``templates/cuda/implicit_gemm/wgrad_taps.cuh``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from convgen.engines.cost import (
    GEMM_TILE_CLOCKS,
    LAUNCH_CLOCKS,
    STORED_TAP_BYTES,
    Gpu,
    Prediction,
    memory_ms,
)
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.implicit_gemm.common import (
    BLOCK_M,
    ELEMENTS,
    NAME,
    ROW_BYTES,
    SUFFIX,
    WGRAD_TAPS_KINDS,
    WGRAD_TAPS_OR_QUARTERS_HEADERS,
    by_taps,
    context_of,
    has_patches,
    refuses_taps,
)
from convgen.engines.implicit_gemm.wgrad_quarters import WGRAD_QUARTERS
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Length, Range

COLUMNS = (256, 128, 64)
CHUNK_COLUMNS = 64
"""Of one tap."""
ROWS = 2 * BLOCK_M
"""Coarse channels of a thread block."""


@dataclass(frozen=True)
class TapWgradSizes:
    """The sizes of tiles that are compiled, in fine channels of all their taps."""

    columns: Annotated[tuple[Annotated[int, Range(1, max(COLUMNS))], ...], Length(1, 8)]


class TapWgrad(Family[TapWgradSizes]):
    """See :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("wgrad",)
    kinds = WGRAD_TAPS_KINDS
    schedule_type = TapWgradSizes
    template = "cuda/implicit_gemm/wgrad_taps.cu.j2"
    headers = WGRAD_TAPS_OR_QUARTERS_HEADERS
    suffix = SUFFIX

    def accepts(self, problem: Problem) -> str:
        g = problem.geometry
        if not by_taps(g):
            return "neighbouring taps share what is loaded"
        if has_patches(problem):
            return ""
        if ELEMENTS[problem.kind] == "float" and g.taps > 1:
            return "quarters load what several taps of TF32 read once"
        return refuses_taps(problem)

    def default(self, problem: Problem) -> TapWgradSizes:
        return TapWgradSizes(COLUMNS)

    def candidates(self, problem: Problem) -> list[Candidate[TapWgradSizes]]:
        sizes = [COLUMNS, *((columns,) for columns in COLUMNS)]
        return [Candidate(TapWgradSizes(each), "") for each in sizes]

    def refusal(self, plan: Plan[TapWgradSizes], architectures: Iterable[str] = ()) -> str:
        columns = plan.schedule.columns
        if not columns or not set(columns) <= set(COLUMNS) or len(set(columns)) < len(columns):
            return f"columns are one or more of {', '.join(map(str, COLUMNS))}, each once"
        return ""

    def predict(self, plan: Plan[TapWgradSizes], call: Call, gpu: Gpu) -> Prediction:
        ms = clocks(plan.problem, plan.schedule.columns, call, gpu) / gpu.clocks_per_ms
        least = memory_ms(plan.problem, call, gpu)
        return Prediction(max(ms, least), "memory" if least > ms else "arithmetic")

    def context(self, plan: Plan[TapWgradSizes]) -> dict[str, Any]:
        quarters: tuple[int, ...] = ()
        if ELEMENTS[plan.kind] == "float" and has_patches(plan.problem):
            quarters = WGRAD_QUARTERS.lines(plan.problem)
        return context_of(plan.problem) | {"quarters": quarters}


def clocks(problem: Problem, sizes: Iterable[int], call: Call, gpu: Gpu) -> float:
    """What a call is expected to take with the best of some sizes, nothing packed."""
    g = problem.geometry
    coarse, fine = call.coarse_channels // g.groups, call.fine_channels // g.groups
    block = ROW_BYTES // problem.element_bytes
    blocks = -(-call.batch * math.prod(call.coarse_extent) // block)
    best = math.inf
    for columns in sizes:
        chunks = g.taps * -(-fine // CHUNK_COLUMNS)
        pairs = g.groups * -(-coarse // ROWS) * -(-chunks * CHUNK_COLUMNS // columns)
        loads = (ROWS + columns) * ROW_BYTES / gpu.bulk_bytes
        each = max(4.0 * columns, loads)
        waves = -(-pairs // gpu.multiprocessors)
        store = ROWS * columns * problem.element_bytes / STORED_TAP_BYTES
        dealt = -(-pairs * blocks // gpu.multiprocessors) * each + LAUNCH_CLOCKS
        best = min(best, dealt, waves * (blocks * each + store))
    return best + GEMM_TILE_CLOCKS + LAUNCH_CLOCKS


WGRAD_TAPS = TapWgrad()
