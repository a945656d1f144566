"""The C kernels of the package: finding, loading and calling them.

Written by convgen 0.1.0; regenerate with
    convgen generate --kernel 3 --stride 2

Each library exports functions over one struct, ConvgenCall (src/*/convgen_abi.h), which is packed
here. Nothing is loaded before the first tensor of a device type arrives.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor
from torch._C import _get_deterministic_algorithms
from torch._C._dynamo.guards import _empty_strided_cpu  # type: ignore[attr-defined]
from torch.compiler import is_dynamo_compiling

NAME = "conv_transpose3d_k3_s2"
COMMAND = "convgen generate --kernel 3 --stride 2"

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

INTERPRETED = os.environ.get("CONVGEN_INTERPRET", "") not in ("", "0")
"""Whether the CUDA kernels serve the CPU's tensors, interpreted: to debug them, not to use them."""

if INTERPRETED:
    BACKENDS["cpu"] = BACKENDS["cuda"]

VARIANT = f"_interpreted_{crc32((__name__ + __file__).encode()):08x}" if INTERPRETED else ""
"""Marks the operators of interpreted kernels: no other copy shares them, sources may be edited."""

MATH_MODES = {"tf32", "tf32x3"}
"""Further CUDA kernels, on tensor cores: see :func:`_math_mode`."""

IMPLICIT_GEMMS = {"dgrad_tf32", "fprop_tf32", "wgrad_tf32", "wgrad_tf32x3"}
"""Contractions and math modes that Hopper's kernels serve in every layout: see :func:`prepare`."""

FOLDERS = [Path(__file__).parent]
"""Folders with a copy of this package: kernels are loaded from the first whose library loads."""

_POINTERS = struct.Struct("6Q")  # ConvgenCall: coarse, fine, weight, bias, workspace, stream
# ConvgenCall: device, batch, channels, extents, channels_last; of an epilogue it has nothing
_NUMBERS = struct.Struct("11q24x")

_TOO_LARGE = -1  # CONVGEN_TOO_LARGE

_libraries: dict[str, ctypes.CDLL] = {}


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


def new_tensor(like: Tensor, shape: Sequence[int], strides: tuple[int, ...]) -> Tensor:
    """Memory for a result: on the CPU, and with elements, if `strides` are given; else contiguous.

    Those torch makes in half the time of new_empty, as for the code that Inductor writes, but
    without filling them where torch is asked to fill new memory.
    """
    if not strides:
        return like.new_empty(size=shape)
    if _get_deterministic_algorithms():
        return like.new_empty_strided(size=shape, stride=strides)
    return _empty_strided_cpu(shape, strides, like.dtype)  # type: ignore[no-any-return]


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
        # Copy engine and vectors of channels begin at multiples of 16 bytes; results do.
        begins_anywhere = (self.gpu is None and not INTERPRETED) or not self.takes_layouts
        if not begins_anywhere and any(
            each is not None and each.data_ptr() & 15 for each in (coarse, fine, weight)
        ):
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
            scratch = coarse.new_empty(size=(self.workspace_bytes + 255,), dtype=torch.uint8)
            workspace = (scratch.data_ptr() + 255) & -256
        pointers = _POINTERS.pack(
            coarse.data_ptr(),
            0 if fine is None else fine.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            workspace,
            stream,
        )
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
    library = _libraries.get(source.device.type) or _load(source.device.type)
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
    library = _libraries.get(device.type) or _load(device.type)
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
    channels = (coarse_shape[1], fine_shape[1])
    padded = [-(-count // 8) * 8 for count in channels]
    suits = 8 * channels[0] * channels[1] >= padded[0] * padded[1]
    mode = _math_mode(device, dtype, precision)
    if mode is not None and contraction != "bgrad" and suits:
        if (name := f"{contraction}_{mode}") in IMPLICIT_GEMMS:
            expected = library[f"convgen_{name}_implicit_gemm_expected"]
            expected.argtypes, expected.restype = [ctypes.c_char_p], ctypes.c_int64
            if expected(bytes(_POINTERS.size) + numbers) >= 0:
                return replace(launch(f"{mode}_implicit_gemm"), takes_layouts=True)
        return launch(mode, plain)
    if layout and contraction != "bgrad":
        takes_layout = library[f"convgen_{contraction}_{BACKENDS[device.type][dtype]}_takes_layout"]
        takes_layout.argtypes, takes_layout.restype = [ctypes.c_char_p], ctypes.c_int64
        if takes_layout(bytes(_POINTERS.size) + numbers):
            return replace(plain, takes_layouts=True)
    return plain


def _aligned(tensor: Tensor) -> Tensor:
    """A tensor that begins at a multiple of 16 bytes, with the same strides."""
    return tensor.clone() if tensor.data_ptr() & 15 else tensor


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


def _load(backend: str) -> ctypes.CDLL:
    if INTERPRETED and backend == "cpu":
        # Compiles src/cuda as it is on disk, with convgen's interpreter.
        from convgen.checking.interpreted import open_package

        _libraries[backend] = open_package(FOLDERS[0])
        _libraries[backend].convgen_error_string.restype = ctypes.c_char_p
        return _libraries[backend]
    file = f"lib/{backend}.so"
    refused = []
    for folder in FOLDERS:
        path = folder / file
        try:
            if not path.is_file():
                continue
            _check_digest(path)
            library = ctypes.CDLL(str(path))
            library.convgen_error_string.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            # Another copy of the package may have a library that serves.
            refused.append(f"{path} cannot be loaded ({error})")
            continue
        _libraries[backend] = library
        return library
    raise RuntimeError(
        f"{'; '.join(refused) or file}: it was compiled for another kind of machine, or is "
        f"damaged; run `{COMMAND} --backend auto`"
    )


def _check_digest(path: Path) -> None:
    """Raises OSError unless a library is what was linked: one cut short would end the process.

    Its SHA-256 is in a file beside it, which build.ninja writes as sha256sum does.
    """
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.is_file():
        raise OSError(f"{beside.name} is missing beside it")
    with path.open("rb") as library, beside.open("rb") as file:
        digest = hashlib.sha256()
        while block := library.read(1 << 20):
            digest.update(block)
        if file.read(64) != digest.hexdigest().encode():
            raise OSError(f"its {path.stat().st_size} bytes are not those that were linked")
