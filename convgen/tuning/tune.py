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
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from convgen import __version__
from convgen.building.build import BuildWarning, Library, Progress, build
from convgen.building.processor import processor_name
from convgen.checking.verify import LIMITS as VERIFIED
from convgen.codegen.render import headers, render_unit
from convgen.engines import tuned
from convgen.engines.abi import TOO_LARGE
from convgen.engines.backends import SOURCE_SUFFIX
from convgen.engines.cost import Gpu
from convgen.measuring import machine
from convgen.measuring.reference import SampledReference
from convgen.measuring.timing import Clock, clock_for
from convgen.measuring.trial import first_line
from convgen.spec.dtypes import KINDS
from convgen.specialize import compile_commands
from convgen.tuning.choice import agree, combined, gpu_of, sharing
from convgen.tuning.jobs import Candidate, Job, Outcome, median_of
from convgen.tuning.kernels import Kernel, KernelError

LIMITS = VERIFIED | {
    "tf32x3": VERIFIED["f32"],
    "f16tc": VERIFIED["f16"],
    "bf16tc": VERIFIED["bf16"],
}
"""Largest relative norm of the error of a schedule that may win."""

_JOB_S = 4.0
"""Where no time is given, the rounds of a contraction end after so long."""

_ROUND_RUNS = 3
_TARGET_RUNS = 15
_HOPELESS = 1.15
"""Schedules that take so many times as long as the fastest are not run further."""

_FLUSHED_BYTES = 96 << 20
"""Written between runs on a processor, so that operands come from memory."""


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
                    ms=median_of(best),
                    default_ms=median_of(default) if default.spread else median_of(best),
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
    for group in sharing(outcomes):
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
        self._reference = SampledReference(spec, x, self.weight, None, grad, seed)
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
