"""Which layers and calls are depthwise, and what bounds them.

The kernels are in ``templates/cuda/simt/depthwise.cuh``; they serve groups with one channel of the
tensor that is read (for wgrad, of either) beside those for any number of channels.
"""

from __future__ import annotations

from collections.abc import Mapping

from convgen.engines.cost import Gpu, Prediction, memory_ms
from convgen.engines.problem import Call, Problem
from convgen.spec.geometry import Geometry

NAME = "depthwise"
HOST = "simt"

HEADERS: Mapping[str, str] = {
    "depthwise.cuh": "cuda/simt/depthwise.cuh",
    "depthwise_last.cuh": "cuda/simt/depthwise_last.cuh",
}

# Longer windows that no neighbours share go to the other kernels, which stage them.
LONGEST_LINE = 8
# Channels of a group of the one tensor for one of the other (DEPTHWISE_RATIO in depthwise.cuh).
MOST_CHANNELS = 2
# Registers of 16 bytes of channels, for calls in channels_last: see ``depthwise_last.cuh``.
LAST_CHANNELS = 4
# 32-bit registers of sums, and of these and what a line of a window is held in, of such calls.
LAST_SUMS = 64
LAST_REGISTERS = 128
# Warps of columns of a step, where neighbours along H share nothing.
BLOCKS_W = 4


def refusal_of(geometry: Geometry, read: tuple[int | None, ...]) -> str:
    """Why no call can be depthwise; empty if one may be.

    ``read`` are the channels per group of the tensors of which one must have a single one.
    """
    if geometry.groups == 1 or all(count not in (None, 1) for count in read):
        return "groups have several channels"
    most = max(count or 1 for count in geometry.channels_per_group)
    if most > MOST_CHANNELS:
        return f"{most} channels of a group; {MOST_CHANNELS} share what is read"
    if geometry.kernel[:2] == (1, 1) and geometry.kernel[2] > LONGEST_LINE:
        return f"no neighbours share a line of {geometry.kernel[2]} taps"
    return ""


def ratios_of(geometry: Geometry) -> list[tuple[int, int]]:
    """Coarse and fine channels of a group that depthwise calls may have."""
    coarse, fine = geometry.channels_per_group
    counts = range(1, MOST_CHANNELS + 1)
    return [
        (a, b)
        for a in counts
        for b in counts
        if min(a, b) == 1 and coarse in (None, a) and fine in (None, b)
    ]


def channels_of(problem: Problem, call: Call) -> tuple[int, int]:
    """Coarse and fine channels of a group."""
    groups = problem.geometry.groups
    return call.coarse_channels // groups, call.fine_channels // groups


def prediction(
    problem: Problem, call: Call, gpu: Gpu, *, positions: int, lines: float, shared: int
) -> Prediction:
    """The bytes, and what passes through level 1.

    Of a load that does not begin at a line of 128 bytes, two of them. A position's thread reads
    ``lines`` of them, which ``shared`` neighbours along D and H share.
    """
    geometry = problem.geometry
    pairs = call.batch * geometry.groups * max(channels_of(problem, call))
    loads = lines * ((shared + 2) / (3 * shared) if shared > 1 else 1)
    wavefronts = pairs * positions / 32 * loads * 5 / 3 * geometry.stride[2]
    level1 = wavefronts / gpu.multiprocessors / gpu.ghz * 1e-6
    memory = memory_ms(problem, call, gpu)
    return Prediction(memory + level1 + 0.005, "memory" if memory > level1 else "level 1")
