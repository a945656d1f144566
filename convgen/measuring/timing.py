"""Clocks that time calls from cold caches: device events on a GPU, a host clock on the CPU.

On a GPU every timed region starts behind a write of several times the L2 cache. It evicts the
operands, leaves the cache full of dirty lines (so that results cannot hide in it for free), and
keeps the GPU busy while the call is enqueued: the region then holds the work of the call and not
the wait for the host, as in a training step that is not bound by the host.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")

_FLUSHED_CACHES = 4
_LEAST_FLUSH_BYTES = 256 << 20
_COVER = 2.0
"""The flush takes so many times as long as the host needs to enqueue the call behind it."""

_MOST_FLUSHES = 50


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a few timed runs, in ms."""

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int

    @property
    def iqr_ms(self) -> float:
        """Distance between the quartiles."""
        return self.high_ms - self.low_ms


def spread(times_ms: Iterable[float]) -> Spread:
    """Median and quartiles of at least one time."""
    times = sorted(times_ms)
    if len(times) == 1:
        return Spread(times[0], times[0], times[0], 1)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Spread(median, low, high, len(times))


class Interval(Protocol):
    """A timed region; ``ms`` may be read after :meth:`Clock.wait`."""

    @property
    def ms(self) -> float: ...

    host_ms: float
    """Time that the host spent in the call."""


class Clock(Protocol):
    """Times calls on one device."""

    cache_bytes: int
    """Inputs that are rotated should exceed this together, or the flush does it for them."""

    def time(self, call: Callable[[], T], cover_ms: float = 0.0) -> tuple[T, Interval]:
        """Runs a call from cold caches; its result, and the interval that it took.

        ``cover_ms`` is what the host needs to enqueue the call, about.
        """

    def wait(self) -> None:
        """Returns when all that was enqueued has run."""


@dataclass
class _HostInterval:
    host_ms: float

    @property
    def ms(self) -> float:
        return self.host_ms


class HostClock:
    """Times on the CPU. Nothing flushes its caches: rotate inputs that exceed them together."""

    cache_bytes = 128 << 20

    def time(self, call: Callable[[], T], cover_ms: float = 0.0) -> tuple[T, Interval]:
        start = time.perf_counter()
        result = call()
        return result, _HostInterval(1e3 * (time.perf_counter() - start))

    def wait(self) -> None:
        pass


@dataclass
class _DeviceInterval:
    start: Any
    end: Any
    host_ms: float

    @property
    def ms(self) -> float:
        elapsed: float = self.start.elapsed_time(self.end)
        return elapsed


class DeviceClock:
    """Times on the current stream of a CUDA device, with events around the call."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        l2_bytes: int = torch.cuda.get_device_properties(device).L2_cache_size
        # The flush takes care of the caches, so that a few input sets are enough.
        self.cache_bytes = l2_bytes
        size = max(_FLUSHED_CACHES * l2_bytes, _LEAST_FLUSH_BYTES)
        self._flushed = torch.empty(size // 4, dtype=torch.int32, device=device)
        self._flushed.zero_()
        _, interval = self.time(self._flushed.zero_)
        self.wait()
        self._flush_ms = interval.ms

    def time(self, call: Callable[[], T], cover_ms: float = 0.0) -> tuple[T, Interval]:
        flushes = 1
        if cover_ms:
            flushes = max(1, math.ceil(_COVER * cover_ms / self._flush_ms))
        for _ in range(min(flushes, _MOST_FLUSHES)):
            self._flushed.zero_()
        cuda: Any = torch.cuda
        stream = cuda.current_stream(self.device)
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        start.record(stream)
        before = time.perf_counter()
        result = call()
        host_ms = 1e3 * (time.perf_counter() - before)
        end.record(stream)
        return result, _DeviceInterval(start, end, host_ms)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)


def clock_for(device: torch.device) -> Clock:
    """The clock of a device, ``cpu`` or ``cuda``."""
    return DeviceClock(device) if device.type == "cuda" else HostClock()
