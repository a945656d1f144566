"""What torch's tools are told of the package: tracers, exporters, counters, sharded tensors.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

Who asks for a graph (torch.jit.trace, the ONNX exporters) is given torch's own operator, since the
package's kernels are of no use to the reader of that graph. Nothing else is ever handed to torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._C import _is_tracing
from torch._decomp import decomposition_table, meta_table
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.overrides import handle_torch_function, has_torch_function_variadic
from torch.utils.flop_counter import register_flop_formula


def by_others(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: int | Sequence[int],
) -> Tensor | None:
    """The result where others take a call of `function`, which is the package's; None elsewhere.

    These are tensors with a `__torch_function__` (torch.fx's proxies too), and torch.jit.trace.
    """
    if is_dynamo_compiling():  # it calls __torch_function__ itself, and traces for kernels
        return None
    operands = input, weight, bias
    if has_torch_function_variadic(*operands):
        result: Tensor = handle_torch_function(
            function,
            operands,
            *operands,
            output_padding=output_padding,
        )
        return result
    if _is_tracing():
        return by_torch(*operands, output_padding)
    return None


_OWN = {Tensor, Parameter, type(None), list, tuple, torch.Size}


def wanted(ctx: Any) -> Sequence[bool]:
    """Which gradients of a Function the running backward pass asks for.

    ``needs_input_grad`` names all that may be asked for; torch.autograd.grad asks for some alone.
    """
    needs: tuple[bool, ...] = ctx.needs_input_grad
    edges = getattr(ctx, "next_functions", ())  # of the tensors, which come first; not torch.func's
    if needs.count(True) < 2 or not edges:
        return needs
    asked = [need and _is_executed(edge[0]) for need, edge in zip(needs, edges, strict=False)]
    return *asked, *needs[len(asked) :]


def _is_executed(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that torch.autograd.grad was given; or no pass of the engine
        return True


def as_own(inputs: Sequence[Any]) -> Sequence[Any]:
    """Inputs, with what subclasses of Tensor compute as torch does being torch's own tensors.

    Memory and gradients are the same. Such a subclass may override any method that is called here;
    its `__torch_function__` gives results its class. One with a `__torch_dispatch__` stays.
    """
    if _OWN.issuperset(map(type, inputs)) or is_dynamo_compiling():
        return inputs
    with torch._C.DisableTorchFunctionSubclass():
        return [
            Tensor.as_subclass(each, Tensor)
            if isinstance(each, Tensor)
            and type(each) not in _OWN
            and type(each).__torch_dispatch__ is Tensor.__torch_dispatch__
            else each
            for each in inputs
        ]


def by_torch(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: int | Sequence[int],
) -> Tensor:
    """The layer as torch computes it, for graphs that are read elsewhere."""
    return torch.nn.functional.conv_transpose3d(
        input,
        weight,
        bias,
        stride=(2, 2, 2),
        padding=(0, 0, 0),
        output_padding=output_padding,  # type: ignore[arg-type]
        dilation=(1, 1, 1),
        groups=1,
    )


def decompose(operand: Tensor, weight: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
    """The operator dgrad in torch's own, by which the ONNX exporter replaces it."""
    _, _, depth, height, width = operand.shape
    smallest = (
        depth * 2 + 1,
        height * 2 + 1,
        width * 2 + 1,
    )
    output_padding = [int(extent - least) for extent, least in zip(size, smallest, strict=True)]
    return by_torch(operand, weight, bias, output_padding)


def register(operators: Any) -> None:
    """Tells the tools that can be told beforehand: exporters and torch's counter of operations.

    Shapes of fake tensors stay what the operators say: for one that `meta_table` lacks, torch would
    take them from its decomposition.
    """
    meta_table[operators.dgrad.default] = decompose
    decomposition_table[operators.dgrad.default] = decompose

    # Each meeting of elements is a multiplication and an addition, as torch counts its own; torch
    # counts none for gradients of the bias.
    def flops(coarse: Sequence[int], weight: Sequence[int]) -> int:
        return 2 * coarse[0] * prod(coarse[2:]) * prod(weight)

    @register_flop_formula(operators.fprop)  # type: ignore[untyped-decorator]
    def _(*shapes: Any, out_shape: Sequence[int], **_: Any) -> int:
        return flops(out_shape, shapes[1])

    @register_flop_formula(operators.dgrad)  # type: ignore[untyped-decorator]
    def _(*shapes: Any, **_: Any) -> int:
        return flops(shapes[0], shapes[1])

    @register_flop_formula(operators.wgrad)  # type: ignore[untyped-decorator]
    def _(*shapes: Any, out_shape: Sequence[int], **_: Any) -> int:
        return flops(shapes[0], out_shape)

    @register_flop_formula(operators.wbgrad)  # type: ignore[untyped-decorator]
    def _(*shapes: Any, out_shape: Sequence[Sequence[int]], **_: Any) -> int:
        return flops(shapes[0], out_shape[0])


def tell_inductor(operators: Any) -> None:
    """Has Inductor call the operator although it has a decomposition, which is for exporters.

    In a program with CI in its environment, Inductor takes such operators for mistakes of its own.
    It is told by the operators when they are traced, for by then it is imported if it is in use.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    operator = operators.dgrad.default
    if lowering is not None and operator not in lowering.lowerings:
        lowering.make_fallback(operator, warn=False)


def count_as_torch(layer: type[torch.nn.Module], operator: Any) -> None:
    """Has other counters that are in use count a layer, and its operator, as they do torch's."""
    for module, table, ours, theirs, count in (
        ("ptflops.pytorch_ops", "MODULES_MAPPING", layer, layer.__base__, None),
        ("thop.profile", "register_hooks", layer, layer.__base__, None),
        ("ptflops.aten_ops", "ATEN_OPS_MAPPING", operator, torch.ops.aten.convolution, _as_aten),
    ):
        counters = getattr(sys.modules.get(module), table, {})
        if theirs in counters:
            counters.setdefault(ours, count(counters[theirs]) if count else counters[theirs])


def _as_aten(count: Callable[[Any, Any], int]) -> Callable[[Any, Any], int]:
    """Calls a counter of aten.convolution with the arguments that it would have."""
    constants = [2, 2, 2], [0, 0, 0], [1, 1, 1], True, [], 1
    return lambda inputs, outputs: count((*inputs[:3], *constants), outputs)


_sharded: set[Any] = set()


def register_shardings(operators: Any) -> None:
    """Tells DTensor how the operators can be sharded, once it is in use: to import it takes long.

    The batch can be, as for torch's own convolutions. Gradients of weight and bias sum over it.
    """
    if operators in _sharded or "torch.distributed.tensor" not in sys.modules:
        return
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo
    from torch.distributed.tensor.experimental import register_sharding

    whole, batch = Replicate(), Shard(0)

    def of_result(operand: Any, weight: Any, bias: Any, size: Any) -> Any:
        of_bias = None if bias is None else whole
        return [([each], [each, whole, of_bias, None]) for each in (whole, batch)]

    def of_sum(*operands: Any) -> Any:
        count = len(operands)
        return [([whole], [whole] * count), ([Partial()], [batch] * count)]

    def of_sums(*operands: Any) -> Any:
        return [([whole] * 2, [whole] * 2), ([Partial()] * 2, [batch] * 2)]

    register_sharding([operators.fprop.default, operators.dgrad.default])(of_result)
    register_sharding([operators.wgrad.default, operators.bgrad.default])(of_sum)
    register_sharding(operators.wbgrad.default)(of_sums)
    # What DTensor remembers of a call depends on `size` too, of which register_sharding knows not.
    of_calls = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    for operator in (operators.fprop.default, operators.dgrad.default):
        of_calls[operator] = RuntimeSchemaInfo(static_argnum=3, needs_pytree=True)
    _sharded.add(operators)
