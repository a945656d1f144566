"""Generated packages whose CUDA kernels run on the CPU: loading, verifying, faults in them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from interpreted import unoptimized

from convgen import cli
from convgen.building.errors import BuildError
from convgen.checking import interpreted
from convgen.checking.verify import verify
from convgen.spec import ConvSpec
from convgen.specialize import render

SPEC = ConvSpec("conv_transpose1d", 3, 2)
Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def environment(session_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(session_cache))
    monkeypatch.delenv(interpreted.VARIABLE, raising=False)
    with unoptimized("checked"):
        yield
    assert interpreted.VARIABLE not in os.environ or os.environ[interpreted.VARIABLE] == "1"


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes a package's sources; nothing is compiled, neither nvcc nor a GPU is needed."""

    def write(
        dtype: str = "f64",
        backend: str = "cuda",
        edit: tuple[str, str] = ("", ""),
        spec: ConvSpec = SPEC,
    ) -> Path:
        folder = tmp_path / "generated" / spec.name
        for path, text in render(spec, (backend,), (dtype,)).items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace(*edit, 1) if path.endswith("dgrad_f64.cu") else text)
        return folder

    return write


def test_cuda_kernels_serve_tensors_of_the_cpu(make: Make) -> None:
    module = interpreted.load(make(), "plain")
    x = torch.randn(2, 4, 30, dtype=torch.float64, requires_grad=True)
    layer = module.ConvTranspose1d(4, 5, dtype=torch.float64)
    out = layer(x)
    expected = F.conv_transpose1d(x, layer.weight, layer.bias, stride=2)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, (x, layer.weight, layer.bias), direction),
        torch.autograd.grad(expected, (x, layer.weight, layer.bias), direction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.long
def test_verification_covers_them_and_says_so(make: Make) -> None:
    # Where channels are fixed, units have one size of their kernels.
    spec = ConvSpec("conv1d", 3, 1, 1, in_channels=16, out_channels=16)
    report = verify(interpreted.load(make("f32", spec=spec)), quick=True)
    assert report.ok
    # f32 goes through three TF32 products where the channels suit the tensor cores.
    assert {(row.device, row.dtype) for row in report.rows} == {
        ("cuda interpreted", "f32"),
        ("cuda interpreted", "tf32"),
    }


def test_a_fault_is_raised_with_kernel_block_and_thread(make: Make) -> None:
    module = interpreted.load(make(edit=("__syncthreads();", "")))
    layer = module.ConvTranspose1d(40, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"dgrad_kernel<\d>, block \(0, 0, 0\), thread \(\d+, 0"):
        layer(torch.randn(1, 40, 90, dtype=torch.float64))


def test_an_unknown_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreted.chosen_mode() is None
    for value, mode in (("0", None), ("1", "plain"), ("checked", "checked"), ("debug", "debug")):
        monkeypatch.setenv(interpreted.VARIABLE, value)
        assert interpreted.chosen_mode() == mode
    for value in ("address", "yes"):
        monkeypatch.setenv(interpreted.VARIABLE, value)
        with pytest.raises(ValueError, match="give 1, or one of plain, debug, checked"):
            interpreted.chosen_mode()
    monkeypatch.delenv(interpreted.VARIABLE)


def test_a_package_without_cuda_sources_says_what_to_do(make: Make) -> None:
    with pytest.raises(BuildError, match="has no CUDA sources: generate it with --backend cuda"):
        interpreted.load(make(backend="cpu"))


def run_script(package: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=package.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


USE = f"""
import torch
from {SPEC.name} import ConvTranspose1d
torch.set_default_dtype(torch.float64)
print(ConvTranspose1d(40, 5)(torch.randn(1, 40, 90)).isfinite().all().item())
"""


def test_the_variable_alone_interprets_an_imported_package_and_warns(make: Make) -> None:
    done = run_script(make(), USE, CONVGEN_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "True\n"
    assert "InterpretedWarning" in done.stderr
    assert "the CUDA kernels are interpreted on the CPU (plain" in done.stderr


def test_without_the_variable_nothing_is_interpreted(make: Make) -> None:
    done = run_script(make(), USE, CONVGEN_NO_BUILD="1")
    assert "is generated for cuda, not for cpu" in done.stderr


@pytest.mark.long
def test_a_fault_can_stop_the_process_for_a_debugger(make: Make) -> None:
    package = make(edit=("__syncthreads();", ""))
    done = run_script(package, USE, CONVGEN_INTERPRET="checked", CONVGEN_INTERPRET_ABORT="1")
    assert done.returncode == -signal.SIGABRT
    assert re.search(r"convgen interpreter: kernel dgrad_kernel<\d>, block \(0", done.stderr)


@pytest.mark.long
def test_the_command_line_verifies_interpreted(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    package = str(make())
    assert cli.main(["verify", package, "--interpret", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert "cuda interpreted f64" in printed
    assert "FAILED" not in printed
    assert cli.main(["verify", package, "--interpret", "--device", "cpu"]) == 2


def test_the_command_line_reports_a_fault(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    package = str(make(edit=("__syncthreads();", "")))
    assert cli.main(["verify", package, "--interpret", "--quick"]) == 1
    assert re.search(r"kernel dgrad_kernel<\d>, block \(\d", capsys.readouterr().err)
