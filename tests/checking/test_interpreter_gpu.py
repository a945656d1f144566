"""The interpreter beside the GPU that it stands in for: the same sources give the same bits."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from interpreted import OPERANDS, Library, Problem, compile_sources, engine_sources, problem, solve
from test_interpreter_sm90 import ROWS_OF_K, VECTORS, vectors_of
from torch import Tensor

from convgen.building import toolchain
from convgen.building.build import Library as Target
from convgen.building.build import build
from convgen.checking import interpret
from convgen.codegen.render import TEMPLATES
from convgen.engines import abi
from convgen.engines.implicit_gemm.common import HEADERS
from convgen.spec import ConvSpec

pytestmark = pytest.mark.gpu
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9

FOLDER = Path(__file__).parent / "interpreter"
CONTRACTIONS = ("fprop", "dgrad", "wgrad", "bgrad")


@pytest.fixture(autouse=True, scope="module")
def environment(shared_cache: None) -> Iterator[None]:
    properties = torch.cuda.get_device_properties(0)
    with pytest.MonkeyPatch.context() as patch:
        # The cut of a call depends on the GPU.
        patch.setenv("CONVGEN_INTERPRET_MULTIPROCESSORS", str(properties.multi_processor_count))
        patch.setenv(
            "CONVGEN_INTERPRET_SHARED_BYTES", str(properties.shared_memory_per_block_optin)
        )
        yield


def compile_for_gpu(name: str, sources: dict[str, str]) -> ctypes.CDLL:
    """The same sources through nvcc."""
    compiler = toolchain.find_cuda()
    commands = compiler.commands(toolchain.default_architectures(compiler))
    files = {f"src/{file}": text for file, text in sources.items()}
    units = tuple(sorted(file for file in files if file.endswith(".cu")))
    library = ctypes.CDLL(
        str(build(name, files, [Target("lib/cuda.so", units, commands)]) / "lib/cuda.so")
    )
    library.convgen_error_string.restype = ctypes.c_char_p
    return library


def solve_on_gpu(library: ctypes.CDLL, given: Problem) -> Tensor:
    tensors = {name: tensor.cuda() for name, tensor in given.operands.items()}
    numbers = abi.NUMBERS.pack(0, *given.numbers, 0)
    workspace = library[f"{given.symbol}_workspace"]
    workspace.restype = ctypes.c_int64
    scratch = torch.full(
        (workspace(bytes(abi.POINTERS.size) + numbers) + 1,), 0xFF, dtype=torch.uint8
    ).cuda()
    addresses = [tensors[name].data_ptr() if name in tensors else 0 for name in OPERANDS]
    stream = torch.cuda.current_stream().cuda_stream
    pointers = abi.POINTERS.pack(*addresses, scratch.data_ptr(), stream)
    code = library[given.symbol](pointers + numbers)
    assert code == 0, library.convgen_error_string(code).decode()
    torch.cuda.synchronize()
    (name,) = [name for name, tensor in given.operands.items() if tensor is given.result]
    return tensors[name].cpu()


UP = ConvSpec("conv_transpose3d", 3, 2)
CASES = [
    *((UP, dtype) for dtype in ("f32", "f64", "f16", "bf16")),
    (ConvSpec("conv3d", (2, 3, 3), 2, 1, 0, (1, 2, 3), 3), "f32"),
    (ConvSpec("conv_transpose1d", 16, 8, 4), "f64"),
    (ConvSpec("conv2d", (3, 40), 1, (1, 20)), "f32"),
]


@pytest.mark.parametrize(("spec", "dtype"), CASES, ids=[f"{s.name}-{d}" for s, d in CASES])
def test_engines_give_the_gpus_bits(spec: ConvSpec, dtype: str) -> None:
    sources = engine_sources(spec, dtype, CONTRACTIONS)
    compiled = compile_for_gpu(spec.name, sources)
    interpreted = Library(interpret.library(spec.name, sources, "plain"))
    channels = (9, 15) if spec.groups == 3 else (10, 13)
    extents = {1: (301,), 2: (7, 50), 3: (5, 9, 21)}[spec.ndim]
    for contraction in CONTRACTIONS:
        given = problem(spec, contraction, dtype, extents, batch=2, channels=channels)
        solve(interpreted, given)
        given.check()
        on_gpu = solve_on_gpu(compiled, given)
        differing = int((on_gpu != given.result).sum())
        assert differing == 0, (
            f"{contraction}: {differing} of {on_gpu.numel()} elements differ, at most by "
            f"{float((on_gpu.double() - given.result.double()).abs().max())}"
        )


def compile_both(source: str) -> tuple[ctypes.CDLL, Library]:
    """A hand-written source, for the GPU and interpreted."""
    headers = {file.name: file.read_text() for file in (TEMPLATES / "cuda").rglob("*.cuh")}
    headers |= {name: (TEMPLATES / path).read_text() for name, path in HEADERS.items()}
    text = (FOLDER / source).read_text()
    # Beside the headers that it includes, whose own lie a folder above.
    place, architecture = source, "80"
    if source == "sm90.cu":
        place, architecture = f"implicit_gemm/{source}", "90a"
        headers["implicit_gemm/convgen_abi.h"] = headers["convgen_abi.h"]
    return (
        compile_for_gpu("test", {**headers, place: text}),
        Library(compile_sources("plain", {source: text}, architecture)),
    )


def calls_of_sm90() -> Iterator[tuple[str, list[Tensor | int], int]]:
    """Calls of sm90.cu: tensors that hold any of its cases, and what it writes of them."""
    for which in range(8):
        x = torch.randint(1, 1 << 30, (72 * 9 * 7 * 5 * 2,), dtype=torch.int32)
        yield "load", [x, torch.zeros(8 << 10, dtype=torch.int32), which], 1
    for which in (0, 5, 7):
        yield "store", [torch.full((72 * 9 * 7 * 5 * 2,), -1, dtype=torch.int16), which], 0
    for transposed in (0, 1):
        yield "matrices", [torch.zeros(64, dtype=torch.int32), transposed], 0
    for symbol, kind, first, pitch in (
        ("rows_half_32", torch.float16, 0, 8),
        ("rows_bfloat16_64", torch.bfloat16, 5, 10),
        ("rows_float_96", torch.float32, 13, 8),
        ("rows_half_128", torch.float16, 2, 7),
        ("rows_float_32", torch.float32, 1, 0),
    ):
        columns, depth = 2 * int(symbol.split("_")[-1]), 128 // kind.itemsize
        count = first + (columns // 8 - 1) * pitch + 8
        # Exact, of TF32 values whose lowest bits the tensor core takes no notice of.
        a, b = (torch.randint(-8, 9, (rows, depth)).to(kind) for rows in (64, count))
        if kind == torch.float32:
            a, b = a * (1 + 2.0**-12), b * (1 + 2.0**-12)
        words = [x.view(torch.int32) for x in (a, b)]
        yield symbol, [*words, torch.zeros(64, columns), count, first, pitch], 2

    for call in ROWS_OF_K:
        words = [x.view(torch.int32) for x in call.operands()]
        numbers = [call.row_bytes, *call.rows, call.pitch, call.chunk_pitch]
        yield call.symbol, [*words, torch.zeros(64, call.columns), *numbers], 2

    for symbol, first, step in VECTORS:
        a, b = vectors_of(symbol, first, step)
        out = torch.zeros(64, 2 * int(symbol.split("_")[-1]))
        yield symbol, [a, b, out, len(b), first, step], 2


@pytest.mark.skipif(not HOPPER, reason="needs a GPU of compute capability 9.0")
def test_maps_are_refused_that_the_driver_refuses() -> None:
    compiled, _ = compile_both("sm90.cu")
    x = torch.zeros(64, dtype=torch.int16).cuda()
    address = ctypes.c_void_p(x.data_ptr())
    assert [compiled.refused(address, which) for which in range(-1, 14)] == [0] + [1] * 14


def test_hand_written_kernels_give_the_gpus_bits() -> None:
    """Shuffles, votes, copies of every kind, mbarriers, conversions, matrices, products."""
    calls: dict[str, list[tuple[str, list[Tensor | int], int]]] = {
        "tile.cu": [("tile", [torch.randn(502), torch.randn(3), torch.zeros(500), 500], 2)],
        "warps.cu": [
            ("reduce", [torch.randn(5, 1000).double(), torch.zeros(5).double(), 1000, 5], 1),
            ("lanes", [torch.zeros(64, 8, dtype=torch.int32)], 0),
            ("exchange", [torch.zeros(64, dtype=torch.int32)], 0),
            ("pipeline", [torch.randn(5, 64), torch.zeros(64), 5], 1),
            ("where", [torch.zeros(480, dtype=torch.int32)], 0),
        ],
    }
    values = torch.randn(4096) * torch.exp2(torch.randint(-30, 18, (4096,)).float())
    for kind in ("half", "bfloat16"):
        narrowed = torch.zeros(4096, dtype=torch.int16)
        calls["warps.cu"].append(
            (f"convert_{kind}", [values, narrowed, torch.zeros(4096), 4096], 1)
        )
    if torch.cuda.get_device_capability() >= (9, 0):
        calls["pipeline.cu"] = [
            ("ring", [torch.randn(7, 64), torch.zeros(64), 7], 1),
            ("handover", [torch.zeros(32)], 0),
        ]
        rounded = [torch.zeros(4096, dtype=torch.int32) for _ in range(2)]
        integers = [torch.randint(-8, 9, shape).float() for shape in ((16, 8), (8, 8), (16, 8))]
        calls["tensor_core.cu"] = [
            ("rounded", [values, *rounded, 4096], 1),
            ("product_tf32", integers, 2),
            (
                "matrices",
                [torch.arange(128, dtype=torch.int32), torch.zeros(256, dtype=torch.int32), 32],
                1,
            ),
        ]
        calls["sm90.cu"] = list(calls_of_sm90())
    for source, made in calls.items():
        compiled, interpreted = compile_both(source)
        for symbol, arguments, result in made:
            on_gpu = [a if isinstance(a, int) else a.cuda() for a in arguments]
            code = compiled[symbol](
                *(a if isinstance(a, int) else ctypes.c_void_p(a.data_ptr()) for a in on_gpu)
            )
            assert code == 0, compiled.convgen_error_string(code).decode()
            torch.cuda.synchronize()
            interpreted(symbol, *(a if isinstance(a, int) else a.numpy() for a in arguments))
            expected, got = on_gpu[result], arguments[result]
            assert isinstance(expected, Tensor)
            assert isinstance(got, Tensor)
            assert torch.equal(expected.cpu(), got), symbol
