"""Activations of layers that are verified: exact ones, and torch's for comparison.

A derivative of an activation may be far less accurate than the number that it is had from. That
number was rounded to the tensors' dtype, and where a smooth activation is nearly flat, little of it
is left: of a sigmoid's result ``y`` near 1, the difference ``1 - y`` has few bits or none. In 16
bits, derivatives are also rounded before they are summed, and sums of few may cancel. Torch loses
as much. So no constant tells rounding from a wrong kernel there, but torch's own error on the same
inputs does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from convgen.spec.activation import Activation

_NEARBY = 2**-4
"""What is near an input differs from it by as much, relative to it, at most: enough for results to
be rounded otherwise, also where an activation is nearly flat."""


class _Sigmoid(Function):
    """A sigmoid whose derivative is not had from ``1 - y``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * _sigmoid(x) * _sigmoid(-x)


class _Tanh(Function):
    """A hyperbolic tangent whose derivative is not had from ``1 - y * y``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 4 * grad * _sigmoid(2 * x) * _sigmoid(-2 * x)


class _NormalCdf(Function):
    """Of a standard normal distribution, not had from ``1 + erf``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        doubled: Tensor = torch.special.erfc(-math.sqrt(0.5) * x)
        return doubled / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _apply(function: type[Function], x: Tensor) -> Tensor:
    result: Tensor = function.apply(x)  # type: ignore[no-untyped-call]
    return result


def _sigmoid(x: Tensor) -> Tensor:
    return _apply(_Sigmoid, x)


EXACT: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: x * _apply(_NormalCdf, x),
    "gelu:tanh": lambda x: x * _sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "sigmoid": _sigmoid,
    "tanh": lambda x: _apply(_Tanh, x),
}
"""Smooth activations of a float64 tensor, by their names in
:data:`convgen.spec.activation.ACTIVATIONS`. Their derivatives of all orders keep their digits where
they are small; those of torch's functions do not, in float64 either. The other activations are
straight lines and parabolas that meet in kinks."""


def of_torch(activation: Activation) -> Callable[[Tensor], Tensor]:
    """torch's function, of a tensor of any dtype."""
    code = compile(activation.forward("x"), "<activation>", "eval")

    def function(x: Tensor) -> Tensor:
        result: Tensor = eval(code, {"torch": torch, "F": F, "x": x})
        return result

    return function


class _At(Function):
    """Another tensor in the place of a function's result; derivatives are the function's."""

    @staticmethod
    def forward(ctx: Any, computed: Tensor, taken: Tensor) -> Tensor:
        return taken.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def at(computed: Tensor, taken: Tensor) -> Tensor:
    """``taken``, with the derivatives of ``computed``, of the same shape and dtype."""
    result: Tensor = _At.apply(computed, taken)  # type: ignore[no-untyped-call]
    return result


def to_tf32(tensor: Tensor) -> Tensor:
    """float32 numbers rounded to the ten bits of TF32, away from zero if halfway."""
    bits = tensor.detach().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def nearby(inputs: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Inputs on the CPU that differ from others by some percent at most, in their dtype."""

    def moved(tensor: Tensor) -> Tensor:
        random = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
        return (tensor.double() * (1 + _NEARBY * (2 * random - 1))).to(tensor.dtype)

    return {name: moved(tensor) for name, tensor in inputs.items()}
