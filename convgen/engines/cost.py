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
    """What the model knows of a GPU. Bytes per clock are of one multiprocessor, all at work.

    These are the only rates: the host's code is rendered with them (``cuda/gpu_rates.cuh.j2``).
    """

    name: str
    multiprocessors: int
    ghz: float
    product_clocks: float
    """From one ``mma.sync`` (m16n8k8 in TF32, m16n8k16 in 16 bits) to the next."""
    fp64_warps: float
    """Warps' fp64 multiply-adds per clock; of fp32 there are four."""
    level2_bytes: float
    level2_capacity_bytes: int
    memory_bytes_per_s: float
    copy_bytes: float
    """What a kernel that copies reads and writes."""
    shared_bytes: int
    """Shared memory that a thread block may have."""
    bulk_bytes: float
    """As ``level2_bytes``, by bulk copies (TMA); the same where that was not measured."""
    warpgroup_product_clocks: float = 0.0
    """As ``product_clocks``, in products of four warps (``wgmma``); 0 where there are none."""
    measured: bool = False
    """Whether the rates were; else they are the data sheet's."""

    @property
    def clocks_per_ms(self) -> float:
        return 1e6 * self.ghz


H200 = Gpu(
    name="NVIDIA H200",
    multiprocessors=132,
    ghz=1.75,
    product_clocks=1.5,
    fp64_warps=2.0,
    level2_bytes=28.0,
    level2_capacity_bytes=50 << 20,
    memory_bytes_per_s=4.2e12,
    copy_bytes=18.0,
    shared_bytes=227 << 10,
    bulk_bytes=36.0,
    warpgroup_product_clocks=1.0,
    measured=True,
)


def _from_data_sheet(
    name: str,
    multiprocessors: int,
    ghz: float,
    product_clocks: float,
    fp64_warps: float,
    level2: tuple[float, int],
    memory_bytes_per_s: float,
    shared_kib: int,
) -> Gpu:
    """A GPU that was not measured; ``level2`` are bytes per clock and MiB that stay there."""
    return Gpu(
        name,
        multiprocessors,
        ghz,
        product_clocks,
        fp64_warps,
        level2_bytes=level2[0],
        level2_capacity_bytes=level2[1] << 20,
        memory_bytes_per_s=memory_bytes_per_s,
        copy_bytes=round(memory_bytes_per_s / (multiprocessors * ghz * 1e9), 1),
        shared_bytes=shared_kib << 10,
        bulk_bytes=level2[0],
    )


GPUS: dict[int, Gpu] = {
    75: _from_data_sheet("NVIDIA T4", 40, 1.35, 4.0, 0.0625, (28.0, 4), 3.0e11, 64),
    80: _from_data_sheet("NVIDIA A100", 108, 1.41, 2.0, 1.0, (28.0, 40), 1.7e12, 163),
    86: _from_data_sheet("NVIDIA RTX A6000", 84, 1.75, 8.0, 0.0625, (24.0, 6), 7.0e11, 99),
    89: _from_data_sheet("NVIDIA L40S", 142, 2.2, 4.0, 0.0625, (24.0, 96), 8.0e11, 99),
    90: H200,
    100: _from_data_sheet("NVIDIA B200", 148, 1.85, 1.5, 2.0, (28.0, 126), 7.0e12, 227),
    120: _from_data_sheet("NVIDIA RTX PRO 6000", 188, 2.3, 4.0, 0.0625, (24.0, 128), 1.6e12, 99),
}
"""By compute capability times ten: one GPU of each."""


def gpu_of(capability: int) -> Gpu:
    """What is known of a compute capability times ten: of the nearest older one, else the oldest.

    ``gpu_rates`` of the templates finds the same.
    """
    return GPUS[max((each for each in GPUS if each <= capability), default=min(GPUS))]


# What the model and the host's code count alike, in clocks of a multiprocessor.
FP32_WARPS = 4
"""Warps' fp32 multiply-adds per clock."""
WARP_CLOCKS = 6.0
"""From one instruction of a warp to the next, as measured of producers."""
GATHER_TILE_CLOCKS = 600.0
"""Of a gather's tile: barriers and what they wait for, and its first stage."""
GATHER_STEP_CLOCKS = 60.0
"""Of its barriers after each step."""
STORED_BYTES, SPREAD_BYTES = 24.0, 12.0
"""Per clock: of a gather's outputs side by side, and of those with a stride of several phases."""
OVERLAP = 0.2
"""Of the work that is not the longest, what does not overlap with that."""
WARPGROUP_LATENCY = 200
"""Of four warps that multiply together: from the end of their products to the next ones."""
GEMM_TILE_CLOCKS = 5000.0
"""Of a tile of an implicit GEMM beside its products."""
GEMM_PROMOTION_CLOCKS = 60.0
"""Of a tap's sums that leave the tensor cores (3xTF32)."""
LAUNCH_CLOCKS = 3500.0
"""Of another kernel behind the first."""
QUARTER_COPY_BYTES = 16.0
"""Per clock: what packing quarters (``implicit_gemm/quarters.cuh``) reads and writes."""
STORED_TAP_BYTES = 16.0
"""Per clock: of a weight's gradient that is stored without partial sums."""


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
        """Together: the longest, and a part of the others, which overlap incompletely."""
        parts = {
            "arithmetic": self.arithmetic,
            "shared memory": self.shared,
            "instructions": self.issue,
            "level 2": self.level2,
            "staging": self.staging,
        }
        bound = max(parts, key=lambda name: parts[name])
        return parts[bound] + OVERLAP * (sum(parts.values()) - parts[bound]), bound


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
"""A call takes another cut or tile than a simple rule's if it is expected to take so much less."""


def overrule(ruled: Prediction, others: Sequence[Prediction]) -> Prediction:
    """The rule's choice, unless another is expected to take less by the margin."""
    fastest = min(others, key=lambda other: other.ms, default=ruled)
    return fastest if fastest.ms < OVERRULES * ruled.ms else ruled


def _triple(values: Sequence[int]) -> Triple:
    d, h, w = values
    return d, h, w
