"""fprop and dgrad of depthwise layers: how much a thread computes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any

from convgen.engines.cost import Gpu, Prediction
from convgen.engines.depthwise.common import (
    BLOCKS_W,
    HEADERS,
    HOST,
    LAST_CHANNELS,
    LAST_REGISTERS,
    LAST_SUMS,
    MOST_CHANNELS,
    NAME,
    channels_of,
    prediction,
    ratios_of,
    refusal_of,
)
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.gather.axes import Axis
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Range
from convgen.spec.dtypes import DTYPES
from convgen.spec.geometry import Geometry, Triple

# Sums of a thread, in 32-bit registers, so that neighbouring outputs share what they read.
REGISTERS = 16
# Multiply-adds that a step unrolls, twice: for steps at the border, and others.
UNROLL_LIMIT = 1500
# Phases of a position, each with a sum: more would all be in local memory.
MOST_PHASES = 64


Count = Annotated[int, Range(1, REGISTERS)]
LastCount = Annotated[int, Range(1, LAST_SUMS)]


@dataclass(frozen=True)
class GatherRows:
    """Positions of a thread along D and H, and its warps of columns.

    In channels_last its channels, and its positions along D, H and W.
    """

    rows: tuple[Count, Count, Count]
    last: tuple[LastCount, LastCount, LastCount, LastCount]


class DepthwiseGather(Family[GatherRows]):
    """fprop and dgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("fprop", "dgrad")
    kinds = DTYPES
    schedule_type = GatherRows
    host = HOST
    template = "cuda/simt/depthwise.j2"
    headers = HEADERS

    def accepts(self, problem: Problem) -> str:
        geometry = problem.geometry
        coarse, fine = geometry.channels_per_group
        read = fine if problem.input == "fine" else coarse
        if not (refusal := refusal_of(geometry, (read,))) and geometry.taps > UNROLL_LIMIT:
            refusal = f"{geometry.taps} taps of a step; {UNROLL_LIMIT} are unrolled"
        if not refusal and (phases := _phases(problem)) > MOST_PHASES:
            refusal = f"{phases} phases of a step; {MOST_PHASES} are unrolled"
        return refusal

    def default(self, problem: Problem) -> GatherRows:
        budget = REGISTERS // problem.accumulator_registers
        return GatherRows(_rows(problem.geometry, _phases(problem), budget), _last_rows(problem))

    def candidates(self, problem: Problem) -> list[Candidate[GatherRows]]:
        return [Candidate(self.default(problem), "")]

    def refusal(self, plan: Plan[GatherRows], architectures: Iterable[str] = ()) -> str:
        return "" if plan.schedule == self.default(plan.problem) else "rows are not tuned"

    def serves(self, problem: Problem, call: Call) -> bool:
        coarse, fine = channels_of(problem, call)
        read, computed = (fine, coarse) if problem.input == "fine" else (coarse, fine)
        return read == 1 and computed <= MOST_CHANNELS

    def predict(self, plan: Plan[GatherRows], call: Call, gpu: Gpu) -> Prediction:
        problem = plan.problem
        return prediction(
            problem,
            call,
            gpu,
            positions=math.prod(call.extent(problem.output)),
            lines=plan.geometry.taps / _phases(problem),
            shared=math.prod(plan.schedule.rows[:2]),
        )

    def context(self, plan: Plan[GatherRows]) -> dict[str, Any]:
        axes = plan.problem.axes
        return {
            "rows": plan.schedule.rows,
            "last_channels": plan.schedule.last[0],
            "last_rows": plan.schedule.last[1:],
            "ratios": [max(pair) for pair in ratios_of(plan.geometry) if _reads_one(plan, pair)],
            "steps": [axis.step for axis in axes],
            "phases": [len(axis.phases) for axis in axes],
            "first": [axis.first_offset for axis in axes],
            "last": [_last(axis) for axis in axes],
            "counts": [axis.counts for axis in axes],
            "first_taps": [
                [p.taps[0].index if p.taps else 0 for p in axis.phases] for axis in axes
            ],
            "first_offsets": [
                [p.taps[0].offset if p.taps else axis.first_offset for p in axis.phases]
                for axis in axes
            ],
            "tap_steps": [_tap_step(axis) for axis in axes],
            "deltas": [axis.delta for axis in axes],
        }


def _phases(problem: Problem) -> int:
    return math.prod(len(axis.phases) for axis in problem.axes)


def _rows(geometry: Geometry, phases: int, budget: int) -> Triple:
    """Positions of a thread along D and H, and its warps of columns."""
    kd, kh, _ = geometry.kernel

    def fits(d: int, h: int, w: int) -> bool:
        return d * h * w * phases <= budget and d * h * w * geometry.taps <= UNROLL_LIMIT

    # Without a window along H or D, neighbours along these share nothing.
    most_d, most_h = (2 if kd > 1 else 1), (8 if kh > 1 else 1)
    most_w = BLOCKS_W if kd == kh == 1 else 1
    choices = [
        (d, h, w)
        for d in range(1, most_d + 1)
        for h in (1, 2, 4, 8)
        for w in (1, 2, 4)
        if h <= most_h and w <= most_w and fits(d, h, w)
    ]
    return max(choices, key=lambda rows: (math.prod(rows), rows[1]), default=(1, 1, 1))


def _reads_one(plan: Plan[GatherRows], pair: tuple[int, int]) -> bool:
    """Whether coarse and fine channels of a group are one that is read, and others."""
    return pair[plan.problem.input == "fine"] == 1


def _last_rows(problem: Problem) -> tuple[int, int, int, int]:
    """Channels of a thread in channels_last, and its positions along D, H and W.

    Those with which it loads least for each sum: columns of its window, and weights, which all
    positions along W share.
    """
    kernel, width, phases = problem.geometry.kernel, problem.accumulator_registers, _phases(problem)
    most_d, most_h = (2 if kernel[0] > 1 else 1), (4 if kernel[1] > 1 else 1)

    def window(axis: int, rows: int) -> int:
        step, phases = problem.axes[axis].step, problem.axes[axis].phases
        offsets = {tap.offset for phase in phases for tap in phase.taps}
        return len({row * step + offset for row in range(rows) for offset in offsets})

    def fits(channels: int, d: int, h: int, w: int) -> bool:
        sums = channels * width * d * h * w * phases
        columns = channels * width * window(2, w)
        return sums <= LAST_SUMS and sums + columns <= LAST_REGISTERS

    def loads(rows: tuple[int, int, int, int]) -> float:
        channels, d, h, w = rows
        columns = window(0, d) * window(1, h) * window(2, w) / (d * h * w)
        return (columns + problem.geometry.taps / w) / channels

    choices = [
        (channels, d, h, w)
        for channels in (LAST_CHANNELS // width, LAST_CHANNELS // width // 2, 1)
        for d in (1, 2)
        for h in (1, 2, 4)
        for w in (1, 2, 4, 8, 16)
        if channels > 0 and d <= most_d and h <= most_h and fits(channels, d, h, w)
    ]
    return min(choices, key=loads, default=(1, 1, 1, 1))


def _last(axis: Axis) -> int:
    """Greatest offset of all phases."""
    return max(first + span for first, span in zip(axis.first, axis.spans, strict=True))


def _tap_step(axis: Axis) -> int:
    """From tap to tap of a phase, in kernel elements."""
    steps = {p.taps[1].index - p.taps[0].index for p in axis.phases if len(p.taps) > 1}
    return steps.pop() if steps else 0


GATHER = DepthwiseGather()
