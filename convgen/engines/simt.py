"""The ``simt`` engine: register-tiled FFMA kernels for any CUDA GPU since sm_75.

fprop and dgrad share one kernel (a gather, see ``templates/cuda/simt/gather.cuh``); wgrad has its
own. The schedule below is what the specification decides at generation time; tile extents depend
on the call and are chosen at launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from convgen.dtypes import DTYPES
from convgen.engines import KernelPlan
from convgen.engines.gather import (
    Axis,
    Unit,
    gather_axes,
    tap_numbering,
    unroll,
    unroll_line,
)
from convgen.spec import Geometry

# Accumulators per thread, in 32-bit registers: with the column and the weights beside them a
# thread stays under the 168 registers that blocks of 384 threads leave it.
ACCUMULATOR_REGISTERS = 64
CHANNELS_PER_THREAD = 8
# Register rows beyond this only lengthen the loads; fewer share each weight among too few.
MAX_ROWS = 8
# Multiply-adds of a fully unrolled input channel, over all phases. 5000 are 80 KiB of machine code:
# beyond, the instruction cache (128 KiB) and nvcc's patience end.
UNROLL_LIMIT = 5000
# X taps unrolled in one line; longer kernels loop over their taps.
LINE_LIMIT = 32
# Output phases along X that one thread serves; more would leave no register rows.
MAX_VARIANTS = 8
# wgrad's window of a row: bits of its mask, and registers (in 32-bit ones) that it may take.
MAX_WINDOW = 64
MAX_WINDOW_LOADS = 28
# The smallest staged tile of one input channel must leave room for two stages in the 48 KiB that
# every GPU since sm_75 has.
TILE_LIMIT_BYTES = 20 * 1024


@dataclass(frozen=True)
class GatherSchedule:
    """fprop and dgrad: what one thread computes and what the template unrolls.

    ``unroll``: ``taps`` (every tap, one tile holds a phase's window), ``line`` (the taps along W,
    one tile per (d, h) tap) or ``none`` (loops over all taps). ``row_axis`` is the axis of a
    thread's register rows, or ``scattered`` where no kernel window runs along D or H: rows are then
    positions far apart. ``channels`` lists the compiled output-channel blocks.
    """

    unroll: str
    row_axis: str
    rows: int
    variants: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class WgradSchedule:
    """wgrad: ``taps_h x taps_w`` taps times ``channels`` coarse channels per thread.

    ``positions`` neighbouring coarse positions along W are unrolled.
    """

    taps_h: int
    taps_w: int
    positions: int
    channels: tuple[int, ...]


def _channel_blocks(per_group: int | None, groups: int, most: int) -> tuple[int, ...]:
    """Channels per thread to compile: the least padding if the count is known, else two sizes."""
    if per_group is not None:
        return (min(most, 1 << (per_group - 1).bit_length()),)
    return (most,) if groups == 1 else (most, 1)


def _gather_schedule(geometry: Geometry, contraction: str, dtype: str) -> GatherSchedule:
    width = DTYPES[DTYPES[dtype].accumulator].size_bytes // 4
    axes = gather_axes(geometry, contraction)
    r, y, x = _arrange(axes)
    budget = ACCUMULATOR_REGISTERS // width
    per_group = (
        geometry.coarse_channels_per_group
        if contraction == "fprop"
        else geometry.fine_channels_per_group
    )
    variants = min(len(x.phases), MAX_VARIANTS)
    most = CHANNELS_PER_THREAD // width
    rows = max(1, min(MAX_ROWS, budget // (most * variants)))
    rows = 1 << (rows.bit_length() - 1)
    channels = _channel_blocks(per_group, geometry.groups, most)
    scattered = max(geometry.kernel[0], geometry.kernel[1]) == 1
    line = len(x.phases) <= MAX_VARIANTS and max(x.counts) <= LINE_LIMIT
    if not line:
        style = "none"
    elif scattered or not _window_fits(r, y, x, rows, geometry, max(channels), width):
        style = "line"
    else:
        style = "taps"
    row_axis = "scattered" if scattered else r.name
    return GatherSchedule(style, row_axis, rows, variants, channels)


def _window_fits(
    r: Axis, y: Axis, x: Axis, rows: int, geometry: Geometry, channels: int, width: int
) -> bool:
    """Whether a fully unrolled phase keeps its code and its tile small enough."""
    if geometry.taps * rows * channels > UNROLL_LIMIT:
        return False
    planes = (rows - 1) * r.step + max(r.spans) + 1
    if planes > 32:  # the column lives in registers
        return False
    # 32 lanes in a strip 8 wide: five rows.
    lines = 4 * y.step + max(y.spans) + 1
    columns = 7 * x.step + max(x.spans) + 1
    return planes * lines * columns * 4 * width <= TILE_LIMIT_BYTES


def _arrange(axes: tuple[Axis, Axis, Axis]) -> tuple[Axis, Axis, Axis]:
    """(R, Y, X): register rows run along the longer of the kernel's D and H."""
    d, h, w = axes
    return (h, d, w) if sum(h.counts) > sum(d.counts) else (d, h, w)


def _wgrad_schedule(geometry: Geometry, dtype: str) -> WgradSchedule:
    width = DTYPES[DTYPES[dtype].accumulator].size_bytes // 4
    most = CHANNELS_PER_THREAD // width
    budget = 72 // (most * width)  # taps per thread
    _, kh, kw = geometry.kernel
    taps_w = -(-kw // -(-kw // budget))
    taps_h = max(1, min(kh, budget // taps_w))
    taps_h = -(-kh // -(-kh // taps_h))
    channels = _channel_blocks(geometry.coarse_channels_per_group, geometry.groups, most)
    positions = 4
    window = _window(taps_w, positions, geometry.stride[2], geometry.dilation[2])
    if window.count > MAX_WINDOW or bin(window.used).count("1") > MAX_WINDOW_LOADS // width:
        positions = 1
    return WgradSchedule(taps_h, taps_w, positions, channels)


@dataclass(frozen=True)
class Window:
    """What ``taps`` at ``positions`` neighbouring positions load of a row of the fine tensor.

    Every ``pitch``-th column, the set bits of ``used`` among ``count``; tap ``w`` at position ``p``
    reads element ``w * tap_step + p * stride``.
    """

    count: int
    pitch: int
    used: int
    tap_step: int


def _window(taps: int, positions: int, stride: int, dilation: int) -> Window:
    if positions == 1:
        return Window(taps, dilation, (1 << taps) - 1, 1)
    used = 0
    for p in range(positions):
        for w in range(taps):
            used |= 1 << (p * stride + w * dilation)
    return Window(used.bit_length(), 1, used, dilation)


class Simt:
    """See :class:`convgen.engines.Engine`."""

    name = "simt"
    backend = "cuda"
    source_suffix = ".cu"
    headers = {
        "convgen_abi.h": "common/convgen_abi.h",
        "device.cuh": "cuda/device.cuh",
        "common.cuh": "cuda/simt/common.cuh",
        "gather.cuh": "cuda/simt/gather.cuh",
        "wgrad.cuh": "cuda/simt/wgrad.cuh",
    }

    def plan(self, geometry: Geometry, contraction: str, dtype: str) -> KernelPlan:
        schedule: GatherSchedule | WgradSchedule
        if contraction == "wgrad":
            schedule = _wgrad_schedule(geometry, dtype)
        else:
            schedule = _gather_schedule(geometry, contraction, dtype)
        return KernelPlan(geometry, contraction, dtype, self.name, schedule)

    def template(self, contraction: str) -> str:
        return f"cuda/simt/{contraction}.cu.j2"

    def context(self, plan: KernelPlan) -> dict[str, Any]:
        types = {"f32": "float", "f64": "double", "f16": "half", "bf16": "bfloat16"}
        common = {
            "element": types[plan.dtype],
            "acc": types[DTYPES[plan.dtype].accumulator],
        }
        if plan.contraction == "wgrad":
            schedule: WgradSchedule = plan.schedule
            g = plan.geometry
            window = _window(schedule.taps_w, schedule.positions, g.stride[2], g.dilation[2])
            return common | {"window": window}
        return common | _gather_context(plan)


def _gather_context(plan: KernelPlan) -> dict[str, Any]:
    schedule: GatherSchedule = plan.schedule
    geometry = plan.geometry
    axes = gather_axes(geometry, plan.contraction)
    r, y, x = _arrange(axes)
    number = tap_numbering(geometry.kernel)
    groups_x = -(-len(x.phases) // schedule.variants)
    units: list[Unit] = []
    slot_tap: list[int] = []
    region_first = [0]
    phase_region = []
    line_columns: tuple[Any, ...] = ()
    line_slots: list[int] = []
    if schedule.unroll == "line":
        line_columns, line_slots = unroll_line(x, schedule.rows)
    for phase_r, rp in enumerate(r.phases):
        for phase_y, yp in enumerate(y.phases):
            if schedule.unroll == "taps":
                columns, slots = unroll(r, y, x, phase_r, phase_y, schedule.rows, number)
                suffix = f"_{r.name}{phase_r}_{y.name}{phase_y}"
                label = f"{r.name} phase {phase_r}, {y.name} phase {phase_y}"
                if len(r.phases) * len(y.phases) == 1:
                    suffix = label = ""
                units.append(Unit(suffix, label, columns))
                phase_region.append(len(region_first) - 1)
                slot_tap += slots
                region_first.append(len(slot_tap))
                continue
            for group_x in range(groups_x):
                phase_region.append(len(region_first) - 1)
                first = group_x * schedule.variants
                members = x.phases[first : first + schedule.variants]
                passes_x = max((len(p.taps) for p in members), default=0)
                for tap_r in rp.taps:
                    for tap_y in yp.taps:

                        def flat(index_x: int, ir: int = tap_r.index, iy: int = tap_y.index) -> int:
                            return number({r.name: ir, y.name: iy, x.name: index_x}).flat

                        if schedule.unroll == "line":
                            slot_tap += [flat(i) for i in line_slots]
                            region_first.append(len(slot_tap))
                            continue
                        for jx in range(passes_x):
                            for v in range(schedule.variants):
                                has = v < len(members) and jx < len(members[v].taps)
                                slot_tap.append(flat(members[v].taps[jx].index) if has else -1)
                            region_first.append(len(slot_tap))
    groups = [
        x.phases[i * schedule.variants : (i + 1) * schedule.variants] for i in range(groups_x)
    ]
    group_firsts = [
        min((t.offset for p in group for t in p.taps[:1]), default=0) for group in groups
    ]
    group_spans = [
        max((p.taps[0].offset for p in group if p.taps), default=0) - first
        for group, first in zip(groups, group_firsts, strict=True)
    ]
    taps_x = [t.offset for p in x.phases for t in p.taps]
    sizes = [b - a for a, b in zip(region_first, region_first[1:], strict=False)]
    return {
        "r": r,
        "y": y,
        "x": x,
        "axis_index": {axis.name: "dhw".index(axis.name) for axis in axes},
        "groups_x": groups_x,
        "units": units,
        "line_columns": line_columns,
        "slot_tap": slot_tap,
        "region_first": region_first,
        "phase_region": phase_region,
        "passes_x": [max((len(p.taps) for p in group), default=0) for group in groups],
        "group_firsts": group_firsts,
        "span_x": (max(group_spans) if schedule.unroll == "none" else max(taps_x) - min(taps_x)),
        "first_x": min(taps_x),
        "taps_per_pass": max(sizes),
        "output_is_coarse": plan.contraction == "fprop",
        "input": "fine" if plan.contraction == "fprop" else "coarse",
        "output": "coarse" if plan.contraction == "fprop" else "fine",
    }


ENGINE = Simt()
