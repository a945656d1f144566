"""Which schedules are worth compiling, and which one suits several layers together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from convgen.building.processor import processor_name
from convgen.engines import cost, tuned
from convgen.engines.cost import H200, Gpu, Prediction
from convgen.engines.registry import AnyPlan
from convgen.engines.tuned import GAIN
from convgen.spec.dtypes import TENSOR_CORE_MODES
from convgen.tuning.jobs import Candidate, Job, Outcome, median_of

CANDIDATES = 8
"""Schedules that are compiled for each contraction, the default among them."""


def candidates(
    job: Job, gpu: Gpu, most: int = CANDIDATES, architectures: Sequence[str] = ()
) -> Outcome:
    """The default, what the tables hold, and the most promising of the legal schedules.

    These are the model's choice; what was measured as fastest before defends its place.
    """
    unit = job.unit
    default = unit.default()
    legal = [each.schedule for each in unit.family.candidates(unit.problem) if not each.refusal]

    def candidate(schedule: Any) -> Candidate:
        plan = unit.with_schedule(schedule)
        return Candidate(plan, unit.predict(plan, job.call, gpu), schedule == default.schedule)

    others = [candidate(schedule) for schedule in legal if schedule != default.schedule]
    others.sort(key=lambda c: c.predicted.ms)
    # What the model cannot tell apart differs in sizes that this layer does not use.
    distinct: dict[Prediction, Candidate] = {}
    for other in others:
        distinct.setdefault(other.predicted, other)
    first = dict.fromkeys([default.schedule, *_held(job, architectures)])
    chosen = [candidate(schedule) for schedule in first]
    chosen += [other for other in distinct.values() if other.plan.schedule not in first]
    return Outcome(job, len(others) + 1, chosen[:most])


def _held(job: Job, architectures: Sequence[str]) -> list[Any]:
    """The schedule that the tables hold for a job, if there is one."""
    call, kind = job.call, job.unit.problem.kind
    dtype = next((d for d, modes in TENSOR_CORE_MODES.items() if kind in modes), kind)
    held = tuned.schedules(
        job.spec,
        job.unit.family.backend,
        [dtype],
        architectures,
        processor_name(),
        tuned.size_class(call.batch, call.coarse_extent),
    )
    return [s for key, s in held.items() if key == job.unit.key]


def all_candidates(
    work: Sequence[Job], gpu: Gpu, most: int = CANDIDATES, architectures: Sequence[str] = ()
) -> list[Outcome]:
    """:func:`candidates` of every job. Layers of one specification get those of all of them."""
    outcomes = [candidates(job, gpu, most, architectures) for job in work]
    for group in sharing(outcomes):
        plans = {c.plan.schedule: c.plan for outcome in group for c in outcome.candidates}
        for outcome in group:
            known = {c.plan.schedule for c in outcome.candidates}
            outcome.candidates += [
                Candidate(plan, outcome.job.unit.predict(plan, outcome.job.call, gpu), False)
                for schedule, plan in plans.items()
                if schedule not in known
            ]
    return outcomes


def sharing(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Jobs whose kernels a generated module shares, where there are several."""
    groups: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in outcomes:
        job = outcome.job
        groups.setdefault((job.spec.name, job.contraction, job.kind), []).append(outcome)
    return [group for group in groups.values() if len(group) > 1]


def agree(outcomes: Iterable[Outcome]) -> None:
    """Lets layers of one specification, which share their kernels, choose one schedule.

    Of those that all of them have timed, the one with the least product of times.
    """
    for group in sharing(outcomes):
        for outcome in group:
            outcome.agreed = None
        by_schedule = [{c.plan.schedule: c for c in o.candidates if c.spread} for o in group]
        common = set.intersection(*(set(timed) for timed in by_schedule))
        if common:
            best = min(
                common, key=lambda s: math.prod(median_of(timed[s]) for timed in by_schedule)
            )
            for outcome, timed in zip(group, by_schedule, strict=True):
                outcome.agreed = timed[best]


def combined(group: Sequence[Outcome]) -> AnyPlan | None:
    """What layers of one specification would have together of the tiles that each is fastest with.

    None unless, by their candidates' times, it beats what they agree on.
    """
    family = group[0].job.unit.family
    timed = [[c for c in outcome.candidates if c.spread] for outcome in group]
    known = {c.plan.schedule for outcome in group for c in outcome.candidates}

    def combine(chosen: Sequence[Candidate], outcomes: Sequence[Outcome]) -> Any | None:
        pairs = zip(chosen, outcomes, strict=True)
        return family.combine([(c.plan, outcome.job.call) for c, outcome in pairs])

    agreed = [outcome.agreed for outcome in group if outcome.agreed]
    least = math.prod(map(median_of, agreed)) / GAIN if agreed else math.inf
    best = None
    for first in timed[0]:
        # Of every other layer the fastest that goes together with this one.
        chosen = [first]
        for outcome, others in zip(group[1:], timed[1:], strict=True):
            fitting = [c for c in others if combine([first, c], [group[0], outcome])]
            chosen += [min(fitting, key=median_of)] if fitting else []
        if len(chosen) < len(group) or math.prod(map(median_of, chosen)) >= least:
            continue
        schedule = combine(chosen, group)
        if schedule is not None and schedule not in known:
            least = math.prod(map(median_of, chosen))
            best = replace(first.plan, schedule=schedule)
    return best


def gpu_of(architectures: Sequence[str]) -> Gpu:
    """What the model knows of the first architecture, or of the nearest older one."""
    if not any(architectures):
        return H200
    return cost.gpu_of(int(architectures[0].partition("+")[0].rstrip("af")))
