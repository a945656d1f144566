"""Layers with their shapes, as benchmarks run them, and the suites of layers in ``suites/``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

from convgen.spec import ConvSpec, SpecError, documents
from convgen.spec.documents import DocumentError, Length, Range

_FOLDER = Path(__file__).parents[1] / "suites"


_MOST_ELEMENTS = 1 << 48
"""Of a tensor: beyond all memory, though not beyond what sizes in bytes can be."""

Extent = Annotated[int, Range(0, _MOST_ELEMENTS)]


@dataclass(frozen=True)
class _Entry:
    """What an entry of a suite says beside the specification."""

    name: Annotated[str, Length(1, 200)]
    input: Annotated[tuple[Extent, ...], Length(2, 8)]
    out_channels: Extent
    bias: bool = False
    cpu: Annotated[tuple[Extent, ...], Length(2, 8)] | None = None


GRADIENTS = {
    "all": ("grad_input", "grad_weight", "grad_bias"),
    "input": ("grad_input",),
    "weight": ("grad_weight", "grad_bias"),
}
"""What a backward pass may be of: the gradients that it computes, where the layer has them."""

LAYOUTS = ("contiguous", "channels_last")
"""Torch's memory formats for activations; in one dimension there is only the first."""

OURS = "convgen"
"""Begins the names of convgen's contenders, as :func:`contender_name` makes them."""

_OF_LAYER = {field.name for field in fields(_Entry)}


class SuiteError(ValueError):
    """A suite or a layer in it that cannot be run; the message says where and why."""


@dataclass(frozen=True)
class Layer:
    """A convolution layer and the input that it is given.

    ``spec`` leaves the channels open; ``input_shape`` is (N, C_in, spatial extents...), and
    ``cpu_shape`` the smaller input with which the layer runs in seconds on two cores, if any.
    """

    name: str
    spec: ConvSpec
    input_shape: tuple[int, ...]
    out_channels: int
    bias: bool
    cpu_shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        name, given = documents.plain(self.name), documents.shown(list(self.input_shape))
        if self.spec.has_epilogue:
            # Torch's times and the reference would be those of the convolution alone.
            raise SuiteError(f"layer {name}: layers are measured without activation and residual")
        if len(self.input_shape) != self.spec.ndim + 2:
            raise SuiteError(
                f"layer {name}: {self.spec.op} takes a batched input of {self.spec.ndim + 2} "
                f"dimensions, not {given}"
            )
        try:
            self.fixed()
        except SpecError as error:
            raise SuiteError(f"layer {name}: {error}") from error
        output = documents.shown(list(self.output_shape))
        if any(extent < 1 for extent in self.output_shape):
            raise SuiteError(f"layer {name}: an input of {given} gives no output, {output}")
        if max(map(math.prod, (self.input_shape, self.output_shape))) > _MOST_ELEMENTS:
            raise SuiteError(f"layer {name}: {given} -> {output} is beyond all memory")

    @property
    def in_channels(self) -> int:
        return self.input_shape[1]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """(N, C_out, spatial extents...)."""
        extents = self.spec.output_extents(self.input_shape[2:])
        return (self.input_shape[0], self.out_channels, *extents)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As torch has it: (C_in, C_out / groups, *k) if transposed, (C_out, C_in / groups, *k)."""
        first, second = self.out_channels, self.in_channels
        if self.spec.transposed:
            first, second = second, first
        return (first, second // self.spec.groups, *self.spec.kernel_size)

    @property
    def layouts(self) -> tuple[str, ...]:
        """The layouts of :data:`LAYOUTS` that the layer may be run in."""
        return LAYOUTS if self.spec.ndim > 1 else LAYOUTS[:1]

    @property
    def multiplications(self) -> int:
        """Products of an input element and a weight that the layer needs, borders counted exactly.

        The same number for the forward pass, the gradient of the input and that of the weight.
        """
        coarse, fine = self.input_shape, self.output_shape
        if not self.spec.transposed:
            coarse, fine = fine, coarse
        pairs: list[int] = [
            # Taps t and coarse positions i whose fine position i * s - p + t * d exists.
            sum(
                max(0, min(ni, (no - 1 + p - t * d) // s + 1) - max(0, -(-(p - t * d) // s)))
                for t in range(k)
            )
            for ni, no, k, s, p, d in zip(
                coarse[2:],
                fine[2:],
                self.spec.kernel_size,
                self.spec.stride,
                self.spec.padding_begin,
                self.spec.dilation,
                strict=True,
            )
        ]
        channels = coarse[1] * (fine[1] // self.spec.groups)
        return coarse[0] * channels * math.prod(pairs)

    def flops(self, direction: str, gradients: str = "all") -> int:
        """Operations of ``"forward"``, or of ``"backward"`` for some :data:`GRADIENTS`."""
        contractions = 2 if direction == "backward" and gradients == "all" else 1
        return 2 * self.multiplications * contractions

    def traffic_bytes(self, direction: str, element_bytes: int, gradients: str = "all") -> int:
        """Fewest bytes of memory traffic: each operand read once, each result written once."""
        weight = math.prod(self.weight_shape)
        bias = self.out_channels * self.bias
        inputs, outputs = math.prod(self.input_shape), math.prod(self.output_shape)
        inputs_read, outputs_read = inputs, outputs
        if self.spec.transposed:
            outputs_read = self._reached(self.output_shape, element_bytes)
        else:
            inputs_read = self._reached(self.input_shape, element_bytes)
        if direction == "forward":
            return element_bytes * (inputs_read + weight + bias + outputs)
        names = GRADIENTS[gradients]
        # The gradient of the bias is a sum over all of grad_output.
        elements = outputs if self.bias and "grad_bias" in names else outputs_read
        if "grad_input" in names:
            elements += weight + inputs  # reads the one, writes the gradient of the other
        if "grad_weight" in names:
            elements += inputs_read + weight + bias
        return element_bytes * elements

    def _reached(self, fine_shape: Sequence[int], element_bytes: int) -> int:
        """Elements of the fine tensor that taps reach: not all where a stride skips some."""
        elements = math.prod(fine_shape[:2])
        for axis, extent in enumerate(fine_shape[2:]):
            s, d, p = (
                self.spec.stride[axis],
                self.spec.dilation[axis],
                self.spec.padding_begin[axis],
            )
            phases = len({(t * d - p) % s for t in range(self.spec.kernel_size[axis])})
            # Memory comes in sectors of 32 bytes: within a row, small gaps save nothing.
            dense = axis == self.spec.ndim - 1 and s * element_bytes <= 32
            elements *= extent if dense or phases == s else extent // s * phases
        return elements

    def on_cpu(self) -> Layer:
        """The layer with its input for a CPU, or as it is where it has none.

        Raises:
            SuiteError: if that is no input of it.
        """
        if self.cpu_shape is None:
            return self
        if self.cpu_shape[1] != self.in_channels:
            given = documents.shown(list(self.cpu_shape))
            name = documents.plain(self.name)
            raise SuiteError(f"layer {name}: cpu={given} has not {self.in_channels} channels")
        return replace(self, input_shape=self.cpu_shape)

    def fixed(self) -> ConvSpec:
        """The specification with the layer's channels.

        Raises:
            SpecError: if groups do not divide them.
        """
        return ConvSpec(
            **{
                **asdict(self.spec),
                "in_channels": self.in_channels,
                "out_channels": self.out_channels,
            }
        )

    def __str__(self) -> str:
        shape = "x".join(map(str, self.input_shape))
        return f"{self.name}: {self.spec.name} {shape} -> {self.out_channels}"


def contender_name(layout: str, *, ours: bool = False, benchmark: bool = False) -> str:
    """``"convgen channels_last"``, or torch's configuration: ``"default"``, ``"benchmark"``, ..."""
    parts = ["channels_last"] * (layout == "channels_last") + ["benchmark"] * benchmark
    return " ".join([OURS, *parts] if ours else parts or ["default"])


def suites() -> list[str]:
    """Names of the suites in the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.json"))


def read_suite(name: str) -> list[Layer]:
    """The layers of a suite of the package, or of a JSON file (a name that ends in ``.json``).

    A file holds ``{"layers": [...]}``; each layer is an object with ``name``, ``op``, ``input``
    (N, C_in, extents...), ``out_channels``, ``kernel_size`` and, where they differ from torch's
    defaults, ``stride``, ``padding``, ``output_padding``, ``dilation``, ``groups`` and ``bias``
    (false by default), and ``cpu``, an input with which it runs in seconds on two cores. With
    ``"of": "SUITE"`` beside it, a layer may also be the name of one of that suite.

    Raises:
        SuiteError: if there is no such suite or file, or a layer in it is wrong.
    """
    return _read_suite(name, ())


def _read_suite(name: str, within: tuple[Path, ...]) -> list[Layer]:
    """:func:`read_suite` of what other suites (``within``) are "of"."""
    if name.endswith(".json"):
        path = Path(name)
    elif name in suites():
        path = _FOLDER / f"{name}.json"
    else:
        shown = documents.shown(name)
        raise SuiteError(f"no suite {shown}: choose {', '.join(suites())}, or give a .json file")
    shown = documents.plain(str(path))
    if path in within:
        raise SuiteError(f'{shown} names itself, or a suite "of" it, in "of"')
    try:
        data = documents.read(path)
    except (FileNotFoundError, DocumentError) as error:
        why = "there is no such file" if isinstance(error, FileNotFoundError) else error
        raise SuiteError(f"{shown} cannot be read: {why}") from error
    entries = data.get("layers") if isinstance(data, dict) else None
    if not isinstance(entries, list) or not entries:
        raise SuiteError(f'{shown} is no suite: it needs {{"layers": [...]}}')
    of = data.get("of", "")
    if not isinstance(of, str):
        raise SuiteError(f'{shown}: "of" is the name of a suite, not {documents.shown(of)}')
    parent = {layer.name: layer for layer in _read_suite(of, (*within, path))} if of else {}
    layers = [_layer(shown, n, entry, parent) for n, entry in enumerate(entries)]
    names = [layer.name for layer in layers]
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise SuiteError(f"{shown} has several layers named {', '.join(repeated)}")
    return layers


def select(layers: Sequence[Layer], patterns: Sequence[str]) -> list[Layer]:
    """The layers whose names match the patterns (``61``, ``hifigan*``), in the patterns' order.

    Raises:
        SuiteError: if a pattern matches none.
    """
    chosen: dict[str, Layer] = {}
    for pattern in patterns:
        found = {layer.name: layer for layer in layers if fnmatchcase(layer.name, pattern)}
        if not found:
            known = ", ".join(layer.name for layer in layers)
            raise SuiteError(f"no layer {documents.shown(pattern)}: there are {known}")
        chosen |= {name: layer for name, layer in found.items() if name not in chosen}
    return list(chosen.values())


def for_cpu(layers: Sequence[Layer], named: Collection[str] = ()) -> list[Layer]:
    """Layers as a CPU runs them: with their inputs for it, and where some have one, only those.

    Layers without one whose very names are ``named`` stay as they are.
    """
    unmarked = all(layer.cpu_shape is None for layer in layers)
    return [
        layer.on_cpu()
        for layer in layers
        if unmarked or layer.cpu_shape is not None or layer.name in named
    ]


def _layer(suite: str, number: int, entry: object, parent: Mapping[str, Layer]) -> Layer:
    if isinstance(entry, str):
        if entry not in parent:
            shown = documents.shown(entry)
            raise SuiteError(f'{suite}: no layer {shown} in the suite that "of" names')
        return parent[entry]
    if not isinstance(entry, dict):
        raise SuiteError(f"{suite}: a layer is an object or a name, not {documents.shown(entry)}")
    name = entry.get("name")
    where = f"{suite}, layers[{number}]"
    if isinstance(name, str):
        where = f"{suite}, layer {documents.plain(name)}"
    try:
        specific = {key: value for key, value in entry.items() if key not in _OF_LAYER}
        own = documents.record(
            {key: value for key, value in entry.items() if key in _OF_LAYER}, _Entry, ""
        )
        if "in_channels" in specific:
            raise DocumentError("in_channels follows from the input")
        spec = ConvSpec.from_dict(specific)
        layer = Layer(own.name, spec, own.input, own.out_channels, own.bias, own.cpu)
        layer.on_cpu()  # An input that is none is better found here.
        return layer
    except SuiteError as error:
        raise SuiteError(f"{suite}: {error}") from error
    except ValueError as error:
        raise SuiteError(f"{where}: {error}") from error
