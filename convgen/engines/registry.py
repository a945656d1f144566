"""The one list of all families, and the translation units that serve a layer.

A new family is a folder beside this file and a line in :data:`FAMILIES`. Of a contraction and kind,
every family that accepts the problem has a unit, in this order; a call goes to one of them when it
is made. Families with a ``host`` have no unit of their own: their kernels lie in the host's, which
asks at run time whether they serve a call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from convgen.engines import cpu
from convgen.engines.backends import BACKENDS
from convgen.engines.cost import Gpu, Prediction
from convgen.engines.depthwise import gather as depthwise_gather
from convgen.engines.depthwise import wgrad as depthwise_wgrad
from convgen.engines.family import Family, Plan
from convgen.engines.implicit_gemm import gather as gemm_gather
from convgen.engines.implicit_gemm import wgrad as gemm_wgrad
from convgen.engines.implicit_gemm import wgrad_quarters as gemm_wgrad_quarters
from convgen.engines.implicit_gemm import wgrad_taps as gemm_wgrad_taps
from convgen.engines.mma import gather as mma_gather
from convgen.engines.mma import wgrad as mma_wgrad
from convgen.engines.problem import Call, Problem
from convgen.engines.simt import gather as simt_gather
from convgen.engines.simt import wgrad as simt_wgrad
from convgen.spec.dtypes import TENSOR_CORE_MODES
from convgen.spec.geometry import CONTRACTIONS, Geometry

AnyFamily = Family[Any]
"""A family, whatever its schedules are: only the family itself looks into them."""

AnyPlan = Plan[Any]

FAMILIES: tuple[AnyFamily, ...] = (
    cpu.GATHER,
    cpu.WGRAD,
    simt_gather.GATHER,
    simt_wgrad.WGRAD,
    depthwise_gather.GATHER,
    depthwise_wgrad.WGRAD,
    mma_gather.GATHER,
    mma_wgrad.WGRAD,
    gemm_gather.GATHER,
    gemm_wgrad.WGRAD,
    gemm_wgrad_taps.WGRAD_TAPS,
    gemm_wgrad_quarters.WGRAD_QUARTERS,
)


@dataclass(frozen=True)
class Unit:
    """One translation unit of a package: a problem by a family, and its guests' kernels beside."""

    family: AnyFamily
    problem: Problem
    guests: tuple[tuple[AnyFamily, AnyPlan | None], ...]
    """Those that its template knows, each with its plan, or none where they accept no call."""

    @property
    def kind(self) -> str:
        """Dtype or math mode and, of several families of one kind, which of them."""
        return self.problem.kind + self.family.suffix

    @property
    def name(self) -> str:
        """Of the source file, and of the function that it exports."""
        return f"{self.problem.contraction}_{self.kind}"

    @property
    def key(self) -> tuple[str, str]:
        """Under which a schedule other than the default is given."""
        return self.problem.contraction, self.kind

    def default(self) -> AnyPlan:
        """The plan where nothing was measured."""
        return Plan(self.problem, self.family, self.family.default(self.problem))

    def with_schedule(self, schedule: Any) -> AnyPlan:
        return Plan(self.problem, self.family, schedule)

    def predict(self, plan: AnyPlan, call: Call, gpu: Gpu) -> Prediction:
        """What a call is expected to take: by a guest that serves it, or else by the plan."""
        for guest, guest_plan in self.guests:
            if guest_plan is not None and guest.serves(guest_plan.problem, call):
                return guest.predict(guest_plan, call, gpu)
        return self.family.predict(plan, call, gpu)


def units(backend: str, geometry: Geometry, dtypes: Iterable[str]) -> list[Unit]:
    """The units that serve dtypes on a backend, by dtype or math mode, then by contraction."""
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is not known: choose from {', '.join(BACKENDS)}")
    found = []
    for dtype in dtypes:
        for kind in (dtype, *TENSOR_CORE_MODES.get(dtype, ())):
            for contraction in CONTRACTIONS:
                for family in families(backend, contraction, kind):
                    unit = unit_of(family, geometry, contraction, kind)
                    if not family.host and not family.accepts(unit.problem):
                        found.append(unit)
    names = [unit.name for unit in found]
    assert len(set(names)) == len(names), "families of one kind need suffixes of their own"
    return found


def families(backend: str, contraction: str, kind: str) -> list[AnyFamily]:
    """Those that compute a contraction in a dtype or math mode."""
    return [
        family
        for family in FAMILIES
        if family.backend == backend and contraction in family.contractions and kind in family.kinds
    ]


def unit_of(family: AnyFamily, geometry: Geometry, contraction: str, kind: str) -> Unit:
    """The unit of a family, whether or not it accepts the problem."""
    guests = []
    for guest in families(family.backend, contraction, kind):
        if guest.host == family.name:
            plan = guest.plan(geometry, contraction, kind)
            guests.append((guest, None if guest.accepts(plan.problem) else plan))
    return Unit(family, family.problem(geometry, contraction, kind), tuple(guests))
