"""Classes of swapped layers: torch's, or a user's, with convgen's kernels for the convolution.

A layer is swapped by its ``__class__`` alone. The new class derives from the layer's own, so that
attributes, hooks, ``isinstance`` and whatever a subclass does before and after stay as they are;
only where torch would call ``torch.nn.functional`` it calls a generated package.

======================================  ======================================================
layer                                   class
======================================  ======================================================
``nn.Conv3d``                           ``Conv3d(Swapped, nn.Conv3d)``
a subclass, ``CausalConv3d(nn.Conv3d)``  ``CausalConv3d(CausalConv3d, <the above>)``, so that its
                                        ``super().forward`` finds convgen's
a class that torch made for the layer   the same class made anew, its base exchanged: what is put
(``parametrize``, ``fully_shard``)      or taken away later finds the class that it expects
======================================  ======================================================

The first two have a home in ``convgen.swapped``, which pickles name.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from convgen.building import gpus, requests
from convgen.building.errors import BuildError
from convgen.building.folders import load
from convgen.building.toolchain import ToolchainError
from convgen.models import layers
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES
from convgen.specialize import generate, request_of

HOME = "convgen.swapped"

_ORIGINAL = "_convgen_original"
"""Of a class: the one that the layer had."""

_CONSTANTS = frozenset(
    (
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
        "in_channels",
        "out_channels",
    )
)
"""Attributes that a specification follows from; an output padding is given with each call."""

_TORCH_DTYPES = frozenset(getattr(torch, dtype.torch_name) for dtype in DTYPES.values())


class SwapWarning(UserWarning):
    """A swapped layer that torch computes from here on, and why."""


class Swapped:
    """What the classes of swapped layers share: they watch what the kernels were generated for."""

    _convgen_spec: ConvSpec
    _convgen_function: Callable[..., Tensor]
    """The package's function, under the name of torch's."""
    _convgen_refused = ""
    """Why torch computes this layer (a class's: all of it), empty where convgen does."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _CONSTANTS:
            self._convgen_compare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        self._convgen_compare()

    def _apply(self, *arguments: Any, **options: Any) -> Any:
        """Behind ``.to()``, ``.half()`` and the like, which may leave what has kernels."""
        result = super()._apply(*arguments, **options)  # type: ignore[misc]
        self._convgen_compare()
        return result

    def _convgen_compare(self) -> None:
        """Gives the layer to torch where it is not what was generated; calls pay nothing."""
        refusal = self._convgen_refusal()
        held = self.__dict__.pop("_convgen_refused", "")
        if refusal:
            self.__dict__["_convgen_refused"] = refusal
            if refusal != held:
                message = f"a swapped {type(self).__name__} is torch's from here on: {refusal}"
                warnings.warn(message, SwapWarning, stacklevel=3)

    def _convgen_refusal(self) -> str:
        if "padding_mode" not in self.__dict__:  # the last attribute that torch's constructor sets
            return ""
        assert isinstance(self, nn.Module)
        if layers.spec_of(self, like=self._convgen_spec) != self._convgen_spec:
            return "its attributes were changed; convgen.swap takes it again"
        tensor = layers.tensor_of(self)
        if tensor is not None and not tensor.is_meta:
            if tensor.device.type not in ("cpu", "cuda"):
                return f"there are no kernels for {tensor.device.type}"
            if tensor.dtype not in _TORCH_DTYPES:
                return f"there are no kernels for {tensor.dtype}"
        return ""


class Convolution(Swapped):
    """For torch's Conv1d, Conv2d and Conv3d: their ``forward`` calls ``_conv_forward``."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._convgen_refused:
            return super()._conv_forward(input, weight, bias)  # type: ignore[misc,no-any-return]
        return self._convgen_call(self._convgen_function, input, weight, bias)

    def _convgen_call(
        self, function: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The layer by another function than its class's."""
        if self.padding_mode != "zeros":  # type: ignore[attr-defined]
            pads = self._reversed_padding_repeated_twice  # type: ignore[attr-defined]
            input = nn.functional.pad(input, pads, mode=self.padding_mode)  # type: ignore[attr-defined]
        return function(input, weight, bias)


class Transposed(Swapped):
    """For torch's ConvTranspose1d, ConvTranspose2d and ConvTranspose3d."""

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        if self._convgen_refused:
            return super().forward(input, output_size)  # type: ignore[misc,no-any-return]
        output_padding = self.output_padding  # type: ignore[attr-defined]
        if output_size is not None:
            output_padding = self._output_padding(  # type: ignore[attr-defined]
                input,
                list(output_size),
                list(self.stride),  # type: ignore[attr-defined]
                list(self.padding),  # type: ignore[attr-defined]
                list(self.kernel_size),  # type: ignore[attr-defined]
                len(self.kernel_size),  # type: ignore[attr-defined]
                list(self.dilation),  # type: ignore[attr-defined]
            )
        return self._convgen_function(
            input,
            self.weight,  # type: ignore[attr-defined]
            self.bias,  # type: ignore[attr-defined]
            output_padding=output_padding,
        )

    def _convgen_call(
        self, function: Callable[..., Tensor], input: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The layer by another function than its class's, without an output size."""
        output_padding = self.output_padding  # type: ignore[attr-defined]
        return function(input, weight, bias, output_padding=output_padding)


_functions: dict[str, Callable[..., Tensor]] = {}
"""Functions of packages that this process has built or found, by the names of their modules."""


def module_name(spec: ConvSpec, dtypes: Sequence[str], device: str, of: type | None = None) -> str:
    """The home of a class.

    Args:
        spec: what its layers compute.
        dtypes: that kernels are generated for at once.
        device: ``"cpu"`` or ``"cuda"``, where the layers were when they were swapped.
        of: the user's class, if it is not torch's.
    """
    request = request_of(spec, dtypes=list(dtypes)) | {"device": device}
    if of is not None:
        request["of"] = [of.__module__, of.__qualname__]
    return f"{HOME}.{requests.module_name(spec.name, request)}"


def register(spec: ConvSpec, dtypes: Sequence[str], device: str, package: Any) -> type:
    """The class of torch's own layers of a specification, computed by a package's module."""
    name = module_name(spec, dtypes, device)
    _functions.setdefault(name, getattr(package, spec.op))
    return _in_home(name)


def requested(request: Mapping[str, Any], home: str) -> type:
    """The class that the name of a module in ``convgen.swapped`` asks for.

    Where its package is neither known nor found it is compiled; where that fails, the layers are
    torch's, and a warning says so: a network that was saved can always be read.
    """
    layer = {k: v for k, v in request.items() if k not in ("dtypes", "device", "of")}
    spec = ConvSpec.from_dict(layer)
    dtypes, device = tuple(request["dtypes"]), str(request["device"])
    if "of" in request:
        swapped = _in_home(module_name(spec, dtypes, device))
        return _derived(_named(*request["of"]), swapped, home)
    bases = (Transposed if spec.transposed else Convolution, getattr(nn, spec.class_name))
    members: dict[str, Any] = {
        "__module__": home,
        "__doc__": f"torch.nn.{spec.class_name} of {spec.name}, computed by convgen.",
        "_convgen_spec": spec,
        _ORIGINAL: bases[-1],
    }
    try:
        members["_convgen_function"] = staticmethod(_function(home, spec, dtypes, device))
    except (ToolchainError, BuildError) as error:
        why = f"kernels of {spec.name} can be neither found nor built here: {error}"
        warnings.warn(f"swapped layers are torch's: {why}", SwapWarning, stacklevel=2)
        members["_convgen_refused"] = why
    return type(spec.class_name, bases, members)


def remember(spec: ConvSpec, dtypes: Sequence[str], device: str, package: Any) -> None:
    """Keeps a package's function for :func:`function_of`."""
    _functions.setdefault(module_name(spec, dtypes, device), getattr(package, spec.op))


def function_of(spec: ConvSpec, dtypes: Sequence[str], device: str) -> Callable[..., Tensor]:
    """The function of a package that was remembered, is in the cache, or is compiled now."""
    return _function(module_name(spec, dtypes, device), spec, dtypes, device)


def package_of(layer_class: type) -> tuple[ConvSpec, tuple[str, ...], str]:
    """What serves the layers of a swapped class: specification, dtypes and device."""
    swapped = next(each for each in layer_class.__mro__ if "_convgen_spec" in vars(each))
    request = requests.read(swapped.__module__.rpartition(".")[2])
    assert request is not None
    spec: ConvSpec = vars(swapped)["_convgen_spec"]
    return spec, tuple(request["dtypes"]), str(request["device"])


def derived(layer_class: type, swapped: type) -> type:
    """The class of layers of ``layer_class`` whose convolution is that of a class of torch's own.

    ``swapped`` has two bases: what it does, and torch's class.
    """
    torch_class = next(each for each in swapped.__mro__ if each in layers.OPERATOR_OF)
    if layer_class is torch_class:
        return swapped
    if layers.is_made_for_one(layer_class):
        bases = tuple(
            derived(base, swapped) if issubclass(base, torch_class) else base
            for base in layer_class.__bases__
        )
        return _remade(layer_class, bases, {_ORIGINAL: layer_class})
    if _is_importable(layer_class) and swapped.__module__.startswith(f"{HOME}."):
        request = requests.read(swapped.__module__.rpartition(".")[2])
        assert request is not None
        spec = swapped._convgen_spec  # type: ignore[attr-defined]
        return _in_home(module_name(spec, request["dtypes"], request["device"], layer_class))
    return _derived(layer_class, swapped, layer_class.__module__)


def original(layer_class: type) -> type:
    """The class that a layer of a swapped class had; of others, the class itself."""
    if not issubclass(layer_class, Swapped):
        return layer_class
    held: type | None = vars(layer_class).get(_ORIGINAL)
    if held is not None and not layers.is_made_for_one(layer_class):
        return held
    # parametrize may have added properties to the class meanwhile, or taken some.
    members = vars(layer_class).keys() - {_ORIGINAL, "__doc__"}
    if held is not None and members == vars(held).keys() - {"__doc__"}:
        return held
    return _remade(layer_class, tuple(map(original, layer_class.__bases__)), {})


def _function(
    home: str, spec: ConvSpec, dtypes: Sequence[str], device: str
) -> Callable[..., Tensor]:
    if home not in _functions:
        here = "cuda" if device == "cuda" and gpus.gpu_architectures() else "cpu"
        package = load(generate(spec, dtypes=dtypes, backends=here))
        _functions[home] = getattr(package, spec.op)
    return _functions[home]


def _in_home(name: str) -> type:
    """The class of a module in ``convgen.swapped``."""
    importlib.import_module(HOME)
    module = importlib.import_module(name)
    members = vars(module).values()
    return next(m for m in members if isinstance(m, type) and m.__module__ == name)


_made: dict[tuple[type, type], type] = {}


def _derived(layer_class: type, swapped: type, home: str) -> type:
    """The class of a subclass's layers; the same one each time."""
    if (layer_class, swapped) not in _made:
        members = {
            "__module__": home,
            "__doc__": layer_class.__doc__,
            _ORIGINAL: layer_class,
        }
        # Its own metaclass, as the statement `class` would take it.
        _made[layer_class, swapped] = type(layer_class)(
            layer_class.__name__, (layer_class, swapped), members
        )
    return _made[layer_class, swapped]


def _remade(layer_class: type, bases: tuple[type, ...], members: Mapping[str, Any]) -> type:
    """A class made anew with other bases; it has no methods that say ``super()``."""
    held = {
        name: value
        for name, value in vars(layer_class).items()
        if name not in ("__dict__", "__weakref__", _ORIGINAL)
    }
    return type(layer_class)(layer_class.__name__, bases, held | dict(members))


def _named(module: str, qualname: str) -> type:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part)
    assert isinstance(found, type)
    return found


def _is_importable(layer_class: type) -> bool:
    """Whether a class's module and name lead to it, as pickles need it."""
    found: Any = sys.modules.get(layer_class.__module__)
    for part in layer_class.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is layer_class
