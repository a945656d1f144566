"""The torch operators of the package: derivatives, registration.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

Three tensors meet in a convolution, each element where o = i * stride - padding + t * dilation:

    coarse  (N, A, *i)            the input of conv_transpose3d
    fine    (N, B, *o)            its output
    weight  (A, B / groups, *t)

The operators compute each of them from the others; `size` is the extents of the result:

    fprop(fine, weight, bias, size) -> coarse
    dgrad(coarse, weight, bias, size) -> fine
    wgrad(coarse, fine) -> weight
    bgrad(grad) -> bias, the sum over all but the channels
    wbgrad(coarse, fine) -> weight, bias: wgrad, and bgrad of fine

The derivatives of each are made of the others, so that derivatives of any order exist.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import (
    DispatchKeySet,
    _any_requires_grad,
    _are_functorch_transforms_active,
    is_grad_enabled,
)
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad
from torch.compiler import is_dynamo_compiling
from torch.library import Library, register_fake, register_vmap

from ._dispatch import (
    PLAIN_KEYSETS,
    batching_rule,
    below_autograd,
    forward,
    has_tangent,
    in_memory,
    is_plain,
)
from ._integration import as_own, register, register_shardings, tell_inductor, wanted
from ._kernels import (
    bgrad_kernel,
    bgrad_shape,
    dgrad_kernel,
    dgrad_shape,
    fprop_kernel,
    fprop_shape,
    wbgrad_kernel,
    wbgrad_shape,
    wgrad_kernel,
    wgrad_shape,
)
from ._layouts import arranged, new_result
from ._library import FOLDERS, VARIANT

NAMESPACE = "convgen_conv_transpose3d_k3_s2_59345b0d"
NAMESPACE += VARIANT


# Derivatives. Tensors are kept for the backward pass only where it needs them.


class Fprop(Function):
    @staticmethod
    def forward(
        ctx: Any,
        fine: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        size: Sequence[int],
        keyset: DispatchKeySet | None,
    ) -> Tensor:
        needs_fine, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(fine if needs_weight else None, weight if needs_fine else None)
        ctx.extents = fine.shape[2:]
        ctx.size = size
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(fine, weight)  # for `jvp`, which runs right after the forward
        return forward(fprop_op, fprop_kernel, keyset, fine, weight, bias, size)

    @staticmethod
    def jvp(ctx: Any, d_fine: Tensor, d_weight: Tensor, d_bias: Tensor | None, *_: None) -> Tensor:
        fine, weight = ctx.saved_tensors
        of_fine = fprop(d_fine, weight, d_bias, ctx.size)
        return of_fine + fprop(fine, d_weight, None, ctx.size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        fine, weight = ctx.saved_tensors
        if type(grad) is not Tensor or not grad.is_contiguous():
            grad = arranged(*as_own((grad,)))  # one copy for all that read it
        needs_fine, needs_weight, needs_bias = wanted(ctx)[:3]
        calls = PLAIN if is_plain((grad, fine, weight)) else CALLS
        grad_fine = calls.dgrad(grad, weight, None, ctx.extents) if needs_fine else None
        grad_weight = calls.wgrad(grad, fine) if needs_weight else None
        return grad_fine, grad_weight, calls.bgrad(grad) if needs_bias else None, None, None


class Dgrad(Function):
    @staticmethod
    def forward(
        ctx: Any,
        coarse: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        size: Sequence[int],
        keyset: DispatchKeySet | None,
    ) -> Tensor:
        needs_coarse, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(coarse if needs_weight else None, weight if needs_coarse else None)
        ctx.extents = coarse.shape[2:]
        ctx.size = size
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(coarse, weight)  # for `jvp`, which runs right after the forward
        return forward(dgrad_op, dgrad_kernel, keyset, coarse, weight, bias, size)

    @staticmethod
    def jvp(
        ctx: Any, d_coarse: Tensor, d_weight: Tensor, d_bias: Tensor | None, *_: None
    ) -> Tensor:
        coarse, weight = ctx.saved_tensors
        of_coarse = dgrad(d_coarse, weight, d_bias, ctx.size)
        return of_coarse + dgrad(coarse, d_weight, None, ctx.size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coarse, weight = ctx.saved_tensors
        if type(grad) is not Tensor or not grad.is_contiguous():
            grad = arranged(*as_own((grad,)))  # one copy for all that read it
        needs_coarse, needs_weight, needs_bias = wanted(ctx)[:3]
        calls = PLAIN if is_plain((grad, coarse, weight)) else CALLS
        grad_coarse = calls.fprop(grad, weight, None, ctx.extents) if needs_coarse else None
        if needs_weight and needs_bias:
            return grad_coarse, *calls.wbgrad(coarse, grad), None, None
        grad_weight = calls.wgrad(coarse, grad) if needs_weight else None
        return grad_coarse, grad_weight, calls.bgrad(grad) if needs_bias else None, None, None


class Wgrad(Function):
    @staticmethod
    def forward(ctx: Any, coarse: Tensor, fine: Tensor, keyset: DispatchKeySet | None) -> Tensor:
        needs_coarse, needs_fine = ctx.needs_input_grad[:2]
        ctx.save_for_backward(coarse if needs_fine else None, fine if needs_coarse else None)
        ctx.extents = coarse.shape[2:], fine.shape[2:]
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(coarse, fine)  # for `jvp`, which runs right after the forward
        return forward(wgrad_op, wgrad_kernel, keyset, coarse, fine)

    @staticmethod
    def jvp(ctx: Any, d_coarse: Tensor, d_fine: Tensor, *_: None) -> Tensor:
        coarse, fine = ctx.saved_tensors
        return wgrad(d_coarse, fine) + wgrad(coarse, d_fine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        coarse, fine = ctx.saved_tensors
        needs_coarse, needs_fine = wanted(ctx)[:2]
        coarse_extents, fine_extents = ctx.extents
        return (
            fprop(fine, grad, None, coarse_extents) if needs_coarse else None,
            dgrad(coarse, grad, None, fine_extents) if needs_fine else None,
            None,
        )


class Bgrad(Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, keyset: DispatchKeySet | None) -> Tensor:
        ctx.shape = grad.shape
        return forward(bgrad_op, bgrad_kernel, keyset, grad)

    @staticmethod
    def jvp(ctx: Any, d_grad: Tensor, *_: None) -> Tensor:
        return bgrad(d_grad)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = as_own((grad,))
        return grad.view(-1, 1, 1, 1).expand(ctx.shape), None


class Wbgrad(Function):
    @staticmethod
    def forward(
        ctx: Any, coarse: Tensor, fine: Tensor, keyset: DispatchKeySet | None
    ) -> tuple[Tensor, Tensor]:
        needs_coarse, needs_fine = ctx.needs_input_grad[:2]
        ctx.save_for_backward(coarse if needs_fine else None, fine if needs_coarse else None)
        ctx.extents = coarse.shape[2:], fine.shape[2:]
        if forward_ad._current_level >= 0:
            ctx.save_for_forward(coarse, fine)  # for `jvp`, which runs right after the forward
        return forward(wbgrad_op, wbgrad_kernel, keyset, coarse, fine)

    @staticmethod
    def jvp(ctx: Any, d_coarse: Tensor, d_fine: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        coarse, fine = ctx.saved_tensors
        d_weight = wgrad(d_coarse, fine) + wgrad(coarse, d_fine)
        return d_weight, bgrad(d_fine)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_bias: Tensor) -> tuple[Tensor | None, ...]:
        # The bias gradient's own gradient goes to all that it sums: a bias once more.
        coarse, fine = ctx.saved_tensors
        needs_coarse, needs_fine = wanted(ctx)[:2]
        coarse_extents, fine_extents = ctx.extents
        return (
            fprop(fine, grad, None, coarse_extents) if needs_coarse else None,
            dgrad(coarse, grad, grad_bias, fine_extents) if needs_fine else None,
            None,
        )


# Registration. torch.library.register_autograd would do, but its operators fail under torch.func
# and take twice as long to call.


def define(
    library: Library,
    schema: str,
    fake: Callable[..., Any],
    kernel: Callable[..., Any],
    apply: Callable[..., Any],
    rule: Callable[[Any], Callable[..., Any]] = batching_rule,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Registers an operator.

    `fake` gives results without elements, `apply` records derivatives, and `rule` is that of vmap.

    Returns a function that calls it, or does the same sooner, and one for calls of which `is_plain`
    is known.
    """
    # Any strides are taken, those that Inductor likes best too. If it had to keep eager's, it would
    # write a gradient once for each operator that reads it.
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    name = schema.partition("(")[0]
    operator = getattr(namespace, name).default

    def told_fake(*inputs: Any) -> Any:
        tell_inductor(namespace)
        return fake(*inputs)

    def autograd(keyset: DispatchKeySet, *inputs: Any) -> Any:
        if (
            keyset.raw_repr() in PLAIN_KEYSETS
            and forward_ad._current_level < 0
            and not _are_functorch_transforms_active()
        ):
            return call_plain(*in_memory(inputs))
        register_shardings(namespace)
        inputs = tuple(as_own(inputs))
        recorded = is_grad_enabled() and _any_requires_grad(*inputs)
        if not recorded and not any(map(has_tangent, inputs)):
            return below_autograd(operator, kernel, keyset, *inputs)
        if _are_functorch_transforms_active():
            # The dispatcher calls this once for each level; apply() of Function would start over.
            with enable_single_level_autograd_function():
                return apply(*inputs, keyset)
        return apply(*inputs, keyset)

    def call_plain(*inputs: Any) -> Any:
        if is_grad_enabled() and _any_requires_grad(*inputs):
            return apply(*inputs, None)
        return kernel(*inputs)

    def call(*inputs: Any) -> Any:
        if is_plain(inputs):
            return call_plain(*inputs)
        if not is_dynamo_compiling():
            register_shardings(namespace)  # the dispatcher asks for them next
        return operator(*inputs)

    register_fake(f"{NAMESPACE}::{name}", told_fake, lib=library)
    register_vmap(f"{NAMESPACE}::{name}", rule(operator), lib=library)
    library.impl(name, autograd, "Autograd", with_keyset=True)
    for key in ("CPU", "CUDA"):
        library.impl(name, lambda *inputs: kernel(*in_memory(inputs)), key)
    return call, call_plain


def applied(function: type[Function]) -> Callable[..., Any]:
    """What calls a Function; that of Function itself would ask torch.func again."""
    return super(Function, function).apply  # type: ignore[misc,no-any-return]


def _fake_of(shape: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    """Results without elements, of a function that gives their shapes."""

    def fake(*inputs: Any) -> Any:
        result = shape(*inputs)
        if isinstance(result[0], tuple):
            weight, bias = result
            return new_result(weight, inputs[0], inputs[1]), inputs[0].new_empty(bias)
        if len(result) == 1:
            return inputs[0].new_empty(result)
        return new_result(result, inputs[0], inputs[1])

    return fake


def _register(library: Library) -> list[tuple[Callable[..., Any], Callable[..., Any]]]:
    more = "Tensor weight, Tensor? bias, SymInt[] size) -> Tensor"
    pair = "Tensor coarse, Tensor fine) -> "
    operators: tuple[tuple[str, Callable[..., Any], Callable[..., Any], type[Function]], ...] = (
        (f"fprop(Tensor fine, {more}", fprop_shape, fprop_kernel, Fprop),
        (f"dgrad(Tensor coarse, {more}", dgrad_shape, dgrad_kernel, Dgrad),
        (f"wgrad({pair}Tensor", wgrad_shape, wgrad_kernel, Wgrad),
        ("bgrad(Tensor grad) -> Tensor", bgrad_shape, bgrad_kernel, Bgrad),
        (f"wbgrad({pair}(Tensor, Tensor)", wbgrad_shape, wbgrad_kernel, Wbgrad),
    )
    return [
        define(library, schema, _fake_of(shape), kernel, applied(function))
        for schema, shape, kernel, function in operators
    ]


# Operators belong to the process: a second copy of this package, or a reload, finds them here and
# only adds its folder to those where kernels are looked for.
namespace: Any = getattr(torch.ops, NAMESPACE)
if "library" in vars(namespace):
    namespace.folders.extend(FOLDERS)
else:
    namespace.library = Library(NAMESPACE, "DEF")
    namespace.calls = _register(namespace.library)
    namespace.folders = FOLDERS
    register(namespace)

fprop_op = namespace.fprop.default
dgrad_op = namespace.dgrad.default
wgrad_op = namespace.wgrad.default
bgrad_op = namespace.bgrad.default
wbgrad_op = namespace.wbgrad.default


class Calls(NamedTuple):
    """The operators as functions."""

    fprop: Callable[..., Tensor]
    dgrad: Callable[..., Tensor]
    wgrad: Callable[..., Tensor]
    bgrad: Callable[..., Tensor]
    wbgrad: Callable[..., tuple[Tensor, Tensor]]


CALLS = Calls(*(call for call, _ in namespace.calls))
PLAIN = Calls(*(plain for _, plain in namespace.calls))
"""The same for calls of which `is_plain` is known."""

fprop, dgrad, wgrad, bgrad, wbgrad = CALLS
