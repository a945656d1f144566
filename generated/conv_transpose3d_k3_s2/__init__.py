"""conv_transpose3d with its constants compiled into the kernels.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

`ConvTranspose3d` takes the place of torch.nn.ConvTranspose3d, and `conv_transpose3d` that of
torch.nn.functional.conv_transpose3d. `SPEC` is what is constant;
batch, channels and extents are free. Gradients of any order, torch.compile, torch.export
and autocast work as with torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import index
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _is_any_autocast_enabled

from ._dispatch import is_plain
from ._integration import as_own, by_others, count_as_torch
from ._operators import PLAIN, dgrad, dgrad_op
from ._runtime import BACKENDS, NAME, check_memory

__all__ = ["BACKENDS", "SPEC", "ConvTranspose3d", "conv_transpose3d"]

KERNEL_SIZE = (3, 3, 3)
STRIDE = (2, 2, 2)
PADDING = (0, 0, 0)
DILATION = (1, 1, 1)
GROUPS = 1
OUTPUT_PADDING = (0, 0, 0)

SPEC: dict[str, Any] = {
    "op": "conv_transpose3d",
    "kernel_size": KERNEL_SIZE,
    "stride": STRIDE,
    "padding": PADDING,
    "output_padding": OUTPUT_PADDING,
    "dilation": DILATION,
    "groups": GROUPS,
    "in_channels": None,
    "out_channels": None,
}
"""The specification; None is for what is free. `BACKENDS` lists devices and dtypes."""


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = STRIDE,
    padding: int | Sequence[int] = PADDING,
    output_padding: int | Sequence[int] = OUTPUT_PADDING,
    groups: int = GROUPS,
    dilation: int | Sequence[int] = DILATION,
) -> Tensor:
    """torch.nn.functional.conv_transpose3d with the constants of `SPEC`.

    Args:
        input: (N, C_in, D, H, W) or (C_in, D, H, W), of any strides.
        weight: (C_in, C_out, KD, KH, KW), KD, KH, KW = 3, 3, 3.
        bias: (C_out,).
        stride, padding, dilation, groups: those of `SPEC`, if given.
        output_padding: extends the output at its ends, by less than stride or dilation.

    Returns:
        (N, C_out, D, H, W) or (C_out, D, H, W), in the memory format that torch's has.

    Raises:
        ValueError: where a constant is not that of `SPEC`.
        RuntimeError: as torch does, for shapes, dtypes or devices that do not fit; and for
            devices or dtypes without generated kernels.
    """
    if (
        stride is not STRIDE
        or padding is not PADDING
        or dilation is not DILATION
        or groups is not GROUPS
    ):
        _check(stride=stride, padding=padding, dilation=dilation, groups=groups)
    return _convolve(input, weight, bias, output_padding)


def _convolve(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    output_padding: int | Sequence[int],
) -> Tensor:
    if not (plain := is_plain((input, weight, bias))):
        result = by_others(conv_transpose3d, input, weight, bias, output_padding)
        if result is not None:
            return result
        input, weight, bias = as_own((input, weight, bias))
    if input.dim() != 5:
        if input.dim() == 4:
            batch = input.unsqueeze(0)
            return _convolve(batch, weight, bias, output_padding).squeeze(0)
        raise RuntimeError(
            "Expected 4D (unbatched) or 5D (batched) input to conv_transpose3d, "
            f"but got input of size: {list(input.shape)}"
        )
    if _is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    if output_padding is not OUTPUT_PADDING:
        output_padding = _check_output_padding(output_padding)
    # (extent - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1
    _, _, depth, height, width = input.shape
    size = (
        depth * 2 + 1 + output_padding[0],
        height * 2 + 1 + output_padding[1],
        width * 2 + 1 + output_padding[2],
    )
    return (PLAIN.dgrad if plain else dgrad)(input, weight, bias, size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d with the constants of `SPEC`.

    Parameters, their names and initialization, state_dict, attributes and `forward` are those of
    torch's layer, and so are the constructor's arguments. Constants may be left out; another value
    than that of `SPEC` raises ValueError, in the constructor or, where an attribute is changed, at
    the next call. `output_padding` is free.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...] = KERNEL_SIZE,
        stride: int | tuple[int, ...] = STRIDE,
        padding: int | tuple[int, ...] = PADDING,
        output_padding: int | tuple[int, ...] = OUTPUT_PADDING,
        groups: int = GROUPS,
        bias: bool = True,
        dilation: int | tuple[int, ...] = DILATION,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check(
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        super().__init__(
            in_channels,
            out_channels,
            KERNEL_SIZE,
            STRIDE,
            PADDING,
            output_padding,
            GROUPS,
            bias,
            DILATION,
            padding_mode,
            device,
            dtype,
        )
        count_as_torch(ConvTranspose3d, dgrad_op.overloadpacket)

    _convolve = staticmethod(_convolve)
    """What the layer calls; an instance with an attribute that is not `SPEC`'s has `_refuse`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SPEC and isinstance(value, list):
            value = tuple(value)  # as torch has it, and nobody changes it in place
        super().__setattr__(name, value)
        if name in _ALLOWED:
            self._compare()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._compare()

    def _compare(self) -> None:
        """Lets the next call raise if an attribute is not the constant; other calls pay nothing."""
        self.__dict__.pop("_convolve", None)
        try:
            _check(**{name: self.__dict__[name] for name in _ALLOWED if name in self.__dict__})
        except ValueError as error:
            self.__dict__["_convolve"] = partial(_refuse, str(error))

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        output_padding: Sequence[int] = self.output_padding
        if output_size is not None:
            output_padding = self._output_padding(
                input,
                list(output_size),
                list(STRIDE),
                list(PADDING),
                list(KERNEL_SIZE),
                3,
                list(DILATION),
            )
        return self._convolve(input, self.weight, self.bias, output_padding)


_ALLOWED: dict[str, tuple[Any, ...]] = {
    "kernel_size": (KERNEL_SIZE,),
    "stride": (STRIDE,),
    "padding": ((0, 0, 0),),
    "dilation": (DILATION,),
    "groups": (GROUPS,),
    "padding_mode": ("zeros",),
}
"""The values of each attribute that mean what is generated, the canonical one first."""


def _check(**values: Any) -> None:
    """Raises ValueError, which names the constant, unless all values are those of `SPEC`."""
    for name, value in values.items():
        if _canonical(name, value) not in _ALLOWED[name]:
            raise ValueError(
                f"{name} must be {_ALLOWED[name][0]!r}, as generated, not {value!r}: "
                f"{NAME} has kernels for nothing else"
            )


def _canonical(name: str, value: Any) -> Any:
    """One int per dimension, or one, as torch takes them; None for what is none of these."""
    if isinstance(value, str):
        return value
    try:
        values = tuple(value)
    except TypeError:
        values = (value,)
    if any(isinstance(each, bool) for each in values):
        return None
    try:
        values = tuple(map(index, values))
    except TypeError:
        return None
    if name == "groups":
        return values[0] if len(values) == 1 else None
    return values * 3 if len(values) == 1 else values


def _refuse(why: str, *_: Any, **__: Any) -> Tensor:
    """Stands in for `_convolve` in a layer with other constants."""
    raise ValueError(why)


def _autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts what torch.autocast casts for torch's own convolutions: all floats but float64."""
    if not torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu"):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        check_memory(tensor)
        return tensor.to(dtype) if eligible else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)


def _check_output_padding(output_padding: int | Sequence[int]) -> Sequence[int]:
    """One value per dimension, each smaller than stride or dilation."""
    if type(output_padding) is tuple and output_padding == OUTPUT_PADDING:
        return OUTPUT_PADDING
    given = output_padding if isinstance(output_padding, tuple | list) else [output_padding]
    try:
        if given and isinstance(given[0], bool):  # the one that torch looks at
            raise TypeError
        values = list(map(index, given))
    except TypeError:
        raise TypeError(
            "conv_transpose3d(): output_padding must be an int or a tuple of 3, "
            f"not {output_padding!r}"
        ) from None
    if len(values) == 1:
        values *= 3
    if len(values) != 3:
        raise RuntimeError(
            "expected output_padding to be a single integer value or a list of 3 values "
            f"to match the convolution dimensions, but got output_padding={values}"
        )
    if any(value < 0 for value in values):
        raise RuntimeError("negative output_padding is not supported")
    limits = (2, 2, 2)
    if any(value >= limit for value, limit in zip(values, limits, strict=True)):
        raise RuntimeError(
            "output padding must be smaller than either stride or dilation, but got "
            f"output_padding {values} for stride [2, 2, 2] and dilation [1, 1, 1]"
        )
    return tuple(values)
