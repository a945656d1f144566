"""What may follow a convolution in its own kernel: activations, as torch.nn.functional has them.

An activation is written as its name and, where it has some, its arguments: ``relu``,
``leaky_relu:0.01``, ``gelu:tanh``, ``clamp:-1,1``. :data:`ACTIVATIONS` has all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from convgen.spec import documents


class ActivationError(ValueError):
    """A text that names no activation; says which there are."""


@dataclass(frozen=True)
class Kind:
    """An activation but for its arguments.

    Texts are formats over ``x``, ``saved``, ``grad`` and the arguments, ``a`` and ``b``.
    """

    forward: str
    """In Python, of a tensor ``x``."""
    backward: str
    """In Python, the derivative at what was ``saved`` times ``grad``: differentiable itself, unless
    there is a ``composite``."""
    cpp: str
    """In C++ and CUDA, of ``x``, a ``Real``: functions of the epilogues' headers."""
    of_output: Callable[..., bool] = lambda *_: False
    """Whether, for given arguments, the derivative can be had from the output."""
    defaults: tuple[float, ...] | None = ()
    """Of the arguments; None where they must be given."""
    count: int = 0
    """Of the arguments."""
    composite: str = ""
    """The derivative where it has none of its own: made of functions that have."""


_ALWAYS: Callable[..., bool] = lambda *_: True  # noqa: E731 - a value of a field
_ATEN = "torch.ops.aten."

ACTIVATIONS: dict[str, Kind] = {
    "relu": Kind(
        "F.relu({x})", _ATEN + "threshold_backward({grad}, {saved}, 0)", "relu({x})", _ALWAYS
    ),
    "leaky_relu": Kind(
        "F.leaky_relu({x}, {a})",
        _ATEN + "leaky_relu_backward({grad}, {saved}, {a}, False)",
        "leaky_relu({x}, Real({a}))",
        lambda slope: slope >= 0,
        (0.01,),
        1,
    ),
    "silu": Kind(
        "F.silu({x})",
        _ATEN + "silu_backward({grad}, {saved})",
        "silu({x})",
        composite="{grad} * torch.sigmoid({saved}) * (1 + {saved} * torch.sigmoid(-{saved}))",
    ),
    "gelu": Kind("F.gelu({x})", _ATEN + "gelu_backward({grad}, {saved})", "gelu({x})"),
    "gelu:tanh": Kind(
        'F.gelu({x}, approximate="tanh")',
        _ATEN + 'gelu_backward({grad}, {saved}, approximate="tanh")',
        "gelu_tanh({x})",
    ),
    "sigmoid": Kind(
        "torch.sigmoid({x})", _ATEN + "sigmoid_backward({grad}, {saved})", "sigmoid({x})", _ALWAYS
    ),
    "tanh": Kind(
        "torch.tanh({x})", _ATEN + "tanh_backward({grad}, {saved})", "tanh_({x})", _ALWAYS
    ),
    "hardswish": Kind(
        "F.hardswish({x})", _ATEN + "hardswish_backward({grad}, {saved})", "hardswish({x})"
    ),
    # Its gradient is that of torch.clamp, 1 at the bounds, which the output cannot tell from what
    # lies beyond them.
    "clamp": Kind(
        "torch.clamp({x}, {a}, {b})",
        "torch.where(({saved} >= {a}) & ({saved} <= {b}), {grad}, 0)",
        "clamp({x}, Real({a}), Real({b}))",
        defaults=None,
        count=2,
    ),
    # Its gradient is 0 at the bounds.
    "hardtanh": Kind(
        "F.hardtanh({x}, {a}, {b})",
        _ATEN + "hardtanh_backward({grad}, {saved}, {a}, {b})",
        "clamp({x}, Real({a}), Real({b}))",
        _ALWAYS,
        (-1.0, 1.0),
        2,
    ),
}
"""By the names that torch.nn.functional has (``clamp`` is torch's)."""

_ALIASES = {"relu6": "hardtanh:0,6", "gelu:none": "gelu"}


@dataclass(frozen=True)
class Activation:
    """An activation with its arguments."""

    name: str
    arguments: tuple[float, ...] = ()

    @staticmethod
    def parse(text: object) -> Activation:
        """The activation of a text such as ``leaky_relu:0.01``.

        Raises:
            ActivationError: if it is none; says which there are.
        """
        if not isinstance(text, str):
            raise ActivationError(f"activation={documents.shown(text)} is no text: {_known()}")
        text = _ALIASES.get(text, text)
        if text in ACTIVATIONS:
            kind = ACTIVATIONS[text]
            if kind.defaults is None:
                raise ActivationError(f"activation={text!r} needs {kind.count} numbers: {_known()}")
            return Activation(text, kind.defaults)
        name, colon, rest = text.partition(":")
        kind = ACTIVATIONS.get(name, Kind("", "", ""))
        if not kind.count or not colon:
            raise ActivationError(f"activation={documents.shown(text)} is not known: {_known()}")
        try:
            numbers = tuple(float(part) + 0.0 for part in rest.split(","))
        except ValueError:
            numbers = ()
        if len(numbers) != kind.count or any(map(math.isnan, numbers)):
            what = "a number" if kind.count == 1 else f"{kind.count} numbers"
            raise ActivationError(
                f"activation={documents.shown(text)}: {name} takes {what}, as in "
                f"{name}:{','.join(('-1', '1')[-kind.count :])}"
            )
        if name == "leaky_relu" and not math.isfinite(numbers[0]):
            raise ActivationError(f"activation={documents.shown(text)}: the slope must be finite")
        if kind.count == 2 and not numbers[0] < numbers[1]:
            raise ActivationError(
                f"activation={documents.shown(text)}: the first bound must be the smaller one"
            )
        return Activation(name, numbers)

    @property
    def text(self) -> str:
        """What :meth:`parse` reads."""
        return (
            f"{self.name}:{','.join(map(_number, self.arguments))}" if self.arguments else self.name
        )

    @property
    def identifier(self) -> str:
        """The text as part of a name: ``leaky_relu_0p01``, ``clamp_m1_1``, ``gelu_tanh``."""
        words = self.text.replace(":", "_").replace(",", "_")
        return words.replace(".", "p").replace("-", "m").replace("+", "")

    @property
    def saves_output(self) -> bool:
        """Whether the derivative is had from the output, and not from what goes in."""
        return self._kind.of_output(*self.arguments)

    def forward(self, x: str) -> str:
        """A Python expression over torch, ``F`` being torch.nn.functional."""
        return self._kind.forward.format(x=x, **self._named(_python))

    def backward(self, grad: str, saved: str) -> str:
        """A Python expression: ``grad`` times the derivative at what was saved."""
        return self._kind.backward.format(grad=grad, saved=saved, **self._named(_python))

    def composite(self, grad: str, saved: str) -> str:
        """The same where :meth:`backward` is not differentiable; empty where it is."""
        return self._kind.composite.format(grad=grad, saved=saved)

    def cpp(self, x: str) -> str:
        """A C++ expression of type ``Real``."""
        return self._kind.cpp.format(x=x, **self._named(_cpp))

    @cached_property
    def _kind(self) -> Kind:
        return ACTIVATIONS[self.name]

    def _named(self, show: Callable[[float], str]) -> dict[str, str]:
        return dict(zip("ab", map(show, self.arguments), strict=False))


def _known() -> str:
    names = [
        name
        if not kind.count
        else f"{name}:{','.join(('MIN', 'MAX') if kind.count > 1 else ('SLOPE',))}"
        for name, kind in ACTIVATIONS.items()
    ]
    return f"choose from {', '.join([*names, *_ALIASES])}"


def _number(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


def _python(value: float) -> str:
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _cpp(value: float) -> str:
    return repr(value) if math.isfinite(value) else ("INFINITY" if value > 0 else "-INFINITY")
