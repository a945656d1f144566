"""Calling interpreted kernels from tests: tensors in, tensors or the interpreter's report out."""

from __future__ import annotations

import ctypes
import dataclasses
import math
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plans
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from convgen.checking import interpret
from convgen.codegen.render import TEMPLATES, Schedules, headers, render_unit
from convgen.engines import abi
from convgen.spec import ConvSpec
from convgen.spec.dtypes import DTYPES, MODES

OUTPUT, INPUT, INOUT = 0, 1, 2
"""What is known of a tensor's contents, as ``convgen_interpret_register`` takes it."""

OPERANDS = abi.TENSORS[:4]
RESULT = abi.RESULTS
LIMITS = {"f32": 1e-5, "f64": 1e-12, "f16": 2e-3, "bf16": 1e-2}
LIMITS |= {"tf32": 1e-3, "tf32x3": 1e-5, "f16tc": 2e-3, "bf16tc": 1e-2}
"""On ``||out - ref|| / ||ref||``."""


class Fault(RuntimeError):
    """What the interpreter, or a sanitizer, reports."""


class Library:
    """An interpreted library in this process."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.convgen_error_string.restype = ctypes.c_char_p
        self._library.convgen_interpret_register.argtypes = [
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_char_p,
            ctypes.c_int,
        ]

    def check(self, code: int) -> None:
        if code:
            raise Fault(f"{self._library.convgen_error_string(code).decode()} ({code})")

    def __call__(self, symbol: str, *arguments: np.ndarray | int, **contents: int) -> None:
        """Calls a function that takes pointers to arrays and ints, with the arrays registered.

        Arrays are called ``a0``, ``a1``, ... by position; ``contents`` gives what is known of
        each, :data:`INPUT` by default.
        """
        values: list[object] = []
        for index, argument in enumerate(arguments):
            if isinstance(argument, int):
                values.append(ctypes.c_int(argument))
            else:
                name = f"a{index}"
                self.register(
                    argument.ctypes.data, argument.nbytes, name, contents.get(name, INPUT)
                )
                values.append(ctypes.c_void_p(argument.ctypes.data))
        try:
            self.check(self._library[symbol](*values))
        finally:
            self.forget()

    def register(self, address: int, size_bytes: int, name: str, contents: int) -> None:
        self._library.convgen_interpret_register(address, size_bytes, name.encode(), contents)

    def forget(self) -> None:
        self._library.convgen_interpret_forget()

    def workspace_bytes(self, symbol: str, call: bytes) -> int:
        function = self._library[f"{symbol}_workspace"]
        function.restype = ctypes.c_int64
        return int(function(call))

    def expected_ms(self, symbol: str, call: bytes) -> float:
        """Negative where the call is not for the kernel."""
        function = self._library[f"{symbol}_expected"]
        function.restype = ctypes.c_int64
        return int(function(call)) / 1e6

    def takes_layout(self, symbol: str, call: bytes) -> bool:
        function = self._library[f"{symbol}_takes_layout"]
        function.restype = ctypes.c_int64
        return bool(function(call))

    def call(self, symbol: str, call: bytes) -> None:
        self.check(self._library[symbol](call))


def compile_sources(mode: str, sources: Mapping[str, str], architecture: str = "80") -> Path:
    """Compiles hand-written sources; the project's own headers are added to them."""
    headers = {
        "convgen_abi.h": (TEMPLATES / "common" / "convgen_abi.h").read_text(),
        "device.cuh": (TEMPLATES / "cuda" / "device.cuh").read_text(),
        "mma.cuh": (TEMPLATES / "cuda" / "mma" / "mma.cuh").read_text(),
        "pipeline.cuh": (TEMPLATES / "cuda" / "pipeline.cuh").read_text(),
        "sm90.cuh": (TEMPLATES / "cuda" / "implicit_gemm" / "sm90.cuh").read_text(),
        "maps.cuh": (TEMPLATES / "cuda" / "implicit_gemm" / "maps.cuh").read_text(),
    }
    return interpret.library("test", {**headers, **sources}, mode, architecture=architecture)


def compile_interpreted(
    name: str, sources: Mapping[str, str], mode: str = "checked", *, architecture: str = "80"
) -> Path:
    """:func:`convgen.checking.interpret.library`, :func:`unoptimized`."""
    with unoptimized(mode):
        return interpret.library(name, sources, mode, architecture=architecture)


@contextmanager
def unoptimized(mode: str) -> Iterator[None]:
    """Kernels are compiled without optimization, in half of the time.

    Every access is checked as it is otherwise, but the compiler fuses no product with its sum.
    """
    optimized = interpret.MODES[mode]
    flags = (*optimized.kernel_flags, "-O0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(interpret.MODES, mode, dataclasses.replace(optimized, kernel_flags=flags))
        yield


def mostly_long(cases: Sequence[Any], *quick: int) -> list[Any]:
    """Parameters of a test: the cases, all but those at some indices marked as long."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    chosen = {range(len(rows))[index] for index in quick}  # Counted from the end where negative.
    marks = [() if index in chosen else pytest.mark.long for index in range(len(rows))]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]


def one_size(schedule: Any) -> Any:
    """A schedule with the last alone of the sizes of its kernel that are compiled."""
    sizes = ("tiles", "warpgroup_tiles", "channels", "halo_lines", "tap_lines", "lines")
    last = {name: getattr(schedule, name)[-1:] for name in sizes if hasattr(schedule, name)}
    return dataclasses.replace(schedule, **last)


def engine_sources(
    spec: ConvSpec,
    dtype: str,
    contractions: tuple[str, ...],
    schedules: Schedules | None = None,
    *,
    small: bool = False,
) -> dict[str, str]:
    """The rendered CUDA sources of some contractions, with their headers, by file name.

    ``dtype`` is a dtype, or a math mode of the tensor cores; ``schedules`` are other than
    its defaults; ``small`` units have one size of their kernels (see :func:`one_size`).
    """
    files: dict[str, str] = {}
    # bgrad lies in wgrad's unit.
    for contraction in {"wgrad" if name == "bgrad" else name for name in contractions}:
        unit = plans.unit(spec, contraction, dtype)
        plan = unit.default()
        if schedule := (schedules or {}).get((contraction, dtype)):
            plan = unit.with_schedule(schedule)
        if small:
            plan = unit.with_schedule(one_size(plan.schedule))
        files |= {Path(path).name: text for path, text in headers(unit, spec.has_epilogue).items()}
        files[f"{contraction}_{dtype}.cu"] = render_unit(spec, unit, plan)
    return files


@dataclass
class Problem:
    """One call of a contraction: operands of a dtype, and the result in float64."""

    contraction: str
    dtype: str
    operands: dict[str, Tensor]
    """By name (see :data:`OPERANDS`), in three dimensions; the result among them, NaN."""
    reference: Tensor

    @property
    def result(self) -> Tensor:
        return self.operands[RESULT[self.contraction]]

    @property
    def symbol(self) -> str:
        return f"convgen_{self.contraction}_{self.dtype}"

    @property
    def numbers(self) -> list[int]:
        """Batch, channels and extents, in ConvgenCall's order."""
        coarse, fine = self.operands["coarse"], self.operands.get("fine")
        beside = coarse if fine is None else fine
        return [
            coarse.shape[0],
            coarse.shape[1],
            beside.shape[1],
            *coarse.shape[2:],
            *beside.shape[2:],
        ]

    def error(self) -> float:
        """Norm of the error over the reference's; NaN where an element was not written."""
        difference = self.result.double() - self.reference
        return float(difference.norm() / self.reference.norm().clamp_min(1e-30))

    def check(self) -> None:
        error = self.error()
        assert error <= LIMITS[self.dtype], f"{self.symbol}: error {error}"


def shifted(tensor: Tensor, elements: int) -> Tensor:
    """The same values, so many elements behind an address that is a multiple of 16 bytes.

    What lies beside them is NaN.
    """
    storage = torch.full((tensor.numel() + 16,), math.nan, dtype=tensor.dtype)
    first = -storage.data_ptr() // tensor.element_size() % (16 // tensor.element_size())
    view = storage[first + elements :][: tensor.numel()].view(tensor.shape)
    view.copy_(tensor)
    return view


def problem(
    spec: ConvSpec,
    contraction: str,
    dtype: str,
    extents: tuple[int, ...],
    *,
    batch: int = 1,
    channels: tuple[int, int] = (1, 1),
    bias: bool = True,
    seed: int = 0,
) -> Problem:
    """A problem on random operands; ``extents`` and ``channels`` (in, out) are the operator's."""
    g = spec.geometry
    lead = (1,) * (3 - spec.ndim)
    inner, outer = (*lead, *extents), (*lead, *spec.output_extents(extents))
    coarse_extent, fine_extent = (inner, outer) if spec.transposed else (outer, inner)
    coarse_channels, fine_channels = channels if spec.transposed else channels[::-1]
    kind = getattr(torch, (DTYPES | MODES)[dtype].torch_name)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(kind)

    coarse = random(batch, coarse_channels, *coarse_extent)
    fine = random(batch, fine_channels, *fine_extent)
    weight = random(coarse_channels, fine_channels // g.groups, *g.kernel)
    operands = {"coarse": coarse}
    if contraction == "bgrad":
        reference = coarse.double().sum((0, 2, 3, 4))
        operands["bias"] = torch.full((coarse_channels,), torch.nan, dtype=kind)
        return Problem(contraction, dtype, operands, reference)

    operands |= {"fine": fine, "weight": weight}
    reference = without_bias(spec, contraction, operands)
    if bias and contraction != "wgrad":
        operands["bias"] = random(reference.shape[1])
        reference = reference + operands["bias"].double().view(1, -1, 1, 1, 1)
    operands[RESULT[contraction]] = torch.full(tuple(reference.shape), torch.nan, dtype=kind)
    return Problem(contraction, dtype, operands, reference)


def without_bias(spec: ConvSpec, contraction: str, operands: Mapping[str, Tensor]) -> Tensor:
    """A contraction of operands in three dimensions, in float64."""
    g = spec.geometry
    coarse = operands["coarse"].double()
    # The three contractions are the derivatives of one trilinear form, which autograd knows.
    fine, weight = (operands[n].double().detach().requires_grad_() for n in ("fine", "weight"))
    pads = []
    for axis in (2, 1, 0):
        reach = (coarse.shape[2 + axis] - 1) * g.stride[axis]
        reach += g.dilation[axis] * (g.kernel[axis] - 1) + 1
        end = max(0, reach - g.padding[axis] - fine.shape[2 + axis])
        pads += [g.padding[axis], end]
    full = F.conv3d(F.pad(fine, pads), weight, None, g.stride, 0, g.dilation, g.groups)
    form = full[..., : coarse.shape[2], : coarse.shape[3], : coarse.shape[4]]
    if contraction == "fprop":
        return form.detach()
    (reference,) = torch.autograd.grad(form, fine if contraction == "dgrad" else weight, coarse)
    return reference


def check_nonfinite(
    library: Library,
    spec: ConvSpec,
    given: Problem,
    call: Callable[[Library, Problem], object] | None = None,
) -> None:
    """What is not finite in an operand comes out where that is read, and nowhere else.

    ``call`` solves a problem, by default :func:`solve`.
    """
    for name in {"coarse", "fine", "weight"} - {RESULT[given.contraction]}:
        tensor = given.operands[name].clone()
        chosen = torch.zeros(tensor.shape, dtype=torch.bool)
        # Ends of lines, and places within them, in the first and the last channel.
        for index, place in ((0, 0), (0, 1), (-1, -1), (-1, -2)):
            chosen[(index, index, *(place % extent for extent in tensor.shape[2:]))] = True
        tensor[chosen] = torch.nan
        tensor[-1, -1][chosen[-1, -1]] = math.inf
        operands = {**given.operands, name: tensor}
        operands[RESULT[given.contraction]] = torch.full_like(given.result, math.nan)
        case = Problem(given.contraction, given.dtype, operands, given.reference)
        (call or solve)(library, case)
        # Sums of ones are far below what stands for the elements chosen.
        ones = {key: torch.ones(t.shape, dtype=torch.float64) for key, t in operands.items()}
        ones[name][chosen] = 1e100
        must = may = without_bias(spec, given.contraction, ones) > 1e50
        if name == "weight":  # which may be multiplied by a zero of the padding
            ones[name][chosen.flatten(2).any(2)] = 1e100
            whole = without_bias(spec, given.contraction, ones) > 1e50
            may = whole.any(dim=(0, 2, 3, 4), keepdim=True).expand_as(must)
        finite = case.result.isfinite()
        where = f"{case.symbol}, {name}"
        assert not (finite & must).any(), f"{where}: lost"
        assert (finite | may).all(), f"{where}: spread to {(~finite & ~may).sum()} results"
        clean = given.operands | {name: given.operands[name].masked_fill(chosen, 0)}
        expected = without_bias(spec, given.contraction, clean)
        if "bias" in given.operands:
            expected = expected + given.operands["bias"].double().view(1, -1, 1, 1, 1)
        difference = (case.result.double() - expected)[~may].norm()
        limit = LIMITS[given.dtype] * float(expected.norm().clamp_min(1e-30))
        assert difference <= limit, f"{where}: error {difference}"


def solve(library: Library, given: Problem) -> None:
    """Calls the contraction on the operands where they lie, the result among them.

    Raises:
        Fault: if the interpreter reports one.
    """
    tensors = given.operands
    numbers = abi.NUMBERS.pack(0, *given.numbers, 0)
    size = library.workspace_bytes(given.symbol, bytes(abi.POINTERS.size) + numbers)
    scratch = torch.full((size + 255,), 0xFF, dtype=torch.uint8)
    workspace = (scratch.data_ptr() + 255) & -256 if size else 0
    addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in OPERANDS]
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        contents = OUTPUT if tensor is given.result else INPUT
        library.register(tensor.data_ptr(), tensor.nbytes, name, contents)
    if size:
        library.register(workspace, size, "workspace", OUTPUT)
    try:
        library.call(given.symbol, abi.POINTERS.pack(*addresses, workspace, 0) + numbers)
    finally:
        library.forget()
    for name, tensor in tensors.items():
        assert tensor is given.result or _bytes(tensor) == _bytes(before[name]), f"{name} changed"


def solve_exactly(path: Path, problems: list[Problem], folder: Path) -> None:
    """Solves problems in a process under AddressSanitizer, with tensors of their exact sizes.

    Raises:
        Fault: with what the process printed, if it reports anything.
    """
    request = bytearray()
    for given in problems:
        symbol = given.symbol.encode()
        tensors = [given.operands.get(name) for name in OPERANDS]
        data = [None if tensor is None else _bytes(tensor) for tensor in tensors]
        request += struct.pack("q", len(symbol)) + symbol + struct.pack("9q", *given.numbers)
        request += struct.pack("4q", *(-1 if d is None else len(d) for d in data))
        request += b"".join(d for d in data if d is not None)
    (folder / "request").write_bytes(request)
    run_driver(path, folder)
    response = memoryview((folder / "response").read_bytes())
    for given in problems:
        for name in OPERANDS:
            tensor = given.operands.get(name)
            if tensor is None:
                continue
            after, response = response[: tensor.nbytes], response[tensor.nbytes :]
            if tensor is given.result:
                flat = torch.frombuffer(bytearray(after), dtype=tensor.dtype)
                tensor.copy_(flat.view(tensor.shape))
            else:
                assert after == _bytes(tensor), f"{name} changed"
    assert not response


def run_driver(path: Path, folder: Path) -> None:
    """Runs the sanitized program on ``folder/request``; writes ``folder/response``."""
    result = subprocess.run(
        [interpret.driver(), path, folder / "request", folder / "response"],
        capture_output=True,
        text=True,
        # LeakSanitizer needs ptrace, which containers forbid.
        env={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    )
    if result.returncode or result.stderr:
        raise Fault(result.stderr or f"exit status {result.returncode}")


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
