"""A layer's call by convgen beside the same call by torch, in the context of the network.

Both are given the same random tensors, with the shapes, strides and dtypes that the network gave
the layer, under its autocast and whatever of torch's switches (TF32, ``cudnn.benchmark``,
deterministic algorithms) is on; they take turns, and medians count. On a GPU caches are cold.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convgen.measuring.reference import SampledReference, agreement
from convgen.measuring.timing import Clock, spread
from convgen.measuring.trial import LIMITS
from convgen.models import layers
from convgen.models.capture import Case

GAIN = 1.02
"""Times as fast as torch's a layer must be to be swapped: less may be the measurement's."""

SECONDS = 0.5
"""Of rounds for a case, unless the caller gives a time."""

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 50
_PATIENCE = 4.0
"""Layers so slow that a few rounds take as many times as long get three."""

Pair = tuple[float, float]


@dataclass(frozen=True)
class Times:
    """Medians in ms, (forward, backward); backward is 0 where there is none."""

    torch_ms: Pair
    convgen_ms: Pair
    agrees: bool
    """Whether all results are torch's within twice the rounding of the dtype, or it is torch's that
    are off."""

    @property
    def wins(self) -> bool:
        return self.agrees and GAIN * sum(self.convgen_ms) <= sum(self.torch_ms)


def measure(
    case: Case, function: Callable[..., Tensor] | None, clock: Clock, seconds: float = SECONDS
) -> Times:
    """Times a case by a package's function, if there is one, and by torch.

    Raises:
        RuntimeError: as either does, for want of memory, say.
    """
    calls = [torch_function(case)]
    if function is not None:
        padding = {"output_padding": case.spec.output_padding} if case.spec.transposed else {}
        calls.append(partial(function, **padding))
    with _context(case):
        operands = [
            None if like is None else like.tensor(case.device)
            for like in (case.input, case.weight, case.bias)
        ]
        names = ("grad_input", "grad_weight", "grad_bias")
        wrt = {
            name: each
            for name, each in zip(names, operands, strict=True)
            if each is not None and each.requires_grad
        }
        shape, dtype = case.output_shape, case.dtype
        grad_output = torch.randn(shape, device=case.device).to(dtype) if wrt else None
        runs = [_Run(each, operands, wrt, grad_output, clock) for each in calls]
        theirs, *ours = (run.results() for run in runs)
        agrees = all(_agree(case, each, theirs, operands, grad_output) for each in ours)
        del theirs, ours
        end = time.monotonic() + seconds
        start = time.monotonic()
        for round_ in range(_MOST_ROUNDS):
            now = time.monotonic()
            enough = now > end and (
                round_ >= _LEAST_ROUNDS or (round_ >= 3 and now > start + _PATIENCE * seconds)
            )
            if enough:
                break
            for run in runs if round_ % 2 else runs[::-1]:
                run.once()
    medians = [run.medians() for run in runs]
    return Times(medians[0], medians[1] if function else (0.0, 0.0), agrees)


def _agree(
    case: Case,
    ours: dict[str, Tensor],
    theirs: dict[str, Tensor],
    operands: list[Tensor | None],
    grad_output: Tensor | None,
) -> bool:
    """Whether results are torch's, but for its own errors.

    cuDNN's gradient of a weight loses digits where each element sums up millions of terms: 3e-3 of
    its norm in TF32, ten times what its operands' rounding explains. float64 tells who is off.
    """
    most = limit(case)
    apart = {name: off for name, off in asdict(agreement(ours, theirs)).items() if off > 2 * most}
    if not apart:
        return True
    if not all(map(math.isfinite, apart.values())):
        return False
    if grad_output is None:
        grad_output = torch.zeros(case.output_shape, device=case.device)
    rounded = [
        each if each is None or case.autocast is None else each.to(case.autocast)
        for each in operands
    ]
    x, weight, bias = rounded
    assert x is not None
    assert weight is not None
    exact = SampledReference(case.spec, x.detach(), weight.detach(), bias, grad_output)
    errors = {
        name: (exact.error_of(name, ours[name]), exact.error_of(name, theirs[name]))
        for name in apart
    }
    return all(mine <= most < its for mine, its in errors.values())


def torch_function(case: Case) -> Callable[..., Tensor]:
    """torch's own operator with the constants of a case."""
    spec = case.spec
    constants: dict[str, Any] = {
        "stride": spec.stride,
        "padding": spec.padding,
        "dilation": spec.dilation,
        "groups": spec.groups,
    }
    if spec.transposed:
        constants["output_padding"] = spec.output_padding
    return partial(getattr(torch.nn.functional, spec.op), **constants)


def limit(case: Case) -> float:
    """The relative norm of an error that counts as rounding."""
    name = layers.dtype_name(case.dtype) or "f32"
    if name == "f32" and case.device.type == "cuda" and allows_tf32():
        return LIMITS["f32 (TF32)"]
    return LIMITS[name]


def allows_tf32() -> bool:
    """Whether torch's convolutions may round fp32 to TF32."""
    cudnn: Any = torch.backends.cudnn
    # Not allow_tf32, which raises where a program has used the newer switches.
    return bool(cudnn.conv.fp32_precision == "tf32")


@contextlib.contextmanager
def _context(case: Case) -> Iterator[None]:
    enabled = case.autocast is not None
    kind = case.device.type
    with (
        torch.set_grad_enabled(case.grad),
        torch.autocast(kind, dtype=case.autocast, enabled=enabled),
    ):
        yield


class _Run:
    """One of the two, and its times."""

    def __init__(
        self,
        call: Callable[..., Tensor],
        operands: list[Tensor | None],
        wrt: dict[str, Tensor],
        grad_output: Tensor | None,
        clock: Clock,
    ) -> None:
        self._call = partial(call, *operands)
        self._wrt = wrt
        self._clock = clock
        self._forward: list[Any] = []
        self._backward: list[Any] = []
        self._grad_output = grad_output
        self._cover_ms = [0.0, 0.0]

    def results(self) -> dict[str, Tensor]:
        """The output and the gradients, of two runs that do not count."""
        for _ in range(2):
            output, intervals, gradients = self._run()
            self._clock.wait()
            self._cover_ms = [interval.host_ms for interval in intervals]
        return {"output": output.detach()} | dict(zip(self._wrt, gradients, strict=True))

    def once(self) -> None:
        _, intervals, _ = self._run()
        self._clock.wait()
        self._forward.append(intervals[0].ms)
        self._backward += [interval.ms for interval in intervals[1:]]

    def medians(self) -> Pair:
        backward = spread(self._backward).median_ms if self._backward else 0.0
        return spread(self._forward).median_ms, backward

    def _run(self) -> tuple[Tensor, list[Any], tuple[Tensor, ...]]:
        # A weight that autocast has cast for one call would be ready for the next, as in no step.
        torch.clear_autocast_cache()
        output, forward = self._clock.time(self._call, self._cover_ms[0])
        if not self._wrt:
            return output, [forward], ()
        # As the next layer gives it, in the output's memory format.
        assert self._grad_output is not None
        if self._grad_output.stride() != output.stride():
            self._grad_output = torch.empty_like(output).copy_(self._grad_output)
        derive = partial(torch.autograd.grad, output, tuple(self._wrt.values()), self._grad_output)
        gradients, backward = self._clock.time(derive, self._cover_ms[-1])
        return output, [forward, backward], tuple(gradients)
