"""A wheel built from a checkout, installed elsewhere, is all that it takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "convgen")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout, as building writes into it, by the README's command."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copy(source, target)
    _run("-m", "pip", "wheel", "--no-deps", "--wheel-dir", "dist", ".", cwd=folder)
    (built,) = (folder / "dist").glob("convgen-*-py3-none-any.whl")
    return built


def _run(*arguments: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.long
def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    files = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "convgen").rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert files <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.long
def test_installed_outside_the_checkout_it_generates_a_module_that_runs(
    wheel: Path, tmp_path: Path
) -> None:
    site = tmp_path / "site"
    _run("-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    installed = {
        "PYTHONPATH": str(site),
        "CONVGEN_CACHE_DIR": str(tmp_path / "cache"),
        "CONVGEN_TUNED": "0",
    }
    place = _run("-c", "import convgen; print(convgen.__file__)", cwd=tmp_path, **installed)
    assert place.strip() == str(site / "convgen" / "__init__.py")
    imports = _run(
        *("-m", "convgen", "generate", "--op", "conv1d", "--kernel", "3", "--backend", "cpu"),
        cwd=tmp_path,
        **installed,
    )
    program = (
        f"{imports}import torch\n"
        "layer = Conv1d(2, 3)\n"
        "x = torch.randn(1, 2, 9)\n"
        "y = torch.nn.functional.conv1d(x, layer.weight, layer.bias)\n"
        "print(torch.allclose(layer(x), y, atol=1e-5))\n"
    )
    # The module needs torch alone: convgen is not on its path.
    assert _run("-c", program, cwd=tmp_path, PYTHONPATH="") == "True\n"
    script = site / "bin" / "convgen"
    assert _run(str(script), "--version", cwd=tmp_path, **installed).startswith("convgen ")
