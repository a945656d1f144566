"""The kernels of the package as functions of tensors: checks, shapes, calls.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

What they compute, and of what, is said in _operators.py, which makes torch operators of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ._layouts import (
    COARSE,
    FINE,
    WEIGHT,
    arranged,
    as_first,
    as_last,
    first_strides,
    last_strides,
    layout_by_strides,
    layout_of,
    lies_last,
)
from ._library import INTERPRETED
from ._runtime import (
    NAME,
    Launch,
    fp32_precision,
    new_tensor,
    prepare,
)
from ._supplement import check_generated, kernels_elsewhere

KERNEL_SIZE = (3, 3, 3)


# Shapes of the results. Operands that do not fit raise what torch's own convolutions raise.


def fprop_shape(
    fine: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int]
) -> tuple[int, ...]:
    _check_operands(fine, weight, bias)
    _check_size(size)
    _check_channels(fine, weight, weight.shape[1])
    _check_bias(bias, weight, weight.shape[0])
    _check_not_negative(size)
    return (fine.shape[0], weight.shape[0], *size)


def dgrad_shape(
    coarse: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int]
) -> tuple[int, ...]:
    _check_operands(coarse, weight, bias)
    _check_size(size)
    _check_channels(coarse, weight, weight.shape[0])
    _check_bias(bias, weight, weight.shape[1])
    # An empty batch may have empty extents, as with torch.
    if any(extent < 1 for extent in size) and (coarse.shape[0] != 0 or min(size) < 0):
        raise RuntimeError(
            f"Given input size per channel: {_by(coarse.shape[2:])}. "
            f"Calculated output size per channel: {_by(size)}. Output size is too small"
        )
    return (coarse.shape[0], weight.shape[1], *size)


def wgrad_shape(coarse: Tensor, fine: Tensor) -> tuple[int, ...]:
    _check_kind(coarse=coarse, fine=fine)
    if coarse.dim() != 5 or fine.dim() != 5 or coarse.shape[0] != fine.shape[0]:
        raise RuntimeError(
            f"{NAME}: tensors of sizes {list(coarse.shape)} and {list(fine.shape)} do not meet"
        )
    return (coarse.shape[1], fine.shape[1], *KERNEL_SIZE)


def bgrad_shape(grad: Tensor) -> tuple[int, ...]:
    _check_kind(grad=grad)
    if grad.dim() != 5:
        raise RuntimeError(f"{NAME} takes 5 dimensions, but got size {list(grad.shape)}")
    return (grad.shape[1],)


def wbgrad_shape(coarse: Tensor, fine: Tensor) -> tuple[tuple[int, ...], ...]:
    return wgrad_shape(coarse, fine), (fine.shape[1],)


def _check_operands(operand: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        _check_kind(input=operand, weight=weight)
    else:
        _check_kind(input=operand, weight=weight, bias=bias)
    if operand.dim() != 5 or weight.dim() != 5 or weight.shape[2:] != KERNEL_SIZE:
        raise RuntimeError(
            f"{NAME} takes an input of 5 dimensions and a weight with kernel size {KERNEL_SIZE}, "
            f"but got input of size {list(operand.shape)} and weight of size {list(weight.shape)}"
        )
    if 0 in operand.shape[2:] and operand.shape[0] != 0:
        raise RuntimeError(
            "Only zero batch or zero channel inputs are supported, "
            f"but got input shape: {list(operand.shape)}"
        )


def _check_size(size: Sequence[int]) -> None:
    if len(size) != 3 or not all(isinstance(extent, int | torch.SymInt) for extent in size):
        raise RuntimeError(f"{NAME}: the extents of a result are 3 ints, not {list(size)}")


def _check_not_negative(size: Sequence[int]) -> None:
    if any(extent < 0 for extent in size):
        raise RuntimeError(f"{NAME}: a result cannot have negative extents: {list(size)}")


def _check_kind(**tensors: Tensor) -> None:
    """One dtype and one device for all, for which there are kernels (or shapes alone, on meta)."""
    (name, first), *others = tensors.items()
    for other, tensor in others:
        if tensor.dtype != first.dtype:
            raise RuntimeError(
                f"{name.capitalize()} type ({first.dtype}) and {other} type ({tensor.dtype}) "
                "should be the same"
            )
        if tensor.device != first.device:
            raise RuntimeError(
                "Expected all tensors to be on the same device, "
                f"but {name} is on {first.device} and {other} is on {tensor.device}"
            )
    if not first.is_meta:
        check_generated(first.device, first.dtype)


def _check_channels(operand: Tensor, weight: Tensor, channels: int) -> None:
    if operand.shape[1] != channels:
        raise RuntimeError(
            f"Given transposed=1, weight of size {list(weight.shape)}, expected "
            f"input{list(operand.shape)} to have {channels} channels, "
            f"but got {operand.shape[1]} channels instead"
        )


def _check_bias(bias: Tensor | None, weight: Tensor, channels: int) -> None:
    if bias is not None and bias.shape != (channels,):
        raise RuntimeError(
            f"Given weight of size {list(weight.shape)}, expected bias to be 1-dimensional "
            f"with {channels} elements, but got bias of size {list(bias.shape)} instead"
        )


def _by(extents: Sequence[int]) -> str:
    return f"({' x '.join(map(str, extents))})"


# Kernels, for the CPU and CUDA alike. What follows from shapes, layouts, dtypes and devices is
# checked and computed once for each combination of them, and remembered: the result's shape and
# strides, its kernel, if its sums have terms, and the layout that this is for. Where contiguous
# operands may be channels_last as well (one channel, one position), strides tell: their plan has
# those of contiguous ones, for a call to compare.

_Strides = tuple[tuple[int, ...], tuple[int, ...]]
_Plan = tuple[tuple[int, ...], tuple[int, ...], Launch | None, int, _Strides | None]
plans: dict[tuple[Any, ...], _Plan] = {}


def fprop_kernel(fine: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
    key, plan, lie_first = find("fprop", fine, weight, bias, size)
    if plan is None:
        if other := elsewhere(fine, weight):
            return other.fprop_kernel(fine, weight, bias, size)  # type: ignore[no-any-return]
        shape = fprop_shape(fine, weight, bias, size)
        plan = remember(key, fine, shape, coarse=shape, fine=fine.shape)
    shape, strides, launch, layout, _ = plan
    if layout and launch is not None and not launch.takes_layouts:
        return as_last(fprop_kernel(as_first(fine), as_first(weight), bias, size))
    coarse = new_tensor(fine, shape, strides, launch)
    if launch is None:
        return bias_alone(coarse, bias)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if not lie_first:
        fine, weight = arranged(fine), arranged(weight)
    launch.run(coarse, fine, weight, bias)
    return coarse


def dgrad_kernel(
    coarse: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int]
) -> Tensor:
    key, plan, lie_first = find("dgrad", coarse, weight, bias, size)
    if plan is None:
        if other := elsewhere(coarse, weight):
            return other.dgrad_kernel(coarse, weight, bias, size)  # type: ignore[no-any-return]
        shape = dgrad_shape(coarse, weight, bias, size)
        plan = remember(key, coarse, shape, coarse=coarse.shape, fine=shape)
    shape, strides, launch, layout, _ = plan
    if layout and launch is not None and not launch.takes_layouts:
        return as_last(dgrad_kernel(as_first(coarse), as_first(weight), bias, size))
    fine = new_tensor(coarse, shape, strides, launch)
    if launch is None:
        return bias_alone(fine, bias)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if not lie_first:
        coarse, weight = arranged(coarse), arranged(weight)
    launch.run(coarse, fine, weight, bias)
    return fine


def wgrad_kernel(coarse: Tensor, fine: Tensor) -> Tensor:
    key, plan, lie_first = find("wgrad", coarse, fine)
    if plan is None:
        if other := elsewhere(coarse, fine):
            return other.wgrad_kernel(coarse, fine)  # type: ignore[no-any-return]
        shape = wgrad_shape(coarse, fine)
        plan = remember(key, coarse, shape, coarse=coarse.shape, fine=fine.shape)
    shape, strides, launch, layout, _ = plan
    if layout and launch is not None and not launch.takes_layouts:
        return as_last(wgrad_kernel(as_first(coarse), as_first(fine)))
    weight = new_tensor(coarse, shape, strides, launch)
    if launch is None:
        return weight.zero_()
    if not lie_first:
        coarse, fine = arranged(coarse), arranged(fine)
    launch.run(coarse, fine, weight, None)
    return weight


def bgrad_kernel(grad: Tensor) -> Tensor:
    layout = 0
    if not grad.is_contiguous():
        if lies_last(grad):
            layout = COARSE
        else:
            grad = grad.contiguous()
    key = key_of("bgrad", grad, grad, None, (), layout)
    if (plan := plans.get(key)) is None:
        if other := elsewhere(grad, grad):
            return other.bgrad_kernel(grad)  # type: ignore[no-any-return]
        shape = bgrad_shape(grad)
        plan = remember(key, grad, shape, coarse=grad.shape, fine=grad.shape)
    shape, strides, launch, *_ = plan
    bias = new_tensor(grad, shape, strides, launch)
    if launch is None:
        return bias.zero_()
    launch.run(grad, None, None, bias)
    return bias


def wbgrad_kernel(coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
    if not coarse.is_cpu or INTERPRETED:
        return wgrad_kernel(coarse, fine), bgrad_kernel(fine)
    key, plan, lie_first = find("wbgrad", coarse, fine)
    if plan is None:
        if other := elsewhere(coarse, fine):
            return other.wbgrad_kernel(coarse, fine)  # type: ignore[no-any-return]
        shape = wgrad_shape(coarse, fine)
        plan = remember(key, coarse, shape, coarse=coarse.shape, fine=fine.shape)
    shape, strides, launch, *_ = plan
    weight = new_tensor(coarse, shape, strides, launch)
    bias = new_tensor(coarse, (fine.shape[1],), (1,), launch)
    if launch is None:
        return weight.zero_(), bgrad_kernel(fine)
    if not lie_first:
        coarse, fine = arranged(coarse), arranged(fine)
    launch.run(coarse, fine, weight, bias)
    return weight, bias


def elsewhere(first: Tensor, second: Tensor) -> Any:
    """The kernels of another package for tensors that this one has none for; else None."""
    if first.dtype != second.dtype or first.device != second.device:
        return None  # a mistake, of which the shapes' checks speak
    return kernels_elsewhere(first.device, first.dtype)


def find(
    contraction: str,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    size: Sequence[int] = (),
) -> tuple[tuple[Any, ...], _Plan | None, bool]:
    """The key of a call, its plan if there is one yet, and whether both operands are contiguous."""
    lie_first = first.is_contiguous() and second.is_contiguous()
    if lie_first:
        key = key_of(contraction, first, second, bias, size, 0)
        plan = plans.get(key)
        if plan is not None and (plan[4] is None or plan[4] == (first.stride(), second.stride())):
            return key, plan, True
        if not (layout_by_strides(first.shape) or layout_by_strides(second.shape)):
            return key, None, True
    layout = layout_of(first, second, _BITS[contraction])
    key = key_of(contraction, first, second, bias, size, layout)
    return key, plans.get(key), lie_first


_BITS = {
    "fprop": (FINE, WEIGHT, COARSE),
    "dgrad": (COARSE, WEIGHT, FINE),
    "wgrad": (COARSE, FINE, WEIGHT),
    "wbgrad": (COARSE, FINE, WEIGHT),
}
"""Of each contraction, the bits of its operands and its result."""


def key_of(
    contraction: str,
    first: Tensor,
    second: Tensor,
    bias: Tensor | None = None,
    size: Sequence[int] = (),
    layout: int = 0,
) -> tuple[Any, ...]:
    """All that a plan depends on; `size` is the extents of the result."""
    device = first.device
    return (
        contraction,
        device,
        first.shape,
        first.dtype,
        second.shape,
        second.dtype,
        second.device == device,  # hashing it takes longer
        None if bias is None else (bias.shape, bias.dtype, bias.device == device),
        torch.get_num_threads(),
        layout,
        *size,
        fp32_precision(),
    )


def remember(
    key: tuple[Any, ...],
    operand: Tensor,
    shape: tuple[int, ...],
    *,
    coarse: Sequence[int],
    fine: Sequence[int],
) -> _Plan:
    for extents in (coarse, fine):
        if prod(extents) >= 1 << 63:  # not in a C struct either
            raise RuntimeError(f"{NAME}: size {list(extents)} has more elements than a tensor can")
    contraction, layout = key[0], key[9]
    launch = None
    if 0 not in coarse and 0 not in fine:
        launch = prepare(contraction, operand.device, operand.dtype, coarse, fine, key[-1], layout)
    if len(plans) >= 4096:  # extents that never repeat must not fill the memory
        plans.clear()
    strides = first_strides(shape)
    if layout and len(shape) == 5:
        strides = last_strides(shape)
    read, operands = None, (key[2], key[4])
    if not layout and any(map(layout_by_strides, operands)):
        read = first_strides(operands[0]), first_strides(operands[1])
    plan = plans[key] = (shape, strides, launch, layout, read)
    return plan


def bias_alone(result: Tensor, bias: Tensor | None) -> Tensor:
    return result.zero_() if bias is None else result.copy_(bias.view(-1, 1, 1, 1))
