"""What the implicit GEMMs of fprop, dgrad and wgrad have in common.

Their kernels (``templates/cuda/implicit_gemm``) are of sm_90a, and of gathers there are others for
all GPUs since sm_80 (``multistage.cuh``). Everything about a call but the sizes of tiles that are
compiled is chosen when it is made, by ``host.cuh`` and ``multistage_host.cuh``; what stands here is
the same arithmetic for the sizes of sm_90a alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from convgen.engines.problem import Problem
from convgen.spec.geometry import Geometry, Triple

NAME = "implicit_gemm"
SUFFIX = "_implicit_gemm"

HEADERS: Mapping[str, str] = {
    "convgen_abi.h": "common/convgen_abi.h",
    "device.cuh": "cuda/device.cuh",
    "gpu_rates.cuh": "cuda/gpu_rates.cuh.j2",
    "common.cuh": "cuda/simt/common.cuh",
    "transpose.cuh": "cuda/simt/transpose.cuh",
    "pipeline.cuh": "cuda/pipeline.cuh",
    "mma.cuh": "cuda/mma/mma.cuh",
    "tf32.cuh": "cuda/mma/tf32.cuh",
    **{
        f"implicit_gemm/{name}": f"cuda/implicit_gemm/{name}"
        for name in (
            "sm90.cuh",
            "phases.cuh",
            "tiles.cuh",
            "epilogue.cuh",
            "split.cuh",
            "kernel.cuh",
            "maps.cuh",
            "pack.cuh",
            "call.cuh",
            "turned.cuh",
            "choice.cuh",
            "host.cuh",
            "either.cuh",
            "patches.cuh",
            "patches_host.cuh",
            "multistage_epilogue.cuh",
            "multistage.cuh",
            "multistage_host.cuh",
        )
    },
}
WGRAD_TAPS_HEADERS: Mapping[str, str] = {
    **HEADERS,
    **{
        f"implicit_gemm/{name}": f"cuda/implicit_gemm/{name}"
        for name in (
            "deal.cuh",
            "wgrad.cuh",
            "tap_blocks.cuh",
            "tap_floats.cuh",
            "wgrad_taps.cuh",
            "wgrad_packs.cuh",
            "wgrad_taps_host.cuh",
            "wgrad_patches_host.cuh",
        )
    },
}

WGRAD_HEADERS: Mapping[str, str] = {
    **WGRAD_TAPS_HEADERS,
    "implicit_gemm/wgrad_host.cuh": "cuda/implicit_gemm/wgrad_host.cuh",
}

WGRAD_QUARTERS_HEADERS: Mapping[str, str] = {
    **HEADERS,
    "meeting.cuh": "cuda/meeting.cuh",
    **{
        f"implicit_gemm/{name}": f"cuda/implicit_gemm/{name}"
        for name in (
            "deal.cuh",
            "wgrad.cuh",
            "quarters.cuh",
            "wgrad_quarters.cuh",
            "wgrad_quarters_host.cuh",
        )
    },
}

WGRAD_TAPS_OR_QUARTERS_HEADERS: Mapping[str, str] = {
    **WGRAD_TAPS_HEADERS,
    **WGRAD_QUARTERS_HEADERS,
}

LEAST_CHANNELS = 16
"""Of a group, of either tensor: with fewer, products of 64 x 16 elements are mostly padding."""

FEW_CHANNELS = 32
"""Below it, packed windows have fewer K blocks than single taps have."""
LEAST_PATCH_TAPS, MOST_PATCH_TAPS = 9, 1024
"""Of a window: of a layer whose channels are not known, and that a tile has room for."""

ROW_BYTES = 128
"""Of a position's channels in shared memory: a K block."""
STEP_BYTES = 32
"""Of K in one product."""
BLOCK_M = 64
"""Output channels of a warpgroup."""
MAX_STEP = 8
"""Of TMA, from one element that it loads to the next."""


def by_taps(g: Geometry) -> bool:
    """Whether wgrad multiplies a tap at a time: neighbours share nothing of what is loaded."""
    return max(g.stride) > 1 or g.kernel[1] * g.kernel[2] == 1


def has_patches(problem: Problem) -> bool:
    """Whether windows are rows of a matrix, and a layer is packed into one (``patches.cuh``).

    That is for windows that neither overlap nor leave gaps, of few channels: the other kernels
    multiply whole rows of channels for each tap, and pack as much. What has channels that are not
    known, and few taps, may well have many.
    """
    g = problem.geometry
    coarse, fine = g.coarse_channels_per_group, g.fine_channels_per_group
    if g.kernel != g.stride or max(g.padding) > 0 or max(g.dilation) > 1 or g.groups > 1:
        return False
    if not 1 < g.taps <= MOST_PATCH_TAPS or (coarse or LEAST_CHANNELS) < LEAST_CHANNELS:
        return False
    if fine is None:
        return g.taps >= LEAST_PATCH_TAPS
    return fine * g.taps >= LEAST_CHANNELS and (fine < FEW_CHANNELS or bool(refuses_taps(problem)))


def refuses_taps(problem: Problem) -> str:
    """Why no kernel that loads each tap's positions by themselves suits a layer; else empty."""
    if reason := accepts(problem):
        return reason
    stride = problem.geometry.stride
    if (count := phases(problem)) > MOST_PHASES:
        return f"{count} phases: a kernel has maps for up to {MOST_PHASES}"
    if problem.contraction != "dgrad" and max(stride) > MAX_STEP:
        return f"TMA steps over up to {MAX_STEP} elements, not {max(stride)}"
    return ""


MOST_TAP_BITS = 64
"""Of a mask that says which taps along D, H and W a position meets."""


def refuses_multistage(problem: Problem) -> str:
    """Why a gather has no kernels for GPUs other than Hopper (``multistage.cuh``); else empty."""
    if reason := refuses_taps(problem):
        return reason
    if problem.kind == SPLIT:
        return "they round operands to TF32"
    if sum(problem.geometry.kernel) > MOST_TAP_BITS:
        return f"a mask of taps has {MOST_TAP_BITS} bits"
    return ""


ELEMENTS = {"tf32": "float", "tf32x3": "float", "f16tc": "half", "bf16tc": "bfloat16"}
"""The C++ types of elements, by math mode."""
SPLIT = "tf32x3"
"""The mode whose elements are sums of two TF32 values."""
WGRAD_TAPS_KINDS = tuple(kind for kind in ELEMENTS if kind != SPLIT)
"""Modes with wgrad a tap at a time, and of patches."""


def accepts(problem: Problem) -> str:
    """Why a layer's channels do not suit these kernels; empty if they do, or may."""
    coarse, fine = problem.geometry.channels_per_group
    known = [count for count in (coarse, fine) if count is not None]
    if known and min(known) < LEAST_CHANNELS:
        return f"groups of {min(known)} channels leave products of 64 rows empty"
    return ""


def parts(problem: Problem) -> int:
    """TF32 values that an element is multiplied as; a product of two has three then."""
    return 2 if problem.kind == SPLIT else 1


MOST_PHASES = 16
"""Of a strided dgrad: a kernel is given a tensor map of its output for each."""


def phases(problem: Problem) -> int:
    """Of a strided dgrad: gathers of stride 1 that its outputs are divided into; else 1."""
    return math.prod(problem.geometry.stride) if problem.contraction == "dgrad" else 1


def gather_padding(problem: Problem) -> Triple:
    """Padding of the contraction as a gather: dgrad of stride 1 reads its taps in reverse."""
    g = problem.geometry
    if problem.contraction != "dgrad" or phases(problem) > 1:
        return g.padding
    d, h, w = (
        dilation * (kernel - 1) - padding
        for dilation, kernel, padding in zip(g.dilation, g.kernel, g.padding, strict=True)
    )
    return d, h, w


def context_of(problem: Problem) -> dict[str, Any]:
    """What both templates are given."""
    return {
        "element": ELEMENTS[problem.kind],
        "parts": parts(problem),
        "gather_padding": gather_padding(problem),
        "phases": phases(problem),
        "patches": has_patches(problem),
        "by_taps": not refuses_taps(problem),
        "multistage": not refuses_multistage(problem),
    }
