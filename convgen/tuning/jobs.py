"""What there is to tune, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convgen.engines import tensor_cores
from convgen.engines.cost import Prediction
from convgen.engines.problem import Call
from convgen.engines.registry import AnyPlan, Unit, units
from convgen.engines.tuned import GAIN
from convgen.measuring.layers import Layer
from convgen.measuring.timing import Spread, spread
from convgen.spec import CONTRACTIONS, ConvSpec
from convgen.spec.dtypes import TENSOR_CORE_MODES


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
        fastest = min(timed, key=median_of)
        default = self.default
        if default.spread and (
            median_of(default) <= GAIN * median_of(fastest)
            or median_of(default) <= spread_of(fastest).high_ms  # no more than noise
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
        return median_of(self.default) / median_of(self.best)

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
    """What there is to tune: of each layer the kernels that a module would take for it.

    Families beside the first of a kind (those with a suffix) choose among all of their compiled
    sizes when they are called: they have nothing to tune.
    """
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
            if unit.problem.kind in kinds
            and unit.problem.contraction in contractions
            and not unit.family.suffix
        ]
    return found


def spread_of(candidate: Candidate) -> Spread:
    """Of a candidate that was timed."""
    assert candidate.spread is not None
    return candidate.spread


def median_of(candidate: Candidate) -> float:
    """Median time in ms of a candidate that was timed."""
    return spread_of(candidate).median_ms
