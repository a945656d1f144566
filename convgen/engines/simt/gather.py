"""fprop and dgrad by plain arithmetic: one gather (``templates/cuda/simt/gather.cuh``)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

from convgen.engines.cost import FP32_WARPS, Gpu, Prediction
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.gather.cost import Warp, gather_prediction
from convgen.engines.gather.schedule import (
    STYLES,
    GatherSchedule,
    gather_refusal,
    loops_over_taps,
    row_axis_of,
    variants_of,
)
from convgen.engines.gather.unroll import gather_context
from convgen.engines.problem import Call, Problem
from convgen.engines.simt.common import (
    CHANNELS_PER_THREAD,
    HEADERS,
    NAME,
    best_block,
    channel_blocks,
    channel_choices,
    channels_refusal,
    may_be_pointwise,
    types_of,
)
from convgen.spec.dtypes import DTYPES

# Accumulators per thread, in 32-bit registers: with the column and the weights beside them a
# thread stays under the 168 registers that blocks of 384 threads leave it.
ACCUMULATOR_REGISTERS = 64
# More register rows only lengthen the loads; fewer share each weight among too few.
ROWS = (1, 2, 4, 8)
# Multiply-adds of a fully unrolled input channel, over all phases. 5000 are 80 KiB of machine code:
# beyond, the instruction cache (128 KiB) and nvcc's patience end.
UNROLL_LIMIT = 5000
# A column of register rows, in 32-bit registers.
MAX_COLUMN_REGISTERS = 24
# The smallest staged tile of one input channel must leave room for two stages in the 48 KiB that
# every GPU since sm_75 has.
TILE_LIMIT_BYTES = 20 * 1024


def _refusal(problem: Problem, schedule: GatherSchedule) -> str:
    """Why a gather cannot have a schedule; empty if it can."""
    width = problem.accumulator_registers
    r, y, x = problem.arranged
    style, rows = schedule.unroll, schedule.rows
    if refusal := gather_refusal(problem, schedule):
        return refusal
    if rows not in ROWS:
        return f"a thread has {', '.join(map(str, ROWS))} register rows"
    if refusal := channels_refusal(schedule.channels, problem):
        return refusal
    sums = rows * schedule.variants * max(schedule.channels)
    least = schedule.variants * max(schedule.channels)
    if sums * width > ACCUMULATOR_REGISTERS and sums > least:
        return f"{sums * width} registers of sums; {ACCUMULATOR_REGISTERS} leave room for operands"
    if style in ("line", "none"):
        return ""
    taps_r = sum(r.counts) if schedule.window_r else 1
    taps_y, span_y = (sum(y.counts), max(y.spans)) if schedule.window_y else (1, 0)
    code = taps_r * taps_y * sum(x.counts) * rows * max(schedule.channels)
    if code > UNROLL_LIMIT:
        return f"{code} multiply-adds of an unrolled pass do not fit in the instruction cache"
    planes = schedule.planes(r)
    if planes * width > MAX_COLUMN_REGISTERS:
        return f"a column takes {planes * width} registers of at most {MAX_COLUMN_REGISTERS}"
    # 32 lanes in a strip 8 wide: five lines.
    lines = 4 * (y.step if schedule.window_y else 1) + span_y + 1
    columns = 7 * x.step + max(x.spans) + 1
    tile = planes * lines * columns * 4 * width
    if tile > TILE_LIMIT_BYTES:
        return f"the least tile takes {tile} bytes of at most {TILE_LIMIT_BYTES}"
    return ""


def _default(problem: Problem) -> GatherSchedule:
    """The largest pass that fits."""
    width = problem.accumulator_registers
    _, _, x = problem.arranged
    budget = ACCUMULATOR_REGISTERS // width
    variants = variants_of(problem)
    most = CHANNELS_PER_THREAD // width
    rows = max(1, min(max(ROWS), budget // (most * variants)))
    rows = 1 << (rows.bit_length() - 1)
    channels = channel_blocks(problem.output_channels, problem.geometry.groups, most)
    row_axis = row_axis_of(problem)
    if loops_over_taps(x):
        return GatherSchedule("none", row_axis, rows, variants, channels)
    for style in ("taps", "plane"):
        schedule = GatherSchedule(style, row_axis, rows, variants, channels)
        if not _refusal(problem, schedule):
            return schedule
    return GatherSchedule("line", row_axis, rows, variants, channels)


class SimtGather(Family[GatherSchedule]):
    """fprop and dgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("fprop", "dgrad")
    kinds = DTYPES
    schedule_type = GatherSchedule
    template = "cuda/simt/gather.cu.j2"
    headers = HEADERS

    def default(self, problem: Problem) -> GatherSchedule:
        return _default(problem)

    def candidates(self, problem: Problem) -> list[Candidate[GatherSchedule]]:
        default = _default(problem)
        schedules = [
            replace(default, unroll=style, rows=rows, channels=channels)
            for style, rows, channels in product(
                STYLES, ROWS, channel_choices(default.channels, problem)
            )
        ]
        return [
            Candidate(schedule, _refusal(problem, schedule))
            for schedule in dict.fromkeys([default, *schedules])
        ]

    def refusal(self, plan: Plan[GatherSchedule], architectures: Iterable[str] = ()) -> str:
        return _refusal(plan.problem, plan.schedule)

    def predict(self, plan: Plan[GatherSchedule], call: Call, gpu: Gpu) -> Prediction:
        problem, schedule = plan.problem, plan.schedule
        width, groups = problem.accumulator_registers, problem.geometry.groups
        channels = best_block(schedule.channels, call.channels(problem.output) // groups)
        warp = Warp(
            lanes=32,
            channels=channels,
            warps=12,
            load=(width, 1),
            # Rows of weights are read four words at a time, by all lanes alike.
            weight=(-(-channels * width // 4), -(-channels * width // 4)),
            tap_clocks=channels / (FP32_WARPS if width == 1 else gpu.fp64_warps),
            tap_instructions=channels,
            words=call.channels(problem.input) // groups,
            weight_bytes=4 * width * channels,
            staged_words=1,
        )
        return gather_prediction(problem, schedule, call, gpu, warp, word_bytes=4 * width)

    def context(self, plan: Plan[GatherSchedule]) -> dict[str, Any]:
        pointwise = {"pointwise": may_be_pointwise(plan.geometry)}
        return types_of(plan.problem) | gather_context(plan.problem, plan.schedule) | pointwise


GATHER = SimtGather()
