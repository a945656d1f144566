"""Times generated modules beside torch's own, in one process, and checks what is timed.

Every layer is run through the public module call, with all that it includes: packing of weights,
allocation of outputs, the autograd graph. One run is a forward pass and then the gradients of
input, weight and bias, each timed by itself from cold caches (:mod:`convgen.measuring.timing`), on
inputs that rotate among several sets, with outputs that lie in memory full of NaN. Runs of convgen
in each layout asked for, and of every configuration of torch, alternate, so that clocks and
temperature are the same for all. In channels_last, the weights are channels_last too.
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
from convgen.measuring.layers import LAYOUTS, OURS, Layer, contender_name
from convgen.measuring.machine import Ceilings
from convgen.measuring.reference import Errors
from convgen.measuring.timing import Spread, clock_for
from convgen.measuring.trial import DIRECTIONS, Outcome, Trial, first_line
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES
from convgen.specialize import generate, load

_ROUNDS_SHARE = 0.8
"""Of a layer's time; the rest is for the checks after the rounds."""

_LAYER_S = 10.0
"""Where no time is given, rounds of a layer end after so long."""


OVER = ("default", "same", "any")
"""What speed-ups are over: torch as it comes in the row's layout, its best there, its best."""


@dataclass(frozen=True)
class Row:
    """One direction of one layer in one layout.

    Times are None where the result was wrong or did not come.
    """

    layer: str
    operator: str
    """Canonical name of the specification."""
    input_shape: tuple[int, ...]
    out_channels: int
    direction: str
    layout: str
    """Of input, output and gradients, and of the weight: a word of ``LAYOUTS``."""
    ours: Spread | None
    torch: dict[str, Spread]
    """By configuration, whatever its layout: names that ``contender_name`` makes."""
    error: float
    """Of convgen's result against float64, by relative norm."""
    torch_errors: dict[str, float]
    limit: float
    flops: int
    traffic_bytes: int
    ceilings: Ceilings
    """The report's, which may rise."""
    notes: tuple[str, ...] = ()
    ours_bytes: int | None = None
    """What both directions together allocate at most, results included; None on the CPU."""
    torch_bytes: dict[str, int] = field(default_factory=dict)
    """The same of torch, by configuration."""

    @property
    def default(self) -> Spread | None:
        """Torch's time in this layout, as it comes."""
        return self.torch.get(contender_name(self.layout))

    @property
    def same_by(self) -> str | None:
        """The fastest configuration of torch in this layout."""
        return self._fastest(
            contender_name(self.layout, benchmark=benchmark) for benchmark in (False, True)
        )

    @property
    def any_by(self) -> str | None:
        """The fastest configuration of torch in any layout."""
        return self._fastest(self.torch)

    @property
    def best_same(self) -> Spread | None:
        """Torch's best time in this layout."""
        return None if self.same_by is None else self.torch[self.same_by]

    @property
    def best_any(self) -> Spread | None:
        """Torch's best time in any layout."""
        return None if self.any_by is None else self.torch[self.any_by]

    def over(self, what: str) -> float | None:
        """How many times as fast as torch's ``"default"`` or its best, ``"same"`` or ``"any"``.

        None unless both have times.
        """
        theirs = {"default": self.default, "same": self.best_same, "any": self.best_any}[what]
        if theirs is None or self.ours is None:
            return None
        return theirs.median_ms / self.ours.median_ms

    def _fastest(self, names: Iterable[str]) -> str | None:
        timed = [name for name in names if name in self.torch]
        return min(timed, key=lambda name: self.torch[name].median_ms, default=None)

    @property
    def floor_ms(self) -> float:
        """The least time by the ceilings."""
        return self.ceilings.floor_ms(self.flops, self.traffic_bytes)

    @property
    def suspicions(self) -> list[str]:
        """What is below the floor."""
        why = "an error of the measurement, or on a CPU operands that were in the caches"
        notes = []
        if self.ours is not None and self.ours.median_ms < self.floor_ms:
            notes.append(f"{contender_name(self.layout, ours=True)} is below the floor: {why}")
        if fast := [name for name, time_ in self.torch.items() if time_.median_ms < self.floor_ms]:
            notes.append(
                f"torch ({', '.join(fast)}) is below the floor: {why}, "
                "or an algorithm with fewer multiplications"
            )
        return notes

    @property
    def reached(self) -> float | None:
        """The floor over the time: 1 would be the roofline."""
        return None if self.ours is None else self.floor_ms / self.ours.median_ms

    @property
    def of_peak(self) -> float | None:
        """Operations per second, as a part of the ceiling's."""
        return (
            None if self.ours is None else self.ceilings.peak_ms(self.flops) / self.ours.median_ms
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, with what follows from the fields."""

        def times(value: Spread | None) -> dict[str, Any] | None:
            return None if value is None else vars(value)

        fields = {name: value for name, value in vars(self).items() if name != "ceilings"}
        return {
            **fields,
            "input_shape": list(self.input_shape),
            "ours": times(self.ours),
            "torch": {how: times(value) for how, value in self.torch.items()},
            "error": self.error if math.isfinite(self.error) else None,
            "torch_errors": {
                how: value if math.isfinite(value) else None
                for how, value in self.torch_errors.items()
            },
            "notes": [*self.notes, *self.suspicions],
            "floor_ms": self.floor_ms,
            "same_by": self.same_by,
            "any_by": self.any_by,
            **{f"over_{what}": self.over(what) for what in OVER},
            "reached": self.reached,
            "of_peak": self.of_peak,
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

    @property
    def layouts(self) -> list[str]:
        """Those that there are rows of."""
        return list(dict.fromkeys(row.layout for row in self.rows))

    def geometric_mean(self, layout: str, direction: str | None, over: str) -> float | None:
        """Of the speed-ups in a layout over a word of :data:`OVER`; None if there are none."""
        ratios = [
            ratio
            for row in self.rows
            if row.layout == layout
            and direction in (None, row.direction)
            and (ratio := row.over(over)) is not None
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
                layout: {
                    which or "all": {
                        over: self.geometric_mean(layout, which, over) for over in OVER
                    }
                    for which in (None, *DIRECTIONS)
                }
                for layout in self.layouts
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
    layouts: Sequence[str] = LAYOUTS[:1],
    gradients: str = "all",
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
        layouts: words of ``LAYOUTS`` to run convgen in. Torch's best in any layout is found in any
            case; a layer of one dimension is run in the one layout that it has.
        gradients: what the backward pass is of, a key of ``GRADIENTS``.
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
            "layouts": list(layouts),
            "gradients": gradients,
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
                of_layer = [word for word in layouts if word in layer.layouts]
                of_layer = of_layer or list(layer.layouts)
                # The trial has no name, so that its tensors are gone with it.
                outcome = Trial(
                    layer, module, clock, device, dtype, tf32, seed + index, of_layer, gradients
                ).run(now + _ROUNDS_SHARE * left)
                for layout in of_layer:
                    report.rows += _rows(layer, layout, outcome, report)
            except RuntimeError as error:
                report.failures[layer.name] = first_line(error)
        if on_layer:
            on_layer(report, layer.name)
        if not _usable(device):
            for lost in layers[index + 1 :]:
                report.failures[lost.name] = f"not run: {layer.name} left the GPU unusable"
            return report
    report.clocks.append(machine.clocks(device))
    report.ceilings.raise_to(machine.ceilings(device, dtype, tf32))
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


def _rows(layer: Layer, layout: str, outcome: Outcome, report: Report) -> list[Row]:
    """Both directions of a layer: what was wrong loses its time, and gets a note."""
    rows = []
    gradients = report.settings["gradients"]
    element_bytes = DTYPES[report.settings["dtype"]].size_bytes
    ours = contender_name(layout, ours=True)
    # Of convgen in another layout, other rows tell.
    names = [name for name in outcome.errors if name == ours or not name.startswith(OURS)]
    for direction in DIRECTIONS:
        errors = {name: outcome.errors[name].of(direction) for name in names}
        times = {
            name: outcome.times[name][direction]
            for name, error in errors.items()
            if error <= outcome.limit
        }
        notes = list(outcome.notes)
        notes += [
            f"{name} is wrong: error {error:.1e}"
            for name, error in errors.items()
            if name not in times
        ]
        difference = outcome.differences.get(layout, Errors()).of(direction)
        # Both may be off by the limit.
        if ours in times and difference > 2 * outcome.limit:
            del times[ours]
            notes.append(f"{ours} is wrong: it differs from torch by {difference:.1e}")
        rows.append(
            Row(
                layer=layer.name,
                operator=layer.spec.name,
                input_shape=layer.input_shape,
                out_channels=layer.out_channels,
                direction=direction,
                layout=layout,
                ours=times.pop(ours, None),
                torch=times,
                error=errors.pop(ours),
                torch_errors=errors,
                limit=outcome.limit,
                flops=layer.flops(direction, gradients),
                traffic_bytes=layer.traffic_bytes(direction, element_bytes, gradients),
                ceilings=report.ceilings,
                notes=tuple(notes),
                ours_bytes=outcome.step_bytes.get(ours),
                torch_bytes={
                    name: size
                    for name, size in outcome.step_bytes.items()
                    if not name.startswith(OURS)
                },
            )
        )
    return rows
