"""Times generated modules beside torch's own, in one process, and checks what is timed.

Every layer is run through the public module call, with all that it includes: packing of weights,
allocation of outputs, the autograd graph. One run is a forward pass and then the gradients of
input, weight and bias, each timed by itself from cold caches (:mod:`convgen.measuring.timing`), on
inputs that rotate among several sets, with outputs that lie in memory full of NaN. Runs of convgen
and of every configuration of torch alternate, so that clocks and temperature are the same for all.
The last timed run of each is compared with float64 (:mod:`convgen.measuring.reference`); a wrong
result has no time.
"""

from __future__ import annotations

import gc
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from convgen.building.build import Progress, processors
from convgen.building.errors import BuildError
from convgen.measuring import machine
from convgen.measuring.layers import Layer
from convgen.measuring.machine import Ceilings
from convgen.measuring.timing import Spread, clock_for
from convgen.measuring.trial import DIRECTIONS, OURS, Outcome, Trial, first_line
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES
from convgen.specialize import generate, load

_ROUNDS_SHARE = 0.8
"""Of a layer's time; the rest is for the checks after the rounds."""

_LAYER_S = 10.0
"""Where no time is given, rounds of a layer end after so long."""


@dataclass(frozen=True)
class Row:
    """One direction of one layer. Times are None where the result was wrong or did not come."""

    layer: str
    operator: str
    """Canonical name of the specification."""
    input_shape: tuple[int, ...]
    out_channels: int
    direction: str
    ours: Spread | None
    torch: dict[str, Spread]
    """By configuration: ``default``, and what else was tried."""
    error: float
    """Of convgen's result against float64, by relative norm."""
    torch_errors: dict[str, float]
    limit: float
    flops: int
    traffic_bytes: int
    floor_ms: float
    notes: tuple[str, ...] = ()

    @property
    def default(self) -> Spread | None:
        """Torch's time as it comes."""
        return self.torch.get("default")

    @property
    def best_of_torch(self) -> str | None:
        """The fastest configuration of torch."""
        return min(self.torch, key=lambda how: self.torch[how].median_ms, default=None)

    @property
    def best(self) -> Spread | None:
        how = self.best_of_torch
        return None if how is None else self.torch[how]

    @property
    def over_default(self) -> float | None:
        """How many times as fast as torch's default; None unless both have times."""
        return _ratio(self.default, self.ours)

    @property
    def over_best(self) -> float | None:
        """How many times as fast as torch's best; None unless both have times."""
        return _ratio(self.best, self.ours)

    @property
    def reached(self) -> float | None:
        """The floor over the time: 1 would be the roofline."""
        return None if self.ours is None else self.floor_ms / self.ours.median_ms

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, with what follows from the fields."""

        def times(value: Spread | None) -> dict[str, Any] | None:
            return None if value is None else vars(value)

        derived = ("best_of_torch", "over_default", "over_best", "reached")
        return {
            **vars(self),
            "input_shape": list(self.input_shape),
            "ours": times(self.ours),
            "torch": {how: times(value) for how, value in self.torch.items()},
            "error": self.error if math.isfinite(self.error) else None,
            "torch_errors": {
                how: value if math.isfinite(value) else None
                for how, value in self.torch_errors.items()
            },
            "notes": list(self.notes),
            **{name: getattr(self, name) for name in derived},
        }


@dataclass
class Report:
    """What a benchmark found; rows come in as layers are finished."""

    machine: dict[str, Any]
    clocks: list[dict[str, str]]
    """Under load, before and after; empty dictionaries where unknown."""
    settings: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    """Layers that could not be run at all, and why."""

    @property
    def finished(self) -> int:
        """How many layers were run, or could not be."""
        return len({row.layer for row in self.rows} | set(self.failures))

    @property
    def ok(self) -> bool:
        """All layers ran, and convgen's results were right."""
        return not self.failures and all(row.ours is not None for row in self.rows)

    def geometric_mean(self, direction: str | None, over: str) -> float | None:
        """Of the speed-ups over ``"default"`` or ``"best"``; None if there are none."""
        ratios = [
            ratio
            for row in self.rows
            if direction in (None, row.direction)
            and (ratio := row.over_default if over == "default" else row.over_best) is not None
        ]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            "machine": self.machine,
            "clocks": self.clocks,
            "settings": self.settings,
            "ceilings": vars(self.ceilings),
            "rows": [row.to_dict() for row in self.rows],
            "failures": self.failures,
            "geometric_means": {
                name: {over: self.geometric_mean(which, over) for over in ("default", "best")}
                for name, which in (("all", None), *((name, name) for name in DIRECTIONS))
            },
        }


def device_for(name: str | None) -> torch.device | None:
    """``cpu`` or ``cuda`` (the current GPU), by default a GPU if there is one; None if missing."""
    if name == "cpu" or not torch.cuda.is_available():
        return None if name == "cuda" else torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def compile_layers(
    layers: Iterable[Layer],
    device: torch.device,
    dtype: str,
    fixed_channels: bool = False,
    progress: Progress | None = None,
) -> dict[str, ModuleType | str]:
    """Generated modules of all layers by their names, compiled side by side; or why not.

    ``progress(done, total, what)`` counts the steps of all packages that are being compiled.

    Raises:
        ToolchainError: if a compiler is missing.
    """
    specs = {layer.name: layer.fixed() if fixed_channels else layer.spec for layer in layers}
    lock = threading.Lock()
    steps: dict[ConvSpec, tuple[int, int]] = {}

    def build(spec: ConvSpec) -> Path | str:
        def step(done: int, total: int, what: str) -> None:
            with lock:
                steps[spec] = (done, total)
                if progress:
                    done, total = map(sum, zip(*steps.values(), strict=True))
                    progress(done, total, f"{spec.name}: {what}")

        try:
            return generate(spec, dtypes=(dtype,), backends=(device.type,), progress=step)
        except BuildError as error:
            return str(error)

    distinct = list(dict.fromkeys(specs.values()))
    # Each package keeps about three compilers busy, one for every contraction.
    with ThreadPoolExecutor(max(1, processors() // 3)) as pool:
        built = dict(zip(distinct, pool.map(build, distinct), strict=True))
    modules = {
        spec: result if isinstance(result, str) else load(result) for spec, result in built.items()
    }
    return {name: modules[spec] for name, spec in specs.items()}


def bench(
    layers: Sequence[Layer],
    modules: dict[str, ModuleType | str],
    *,
    device: torch.device,
    dtype: str = "f32",
    tf32: bool = True,
    seconds: float | None = None,
    seed: int = 0,
    on_layer: Callable[[Report, str], None] | None = None,
) -> Report:
    """Times layers against torch.

    Args:
        layers: what to run.
        modules: their generated modules, from :func:`compile_layers`.
        device: where.
        dtype: of inputs and weights, a key of ``convgen.spec.dtypes.DTYPES``.
        tf32: whether fp32 convolutions may round to TF32, torch's and convgen's alike.
        seconds: for all layers together; fewer runs where it does not suffice, and layers whose
            turn does not come are failures. By default about 10 s a layer.
        seed: of the inputs.
        on_layer: called with what is there so far and a layer's name when that is finished.
    """
    start = time.monotonic()
    tf32 = tf32 and dtype == "f32" and device.type == "cuda"
    report = Report(
        machine=machine.describe(device),
        clocks=[machine.clocks(device)],
        settings={
            "dtype": dtype,
            "tf32": tf32,
            "seconds": seconds,
            "seed": seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
        ceilings=machine.ceilings(device, dtype, tf32),
    )
    clock = clock_for(device)
    for index, layer in enumerate(layers):
        now = time.monotonic()
        left = _LAYER_S if seconds is None else (start + seconds - now) / (len(layers) - index)
        module = modules[layer.name]
        if isinstance(module, str):
            report.failures[layer.name] = module
        elif left <= 0:
            report.failures[layer.name] = "not run: the seconds were used up"
        else:
            try:
                # The trial has no name, so that its tensors are gone with it.
                outcome = Trial(layer, module, clock, device, dtype, tf32, seed + index).run(
                    now + _ROUNDS_SHARE * left
                )
                report.rows += _rows(layer, dtype, outcome, report.ceilings, device.type == "cpu")
            except RuntimeError as error:
                report.failures[layer.name] = first_line(error)
        if on_layer:
            on_layer(report, layer.name)
        if not _usable(device):
            for lost in layers[index + 1 :]:
                report.failures[lost.name] = f"not run: {layer.name} left the GPU unusable"
            return report
    report.clocks.append(machine.clocks(device))
    return report


def _usable(device: torch.device) -> bool:
    """Frees what the last layer left; False if it left a CUDA error that stays."""
    if device.type == "cpu":
        return True
    try:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def _rows(
    layer: Layer, dtype: str, outcome: Outcome, ceilings: Ceilings, warm_caches: bool
) -> list[Row]:
    """Both directions of a layer: what was wrong loses its time, what is suspicious gets a note."""
    rows = []
    suspicion = "an error of the measurement"
    if warm_caches:
        suspicion += ", or operands that were in the caches"
    for direction in DIRECTIONS:
        errors = {how: error.of(direction) for how, error in outcome.errors.items()}
        times = {
            how: outcome.times[how][direction]
            for how, error in errors.items()
            if error <= outcome.limit
        }
        notes = list(outcome.notes)
        notes += [
            f"{how} is wrong: error {error:.1e}"
            for how, error in errors.items()
            if how not in times
        ]
        difference = outcome.difference.of(direction)
        # Both may be off by the limit.
        if OURS in times and difference > 2 * outcome.limit:
            del times[OURS]
            notes.append(f"convgen is wrong: it differs from torch by {difference:.1e}")
        flops = layer.flops(direction)
        traffic_bytes = layer.traffic_bytes(direction, DTYPES[dtype].size_bytes)
        floor_ms = ceilings.floor_ms(flops, traffic_bytes)
        fast = [how for how, time_ in times.items() if time_.median_ms < floor_ms]
        if OURS in fast:
            notes.append(f"convgen is below the floor: {suspicion}")
        if others := [how for how in fast if how != OURS]:
            notes.append(
                f"torch ({', '.join(others)}) is below the floor: {suspicion}, "
                "or an algorithm with fewer multiplications"
            )
        rows.append(
            Row(
                layer=layer.name,
                operator=layer.spec.name,
                input_shape=layer.input_shape,
                out_channels=layer.out_channels,
                direction=direction,
                ours=times.pop(OURS, None),
                torch=times,
                error=errors.pop(OURS),
                torch_errors=errors,
                limit=outcome.limit,
                flops=flops,
                traffic_bytes=traffic_bytes,
                floor_ms=floor_ms,
                notes=tuple(notes),
            )
        )
    return rows


def _ratio(theirs: Spread | None, ours: Spread | None) -> float | None:
    return None if theirs is None or ours is None else theirs.median_ms / ours.median_ms
