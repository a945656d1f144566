"""The ``simt`` engine: register-tiled FFMA kernels for any CUDA GPU since sm_75.

fprop and dgrad share one kernel (a gather, see ``templates/cuda/simt/gather.cuh``); wgrad has its
own. The schedule below is what the specification decides at generation time; tile extents depend
on the call and are chosen at launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from convgen.dtypes import DTYPES
from convgen.engines import KernelPlan
from convgen.engines.gather import GatherSchedule, arrange, gather_axes, gather_context
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


def _gather_schedule(geometry: Geometry, contraction: str, dtype: str) -> GatherSchedule:
    width = DTYPES[DTYPES[dtype].accumulator].size_bytes // 4
    axes = gather_axes(geometry, contraction)
    r, y, x = arrange(axes)
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
    row_axis = "scattered" if scattered else r.name
    tile_bytes = 4 * width

    def fits(style: str) -> bool:
        """Whether a style keeps its code, its registers and its smallest tile small enough."""
        taps_r, span_r = (sum(r.counts), max(r.spans)) if style == "taps" else (1, 0)
        if taps_r * sum(y.counts) * sum(x.counts) * rows * max(channels) > UNROLL_LIMIT:
            return False
        planes = (rows - 1) * (r.step if style == "taps" else 1) + span_r + 1
        if planes * width > MAX_COLUMN_REGISTERS:
            return False
        # 32 lanes in a strip 8 wide: five lines.
        lines = 4 * y.step + max(y.spans) + 1
        columns = 7 * x.step + max(x.spans) + 1
        return planes * lines * columns * tile_bytes <= TILE_LIMIT_BYTES

    if len(x.phases) > MAX_VARIANTS or max(x.counts) > LINE_LIMIT:
        style = "none"
    elif scattered:
        style = "line"
    else:
        style = next((s for s in ("taps", "plane") if fits(s)), "line")
    return GatherSchedule(style, row_axis, rows, variants, channels)


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
    headers: Mapping[str, str] = {
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
        return "cuda/simt/wgrad.cu.j2" if contraction == "wgrad" else "cuda/simt/gather.cu.j2"

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
        return common | gather_context(plan.geometry, plan.contraction, plan.schedule)


ENGINE = Simt()
