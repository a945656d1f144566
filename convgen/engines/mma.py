"""The ``mma`` engine: tensor-core kernels (``mma.sync``, wgmma) for GPUs since sm_80.

fprop and dgrad share one kernel, a gather (:mod:`convgen.engines.mma_gather`); wgrad is in
:mod:`convgen.engines.mma_wgrad`. Its units are math modes rather than dtypes: see
``convgen.spec.dtypes.MODES``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from convgen.engines import Candidate, KernelPlan, schedule_from
from convgen.engines.cost import Gpu, Prediction, Problem
from convgen.engines.lattice import lattice_of
from convgen.engines.mma_fit import GatherTiles
from convgen.engines.mma_gather import (
    ENGINE_NAME,
    combine_tiles,
    gather_tiles,
    tiles_context,
    tiles_prediction,
    tiles_refusal,
    tiles_space,
)
from convgen.engines.mma_wgrad import (
    WgradSchedule,
    wgrad_context,
    wgrad_prediction,
    wgrad_refusal,
    wgrad_schedule,
    wgrad_space,
)
from convgen.spec import Geometry
from convgen.spec.dtypes import MODES


class Mma:
    """See :class:`convgen.engines.Engine`."""

    name = ENGINE_NAME
    backend = "cuda"
    headers: Mapping[str, str] = {
        "convgen_abi.h": "common/convgen_abi.h",
        "device.cuh": "cuda/device.cuh",
        "common.cuh": "cuda/simt/common.cuh",
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
        "granules.cuh": "cuda/mma/granules.cuh",
        "lattice.cuh": "cuda/mma/lattice.cuh",
        "mma_wgrad.cuh": "cuda/mma/wgrad.cuh",
        "mma_wgrad_cut.cuh": "cuda/mma/wgrad_cut.cuh",
        "mma_wgrad_groups.cuh": "cuda/mma/wgrad_groups.cuh",
    }

    def plan(self, geometry: Geometry, contraction: str, dtype: str) -> KernelPlan:
        schedule: Any
        met = _met(geometry, contraction)
        if contraction == "wgrad":
            schedule = wgrad_schedule(met, dtype)
        else:
            schedule = gather_tiles(met, contraction, dtype)
        return KernelPlan(geometry, contraction, dtype, self.name, schedule)

    def space(self, geometry: Geometry, contraction: str, dtype: str) -> list[Candidate]:
        met = _met(geometry, contraction)
        if contraction == "wgrad":
            return wgrad_space(met, dtype)
        return tiles_space(met, contraction, dtype)

    def refusal(self, plan: KernelPlan, architectures: Iterable[str] = ()) -> str:
        plan = _of_met(plan)
        if plan.contraction == "wgrad":
            return wgrad_refusal(plan.geometry, plan.dtype, plan.schedule)
        return tiles_refusal(plan, architectures)

    def combine(self, choices: Sequence[tuple[KernelPlan, Problem]]) -> GatherTiles | None:
        if choices[0][0].contraction == "wgrad":
            return None
        return combine_tiles([(_of_met(plan), problem) for plan, problem in choices])

    def predict(self, plan: KernelPlan, problem: Problem, gpu: Gpu) -> Prediction:
        predict = wgrad_prediction if plan.contraction == "wgrad" else tiles_prediction
        lattice = lattice_of(plan.geometry, plan.contraction)
        if lattice is None:
            return predict(plan, problem, gpu)
        size = MODES[plan.dtype].size_bytes
        dense = predict(_of_met(plan), lattice.problem(problem, size), gpu)
        return lattice.prediction(dense, problem, size, gpu)

    def read_schedule(self, contraction: str, fields: Mapping[str, Any]) -> Any:
        return schedule_from(WgradSchedule if contraction == "wgrad" else GatherTiles, fields)

    def template(self, contraction: str) -> str:
        return "cuda/mma/wgrad.cu.j2" if contraction == "wgrad" else "cuda/mma/gather.cu.j2"

    def context(self, plan: KernelPlan) -> dict[str, Any]:
        lattice = lattice_of(plan.geometry, plan.contraction)
        plan = _of_met(plan)
        context = wgrad_context(plan) if plan.contraction == "wgrad" else tiles_context(plan)
        return context | {"g": plan.geometry, "lattice": lattice}


def _met(geometry: Geometry, contraction: str) -> Geometry:
    """Of what a contraction's kernel meets: the lattice's, where there is one."""
    lattice = lattice_of(geometry, contraction)
    return geometry if lattice is None else lattice.geometry


def _of_met(plan: KernelPlan) -> KernelPlan:
    return replace(plan, geometry=_met(plan.geometry, plan.contraction))


ENGINE = Mma()
