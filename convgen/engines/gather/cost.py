"""What a gather is expected to take: see :mod:`convgen.engines.cost`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from convgen.engines.cost import (
    GATHER_STEP_CLOCKS,
    GATHER_TILE_CLOCKS,
    SPREAD_BYTES,
    STORED_BYTES,
    WARP_CLOCKS,
    Gpu,
    Prediction,
    Work,
    memory_ms,
    overrule,
)
from convgen.engines.gather.axes import AXES, runs_along_batch
from convgen.engines.gather.schedule import GatherSchedule
from convgen.engines.gather.unroll import Column, gather_context
from convgen.engines.problem import Call, Problem
from convgen.spec.geometry import Triple

NARROW_ELEMENTS = (1.0, 7.0)
"""``Warp.narrow`` where lines are staged element by element."""


@dataclass(frozen=True)
class Warp:
    """What one warp of a gather engine is: ``lanes`` positions by ``channels`` output channels.

    ``warps`` of them multiply in a thread block. Counts are per warp and ``staged_words`` words of
    input channels: ``load`` has the wavefronts and instructions of one register row, ``weight``
    those of a tap; ``tap_clocks`` of arithmetic, and ``tap_instructions``, are per tap and row.
    """

    lanes: int
    channels: int
    warps: int
    load: tuple[float, float]
    weight: tuple[float, float]
    tap_clocks: float
    tap_instructions: float
    words: int
    """Staged words of one group's input channels."""
    weight_bytes: int
    """Packed weights of one tap, word and warp of channels."""
    staged_words: int
    """Words that the counts above are for: those of a step."""
    narrow: tuple[float, float] = NARROW_ELEMENTS
    """What staging 32 words takes where lines of the input allow no wide access: times that they
    pass through shared memory, and instructions. Wide accesses take a quarter of 7 instructions."""
    producer_warps: int = 0
    """Warps of a thread block that only stage; 0 if all of them do beside their arithmetic."""
    most_c: int = 6
    """Warps of a thread block with different output channels, at most."""
    together: int = 1
    """Warps that multiply together, with the same output channels: ``warps`` and ``most_c`` count
    such groups, ``lanes`` are those of all."""


def gather_prediction(
    problem: Problem,
    schedule: GatherSchedule,
    call: Call,
    gpu: Gpu,
    warp: Warp,
    *,
    word_bytes: int,
    neighbours: bool = False,
    brief: bool = False,
) -> Prediction:
    """Time of fprop or dgrad, whose thread blocks go on from tile to tile.

    ``word_bytes`` are those of a staged word. With ``neighbours`` lanes load two neighbouring
    elements at a time. ``brief`` counts what the host does when it chooses tiles of a call,
    products and copies alone (``expected_clocks`` in ``cuda/simt/gather_tiling.cuh``).
    """
    groups, element_bytes = problem.geometry.groups, problem.element_bytes
    r, y, x = problem.arranged
    at_r, at_y, at_x = (AXES.index(axis.name) for axis in (r, y, x))
    if runs_along_batch(y):
        call = _with_samples_along(call, at_y)
    output_extent, input_extent = call.extent(problem.output), call.extent(problem.input)
    outputs = call.channels(problem.output) // groups
    positions_r, positions_y, positions_x = (
        -(-output_extent[at] // len(axis.phases)) for axis, at in ((r, at_r), (y, at_y), (x, at_x))
    )
    scattered = schedule.row_axis == "scattered"
    rows = schedule.rows

    plane = positions_y * positions_x
    tile = _tile(schedule, r.step, y.step, x.step, max(r.spans), max(y.spans), max(x.spans))
    # One pass: what its unrolled columns count.
    counts = _counts(problem, schedule, neighbours)
    passes = 1 if schedule.window_r else sum(r.counts) / len(r.counts)
    passes *= 1 if schedule.window_y else sum(y.counts) / len(y.counts)
    passes *= max(x.counts) if schedule.unroll == "none" else 1
    phases = len(r.phases) * len(y.phases) * -(-len(x.phases) // schedule.variants)
    # Staging accesses have four words where lines of the input allow it; one of a warp is about
    # seven instructions.
    wide = x.step == 1 and input_extent[at_x] * element_bytes % 16 == 0
    passages, instructions = (1.0, 7 / 4) if wide else warp.narrow
    channel_blocks = -(-outputs // warp.channels)

    def predict(blocks_c: int) -> Prediction:
        """With so many blocks of warps by channels."""
        warps_c = -(-channel_blocks // blocks_c)
        weights = max(taps for _, taps in counts) * warp.weight_bytes * warps_c * warp.staged_words

        def stage_bytes(warps_p: int) -> float:
            flat = warps_p * warp.lanes * (rows if scattered else 1)
            return tile(flat, positions_y, positions_x) * warp.staged_words * word_bytes + weights

        warps_p = max(1, warp.warps // warps_c)
        lane_rows = rows if scattered else 1
        while warps_p > 1 and (
            (warps_p - 1) * warp.lanes * lane_rows >= plane
            or 2 * stage_bytes(warps_p) > gpu.shared_bytes
        ):
            warps_p -= 1
        if 2 * stage_bytes(warps_p) > gpu.shared_bytes:
            return Prediction(math.inf, "shared memory")
        lanes, all_warps = warps_p * warp.lanes, warps_p * warps_c * warp.together
        flat = lanes * lane_rows

        total, bound = 0.0, ""
        tiles = blocks_c * groups * call.batch
        tiles *= -(-positions_r // (1 if scattered else rows)) * -(-plane // flat)
        tile_outputs = lanes * rows * schedule.variants * warp.channels * warps_c
        stores: float = tile_outputs * element_bytes
        stores /= STORED_BYTES if len(x.phases) == 1 else SPREAD_BYTES
        for loads, taps in counts:
            staged = tile(flat, positions_y, positions_x) * warp.staged_words
            tile_bytes = staged * word_bytes
            weight_bytes = taps * warp.weight_bytes * warps_c * warp.staged_words
            wavefronts = all_warps * (loads * warp.load[0] + taps * warp.weight[0])
            issue = all_warps * (
                loads * warp.load[1] + taps * (warp.weight[1] + rows * warp.tap_instructions) + 20
            )
            # Shared memory takes 128 bytes a clock.
            work = Work(
                arithmetic=all_warps * taps * rows * warp.tap_clocks,
                shared=wavefronts + (passages * tile_bytes + weight_bytes) / 128,
                issue=(issue + instructions * staged / 32) / 4,
                level2=(tile_bytes + weight_bytes) / gpu.level2_bytes,
                staging=WARP_CLOCKS
                * instructions
                * staged
                / 32
                / (warp.producer_warps or math.inf),
            )
            if brief:
                work = Work(work.arithmetic, 0, 0, work.level2, 0)
            step, bound = work.overlapped()
            steps = -(-warp.words // warp.staged_words) * passes
            # Barriers and what they wait for; the first stage of a tile; its outputs.
            total += steps * (step + GATHER_STEP_CLOCKS) + GATHER_TILE_CLOCKS + stores
        waves = -(-tiles * phases // gpu.multiprocessors)
        return Prediction(waves * total / len(counts) / gpu.ghz * 1e-6, bound)

    # Fewest blocks of warps by channels, each of which reads the input; or more of them.
    least = -(-channel_blocks // warp.most_c)
    predictions = [
        predict(blocks_c)
        for blocks_c in dict.fromkeys(
            -(-channel_blocks // warps_c) for warps_c in range(-(-channel_blocks // least), 0, -1)
        )
    ]
    chosen = overrule(predictions[0], predictions[1:])
    floor = memory_ms(problem, call, gpu)
    return chosen if chosen.ms > floor else Prediction(floor, "memory")


def _with_samples_along(call: Call, axis: int) -> Call:
    """The call whose samples lie along an axis, if its tensors have one position there."""
    if call.coarse_extent[axis] != 1 or call.fine_extent[axis] != 1:
        return call

    def extended(extent: Triple) -> Triple:
        d, h, w = (call.batch if i == axis else e for i, e in enumerate(extent))
        return d, h, w

    return replace(
        call,
        batch=1,
        coarse_extent=extended(call.coarse_extent),
        fine_extent=extended(call.fine_extent),
    )


@lru_cache(maxsize=1024)
def _counts(
    problem: Problem, schedule: GatherSchedule, neighbours: bool
) -> tuple[tuple[int, int], ...]:
    """Register rows loaded, and taps, of each kind of pass."""
    if schedule.unroll == "none":  # taps are looped over: one of each phase at a time
        return ((schedule.rows * schedule.variants, schedule.variants),)
    return tuple(
        _count(unit.columns) for unit in gather_context(problem, schedule, neighbours)["units"]
    )


def _count(columns: Sequence[Column]) -> tuple[int, int]:
    """Register rows loaded, and taps, of one pass."""
    loads = sum(column.used.bit_count() for column in columns)
    return loads, sum(len(column.uses) for column in columns)


def _tile(
    schedule: GatherSchedule,
    step_r: int,
    step_y: int,
    step_x: int,
    span_r: int,
    span_y: int,
    span_x: int,
) -> Callable[[int, int, int], float]:
    """Words of a staged tile of one input word: ``flat`` positions of some lines of a length."""
    scattered = schedule.row_axis == "scattered"
    planes = 1 if scattered else schedule.rows
    if schedule.window_r:
        planes = (schedule.rows - 1) * step_r + span_r + 1
    lines_of = step_y if schedule.window_y else 1
    span_lines = span_y if schedule.window_y else 0

    def words(flat: int, most_rows: int, length: int) -> float:
        best = math.inf
        most, strips = -(-length // 8), 1
        while strips <= most:
            wide = -(-length // strips)
            # All that cut lines as wide are alike: of a long line, most numbers of strips.
            strips = -(-length // (wide - 1)) if wide > 1 else most + 1
            rows = 1 if wide % flat == 0 else (flat - 2) // wide + 2
            lines = (min(rows, most_rows) - 1) * lines_of + span_lines + 1
            columns = (wide - 1) * step_x + span_x + 4
            best = min(best, planes * lines * (columns + 8.0))
        return best

    return words
