"""The convolutions of a network: what each computes, and which of them can be swapped."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import UninitializedParameter

from convgen.models.errors import NetworkError
from convgen.spec import OPERATORS, ConvSpec, SpecError
from convgen.spec.dtypes import DTYPES

OPERATOR_OF: dict[type, str] = {
    nn.ConvTranspose3d: OPERATORS[0],
    nn.ConvTranspose2d: OPERATORS[1],
    nn.ConvTranspose1d: OPERATORS[2],
    nn.Conv3d: OPERATORS[3],
    nn.Conv2d: OPERATORS[4],
    nn.Conv1d: OPERATORS[5],
}

Only = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""Which layers: a pattern of names as ``decoder.*``, several, or a function of name and layer."""


@dataclass(frozen=True)
class Found:
    """A convolution of a network."""

    names: tuple[str, ...]
    """All that it is registered under."""
    layer: nn.Module
    spec: ConvSpec | None
    """What it computes, its output padding included; None where that has no specification."""
    refusal: str
    """Why it cannot be swapped; empty if it can."""

    @property
    def name(self) -> str:
        return self.names[0]


def find(model: nn.Module, only: Only | None = None) -> list[Found]:
    """The convolutions of a network in its own order, each once, whatever its names.

    A layer is taken if ``only`` takes one of its names.

    Raises:
        NetworkError: if a pattern matches no convolution.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _ConvNd):
            names.setdefault(module, []).append(name)
    if only is not None:
        wanted = _chooser(only, [name for each in names.values() for name in each])
        names = {
            module: each
            for module, each in names.items()
            if any(wanted(name, module) for name in each)
        }
    return [_found(tuple(each), module) for module, each in names.items()]


def torch_class_of(layer: nn.Module) -> type | None:
    """Which of torch's six classes a layer derives from; None for what derives from none."""
    return next((each for each in type(layer).__mro__ if each in OPERATOR_OF), None)


def spec_of(layer: nn.Module, like: ConvSpec | None = None) -> ConvSpec | None:
    """The specification of a layer's attributes; None where there is none.

    What a layer pads by another mode than zeros is padded before the convolution, which has no
    padding then. With ``like``, the channels are open where its are, and so is output padding.
    """
    torch_class = torch_class_of(layer)
    if torch_class is None:
        return None
    got: Any = layer
    try:
        spec = ConvSpec.make(
            OPERATOR_OF[torch_class],
            kernel_size=got.kernel_size,
            stride=got.stride,
            padding=got.padding if got.padding_mode == "zeros" else 0,
            output_padding=got.output_padding if like is None else like.output_padding,
            dilation=got.dilation,
            groups=got.groups,
            in_channels=None if like is None or like.in_channels is None else got.in_channels,
            out_channels=None if like is None or like.out_channels is None else got.out_channels,
        )
    except (SpecError, AttributeError):
        return None
    return spec


def tensor_of(layer: nn.Module) -> Tensor | None:
    """A parameter or buffer that shows a layer's dtype and device.

    Not ``layer.weight``: a parametrization would compute it, and count that it did.
    """
    for tensor in (*layer.parameters(), *layer.buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor
    return None


def is_made_for_one(layer_class: type) -> bool:
    """Whether torch made a class for one layer alone, as parametrize and fully_shard do."""
    return layer_class.__module__.startswith(("torch.nn.utils.parametrize", "torch.distributed."))


def _found(names: tuple[str, ...], layer: nn.Module) -> Found:
    spec = spec_of(layer)
    return Found(names, layer, spec, _refusal(layer, spec))


def _refusal(layer: nn.Module, spec: ConvSpec | None) -> str:
    torch_class = torch_class_of(layer)
    if torch_class is None:
        return "derives from none of torch's six classes"
    if any(isinstance(each, UninitializedParameter) for each in layer.parameters()):
        return "is lazy: run the network once before"
    if spec is None:
        return "has attributes that no specification has"
    tensor = tensor_of(layer)
    if tensor is None:
        return "has no floating-point parameters"
    if tensor.dtype not in _DTYPES:
        return f"is {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type not in ("cpu", "cuda"):
        return f"lies on {tensor.device.type}"
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not _is_dtensor(tensor):
        return f"has {type(tensor).__name__}s for parameters"
    if "forward" in vars(layer) or "_conv_forward" in vars(layer):
        return "has a forward of its own, set on the layer"
    return _own_forward(type(layer), torch_class)


_DTYPES = {getattr(torch, dtype.torch_name): dtype.name for dtype in DTYPES.values()}
"""torch's dtypes that kernels are generated for, and convgen's names for them."""


def dtype_name(dtype: torch.dtype) -> str | None:
    """convgen's name of a dtype; None for what has no kernels."""
    return _DTYPES.get(dtype)


def _is_dtensor(tensor: Tensor) -> bool:
    return type(tensor).__module__.startswith("torch.distributed.tensor")


def _own_forward(layer_class: type, torch_class: type) -> str:
    """Why a subclass's forward would not reach convgen's; empty if it would.

    Read from the names in its code: it must call torch's method, by ``super()`` or (of those whose
    ``forward`` goes on to ``_conv_forward``) by its name, and no convolution beside it.
    """
    transposed = OPERATOR_OF[torch_class].startswith("conv_transpose")
    for base in layer_class.__mro__[: layer_class.__mro__.index(torch_class)]:
        for method in ("forward",) if transposed else ("forward", "_conv_forward"):
            if method not in vars(base):
                continue
            function = inspect.unwrap(vars(base)[method])
            names = _names(getattr(function, "__code__", None))
            by_super = "super" in names and method in names
            by_name = method == "forward" and not transposed
            by_name = by_name and ("_conv_forward" in names or "forward" in names)
            if not (by_super or by_name):
                return f"{base.__name__}.{method} does not end in torch's"
            if own := sorted(names & {*OPERATORS, "convolution", "conv_transpose"}):
                return f"{base.__name__}.{method} calls {own[0]} itself"
    return ""


def _names(code: CodeType | None) -> set[str]:
    """Names of globals and attributes in a function, those within it too."""
    if code is None:
        return set()
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _chooser(only: Only, known: list[str]) -> Callable[[str, nn.Module], bool]:
    if callable(only):
        return only
    patterns = [only] if isinstance(only, str) else list(only)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise NetworkError(f"only={pattern!r} matches no convolution of the network")
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)
