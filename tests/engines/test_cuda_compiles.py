"""The CUDA engines' kernels, compiled: no spills and no warnings.

Registers are counted by ptxas alone, so this needs nvcc and no GPU. The cases are chosen so that
every style of kernel is compiled (see :func:`test_every_style_of_kernel_is_compiled`), and among
them those that fill their registers. They are compiled for the oldest GPU and Hopper, for which the
sources have branches, and some of each engine for every GPU since sm_75.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import plans
import pytest
from interpreted import engine_sources, mostly_long, one_size

from convgen.building import toolchain
from convgen.building.toolchain import CUDA_FLAGS, CudaCompiler, KernelResources, ToolchainError
from convgen.codegen.render import headers, render_unit
from convgen.engines import tuned
from convgen.engines.gather.schedule import GatherSchedule
from convgen.engines.implicit_gemm.gather import GATHER as GEMM_GATHER
from convgen.engines.implicit_gemm.wgrad_taps import WGRAD_TAPS
from convgen.engines.mma.fit import GatherTiles
from convgen.engines.mma.wgrad import WgradSchedule as ProductSchedule
from convgen.engines.registry import AnyFamily, AnyPlan, Unit, families, unit_of
from convgen.spec import CONTRACTIONS, ConvSpec
from convgen.spec.dtypes import DTYPES, MODES

REGISTERS = 168
"""What blocks of 12 warps leave a thread."""

# The intermediate code of these pairs and triples is the same: the sources ask for __CUDA_ARCH__
# 800 and 900 alone. Tensor cores multiply TF32 and bfloat16 since sm_80.
TARGETS = {"75": ("75",), "80": ("80", "86", "89"), "90a": ("90a",), "100": ("100", "120")}
OLDEST = {"simt": 75, "mma": 80}
HOPPER = "90a"


@dataclass(frozen=True)
class Case:
    spec: ConvSpec
    kind: str
    """A dtype or a math mode."""
    contractions: tuple[str, ...] = CONTRACTIONS

    def __str__(self) -> str:
        return f"{self.spec.name}-{self.kind}"

    def plans(self) -> list[AnyPlan]:
        return [plans.plan(self.spec, c, self.kind) for c in self.contractions]


def spec(op: str, kernel: int | tuple[int, ...], *rest: object, **more: object) -> ConvSpec:
    return ConvSpec(op, kernel, *rest, **more)  # type: ignore[arg-type]


UP, CONV = "conv_transpose3d", "conv3d"
GATHERS, WGRAD, FORWARD = ("fprop", "dgrad"), ("wgrad",), ("fprop",)
CASES = [
    # All taps unrolled, register rows along D or H.
    Case(spec(UP, 3, 2, 1, 1), "f32"),
    Case(spec("conv2d", 3, 1, 1), "f16", ("fprop",)),
    # No overlap; depthwise.
    Case(spec(UP, 2, 2), "bf16", ("dgrad",)),
    Case(spec(CONV, 3, 1, 1, groups=8, in_channels=8, out_channels=8), "f32", WGRAD),
    Case(spec(UP, 3, 2, 1, 1, groups=8, in_channels=8, out_channels=8), "f32", GATHERS),
    Case(spec("conv2d", 7, 1, 3, groups=8, in_channels=8, out_channels=8), "f32", FORWARD),
    # A plane of taps at a time, or a line; on the tensor cores also a slab.
    Case(spec("conv2d", 7, 2, 3), "f64", GATHERS),
    Case(spec(CONV, 9, 1, (1, 4, 4)), "f32", ("dgrad",)),
    # One-dimensional: positions scattered over the plane. Many phases, long lines.
    Case(spec("conv_transpose1d", 16, 8, 4), "f64"),
    Case(spec("conv_transpose1d", 12, 6, 3), "f64", ("fprop",)),
    Case(spec("conv_transpose1d", 40, 20, 10), "f32", ("dgrad",)),
    Case(spec("conv2d", (3, 40), 1, (1, 20)), "f32", ("fprop",)),
    # Tensor cores.
    Case(spec(CONV, 3, 1, 1), "tf32", GATHERS),
    Case(spec(CONV, 3, 1, 1), "tf32x3", WGRAD),
    Case(spec(UP, 4, 2, 1), "tf32x3", ("dgrad",)),
    Case(spec(CONV, 5, 2, 2), "f16tc", ("dgrad",)),
    # Words of neighbours.
    Case(spec(CONV, 3, 2, 1), "bf16tc", ("fprop",)),
    Case(spec(CONV, 9, 1, (1, 4, 4)), "bf16tc", ("fprop",)),
    Case(spec(UP, 3, 2, 1, 1, in_channels=16, out_channels=8), "f16tc", ("fprop",)),
    Case(spec(CONV, 7, 2, 3), "f16tc", ("dgrad",)),
    Case(spec("conv_transpose1d", 16, 8, 4), "tf32", GATHERS),
    Case(spec("conv_transpose1d", 16, 8, 4), "bf16tc", WGRAD),
    Case(spec("conv_transpose1d", 4, 3, 0, 2, dilation=2), "tf32", WGRAD),
    Case(spec("conv_transpose1d", 6, 3), "tf32x3", WGRAD),
    Case(spec("conv_transpose1d", 40, 20, 10), "tf32", ("dgrad",)),
    Case(spec("conv2d", (3, 40), 1, (1, 20)), "tf32x3", ("fprop",)),
    # What has spilled: wgrad's sums beside fragments of three or four coarse tiles.
    Case(spec("conv1d", 3, 2, 1), "tf32", WGRAD),
    Case(spec("conv_transpose2d", (3, 2), (2, 3), groups=2), "tf32", WGRAD),
    Case(spec(UP, 2, 2, in_channels=128, out_channels=64), "tf32", WGRAD),
    # Columns of a strided window, where warps multiply together.
    Case(spec("conv_transpose2d", 4, 2, 1), "bf16tc", ("fprop",)),
    Case(spec(UP, 4, 2, 1, in_channels=64, out_channels=1), "tf32", ("fprop",)),
    # With epilogues.
    Case(spec("conv2d", 3, 1, 1, activation="gelu", residual=True), "f32", FORWARD),
    Case(spec("conv2d", 3, 1, 1, groups=8, activation="silu", residual=True), "f16", FORWARD),
    Case(spec(UP, 3, 2, 1, 1, activation="tanh", residual=True), "tf32", ("dgrad",)),
    Case(spec(CONV, 3, 1, 1, activation="gelu", residual=True), "bf16tc", FORWARD),
]


@cache
def compiler() -> CudaCompiler:
    try:
        return toolchain.find_cuda()
    except ToolchainError as error:
        pytest.skip(str(error))


def targets(engine: str, every: bool) -> dict[str, list[str]]:
    """The architectures to compile for, by that of their intermediate code: every, or two."""
    supported = compiler().supported_architectures()

    def served(name: str) -> bool:
        number = int(name.removesuffix("a"))
        return number in supported and number >= OLDEST[engine]

    everywhere = {
        virtual: [real for real in reals if served(real)]
        for virtual, reals in TARGETS.items()
        if served(virtual)
    }
    if every:
        return everywhere
    oldest = next(iter(everywhere))
    return {virtual: [virtual] for virtual in dict.fromkeys((oldest, HOPPER))}


def kernels_of(plan: AnyPlan) -> int:
    """How many sizes of its kernel a unit instantiates."""
    if isinstance(plan.schedule, ProductSchedule | GatherTiles):
        return len(plan.schedule.tiles)
    sizes: tuple[int, ...] = plan.schedule.channels
    return len(sizes)


def compile_unit(
    folder: Path, plan: AnyPlan, compiled: dict[str, list[str]]
) -> list[KernelResources]:
    """What the kernels of one unit take, its gathers or wgrad; fails for errors and warnings."""
    kernels = compile_source(folder, f"{plan.contraction}_{plan.kind}", compiled)
    main = [
        k.architecture
        for k in kernels
        if f"{plan.contraction}_kernel" in k.kernel and "depthwise" not in k.kernel
    ]
    architectures = [f"sm_{real}" for reals in compiled.values() for real in reals]
    assert sorted(main) == sorted(architectures * kernels_of(plan)), kernels
    return kernels


def compile_source(
    folder: Path, name: str, compiled: dict[str, list[str]]
) -> list[KernelResources]:
    """What the kernels of one source take; fails for errors and warnings."""
    command = [compiler().path, "-ccbin", compiler().host, *CUDA_FLAGS]
    for virtual, reals in compiled.items():
        code = ",".join(f"sm_{real}" for real in reals)
        command += ["-gencode", f"arch=compute_{virtual},code=[{code}]"]
    # Without the host's part: g++ sees it when the sources are compiled for the interpreter.
    command += ["-fatbin", f"{name}.cu", "-o", f"{name}.fatbin"]
    environment = toolchain.build_environment()
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    assert "warning" not in log, log
    # ptxas says so where products by wgmma wait for each other.
    assert "Potential Performance Loss" not in log, log
    kernels = toolchain.ptxas_resources(log)
    assert kernels, log
    return kernels


ONE_OF_EACH_ENGINE = [*DTYPES, *MODES].index("f32"), [*DTYPES, *MODES].index("bf16tc")


@pytest.mark.parametrize("kind", mostly_long([*DTYPES, *MODES], *ONE_OF_EACH_ENGINE))
def test_one_size_of_each_kernel_compiles_without_spills_or_warnings(
    kind: str, tmp_path: Path
) -> None:
    """Of every unit, for the oldest GPU, or for that on which warps multiply together."""
    case = Case(spec("conv_transpose2d", 3, 2, 1, 1), kind)
    for name, text in engine_sources(case.spec, kind, CONTRACTIONS, small=True).items():
        (tmp_path / name).write_text(text)
    architecture = "90a" if kind in MODES else "75"
    for plan in case.plans():
        plan = replace(plan, schedule=one_size(plan.schedule))
        for kernel in compile_unit(tmp_path, plan, {architecture: [architecture]}):
            assert not kernel.spills, kernel
            assert kernel.registers <= REGISTERS, kernel


FURTHER = [
    (family, contraction, kind)
    for kind in MODES
    for contraction in CONTRACTIONS
    for family in [each for each in families("cuda", contraction, kind) if not each.host][1:]
]
"""Beside the first family of a mode: they run on Hopper, some of their kernels elsewhere, too."""
SIZED = [(*unit, small) for unit in FURTHER for small in (True, False)]
QUICK = [
    next(i for i, (_, *unit) in enumerate(SIZED) if unit == [contraction, kind, True])
    for contraction, kind in (("fprop", "tf32"), ("wgrad", "f16tc"))
]


@pytest.mark.parametrize(
    ("family", "contraction", "kind", "small"),
    mostly_long(SIZED, *QUICK),
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_further_families_compile_without_spills_or_warnings(
    family: AnyFamily,
    contraction: str,
    kind: str,
    small: bool,
    tmp_path: Path,
) -> None:
    layers = [spec(CONV, 3, 1, 1), spec(CONV, 3, 2, 1), spec(CONV, 1)]
    units = [(layer, unit_of(family, layer.geometry, contraction, kind)) for layer in layers]
    layer, unit = next(pair for pair in units if family.accepts(pair[1].problem) == "")
    plan = unit.default()
    if small:
        plan = unit.with_schedule(one_size(plan.schedule))
    check_on_hopper(tmp_path, layer, unit, plan)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tf32", "bf16tc"])
@pytest.mark.parametrize("contraction", ["fprop", "dgrad"])
def test_strided_halos_compile_without_spills(contraction: str, kind: str, tmp_path: Path) -> None:
    layer = spec(CONV, 3, 2, 1)
    unit = unit_of(GEMM_GATHER, layer.geometry, contraction, kind)
    plan = unit.with_schedule(one_size(unit.default().schedule))
    assert plan.schedule.halo_lines
    check_on_hopper(tmp_path, layer, unit, plan)


def check_on_hopper(folder: Path, layer: ConvSpec, unit: Unit, plan: AnyPlan) -> None:
    """A unit compiles for sm_90a, without spills."""
    for kernel in compile_further(folder, layer, unit, plan, {"90a": ["90a"]}):
        assert not kernel.spills, kernel
        assert kernel.registers <= REGISTERS, kernel


def compile_further(
    folder: Path, layer: ConvSpec, unit: Unit, plan: AnyPlan, compiled: dict[str, list[str]]
) -> list[KernelResources]:
    """What the kernels of a unit of an implicit GEMM take."""
    files = headers(unit, layer.has_epilogue)
    files |= {f"src/cuda/{unit.name}.cu": render_unit(layer, unit, plan)}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return compile_source(folder / "src" / "cuda", unit.name, compiled)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tf32", "f16tc", "bf16tc"])
@pytest.mark.parametrize(
    ("layer", "contraction"),
    [
        (spec(CONV, 3, 1, 1), "fprop"),
        (spec(CONV, 3, 2, 1), "dgrad"),
        (spec("conv2d", 3, 1, 1, activation="gelu", residual=True), "fprop"),
    ],
    ids=str,
)
def test_implicit_gemms_before_hopper_compile_without_spills(
    layer: ConvSpec, contraction: str, kind: str, tmp_path: Path
) -> None:
    unit = unit_of(GEMM_GATHER, layer.geometry, contraction, kind)
    plan = unit.with_schedule(one_size(unit.default().schedule))
    kernels = compile_further(tmp_path, layer, unit, plan, {"80": ["80", "86", "89"]})
    assert len([k for k in kernels if "multistage" in k.kernel]) == 4 * 3
    for kernel in kernels:
        assert not kernel.spills, kernel


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tf32", "tf32x3", "bf16tc"])
def test_implicit_gemms_with_an_epilogue_compile_without_spills(kind: str, tmp_path: Path) -> None:
    layer = spec("conv2d", 3, 1, 1, activation="gelu", residual=True)
    unit = unit_of(GEMM_GATHER, layer.geometry, "fprop", kind)
    check_on_hopper(tmp_path, layer, unit, unit.with_schedule(one_size(unit.default().schedule)))


@pytest.mark.long
@pytest.mark.parametrize("kernel", [4, 16], ids=["either", "patches"])
@pytest.mark.parametrize(
    ("contraction", "kind"), [*((each, "bf16tc") for each in CONTRACTIONS), ("wgrad", "tf32")]
)
def test_patches_compile_without_spills(
    contraction: str, kind: str, kernel: int, tmp_path: Path
) -> None:
    layer = spec("conv2d", kernel, kernel)
    family = WGRAD_TAPS if contraction == "wgrad" else GEMM_GATHER
    unit = unit_of(family, layer.geometry, contraction, kind)
    check_on_hopper(tmp_path, layer, unit, unit.with_schedule(one_size(unit.default().schedule)))


EVERYWHERE = 0, 3, 6, 13, 17
"""Of :data:`CASES`: gathers and wgrad of either engine, small and large elements."""


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "every"),
    [(case, index in EVERYWHERE) for index, case in enumerate(CASES)],
    ids=lambda value: "everywhere" if value is True else str(value),
)
def test_kernels_compile_without_spills_or_warnings(
    case: Case, every: bool, tmp_path: Path
) -> None:
    # With an epilogue, nvcc takes minutes for all sizes.
    small = case.spec.has_epilogue
    for name, text in engine_sources(case.spec, case.kind, case.contractions, small=small).items():
        (tmp_path / name).write_text(text)
    for plan in case.plans():
        if small:
            plan = replace(plan, schedule=one_size(plan.schedule))
        for kernel in compile_unit(tmp_path, plan, targets(plan.family.name, every)):
            assert not kernel.spills, kernel
            assert kernel.registers <= REGISTERS, kernel


@pytest.mark.long
@pytest.mark.parametrize(
    ("dtype", "kind"), [("bf16", "bf16tc"), ("f32", "tf32"), ("f32", "tf32x3")]
)
def test_what_was_measured_on_sm_90a_brings_no_spills_to_sm_90(
    dtype: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where warps multiply together they have more registers; the tables have such schedules."""
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "none"))
    layer = spec(UP, 3)
    found = tuned.schedules(layer, "cuda", [dtype], ["90"], "")
    for name, text in engine_sources(layer, kind, GATHERS, found).items():
        (tmp_path / name).write_text(text)
    for contraction in GATHERS:
        default = plans.plan(layer, contraction, kind)
        plan = replace(default, schedule=found.get((contraction, kind), default.schedule))
        for kernel in compile_unit(tmp_path, plan, {"90": ["90"]}):
            assert not kernel.spills, kernel
            assert kernel.registers <= REGISTERS, kernel


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "contraction", "fields"),
    [
        ("tf32", "dgrad", {"warpgroups": 3, "tiles": ((3, 48), (2, 64))}),
        ("tf32x3", "dgrad", {"warpgroups": 3, "tiles": ((2, 32),)}),
        ("tf32", "dgrad", {"pairs": True, "tiles": ((3, 48), (2, 16))}),
        ("bf16tc", "fprop", {"pairs": True, "tiles": ((3, 48),)}),
        ("tf32", "fprop", {"warpgroups": 3, "pairs": True, "tiles": ((3, 32),)}),
        ("bf16tc", "fprop", {"vectors": True, "tiles": ((3, 48),)}),
    ],
    ids=str,
)
def test_what_a_tuned_schedule_may_have_fits_into_registers(
    kind: str, contraction: str, fields: dict[str, object], tmp_path: Path
) -> None:
    """Three warpgroups, pairs of columns, vectors, near their limits."""
    layer = spec(UP, 3)
    default = plans.plan(layer, contraction, kind)
    plan = replace(default, schedule=replace(default.schedule, **fields))
    assert plan.family.refusal(plan, ["90a"]) == ""
    found = {(contraction, kind): plan.schedule}
    for name, text in engine_sources(layer, kind, (contraction,), found).items():
        (tmp_path / name).write_text(text)
    for kernel in compile_unit(tmp_path, plan, {"90a": ["90a"]}):
        assert not kernel.spills, kernel


def test_every_style_of_kernel_is_compiled() -> None:
    gathers, wgrads = set(), set()
    for plan in [plan for case in CASES for plan in case.plans()]:
        schedule = plan.schedule
        if isinstance(schedule, GatherSchedule | GatherTiles):
            scattered = schedule.row_axis == "scattered"
            gathers.add((plan.family.name, schedule.unroll, scattered))
            continue
        tap_blocks = plan.geometry.kernel[2] > schedule.taps_w
        wgrads.add((plan.family.name, tap_blocks))
        if isinstance(schedule, ProductSchedule):
            wgrads.add((plan.family.name, f"promotion {schedule.promotion > 0}"))
        else:
            wgrads.add((plan.family.name, f"positions {schedule.positions}"))
    styles = {(style, False) for style in ("taps", "plane", "line")}
    styles |= {(style, True) for style in ("line", "none")}
    assert ("mma", "slab", False) in gathers
    assert gathers >= {(engine, *style) for engine in OLDEST for style in styles}
    assert wgrads >= {(engine, blocks) for engine in OLDEST for blocks in (False, True)}
    assert wgrads >= {("mma", "promotion True"), ("mma", "promotion False")}
    assert wgrads >= {("simt", "positions 1"), ("simt", "positions 4")}
    assert {case.kind for case in CASES} == set(DTYPES) | set(MODES)
