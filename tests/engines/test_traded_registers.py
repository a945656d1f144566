"""What the interpreter cannot see of Hopper's kernels, by ptxas and nvdisasm.

Warps that release registers (setmaxnreg) name none beyond those that they keep; claims are no more
than a thread block is started with; kernels that begin early touch no tensor before they wait.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from implicit_gemms import sources, spec, use_two_multiprocessors
from test_wgmma_registers import disassembler

from convgen.building import toolchain
from convgen.engines.implicit_gemm.gather import GatherSizes
from convgen.engines.implicit_gemm.wgrad import WgradSizes
from convgen.engines.implicit_gemm.wgrad_quarters import QuarterSizes
from convgen.engines.implicit_gemm.wgrad_taps import TapWgradSizes
from convgen.spec import ConvSpec

POINT, STRIDED, CONV = spec("conv2d", 1), spec("conv2d", 3, 2, 1), spec("conv3d", 3, 1, 1)
CASES = [
    (POINT, "wgrad", "tf32", TapWgradSizes((256,))),
    (STRIDED, "wgrad", "bf16tc", TapWgradSizes((256,))),
    (POINT, "fprop", "bf16tc", GatherSizes((), (32,))),
    (STRIDED, "dgrad", "f16tc", GatherSizes((), (32,))),
    (CONV, "fprop", "tf32", GatherSizes((32,), (32,))),
    (CONV, "wgrad", "f16tc", WgradSizes((24,))),
    (CONV, "wgrad", "tf32", QuarterSizes((4,))),
    (STRIDED, "wgrad", "tf32x3", QuarterSizes((1,))),
]


def most_registers(code: str) -> list[tuple[int, int]]:
    """For each setmaxnreg of a kernel: what its warps have then, and the most that they use."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[match[1]] = len(instructions)
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(match[1].strip())
    found = []
    for index, trade in enumerate(instructions):
        if not (limit := re.search(r"USETMAXREG\S+\s+(?:UP\d, )?(0x[0-9a-f]+)", trade)):
            continue
        seen, waiting, most = set(), [index + 1], 0
        while waiting:
            at = waiting.pop()
            if at in seen or at >= len(instructions):
                continue
            seen.add(at)
            text = instructions[at]
            used = [int(register) for register in re.findall(r"\bR(\d+)\b", text)]
            # The first names the others of a wide load.
            wide = 4 if ".128" in text else 2 if ".64" in text else 1
            if used and re.match(r"(?:@!?U?P\w+ +)?LD", text):
                used.append(used[0] + wide - 1)
            most = max(most, *(register + 1 for register in used), 0)
            if (target := re.search(r"`\((\.L_x_\d+)\)", text)) and re.search(r"\bBRA", text):
                waiting.append(labels[target[1]])
            if not re.match(r"(BRA|EXIT|RET)\b", text):
                waiting.append(at + 1)
        found.append((int(limit[1], 16), most))
    return found


def early_accesses(code: str) -> list[str]:
    """Accesses to memory before a kernel waits for the one before (griddepcontrol.wait).

    Its own parameters, the maps of tensors, may be fetched.
    """
    before, wait, _ = code.partition("ACQBULK")
    assert wait, "it does not wait"
    return re.findall(r"\b(?:LDG|STG|LD\.|ST\.|UTMA(?!CCTL\.PF)|UBLKCP|ATOM|RED)\S*", before)


def test_registers_are_followed_along_branches() -> None:
    code = """
        /*0000*/    USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0010*/    @P0 BRA `(.L_x_1) ;
        /*0020*/    IADD3 R9, R8, 0x1, RZ ;
        /*0030*/    EXIT ;
    .L_x_0:
        /*0040*/    IADD3 R99, R8, 0x1, RZ ;
    .L_x_1:
        /*0050*/    LDS.128 R20, [R3] ;
        /*0060*/    EXIT ;
    """
    assert most_registers(code) == [(24, 24)]


@pytest.mark.long
@pytest.mark.parametrize(("of", "contraction", "mode", "sizes"), CASES)
def test_no_warp_uses_more_than_it_keeps(
    of: ConvSpec,
    contraction: str,
    mode: str,
    sizes: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_two_multiprocessors(monkeypatch)
    nvdisasm = disassembler()
    try:
        compiler = toolchain.find_cuda()
    except toolchain.ToolchainError as error:
        pytest.skip(str(error))
    for name, text in sources(of, contraction, mode, sizes).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [compiler.path, "-ccbin", compiler.host, "-std=c++17", "-O3", "-arch=sm_90a"]
    command += ["-Xptxas", "-v", "-cubin", f"{contraction}_{mode}.cu", "-o", "unit.cubin"]
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=toolchain.build_environment(),
    )
    log = done.stdout + done.stderr
    # ptxas says so where a loop has products of which each is a batch of its own.
    assert "is injected" not in log, log
    started = dict(re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", log, re.DOTALL))
    listing = subprocess.run(
        [nvdisasm, "-c", "unit.cubin"], check=True, capture_output=True, text=True, cwd=tmp_path
    ).stdout
    every = re.split(r"\n\s*\.section\s+\.text\.", listing)[1:]
    for code in every:
        assert early_accesses(code) == [], code.split(",")[0]
    kernels = [code for code in every if "MAXREG" in code]
    assert kernels
    for code in kernels:
        name = code.split(",")[0]
        trades = most_registers(code)
        least, most_kept = sorted({limit for limit, _ in trades})
        for limit, most in trades:
            assert 0 < most <= limit, name
        # A claim waits for ever for more: one warpgroup releases, the others claim.
        groups = 65536 // int(started[name]) // 128
        assert least + (groups - 1) * most_kept <= groups * int(started[name]), name
