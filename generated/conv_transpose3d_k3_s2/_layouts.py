"""Memory formats, as torch's convolutions have them.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

Results have their channels side by side where an operand has.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from ._runtime import contiguous, transpose

CHANNELS_LAST = torch.channels_last_3d
COARSE, FINE, WEIGHT = 1, 2, 4  # ConvgenOperand: tensors whose channels lie side by side


def lies_last(tensor: Tensor) -> bool:
    """Whether a tensor that is not contiguous has its channels side by side."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=CHANNELS_LAST)


def new_result(shape: Sequence[int], first: Tensor, second: Tensor) -> Tensor:
    """Memory for the result of two operands."""
    if lies_last(first) or lies_last(second):
        return first.new_empty_strided(size=shape, stride=last_strides(shape))
    return first.new_empty(size=shape)


def last_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a tensor whose channels lie side by side."""
    _, channels, depth, height, width = shape
    line = width * channels
    return (depth * height * line, 1, height * line, line, channels)


def layout_of(first: Tensor, second: Tensor, bits: tuple[int, int, int]) -> int:
    """Which tensors have their channels side by side; `bits` are those of operands and result."""
    layout = (bits[0] if lies_last(first) else 0) | (bits[1] if lies_last(second) else 0)
    return layout | (bits[2] if layout else 0)


def arranged(tensor: Tensor) -> Tensor:
    """A tensor that is contiguous or has its channels side by side: a copy where it does not."""
    return tensor if tensor.is_contiguous() or lies_last(tensor) else contiguous(tensor)


def as_first(tensor: Tensor) -> Tensor:
    """A contiguous tensor, for kernels that take such ones alone."""
    # A copy by torch takes three to six times as long.
    if tensor.device.type == "cuda" and lies_last(tensor):
        positions = prod(tensor.shape[2:])
        result = tensor.new_empty(size=tensor.shape)
        return transpose(tensor, result, tensor.shape[0], positions, tensor.shape[1])
    return tensor.contiguous()


def as_last(result: Tensor) -> Tensor:
    """The result of such a kernel, as torch's would lie."""
    if result.device.type == "cuda" and result.numel():
        last = result.new_empty_strided(size=result.shape, stride=last_strides(result.shape))
        positions = prod(result.shape[2:])
        return transpose(result, last, result.shape[0], result.shape[1], positions)
    return result.contiguous(memory_format=CHANNELS_LAST)
