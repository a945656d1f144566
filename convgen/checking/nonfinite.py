"""Where NaN and infinities of an operand may come out.

All results are sums of products. An element that is not finite belongs into the results in whose
sums it takes part, and into no other: neither of other channels or samples, nor of positions whose
windows do not read it, however near they lie. What no window reads at all must not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Run = Callable[..., Tensor]
Quantities = dict[str, Tensor]

OPERANDS = ("input", "weight", "grad")

_HUGE = 1e100
"""Stands for what is not finite where the reference finds out which results have part in it."""


def first_order(run: Run, inputs: Mapping[str, Tensor]) -> Quantities:
    """Forward and the gradients of ``input``, ``weight`` and maybe ``bias``, for ``grad``."""
    names = [name for name in ("input", "weight", "bias") if name in inputs]
    leaves = [inputs[name].detach().requires_grad_() for name in names]
    output = run(*leaves)
    gradients = torch.autograd.grad(output, leaves, inputs["grad"])
    return {
        "forward": output.detach(),
        **{f"grad {n}": g for n, g in zip(names, gradients, strict=True)},
    }


def not_finite(operand: str, inputs: Mapping[str, Tensor], reference: Run) -> Tensor:
    """Which elements of an operand shall not be finite: one of the first channel and one of the
    last, and of all channels those that no window reads."""
    tensor = inputs[operand]
    chosen = torch.zeros(tensor.shape, dtype=torch.bool)
    if operand != "weight":
        # The derivative of everything by an operand, with ones for the others.
        ones = {name: torch.ones_like(t, dtype=torch.float64) for name, t in inputs.items()}
        leaves = [ones[name].requires_grad_() for name in ("input", "weight")]
        output = reference(*leaves)
        if operand == "input":
            (read,) = torch.autograd.grad(output.sum(), leaves[0])
        else:
            read = output.detach()
        chosen |= read == 0
    # Of a sample each, at an even and an odd place where there is one.
    for index, place in ((0, 0), (-1, 1)):
        at = (index, index, *((extent // 4 * 2 + place) % extent for extent in tensor.shape[2:]))
        chosen[at] = True
    return chosen


def filled(tensor: Tensor, chosen: Tensor) -> Tensor:
    """A copy with NaN and infinity, in turns, in the elements chosen."""
    copy = tensor.clone()
    count = int(chosen.sum())
    values = torch.full((count,), math.nan, dtype=tensor.dtype)
    values[1::2] = math.inf
    copy[chosen] = values
    return copy


def reach(
    operand: str, chosen: Tensor, inputs: Mapping[str, Tensor], reference: Run
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Which results cannot be finite, and which need not be.

    The second are more for a weight, which may be multiplied by a zero of the padding: all results
    of its channels.
    """

    def part(of: Tensor) -> dict[str, Tensor]:
        ones = {name: torch.ones(t.shape, dtype=torch.float64) for name, t in inputs.items()}
        ones[operand][of] = _HUGE
        results = first_order(reference, ones)
        return {name: value > math.sqrt(_HUGE) for name, value in results.items()}

    must = part(chosen)
    if operand != "weight":
        return must, must
    whole = part(_throughout(chosen))
    return must, {name: _throughout(t) if t.dim() > 1 else t for name, t in whole.items()}


def _throughout(chosen: Tensor) -> Tensor:
    """All elements of the pairs of leading indices of which any is chosen."""
    return chosen.flatten(2).any(2)[(...,) + (None,) * (chosen.dim() - 2)].expand_as(chosen)


def spreads(result: Tensor, must: Tensor, may: Tensor) -> bool:
    """Whether anything is finite that cannot be, or is not that ought to be."""
    finite = result.detach().cpu().isfinite()
    return bool((finite & must).any() or (~finite & ~may).any())


def others(result: Tensor, may: Tensor, expected: Any) -> tuple[Tensor, Tensor]:
    """Results and expected values where both must be numbers, else zeros."""
    zeros = torch.zeros((), dtype=torch.float64)
    return (
        torch.where(may, zeros, result.detach().cpu().double()),
        torch.where(may, zeros, expected),
    )
