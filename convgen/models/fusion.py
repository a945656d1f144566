"""Convolutions that compute what follows them: neighbours in an ``nn.Sequential``.

``swap(model, fuse=True)`` gives such a container a class whose ``forward`` has a swapped
convolution's kernel compute the activation behind it, and folds a BatchNorm in eval mode between
the two into the convolution's weight and bias. Modules stay where they are, with their parameters
and names: whoever calls one of them, or a slice of the container, gets what it computes by itself.
What decides is asked at every call: a BatchNorm in training mode, a hook on one of the modules, or
a convolution that became torch's again is computed one by one, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from convgen.models import classes, layers
from convgen.models.classes import Swapped
from convgen.models.packages import Wanted
from convgen.spec import ConvSpec

_NUMBERED: dict[type, tuple[str, tuple[str, ...]]] = {
    nn.ReLU: ("relu", ()),
    nn.ReLU6: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)),
    nn.SiLU: ("silu", ()),
    nn.GELU: ("gelu", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.Hardswish: ("hardswish", ()),
    nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
}
"""torch's activations: the specification's name, and the attributes with its numbers."""

_NORMS: dict[type, int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}


def activation_of(module: nn.Module) -> str | None:
    """The activation of a module as a specification writes it; None for what is none."""
    if type(module) not in _NUMBERED:
        return None
    name, attributes = _NUMBERED[type(module)]
    if attributes:
        return f"{name}:{','.join(repr(float(getattr(module, each))) for each in attributes)}"
    return "gelu:tanh" if getattr(module, "approximate", "none") == "tanh" else name


@dataclass(frozen=True)
class Run:
    """Neighbours in a container: a convolution, maybe a BatchNorm, maybe an activation."""

    conv: nn.Module
    norm: _BatchNorm | None
    activation: nn.Module | None

    @property
    def length(self) -> int:
        return 1 + (self.norm is not None) + (self.activation is not None)

    def refusal(self) -> str:
        """Why these modules are computed one by one now; empty where they need not be."""
        conv: Any = self.conv
        if classes.original(type(conv)) not in layers.OPERATOR_OF and not layers.is_made_for_one(
            type(conv)
        ):
            return f"{type(conv).__name__} has a forward of its own"
        if conv._convgen_refused:
            return "the convolution is torch's"
        for module in (self.conv, self.norm, self.activation):
            if module is not None and _has_hooks(module):
                return f"{type(module).__name__} has hooks"
        norm = self.norm
        if norm is None:
            return ""
        if norm.training:
            return "BatchNorm is in training mode"
        if norm.running_mean is None or norm.running_var is None:
            return "BatchNorm has no running statistics"
        if norm.num_features != conv.out_channels:
            return "BatchNorm has other channels"
        return ""


def runs(modules: list[nn.Module]) -> Iterator[Run | nn.Module]:
    """A container's modules in turn: those that may be computed together, and the others."""
    at = 0
    while at < len(modules):
        first, norm, activation = modules[at], None, None
        if isinstance(first, Swapped):
            ndim = first._convgen_spec.ndim
            following = at + 1
            if following < len(modules) and _NORMS.get(type(modules[following])) == ndim:
                norm = modules[following]
                following += 1
            if following < len(modules) and activation_of(modules[following]) is not None:
                activation = modules[following]
        if norm is None and activation is None:
            yield first
            at += 1
            continue
        assert norm is None or isinstance(norm, _BatchNorm)
        run = Run(first, norm, activation)
        yield run
        at += run.length


class Fused:
    """What the classes of containers share."""

    def forward(self, input: Any) -> Any:
        """Every module in turn, neighbours together where they can be."""
        for each in runs(list(self._modules.values())):  # type: ignore[attr-defined]
            input = compute(each, input) if isinstance(each, Run) else each(input)
        return input

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles name the container's own class."""
        reduced = super().__reduce_ex__(protocol)
        assert isinstance(reduced, tuple)
        _, _, *rest = reduced
        return (_rebuild, (original(type(self)),), *rest)


def compute(run: Run, input: Any) -> Any:
    """The result of neighbours: of their kernel, or of one after the other."""
    modules = [each for each in (run.conv, run.norm, run.activation) if each is not None]
    hooked = not is_dynamo_compiling() and _has_any_global_hook()  # type: ignore[no-untyped-call]
    if hooked or not isinstance(input, Tensor) or run.refusal():
        for each in modules:
            input = each(input)
        return input
    conv: Any = run.conv
    text = None if run.activation is None else activation_of(run.activation)
    function = conv._convgen_function if text is None else _with_activation(conv, text)
    weight, bias = conv.weight, conv.bias
    if run.norm is not None:
        weight, bias = folded(conv._convgen_spec, run.norm, weight, bias)
    return conv._convgen_call(function, input, weight, bias)


_functions: dict[tuple[type, str], Callable[..., Tensor]] = {}
"""Functions with an activation, by the class of the convolution and the activation."""


def _with_activation(conv: nn.Module, text: str) -> Callable[..., Tensor]:
    key = type(conv), text
    if key not in _functions:
        what = _activated(conv, text)
        _functions[key] = classes.function_of(what.spec, what.dtypes, what.backend)
    return _functions[key]


def _activated(conv: nn.Module, text: str) -> Wanted:
    """The package of a swapped convolution with an activation."""
    spec, dtypes, device = classes.package_of(type(conv))
    return Wanted(replace(spec, activation=text), dtypes, device)


def folded(
    spec: ConvSpec, norm: _BatchNorm, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that computes a BatchNorm in eval mode, too.

    Computed in float32 or better, at every call, so that nothing has to be kept up to date; it is
    differentiable.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    exact = torch.promote_types(weight.dtype, torch.float32)
    scale = torch.rsqrt(norm.running_var.to(exact) + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.to(exact)
    shift = -norm.running_mean.to(exact) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.to(exact)
    if bias is not None:
        shift = shift + bias.to(exact) * scale
    ones = (1,) * spec.ndim
    if spec.transposed:
        # (in, out / groups, ...): a group's input channels lead to its output channels.
        by_group = scale.view(spec.groups, 1, -1).expand(-1, weight.shape[0] // spec.groups, -1)
        factor = by_group.reshape(*weight.shape[:2], *ones)
    else:
        factor = scale.view(-1, 1, *ones)
    return (weight.to(exact) * factor).to(weight.dtype), shift.to(weight.dtype)


@dataclass(frozen=True)
class Neighbours:
    """Those of a network that convgen may compute together."""

    container: nn.Sequential
    run: Run
    conv_name: str
    names: tuple[str, ...]
    """Of the modules behind the convolution."""


def find(model: nn.Module) -> list[Neighbours]:
    """The neighbours of all containers whose forward is nn.Sequential's."""
    names: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        names.setdefault(module, name)
    found = []
    for module in names:
        if not isinstance(module, nn.Sequential):
            continue
        own = type(module).forward is nn.Sequential.forward or isinstance(module, Fused)
        if not own or "forward" in vars(module):
            continue
        for each in runs(list(module)):
            if isinstance(each, Run):
                behind = [m for m in (each.norm, each.activation) if m is not None]
                found.append(
                    Neighbours(module, each, names[each.conv], tuple(names[m] for m in behind))
                )
    return found


def wanted(found: Neighbours) -> Wanted | None:
    """The package with the activation of neighbours; None where they have none."""
    if found.run.activation is None:
        return None
    return _activated(found.run.conv, activation_of(found.run.activation) or "")


def fuse(container: nn.Sequential) -> None:
    """Lets a container's neighbours be computed together."""
    if not isinstance(container, Fused):
        container.__class__ = _derived(type(container))


def unfuse(container: nn.Module) -> None:
    """Gives a container the class that it had."""
    container.__class__ = original(type(container))


def original(container_class: type) -> type:
    """The class that a container had."""
    held: type = vars(container_class).get("_convgen_original", container_class)
    return held


_made: dict[type, type] = {}


def _derived(container_class: type) -> type:
    if container_class not in _made:
        members = {
            "__module__": container_class.__module__,
            "__doc__": container_class.__doc__,
            "_convgen_original": container_class,
        }
        _made[container_class] = type(container_class)(
            container_class.__name__, (Fused, container_class), members
        )
    return _made[container_class]


def _rebuild(container_class: type) -> Any:
    made: Any = _derived(container_class)
    return made.__new__(made)


def _has_hooks(module: nn.Module) -> bool:
    got: Any = module
    return bool(
        got._forward_hooks
        or got._forward_pre_hooks
        or got._backward_hooks
        or got._backward_pre_hooks
        or "forward" in vars(module)
    )
