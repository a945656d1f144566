"""Compiled kernels called directly, without a package around them: for timing and checking."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from convgen.engines.abi import NUMBERS, POINTERS


class KernelError(RuntimeError):
    """A kernel refused a call, or CUDA did."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Kernel:
    """One contraction of a compiled library.

    Args:
        library: the shared library.
        symbol: of the function, such as ``convgen_fprop_f32``.

    Raises:
        OSError: if the library cannot be loaded.
        AttributeError: if it has no such function.
    """

    def __init__(self, library: Path, symbol: str) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.convgen_error_string.restype = ctypes.c_char_p
        self._function = getattr(self._library, symbol)
        self._workspace = getattr(self._library, f"{symbol}_workspace")
        self._function.argtypes = self._workspace.argtypes = [ctypes.c_char_p]
        self._workspace.restype = ctypes.c_int64

    def prepare(
        self, coarse: Tensor, fine: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Callable[[], None]:
        """A call on contiguous tensors (N, C, extents...), one of which is the result.

        The call enqueues the kernel on the current stream of a GPU, or runs it. It raises
        :class:`KernelError` where the kernel refuses. The workspace belongs to the call.
        """
        on_gpu = coarse.is_cuda
        lead = (1,) * (5 - coarse.dim())
        numbers = NUMBERS.pack(
            coarse.get_device() if on_gpu else torch.get_num_threads(),
            coarse.shape[0],
            coarse.shape[1],
            fine.shape[1],
            *lead,
            *coarse.shape[2:],
            *lead,
            *fine.shape[2:],
            0,
        )
        size = self._workspace(bytes(POINTERS.size) + numbers)
        scratch = torch.empty(size + 255, dtype=torch.uint8, device=coarse.device)
        addresses = [tensor.data_ptr() for tensor in (coarse, fine, weight)]
        addresses += [0 if bias is None else bias.data_ptr(), (scratch.data_ptr() + 255) & -256]
        held = (coarse, fine, weight, bias, scratch)

        def call() -> None:
            assert held
            stream = torch.cuda.current_stream(coarse.device).cuda_stream if on_gpu else 0
            if code := self._function(POINTERS.pack(*addresses, stream) + numbers):
                raise KernelError(self._library.convgen_error_string(code).decode(), code)

        return call
