"""What a schedule is expected to take: a model from counts of work, bytes and thread blocks.

The model needs no GPU. It picks defaults and prunes what ``convgen tune`` compiles; times are
right within a factor of about 1.5, orders of schedules of one layer better (``docs/performance.md``
has predictions beside measurements). All units are clocks of one multiprocessor until the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from convgen.engines import KernelPlan
from convgen.engines.gather import (
    Column,
    GatherSchedule,
    arrange,
    gather_axes,
    gather_context,
    runs_along_batch,
)
from convgen.spec import Geometry, Triple


@dataclass(frozen=True)
class Problem:
    """The extents of one call: what a geometry leaves open. Channels are those of all groups."""

    batch: int
    coarse_channels: int
    fine_channels: int
    coarse_extent: Triple
    fine_extent: Triple


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU. Bytes per clock are of one multiprocessor, all at work."""

    name: str
    multiprocessors: int
    ghz: float
    product_clocks: float
    """From one ``mma.sync`` (m16n8k8 in TF32, m16n8k16 in 16 bits) to the next."""
    fp64_warps: float
    """Warps' fp64 multiply-adds per clock; of fp32 there are four."""
    level2_bytes: float
    memory_bytes_per_s: float
    shared_bytes: int
    """Shared memory that a thread block may have."""
    grouped_product_clocks: float = 0.0
    """As ``product_clocks``, in products of four warps (``wgmma``); 0 where there are none."""


H200 = Gpu("NVIDIA H200", 132, 1.75, 1.5, 2.0, 28.0, 4.2e12, 227 << 10, 1.0)
GPUS: dict[int, Gpu] = {
    75: Gpu("NVIDIA T4", 40, 1.35, 4.0, 0.0625, 28.0, 3.0e11, 64 << 10),
    80: Gpu("NVIDIA A100", 108, 1.41, 2.0, 1.0, 28.0, 1.7e12, 163 << 10),
    86: Gpu("NVIDIA RTX A6000", 84, 1.75, 8.0, 0.0625, 24.0, 7.0e11, 99 << 10),
    89: Gpu("NVIDIA L40S", 142, 2.2, 4.0, 0.0625, 24.0, 8.0e11, 99 << 10),
    90: H200,
    100: Gpu("NVIDIA B200", 148, 1.85, 1.5, 2.0, 28.0, 7.0e12, 227 << 10),
    120: Gpu("NVIDIA RTX PRO 6000", 188, 2.3, 4.0, 0.0625, 24.0, 1.6e12, 99 << 10),
}
"""By compute capability times ten: one GPU of each, from its data sheet but for the H200, whose
rates are measured."""


STORED_BYTES, SPREAD_BYTES = 24.0, 12.0
"""Per clock: of outputs side by side, and of those with a stride of several phases."""


@dataclass(frozen=True)
class Prediction:
    """Expected time of one call, and what bounds it."""

    ms: float
    bound: str


@dataclass(frozen=True)
class Work:
    """Clocks of one step of all warps of a multiprocessor, by the unit that they occupy."""

    arithmetic: float
    shared: float
    issue: float
    level2: float
    staging: float

    def overlapped(self) -> tuple[float, str]:
        """Together: the longest, and a fifth of the others, which overlap incompletely."""
        parts = {
            "arithmetic": self.arithmetic,
            "shared memory": self.shared,
            "instructions": self.issue,
            "level 2": self.level2,
            "staging": self.staging,
        }
        bound = max(parts, key=lambda name: parts[name])
        return parts[bound] + 0.2 * (sum(parts.values()) - parts[bound]), bound


def typical_problems(geometry: Geometry) -> list[Problem]:
    """Calls to plan for where nothing but the geometry is known.

    64 coarse positions along each axis that has a kernel, and 32 or 48 channels of a group.
    """
    plain = zip(geometry.kernel, geometry.stride, strict=True)
    extent = [1 if k == 1 and s == 1 else 64 for k, s in plain]
    if math.prod(extent) == 1:
        extent = [64, 64, 64]
    fine_extent = [
        max(1, (e - 1) * s + d * (k - 1) + 1 - 2 * p)
        for e, s, d, k, p in zip(
            extent,
            geometry.stride,
            geometry.dilation,
            geometry.kernel,
            geometry.padding,
            strict=True,
        )
    ]
    batch = max(1, 64**3 // math.prod(extent))
    known = geometry.coarse_channels_per_group, geometry.fine_channels_per_group
    counts = dict.fromkeys((known[0] or count, known[1] or count) for count in (32, 48))
    return [
        Problem(
            batch,
            coarse * geometry.groups,
            fine * geometry.groups,
            _triple(extent),
            _triple(fine_extent),
        )
        for coarse, fine in counts
    ]


def memory_ms(geometry: Geometry, problem: Problem, element_bytes: int, gpu: Gpu) -> float:
    """The least time for a contraction's bytes: every tensor once."""
    p = problem
    elements = p.batch * (
        p.coarse_channels * math.prod(p.coarse_extent) + p.fine_channels * math.prod(p.fine_extent)
    )
    elements += p.coarse_channels * p.fine_channels // geometry.groups * geometry.taps
    return 1e3 * elements * element_bytes / gpu.memory_bytes_per_s


OVERRULES = 0.85
"""A call takes another cut or tile than a simple rule's if it is expected to take so much less (in
``simt/gather.cuh``: BestCut)."""

NARROW_ELEMENTS = (1.0, 7.0)
"""``Warp.narrow`` where lines are staged element by element."""
WARP_CLOCKS = 6.0
"""From one instruction of a warp to the next, as measured of those that stage."""


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
    """Words that the counts above are for, and what it takes to go on to the next ones."""
    staged_clocks: float
    narrow: tuple[float, float] = NARROW_ELEMENTS
    """What staging 32 words takes where lines of the input allow no wide access: times that they
    pass through shared memory, and instructions. Wide accesses take a quarter of 7 instructions."""
    staging_warps: int = 0
    """Warps of a thread block that only stage; 0 if all of them do beside their arithmetic."""


def gather_prediction(
    plan: KernelPlan,
    problem: Problem,
    gpu: Gpu,
    warp: Warp,
    *,
    element_bytes: int,
    word_bytes: int,
    neighbours: bool = False,
) -> Prediction:
    """Time of fprop or dgrad, whose thread blocks go on from tile to tile.

    ``element_bytes`` are those of the tensors, ``word_bytes`` those of a staged word. With
    ``neighbours`` lanes load two neighbouring elements at a time.
    """
    geometry, contraction, schedule = plan.geometry, plan.contraction, plan.schedule
    r, y, x = arrange(gather_axes(geometry, contraction))
    at = {axis: "dhw".index(axis.name) for axis in (r, y, x)}
    fprop = contraction == "fprop"
    if runs_along_batch(y):
        problem = _with_samples_along(problem, at[y])
    output_extent = problem.coarse_extent if fprop else problem.fine_extent
    input_extent = problem.fine_extent if fprop else problem.coarse_extent
    outputs = (problem.coarse_channels if fprop else problem.fine_channels) // geometry.groups
    positions = {axis: -(-output_extent[at[axis]] // len(axis.phases)) for axis in (r, y, x)}
    scattered = schedule.row_axis == "scattered"
    rows = schedule.rows

    plane = positions[y] * positions[x]
    tile = _tile(schedule, r.step, y.step, x.step, max(r.spans), max(y.spans), max(x.spans))
    # One pass: what its unrolled columns count.
    units = gather_context(geometry, contraction, schedule, neighbours)["units"]
    counts = [_count(unit.columns) for unit in units] or [_loop_count(schedule)]
    passes = 1 if schedule.window_r else sum(r.counts) / len(r.counts)
    passes *= 1 if schedule.window_y else sum(y.counts) / len(y.counts)
    passes *= max(x.counts) if schedule.unroll == "none" else 1
    phases = len(r.phases) * len(y.phases) * -(-len(x.phases) // schedule.variants)
    # Staging accesses have four words where lines of the input allow it; one of a warp is about
    # seven instructions.
    wide = x.step == 1 and input_extent[at[x]] * element_bytes % 16 == 0
    passages, instructions = (1.0, 7 / 4) if wide else warp.narrow
    channel_blocks = -(-outputs // warp.channels)

    def predict(blocks_c: int) -> Prediction:
        """With so many blocks of warps by channels."""
        warps_c = -(-channel_blocks // blocks_c)
        weights = max(taps for _, taps in counts) * warp.weight_bytes * warps_c * warp.staged_words

        def stage_bytes(warps_p: int) -> float:
            flat = warps_p * warp.lanes * (rows if scattered else 1)
            return tile(flat, positions[x]) * warp.staged_words * word_bytes + weights

        warps_p = max(1, warp.warps // warps_c)
        lane_rows = rows if scattered else 1
        while warps_p > 1 and (
            (warps_p - 1) * warp.lanes * lane_rows >= plane
            or 2 * stage_bytes(warps_p) > gpu.shared_bytes
        ):
            warps_p -= 1
        if 2 * stage_bytes(warps_p) > gpu.shared_bytes:
            return Prediction(math.inf, "shared memory")
        lanes, warps = warps_p * warp.lanes, warps_p * warps_c
        flat = lanes * lane_rows

        total, bound = 0.0, ""
        tiles = blocks_c * geometry.groups * problem.batch
        tiles *= -(-positions[r] // (1 if scattered else rows)) * -(-plane // flat)
        tile_outputs = lanes * rows * schedule.variants * warp.channels * warps_c
        stores = tile_outputs * element_bytes
        stores /= STORED_BYTES if len(x.phases) == 1 else SPREAD_BYTES
        for loads, taps in counts:
            staged = tile(flat, positions[x]) * warp.staged_words
            tile_bytes = staged * word_bytes
            weight_bytes = taps * warp.weight_bytes * warps_c * warp.staged_words
            wavefronts = warps * (loads * warp.load[0] + taps * warp.weight[0])
            issue = warps * (
                loads * warp.load[1] + taps * (warp.weight[1] + rows * warp.tap_instructions) + 20
            )
            # Shared memory takes 128 bytes a clock.
            work = Work(
                arithmetic=warps * taps * rows * warp.tap_clocks,
                shared=wavefronts + (passages * tile_bytes + weight_bytes) / 128,
                issue=(issue + instructions * staged / 32) / 4,
                level2=(tile_bytes + weight_bytes) / gpu.level2_bytes,
                staging=WARP_CLOCKS * instructions * staged / 32 / (warp.staging_warps or math.inf),
            )
            step, bound = work.overlapped()
            steps = -(-warp.words // warp.staged_words) * passes
            # Barriers and what they wait for; the first stage of a tile; its outputs.
            total += steps * (step + warp.staged_clocks) + 600 + stores
        waves = -(-tiles * phases // gpu.multiprocessors)
        return Prediction(waves * total / len(counts) / gpu.ghz * 1e-6, bound)

    # Fewest blocks of warps by channels, each of which reads the input; or more of them.
    least = -(-channel_blocks // 6)
    predictions = [
        predict(blocks_c)
        for blocks_c in dict.fromkeys(
            -(-channel_blocks // warps_c) for warps_c in range(-(-channel_blocks // least), 0, -1)
        )
    ]
    chosen = overrule(predictions[0], predictions[1:])
    floor = memory_ms(geometry, problem, element_bytes, gpu)
    return chosen if chosen.ms > floor else Prediction(floor, "memory")


def overrule(ruled: Prediction, others: Sequence[Prediction]) -> Prediction:
    """The rule's choice, unless another is expected to take less by the margin."""
    fastest = min(others, key=lambda other: other.ms, default=ruled)
    return fastest if fastest.ms < OVERRULES * ruled.ms else ruled


def _with_samples_along(problem: Problem, axis: int) -> Problem:
    """The problem whose samples lie along an axis, if its tensors have one position there."""
    if problem.coarse_extent[axis] != 1 or problem.fine_extent[axis] != 1:
        return problem

    def extended(extent: Triple) -> Triple:
        return _triple([problem.batch if i == axis else e for i, e in enumerate(extent)])

    return replace(
        problem,
        batch=1,
        coarse_extent=extended(problem.coarse_extent),
        fine_extent=extended(problem.fine_extent),
    )


def _count(columns: Sequence[Column]) -> tuple[int, int]:
    """Register rows loaded, and taps, of one pass."""
    loads = sum(column.used.bit_count() for column in columns)
    return loads, sum(len(column.uses) for column in columns)


def _loop_count(schedule: GatherSchedule) -> tuple[int, int]:
    """The same where taps are looped over: one of each phase at a time."""
    return schedule.rows * schedule.variants, schedule.variants


def _tile(
    schedule: GatherSchedule,
    step_r: int,
    step_y: int,
    step_x: int,
    span_r: int,
    span_y: int,
    span_x: int,
) -> Callable[[int, int], float]:
    """Words of a staged tile of one input word, for ``flat`` positions of lines of a length."""
    scattered = schedule.row_axis == "scattered"
    planes = 1 if scattered else schedule.rows
    if schedule.window_r:
        planes = (schedule.rows - 1) * step_r + span_r + 1
    lines_of = step_y if schedule.window_y else 1
    span_lines = span_y if schedule.window_y else 0

    def words(flat: int, length: int) -> float:
        best = math.inf
        for strips in range(1, max(2, length // 8 + 1)):
            wide = -(-length // strips)
            rows = 1 if wide % flat == 0 else (flat - 2) // wide + 2
            lines = (rows - 1) * lines_of + span_lines + 1
            columns = (wide - 1) * step_x + span_x + 4
            best = min(best, planes * lines * (columns + 8.0))
        return best

    return words


def _triple(values: Sequence[int]) -> Triple:
    d, h, w = values
    return d, h, w
