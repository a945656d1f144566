"""What the compiler does with registers that wgmma still reads, by nvdisasm.

A product's first operand comes from registers, which it may read until a wait ends it. ptxas knows
that only as far as there is no branch: in a loop it has given them to the next loads, and results
were wrong. So the machine code is searched for writes to them, along all paths.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import plans
import pytest
from interpreted import engine_sources

from convgen.building import toolchain
from convgen.spec import ConvSpec

UP = "conv_transpose3d"
SPECS = [
    ConvSpec(UP, 2, 2),
    ConvSpec("conv3d", 1),
    ConvSpec("conv3d", 3, 1, 1),
    ConvSpec(UP, 3, 2, 1),
]
NO_RESULT = ("ST", "BAR", "BRA", "HGMMA", "WARPGROUP", "RED", "DEPBAR", "SYNCS", "R2UR", "BSSY")
NO_RESULT += ("BSYNC", "EXIT", "NOP", "WARPSYNC", "MEMBAR", "FENCE", "ISETP", "FSETP", "LDGDEPBAR")
NO_RESULT += ("LDGSTS", "USETMAXREG", "CCTL")
Batches = tuple[tuple[frozenset[int], bool], ...]
"""Of products under way: the registers that a batch reads, and whether it is complete."""


def cubin(
    folder: Path,
    spec: ConvSpec,
    contraction: str,
    fault: tuple[str, str] | None,
    mode: str = "tf32",
) -> Path:
    schedules = {}
    if contraction == "wgrad":
        schedules = {(contraction, mode): plans.warpgroup_wgrad(spec, mode)}
    for name, text in engine_sources(spec, mode, (contraction,), schedules).items():
        if fault is not None and fault[0] in text:
            text = text.replace(*fault)
            fault = None
        (folder / name).write_text(text)
    assert fault is None
    compiler = toolchain.find_cuda()
    command = [compiler.path, "-ccbin", compiler.host, "-std=c++17", "-O3", "-arch=sm_90a"]
    command += ["-cubin", f"{contraction}_{mode}.cu", "-o", "unit.cubin"]
    environment = toolchain.build_environment()
    subprocess.run(command, check=True, capture_output=True, cwd=folder, env=environment)
    return folder / "unit.cubin"


@cache
def disassembler() -> str:
    """nvdisasm of the CUDA toolkit, or of the pip wheel that the test extra has."""
    wheels = [str(root / "bin") for root in toolchain._wheel_roots()]
    found = shutil.which("nvdisasm", path=os.pathsep.join([os.environ.get("PATH", ""), *wheels]))
    return found or pytest.skip("needs nvdisasm, of the CUDA toolkit or nvidia-cuda-nvdisasm")


def written(instruction: str) -> set[int]:
    """The registers that an instruction writes."""
    match = re.match(r"(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s+R(\d+)\b", instruction)
    if not match or match[1].startswith(NO_RESULT):
        return set()
    wide = 4 if ".128" in match[1] else 2 if re.search(r"\.64|\.WIDE|^CS2R", match[1]) else 1
    return {int(match[2]) + i for i in range(wide)}


def after(instruction: str, batches: Batches) -> Batches:
    """The products under way after an instruction."""
    if match := re.search(r"HGMMA\S*\s+R\d+,\s+R(\d+)", instruction):
        registers = frozenset(range(int(match[1]), int(match[1]) + 4))
        if batches and not batches[-1][1]:
            registers |= batches[-1][0]
            batches = batches[:-1]
        return (*batches, (registers, "gsb0" in instruction))
    if match := re.search(r"WARPGROUP\.DEPBAR\S*\s+gsb0,\s*(\w+)", instruction):
        pending = int(match[1], 16)
        return batches[-pending:] if pending else ()
    return batches


def overwritten(text: str) -> tuple[int, list[str]]:
    """How many products a kernel's machine code has, and what writes registers they may read."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = re.sub(r"/\*[0-9a-f]{4,}\*/", "", line).strip()
        if match := re.match(r"(\.L_x_\d+):", line):
            labels[match[1]] = len(code)
        elif line and not line.startswith((".", "/*")):
            code.append(line.rstrip(" ;"))
    found: dict[int, str] = {}
    seen: set[tuple[int, Batches]] = set()
    paths: list[tuple[int, Batches]] = [(0, ())]
    while paths:
        at, batches = paths.pop()
        while at < len(code) and (at, batches) not in seen:
            seen.add((at, batches))
            instruction = code[at]
            if any(written(instruction) & registers for registers, _ in batches):
                found[at] = instruction
            batches = after(instruction, batches)
            if match := re.search(r"BRA.*`\((\.L_x_\d+)\)", instruction):
                paths.append((labels[match[1]], batches))
                if not instruction.startswith("@") and "P" not in instruction.split("`")[0][3:]:
                    break
            if instruction.startswith("EXIT"):
                break
            at += 1
    return sum("HGMMA" in line for line in code), list(found.values())


def search(path: Path) -> tuple[int, list[str]]:
    done = subprocess.run([disassembler(), "-c", path], check=True, capture_output=True, text=True)
    kernels = re.split(r"\n\s*\.section\s+\.text\.", done.stdout)[1:]
    results = [overwritten(kernel) for kernel in kernels]
    return sum(count for count, _ in results), [line for _, found in results for line in found]


@pytest.mark.long
@pytest.mark.parametrize(
    ("spec", "contraction"),
    [(s, c) for s in SPECS for c in ("fprop", "dgrad", "wgrad")],
    ids=lambda value: getattr(value, "name", value),
)
def test_nothing_writes_what_products_read(
    spec: ConvSpec, contraction: str, tmp_path: Path
) -> None:
    products, found = search(cubin(tmp_path, spec, contraction, None))
    assert products
    assert not found


@pytest.mark.long
@pytest.mark.parametrize("spec", SPECS[2:], ids=lambda spec: spec.name)
def test_nothing_writes_what_products_of_unaligned_rows_read(
    spec: ConvSpec, tmp_path: Path
) -> None:
    products, found = search(cubin(tmp_path, spec, "wgrad", None, "bf16tc"))
    assert products
    assert not found


@pytest.mark.long
def test_the_search_finds_a_missing_wait(tmp_path: Path) -> None:
    fault = ("wgmma_wait<ONE ? 0 : 1>", "wgmma_wait<1>")
    _, found = search(cubin(tmp_path, SPECS[0], "dgrad", fault))
    assert found
