"""The ``cpu`` engine: C++17, OpenMP, explicit SIMD through the compiler's vector types.

fprop and dgrad are one algorithm over different axes (``gather.h``), wgrad is another
(``reduce.h``); the templates give them the geometry's constants and unrolled taps. Sources hold no
assumption about the host's instruction set: it is known when they are compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from convgen.dtypes import DTYPES
from convgen.engines import KernelPlan
from convgen.spec import Geometry
from convgen.taps import Phase, Tap, dgrad_phases, gather_taps

AXES = ("D", "H", "W")

_REAL = {"f32": "float", "f64": "double"}
_STORAGE = {"f32": "float", "f64": "double", "f16": "Half", "bf16": "BFloat16"}

MAX_UNROLLED_TAPS = 64
"""Taps unrolled in one unit. A tap of the widest register tile is about 35 instructions, 250 bytes:
64 of them in all tiles fill the 32 KB of an instruction cache, and compile in two seconds."""

MAX_UNROLLED_PHASES = 16
"""Phases with code of their own: each is compiled for four register tiles."""

MAX_INNER_TAPS = 32
"""Taps along w that are still unrolled where the kernel's whole is too large."""


@dataclass(frozen=True)
class GatherSchedule:
    """How fprop and dgrad are cut up. Pairs are for hosts with (32, 16) vector registers."""

    unroll: str
    """``full``: every tap of every phase; ``inner``: those along w; ``none``: a loop over taps."""
    channel_block: tuple[int, int]
    """Output channels per register tile."""
    vectors: tuple[int, int]
    """Vectors of positions per register tile."""
    vectors_of_one: int = 6
    """The same where a group has one output channel: enough chains to hide the latency of a
    multiply-add, few enough for 16 registers."""
    scratch_bytes: int = 256 << 10
    """Source block of a task: a quarter to a half of L2, beside packed weights."""
    buffer_bytes: int = 32 << 10
    """Row buffer: about L1, so that interleaving reads what was just written."""
    chain_terms: int = 4096
    """Products per chain of additions in f32: random rounding errors stay below 2e-6."""


@dataclass(frozen=True)
class ReduceSchedule:
    """How wgrad is cut up. Pairs are for hosts with (32, 16) vector registers."""

    unroll: str
    """``full``: all columns (taps) are listed; ``none``: a loop over them."""
    channel_block: tuple[int, int]
    """Coarse channels per register tile."""
    fine_block: int
    """Fine channels whose columns are computed together: for 1x1x1 kernels, whose only column
    would leave the register tile with too few chains."""
    columns: int = 3
    """Columns per register tile: 8 x 3 sums, or 4 x 3 with 16 registers."""
    columns_of_one: int = 12
    """The same where a group has one coarse channel: with one operand and sums in 16 registers."""
    coarse_tile_bytes: int = 16 << 10
    """Coarse positions of a register tile: half of L1, kept there while the columns change."""
    coarse_bytes: int = 384 << 10
    """Coarse blocks of a task: a third of L2, beside fine blocks and sums."""
    fine_bytes: int = 128 << 10
    """Fine block: read once per coarse channel block, from L2."""
    sums_bytes: int = 256 << 10
    """Sums, one vector per weight of one fine channel: loaded and stored once per block, from L2."""
    partial_bytes: int = 64 << 20
    """Partial weights of all ranges in the workspace."""
    range_positions: int = 2048
    """Positions per range at least: adding up the lanes costs less than a tenth of them."""
    task_terms: int = 1 << 22
    """Multiply-adds per task that are wanted: about 0.1 ms."""


@dataclass(frozen=True)
class _Axis:
    """An axis as the templates see it: its taps by phase."""

    name: str
    source_stride: str
    phases: str
    by_phase: tuple[Phase, ...]

    @property
    def taps(self) -> list[Tap]:
        return [tap for phase in self.by_phase for tap in phase.taps]

    @property
    def tap_table(self) -> str:
        return _table([f"{{{tap.index}, {tap.offset}}}" for tap in self.taps])

    @property
    def first_table(self) -> str:
        first = [0]
        for phase in self.by_phase:
            first.append(first[-1] + len(phase.taps))
        return _table([str(value) for value in first])


class CpuEngine:
    """See :class:`convgen.engines.Engine`."""

    name = "cpu"
    backend = "cpu"
    source_suffix = ".cpp"
    headers: Mapping[str, str] = {
        "convgen_abi.h": "common/convgen_abi.h",
        "runtime.h": "cpu/runtime.h",
        "simd.h": "cpu/simd.h",
        "scratch.h": "cpu/scratch.h",
        "gather.h": "cpu/gather.h",
        "reduce.h": "cpu/reduce.h",
    }

    def plan(self, geometry: Geometry, contraction: str, dtype: str) -> KernelPlan:
        assert dtype in DTYPES
        g = geometry
        schedule: GatherSchedule | ReduceSchedule
        if contraction == "wgrad":
            one = g.coarse_channels_per_group == 1
            schedule = ReduceSchedule(
                unroll="full" if g.taps <= MAX_UNROLLED_TAPS else "none",
                channel_block=_channel_block(g.coarse_channels_per_group),
                fine_block=3 if g.taps == 1 and not one else 1,
            )
        else:
            outputs = (
                g.coarse_channels_per_group if contraction == "fprop" else g.fine_channels_per_group
            )
            block = _channel_block(outputs)
            schedule = GatherSchedule(
                unroll=_unroll(g, phased=contraction == "dgrad"),
                channel_block=block,
                vectors=(_vectors(block[0], sums=24), _vectors(block[1], sums=12)),
            )
        return KernelPlan(geometry, contraction, dtype, self.name, schedule)

    def template(self, contraction: str) -> str:
        return f"cpu/{contraction}.cpp.j2"

    def context(self, plan: KernelPlan) -> dict[str, Any]:
        g, schedule = plan.geometry, plan.schedule
        axes = [_axis(g, plan.contraction, axis) for axis in range(3)]
        outputs = (
            g.fine_channels_per_group
            if plan.contraction == "dgrad"
            else g.coarse_channels_per_group
        )
        context = {
            "axes": axes,
            "real": _REAL[DTYPES[plan.dtype].accumulator],
            "storage": _STORAGE[plan.dtype],
            "channel_block": _by_registers(schedule.channel_block),
            "maybe_one": "true" if outputs in (None, 1) else "false",
        }
        if isinstance(schedule, ReduceSchedule):
            labels = [_coordinates(tap) for tap in product(*(range(k) for k in g.kernel))]
            if schedule.fine_block > 1:
                labels = [
                    f"{label} of channel b + {b}"
                    for b in range(schedule.fine_block)
                    for label in labels
                ]
            full = schedule.unroll == "full"
            context["block_columns"] = _columns(labels, schedule.columns) if full else []
            context["one_columns"] = _columns(labels, schedule.columns_of_one) if full else []
        else:
            context["vectors"] = _by_registers(schedule.vectors)
            context["phases"] = _phases(axes, schedule.unroll)
            context["phase_count"] = _product([len(axis.by_phase) for axis in axes])
        return context


def _channel_block(channels: int | None) -> tuple[int, int]:
    """Channels per register tile, for (32, 16) registers.

    8 x 3 sums of 32 registers leave 8 for operands; 4 x 3 of 16 leave 4. More channels than
    vectors, because a broadcast weight costs less than an unaligned load. Channels known to be
    few, or no multiple, get the block that wastes least; ties go to the larger one.
    """
    if channels is None:
        return 8, 4

    def best(most: int) -> int:
        blocks = range(min(channels, most), max(1, min(channels, most) // 2), -1)
        return min(blocks, key=lambda block: -(-channels // block) * block, default=1)

    return best(8), best(4)


def _vectors(channel_block: int, sums: int) -> int:
    """Vectors per register tile: as many as ``sums`` registers allow, at most 6 (beyond, the
    operands no longer fit beside them)."""
    return min(6, sums // channel_block)


def _unroll(g: Geometry, *, phased: bool) -> str:
    phases = _product(g.stride) if phased else 1
    inner_phases = g.stride[2] if phased else 1
    if g.taps <= MAX_UNROLLED_TAPS and phases <= MAX_UNROLLED_PHASES:
        return "full"
    if g.kernel[2] <= MAX_INNER_TAPS and inner_phases <= MAX_UNROLLED_PHASES:
        return "inner"
    return "none"


def _axis(g: Geometry, contraction: str, axis: int) -> _Axis:
    name = AXES[axis]
    kernel, stride, padding, dilation = (
        g.kernel[axis],
        g.stride[axis],
        g.padding[axis],
        g.dilation[axis],
    )
    if contraction == "dgrad":
        return _Axis(name, "1", f"STRIDE_{name}", dgrad_phases(kernel, stride, padding, dilation))
    taps = gather_taps(kernel, padding, dilation)
    return _Axis(name, f"STRIDE_{name}", "1", (Phase(0, taps),))


def _phases(axes: list[_Axis], unroll: str) -> list[dict[str, Any]]:
    """The structs that unroll taps: name, index among phases, labels of the taps."""
    if unroll == "none":
        return [
            {
                "name": "AnyTaps",
                "index": 0,
                "loop": True,
                "taps": [""],
                "comment": "Too many taps to unroll: a loop over those of a phase.",
            }
        ]
    if unroll == "inner":
        loops = []
        for index, phase in enumerate(axes[2].by_phase):
            if phase.taps:
                loops.append(
                    {
                        "name": f"PhaseW{index}",
                        "index": index,
                        "loop": True,
                        "taps": [f"kernel (.., .., {tap.index})" for tap in phase.taps],
                        "comment": f"Phases with w residue {index}: unrolled along w, a loop over d, h.",
                    }
                )
        return loops
    phases = []
    single = all(len(axis.by_phase) == 1 for axis in axes)
    for index, phase in enumerate(product(*(axis.by_phase for axis in axes))):
        taps = list(product(*(p.taps for p in phase)))
        if taps:
            residues = _coordinates(p.residue for p in phase)
            phases.append(
                {
                    "name": "AllTaps" if single else f"Phase{index}",
                    "index": index,
                    "loop": False,
                    "taps": [
                        f"kernel {_coordinates(t.index for t in tap)} at "
                        f"{_coordinates(t.offset for t in tap)}"
                        for tap in taps
                    ],
                    "comment": "All taps." if single else f"Outputs at residues {residues}.",
                }
            )
    return phases


def _columns(labels: list[str], most: int) -> list[dict[str, Any]]:
    """Columns in even parts of at most ``most``."""
    parts = -(-len(labels) // most)
    bounds = [part * len(labels) // parts for part in range(parts + 1)]
    return [
        {
            "first": first,
            "count": last - first,
            "comment": f"kernel {labels[first]}"
            + (f" to {labels[last - 1]}" if last - first > 1 else ""),
        }
        for first, last in zip(bounds, bounds[1:], strict=False)
    ]


def _coordinates(values: Any) -> str:
    return f"({', '.join(map(str, values))})"


def _by_registers(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"VECTOR_REGISTERS >= 32 ? {pair[0]} : {pair[1]}"


def _table(entries: list[str]) -> str:
    """A brace initializer, wrapped at 100 columns."""
    line = "{" + ", ".join(entries) + "}"
    if len(line) <= 56:
        return line
    lines, current = [], ""
    for entry in entries:
        if len(current) + len(entry) > 90:
            lines.append(current.rstrip())
            current = ""
        current += entry + ", "
    lines.append(current.rstrip(", "))
    return "{\n      " + "\n      ".join(lines) + "}"


def _product(values: Any) -> int:
    result = 1
    for value in values:
        result *= value
    return result


ENGINE = CpuEngine()
