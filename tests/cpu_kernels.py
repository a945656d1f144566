"""The CPU's kernels, compiled without a package and called through the C boundary."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from convgen.codegen.render import render_kernels
from convgen.spec import ConvSpec

TORCH = {
    "f32": torch.float32,
    "f64": torch.float64,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
LIMIT = {"f32": 1e-5, "f64": 1e-12, "f16": 2e-3, "bf16": 1e-2}
FLAGS = ["-std=c++17", "-fopenmp", "-fPIC", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"]
CXX = shlex.split(os.environ["CXX"])
GUARD = 256
OUTPUT = {
    "fprop": ("coarse",),
    "dgrad": ("fine",),
    "wgrad": ("weight",),
    "bgrad": ("bias",),
    "wbgrad": ("weight", "bias"),
}


class ConvgenCall(ctypes.Structure):
    """As in ``convgen_abi.h``."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("coarse", "fine", "weight", "bias")),
        ("workspace", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("device", "batch")),
        *((name, ctypes.c_int64) for name in ("coarse_channels", "fine_channels")),
        ("coarse_extent", ctypes.c_int64 * 3),
        ("fine_extent", ctypes.c_int64 * 3),
        ("channels_last", ctypes.c_int64),
        ("epilogue", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("preactivation", ctypes.c_void_p),
    ]


def compile_library(
    spec: ConvSpec, dtypes: tuple[str, ...], folder: Path, flags: tuple[str, ...]
) -> Path:
    """Renders, compiles (two units at a time) and links one library."""
    files, _ = render_kernels(spec, "cpu", dtypes)
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)

    def compile_unit(path: str) -> str:
        target = str(folder / path) + ".o"
        command = [*CXX, *FLAGS, *flags, "-c", str(folder / path), "-o", target]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_unit, [path for path in files if path.endswith(".cpp")]))
    library = folder / "cpu.so"
    subprocess.run([*CXX, *FLAGS, *flags, "-shared", "-o", str(library), *objects], check=True)
    return library


def lies_last(tensor: torch.Tensor | None) -> bool:
    """Whether a tensor has its channels side by side, and is not contiguous."""
    if tensor is None or tensor.dim() < 3 or tensor.is_contiguous():
        return False
    return tensor.movedim(1, -1).is_contiguous()


def as_last(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with channels side by side."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


@dataclass
class Guarded:
    """A tensor of NaN between guard bands that nothing may touch; ``last``: channels_last."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    last: bool = False
    whole: torch.Tensor = field(init=False)
    inner: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        count = torch.Size(self.shape).numel()
        self.whole = torch.full((count + 2 * GUARD,), float("nan"), dtype=self.dtype)
        self.whole[:GUARD] = 7
        self.whole[GUARD + count :] = 7
        inner = self.whole[GUARD : GUARD + count]
        if self.last:
            first, channels, *extents = self.shape
            self.inner = inner.view(first, *extents, channels).movedim(-1, 1)
        else:
            self.inner = inner.view(self.shape)

    def take(self) -> torch.Tensor:
        """The values, after checking the guards."""
        count = self.inner.numel()
        assert bool((self.whole[:GUARD] == 7).all()), "wrote before the output"
        assert bool((self.whole[GUARD + count :] == 7).all()), "wrote beyond the output"
        return self.inner


class Library:
    """One compiled library; calls take and return tensors of the operator's own rank."""

    def __init__(self, path: Path, spec: ConvSpec) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.spec = spec

    def call(
        self,
        contraction: str,
        dtype: str,
        *,
        coarse: torch.Tensor,
        fine: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        threads: int = 2,
        channels: tuple[int, int] | None = None,
    ) -> int:
        def pointer(tensor: torch.Tensor | None) -> int | None:
            return None if tensor is None else tensor.data_ptr()

        def extents(tensor: torch.Tensor | None) -> Any:
            values = [] if tensor is None else list(tensor.shape[2:])
            return (ctypes.c_int64 * 3)(*([1] * (3 - len(values)) + values))

        if channels is None:
            channels = (coarse.shape[1], coarse.shape[1] if fine is None else fine.shape[1])
        call = ConvgenCall(
            pointer(coarse), pointer(fine), pointer(weight), pointer(bias), None, None, threads,
            coarse.shape[0], *channels, extents(coarse), extents(fine),
            lies_last(coarse) + 2 * lies_last(fine) + 4 * lies_last(weight),
        )  # fmt: skip
        size = self.functions[f"convgen_{contraction}_{dtype}_workspace"]
        size.restype = ctypes.c_int64
        bytes_needed = size(ctypes.byref(call))
        # All bits set: NaN in every type, so that nothing is read before it is written.
        workspace = torch.full((bytes_needed + 512,), 255, dtype=torch.uint8)
        start = -workspace.data_ptr() % 256
        call.workspace = workspace.data_ptr() + start
        tensors = {"coarse": coarse, "fine": fine, "weight": weight, "bias": bias}
        outputs = OUTPUT[contraction]
        inputs = [t for name, t in tensors.items() if t is not None and name not in outputs]
        before = [t.clone() for t in inputs]
        code = self.functions[f"convgen_{contraction}_{dtype}"](ctypes.byref(call))
        assert bool((workspace[start + bytes_needed :] == 255).all()), "wrote beyond the workspace"
        for tensor, copy in zip(inputs, before, strict=True):
            same = torch.equal(as_bytes(tensor), as_bytes(copy))
            assert same, "an input was modified"
        return code

    def run(self, contraction: str, dtype: str, threads: int = 2, **tensors: Any) -> None:
        code = self.call(contraction, dtype, threads=threads, **tensors)
        assert code == 0


@dataclass(frozen=True)
class Problem:
    """A specification's arguments, channels (in, out) and input shapes (batch, *extents)."""

    op: str
    arguments: dict[str, Any]
    channels: tuple[int, int]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...] = ("f32",)
    flags: tuple[str, ...] = ("-O0", "-march=native")
    fixed: bool = False

    @property
    def spec(self) -> ConvSpec:
        channels: dict[str, Any] = {}
        if self.fixed:
            channels = {"in_channels": self.channels[0], "out_channels": self.channels[1]}
        return ConvSpec.make(self.op, **self.arguments, **channels)

    @property
    def name(self) -> str:
        flags = " ".join(self.flags).replace(" -march=native", "")
        return f"{self.spec.name} {self.channels[0]}->{self.channels[1]} {flags}"


@dataclass
class Tensors:
    """Inputs of one layer and its float64 results, with each result's bound sum |x||w|."""

    spec: ConvSpec
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor
    grad: torch.Tensor
    results: dict[str, torch.Tensor]
    bounds: dict[str, torch.Tensor]


def make_tensors(
    spec: ConvSpec, channels: tuple[int, int], shape: tuple[int, ...], dtype: str, seed: int = 0
) -> Tensors:
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int) -> torch.Tensor:
        values = torch.randn(sizes, generator=generator, dtype=torch.float64)
        return values.to(TORCH[dtype])

    inputs, outputs = channels
    x = random(shape[0], inputs, *shape[1:])
    if spec.transposed:
        weight = random(inputs, outputs // spec.groups, *spec.kernel_size)
    else:
        weight = random(outputs, inputs // spec.groups, *spec.kernel_size)
    bias = random(outputs)
    grad = random(shape[0], outputs, *spec.output_extents(shape[1:]))

    def reference(*tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        wide = [t.double().requires_grad_() for t in tensors[:3]]
        arguments: dict[str, Any] = {
            "stride": spec.stride, "padding": spec.padding, "dilation": spec.dilation,
            "groups": spec.groups,
        }  # fmt: skip
        if spec.transposed:
            arguments["output_padding"] = spec.output_padding
        y = getattr(F, spec.op)(*wide, **arguments)
        gx, gw, gb = torch.autograd.grad(y, wide, tensors[3].double())
        return {"y": y.detach(), "gx": gx, "gw": gw, "gb": gb}

    tensors = (x, weight, bias, grad)
    return Tensors(spec, *tensors, reference(*tensors), reference(*(t.abs() for t in tensors)))


def compute(
    library: Library,
    tensors: Tensors,
    dtype: str,
    threads: int = 2,
    bias: bool = True,
    last: str = "",
) -> dict[str, torch.Tensor]:
    """Forward and all gradients by the library, into poisoned and guarded outputs.

    ``last`` names what has its channels side by side: x (and its gradient), w, y (and grad).
    """
    spec = tensors.spec
    t = replace(
        tensors,
        x=as_last(tensors.x) if "x" in last else tensors.x,
        weight=as_last(tensors.weight) if "w" in last else tensors.weight,
        grad=as_last(tensors.grad) if "y" in last else tensors.grad,
    )
    outputs = {
        "y": Guarded(tuple(t.grad.shape), TORCH[dtype], "y" in last),
        "gx": Guarded(tuple(t.x.shape), TORCH[dtype], "x" in last),
        "gw": Guarded(tuple(t.weight.shape), TORCH[dtype], "w" in last),
        "gb": Guarded(tuple(t.bias.shape), TORCH[dtype]),
        # Both at once.
        "gw of wbgrad": Guarded(tuple(t.weight.shape), TORCH[dtype], "w" in last),
        "gb of wbgrad": Guarded(tuple(t.bias.shape), TORCH[dtype]),
    }
    y, gx, gw, gb, gw2, gb2 = (output.inner for output in outputs.values())
    value = t.bias if bias else None
    if spec.transposed:
        library.run("dgrad", dtype, threads, coarse=t.x, fine=y, weight=t.weight, bias=value)
        library.run("fprop", dtype, threads, coarse=gx, fine=t.grad, weight=t.weight)
        library.run("wgrad", dtype, threads, coarse=t.x, fine=t.grad, weight=gw)
        library.run("wbgrad", dtype, threads, coarse=t.x, fine=t.grad, weight=gw2, bias=gb2)
    else:
        library.run("fprop", dtype, threads, coarse=y, fine=t.x, weight=t.weight, bias=value)
        library.run("dgrad", dtype, threads, coarse=t.grad, fine=gx, weight=t.weight)
        library.run("wgrad", dtype, threads, coarse=t.grad, fine=t.x, weight=gw)
        library.run("wbgrad", dtype, threads, coarse=t.grad, fine=t.x, weight=gw2, bias=gb2)
    library.run("bgrad", dtype, threads, coarse=t.grad, bias=gb)
    results = {name: output.take().clone() for name, output in outputs.items()}
    assert torch.equal(as_bytes(results["gw"]), as_bytes(results.pop("gw of wbgrad")))
    return results


def check(results: dict[str, torch.Tensor], tensors: Tensors, dtype: str) -> None:
    for name, value in results.items():
        quantity = name.removesuffix(" of wbgrad")
        expected, bound = tensors.results[quantity], tensors.bounds[quantity]
        assert not bool(value.isnan().any()), f"{name}: not every element was written"
        error = (value.double() - expected).abs()
        norm = float(expected.norm())
        relative = float(error.norm()) / norm if norm else float(error.norm())
        assert relative <= LIMIT[dtype], f"{name}: relative error {relative:.2e}"
        # Outputs that no tap reaches have a zero bound: they must be exact.
        excess = float((error - LIMIT[dtype] * bound).max()) if error.numel() else 0.0
        assert excess <= 0, f"{name}: an element is off by {excess:.2e} more than its bound"


def make_problem(
    op: str, channels: tuple[int, int], shapes: tuple[tuple[int, ...], ...], arguments: Any
) -> Problem:
    options = {k: arguments.pop(k) for k in ("dtypes", "flags", "fixed") if k in arguments}
    return Problem(op, arguments, channels, shapes, **options)


def problem(
    op: str,
    channels: tuple[int, int],
    *shapes: tuple[int, ...],
    long: bool = False,
    **arguments: Any,
) -> Any:
    case = make_problem(op, channels, shapes, arguments)
    marks = pytest.mark.long if long else ()
    return pytest.param(case, id=case.name.replace(" ", "-"), marks=marks)
