"""Generated modules in a folder: what imports them, which are of another version or unreadable."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convgen import __version__, cli
from convgen.commands import catalog
from convgen.spec import ConvSpec
from convgen.specialize import render

SPEC = ConvSpec.make("conv1d", kernel_size=3)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Writes a module, its ``spec.json`` changed, and no library."""

    def write(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        for path, text in render(SPEC, ["cpu"], ["f32"]).items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        described = json.loads((folder / "spec.json").read_text())
        (folder / "spec.json").write_text(json.dumps(described | changes))
        return folder

    return write


def test_a_module_of_another_version_is_said_to_be_one_by_list_show_and_verify(
    tmp_path: Path, written: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    written("current")
    written("older", convgen="0.0.1")
    notice = (
        f"older was written by convgen 0.0.1, and this is {__version__}: "
        f"regenerate it with convgen generate --op conv1d --kernel 3"
    )
    for arguments in (["list"], ["list", "--json"], ["show", "older"], ["verify", "--quick"]):
        cli.main([*arguments, "--in", str(tmp_path)])
        said = capsys.readouterr()
        assert said.err.count("was written by convgen") == 1, arguments
        assert notice in said.err
    cli.main(["show", "current", "--in", str(tmp_path)])
    said = capsys.readouterr()
    assert "written by" in said.out
    assert said.err == ""
    current, older = map(catalog.summary, catalog.scan(tmp_path))
    assert current["foreign"] is None
    assert notice in older["foreign"]


def test_what_another_version_described_otherwise_is_not_silently_left_out(
    tmp_path: Path, written: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    written("current")
    written("newer", convgen="99.0", backends=["cpu"])
    (written("damaged") / "spec.json").write_text("{")
    (written("nested") / "spec.json").write_text("[" * 100_000)
    (tmp_path / "another tool's").mkdir()
    (tmp_path / "another tool's" / "spec.json").write_text('{"name": "x"}')
    assert cli.main(["list", "--in", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "current" in said.out
    assert "newer was written by convgen 99.0" in said.err
    assert "generate it anew" in said.err
    assert "damaged/spec.json cannot be read" in said.err
    assert "nested/spec.json cannot be read" in said.err
    assert "tool's" not in said.err
    for command in ("show", "verify"):
        assert cli.main([command, "newer", "--in", str(tmp_path)]) == 2
        assert "newer was written by convgen 99.0" in capsys.readouterr().err


class TestImportLine:
    @pytest.fixture
    def module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Makes a module at a path below the current folder."""
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")

        def make(path: str) -> catalog.Generated:
            return catalog.Generated(Path(path), ConvSpec("conv1d", 3), "", "", {}, {})

        return make

    def test_of_a_package_below_the_current_folder(self, module) -> None:
        assert catalog.import_line(module("generated/a")) == "from generated.a import Conv1d"
        assert catalog.import_line(module("x/y/a")) == "from x.y.a import Conv1d"
        assert catalog.import_line(module("a")) == "from a import Conv1d"

    @pytest.mark.parametrize("path", ["../a", "my layers/a", "class/a", "3d/a", "torch/a"])
    def test_of_what_no_dotted_name_reaches_adds_the_folder_to_the_path(
        self, module, path: str
    ) -> None:
        folder = str(Path(path).absolute().parent)
        line = catalog.import_line(module(path))
        assert line == f"import sys; sys.path.insert(0, {folder!r}); from a import Conv1d"
