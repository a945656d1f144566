"""The C kernels of the package: choosing and calling them.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

Each library exports functions over one struct, ConvgenCall (src/*/convgen_abi.h), which is packed
here. A library is loaded when the first tensor of its device type arrives.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_deterministic_algorithms
from torch._C._dynamo.guards import (  # type: ignore[attr-defined]
    _empty_strided_cpu,
    _empty_strided_cuda,
)
from torch.compiler import is_dynamo_compiling

from ._library import INTERPRETED, load

NAME = "conv_transpose3d_k3_s2"

BACKENDS: dict[str, dict[torch.dtype, str]] = {
    "cpu": {
        torch.float32: "f32",
        torch.float64: "f64",
    },
    "cuda": {
        torch.float32: "f32",
    },
}
"""Device types and dtypes that kernels were generated for, and the symbols' suffix for each."""

if INTERPRETED:
    BACKENDS["cpu"] = BACKENDS["cuda"]

MATH_MODES = {"tf32", "tf32x3"}
"""Further CUDA kernels, on tensor cores: see :func:`_math_mode`."""

IMPLICIT_GEMMS = {
    "dgrad_tf32",
    "dgrad_tf32x3",
    "fprop_tf32",
    "fprop_tf32x3",
    "wgrad_tf32",
    "wgrad_tf32x3",
}
"""Contractions and math modes that implicit GEMMs serve in every layout: see :func:`prepare`."""

_POINTERS = struct.Struct("6Q")  # ConvgenCall: coarse, fine, weight, bias, workspace, stream
# ConvgenCall: device, batch, channels, extents, channels_last; of an epilogue it has nothing
_NUMBERS = struct.Struct("11q24x")

_TOO_LARGE = -1  # CONVGEN_TOO_LARGE

LEAST_ADDRESS = 1 << 40
"""Below it, an address is hardly one of a tensor with memory: see :func:`is_freed`."""


def is_freed(tensor: Tensor) -> bool:
    """Whether the storage of a tensor was freed: resized to 0, as FSDP does.

    The address of such a tensor is its offset in the storage, in bytes: 0, or a small number. The
    kernels would read there, and torch's own copies do.
    """
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False  # its memory is that of the tensors that it wraps
    try:
        with torch._C.DisableTorchFunctionSubclass():  # and by none of a subclass's own methods
            return not Tensor.untyped_storage(tensor).nbytes() and Tensor.numel(tensor) > 0
    except (NotImplementedError, RuntimeError):  # it has no storage: torch.func's, sparse
        return False


def check_memory(*tensors: Tensor | None) -> None:
    """Raises RuntimeError where the storage of a tensor was freed."""
    if is_dynamo_compiling():
        return
    for tensor in tensors:
        if tensor is not None and is_freed(tensor):
            raise RuntimeError(
                f"{NAME}: the storage of a tensor of size {list(tensor.shape)} was freed: "
                "its elements are not in memory"
            )


def contiguous(tensor: Tensor) -> Tensor:
    """A contiguous copy of a tensor that is not; torch's own copy would read freed memory."""
    check_memory(tensor)
    return tensor.contiguous()


def new_tensor(
    like: Tensor,
    shape: Sequence[int],
    strides: tuple[int, ...],
    launch: Launch | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Memory for what a launch writes; there is no launch where there is nothing to add up.

    It is made as by the code that Inductor writes, in half the time of new_empty, but for who asks
    torch to fill new memory, and on a GPU that is not the current one.
    """
    dtype = dtype or like.dtype
    if launch is not None and not _get_deterministic_algorithms():
        if launch.gpu is None:
            return _empty_strided_cpu(shape, strides, dtype)  # type: ignore[no-any-return]
        if launch.gpu == torch._C._cuda_getDevice():
            return _empty_strided_cuda(shape, strides, dtype)  # type: ignore[no-any-return]
    return like.new_empty_strided(size=shape, stride=strides, dtype=dtype)


_KEPT_BYTES = 1 << 20


class _Kept(threading.local):
    """Memory of a thread for the workspaces of its calls on the CPU, but for large ones.

    Interpreted kernels get new memory, whose ends a sanitizer watches, and so does who asks torch
    to fill new memory.
    """

    def __init__(self) -> None:
        self.memory = ctypes.create_string_buffer(_KEPT_BYTES + 255)
        self.address = (ctypes.addressof(self.memory) + 255) & -256


_kept = _Kept()


@dataclass(frozen=True)
class Launch:
    """A kernel with everything it is called with but pointers."""

    function: Any
    numbers: bytes
    workspace_bytes: int
    library: ctypes.CDLL
    gpu: int | None
    """Index of the device, or None for the CPU."""
    kept: bool
    """Whether its workspace is memory that the thread keeps."""
    fallback: Launch | None = None
    """Takes the calls whose tiles do not fit into the GPU's shared memory."""
    takes_layouts: bool = False
    """Whether it takes tensors as they lie, channels side by side or contiguous."""
    aligned: bool = False
    """Whether it takes tensors alone that begin at multiples of 16 bytes."""

    def run(
        self,
        coarse: Tensor,
        fine: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> None:
        """Runs on tensors in memory that lie as it takes them, one of them the result, on the
        current stream.

        Raises:
            RuntimeError: where CUDA or the kernel refuses the call.
        """
        of_coarse = coarse.data_ptr()
        of_fine = 0 if fine is None else fine.data_ptr()
        of_weight = 0 if weight is None else weight.data_ptr()
        # Copy engine and vectors of channels begin at multiples of 16 bytes; results do.
        if self.aligned and (of_coarse | of_fine | of_weight) & 15:
            self.run(*map(_aligned, (coarse, fine, weight)), bias)
            return
        stream = workspace = 0
        if self.gpu is not None:
            stream = torch._C._cuda_getCurrentRawStream(self.gpu)
        if self.kept and not _get_deterministic_algorithms():
            workspace = _kept.address
        elif self.workspace_bytes:
            # Aligned to 256 bytes. The caching allocator gives the memory to later work of the
            # same stream only, so that it may be released before the kernel has run.
            scratch = new_tensor(coarse, (self.workspace_bytes + 255,), (1,), self, torch.uint8)
            workspace = (scratch.data_ptr() + 255) & -256
        of_bias = 0 if bias is None else bias.data_ptr()
        pointers = _POINTERS.pack(of_coarse, of_fine, of_weight, of_bias, workspace, stream)
        if code := self.function(pointers + self.numbers):
            if code == _TOO_LARGE and self.fallback is not None:
                self.fallback.run(coarse, fine, weight, bias)
                return
            numbers = _NUMBERS.unpack(self.numbers)
            raise RuntimeError(
                f"{NAME}: {self.library.convgen_error_string(code).decode()} ({code}) for batch "
                f"{numbers[1]}, channels {numbers[2:4]}, extents {numbers[4:7]} and {numbers[7:]}"
            )


def transpose(source: Tensor, result: Tensor, batch: int, rows: int, columns: int) -> Tensor:
    """Copies (batch, rows, columns) to (batch, columns, rows), as both lie in memory, on CUDA."""
    library = load(source.device.type)
    function = library[f"convgen_transpose_{BACKENDS[source.device.type][source.dtype]}"]
    function.argtypes = [ctypes.c_char_p]
    index = source.device.index
    stream = torch._C._cuda_getCurrentRawStream(index)
    pointers = _POINTERS.pack(source.data_ptr(), result.data_ptr(), 0, 0, 0, stream)
    numbers = _NUMBERS.pack(index, batch, rows, columns, 1, 1, 1, 1, 1, 1, 0)
    if code := function(pointers + numbers):
        raise RuntimeError(f"{NAME}: {library.convgen_error_string(code).decode()} ({code})")
    return result


def prepare(
    contraction: str,
    device: torch.device,
    dtype: torch.dtype,
    coarse_shape: Sequence[int],
    fine_shape: Sequence[int],
    precision: str,
    layout: int,
) -> Launch:
    """The kernel of a contraction for tensors of these shapes, loading its library if need be.

    ``layout`` says which tensors have their channels side by side, as ConvgenCall does.

    ``precision`` is what :func:`fp32_precision` says. Tensor cores take a call where a group's
    channels fill an eighth of their products, which are 8 channels wide on both sides.

    Raises:
        RuntimeError: where the library of the device cannot be loaded.
    """
    library = load(device.type)
    gpu = device.index if device.type == "cuda" else None
    numbers = _NUMBERS.pack(
        torch.get_num_threads() if gpu is None else gpu,
        coarse_shape[0],
        coarse_shape[1],
        fine_shape[1],
        *coarse_shape[2:],
        *fine_shape[2:],
        layout,
    )

    def launch(kind: str, fallback: Launch | None = None) -> Launch:
        symbol = f"convgen_{contraction}_{kind}"
        function, workspace = library[symbol], library[symbol + "_workspace"]
        function.argtypes = workspace.argtypes = [ctypes.c_char_p]
        workspace.restype = ctypes.c_int64
        workspace_bytes = workspace(bytes(_POINTERS.size) + numbers)
        kept = 0 < workspace_bytes <= _KEPT_BYTES and gpu is None and not INTERPRETED
        return Launch(function, numbers, workspace_bytes, library, gpu, kept, fallback)

    plain = launch(BACKENDS[device.type][dtype])
    if gpu is None and not INTERPRETED:
        return replace(plain, takes_layouts=True)
    if layout and contraction != "bgrad":
        takes_layout = library[f"convgen_{contraction}_{BACKENDS[device.type][dtype]}_takes_layout"]
        takes_layout.argtypes, takes_layout.restype = [ctypes.c_char_p], ctypes.c_int64
        if takes_layout(bytes(_POINTERS.size) + numbers):
            return replace(plain, takes_layouts=True, aligned=True)
    channels = (coarse_shape[1], fine_shape[1])
    padded = [-(-count // 8) * 8 for count in channels]
    suits = 8 * channels[0] * channels[1] >= padded[0] * padded[1]
    mode = _math_mode(device, dtype, precision)
    if mode is not None and contraction != "bgrad" and suits:
        if (name := f"{contraction}_{mode}") in IMPLICIT_GEMMS:
            expected = library[f"convgen_{name}_implicit_gemm_expected"]
            expected.argtypes, expected.restype = [ctypes.c_char_p], ctypes.c_int64
            if expected(bytes(_POINTERS.size) + numbers) >= 0:
                return replace(launch(f"{mode}_implicit_gemm"), takes_layouts=True, aligned=True)
        return launch(mode, plain)
    return plain


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """A tensor that begins at a multiple of 16 bytes, with the same strides."""
    return tensor.clone() if tensor is not None and tensor.data_ptr() & 15 else tensor


fp32_precision = partial(torch._C._get_fp32_precision_getter, "cuda", "conv")
"""PyTorch's own switch, torch.backends.cudnn.conv.fp32_precision: each call reads it, so sooner."""


def _math_mode(device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """The tensor-core kernels of a call: a suffix of symbols, or None for none.

    Tensor cores serve GPUs since compute capability 8.0. For float32 the mode follows PyTorch's own
    switch: ``tf32`` where it allows TF32 (operands rounded to 10 bits), else ``tf32x3`` (three TF32
    products, accurate as float32).
    """
    if not _has_tensor_cores(device):
        return None
    mode = {torch.float16: "f16tc", torch.bfloat16: "bf16tc"}.get(dtype)
    if dtype == torch.float32:
        mode = "tf32" if precision == "tf32" else "tf32x3"
    return mode if mode in MATH_MODES else None


def _has_tensor_cores(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return INTERPRETED
