"""wgrad by plain arithmetic: ``templates/cuda/simt/wgrad.cuh``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any

from convgen.engines.cost import FP32_WARPS, Gpu, Prediction, memory_ms
from convgen.engines.family import Candidate, Family, Plan
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
from convgen.spec.documents import Length, Range
from convgen.spec.dtypes import DTYPES
from convgen.spec.geometry import Geometry

# wgrad's sums per thread, in 32-bit registers, and the neighbouring positions that it unrolls.
WGRAD_REGISTERS = 72
POSITIONS = 4
# wgrad's window of a row: bits of its mask, and registers (in 32-bit ones) that it may take.
MAX_WINDOW = 64
MAX_WINDOW_LOADS = 28

Taps = Annotated[int, Range(1, WGRAD_REGISTERS)]


@dataclass(frozen=True)
class WgradSchedule:
    """wgrad: ``taps_h x taps_w`` taps times ``channels`` coarse channels per thread.

    ``positions`` neighbouring coarse positions along W are unrolled.
    """

    taps_h: Taps
    taps_w: Taps
    positions: Annotated[int, Range(1, POSITIONS)]
    channels: Annotated[tuple[Annotated[int, Range(1, WGRAD_REGISTERS)], ...], Length(1, 8)]


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


def _window(geometry: Geometry, taps: int, positions: int) -> Window:
    stride, dilation = geometry.stride[2], geometry.dilation[2]
    if positions == 1:
        return Window(taps, dilation, (1 << taps) - 1, 1)
    used = 0
    for p in range(positions):
        for w in range(taps):
            used |= 1 << (p * stride + w * dilation)
    return Window(used.bit_length(), 1, used, dilation)


def _positions(problem: Problem, taps_w: int) -> int:
    """Neighbouring positions to unroll: several where their window fits."""
    window = _window(problem.geometry, taps_w, POSITIONS)
    loads = window.used.bit_count()
    fits = window.count <= MAX_WINDOW and loads <= MAX_WINDOW_LOADS // problem.accumulator_registers
    return POSITIONS if fits else 1


def _default(problem: Problem) -> WgradSchedule:
    """The largest block of taps that fits."""
    geometry = problem.geometry
    width = problem.accumulator_registers
    most = CHANNELS_PER_THREAD // width
    budget = WGRAD_REGISTERS // (most * width)  # taps per thread
    _, kh, kw = geometry.kernel
    taps_w = -(-kw // -(-kw // budget))
    taps_h = max(1, min(kh, budget // taps_w))
    taps_h = -(-kh // -(-kh // taps_h))
    channels = channel_blocks(geometry.coarse_channels_per_group, geometry.groups, most)
    return WgradSchedule(taps_h, taps_w, _positions(problem, taps_w), channels)


def _refusal(problem: Problem, schedule: WgradSchedule) -> str:
    """Why wgrad cannot have a schedule; empty if it can."""
    _, kh, kw = problem.geometry.kernel
    if not (1 <= schedule.taps_h <= kh and 1 <= schedule.taps_w <= kw):
        return f"the kernel has {kh} x {kw} taps"
    if refusal := channels_refusal(schedule.channels, problem):
        return refusal
    sums = (
        schedule.taps_h * schedule.taps_w * max(schedule.channels) * problem.accumulator_registers
    )
    if sums > WGRAD_REGISTERS:
        return f"{sums} registers of sums; {WGRAD_REGISTERS} leave room for operands"
    if schedule.positions not in (1, _positions(problem, schedule.taps_w)):
        return f"the window of {schedule.positions} positions takes too many registers"
    return ""


class SimtWgrad(Family[WgradSchedule]):
    """wgrad: see :class:`convgen.engines.family.Family`."""

    name = NAME
    backend = "cuda"
    contractions = ("wgrad",)
    kinds = DTYPES
    schedule_type = WgradSchedule
    template = "cuda/simt/wgrad.cu.j2"
    headers = HEADERS

    def default(self, problem: Problem) -> WgradSchedule:
        return _default(problem)

    def candidates(self, problem: Problem) -> list[Candidate[WgradSchedule]]:
        default = _default(problem)
        _, kh, kw = problem.geometry.kernel
        schedules = [
            WgradSchedule(taps_h, taps_w, positions, channels)
            for taps_h, taps_w, positions, channels in product(
                sorted({-(-kh // n) for n in range(1, kh + 1)}),
                sorted({-(-kw // n) for n in range(1, kw + 1)}),
                (1, POSITIONS),
                channel_choices(default.channels, problem),
            )
        ]
        return [
            Candidate(schedule, _refusal(problem, schedule))
            for schedule in dict.fromkeys([default, *schedules])
        ]

    def refusal(self, plan: Plan[WgradSchedule], architectures: Iterable[str] = ()) -> str:
        return _refusal(plan.problem, plan.schedule)

    def predict(self, plan: Plan[WgradSchedule], call: Call, gpu: Gpu) -> Prediction:
        """Multiply-adds, and the loads of windows and coarse values beside them."""
        geometry, schedule = plan.geometry, plan.schedule
        width = plan.problem.accumulator_registers
        coarse = call.coarse_channels // geometry.groups
        fine = call.fine_channels // geometry.groups
        channels = best_block(schedule.channels, coarse)
        kd, kh, kw = geometry.kernel
        window = _window(geometry, schedule.taps_w, schedule.positions)
        # A thread's step: some positions, its taps, its channels.
        sums = schedule.positions * schedule.taps_h * schedule.taps_w * channels
        loads = schedule.taps_h * window.used.bit_count() + schedule.positions * channels / 4
        arithmetic = sums / (FP32_WARPS if width == 1 else gpu.fp64_warps)
        shared = loads * width
        issue = (sums + loads + 10) / 4
        clocks = max(arithmetic, shared, issue) + 0.2 * (arithmetic + shared + issue)
        units = kd * -(-kh // schedule.taps_h) * -(-kw // schedule.taps_w)
        units *= -(-coarse // channels) * fine * geometry.groups
        d, h, w = call.coarse_extent
        steps = call.batch * d * h * -(-w // schedule.positions) * units / 32
        ms = steps * clocks / gpu.multiprocessors / gpu.ghz * 1e-6 + 0.01
        floor = memory_ms(plan.problem, call, gpu)
        return Prediction(ms, "arithmetic") if ms > floor else Prediction(floor, "memory")

    def context(self, plan: Plan[WgradSchedule]) -> dict[str, Any]:
        schedule = plan.schedule
        window = _window(plan.geometry, schedule.taps_w, schedule.positions)
        pointwise = may_be_pointwise(plan.geometry)
        return types_of(plan.problem) | {"window": window, "pointwise": pointwise}


WGRAD = SimtWgrad()
