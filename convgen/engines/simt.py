"""The ``simt`` engine: register-tiled FFMA kernels for any CUDA GPU since sm_75.

fprop and dgrad share one kernel (a gather, see ``templates/cuda/simt/gather.cuh``); wgrad has its
own. The schedule below is what the specification decides at generation time; tile extents depend
on the call and are chosen at launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from convgen.engines import Candidate, KernelPlan, schedule_from
from convgen.engines.cost import Gpu, Prediction, Problem, Warp, gather_prediction, memory_ms
from convgen.engines.depthwise import depthwise_context, depthwise_prediction
from convgen.engines.gather import (
    MAX_VARIANTS,
    STYLES,
    GatherSchedule,
    arrange,
    gather_axes,
    gather_context,
    loops_over_taps,
    output_channels,
    style_refusal,
)
from convgen.spec import Geometry
from convgen.spec.dtypes import DTYPES

# Accumulators per thread, in 32-bit registers: with the column and the weights beside them a
# thread stays under the 168 registers that blocks of 384 threads leave it.
ACCUMULATOR_REGISTERS = 64
CHANNELS_PER_THREAD = 8
# Register rows beyond this only lengthen the loads; fewer share each weight among too few.
MAX_ROWS = 8
# Multiply-adds of a fully unrolled input channel, over all phases. 5000 are 80 KiB of machine code:
# beyond, the instruction cache (128 KiB) and nvcc's patience end.
UNROLL_LIMIT = 5000
# wgrad's sums per thread, in 32-bit registers, and the neighbouring positions that it unrolls.
WGRAD_REGISTERS = 72
POSITIONS = 4
# wgrad's window of a row: bits of its mask, and registers (in 32-bit ones) that it may take.
MAX_WINDOW = 64
MAX_WINDOW_LOADS = 28
# A column of register rows, in 32-bit registers.
MAX_COLUMN_REGISTERS = 24
# The smallest staged tile of one input channel must leave room for two stages in the 48 KiB that
# every GPU since sm_75 has.
TILE_LIMIT_BYTES = 20 * 1024


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


def _refusal(geometry: Geometry, contraction: str, dtype: str, schedule: GatherSchedule) -> str:
    """Why a gather cannot have a schedule; empty if it can."""
    width = _width(dtype)
    r, y, x = arrange(gather_axes(geometry, contraction))
    style, rows = schedule.unroll, schedule.rows
    if refusal := style_refusal(geometry, x, style):
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


def _width(dtype: str) -> int:
    """Registers of an accumulator."""
    return DTYPES[DTYPES[dtype].accumulator].size_bytes // 4


def _gather_schedule(geometry: Geometry, contraction: str, dtype: str) -> GatherSchedule:
    """The default schedule: the largest pass that fits."""
    width = _width(dtype)
    r, _, x = arrange(gather_axes(geometry, contraction))
    budget = ACCUMULATOR_REGISTERS // width
    variants = min(len(x.phases), MAX_VARIANTS)
    most = CHANNELS_PER_THREAD // width
    rows = max(1, min(MAX_ROWS, budget // (most * variants)))
    rows = 1 << (rows.bit_length() - 1)
    channels = _channel_blocks(output_channels(geometry, contraction), geometry.groups, most)
    scattered = max(geometry.kernel[0], geometry.kernel[1]) == 1
    row_axis = "scattered" if scattered else r.name
    if loops_over_taps(x):
        return GatherSchedule("none", row_axis, rows, variants, channels)
    for style in ("taps", "plane"):
        schedule = GatherSchedule(style, row_axis, rows, variants, channels)
        if not _refusal(geometry, contraction, dtype, schedule):
            return schedule
    return GatherSchedule("line", row_axis, rows, variants, channels)


def _positions(geometry: Geometry, dtype: str, taps_w: int) -> int:
    """Neighbouring positions to unroll: several where their window fits."""
    window = _window(taps_w, POSITIONS, geometry.stride[2], geometry.dilation[2])
    loads = window.used.bit_count()
    fits = window.count <= MAX_WINDOW and loads <= MAX_WINDOW_LOADS // _width(dtype)
    return POSITIONS if fits else 1


def _wgrad_schedule(geometry: Geometry, dtype: str) -> WgradSchedule:
    width = _width(dtype)
    most = CHANNELS_PER_THREAD // width
    budget = WGRAD_REGISTERS // (most * width)  # taps per thread
    _, kh, kw = geometry.kernel
    taps_w = -(-kw // -(-kw // budget))
    taps_h = max(1, min(kh, budget // taps_w))
    taps_h = -(-kh // -(-kh // taps_h))
    channels = _channel_blocks(geometry.coarse_channels_per_group, geometry.groups, most)
    return WgradSchedule(taps_h, taps_w, _positions(geometry, dtype, taps_w), channels)


def _wgrad_refusal(geometry: Geometry, dtype: str, schedule: WgradSchedule) -> str:
    """Why wgrad cannot have a schedule; empty if it can."""
    _, kh, kw = geometry.kernel
    if not (1 <= schedule.taps_h <= kh and 1 <= schedule.taps_w <= kw):
        return f"the kernel has {kh} x {kw} taps"
    sums = schedule.taps_h * schedule.taps_w * max(schedule.channels) * _width(dtype)
    if sums > WGRAD_REGISTERS:
        return f"{sums} registers of sums; {WGRAD_REGISTERS} leave room for operands"
    if schedule.positions not in (1, _positions(geometry, dtype, schedule.taps_w)):
        return f"the window of {schedule.positions} positions takes too many registers"
    return ""


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


def _wgrad_prediction(plan: KernelPlan, problem: Problem, gpu: Gpu) -> Prediction:
    """Time of a call: multiply-adds, and the loads of windows and coarse values beside them."""
    geometry, schedule = plan.geometry, plan.schedule
    width = _width(plan.dtype)
    coarse = problem.coarse_channels // geometry.groups
    fine = problem.fine_channels // geometry.groups
    channels = min(schedule.channels, key=lambda c: (-(-coarse // c) * c, -c))
    kd, kh, kw = geometry.kernel
    window = _window(schedule.taps_w, schedule.positions, geometry.stride[2], geometry.dilation[2])
    # A thread's step: some positions, its taps, its channels.
    sums = schedule.positions * schedule.taps_h * schedule.taps_w * channels
    loads = schedule.taps_h * window.used.bit_count() + schedule.positions * channels / 4
    arithmetic = sums / (4 if width == 1 else gpu.fp64_warps)
    shared = loads * width
    issue = (sums + loads + 10) / 4
    clocks = max(arithmetic, shared, issue) + 0.2 * (arithmetic + shared + issue)
    units = kd * -(-kh // schedule.taps_h) * -(-kw // schedule.taps_w)
    units *= -(-coarse // channels) * fine * geometry.groups
    d, h, w = problem.coarse_extent
    steps = problem.batch * d * h * -(-w // schedule.positions) * units / 32
    ms = steps * clocks / gpu.multiprocessors / gpu.ghz * 1e-6 + 0.01
    floor = memory_ms(geometry, problem, DTYPES[plan.dtype].size_bytes, gpu)
    return Prediction(ms, "arithmetic") if ms > floor else Prediction(floor, "memory")


class Simt:
    """See :class:`convgen.engines.Engine`."""

    name = "simt"
    backend = "cuda"
    headers: Mapping[str, str] = {
        "convgen_abi.h": "common/convgen_abi.h",
        "device.cuh": "cuda/device.cuh",
        "common.cuh": "cuda/simt/common.cuh",
        "gather.cuh": "cuda/simt/gather.cuh",
        "wgrad.cuh": "cuda/simt/wgrad.cuh",
        "depthwise.cuh": "cuda/simt/depthwise.cuh",
    }

    def plan(self, geometry: Geometry, contraction: str, dtype: str) -> KernelPlan:
        schedule: GatherSchedule | WgradSchedule
        if contraction == "wgrad":
            schedule = _wgrad_schedule(geometry, dtype)
        else:
            schedule = _gather_schedule(geometry, contraction, dtype)
        return KernelPlan(geometry, contraction, dtype, self.name, schedule)

    def space(self, geometry: Geometry, contraction: str, dtype: str) -> list[Candidate]:
        default = self.plan(geometry, contraction, dtype).schedule
        most = CHANNELS_PER_THREAD // _width(dtype)
        sizes = {default.channels} | {(c,) for c in (1, 2, 4, 8, 16) if c <= 2 * most}
        schedules: list[Any]
        if contraction == "wgrad":
            _, kh, kw = geometry.kernel
            schedules = [
                WgradSchedule(taps_h, taps_w, positions, channels)
                for taps_h, taps_w, positions, channels in product(
                    sorted({-(-kh // n) for n in range(1, kh + 1)}),
                    sorted({-(-kw // n) for n in range(1, kw + 1)}),
                    (1, POSITIONS),
                    sorted(sizes),
                )
            ]
        else:
            schedules = [
                replace(default, unroll=style, rows=rows, channels=channels)
                for style, rows, channels in product(STYLES, (1, 2, 4, 8), sorted(sizes))
            ]
        plans = [
            KernelPlan(geometry, contraction, dtype, self.name, schedule)
            for schedule in dict.fromkeys([default, *schedules])
        ]
        return [Candidate(plan.schedule, self.refusal(plan)) for plan in plans]

    def refusal(self, plan: KernelPlan, architectures: Iterable[str] = ()) -> str:
        if plan.contraction == "wgrad":
            return _wgrad_refusal(plan.geometry, plan.dtype, plan.schedule)
        return _refusal(plan.geometry, plan.contraction, plan.dtype, plan.schedule)

    def combine(self, choices: Sequence[tuple[KernelPlan, Problem]]) -> None:
        return None

    def predict(self, plan: KernelPlan, problem: Problem, gpu: Gpu) -> Prediction:
        # Whatever the schedule: it is of the other kernels.
        if depthwise := depthwise_prediction(
            plan.geometry, plan.contraction, problem, gpu, DTYPES[plan.dtype].size_bytes
        ):
            return depthwise
        if plan.contraction == "wgrad":
            return _wgrad_prediction(plan, problem, gpu)
        width = _width(plan.dtype)
        fprop = plan.contraction == "fprop"
        outputs = problem.coarse_channels if fprop else problem.fine_channels
        inputs = problem.fine_channels if fprop else problem.coarse_channels
        per_group = outputs // plan.geometry.groups
        channels = min(plan.schedule.channels, key=lambda c: (-(-per_group // c) * c, -c))
        warp = Warp(
            lanes=32,
            channels=channels,
            warps=12,
            load=(width, 1),
            # Rows of weights are read four words at a time, by all lanes alike.
            weight=(-(-channels * width // 4), -(-channels * width // 4)),
            tap_clocks=channels / (4 if width == 1 else gpu.fp64_warps),
            tap_instructions=channels,
            words=inputs // plan.geometry.groups,
            weight_bytes=4 * width * channels,
            staged_words=1,
            staged_clocks=15,
        )
        size_bytes = DTYPES[plan.dtype].size_bytes
        return gather_prediction(
            plan, problem, gpu, warp, element_bytes=size_bytes, word_bytes=4 * width
        )

    def read_schedule(self, contraction: str, fields: Mapping[str, Any]) -> Any:
        return schedule_from(WgradSchedule if contraction == "wgrad" else GatherSchedule, fields)

    def template(self, contraction: str) -> str:
        return "cuda/simt/wgrad.cu.j2" if contraction == "wgrad" else "cuda/simt/gather.cu.j2"

    def context(self, plan: KernelPlan) -> dict[str, Any]:
        types = {"f32": "float", "f64": "double", "f16": "half", "bf16": "bfloat16"}
        common = {
            "element": types[plan.dtype],
            "acc": types[DTYPES[plan.dtype].accumulator],
            "depthwise": depthwise_context(plan.geometry, plan.contraction, _width(plan.dtype)),
        }
        if plan.contraction == "wgrad":
            schedule: WgradSchedule = plan.schedule
            g = plan.geometry
            window = _window(schedule.taps_w, schedule.positions, g.stride[2], g.dilation[2])
            return common | {"window": window}
        return common | gather_context(plan.geometry, plan.contraction, plan.schedule)


ENGINE = Simt()
