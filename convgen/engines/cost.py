"""What a schedule is expected to take: a model from counts of work, bytes and thread blocks.

The model needs no GPU. It picks defaults and prunes what ``convgen tune`` compiles; times are
right within a factor of about 1.5, orders of schedules of one layer better (``docs/kernels.md``
has predictions beside measurements). All units are clocks of one multiprocessor until the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from convgen.engines.problem import Call, Problem
from convgen.spec.geometry import Geometry, Triple


@dataclass(frozen=True)
class Gpu:
    """What the model knows of a GPU. Bytes per clock are of one multiprocessor, all at work."""

    name: str
    multiprocessors: int
    ghz: float
    product_clocks: float
    """From one ``mma.sync`` (m16n8k8 in TF32, m16n8k16 in 16 bits) to the next."""
    fp64_warps: float
    """Warps' fp64 multiply-adds per clock; of fp32 there are four."""
    level2_bytes: float
    memory_bytes_per_s: float
    shared_bytes: int
    """Shared memory that a thread block may have."""
    grouped_product_clocks: float = 0.0
    """As ``product_clocks``, in products of four warps (``wgmma``); 0 where there are none."""


H200 = Gpu("NVIDIA H200", 132, 1.75, 1.5, 2.0, 28.0, 4.2e12, 227 << 10, 1.0)
GPUS: dict[int, Gpu] = {
    75: Gpu("NVIDIA T4", 40, 1.35, 4.0, 0.0625, 28.0, 3.0e11, 64 << 10),
    80: Gpu("NVIDIA A100", 108, 1.41, 2.0, 1.0, 28.0, 1.7e12, 163 << 10),
    86: Gpu("NVIDIA RTX A6000", 84, 1.75, 8.0, 0.0625, 24.0, 7.0e11, 99 << 10),
    89: Gpu("NVIDIA L40S", 142, 2.2, 4.0, 0.0625, 24.0, 8.0e11, 99 << 10),
    90: H200,
    100: Gpu("NVIDIA B200", 148, 1.85, 1.5, 2.0, 28.0, 7.0e12, 227 << 10),
    120: Gpu("NVIDIA RTX PRO 6000", 188, 2.3, 4.0, 0.0625, 24.0, 1.6e12, 99 << 10),
}
"""By compute capability times ten: one GPU of each, from its data sheet but for the H200, whose
rates are measured."""


@dataclass(frozen=True)
class Prediction:
    """Expected time of one call, and what bounds it."""

    ms: float
    bound: str


@dataclass(frozen=True)
class Work:
    """Clocks of one step of all warps of a multiprocessor, by the unit that they occupy."""

    arithmetic: float
    shared: float
    issue: float
    level2: float
    staging: float

    def overlapped(self) -> tuple[float, str]:
        """Together: the longest, and a fifth of the others, which overlap incompletely."""
        parts = {
            "arithmetic": self.arithmetic,
            "shared memory": self.shared,
            "instructions": self.issue,
            "level 2": self.level2,
            "staging": self.staging,
        }
        bound = max(parts, key=lambda name: parts[name])
        return parts[bound] + 0.2 * (sum(parts.values()) - parts[bound]), bound


def typical_calls(geometry: Geometry) -> list[Call]:
    """Calls to plan for where nothing but the geometry is known.

    64 coarse positions along each axis that has a kernel, and 32 or 48 channels of a group.
    """
    plain = zip(geometry.kernel, geometry.stride, strict=True)
    extent = [1 if k == 1 and s == 1 else 64 for k, s in plain]
    if math.prod(extent) == 1:
        extent = [64, 64, 64]
    fine_extent = [
        max(1, (e - 1) * s + d * (k - 1) + 1 - 2 * p)
        for e, s, d, k, p in zip(
            extent,
            geometry.stride,
            geometry.dilation,
            geometry.kernel,
            geometry.padding,
            strict=True,
        )
    ]
    batch = max(1, 64**3 // math.prod(extent))
    known = geometry.coarse_channels_per_group, geometry.fine_channels_per_group
    counts = dict.fromkeys((known[0] or count, known[1] or count) for count in (32, 48))
    return [
        Call(
            batch,
            coarse * geometry.groups,
            fine * geometry.groups,
            _triple(extent),
            _triple(fine_extent),
        )
        for coarse, fine in counts
    ]


def memory_ms(problem: Problem, call: Call, gpu: Gpu) -> float:
    """The least time for a contraction's bytes: every tensor once."""
    geometry = problem.geometry
    elements = call.batch * (
        call.coarse_channels * math.prod(call.coarse_extent)
        + call.fine_channels * math.prod(call.fine_extent)
    )
    elements += call.coarse_channels * call.fine_channels // geometry.groups * geometry.taps
    return 1e3 * elements * problem.element_bytes / gpu.memory_bytes_per_s


OVERRULES = 0.85
"""A call takes another cut or tile than a simple rule's if it is expected to take so much less (in
``simt/gather.cuh``: BestCut)."""


def overrule(ruled: Prediction, others: Sequence[Prediction]) -> Prediction:
    """The rule's choice, unless another is expected to take less by the margin."""
    fastest = min(others, key=lambda other: other.ms, default=ruled)
    return fastest if fastest.ms < OVERRULES * ruled.ms else ruled


def _triple(values: Sequence[int]) -> Triple:
    d, h, w = values
    return d, h, w
