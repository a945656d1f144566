"""The CPU's families: C++17, OpenMP, explicit SIMD through the compiler's vector types.

fprop and dgrad are one algorithm over different axes, wgrad is another. Each has several kernels,
of which the unit chooses when it is called: for few channels, whose schedules are here
(``gather.h``, ``reduce.h``), for many (``brgemm_gather.h``, ``brgemm_panels.h``,
``brgemm_wgrad.h``, ``brgemm_swapped.h``), and for depthwise calls (``depthwise_gather.h``,
``depthwise_blocks.h``, ``depthwise_wgrad.h``). The templates give them the geometry's constants
and the unrolled taps. Sources hold no assumption about the host's instruction set: it is known when
they are compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise, product
from math import prod
from typing import Annotated, Any

from convgen.engines.cost import Gpu, Prediction
from convgen.engines.family import Candidate, Family, Plan
from convgen.engines.problem import Call, Problem
from convgen.spec.documents import Length, OneOf, Range
from convgen.spec.dtypes import DTYPES
from convgen.spec.geometry import Geometry
from convgen.spec.taps import Phase, Tap, dgrad_phases, gather_taps

AXES = ("D", "H", "W")

REAL = {"f32": "float", "f64": "double"}
STORAGE = {"f32": "float", "f64": "double", "f16": "Half", "bf16": "BFloat16"}

MAX_UNROLLED_TAPS = 64
"""Taps unrolled in one unit. A tap of the two unrolled register tiles is about 50 instructions or
350 bytes: 64 of them fit in an instruction cache of 32 KB, and compile in three seconds."""

MAX_UNROLLED_PHASES = 16
"""Phases with code of their own, each compiled for every register tile."""

MAX_INNER_TAPS = 32
"""Taps along w that are still unrolled where the whole kernel is too large."""

CORE_GHZ, CORES, MEMORY_BYTES_PER_S = 3.0, 2, 3.5e10
"""Of the processor that predictions are for; only their order counts."""

Tiles = Annotated[
    tuple[tuple[Annotated[int, Range(1, 16)], Annotated[int, Range(1, 32)]], ...], Length(1, 8)
]
Bytes = Annotated[int, Range(4 << 10, 4 << 20)]
"""Of what a cache is to hold."""

Unroll = Annotated[str, OneOf(("full", "inner", "none"))]

TUNED = ("tiles", "scratch_bytes", "buffer_bytes", "coarse_tile_bytes")
"""Fields of which a schedule may have other values than the default."""


@dataclass(frozen=True)
class GatherSchedule:
    """How fprop and dgrad are cut up."""

    unroll: Unroll
    """``full``: every tap of every phase; ``inner``: those along w; ``none``: a loop over taps."""
    tiles: Tiles
    """Register tiles, (output channels, vectors of positions), where there are 32 registers."""
    tiles_of_16: Tiles
    """The same where there are 16."""
    scratch_bytes: Bytes = 512 << 10
    """Source block of a task: half of L2, beside packed weights."""
    buffer_bytes: Bytes = 32 << 10
    """Row buffer: about L1, so that interleaving reads what was just written."""
    chain_terms: int = 128
    """Products per chain of additions, at most but for whole channels: what a sum of one sign loses
    grows with its length. What taps are unrolled together is not cut."""


@dataclass(frozen=True)
class ReduceSchedule:
    """How wgrad is cut up."""

    unroll: Unroll
    """``full``: all columns (taps) are listed; ``none``: a loop over them."""
    tiles: Tiles
    """Register tiles, (coarse channels, columns), where there are 32 registers."""
    tiles_of_16: Tiles
    """The same where there are 16."""
    fine_block: int
    """Fine channels whose columns are computed together: several for 1x1x1 kernels, whose only
    column would leave a register tile with too few sums."""
    coarse_tile_bytes: Bytes = 20 << 10
    """Coarse positions of a register tile: most of L1, kept there while the columns change."""
    coarse_bytes: int = 384 << 10
    """Coarse blocks of a task: a third of L2, beside fine blocks and sums."""
    fine_bytes: int = 192 << 10
    """Fine block: read from L2, once for each block of coarse channels."""
    sums_bytes: int = 256 << 10
    """One vector per weight of one fine channel: loaded and stored once per block, from L2."""
    partial_bytes: int = 64 << 20
    """Partial weights of all ranges in the workspace."""
    chain_terms: int = 320
    """Products of a lane that are added up one after the other: those of a block of one channel."""
    range_positions: int = 2048
    """Positions per range at least: adding up the lanes costs less than a tenth of them."""
    task_terms: int = 1 << 22
    """Multiply-adds that a task should have: about 0.1 ms."""


@dataclass(frozen=True)
class Axis:
    """An axis as the templates see it: its taps by phase."""

    name: str
    source_stride: str
    phases: str
    by_phase: tuple[Phase, ...]

    @property
    def tap_table(self) -> str:
        taps = [tap for phase in self.by_phase for tap in phase.taps]
        return _table(f"{{{tap.index}, {tap.offset}}}" for tap in taps)

    @property
    def first_table(self) -> str:
        first = [0]
        for phase in self.by_phase:
            first.append(first[-1] + len(phase.taps))
        return _table(map(str, first))


@dataclass(frozen=True)
class UnrolledPhase:
    """A struct that unrolls the taps of a phase; with ``loop``, those of one pass of a loop."""

    name: str
    index: int
    comment: str
    taps: tuple[str, ...]
    loop: bool


@dataclass(frozen=True)
class ColumnPart:
    """Columns of one register tile of wgrad."""

    first: int
    count: int
    comment: str


NAME = "cpu"

HEADERS: Mapping[str, str] = {
    "convgen_abi.h": "common/convgen_abi.h",
    "runtime.h": "cpu/runtime.h",
    "simd.h": "cpu/simd.h",
    "scratch.h": "cpu/scratch.h",
    "chains.h": "cpu/chains.h",
    "epilogue.h": "cpu/epilogue.h",
    "elementwise.h": "cpu/elementwise.h",
    "activations.h": "common/activations.h",
    "gather.h": "cpu/gather.h",
    "phases.h": "cpu/phases.h",
    "layout.h": "cpu/layout.h",
    "contiguous.h": "cpu/contiguous.h",
    "lines.h": "cpu/lines.h",
    "brgemm.h": "cpu/brgemm.h",
    "brgemm_panels.h": "cpu/brgemm_panels.h",
    "brgemm_gather.h": "cpu/brgemm_gather.h",
    "brgemm_wgrad.h": "cpu/brgemm_wgrad.h",
    "brgemm_swapped.h": "cpu/brgemm_swapped.h",
    "depthwise.h": "cpu/depthwise.h",
    "depthwise_tile.h": "cpu/depthwise_tile.h",
    "depthwise_gather.h": "cpu/depthwise_gather.h",
    "depthwise_blocks.h": "cpu/depthwise_blocks.h",
    "depthwise_wgrad.h": "cpu/depthwise_wgrad.h",
    "bias.h": "cpu/bias.h",
    "meeting.h": "cpu/meeting.h",
    "reduce.h": "cpu/reduce.h",
}


class CpuGather(Family[GatherSchedule]):
    """fprop and dgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cpu"
    contractions = ("fprop", "dgrad")
    kinds = DTYPES
    schedule_type = GatherSchedule
    template = "cpu/{contraction}.cpp.j2"
    headers = HEADERS

    def default(self, problem: Problem) -> GatherSchedule:
        outputs = problem.output_channels
        return GatherSchedule(
            unroll=_unroll(problem.geometry, phased=problem.output == "fine"),
            tiles=_tiles(outputs, most=8, sums=24, widest=6, of_one=6),
            tiles_of_16=_tiles(outputs, most=4, sums=12, widest=4, of_one=6),
        )

    def candidates(self, problem: Problem) -> list[Candidate[GatherSchedule]]:
        default = self.default(problem)
        schedules = [
            replace(default, tiles=tiles, scratch_bytes=l2 << 10, buffer_bytes=l1 << 10)
            for tiles, l2, l1 in product(_tile_lists(default.tiles), (256, 512), (16, 32, 64))
        ]
        return [
            Candidate(schedule, _refusal(schedule, default))
            for schedule in dict.fromkeys([default, *schedules])
        ]

    def refusal(self, plan: Plan[GatherSchedule], architectures: Iterable[str] = ()) -> str:
        return _refusal(plan.schedule, self.default(plan.problem))

    def predict(self, plan: Plan[GatherSchedule], call: Call, gpu: Gpu) -> Prediction:
        problem = plan.problem
        rows, others = call.channels(problem.output), call.channels(problem.input)
        return _prediction(problem, plan.schedule, call, rows, others)

    def context(self, plan: Plan[GatherSchedule]) -> dict[str, Any]:
        axes = [_axis(plan.geometry, plan.contraction, axis) for axis in range(3)]
        phases = _unrolled_phases(axes, plan.schedule.unroll)
        by_phase = bool(phases) and phases[0].name != "AllTaps"
        return _common_context(plan.problem, plan.schedule, axes) | {
            "phases": phases,
            "by_phase": by_phase,
        }


class CpuWgrad(Family[ReduceSchedule]):
    """wgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cpu"
    contractions = ("wgrad",)
    kinds = DTYPES
    schedule_type = ReduceSchedule
    template = "cpu/{contraction}.cpp.j2"
    headers = HEADERS

    def default(self, problem: Problem) -> ReduceSchedule:
        taps, coarse = problem.geometry.taps, problem.geometry.coarse_channels_per_group
        return ReduceSchedule(
            unroll="full" if taps <= MAX_UNROLLED_TAPS else "none",
            tiles=_tiles(coarse, most=8, sums=24, widest=6, of_one=12),
            tiles_of_16=_tiles(coarse, most=4, sums=12, widest=6, of_one=12),
            fine_block=3 if taps == 1 and coarse != 1 else 1,
        )

    def candidates(self, problem: Problem) -> list[Candidate[ReduceSchedule]]:
        default = self.default(problem)
        schedules = [
            replace(default, tiles=tiles, coarse_tile_bytes=kilobytes << 10)
            for tiles, kilobytes in product(_tile_lists(default.tiles), (12, 20, 28))
        ]
        return [
            Candidate(schedule, _refusal(schedule, default))
            for schedule in dict.fromkeys([default, *schedules])
        ]

    def refusal(self, plan: Plan[ReduceSchedule], architectures: Iterable[str] = ()) -> str:
        return _refusal(plan.schedule, self.default(plan.problem))

    def predict(self, plan: Plan[ReduceSchedule], call: Call, gpu: Gpu) -> Prediction:
        rows, others = call.coarse_channels, call.fine_channels
        return _prediction(plan.problem, plan.schedule, call, rows, others)

    def context(self, plan: Plan[ReduceSchedule]) -> dict[str, Any]:
        g, schedule = plan.geometry, plan.schedule
        axes = [_axis(g, plan.contraction, axis) for axis in range(3)]
        widths = sorted({width for _, width in schedule.tiles + schedule.tiles_of_16})
        full = schedule.unroll == "full"
        return _common_context(plan.problem, schedule, axes) | {
            "columns": {
                width: _column_parts(g, schedule.fine_block, width) for width in widths if full
            }
        }


def _refusal(
    schedule: GatherSchedule | ReduceSchedule, default: GatherSchedule | ReduceSchedule
) -> str:
    """Why a problem with a default cannot have a schedule; empty if it can."""
    for registers, tiles in ((32, schedule.tiles), (16, schedule.tiles_of_16)):
        for height, width in tiles:
            # Sums and operands; those of one channel come from memory.
            needed = height * width + (width if height > 1 else 0)
            if needed > registers:
                return f"a tile of {height} x {width} sums takes {needed} of {registers} registers"
        heights = [height for height, _ in tiles]
        if heights != sorted(set(heights)):
            return "tiles are listed by rising number of channels"
    untuned = (field.name for field in fields(schedule) if field.name not in TUNED)
    wrong = (name for name in untuned if getattr(schedule, name) != getattr(default, name))
    return next((f"{name} is {getattr(default, name)!r}" for name in wrong), "")


def _prediction(
    problem: Problem,
    schedule: GatherSchedule | ReduceSchedule,
    call: Call,
    rows: int,
    others: int,
) -> Prediction:
    """Clocks of one core's vector units, at one multiply-add and one load each per clock.

    ``rows`` channels are those that register tiles are high; ``others`` are the other tensor's.
    """
    groups = problem.geometry.groups
    rows //= groups
    height, width = next((tile for tile in schedule.tiles if tile[0] >= rows), schedule.tiles[-1])
    # A register tile: `height` broadcasts (they come with the multiply-add) and `width` loads.
    arithmetic, loads = float(height * width), width + height / 2
    clocks = max(arithmetic, loads) + 0.2 * min(arithmetic, loads)
    if schedule.unroll != "full":
        clocks += 0.1 * arithmetic
    products = call.batch * math.prod(call.coarse_extent) * problem.geometry.taps
    products *= -(-rows // height) * height * others
    lanes = 16 // problem.accumulator_registers
    ms = products / (height * width) * clocks / lanes / CORE_GHZ / CORES * 1e-6
    elements = call.batch * (
        call.coarse_channels * math.prod(call.coarse_extent)
        + call.fine_channels * math.prod(call.fine_extent)
    )
    floor = elements * problem.element_bytes / MEMORY_BYTES_PER_S * 1e3
    return Prediction(ms, "arithmetic") if ms > floor else Prediction(floor, "memory")


def _common_context(
    problem: Problem, schedule: GatherSchedule | ReduceSchedule, axes: Sequence[Axis]
) -> dict[str, Any]:
    return {
        "axes": axes,
        "depthwise": _depthwise(problem.geometry),
        "real": REAL[DTYPES[problem.kind].accumulator],
        "storage": STORAGE[problem.kind],
        "tile_list": _tile_list(schedule.tiles),
        "tile_list_of_16": _tile_list(schedule.tiles_of_16),
    }


def _depthwise(g: Geometry) -> str:
    """Which calls have groups of one channel in either tensor, with kernels of their own.

    ``all``, ``some`` (the channels are given when it is called), or none: empty.
    """
    channels = (g.coarse_channels_per_group, g.fine_channels_per_group)
    if g.groups == 1 or any(count not in (None, 1) for count in channels):
        return ""
    return "some" if None in channels else "all"


def _tile_lists(tiles: Tiles) -> list[Tiles]:
    """The list, and the same with other sizes of its largest tile, and of the one before it."""
    *rest, (height, _) = tiles
    if height == 1:
        return [tiles, *((*rest, (1, width)) for width in (4, 6, 8, 12))]
    others = [(height, 28 // (height + 1)), (6, 4), (8, 3), (4, 6), (12, 2), (14, 1)]
    return [tiles, *((*rest, tile) for tile in others if not rest or tile[0] > rest[-1][0])]


def _tiles(channels: int | None, *, most: int, sums: int, widest: int, of_one: int) -> Tiles:
    """Register tiles (channels, width) of at most ``most`` channels.

    ``sums`` of 32 (24) or 16 (12) registers leave a quarter for operands; no more than ``widest``
    operands fit there. Tiles are rather high than wide, because a broadcast weight or an aligned
    row costs less than an unaligned load. A channel of its own leaves room for ``of_one``.

    Channels known to be few, or no multiple, get the one tile that wastes least, ties going to the
    highest; unknown ones get tiles for 1, up to 4, and more, of which that in the middle loops
    over the taps.
    """
    if channels is None:
        heights = [1, 4, 8]
    else:
        highest = min(channels, most)
        candidates = range(highest, highest // 2, -1)
        heights = [min(candidates, key=lambda height: -(-channels // height) * height)]
    return tuple(
        (height, of_one if height == 1 else min(widest, sums // height))
        for height in heights
        if height <= most
    )


def _unroll(g: Geometry, *, phased: bool) -> str:
    phases = prod(g.stride) if phased else 1
    inner_phases = g.stride[2] if phased else 1
    if g.taps <= MAX_UNROLLED_TAPS and phases <= MAX_UNROLLED_PHASES:
        return "full"
    if g.kernel[2] <= MAX_INNER_TAPS and inner_phases <= MAX_UNROLLED_PHASES:
        return "inner"
    return "none"


def _axis(g: Geometry, contraction: str, axis: int) -> Axis:
    name = AXES[axis]
    facts = (g.kernel[axis], g.padding[axis], g.dilation[axis])
    if contraction == "dgrad":
        kernel, padding, dilation = facts
        phases = dgrad_phases(kernel, g.stride[axis], padding, dilation)
        return Axis(name, "1", f"STRIDE_{name}", phases)
    return Axis(name, f"STRIDE_{name}", "1", (Phase(0, gather_taps(*facts)),))


def _unrolled_phases(axes: Sequence[Axis], unroll: str) -> list[UnrolledPhase]:
    if unroll == "none":
        return []
    if unroll == "inner":
        return [
            UnrolledPhase(
                f"PhaseW{index}",
                index,
                f"Outputs at w residue {index}: taps along w, in a loop over those along d and h.",
                tuple(f"kernel (.., .., {tap.index}) at w {tap.offset}" for tap in phase.taps),
                loop=True,
            )
            for index, phase in enumerate(axes[2].by_phase)
            if phase.taps
        ]
    phases = []
    one = all(len(axis.by_phase) == 1 for axis in axes)
    for index, trio in enumerate(product(*(axis.by_phase for axis in axes))):
        taps = tuple(_tap_label(tap) for tap in product(*(phase.taps for phase in trio)))
        if taps:
            name = "AllTaps" if one else f"Phase{index}"
            residues = _coordinates(phase.residue for phase in trio)
            comment = "All taps." if one else f"Outputs at residues {residues}."
            phases.append(UnrolledPhase(name, index, comment, taps, loop=False))
    return phases


def _tap_label(tap: Iterable[Tap]) -> str:
    d, h, w = tap
    kernel = _coordinates((d.index, h.index, w.index))
    return f"kernel {kernel} at {_coordinates((d.offset, h.offset, w.offset))}"


def _column_parts(g: Geometry, fine_block: int, width: int) -> list[ColumnPart]:
    """Columns (taps; for single taps, fine channels) in even parts of at most ``width``."""
    if fine_block == 1:
        what, labels = "kernel", [_coordinates(tap) for tap in product(*map(range, g.kernel))]
    else:
        assert g.taps == 1
        what, labels = "fine channels b +", [str(channel) for channel in range(fine_block)]
    parts = -(-len(labels) // width)
    bounds = [part * len(labels) // parts for part in range(parts + 1)]
    result = []
    for first, end in pairwise(bounds):
        last = f" to {labels[end - 1]}" if end - first > 1 else ""
        result.append(ColumnPart(first, end - first, f"{what} {labels[first]}{last}"))
    return result


def _tile_list(tiles: Tiles) -> str:
    return f"TileList<{', '.join(f'Tile<{height}, {width}>' for height, width in tiles)}>"


def _coordinates(values: Iterable[int]) -> str:
    return f"({', '.join(map(str, values))})"


def _table(entries: Iterable[str]) -> str:
    """A brace initializer, wrapped at 100 columns."""
    words = list(entries)
    line = "{" + ", ".join(words) + "}"
    if len(line) <= 56:
        return line
    lines, current = [], "     "
    for word in words:
        if len(current) + len(word) > 96:
            lines.append(current)
            current = "     "
        current += f" {word},"
    return "{\n" + "\n".join([*lines, current.rstrip(",")]) + "}"


GATHER, WGRAD = CpuGather(), CpuWgrad()
