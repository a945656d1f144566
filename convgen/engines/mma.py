"""The ``mma`` engine: tensor-core kernels (``mma.sync``) for GPUs since sm_80.

fprop and dgrad share one kernel, a gather (``templates/cuda/mma/gather.cu.j2``); wgrad is in
:mod:`convgen.engines.mma_wgrad`. Its units are math modes rather than dtypes: see
``convgen.dtypes.MODES``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convgen.dtypes import MODES
from convgen.engines import KernelPlan
from convgen.engines.gather import GatherSchedule, arrange, gather_axes, gather_context
from convgen.engines.mma_wgrad import wgrad_context, wgrad_schedule
from convgen.spec import Geometry

# 16 x 8 products that a warp keeps in registers, four each: 80 registers, beside which the
# fragments of a column and what tells a warp its place stay under the 168 that blocks of 12 warps
# leave a thread.
PRODUCTS = 20
# 3xTF32 keeps a second set of sums, which leaves the tensor core after every 8 channels.
PRODUCTS_FLUSHED = 10
# Where the compiler prefetches more, and would spill what it keeps meanwhile: 16-bit products take
# half the clocks; large columns of a strided window lie far apart.
PRODUCTS_FEW, PRODUCTS_FLUSHED_FEW = 16, 6
# Output channels per warp, in blocks of 8, where the count is not known.
UNKNOWN_BLOCKS = (6, 4, 2)
UNKNOWN_BLOCKS_FEW = (4, 3, 2)  # where six do not fit
# Output phases along X that one warp computes; more would leave one block of channels.
MAX_VARIANTS = 8
# X taps unrolled in one line; longer kernels loop over their taps.
LINE_LIMIT = 32
# Registers for the fragments of one column (4 per row, 8 in 3xTF32); with all sums; and with these
# where the window of a tile is strided.
MAX_COLUMN_REGISTERS = 48
MAX_TILE_REGISTERS = 112
MAX_STRIDED_TILE_REGISTERS = 96
# Multiply instructions of an unrolled pass, over all phases: 16 bytes each, with about as many
# loads beside them, in an instruction cache of 128 KiB.
UNROLL_LIMIT = 2600
# Two stages of a representative tile and its weights: what a block on sm_90 may hold, less a margin
# for wider tiles. Smaller GPUs cut narrower tiles at launch.
STAGES_LIMIT_BYTES = 200 * 1024


def _block_cost(blocks: int, out_blocks: int) -> float:
    """Time of ``out_blocks`` blocks of 8 channels in warps of ``blocks``: few share a fragment."""
    padded = -(-out_blocks // blocks) * blocks
    return padded * {1: 2.5, 2: 1.7, 3: 1.6}.get(blocks, 1.5)


def _gather_schedule(geometry: Geometry, contraction: str, mode: str) -> GatherSchedule:
    axes = gather_axes(geometry, contraction)
    r, y, x = arrange(axes)
    flushed = mode == "tf32x3"
    budget = PRODUCTS_FLUSHED if flushed else PRODUCTS if mode == "tf32" else PRODUCTS_FEW
    per_group = (
        geometry.coarse_channels_per_group
        if contraction == "fprop"
        else geometry.fine_channels_per_group
    )
    variants = min(len(x.phases), MAX_VARIANTS)
    rows = (2 if flushed else 3) if variants == 1 else 2 if variants == 2 and not flushed else 1

    def channel_blocks(products: int) -> tuple[int, ...]:
        """The blocks of 8 channels per warp to compile, with at most so many products."""
        most = products // (rows * variants)
        if per_group is None:
            sizes = UNKNOWN_BLOCKS if most >= max(UNKNOWN_BLOCKS) else UNKNOWN_BLOCKS_FEW
            return tuple(b for b in sizes if b <= most) or (most,)
        needed = -(-per_group // 8)
        choices = range(1, min(most, needed) + 1)
        return (min(choices, key=lambda b: (_block_cost(b, needed), -b)),)

    blocks = channel_blocks(budget)
    per_fragment = 8 if flushed else 4

    def tile_registers(planes: int) -> int:
        """Registers of all sums, and of a column of so many rows."""
        return (rows * variants * max(blocks) + planes) * per_fragment

    def fits(style: str) -> bool:
        """Whether a style keeps its code, its registers and its stages small enough."""
        taps_r, span_r = (sum(r.counts), max(r.spans)) if style == "taps" else (1, 0)
        code = taps_r * sum(y.counts) * sum(x.counts) * rows * max(blocks)
        if code * (3 if flushed else 1) > UNROLL_LIMIT:
            return False
        planes = (rows - 1) * (r.step if style == "taps" else 1) + span_r + 1
        if planes * per_fragment > MAX_COLUMN_REGISTERS:
            return False
        if tile_registers(planes) > MAX_TILE_REGISTERS:
            return False
        # 64 positions in a strip 32 wide: up to three lines.
        lines = 2 * y.step + max(y.spans) + 1
        columns = 31 * x.step + max(x.spans) + 4
        most_r = max(r.counts) if style == "taps" else 1
        weights = most_r * max(y.counts) * sum(x.counts) * max(blocks) * 8
        weights *= 2 if flushed else 1
        return 2 * 8 * 4 * (planes * lines * columns + weights) <= STAGES_LIMIT_BYTES

    scattered = max(geometry.kernel[0], geometry.kernel[1]) == 1
    if len(x.phases) > MAX_VARIANTS or max(x.counts) > LINE_LIMIT:
        style = "none"
    elif scattered:
        style = "line"
    else:
        style = next((s for s in ("taps", "plane") if fits(s)), "line")
    window = (rows - 1) * r.step + max(r.spans) + 1
    if style == "taps" and x.step > 1 and tile_registers(window) > MAX_STRIDED_TILE_REGISTERS:
        blocks = channel_blocks(PRODUCTS_FLUSHED_FEW if flushed else PRODUCTS_FEW)
    row_axis = "scattered" if scattered else r.name
    return GatherSchedule(style, row_axis, rows, variants, tuple(8 * b for b in blocks))


class Mma:
    """See :class:`convgen.engines.Engine`."""

    name = "mma"
    backend = "cuda"
    headers: Mapping[str, str] = {
        "convgen_abi.h": "common/convgen_abi.h",
        "device.cuh": "cuda/device.cuh",
        "common.cuh": "cuda/simt/common.cuh",
        "gather.cuh": "cuda/simt/gather.cuh",
        "pipeline.cuh": "cuda/pipeline.cuh",
        "mma.cuh": "cuda/mma/mma.cuh",
        "math.cuh": "cuda/mma/math.cuh",
        "fragments.cuh": "cuda/mma/fragments.cuh",
        "mma_wgrad.cuh": "cuda/mma/wgrad.cuh",
        "mma_wgrad_cut.cuh": "cuda/mma/wgrad_cut.cuh",
    }

    def plan(self, geometry: Geometry, contraction: str, dtype: str) -> KernelPlan:
        schedule: Any
        if contraction == "wgrad":
            schedule = wgrad_schedule(geometry, dtype)
        else:
            schedule = _gather_schedule(geometry, contraction, dtype)
        return KernelPlan(geometry, contraction, dtype, self.name, schedule)

    def template(self, contraction: str) -> str:
        return "cuda/mma/wgrad.cu.j2" if contraction == "wgrad" else "cuda/mma/gather.cu.j2"

    def context(self, plan: KernelPlan) -> dict[str, Any]:
        if plan.contraction == "wgrad":
            return wgrad_context(plan)
        # cuDNN rounds a transposed convolution's operands to nearest even, a convolution's away
        # from zero; rounding alike keeps TF32 results within 3e-6 of its own.
        rounding = "NEAREST_AWAY" if plan.contraction == "fprop" else "NEAREST_EVEN"
        math = {
            "tf32": f"Tf32<Rounding::{rounding}>",
            "tf32x3": "Tf32x3",
            "f16tc": "Pairs<half>",
            "bf16tc": "Pairs<bfloat16>",
        }[plan.dtype]
        element = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}
        return gather_context(plan.geometry, plan.contraction, plan.schedule) | {
            "element": element[MODES[plan.dtype].torch_name],
            "math": math,
        }


ENGINE = Mma()
