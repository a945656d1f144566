"""What the pipeline asks of a family of kernels: one way of computing some contractions.

A family is one class: which problems it accepts, its schedules (a frozen dataclass) with the
reasons why some cannot be, what they cost, and what its template is given.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from convgen.engines.cost import Gpu, Prediction
from convgen.engines.problem import Call, Problem
from convgen.spec import documents
from convgen.spec.geometry import Geometry

Schedule = TypeVar("Schedule")


@dataclass(frozen=True)
class Plan(Generic[Schedule]):
    """A kernel, decided: what it computes, by which family, on which schedule.

    The schedule is recorded in ``spec.json`` and in the header of the rendered source.
    """

    problem: Problem
    family: Family[Schedule]
    schedule: Schedule

    @property
    def geometry(self) -> Geometry:
        return self.problem.geometry

    @property
    def contraction(self) -> str:
        return self.problem.contraction

    @property
    def kind(self) -> str:
        return self.problem.kind


@dataclass(frozen=True)
class Candidate(Generic[Schedule]):
    """A schedule that a family considered, and why it cannot have it: empty if it can."""

    schedule: Schedule
    refusal: str


class Family(Protocol[Schedule]):
    """A family of kernels. Reasons (``accepts``, ``refusal``) are words, empty for none."""

    name: str
    """Recorded in ``spec.json``; gathers and wgrad of one kind share it."""
    backend: str
    contractions: Collection[str]
    kinds: Collection[str]
    """Dtypes and math modes, keys of ``convgen.spec.dtypes.KINDS``."""
    schedule_type: type[Schedule]
    template: str
    """Of its translation unit, relative to ``convgen/templates``; may use ``{contraction}``."""
    headers: Mapping[str, str]
    """Plain headers: path in the package below ``src/<backend>/`` -> template folder path."""
    suffix: str = ""
    """Ends the names of its units where another family serves the same contraction and kind."""
    host: str = ""
    """Name of the family whose units hold its kernels; empty if it has units of its own."""

    def problem(self, geometry: Geometry, contraction: str, kind: str) -> Problem:
        """A contraction as its kernels see it."""
        return Problem(geometry, contraction, kind)

    def accepts(self, problem: Problem) -> str:
        """Why it has no kernel for a problem; empty if it has one."""
        return ""

    def default(self, problem: Problem) -> Schedule:
        """The schedule of a problem where nothing was measured."""
        ...

    def candidates(self, problem: Problem) -> list[Candidate[Schedule]]:
        """All schedules that ``convgen tune`` may consider, legal ones and refused ones."""
        ...

    def refusal(self, plan: Plan[Schedule], architectures: Iterable[str] = ()) -> str:
        """Why a plan's schedule is not legal; empty if it is. Any schedule may be asked for.

        ``architectures``, as ``90a``, are those that it must suit beside the one that it was
        measured on.
        """
        ...

    def combine(self, choices: Sequence[tuple[Plan[Schedule], Call]]) -> Schedule | None:
        """A schedule of several plans of one kernel, which serves each one's call as it does.

        None where there is no such schedule.
        """
        return None

    def serves(self, problem: Problem, call: Call) -> bool:
        """Whether its kernels take a call of a problem that it accepts."""
        return True

    def predict(self, plan: Plan[Schedule], call: Call, gpu: Gpu) -> Prediction:
        """What a call that it serves is expected to take; the CPU's families ignore ``gpu``."""
        ...

    def context(self, plan: Plan[Schedule]) -> dict[str, Any]:
        """What the template is given beyond the common context (see ``convgen.codegen.render``)."""
        ...

    def plan(self, geometry: Geometry, contraction: str, kind: str) -> Plan[Schedule]:
        """The default plan of a contraction."""
        problem = self.problem(geometry, contraction, kind)
        return Plan(problem, self, self.default(problem))

    def read_schedule(self, fields: Mapping[str, Any]) -> Schedule:
        """A schedule from its fields, as JSON has them: lists are tuples.

        Raises:
            DocumentError: if they are not the fields of its schedules, of their types and ranges.
        """
        return documents.record(dict(fields), self.schedule_type, "")
