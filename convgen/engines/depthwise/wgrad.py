"""wgrad of depthwise layers: how much a thread computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Range
from convgen.spec.dtypes import DTYPES
from convgen.spec.geometry import Triple

# Sums of a thread, in 32-bit registers; taps beyond go to other blocks.
REGISTERS = 64
# Positions along H of a step.
ROWS = 4


Count = Annotated[int, Range(1, REGISTERS)]


@dataclass(frozen=True)
class WgradTaps:
    """Taps of a thread (D, H, W), its positions along H, and its warps of columns.

    In channels_last its channels, its taps, and its positions along H and W at once.
    """

    taps: tuple[Count, Count, Count]
    rows: Count
    blocks_w: Count
    last_channels: Annotated[int, Range(1, LAST_CHANNELS)]
    last_taps: tuple[Count, Count, Count]
    last_rows: tuple[Count, Count]


class DepthwiseWgrad(Family[WgradTaps]):
    """wgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("wgrad",)
    kinds = DTYPES
    schedule_type = WgradTaps
    host = HOST
    template = "cuda/simt/depthwise.j2"
    headers: Mapping[str, str] = {
        **HEADERS,
        "depthwise_last_wgrad.cuh": "cuda/simt/depthwise_last_wgrad.cuh",
    }

    def accepts(self, problem: Problem) -> str:
        return refusal_of(problem.geometry, problem.geometry.channels_per_group)

    def default(self, problem: Problem) -> WgradTaps:
        kernel, width = problem.geometry.kernel, problem.accumulator_registers
        rows = ROWS if kernel[1] > 1 else 1
        last_channels = LAST_CHANNELS // width
        last_taps = _taps(kernel, LAST_SUMS // width // last_channels)
        return WgradTaps(
            _taps(kernel, REGISTERS // width),
            rows,
            BLOCKS_W if kernel[:2] == (1, 1) else 1,
            last_channels,
            last_taps,
            _last_rows(problem, last_channels, last_taps),
        )

    def candidates(self, problem: Problem) -> list[Candidate[WgradTaps]]:
        return [Candidate(self.default(problem), "")]

    def refusal(self, plan: Plan[WgradTaps], architectures: Iterable[str] = ()) -> str:
        return "" if plan.schedule == self.default(plan.problem) else "taps are not tuned"

    def serves(self, problem: Problem, call: Call) -> bool:
        channels = channels_of(problem, call)
        return min(channels) == 1 and max(channels) <= MOST_CHANNELS

    def predict(self, plan: Plan[WgradTaps], call: Call, gpu: Gpu) -> Prediction:
        return prediction(
            plan.problem,
            call,
            gpu,
            positions=math.prod(call.coarse_extent),
            lines=plan.geometry.taps,
            shared=plan.schedule.rows,
        )

    def context(self, plan: Plan[WgradTaps]) -> dict[str, Any]:
        schedule = plan.schedule
        kernel = plan.geometry.kernel
        return {
            "ratios": ratios_of(plan.geometry),
            "taps": schedule.taps,
            "parts": _parts(kernel, schedule.taps),
            "last_channels": schedule.last_channels,
            "last_taps": schedule.last_taps,
            "last_parts": _parts(kernel, schedule.last_taps),
            "last_rows": (1, *schedule.last_rows),
            "rows": schedule.rows,
            "blocks_w": schedule.blocks_w,
        }


def _taps(kernel: Triple, most: int) -> Triple:
    """Taps of a thread, at most so many: whole lines of them rather than whole planes."""
    taps = list(kernel)
    for axis in range(3):
        others = math.prod(taps) // taps[axis]
        if others * taps[axis] > most:
            fitting = max(1, most // others)
            taps[axis] = -(-kernel[axis] // -(-kernel[axis] // fitting))
    d, h, w = taps
    return d, h, w


def _parts(kernel: Triple, taps: Triple) -> int:
    return math.prod(-(-k // t) for k, t in zip(kernel, taps, strict=True))


def _last_rows(problem: Problem, channels: int, taps: Triple) -> tuple[int, int]:
    """Positions of a thread along H and W in channels_last: as many as registers hold."""
    stride, dilation = problem.geometry.stride[2], problem.geometry.dilation[2]
    width = channels * problem.accumulator_registers

    def fits(h: int, w: int) -> bool:
        columns = {at * stride + tap * dilation for at in range(w) for tap in range(taps[2])}
        return width * (math.prod(taps) + h * w + len(columns)) <= LAST_REGISTERS

    most_h = 2 if taps[1] > 1 else 1
    choices = [(h, w) for h in (1, 2) for w in (1, 2, 4, 8) if h <= most_h and fits(h, w)]
    return max(choices, key=lambda rows: (math.prod(rows), rows[0]), default=(1, 1))


WGRAD = DepthwiseWgrad()
