"""What fprop, dgrad and wgrad have in common here.

Schedules are what the specification decides at generation time; tile extents depend on the call and
are chosen at launch.
"""

from __future__ import annotations

from collections.abc import Mapping

from convgen.engines.problem import Problem
from convgen.spec.dtypes import DTYPES
from convgen.spec.geometry import Geometry

NAME = "simt"

HEADERS: Mapping[str, str] = {
    "convgen_abi.h": "common/convgen_abi.h",
    "device.cuh": "cuda/device.cuh",
    "gpu_rates.cuh": "cuda/gpu_rates.cuh.j2",
    "common.cuh": "cuda/simt/common.cuh",
    "meeting.cuh": "cuda/meeting.cuh",
    "gather_tiling.cuh": "cuda/simt/gather_tiling.cuh",
    "gather.cuh": "cuda/simt/gather.cuh",
    "wgrad.cuh": "cuda/simt/wgrad.cuh",
    "transpose.cuh": "cuda/simt/transpose.cuh",
    "depthwise.cuh": "cuda/simt/depthwise.cuh",
    "pointwise.cuh": "cuda/simt/pointwise.cuh",
}

CHANNELS_PER_THREAD = 8

# Channels of a tensor that has few of them, for kernels of one tap (POINTWISE_FEW in
# pointwise.cuh).
POINTWISE_FEW = 8

_TYPES = {"f32": "float", "f64": "double", "f16": "half", "bf16": "bfloat16"}


def channel_blocks(per_group: int | None, groups: int, most: int) -> tuple[int, ...]:
    """Channels per thread to compile: the least padding if the count is known, else two sizes."""
    if per_group is not None:
        return (min(most, 1 << (per_group - 1).bit_length()),)
    return (most,) if groups == 1 else (most, 1)


def channel_choices(default: tuple[int, ...], problem: Problem) -> list[tuple[int, ...]]:
    """Lists of channels per thread that a tuned schedule may compile."""
    most = CHANNELS_PER_THREAD // problem.accumulator_registers
    return sorted({default} | {(c,) for c in (1, 2, 4, 8, 16) if c <= 2 * most})


def channels_refusal(channels: tuple[int, ...], problem: Problem) -> str:
    """Why these are no channels per thread to compile; empty if they are."""
    most = 2 * CHANNELS_PER_THREAD // problem.accumulator_registers
    if len(set(channels)) < len(channels):
        return "the same number of channels is compiled once"
    return f"a thread has at most {most} channels" if max(channels) > most else ""


def best_block(blocks: tuple[int, ...], channels: int) -> int:
    """The compiled channels per thread that a call takes: the fewest that hold all, else the most.

    ``channels_per_thread`` of the templates finds the same.
    """
    return min((block for block in blocks if block >= channels), default=max(blocks))


def may_be_pointwise(geometry: Geometry) -> bool:
    """Whether a call in channels_last may be for ``pointwise.cuh``: one tap, and few channels."""
    known = [count for count in geometry.channels_per_group if count is not None]
    one_tap = geometry.taps == 1 and max(geometry.stride) == 1 and max(geometry.padding) == 0
    return geometry.groups == 1 and one_tap and (len(known) < 2 or min(known) <= POINTWISE_FEW)


def types_of(problem: Problem) -> dict[str, str]:
    """The C++ types of elements and sums."""
    accumulator = DTYPES[problem.kind].accumulator
    return {"element": _TYPES[problem.kind], "acc": _TYPES[accumulator]}
