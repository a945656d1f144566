"""conv_transpose3d with its constants compiled into the kernels.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

`ConvTranspose3d` takes the place of torch.nn.ConvTranspose3d, and `conv_transpose3d` that of
torch.nn.functional.conv_transpose3d. `SPEC` is what is constant;
batch, channels and extents are free. Gradients of any order, torch.compile, torch.export and autocast
work as with torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._operators import dgrad
from ._runtime import BACKENDS

__all__ = ["BACKENDS", "SPEC", "ConvTranspose3d", "conv_transpose3d"]

SPEC: dict[str, Any] = {
    "op": "conv_transpose3d",
    "kernel_size": (3, 3, 3),
    "stride": (2, 2, 2),
    "padding": (0, 0, 0),
    "output_padding": (0, 0, 0),
    "dilation": (1, 1, 1),
    "groups": 1,
    "in_channels": None,
    "out_channels": None,
}
"""The specification; None is for what is free. `BACKENDS` lists devices and dtypes."""


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    output_padding: int | Sequence[int] = (0, 0, 0),
) -> Tensor:
    """torch.nn.functional.conv_transpose3d with the constants of `SPEC`.

    Args:
        input: (N, C_in, D, H, W) or (C_in, D, H, W), of any strides.
        weight: (C_in, C_out, KD, KH, KW), KD, KH, KW = 3, 3, 3.
        bias: (C_out,).
        output_padding: extends the output at its ends, by less than stride or dilation.

    Returns:
        (N, C_out, D, H, W) or (C_out, D, H, W), contiguous.

    Raises:
        RuntimeError: as torch does, for shapes, dtypes or devices that do not fit; and for
            devices or dtypes without generated kernels.
    """
    if input.dim() != 5:
        if input.dim() == 4:
            return conv_transpose3d(input.unsqueeze(0), weight, bias, output_padding).squeeze(0)
        raise RuntimeError(
            "Expected 4D (unbatched) or 5D (batched) input to conv_transpose3d, "
            f"but got input of size: {list(input.shape)}"
        )
    if torch._C._is_any_autocast_enabled():
        input, weight, bias = _autocast(input, weight, bias)
    if output_padding != (0, 0, 0):
        output_padding = _check_output_padding(output_padding)
    # (extent - 1) * stride - 2 * padding + dilation * (kernel_size - 1) + output_padding + 1
    _, _, depth, height, width = input.shape
    size = (
        depth * 2 + 1 + output_padding[0],
        height * 2 + 1 + output_padding[1],
        width * 2 + 1 + output_padding[2],
    )
    return dgrad(input, weight, bias, size)


class ConvTranspose3d(torch.nn.ConvTranspose3d):
    """torch.nn.ConvTranspose3d with the constants of `SPEC`.

    Parameters, their names and initialization, state_dict, attributes and `forward` are those of
    torch's layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size=(3, 3, 3),
            stride=(2, 2, 2),
            padding=(0, 0, 0),
            output_padding=(0, 0, 0),
            dilation=(1, 1, 1),
            groups=1,
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        output_padding: Sequence[int] = (0, 0, 0)
        if output_size is not None:
            output_padding = self._output_padding(
                input,
                list(output_size),
                [2, 2, 2],
                [0, 0, 0],
                [3, 3, 3],
                3,
                [1, 1, 1],
            )
        return conv_transpose3d(input, self.weight, self.bias, output_padding)


def _autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Casts what torch.autocast casts for torch's own convolutions: all floats but float64."""
    if not torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu"):
        return input, weight, bias
    dtype = torch.get_autocast_dtype(input.device.type)

    def cast(tensor: Tensor) -> Tensor:
        eligible = tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    return cast(input), cast(weight), None if bias is None else cast(bias)


def _check_output_padding(output_padding: int | Sequence[int]) -> Sequence[int]:
    """One value per dimension, each smaller than stride or dilation."""
    values = [output_padding] if isinstance(output_padding, int) else list(output_padding)
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
    return values
