"""One layer of a benchmark: operands, contenders, rounds, checks. See :mod:`measuring.bench`."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from convgen.checking.memory import poison, poisoned_memory
from convgen.measuring import machine
from convgen.measuring.layers import Layer
from convgen.measuring.reference import Errors, Reference, agreement
from convgen.measuring.timing import Clock, Spread, spread
from convgen.spec.dtypes import DTYPES

DIRECTIONS = ("forward", "backward")

OURS = "convgen"
"""Names convgen's contender; the others are configurations of torch, ``default`` one of them."""

LIMITS = {"f64": 1e-10, "f32": 1e-4, "f32 (TF32)": 1e-3, "f16": 5e-3, "bf16": 2e-2}
"""Largest relative norm of an error of a result that counts as right, torch's or convgen's. Wide:
they tell a wrong kernel from rounding; ``convgen verify`` judges accuracy."""

_TARGET_RUNS = 30
_LEAST_RUNS = 5
_ROUND_S = 0.1
"""Runs of one contender go on for so long before the next one's turn."""

_HOPELESS = 1.5
"""Configurations of torch that take so many times as long as its best are not run further."""

_MOST_SETS = 8
_MEMORY_SHARE = 0.25
"""Of the free memory, for inputs in one layout."""


class Contender:
    """A module and the inputs in its layout, run and timed in a thread of its own."""

    def __init__(
        self,
        how: str,
        module: torch.nn.Module,
        sets: list[tuple[Tensor, Tensor]],
        clock: Clock,
        tf32: bool,
        benchmark: bool,
    ) -> None:
        self.how = how
        self.times: dict[str, list[float]] = {direction: [] for direction in DIRECTIONS}
        self._module = module
        self._wrt = tuple(module.parameters())
        self._sets = sets
        self._clock = clock
        self._switches = {"tf32": tf32, "benchmark": benchmark}
        self._cover_ms = dict.fromkeys(DIRECTIONS, 0.0)
        self._run_s = 0.0
        # Torch remembers the plan that cuDNN chose for a shape, and does not ask whether
        # cudnn.benchmark was on when it did: in one thread, the first configuration would decide
        # for all. Its memory is per thread, so that each configuration gets a thread, in which
        # autograd too is told to stay. On the CPU a thread would only cost a second team of
        # OpenMP's.
        on_gpu = sets[0][0].is_cuda
        self._thread = ThreadPoolExecutor(1) if on_gpu else None

    def close(self) -> None:
        if self._thread:
            self._thread.shutdown()

    def run(self, count: int, keep: bool = True) -> tuple[Tensor, ...]:
        """Runs and times; the results of the last run, which is on the first set of inputs.

        ``keep`` says whether the times count.
        """
        if self._thread is None:
            return self._run(count, keep)
        return self._thread.submit(self._run, count, keep).result()

    def sample(self) -> None:
        """Runs for about as long as one turn takes."""
        self.run(max(1, min(10, int(_ROUND_S / self._run_s))))

    def spread(self, direction: str) -> Spread:
        return spread(self.times[direction])

    @property
    def runs(self) -> int:
        return len(self.times["forward"])

    def _run(self, count: int, keep: bool) -> tuple[Tensor, ...]:
        x, grad = self._sets[0]
        if x.is_cuda:
            torch.cuda.set_device(x.device)
        intervals = []
        results: tuple[Tensor, ...] = ()
        start = time.monotonic()
        with (
            machine.settings(**self._switches),
            torch.autograd.set_multithreading_enabled(False),
        ):
            for index in reversed(range(count)):
                del results
                x, grad = self._sets[index % len(self._sets)]
                wrt = (x, *self._wrt)
                poison([grad.shape], x.dtype, x.device)
                output, forward = self._clock.time(
                    partial(self._module, x), self._cover_ms["forward"]
                )
                poison([tensor.shape for tensor in wrt], x.dtype, x.device)
                grads, backward = self._clock.time(
                    partial(torch.autograd.grad, output, wrt, grad), self._cover_ms["backward"]
                )
                intervals.append((forward, backward))
                results = (output.detach(), *grads)
                del output, grads
            self._clock.wait()
        self._run_s = (time.monotonic() - start) / count
        for direction, timed in zip(DIRECTIONS, zip(*intervals, strict=True), strict=True):
            self._cover_ms[direction] = min(interval.host_ms for interval in timed)
            if keep:
                self.times[direction] += [interval.ms for interval in timed]
        return results


@dataclass(frozen=True)
class Outcome:
    """What a trial found: times and errors by contender, times by direction too.

    ``difference`` is that of convgen's whole results from torch's default, where those are right.
    """

    times: dict[str, dict[str, Spread]]
    errors: dict[str, Errors]
    difference: Errors
    limit: float
    """What counts as right."""
    notes: tuple[str, ...]


class Trial:
    """One layer on one device: operands, contenders, rounds, checks."""

    def __init__(
        self,
        layer: Layer,
        module: ModuleType,
        clock: Clock,
        device: torch.device,
        dtype: str,
        tf32: bool,
        seed: int,
    ) -> None:
        self._layer = layer
        self._clock = clock
        self._device = device
        self._dtype = dtype
        self._tf32 = tf32
        self._limit = LIMITS["f32 (TF32)" if tf32 else dtype]
        self._notes: list[str] = []
        torch_dtype = getattr(torch, DTYPES[dtype].torch_name)
        generator = torch.Generator(device).manual_seed(seed)

        def draw(shape: Sequence[int], scale: float = 1.0) -> Tensor:
            values = torch.randn(
                tuple(shape), generator=generator, device=device, dtype=torch_dtype
            )
            return values.mul_(scale)

        # Outputs of the size of the inputs, so that f16 neither overflows nor underflows.
        spec = layer.spec
        terms = math.prod(spec.kernel_size) * layer.in_channels // spec.groups
        scale = math.sqrt((math.prod(spec.stride) if spec.transposed else 1) / terms)
        self._state = {"weight": draw(layer.weight_shape, scale)}
        if layer.bias:
            self._state["bias"] = draw((layer.out_channels,))
        self._sets = [
            (draw(layer.input_shape).requires_grad_(), draw(layer.output_shape))
            for _ in range(self._set_count())
        ]
        x, grad = self._sets[0]
        self._reference = Reference(
            spec, x, self._state["weight"], self._state.get("bias"), grad, seed
        )
        self._ours = Contender(OURS, self._module(module), self._sets, clock, tf32, False)

    def run(self, deadline: float) -> Outcome:
        """Runs in rounds until there are enough runs or the time (of time.monotonic) has come.

        Raises:
            RuntimeError: if convgen's module cannot run; torch.OutOfMemoryError among others.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self._ours.close)
            poisoned = self._start(self._ours)
            torchs = {contender.how: contender for contender in self._torchs(stack)}
            hopeful = [self._ours, *_hopeful(list(torchs.values()))]
            while True:
                for contender in hopeful:
                    if contender.runs < _TARGET_RUNS:
                        contender.sample()
                fewest = min(contender.runs for contender in hopeful)
                enough = _LEAST_RUNS if time.monotonic() > deadline else _TARGET_RUNS
                if fewest >= enough:
                    break
                hopeful.reverse()
            return self._judge({OURS: self._ours, **torchs}, poisoned)

    def _start(self, ours: Contender) -> Errors:
        """First runs of convgen's, one of them with all memory poisoned, workspaces too."""
        with poisoned_memory():
            results = ours.run(1, keep=False)
        errors = self._reference.errors(results)
        del results
        ours.run(1, keep=False)
        ours.run(2)
        return errors

    def _torchs(self, stack: contextlib.ExitStack) -> Iterator[Contender]:
        """Torch in every configuration that it runs in, warm."""
        layouts = {"": (self._module(torch.nn), self._sets)}
        if self._layer.spec.ndim > 1:
            layouts["channels_last"] = self._channels_last()
        modes = (False, True) if self._device.type == "cuda" else (False,)
        for benchmark, (layout, (module, sets)) in itertools.product(modes, layouts.items()):
            how = " ".join(filter(None, (layout, "benchmark" * benchmark))) or "default"
            contender = Contender(how, module, sets, self._clock, self._tf32, benchmark)
            stack.callback(contender.close)
            try:
                contender.run(1, keep=False)
                contender.run(2)
            except RuntimeError as error:
                self._notes.append(f"torch {how}: {first_line(error)}")
            else:
                yield contender

    def _judge(self, contenders: dict[str, Contender], poisoned: Errors) -> Outcome:
        """One more timed run of everyone, whose results are compared with float64."""
        errors: dict[str, Errors] = {}
        difference = Errors(0.0, 0.0, 0.0, 0.0)
        theirs: tuple[Tensor, ...] = ()
        # Torch's default first: its results are held until convgen's are compared with them.
        for how in sorted(contenders, key=lambda how: how != "default"):
            results = contenders[how].run(1)
            errors[how] = self._reference.errors(results)
            if how == "default" and errors[how].worst <= self._limit:
                theirs = results
            elif how == OURS:
                errors[how] = errors[how].or_worse(poisoned)
                if theirs:
                    difference = Errors(*agreement(results, theirs))
                theirs = ()
            del results
        return Outcome(
            times={
                how: {direction: contender.spread(direction) for direction in DIRECTIONS}
                for how, contender in contenders.items()
            },
            errors=errors,
            difference=difference,
            limit=self._limit,
            notes=tuple(self._notes),
        )

    def _module(self, source: ModuleType) -> torch.nn.Module:
        """The layer as a module of ``source``, torch.nn or a generated package."""
        dtype = self._state["weight"].dtype
        module = make_module(self._layer, source, self._device, dtype)
        module.load_state_dict(self._state)
        return module

    def _channels_last(self) -> tuple[torch.nn.Module, list[tuple[Tensor, Tensor]]]:
        """Torch's module and the sets of inputs, all channels last."""
        two = self._layer.spec.ndim == 2
        layout = torch.channels_last if two else torch.channels_last_3d
        module: Any = self._module(torch.nn)
        sets = [
            (
                x.detach().contiguous(memory_format=layout).requires_grad_(),
                grad.contiguous(memory_format=layout),
            )
            for x, grad in self._sets
        ]
        return module.to(memory_format=layout), sets

    def _set_count(self) -> int:
        """How many sets of inputs rotate: more than the caches hold, within the memory."""
        elements = math.prod(self._layer.input_shape) + math.prod(self._layer.output_shape)
        set_bytes = elements * DTYPES[self._dtype].size_bytes
        wanted = min(1 + -(-self._clock.cache_bytes // set_bytes), _MOST_SETS)
        fitting = int(_MEMORY_SHARE * _free_bytes(self._device) / set_bytes)
        return max(1, min(wanted, fitting))


def _hopeful(torchs: list[Contender]) -> list[Contender]:
    """Torch's default, and the configurations that may turn out the fastest in a direction."""
    best = {
        direction: min((c.spread(direction).median_ms for c in torchs), default=0.0)
        for direction in DIRECTIONS
    }
    return [
        contender
        for contender in torchs
        if contender.how == "default"
        or any(
            contender.spread(direction).median_ms <= _HOPELESS * best[direction]
            for direction in DIRECTIONS
        )
    ]


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def make_module(
    layer: Layer, source: ModuleType, device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """A layer as a module of ``source``, torch.nn or a generated package."""
    spec = layer.spec
    arguments: dict[str, Any] = {}
    if source is torch.nn:
        names = ("kernel_size", "stride", "padding", "dilation", "groups")
        arguments = {name: getattr(spec, name) for name in names}
        if spec.transposed:
            arguments["output_padding"] = spec.output_padding
    module: torch.nn.Module = getattr(source, spec.class_name)(
        layer.in_channels,
        layer.out_channels,
        bias=layer.bias,
        device=device,
        dtype=dtype,
        **arguments,
    )
    return module


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
