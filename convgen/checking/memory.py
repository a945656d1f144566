"""Memory full of NaN, so that what nobody wrote is found."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fills every new tensor with NaN until it is written, by torch's debugging switch."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switch: Any = torch.utils.deterministic
    filled = switch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switch.fill_uninitialized_memory = True
    try:
        yield
    finally:
        switch.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def poison(shapes: Iterable[Sequence[int]], dtype: torch.dtype, device: torch.device) -> None:
    """Fills memory for tensors of these shapes with NaN, and releases it.

    The allocator gives the same memory to the next tensors of these sizes, so that elements that
    a kernel forgets to write are NaN. Enqueued, not awaited.
    """
    held = [torch.full(tuple(shape), math.nan, dtype=dtype, device=device) for shape in shapes]
    del held
