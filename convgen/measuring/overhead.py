"""What a call costs the host, beside torch's own convolution: ``convgen bench --overhead``.

A small forward without gradients is called many times over; on a GPU the clock stops before the
kernels have run. What is left is the way from Python to the launch.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from convgen.measuring import machine
from convgen.measuring.layers import Layer, SuiteError
from convgen.measuring.timing import Spread, spread
from convgen.measuring.trial import make_module
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES

_CALLS = 50
"""Between two waits: fewer launches than what a GPU's queue holds, or the host waits in a call."""

_ROUNDS = 40


@dataclass(frozen=True)
class Overhead:
    """Time of the host in one call, in ms as all spreads are, over rounds of calls."""

    layer: str
    operator: str
    input_shape: tuple[int, ...]
    ours: Spread
    torch: Spread

    @property
    def extra_us(self) -> float:
        """What convgen's call takes more than torch's."""
        return 1e3 * (self.ours.median_ms - self.torch.median_ms)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        fields = dataclasses.asdict(self) | {"input_shape": list(self.input_shape)}
        return fields | {"extra_us": self.extra_us}


@dataclass(frozen=True)
class HostReport:
    """What :func:`overheads` measured, and where."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    rows: list[Overhead]
    failures: dict[str, str]
    """Layers without a module, and why."""

    @property
    def ok(self) -> bool:
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {**vars(self), "rows": [row.to_dict() for row in self.rows]}


def overheads(
    layers: Iterable[Layer],
    modules: dict[str, ModuleType | str],
    *,
    device: torch.device,
    dtype: str = "f32",
    tf32: bool = True,
) -> HostReport:
    """Measures layers at the smallest extents that they serve.

    Args are those of :func:`convgen.measuring.bench.bench`. On the CPU the time of the arithmetic
    is in the figures, torch's and convgen's alike, and channels are as few as the module allows.
    """
    rows, failures = [], {}
    torch_dtype = getattr(torch, DTYPES[dtype].torch_name)
    with machine.settings(tf32):
        for layer in layers:
            module = modules[layer.name]
            if isinstance(module, str):
                failures[layer.name] = module
            else:
                rows.append(_measure(layer, module, device, torch_dtype))
    settings = {"dtype": dtype, "tf32": tf32}
    return HostReport(machine.describe(device), settings, rows, failures)


def _measure(
    layer: Layer, module: ModuleType, device: torch.device, dtype: torch.dtype
) -> Overhead:
    small = _small(layer, ConvSpec.from_dict(module.SPEC), device)
    ours, theirs = (make_module(small, source, device, dtype) for source in (module, torch.nn))
    x = torch.randn(small.input_shape, device=device).to(dtype)
    times: dict[object, list[float]] = {ours: [], theirs: []}
    with torch.no_grad():
        for turn in range(_ROUNDS + 2):
            # Alternating, so that neither has the quieter half of the machine's time.
            for call in (ours, theirs) if turn % 2 else (theirs, ours):
                elapsed = _call_ms(call, x)
                if turn >= 2:
                    times[call].append(elapsed)
    return Overhead(
        layer.name, layer.spec.name, small.input_shape, spread(times[ours]), spread(times[theirs])
    )


def _call_ms(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> float:
    """Time of the host in one call, in ms, averaged over a few."""
    start = time.perf_counter()
    for _ in range(_CALLS):
        call(x)
    elapsed_s = time.perf_counter() - start
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return 1e3 * elapsed_s / _CALLS


def _small(layer: Layer, generated: ConvSpec, device: torch.device) -> Layer:
    """The layer on the smallest input of one example that has an output."""
    channels = layer.in_channels, layer.out_channels
    if device.type == "cpu" and generated.in_channels is None:
        channels = layer.spec.groups, layer.spec.groups
    extent = 2
    while True:
        shape = (1, channels[0], *(extent,) * layer.spec.ndim)
        try:
            return dataclasses.replace(layer, input_shape=shape, out_channels=channels[1])
        except SuiteError:
            extent += 1
