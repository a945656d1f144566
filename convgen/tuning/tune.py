"""Finds the fastest schedules of a layer by compiling and timing them.

For each contraction the family lists its legal schedules, the cost model orders them, and the most
promising are compiled side by side and timed in turns from cold caches, the slower ones dropping
out round by round. Layers of one specification share their kernels: where their best tiles make one
schedule together, it is compiled and timed too. A schedule can only win if its results agree with
float64. What won against the default goes into a table (:mod:`convgen.engines.tuned`), where
``convgen generate`` finds it.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convgen import __version__
from convgen.building.build import BuildWarning, Library, Progress, build
from convgen.building.processor import processor_name
from convgen.checking.verify import LIMITS as VERIFIED
from convgen.codegen.render import headers, render_unit
from convgen.engines import tensor_cores, tuned
from convgen.engines.abi import TOO_LARGE
from convgen.engines.backends import SOURCE_SUFFIX
from convgen.engines.cost import GPUS, H200, Gpu, Prediction
from convgen.engines.problem import Call
from convgen.engines.registry import AnyPlan, Unit, units
from convgen.measuring import machine
from convgen.measuring.layers import Layer
from convgen.measuring.reference import Reference
from convgen.measuring.timing import Clock, Spread, clock_for, spread
from convgen.measuring.trial import first_line
from convgen.spec import CONTRACTIONS, ConvSpec
from convgen.spec.dtypes import KINDS, TENSOR_CORE_MODES
from convgen.specialize import compile_commands
from convgen.tuning.kernels import Kernel, KernelError

LIMITS = VERIFIED | {
    "tf32x3": VERIFIED["f32"],
    "f16tc": VERIFIED["f16"],
    "bf16tc": VERIFIED["bf16"],
}
"""Largest relative norm of the error of a schedule that may win."""

CANDIDATES = 8
"""Schedules that are compiled for each contraction, the default among them."""

_GAIN = 1.02
"""A schedule must be faster than the default by so much to replace it."""

_JOB_S = 4.0
"""Where no time is given, the rounds of a contraction end after so long."""

_ROUND_RUNS = 3
_TARGET_RUNS = 15
_HOPELESS = 1.15
"""Schedules that take so many times as long as the fastest are not run further."""

_FLUSHED_BYTES = 96 << 20
"""Written between runs on a processor, so that operands come from memory."""


@dataclass(frozen=True)
class Job:
    """One contraction of one layer, in one dtype or math mode."""

    layer: Layer
    spec: ConvSpec
    """Of the module: the layer's, with its channels where those are fixed."""
    unit: Unit

    @property
    def contraction(self) -> str:
        return self.unit.problem.contraction

    @property
    def kind(self) -> str:
        return self.unit.kind

    @property
    def name(self) -> str:
        return f"{self.layer.name}: {self.contraction} {self.kind}"

    @property
    def call(self) -> Call:
        return call_of(self.layer)


@dataclass
class Candidate:
    """A schedule that was compiled, and what came of it."""

    plan: AnyPlan
    predicted: Prediction
    is_default: bool
    library: Path | None = None
    times_ms: list[float] = field(default_factory=list)
    error: float = math.nan
    """Relative norm against float64."""
    note: str = ""
    """Why it cannot win; empty if it may."""

    @property
    def spread(self) -> Spread | None:
        return spread(self.times_ms) if self.times_ms and not self.note else None


@dataclass
class Outcome:
    """What became of a job. Candidates are in the order of the model; the default is first."""

    job: Job
    considered: int
    """Legal schedules, of which the candidates are the most promising."""
    candidates: list[Candidate]
    agreed: Candidate | None = None
    """What suits all layers of the specification, where it has several."""

    @property
    def default(self) -> Candidate:
        return self.candidates[0]

    @property
    def best(self) -> Candidate | None:
        """The fastest; the default unless another is clearly faster. None if all are wrong.

        Of a specification with several layers, the one that suits them best together.
        """
        if self.agreed is not None:
            return self.agreed
        timed = [c for c in self.candidates if c.spread]
        if not timed:
            return None
        fastest = min(timed, key=_median)
        default = self.default
        if default.spread and (
            _median(default) <= _GAIN * _median(fastest)
            or _median(default) <= _spread(fastest).high_ms  # no more than noise
        ):
            return default
        return fastest

    def changes(self, candidate: Candidate) -> dict[str, Any]:
        """The fields of a schedule that are not the default's; all fields of the default."""
        default = asdict(self.default.plan.schedule)
        return {
            name: value
            for name, value in asdict(candidate.plan.schedule).items()
            if candidate.is_default or value != default[name]
        }

    @property
    def gain(self) -> float | None:
        """How many times as fast as the default; None if either has no time."""
        if self.best is None or self.default.spread is None:
            return None
        return _median(self.default) / _median(self.best)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        best = self.best
        return {
            "layer": self.job.layer.name,
            "spec": self.job.spec.name,
            "contraction": self.job.contraction,
            "kind": self.job.kind,
            "considered": self.considered,
            "gain": self.gain,
            "candidates": [
                {
                    "schedule": asdict(c.plan.schedule),
                    "predicted_ms": c.predicted.ms if math.isfinite(c.predicted.ms) else None,
                    "bound": c.predicted.bound,
                    "ms": None if c.spread is None else c.spread.median_ms,
                    "error": c.error if math.isfinite(c.error) else None,
                    "default": c.is_default,
                    "won": c is best,
                    "note": c.note,
                }
                for c in self.candidates
            ],
        }


def call_of(layer: Layer) -> Call:
    """The extents of a layer's contractions, in three dimensions."""
    coarse, fine = layer.input_shape, layer.output_shape
    if not layer.spec.transposed:
        coarse, fine = fine, coarse

    def extent(shape: Sequence[int]) -> tuple[int, int, int]:
        d, h, w = (*(1,) * (5 - len(shape)), *shape[2:])
        return d, h, w

    return Call(coarse[0], coarse[1], fine[1], extent(coarse), extent(fine))


def jobs(
    layers: Sequence[Layer],
    backend: str,
    dtype: str,
    tf32: bool,
    contractions: Sequence[str] = CONTRACTIONS,
    fixed_channels: bool = False,
) -> list[Job]:
    """What there is to tune: of each layer the kernels that a module would take for it."""
    found = []
    for layer in layers:
        spec = layer.fixed() if fixed_channels else layer.spec
        kinds: tuple[str, ...] = (dtype,)
        call, groups = call_of(layer), spec.groups
        if backend == "cuda" and tensor_cores.suits(
            call.coarse_channels // groups, call.fine_channels // groups
        ):
            modes = TENSOR_CORE_MODES.get(dtype, kinds)
            kinds = modes[:1] if tf32 else modes[-1:]
        found += [
            Job(layer, spec, unit)
            for unit in units(backend, spec.geometry, [dtype])
            if unit.problem.kind in kinds and unit.problem.contraction in contractions
        ]
    return found


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
    for group in _shared(outcomes):
        plans = {c.plan.schedule: c.plan for outcome in group for c in outcome.candidates}
        for outcome in group:
            known = {c.plan.schedule for c in outcome.candidates}
            outcome.candidates += [
                Candidate(plan, outcome.job.unit.predict(plan, outcome.job.call, gpu), False)
                for schedule, plan in plans.items()
                if schedule not in known
            ]
    return outcomes


def _shared(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
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
    for group in _shared(outcomes):
        for outcome in group:
            outcome.agreed = None
        by_schedule = [{c.plan.schedule: c for c in o.candidates if c.spread} for o in group]
        common = set.intersection(*(set(timed) for timed in by_schedule))
        if common:
            best = min(common, key=lambda s: math.prod(_median(timed[s]) for timed in by_schedule))
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
    least = math.prod(map(_median, agreed)) / _GAIN if agreed else math.inf
    best = None
    for first in timed[0]:
        # Of every other layer the fastest that goes together with this one.
        chosen = [first]
        for outcome, others in zip(group[1:], timed[1:], strict=True):
            fitting = [c for c in others if combine([first, c], [group[0], outcome])]
            chosen += [min(fitting, key=_median)] if fitting else []
        if len(chosen) < len(group) or math.prod(map(_median, chosen)) >= least:
            continue
        schedule = combine(chosen, group)
        if schedule is not None and schedule not in known:
            least = math.prod(map(_median, chosen))
            best = replace(first.plan, schedule=schedule)
    return best


def gpu_of(architectures: Sequence[str]) -> Gpu:
    """What the model knows of the first architecture, or of the nearest older one."""
    if not any(architectures):
        return H200
    number = int(architectures[0].partition("+")[0].rstrip("af"))
    known = [each for each in GPUS if each <= number]
    return GPUS[max(known)] if known else GPUS[min(GPUS)]


def compile_candidates(
    outcomes: Sequence[Outcome],
    backend: str,
    architectures: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Compiles every candidate into a library of its own, all side by side.

    Raises:
        BuildError, ToolchainError: as :func:`convgen.building.build.build` does.
    """
    commands, _ = compile_commands(backend, architectures)
    files: dict[str, str] = {}
    libraries: dict[str, Library] = {}
    paths: list[tuple[Candidate, str]] = []
    units_seen: dict[tuple[str, str], str] = {}
    for outcome in outcomes:
        job = outcome.job
        files |= headers(job.unit)
        for candidate in outcome.candidates:
            text = render_unit(job.spec, job.unit, candidate.plan)
            # Layers with one specification share their kernels.
            unit = units_seen.setdefault((text, job.kind), f"{job.contraction}_{len(units_seen)}")
            source = f"src/{backend}/{unit}{SOURCE_SUFFIX[backend]}"
            files[source] = text
            libraries[unit] = Library(f"lib/{unit}.so", (source,), commands)
            paths.append((candidate, f"lib/{unit}.so"))
    with warnings.catch_warnings():
        # A schedule that spills is judged by its time.
        warnings.simplefilter("ignore", BuildWarning)
        package = build("convgen_candidates", files, list(libraries.values()), progress=progress)
    for candidate, path in paths:
        candidate.library = package / path


def tune(
    outcomes: Sequence[Outcome],
    device: torch.device,
    *,
    seconds: float | None = None,
    seed: int = 0,
    on_job: Callable[[Outcome, int], None] | None = None,
) -> list[tuned.Winner]:
    """Times the candidates, which :func:`compile_candidates` has compiled.

    Args:
        outcomes: filled in here, one after the other.
        device: where.
        seconds: for all of them together, by default about 4 s each. Jobs whose turn does not come
            keep no times.
        seed: of the operands.
        on_job: called with each outcome when it is there, and how many are.

    Returns:
        The winners, defaults that nothing beat among them.
    """
    start = time.monotonic()
    clock = clock_for(device)
    name, architecture = _device(device)
    winners = []
    for index, outcome in enumerate(outcomes):
        now = time.monotonic()
        left = _JOB_S if seconds is None else (start + seconds - now) / (len(outcomes) - index)
        if left > 0:
            _race(outcome, clock, device, now + left, seed + index, outcome.candidates)
        else:
            for candidate in outcome.candidates:
                candidate.note = "not run: the seconds were used up"
        if on_job:
            on_job(outcome, index + 1)
    agree(outcomes)
    end = math.inf if seconds is None else start + seconds
    _race_combined(outcomes, clock, device, gpu_of([architecture]), end, seed)
    for outcome in outcomes:
        best, default = outcome.best, outcome.default
        if best is not None:
            winners.append(
                tuned.Winner(
                    spec=outcome.job.spec.name,
                    contraction=outcome.job.contraction,
                    kind=outcome.job.kind,
                    device=name,
                    architecture=architecture,
                    size=tuned.size_class(outcome.job.call.batch, outcome.job.call.coarse_extent),
                    channels=(
                        outcome.job.call.coarse_channels,
                        outcome.job.call.fine_channels,
                    ),
                    schedule=asdict(best.plan.schedule),
                    ms=_median(best),
                    default_ms=_median(default) if default.spread else _median(best),
                    convgen=__version__,
                )
            )
    return winners


def _race_combined(
    outcomes: Sequence[Outcome],
    clock: Clock,
    device: torch.device,
    gpu: Gpu,
    end: float,
    seed: int,
) -> None:
    """Compiles, verifies and times what layers have together, against what they agree on."""
    works: list[tuple[Outcome, Candidate]] = []
    for group in _shared(outcomes):
        if (plan := combined(group)) is not None:
            for outcome in group:
                predicted = outcome.job.unit.predict(plan, outcome.job.call, gpu)
                works.append((outcome, Candidate(plan, predicted, False)))
    if not works:
        return
    compile_candidates([replace(o, candidates=[new]) for o, new in works], device.type)
    for index, (outcome, new) in enumerate(works):
        outcome.candidates.append(new)
        contenders = [new] if outcome.agreed is None else [outcome.agreed, new]
        deadline = min(end, time.monotonic() + _JOB_S)
        _race(outcome, clock, device, deadline, seed + index, contenders)
    agree(outcomes)


def _race(
    outcome: Outcome,
    clock: Clock,
    device: torch.device,
    deadline: float,
    seed: int,
    contenders: Sequence[Candidate],
) -> None:
    """Verifies and times candidates of one job until the time (of time.monotonic) has come.

    Whatever the time, each of them runs in one round.
    """
    job = outcome.job
    operands = _Operands(job, device, seed)
    calls: dict[int, Callable[[], None]] = {}
    for index, candidate in enumerate(contenders):
        assert candidate.library is not None
        try:
            kernel = Kernel(candidate.library, f"convgen_{job.unit.name}")
            calls[index] = kernel.prepare(operands.coarse, operands.fine, operands.weight)
            operands.poison()
            calls[index]()
            candidate.error = operands.error()
        except KernelError as error:
            fits = "its tiles do not fit into shared memory"
            candidate.note = fits if error.code == TOO_LARGE else str(error)
        except (RuntimeError, OSError) as error:
            candidate.note = first_line(error)
        else:
            if not candidate.error <= LIMITS[job.unit.problem.kind]:
                candidate.note = f"wrong: error {candidate.error:.1e}"
    alive = [index for index, c in enumerate(contenders) if not c.note]
    flushed = None if device.type == "cuda" else torch.zeros(_FLUSHED_BYTES // 4)
    runs = 0
    while alive:
        for _ in range(_ROUND_RUNS):
            intervals = []
            for index in alive:
                if flushed is not None:
                    flushed.add_(1)
                intervals.append((index, clock.time(calls[index])[1]))
            clock.wait()
            for index, interval in intervals:
                contenders[index].times_ms.append(interval.ms)
        fastest = min(min(contenders[index].times_ms) for index in alive)
        alive = [index for index in alive if min(contenders[index].times_ms) <= _HOPELESS * fastest]
        runs += _ROUND_RUNS
        if runs >= _TARGET_RUNS or time.monotonic() > deadline:
            break
    # What is timed last must still be right: nothing may depend on what ran before.
    best = outcome.best
    for index, candidate in enumerate(contenders):
        if candidate is best or index in alive:
            operands.poison()
            calls[index]()
            candidate.error = max(candidate.error, operands.error())
            if not candidate.error <= LIMITS[job.unit.problem.kind]:
                candidate.note = f"wrong: error {candidate.error:.1e}"


class _Operands:
    """The tensors of a job, and float64 samples of its result."""

    def __init__(self, job: Job, device: torch.device, seed: int) -> None:
        layer, spec = job.layer, job.layer.spec
        kind = getattr(torch, KINDS[job.unit.problem.kind].torch_name)
        generator = torch.Generator(device).manual_seed(seed)

        def draw(shape: Sequence[int], scale: float = 1.0) -> Tensor:
            values = torch.randn(tuple(shape), generator=generator, device=device, dtype=kind)
            return values.mul_(scale)

        terms = math.prod(spec.kernel_size) * layer.in_channels // spec.groups
        x, grad = draw(layer.input_shape), draw(layer.output_shape)
        self.weight = draw(layer.weight_shape, terms**-0.5)
        self.coarse, self.fine = (x, grad) if spec.transposed else (grad, x)
        self._reference = Reference(spec, x, self.weight, None, grad, seed)
        forward = "dgrad" if spec.transposed else "fprop"
        self._quantity = {"wgrad": "grad_weight", forward: "output"}.get(
            job.contraction, "grad_input"
        )
        # The result takes the place of an operand.
        name = {"fprop": "coarse", "dgrad": "fine", "wgrad": "weight"}[job.contraction]
        self._result = torch.empty_like(getattr(self, name))
        setattr(self, name, self._result)

    def poison(self) -> None:
        self._result.fill_(math.nan)

    def error(self) -> float:
        """Of the result against float64, infinite where an element was not written."""
        return self._reference.error_of(self._quantity, self._result)


def _device(device: torch.device) -> tuple[str, str]:
    """Name and architecture of what is timed."""
    if device.type == "cpu":
        return processor_name(), ""
    facts = machine.gpu(device)
    return facts.name, f"{facts.major}{facts.minor}{'a' if facts.major >= 9 else ''}"


def _spread(candidate: Candidate) -> Spread:
    assert candidate.spread is not None
    return candidate.spread


def _median(candidate: Candidate) -> float:
    return _spread(candidate).median_ms
