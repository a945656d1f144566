"""What torch would do with a call of an operator: nothing, where it need not be asked; else vmap.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _is_torch_function_mode_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from ._runtime import LEAST_ADDRESS, check_memory, is_freed

PLAIN_KEYSETS = {
    DispatchKeySet(key).add(autograd_key).raw_repr()
    for key, autograd_key in (
        (DispatchKey.CPU, DispatchKey.AutogradCPU),
        (DispatchKey.CUDA, DispatchKey.AutogradCUDA),
    )
}
"""Tensors with nothing going on: not traced, batched, fake or functional, and no mode active."""

_OTHERS = {type(None), tuple, torch.Size}


def below_autograd(
    operator: Any, kernel: Callable[..., Any], keyset: DispatchKeySet, *inputs: Any
) -> Any:
    """Goes on below the Autograd key, or straight to the kernel if nothing else is there."""
    if keyset.raw_repr() in PLAIN_KEYSETS:
        return kernel(*in_memory(inputs))
    with torch._C._AutoDispatchBelowAutograd():
        return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)


def forward(
    operator: Any, kernel: Callable[..., Any], keyset: DispatchKeySet | None, *inputs: Any
) -> Any:
    """`below_autograd` in the forward of a Function, where torch has switched derivatives off.

    Outer levels of torch.func (the outer one of two gradients) need them on. There is no keyset
    where the dispatcher was not asked.
    """
    if keyset is None:
        return kernel(*inputs)
    if keyset.raw_repr() in PLAIN_KEYSETS:
        return kernel(*in_memory(inputs))
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return below_autograd(operator, kernel, keyset, *inputs)


def in_memory(inputs: Sequence[Any]) -> Sequence[Any]:
    """Inputs as the kernels read them: torch's own tensors, whose memory is there.

    A subclass may override any method that a kernel calls. The dispatcher gives results its class.
    """
    for value in inputs:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            if value.data_ptr() < LEAST_ADDRESS:
                check_memory(value)
        elif kind is not list and kind not in _OTHERS and isinstance(value, Tensor):
            with torch._C.DisableTorchFunctionSubclass():
                return in_memory(
                    [
                        Tensor.as_subclass(each, Tensor) if isinstance(each, Tensor) else each
                        for each in inputs
                    ]
                )
    return inputs


def is_plain(inputs: tuple[Any, ...]) -> bool:
    """Whether the dispatcher would find nothing to do for a call but gradients and its kernel.

    It takes longer than a small kernel itself, and is left out where nothing compiles, traces,
    transforms, records or overrides the call, and all tensors are torch's own, in memory.
    """
    if (
        is_dynamo_compiling()
        or _is_torch_function_mode_enabled()
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _is_tracing()
        or _profiler_enabled()
    ):
        return False
    try:
        for value in inputs:
            kind = type(value)
            if kind is Tensor or kind is Parameter:
                # -x and zeros are computed when needed; what was freed is for the kernel to refuse.
                if value.is_neg() or (
                    (address := value.data_ptr()) < LEAST_ADDRESS
                    and (not address or is_freed(value))
                ):
                    return False
            elif kind not in _OTHERS:
                return False
    except RuntimeError:  # what torch.func wraps has no memory of its own
        return False
    return True


def has_tangent(value: Any) -> bool:
    """Whether forward-mode derivatives flow through a tensor."""
    if forward_ad._current_level < 0 or not isinstance(value, Tensor):
        return False
    return forward_ad.unpack_dual(value).tangent is not None


def batching_rule(operator: Any) -> Callable[..., Any]:
    """What torch.func.vmap does with an operator."""

    def rule(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        batched = [isinstance(dim, int) for dim in in_dims]
        operands = [
            value.movedim(dim, 0) if moves else value
            for value, dim, moves in zip(inputs, in_dims, batched, strict=True)
        ]
        if len(inputs) == 4 and batched == [True, False, False, False]:
            # fprop and dgrad have a batch of their own, which takes another one in.
            first, *others = operands
            result = operator(first.flatten(0, 1), *others)
            return result.reshape(*first.shape[:2], *result.shape[1:]), 0

        def example(index: int) -> tuple[Tensor, ...]:
            # Sums of no examples have the shape of one, and derivatives.
            chosen = (
                (value[index] if info.batch_size else value.sum(0)) if moves else value
                for value, moves in zip(operands, batched, strict=True)
            )
            result = operator(*chosen)
            return result if isinstance(result, tuple) else (result,)

        examples = [example(index) for index in range(max(info.batch_size, 1))]
        stacks = [torch.stack(each)[: info.batch_size] for each in zip(*examples, strict=True)]
        return (tuple(stacks), (0,) * len(stacks)) if len(stacks) > 1 else (stacks[0], 0)

    return rule
