"""One layer of a benchmark: operands, contenders, rounds, checks. See :mod:`measuring.bench`."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from convgen.checking.memory import poison, poisoned_memory
from convgen.measuring import machine
from convgen.measuring.layers import GRADIENTS, LAYOUTS, Layer, contender_name
from convgen.measuring.reference import Errors, SampledReference, agreement
from convgen.measuring.timing import Clock, Spread, spread
from convgen.spec.dtypes import DTYPES

DIRECTIONS = ("forward", "backward")

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


def memory_format(layout: str, ndim: int) -> torch.memory_format:
    """Torch's name for a layout of tensors with so many spatial dimensions."""
    if layout == "contiguous":
        return torch.contiguous_format
    return torch.channels_last if ndim == 2 else torch.channels_last_3d


class Contender:
    """A module and the inputs in its layout, run and timed in a thread of its own.

    ``sets`` are inputs and gradients of the output, ``gradients`` a key of
    :data:`convgen.measuring.layers.GRADIENTS`: what the backward pass is asked for.
    """

    def __init__(
        self,
        name: str,
        module: torch.nn.Module,
        sets: list[tuple[Tensor, Tensor]],
        clock: Clock,
        gradients: str,
        tf32: bool,
        layout: str,
        benchmark: bool = False,
    ) -> None:
        self.name = name
        self.layout = layout
        self.times: dict[str, list[float]] = {direction: [] for direction in DIRECTIONS}
        self._module = module
        self._gradients = GRADIENTS[gradients]
        self._wrt = {}
        for of, parameter in module.named_parameters():
            # What nobody asks for is not computed where it needs no gradient.
            parameter.requires_grad_(f"grad_{of}" in self._gradients)
            if parameter.requires_grad:
                self._wrt[f"grad_{of}"] = parameter
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

    def run(self, count: int, keep: bool = True) -> dict[str, Tensor]:
        """Runs and times; the results of the last run, which is on the first set of inputs.

        They have the names of :class:`convgen.measuring.reference.Errors`. ``keep`` says whether
        the times count.
        """
        if self._thread is None:
            return self._run(count, keep)
        return self._thread.submit(self._run, count, keep).result()

    def sample(self) -> None:
        """Runs for about as long as one turn takes."""
        self.run(max(1, min(10, int(_ROUND_S / self._run_s))))

    def spread(self, direction: str) -> Spread:
        return spread(self.times[direction])

    def step_bytes(self) -> int:
        """What one forward and backward pass allocates on a GPU at most, results included."""
        device = self._sets[0][0].device
        self.run(1, keep=False)  # memory that stays allocated belongs to no pass
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.run(1, keep=False)
        return torch.cuda.max_memory_allocated(device) - before

    @property
    def runs(self) -> int:
        return len(self.times["forward"])

    def _run(self, count: int, keep: bool) -> dict[str, Tensor]:
        x, grad = self._sets[0]
        if x.is_cuda:
            torch.cuda.set_device(x.device)
        intervals = []
        results: dict[str, Tensor] = {}
        start = time.monotonic()
        with (
            machine.settings(**self._switches),
            torch.autograd.set_multithreading_enabled(False),
        ):
            for index in reversed(range(count)):
                del results
                x, grad = self._sets[index % len(self._sets)]
                wrt: dict[str, Tensor] = dict(self._wrt)
                if "grad_input" in self._gradients:
                    wrt = {"grad_input": x} | wrt
                poison([grad.shape], x.dtype, x.device)
                output, forward = self._clock.time(
                    partial(self._module, x), self._cover_ms["forward"]
                )
                poison([tensor.shape for tensor in wrt.values()], x.dtype, x.device)
                grads, backward = self._clock.time(
                    partial(torch.autograd.grad, output, tuple(wrt.values()), grad),
                    self._cover_ms["backward"],
                )
                intervals.append((forward, backward))
                results = {"output": output.detach(), **dict(zip(wrt, grads, strict=True))}
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

    ``differences`` are those of convgen's whole results, by layout, from torch's default, where
    those are right.
    """

    times: dict[str, dict[str, Spread]]
    errors: dict[str, Errors]
    differences: dict[str, Errors]
    limit: float
    """What counts as right."""
    notes: tuple[str, ...]
    step_bytes: dict[str, int] = field(default_factory=dict)
    """By contender, what a pass forward and backward allocates at most; empty on the CPU."""


class Trial:
    """One layer on one device: operands, contenders, rounds, checks.

    ``layouts`` are those that convgen is run in; torch is run in every layout that there is.
    """

    def __init__(
        self,
        layer: Layer,
        module: ModuleType,
        clock: Clock,
        device: torch.device,
        dtype: str,
        tf32: bool,
        seed: int,
        layouts: Sequence[str] = LAYOUTS[:1],
        gradients: str = "all",
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
        self._layouts = layouts
        self._gradients = gradients
        drawn = [
            (draw(layer.input_shape), draw(layer.output_shape)) for _ in range(self._set_count())
        ]
        self._sets = {layout: self._laid(drawn, layout) for layout in layer.layouts}
        x, grad = drawn[0]
        self._reference = SampledReference(
            spec, x, self._state["weight"], self._state.get("bias"), grad, seed
        )
        self._ours = [self._contender(module, layout, ours=True) for layout in layouts]

    def run(self, deadline: float) -> Outcome:
        """Runs in rounds until there are enough runs or the time (of time.monotonic) has come.

        Raises:
            RuntimeError: if convgen's module cannot run; torch.OutOfMemoryError among others.
        """
        with contextlib.ExitStack() as stack:
            for ours in self._ours:
                stack.callback(ours.close)
            poisoned = {ours.name: self._start(ours) for ours in self._ours}
            torchs = list(self._torchs(stack))
            hopeful = [*self._ours, *_hopeful(torchs, self._layouts)]
            while True:
                for contender in hopeful:
                    if contender.runs < _TARGET_RUNS:
                        contender.sample()
                fewest = min(contender.runs for contender in hopeful)
                enough = _LEAST_RUNS if time.monotonic() > deadline else _TARGET_RUNS
                if fewest >= enough:
                    break
                hopeful.reverse()
            return self._judge(torchs, poisoned)

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
        modes = (False, True) if self._device.type == "cuda" else (False,)
        for benchmark, layout in itertools.product(modes, self._layer.layouts):
            contender = self._contender(torch.nn, layout, benchmark=benchmark)
            stack.callback(contender.close)
            try:
                contender.run(1, keep=False)
                contender.run(2)
            except RuntimeError as error:
                self._notes.append(f"torch {contender.name}: {first_line(error)}")
            else:
                yield contender

    def _judge(self, torchs: Sequence[Contender], poisoned: Mapping[str, Errors]) -> Outcome:
        """One more timed run of everyone, whose results are compared with float64."""
        errors: dict[str, Errors] = {}
        differences: dict[str, Errors] = {}
        elsewhere: dict[str, set[str]] = {}
        theirs: dict[str, Tensor] = {}
        # Torch's default first: its results are held until convgen's are compared with them.
        contenders = sorted([*self._ours, *torchs], key=lambda each: each.name != "default")
        for contender in contenders:
            name, results = contender.name, contender.run(1)
            errors[name] = self._reference.errors(results)
            form = memory_format(contender.layout, self._layer.spec.ndim)
            elsewhere[name] = {
                of
                for of in ("output", "grad_input")
                if of in results and not results[of].is_contiguous(memory_format=form)
            }
            if name == "default" and errors[name].worst <= self._limit:
                theirs = results
            elif name in poisoned:
                errors[name] = errors[name].or_worse(poisoned[name])
                if theirs:
                    differences[contender.layout] = agreement(results, theirs)
            del results
        for ours in self._ours:
            usual = elsewhere.get(contender_name(ours.layout), set())
            if odd := sorted(elsewhere[ours.name] - usual):
                self._notes.append(f"{ours.name}: {', '.join(odd)} not {ours.layout} as torch's")
        return Outcome(
            times={
                contender.name: {direction: contender.spread(direction) for direction in DIRECTIONS}
                for contender in contenders
            },
            errors=errors,
            differences=differences,
            limit=self._limit,
            notes=tuple(self._notes),
            step_bytes={
                contender.name: contender.step_bytes()
                for contender in contenders
                if self._device.type == "cuda"
            },
        )

    def _contender(
        self, source: ModuleType, layout: str, ours: bool = False, benchmark: bool = False
    ) -> Contender:
        """A module of ``source``, torch.nn or a generated package, in a layout."""
        module: Any = make_module(self._layer, source, self._device, self._state["weight"].dtype)
        module.load_state_dict(self._state)
        if layout != "contiguous":  # as users have it: the weights are channels_last too
            module = module.to(memory_format=memory_format(layout, self._layer.spec.ndim))
        return Contender(
            contender_name(layout, ours=ours, benchmark=benchmark),
            module,
            self._sets[layout],
            self._clock,
            self._gradients,
            self._tf32,
            layout,
            benchmark,
        )

    def _laid(
        self, drawn: Sequence[tuple[Tensor, Tensor]], layout: str
    ) -> list[tuple[Tensor, Tensor]]:
        """Sets of inputs and gradients of the output in a layout."""
        form = memory_format(layout, self._layer.spec.ndim)
        asked = "grad_input" in GRADIENTS[self._gradients]
        return [
            (
                x.contiguous(memory_format=form).detach().requires_grad_(asked),
                grad.contiguous(memory_format=form),
            )
            for x, grad in drawn
        ]

    def _set_count(self) -> int:
        """How many sets of inputs rotate: more than the caches hold, within the memory."""
        elements = math.prod(self._layer.input_shape) + math.prod(self._layer.output_shape)
        set_bytes = elements * DTYPES[self._dtype].size_bytes
        wanted = min(1 + -(-self._clock.cache_bytes // set_bytes), _MOST_SETS)
        fitting = int(_MEMORY_SHARE * _free_bytes(self._device) / set_bytes)
        return max(1, min(wanted, fitting))


def _hopeful(torchs: Sequence[Contender], layouts: Sequence[str]) -> list[Contender]:
    """Torch's defaults in ``layouts``, and what may be the fastest there or of all, in a direction.

    The other configurations keep the times of their first runs.
    """

    def median_ms(contender: Contender, direction: str) -> float:
        return contender.spread(direction).median_ms

    def rivals(contender: Contender) -> Iterator[list[Contender]]:
        yield list(torchs)
        if contender.layout in layouts:
            yield [other for other in torchs if other.layout == contender.layout]

    return [
        contender
        for contender in torchs
        if (contender.layout in layouts and contender.name == contender_name(contender.layout))
        or any(
            median_ms(contender, direction)
            <= _HOPELESS * min(median_ms(other, direction) for other in others)
            for others in rivals(contender)
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
