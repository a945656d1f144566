"""Depthwise layers in the ``simt`` engine: how much a thread computes, and what a template renders.

The kernels are in ``templates/cuda/simt/depthwise.cuh``; they serve groups with one channel of the
tensor that is read (for wgrad, of either) beside those for any number of channels.
"""

from __future__ import annotations

import math
from typing import Any

from convgen.engines.cost import Gpu, Prediction, Problem, memory_ms
from convgen.engines.gather import Axis, first_offset, gather_axes
from convgen.spec import Geometry, Triple

# Sums of a thread, in 32-bit registers: of a gather, so that neighbouring outputs share what they
# read; of wgrad, whose taps beyond go to other blocks.
GATHER_REGISTERS = 16
WGRAD_REGISTERS = 64
# Multiply-adds that a step unrolls, twice: for steps at the border, and others.
UNROLL_LIMIT = 1500
# Longer windows that no neighbours share go to the other kernels, which stage them.
LONGEST_LINE = 8
# Channels of a group of the one tensor for one of the other (DEPTHWISE_RATIO in depthwise.cuh).
MOST_CHANNELS = 2
# Warps of columns of a step, where neighbours along H share nothing.
BLOCKS_W = 4
# Positions along H of a step of wgrad.
ROWS = 4


def depthwise_context(geometry: Geometry, contraction: str, width: int) -> dict[str, Any] | None:
    """What the templates are given; None where no call can take these kernels.

    ``width`` is that of a sum, in registers.
    """
    coarse, fine = geometry.coarse_channels_per_group, geometry.fine_channels_per_group
    read = {"fprop": (fine,), "dgrad": (coarse,), "wgrad": (coarse, fine)}[contraction]
    if geometry.groups == 1 or all(count not in (None, 1) for count in read):
        return None
    if max(coarse or 1, fine or 1) > MOST_CHANNELS:
        return None
    if geometry.kernel[:2] == (1, 1) and geometry.kernel[2] > LONGEST_LINE:
        return None
    if contraction == "wgrad":
        return _wgrad(geometry, width)
    axes = gather_axes(geometry, contraction)
    phases = [len(axis.phases) for axis in axes]
    rows = _rows(geometry, math.prod(phases), GATHER_REGISTERS // width)
    if rows is None:
        return None
    return {
        "rows": rows,
        "steps": [axis.step for axis in axes],
        "phases": phases,
        "first": [first_offset(axis) for axis in axes],
        "last": [_last(axis) for axis in axes],
        "counts": [axis.counts for axis in axes],
        "first_taps": [[p.taps[0].index if p.taps else 0 for p in axis.phases] for axis in axes],
        "first_offsets": [
            [p.taps[0].offset if p.taps else first_offset(axis) for p in axis.phases]
            for axis in axes
        ],
        "tap_steps": [_tap_step(axis) for axis in axes],
        "deltas": [axis.delta for axis in axes],
    }


def depthwise_prediction(
    geometry: Geometry, contraction: str, problem: Problem, gpu: Gpu, size_bytes: int
) -> Prediction | None:
    """Time of a call that these kernels serve; None of others.

    The bytes, and what passes through level 1: of a load that does not begin at a line of 128
    bytes, two of them.
    """
    coarse = problem.coarse_channels // geometry.groups
    fine = problem.fine_channels // geometry.groups
    read, computed = {"fprop": (fine, coarse), "dgrad": (coarse, fine)}.get(
        contraction, (min(coarse, fine), max(coarse, fine))
    )
    context = depthwise_context(geometry, contraction, width=1)
    if context is None or read != 1 or computed > MOST_CHANNELS:
        return None
    extent = problem.fine_extent if contraction == "dgrad" else problem.coarse_extent
    pairs = problem.batch * geometry.groups * computed
    # Lines that a position's thread reads: neighbours along D and H share them.
    loads = geometry.taps / (math.prod(geometry.stride) if contraction == "dgrad" else 1)
    shared = context["rows"] if contraction == "wgrad" else math.prod(context["rows"][:2])
    loads *= (shared + 2) / (3 * shared) if shared > 1 else 1
    wavefronts = pairs * math.prod(extent) / 32 * loads * 5 / 3 * geometry.stride[2]
    level1 = wavefronts / gpu.multiprocessors / gpu.ghz * 1e-6
    memory = memory_ms(geometry, problem, size_bytes, gpu)
    return Prediction(memory + level1 + 0.005, "memory" if memory > level1 else "level 1")


def _rows(geometry: Geometry, phases: int, budget: int) -> Triple | None:
    """Positions of a thread along D and H, and its warps of columns; None if one is too much."""
    kd, kh, _ = geometry.kernel

    def fits(d: int, h: int, w: int) -> bool:
        return d * h * w * phases <= budget and d * h * w * geometry.taps <= UNROLL_LIMIT

    if geometry.taps > UNROLL_LIMIT:
        return None
    # Without a window along H or D, neighbours along these share nothing.
    most_d, most_h = (2 if kd > 1 else 1), (8 if kh > 1 else 1)
    most_w = BLOCKS_W if kd == kh == 1 else 1
    choices = [
        (d, h, w)
        for d in range(1, most_d + 1)
        for h in (1, 2, 4, 8)
        for w in (1, 2, 4)
        if h <= most_h and w <= most_w and fits(d, h, w)
    ]
    return max(choices, key=lambda rows: (math.prod(rows), rows[1]), default=(1, 1, 1))


def _last(axis: Axis) -> int:
    """Greatest offset of all phases."""
    return max(first + span for first, span in zip(axis.first, axis.spans, strict=True))


def _tap_step(axis: Axis) -> int:
    """From tap to tap of a phase, in kernel elements."""
    steps = {p.taps[1].index - p.taps[0].index for p in axis.phases if len(p.taps) > 1}
    return steps.pop() if steps else 0


def _wgrad(geometry: Geometry, width: int) -> dict[str, Any]:
    taps = list(geometry.kernel)
    # Whole lines of taps rather than whole planes.
    for axis in range(3):
        others = math.prod(taps) // taps[axis]
        if others * taps[axis] * width > WGRAD_REGISTERS:
            most = max(1, WGRAD_REGISTERS // width // others)
            taps[axis] = -(-geometry.kernel[axis] // -(-geometry.kernel[axis] // most))
    return {
        "taps": taps,
        "parts": math.prod(-(-k // t) for k, t in zip(geometry.kernel, taps, strict=True)),
        "rows": ROWS if geometry.kernel[1] > 1 else 1,
        "blocks_w": BLOCKS_W if geometry.kernel[:2] == (1, 1) else 1,
    }
