"""What the tensor-core families (``mma.sync``, wgmma) for GPUs since sm_80 have in common.

Their kernels are of math modes rather than dtypes: see ``convgen.spec.dtypes.MODES``. Those that
read the fine tensor pack what their taps meet of it first, where that is not all (compaction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from convgen.engines.cost import Gpu, Prediction
from convgen.engines.problem import Call, Problem
from convgen.engines.tensor_cores import WIDTH, suits

NAME = "mma"

HEADERS: Mapping[str, str] = {
    "convgen_abi.h": "common/convgen_abi.h",
    "device.cuh": "cuda/device.cuh",
    "gpu_rates.cuh": "cuda/gpu_rates.cuh.j2",
    "common.cuh": "cuda/simt/common.cuh",
    "meeting.cuh": "cuda/meeting.cuh",
    "gather_tiling.cuh": "cuda/simt/gather_tiling.cuh",
    "gather.cuh": "cuda/simt/gather.cuh",
    "pipeline.cuh": "cuda/pipeline.cuh",
    "releases.cuh": "cuda/mma/releases.cuh",
    "mma.cuh": "cuda/mma/mma.cuh",
    "tf32.cuh": "cuda/mma/tf32.cuh",
    "math.cuh": "cuda/mma/math.cuh",
    "fragments.cuh": "cuda/mma/fragments.cuh",
    "outputs.cuh": "cuda/mma/outputs.cuh",
    "staging.cuh": "cuda/mma/staging.cuh",
    "lines.cuh": "cuda/mma/lines.cuh",
    "vectors.cuh": "cuda/mma/vectors.cuh",
    "window.cuh": "cuda/mma/window.cuh",
    "compaction.cuh": "cuda/mma/compaction.cuh",
    "mma_wgrad.cuh": "cuda/mma/wgrad.cuh",
    "mma_wgrad_sums.cuh": "cuda/mma/wgrad_sums.cuh",
    "mma_wgrad_shape.cuh": "cuda/mma/wgrad_shape.cuh",
    "mma_wgrad_tiling.cuh": "cuda/mma/wgrad_tiling.cuh",
    "mma_wgrad_producers.cuh": "cuda/mma/wgrad_producers.cuh",
    "mma_wgrad_warpgroups.cuh": "cuda/mma/wgrad_warpgroups.cuh",
}

LINE_BYTES = 16
"""Packed lines are multiples of it: COMPACTION_LINE_BYTES of the templates."""

LAUNCH_MS = 0.002
"""What one more kernel takes beside its bytes."""


def accepts(problem: Problem) -> str:
    """Why tensor cores do not suit a layer's channels; empty if they do, or may."""
    geometry = problem.geometry
    # A count that is not known may be any: then so may the tensor cores suit.
    coarse = geometry.coarse_channels_per_group or WIDTH
    fine = geometry.fine_channels_per_group or WIDTH
    if suits(coarse, fine):
        return ""
    return f"groups of {coarse} x {fine} channels leave the tensor cores' products empty"


def packed_call(problem: Problem, call: Call) -> Call:
    """The extents that a kernel meets of a call: of the compacted tensor, where there is one."""
    compaction = problem.compaction
    if compaction is None:
        return call
    d, h, w = (
        max(1, -(-(extent - offset) // step))
        for extent, offset, step in zip(
            call.fine_extent, compaction.offset, compaction.step, strict=True
        )
    )
    multiple = LINE_BYTES // problem.element_bytes
    return replace(call, fine_extent=(d, h, -(-w // multiple) * multiple))


def packed_prediction(dense: Prediction, problem: Problem, call: Call, gpu: Gpu) -> Prediction:
    """Of the whole, packing included: whole lines are read, what is met of them written."""
    if problem.compaction is None:
        return dense
    d, h, w = packed_call(problem, call).fine_extent
    elements = call.batch * call.fine_channels * d * h * (call.fine_extent[2] + w)
    packing_ms = 1e3 * elements * problem.element_bytes / gpu.memory_bytes_per_s + LAUNCH_MS
    return Prediction(dense.ms + packing_ms, dense.bound)
