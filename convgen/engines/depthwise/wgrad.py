"""wgrad of depthwise layers: how much a thread computes."""

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
    MOST_CHANNELS,
    NAME,
    channels_of,
    prediction,
    refusal_of,
)
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Range
from convgen.spec.dtypes import DTYPES

# Sums of a thread, in 32-bit registers; taps beyond go to other blocks.
REGISTERS = 64
# Positions along H of a step.
ROWS = 4


Count = Annotated[int, Range(1, REGISTERS)]


@dataclass(frozen=True)
class WgradTaps:
    """Taps of a thread (D, H, W), its positions along H, and its warps of columns."""

    taps: tuple[Count, Count, Count]
    rows: Count
    blocks_w: Count


class DepthwiseWgrad(Family[WgradTaps]):
    """wgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("wgrad",)
    kinds = DTYPES
    schedule_type = WgradTaps
    host = HOST
    template = "cuda/simt/depthwise.j2"
    headers = HEADERS

    def accepts(self, problem: Problem) -> str:
        return refusal_of(problem.geometry, problem.geometry.channels_per_group)

    def default(self, problem: Problem) -> WgradTaps:
        kernel, width = problem.geometry.kernel, problem.accumulator_registers
        taps = list(kernel)
        # Whole lines of taps rather than whole planes.
        for axis in range(3):
            others = math.prod(taps) // taps[axis]
            if others * taps[axis] * width > REGISTERS:
                most = max(1, REGISTERS // width // others)
                taps[axis] = -(-kernel[axis] // -(-kernel[axis] // most))
        d, h, w = taps
        rows = ROWS if kernel[1] > 1 else 1
        return WgradTaps((d, h, w), rows, BLOCKS_W if kernel[:2] == (1, 1) else 1)

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
        parts = zip(plan.geometry.kernel, schedule.taps, strict=True)
        return {
            "taps": list(schedule.taps),
            "parts": math.prod(-(-k // t) for k, t in parts),
            "rows": schedule.rows,
            "blocks_w": schedule.blocks_w,
        }


WGRAD = DepthwiseWgrad()
