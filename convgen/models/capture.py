"""What a network gives its convolutions: one run of it, in which every call leaves its description.

For the run, layers have classes that write down what reaches torch's convolution (behind whatever
a subclass does before it) and then call torch. The run is of the network as it stands, in its
caller's context: gradients on or off, autocast, train or eval. Buffers and generators of random
numbers are as before afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from convgen.models import classes, layers
from convgen.models.errors import NetworkError
from convgen.models.layers import Found
from convgen.spec import ConvSpec


@dataclass(frozen=True)
class Like:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @staticmethod
    def of(tensor: Tensor) -> Like:
        return Like(
            tuple(map(int, tensor.shape)),
            tuple(map(int, tensor.stride())),
            tensor.dtype,
            tensor.requires_grad,
        )

    @property
    def layout(self) -> str:
        """``contiguous``, ``channels_last``, or its strides as ``2x1x4``; sizes of 1 fit all."""
        for name, order in (("contiguous", range), ("channels_last", _channels_last)):
            expected, fits = 1, True
            for axis in reversed(order(len(self.shape))):
                fits &= self.shape[axis] == 1 or self.stride[axis] == expected
                expected *= self.shape[axis]
            if fits:
                return name
        return "x".join(map(str, self.stride))

    def tensor(self, device: torch.device) -> Tensor:
        """Random values of the same shape, strides (if no two elements meet) and dtype."""
        dense = sorted(zip(self.stride, self.shape, strict=True))
        reach, meets = 1, False
        for stride, extent in dense:
            if extent > 1:
                meets |= stride < reach
                reach = stride * (extent - 1) + reach
        made = torch.empty(self.shape, dtype=self.dtype, device=device)
        if not meets and self.layout != "contiguous":
            made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        with torch.no_grad():
            made.copy_(torch.randn(self.shape, device=device) * 0.5)
        return made.requires_grad_(self.requires_grad and torch.is_grad_enabled())


def _channels_last(ndim: int) -> Sequence[int]:
    return (0, *range(2, ndim), 1)


@dataclass(frozen=True)
class Case:
    """One kind of call: what one convolution is given, and in which context."""

    spec: ConvSpec
    """With the output padding of the call, and without channels."""
    input: Like
    weight: Like
    bias: Like | None
    device: torch.device
    autocast: torch.dtype | None
    """What autocast casts to, None where it is off."""
    grad: bool
    """Whether gradients are recorded."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the products: autocast's, but for float64."""
        own = self.input.dtype
        return own if self.autocast is None or own == torch.float64 else self.autocast

    @property
    def backward(self) -> bool:
        """Whether there is anything to derive by."""
        operands = (self.input, self.weight, self.bias)
        return self.grad and any(each is not None and each.requires_grad for each in operands)

    @property
    def output_shape(self) -> tuple[int, ...]:
        extents = self.spec.output_extents(self.input.shape[2:])
        fine = self.weight.shape[1] * self.spec.groups
        channels = fine if self.spec.transposed else self.weight.shape[0]
        return (self.input.shape[0], channels, *extents)


@dataclass(frozen=True)
class Captured:
    """What a run of the network has shown."""

    calls: dict[str, dict[Case, int]]
    """Of each layer, by its name: its kinds of calls, and how often the run made each."""
    output: Any


def run(model: nn.Module, found: Sequence[Found], inputs: Any) -> Captured:
    """Runs a network once and describes the calls of its convolutions.

    Raises:
        NetworkError: if it does not take the inputs.
    """
    calls: dict[str, dict[Case, int]] = {}
    held = [(each.layer, type(each.layer)) for each in found]
    with undisturbed(model):
        try:
            for each in found:
                torch_class = layers.torch_class_of(each.layer)
                assert torch_class is not None
                recorder = _RECORDERS[torch_class]
                each.layer.__class__ = classes.derived(type(each.layer), recorder)
                each.layer.__dict__["_convgen_calls"] = calls.setdefault(each.name, {})
            # What is compiled of the network runs as it was written, so that calls are seen.
            with torch.compiler.set_stance("force_eager"):
                output = call(model, inputs)
        finally:
            for layer, layer_class in held:
                layer.__class__ = layer_class
                layer.__dict__.pop("_convgen_calls", None)
    return Captured(calls, output)


def call(model: nn.Module, inputs: Any) -> Any:
    """The network's result for a tensor, a tuple of arguments or a mapping of keywords.

    Raises:
        NetworkError: if it does not take them.
    """
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        shapes = ", ".join(map(_described, _flat(inputs)))
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NetworkError(f"the network does not take the inputs {shapes}: {why}") from error


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Gives buffers (statistics, vectors of spectral_norm) and random numbers back as they were."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    with torch.random.fork_rng(sorted(devices)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    if buffer.shape == before.shape:
                        buffer.copy_(before)


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


def _flat(inputs: Any) -> list[Any]:
    if isinstance(inputs, Mapping):
        return list(inputs.values())
    return list(inputs) if isinstance(inputs, tuple | list) else [inputs]


def _note(layer: Any, input: Tensor, weight: Tensor, bias: Any, output_padding: Any) -> None:
    """Writes down a call of a layer with a batch; what traces or maps the network calls none."""
    spec = layers.spec_of(layer)
    if spec is None or input.dim() != spec.ndim + 2:
        spec = None if spec is None or input.dim() != spec.ndim + 1 else spec
        if spec is None:
            return
        input = input.unsqueeze(0)
    fields = spec.to_dict() | {"output_padding": list(output_padding)}
    like = Like.of(input)
    if not spec.transposed and layer.padding_mode != "zeros":
        pads = list(layer._reversed_padding_repeated_twice)
        added = [pads[i] + pads[i + 1] for i in range(0, len(pads), 2)][::-1]
        shape = (*like.shape[:2], *(e + a for e, a in zip(like.shape[2:], added, strict=True)))
        like = Like(shape, _contiguous(shape), like.dtype, like.requires_grad)
    kind = input.device.type
    case = Case(
        ConvSpec.from_dict(fields),
        like,
        Like.of(weight),
        None if bias is None else Like.of(bias),
        input.device,
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        torch.is_grad_enabled(),
    )
    calls = layer._convgen_calls
    calls[case] = calls.get(case, 0) + 1


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides, reach = [], 1
    for extent in reversed(shape):
        strides.append(reach)
        reach *= max(extent, 1)
    return tuple(reversed(strides))


class _Convolution:
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        _note(self, input, weight, bias, (0,) * (weight.dim() - 2))
        return super()._conv_forward(input, weight, bias)  # type: ignore[misc,no-any-return]


class _Transposed:
    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        got: Any = self
        weight, padding = got.weight, got.output_padding
        if output_size is not None:
            padding = got._output_padding(
                input,
                list(output_size),
                list(got.stride),
                list(got.padding),
                list(got.kernel_size),
                len(got.kernel_size),
                list(got.dilation),
            )
        _note(self, input, weight, got.bias, padding)
        return super().forward(input, output_size)  # type: ignore[misc,no-any-return]


_RECORDERS: dict[type, type] = {
    torch_class: type(
        torch_class.__name__,
        (_Transposed if op.startswith("conv_transpose") else _Convolution, torch_class),
        {"__module__": __name__},
    )
    for torch_class, op in layers.OPERATOR_OF.items()
}
