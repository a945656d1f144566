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
    """Whether a tensor has its channels side by side, as torch reads it off the strides.

    Of one channel, or one position, contiguous tensors have, too.
    """
    if tensor.dim() != 5 or not tensor.is_contiguous(memory_format=CHANNELS_LAST):
        return False
    return not tensor.is_contiguous() or _strides_say_last(tensor.shape, tensor.stride())


def _strides_say_last(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """What torch takes for channels_last: is_strides_like_channels_last of c10/core/MemoryFormat.h.

    What could be either is contiguous.
    """
    least = 0
    for axis in (1, *range(len(shape) - 1, 1, -1), 0):
        if shape[axis] == 0 or strides[axis] < least or (axis == 0 and least == strides[1]):
            return False
        least = strides[axis] * shape[axis]
    return strides[1] != 0


def layout_by_strides(shape: Sequence[int]) -> bool:
    """Whether tensors of a shape may be contiguous and channels_last at once."""
    return len(shape) == 5 and (shape[1] == 1 or prod(shape[2:]) <= 1 or shape[0] == 0)


def first_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))


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
    if tensor.device.type == "cuda" and not tensor.is_contiguous() and lies_last(tensor):
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
