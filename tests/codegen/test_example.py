"""The committed example is what convgen generates today, byte for byte."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from convgen.spec import ConvSpec
from convgen.specialize import render

EXAMPLE = Path(__file__).parents[2] / "generated" / "conv_transpose3d_k3_s2"
OF_THIS_MACHINE = {"lib", "obj", "build.ninja", "__pycache__"}
RECORD = "sources.sha256"
"""What git ignores: written by ``convgen generate``, ninja and Python."""

ADVICE = "run `convgen generate --kernel 3 --stride 2` in the repository and commit the example"


@pytest.fixture(scope="module")
def rendered() -> dict[str, str]:
    return render(ConvSpec.make(kernel_size=3, stride=2))


@pytest.fixture(scope="module")
def committed() -> dict[str, bytes]:
    assert EXAMPLE.is_dir(), ADVICE
    return {
        str(path.relative_to(EXAMPLE)): path.read_bytes()
        for path in sorted(EXAMPLE.rglob("*"))
        if path.is_file()
        and path.relative_to(EXAMPLE).parts[0] not in OF_THIS_MACHINE
        and not path.name.startswith(".ninja_")
    }


def test_the_example_holds_the_files_that_are_generated(
    rendered: dict[str, str], committed: dict[str, bytes]
) -> None:
    assert sorted(committed) == sorted([*rendered, RECORD]), ADVICE


def test_the_record_of_the_example_vouches_for_all_of_it(committed: dict[str, bytes]) -> None:
    lines = [
        f"{hashlib.sha256(committed[path]).hexdigest()}  {path}\n"
        for path in sorted(committed)
        if path != RECORD
    ]
    assert committed[RECORD].decode() == "".join(lines), ADVICE


def test_the_example_is_what_is_generated_byte_for_byte(
    rendered: dict[str, str], committed: dict[str, bytes]
) -> None:
    changed = [path for path, text in rendered.items() if committed.get(path) != text.encode()]
    assert changed == [], ADVICE


def test_rendering_twice_gives_the_same_text(rendered: dict[str, str]) -> None:
    assert render(ConvSpec.make(kernel_size=3, stride=2)) == rendered


def test_generated_text_names_no_path_of_this_machine(rendered: dict[str, str]) -> None:
    here = str(Path.cwd())
    home = str(Path.home())
    for path, text in rendered.items():
        assert here not in text, path
        assert f"{home}/" not in text, path


def test_generated_text_is_tidy(rendered: dict[str, str]) -> None:
    untidy = []
    for path, text in rendered.items():
        untidy += [f"{path}: ends with an empty line"] * text.endswith("\n\n")
        untidy += [f"{path}: does not end its last line"] * (not text.endswith("\n") and text != "")
        previous = "text"
        for number, line in enumerate(text.split("\n")[:-1], 1):
            flaws = {
                "blanks at the end": line != line.rstrip(),
                "a tab": "\t" in line,
                "more than 100 columns": len(line) > 100
                and path.startswith("src/")
                and "// Schedule:" not in line,
                "a second empty line": line == previous == "" and not path.endswith(".py"),
            }
            untidy += [f"{path}:{number}: {flaw}" for flaw, found in flaws.items() if found]
            previous = line
    assert untidy == []
