"""wgrad of stride 1, in 16 bits: ``templates/cuda/implicit_gemm/wgrad.cuh``.

Calls whose outputs are smaller than its tiles, or few, go to ``wgrad_taps.cuh``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from convgen.engines.cost import GEMM_TILE_CLOCKS, LAUNCH_CLOCKS, Gpu, Prediction, memory_ms
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.implicit_gemm.common import (
    ELEMENTS,
    NAME,
    SUFFIX,
    WGRAD_HEADERS,
    accepts,
    context_of,
)
from convgen.engines.implicit_gemm.wgrad_taps import clocks as tap_clocks
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Length, Range

LINES = (24, 16, 8)
CONSUMERS = 3
PRODUCT_TAPS = 3
WIDE, NARROW = 64, 32
"""Channels of a block, of either tensor."""
TAP_COLUMNS = (256,)
"""The sizes that are compiled of the kernel that multiplies a tap at a time, for small outputs."""


@dataclass(frozen=True)
class WgradSizes:
    """The sizes of tiles that are compiled, in groups of eight positions."""

    lines: Annotated[tuple[Annotated[int, Range(1, max(LINES))], ...], Length(1, 8)]


class Wgrad(Family[WgradSizes]):
    """See :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("wgrad",)
    kinds = tuple(kind for kind in ELEMENTS if ELEMENTS[kind] != "float")
    schedule_type = WgradSizes
    template = "cuda/implicit_gemm/wgrad.cu.j2"
    headers = WGRAD_HEADERS
    suffix = SUFFIX

    def accepts(self, problem: Problem) -> str:
        if reason := accepts(problem):
            return reason
        g = problem.geometry
        if max(g.stride) > 1:
            return f"neighbours in shared memory are {max(g.stride)} elements apart"
        if g.kernel[1] * g.kernel[2] == 1:
            return "the three consumers share the taps of a plane, and there is one"
        return ""

    def default(self, problem: Problem) -> WgradSizes:
        return WgradSizes(LINES)

    def candidates(self, problem: Problem) -> list[Candidate[WgradSizes]]:
        sizes = [LINES, *((lines,) for lines in LINES)]
        return [Candidate(WgradSizes(each), "") for each in sizes]

    def refusal(self, plan: Plan[WgradSizes], architectures: Iterable[str] = ()) -> str:
        lines = plan.schedule.lines
        if not lines or not set(lines) <= set(LINES) or len(set(lines)) < len(lines):
            return f"lines are one or more of {', '.join(map(str, LINES))}, each once"
        return ""

    def predict(self, plan: Plan[WgradSizes], call: Call, gpu: Gpu) -> Prediction:
        g = plan.geometry
        d, h, w = call.coarse_extent
        columns = min(g.kernel[2], PRODUCT_TAPS)
        tap_lines = g.kernel[1] * -(-g.kernel[2] // columns)
        groups = g.kernel[0] * -(-tap_lines // CONSUMERS) * g.groups
        coarse, fine = call.coarse_channels // g.groups, call.fine_channels // g.groups
        clocks = []
        for lines in plan.schedule.lines:
            for channels in (WIDE, NARROW):
                pairs = groups * -(-coarse // channels) * -(-fine // channels)
                tiles = (
                    call.batch
                    * d
                    * (-(-w // (8 * lines)) if h == 1 else -(-h // lines) * -(-w // 8))
                )
                products = lines // 2 * CONSUMERS * columns * channels // 2
                clocks.append(-(-pairs * tiles // gpu.multiprocessors) * products)
        halo = min(clocks) + GEMM_TILE_CLOCKS + 2 * LAUNCH_CLOCKS
        ms = min(halo, tap_clocks(plan.problem, TAP_COLUMNS, call, gpu)) / gpu.clocks_per_ms
        least = memory_ms(plan.problem, call, gpu)
        return Prediction(max(ms, least), "memory" if least > ms else "arithmetic")

    def context(self, plan: Plan[WgradSizes]) -> dict[str, Any]:
        return context_of(plan.problem) | {"tap_columns": TAP_COLUMNS}


WGRAD = Wgrad()
