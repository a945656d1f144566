"""What is fixed about a convolution layer: :class:`ConvSpec`.

A specification holds the facts that become compile-time constants of the kernels. Batch, spatial
extents and (unless given) channel counts stay runtime values.
"""

from __future__ import annotations

import json
import math
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from convgen.spec import documents
from convgen.spec.activation import Activation, ActivationError
from convgen.spec.documents import DocumentError
from convgen.spec.geometry import Geometry, Triple

OPERATORS = (
    "conv_transpose3d",
    "conv_transpose2d",
    "conv_transpose1d",
    "conv3d",
    "conv2d",
    "conv1d",
)
"""The six operators, under the names that ``torch.nn.functional`` gives them."""

_MAX_EXTENT = 1 << 16
"""No kernel extent, stride, dilation or padding beyond this: offsets inside a tile are 32-bit."""

_MAX_PRODUCT = 1 << 16
"""No more kernel elements, and no more phases, than this: the sources hold tables of them."""

_MAX_CHANNELS = 1 << 20
"""No more groups or channels than this: channel indices are 32-bit in the kernels."""


class SpecError(ValueError):
    """A specification that PyTorch would refuse too, or beyond all use; says what is allowed."""


@dataclass(frozen=True, init=False)
class ConvSpec:
    """A convolution layer with everything but batch and extents fixed.

    The constructor takes PyTorch's argument forms, ints or one int per spatial dimension; the
    fields hold one int per spatial dimension. ``padding`` is a tuple, or ``"same"`` (convolutions
    of stride 1 only); ``"valid"`` becomes 0.

    What follows the convolution in its own kernel is its *epilogue*:
    ``activation(conv(input) + bias + residual)``, with an ``activation`` as
    :mod:`convgen.spec.activation` writes it, and a ``residual`` of the output's shape if there is
    to be one.

    Raises:
        SpecError: with what is wrong and what is allowed, under PyTorch's own limits.
    """

    op: str
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    in_channels: int | None
    out_channels: int | None
    activation: str | None
    residual: bool

    def __init__(
        self,
        op: str,
        kernel_size: int | Iterable[int],
        stride: int | Iterable[int] = 1,
        padding: int | Iterable[int] | str = 0,
        output_padding: int | Iterable[int] = 0,
        dilation: int | Iterable[int] = 1,
        groups: int = 1,
        in_channels: int | None = None,
        out_channels: int | None = None,
        activation: str | None = None,
        residual: bool = False,
    ) -> None:
        ndim = _ndim(op)
        normalized = {
            "op": op,
            "kernel_size": _tuple("kernel_size", kernel_size, ndim),
            "stride": _tuple("stride", stride, ndim),
            "padding": _padding(op, padding, ndim),
            "output_padding": _tuple("output_padding", output_padding, ndim),
            "dilation": _tuple("dilation", dilation, ndim),
            "groups": _integer("groups", groups),
            "in_channels": None if in_channels is None else _integer("in_channels", in_channels),
            "out_channels": (
                None if out_channels is None else _integer("out_channels", out_channels)
            ),
            "activation": None if activation is None else _activation(activation).text,
            "residual": _flag("residual", residual),
        }
        for name, value in normalized.items():
            object.__setattr__(self, name, value)
        self._check()

    @staticmethod
    def make(
        op: str = "conv_transpose3d",
        *,
        kernel_size: int | Iterable[int],
        stride: int | Iterable[int] = 1,
        padding: int | Iterable[int] | str = 0,
        output_padding: int | Iterable[int] = 0,
        dilation: int | Iterable[int] = 1,
        groups: int = 1,
        in_channels: int | None = None,
        out_channels: int | None = None,
        activation: str | None = None,
        residual: bool = False,
    ) -> ConvSpec:
        """The constructor with :func:`convgen.specialize`'s default operator, keywords only.

        Raises:
            SpecError: with what is wrong and what is allowed, under PyTorch's own limits.
        """
        return ConvSpec(
            op,
            kernel_size,
            stride,
            padding,
            output_padding,
            dilation,
            groups,
            in_channels,
            out_channels,
            activation,
            residual,
        )

    def _check(self) -> None:
        _in_range("kernel_size", self.kernel_size, 1)
        _in_range("stride", self.stride, 1)
        _in_range("dilation", self.dilation, 1)
        _in_range("output_padding", self.output_padding, 0)
        for name in ("kernel_size", "stride"):
            product = math.prod(getattr(self, name))
            if product > _MAX_PRODUCT:
                raise SpecError(
                    f"{name}={_show(getattr(self, name))}: the product over the dimensions is "
                    f"{product}, and must not exceed {_MAX_PRODUCT}"
                )
        self._check_padding()
        self._check_output_padding()
        for name in ("groups", "in_channels", "out_channels"):
            value = getattr(self, name)
            if value is None:
                continue
            if value < 1:
                raise SpecError(f"{name}={documents.shown(value)}: must be at least 1")
            if value > _MAX_CHANNELS:
                raise SpecError(f"{name}={documents.shown(value)}: must not exceed {_MAX_CHANNELS}")
            if value % self.groups:
                raise SpecError(
                    f"{name}={value} is not divisible by groups={self.groups}: "
                    f"every group needs the same number of channels"
                )

    def _check_padding(self) -> None:
        if not isinstance(self.padding, str):
            _in_range("padding", self.padding, 0)
        elif any(s != 1 for s in self.stride):
            raise SpecError(
                f"padding='same' needs stride 1, not {_show(self.stride)}: give the padding as ints"
            )

    def _check_output_padding(self) -> None:
        if not self.transposed:
            if any(self.output_padding):
                raise SpecError(
                    f"output_padding={_show(self.output_padding)}: {self.op} has none "
                    f"(only transposed convolutions do)"
                )
            return
        for op, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True):
            if op >= max(s, d):
                raise SpecError(
                    f"output_padding={_show(self.output_padding)} must be smaller than either "
                    f"stride {_show(self.stride)} or dilation {_show(self.dilation)} "
                    f"in every dimension"
                )

    @property
    def transposed(self) -> bool:
        return self.op.startswith("conv_transpose")

    @property
    def epilogue(self) -> Activation | None:
        """The activation with its arguments; None without one."""
        return None if self.activation is None else Activation.parse(self.activation)

    @property
    def has_epilogue(self) -> bool:
        """Whether anything but the bias is done to the sums."""
        return self.activation is not None or self.residual

    @property
    def linear(self) -> ConvSpec:
        """The same convolution without an epilogue."""
        return replace(self, activation=None, residual=False) if self.has_epilogue else self

    @property
    def forward(self) -> str:
        """The contraction that the layer itself is; the others are its gradients."""
        return "dgrad" if self.transposed else "fprop"

    @property
    def class_name(self) -> str:
        """Of torch's module class: ``conv_transpose3d`` -> ``ConvTranspose3d``."""
        return "".join(word.capitalize() for word in self.op.split("_"))

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions: 1, 2 or 3."""
        return len(self.kernel_size)

    @property
    def padding_begin(self) -> tuple[int, ...]:
        """Zeros before the first element; for ``'same'``, PyTorch's ``d * (k - 1) // 2``."""
        if isinstance(self.padding, str):
            return tuple(
                d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True)
            )
        return self.padding

    @property
    def padding_end(self) -> tuple[int, ...]:
        """Zeros after the last element; one more than before where ``'same'`` splits unevenly."""
        if isinstance(self.padding, str):
            return tuple(
                d * (k - 1) - begin
                for k, d, begin in zip(
                    self.kernel_size, self.dilation, self.padding_begin, strict=True
                )
            )
        return self.padding

    @property
    def name(self) -> str:
        """Canonical identifier: the operator, the kernel, then only what differs from defaults.

        For example ``conv_transpose3d_k3_s2_p1_op1_c48x64`` or ``conv2d_k3_leaky_relu_0p01``.
        """
        parts = [self.op, f"k{_compact(self.kernel_size)}"]
        if any(s != 1 for s in self.stride):
            parts.append(f"s{_compact(self.stride)}")
        if isinstance(self.padding, str):
            parts.append("psame")
        elif any(self.padding):
            parts.append(f"p{_compact(self.padding)}")
        if any(self.output_padding):
            parts.append(f"op{_compact(self.output_padding)}")
        if any(d != 1 for d in self.dilation):
            parts.append(f"d{_compact(self.dilation)}")
        if self.groups != 1:
            parts.append(f"g{self.groups}")
        if self.in_channels is not None and self.out_channels is not None:
            parts.append(f"c{self.in_channels}x{self.out_channels}")
        elif self.in_channels is not None:
            parts.append(f"cin{self.in_channels}")
        elif self.out_channels is not None:
            parts.append(f"cout{self.out_channels}")
        if activation := self.epilogue:
            parts.append(activation.identifier)
        if self.residual:
            parts.append("residual")
        return "_".join(parts)

    @property
    def geometry(self) -> Geometry:
        """The trilinear form in three dimensions, from which kernels are generated."""
        lead = 3 - self.ndim

        def triple(values: tuple[int, ...], fill: int) -> Triple:
            d, h, w = (fill,) * lead + values
            return d, h, w

        coarse, fine = self.out_channels, self.in_channels
        if self.transposed:
            coarse, fine = fine, coarse
        return Geometry(
            kernel=triple(self.kernel_size, 1),
            stride=triple(self.stride, 1),
            padding=triple(self.padding_begin, 0),
            dilation=triple(self.dilation, 1),
            groups=self.groups,
            coarse_channels=coarse,
            fine_channels=fine,
        )

    def output_extents(self, extents: Iterable[int]) -> tuple[int, ...]:
        """Spatial extents of the output for an input of ``extents``.

        PyTorch's formulas: ``(e + pb + pe - d (k - 1) - 1) // s + 1`` for convolutions and
        ``(e - 1) s - 2 p + d (k - 1) + op + 1`` for transposed ones. May be < 1: no output then.
        """
        terms = zip(extents, self.stride, self.extent_constants, self.output_padding, strict=True)
        if self.transposed:
            return tuple(e * s + constant + added for e, s, constant, added in terms)
        return tuple((e + constant) // s + 1 for e, s, constant, _ in terms)

    @property
    def extent_constants(self) -> tuple[int, ...]:
        """``c`` of the output's extents: ``(e + c) // s + 1``, or ``e s + c + op`` transposed."""
        reaches = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        pads = map(sum, zip(self.padding_begin, self.padding_end, strict=True))
        terms = zip(self.stride, reaches, pads, strict=True)
        if self.transposed:
            return tuple(reach - pad + 1 - s for s, reach, pad in terms)
        return tuple(pad - reach - 1 for _, reach, pad in terms)

    @property
    def least_extents(self) -> tuple[int, ...]:
        """The smallest input that has an output, with no output padding."""
        constants = zip(self.stride, self.extent_constants, strict=True)
        if self.transposed:
            return tuple(max(1, -((c - 1) // s)) for s, c in constants)
        return tuple(max(1, -c) for _, c in constants)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; :meth:`from_dict` reads it back.

        Of the epilogue it has what there is, so that a layer without one is what it always was.
        """
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if value or key not in ("activation", "residual")
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> ConvSpec:
        """Inverse of :meth:`to_dict`.

        Raises:
            SpecError: for unknown or missing fields, or values that :meth:`make` refuses.
        """
        if not isinstance(data, Mapping):
            raise SpecError(f"a specification is an object, not {documents.shown(data)}")
        known = {field.name for field in fields(ConvSpec)}
        if unknown := sorted(set(data) - known):
            names = documents.plain(", ".join(unknown))
            raise SpecError(f"unknown fields in a specification: {names}")
        if missing := sorted({"op", "kernel_size"} - set(data)):
            raise SpecError(f"a specification needs the fields {', '.join(missing)}")
        return ConvSpec.make(**data)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> ConvSpec:
        """Inverse of :meth:`to_json`; raises SpecError for text that is no specification."""
        try:
            return ConvSpec.from_dict(documents.parse(text))
        except DocumentError as error:
            raise SpecError(f"not a JSON specification: {error}") from error


def _ndim(op: str) -> int:
    if op not in OPERATORS:
        known = ", ".join(OPERATORS)
        raise SpecError(f"op={documents.shown(op)} is not known: choose one of {known}")
    match = re.search(r"([123])d$", op)
    assert match is not None
    return int(match[1])


def _activation(value: object) -> Activation:
    try:
        return Activation.parse(value)
    except ActivationError as error:
        raise SpecError(str(error)) from None


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{name}={documents.shown(value)} must be True or False")
    return value


def _integer(name: str, value: object) -> int:
    # As torch does: anything with __index__ (numpy's ints too), but no bool and no float.
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise SpecError(f"{name}={documents.shown(value)} must be an int") from None


def _tuple(name: str, value: int | Iterable[int], ndim: int) -> tuple[int, ...]:
    # A zero-dimensional array or tensor has __iter__, but is one int.
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        return (_integer(name, value),) * ndim
    if getattr(value, "ndim", 1) == 0:
        return (_integer(name, value),) * ndim
    values = tuple(_integer(name, v) for v in value)
    if len(values) == 1:
        values *= ndim
    if len(values) != ndim:
        allowed = "one int" if ndim == 1 else f"one int or {ndim}"
        given = ",".join(map(documents.shown, values[:9]))
        raise SpecError(f"{name}={given!r}: give {allowed}")
    return values


def _padding(op: str, value: int | Iterable[int] | str, ndim: int) -> tuple[int, ...] | str:
    if not isinstance(value, str):
        return _tuple("padding", value, ndim)
    ints = "an int" if ndim == 1 else f"an int or {ndim} ints"
    if op.startswith("conv_transpose"):
        raise SpecError(f"padding={documents.shown(value)}: {op} takes {ints}")
    if value not in ("same", "valid"):
        raise SpecError(
            f"padding={documents.shown(value)} is not known: give {ints}, 'same' or 'valid'"
        )
    return "same" if value == "same" else (0,) * ndim


def _in_range(name: str, values: tuple[int, ...], least: int) -> None:
    if any(v < least for v in values):
        raise SpecError(f"{name}={_show(values)}: every value must be at least {least}")
    if any(v > _MAX_EXTENT for v in values):
        raise SpecError(f"{name}={_show(values)}: no value may exceed {_MAX_EXTENT}")


def _show(values: tuple[int, ...]) -> str:
    shown = values[:1] if len(set(values)) == 1 else values[:9]
    return ",".join(map(documents.shown, shown))


def _compact(values: tuple[int, ...]) -> str:
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))
