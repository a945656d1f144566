"""Whatever stands in a path is data: no shell executes it, and no ninja file is changed by it."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from convgen.building import disk, toolchain
from convgen.building.build import Library, build, find_ninja
from convgen.building.errors import BuildError
from convgen.building.toolchain import Commands, ToolchainError, find_cpp, find_cuda

FILES = {"src/cpu/one.cpp": 'extern "C" int one() { return 1; }\n'}
SOURCES = tuple(FILES)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose name would make a file elsewhere, by several ways of quoting it wrongly."""
    monkeypatch.setenv("EXECUTED", str(tmp_path / "executed"))
    evil = "touch $EXECUTED"
    folder = tmp_path / f"a b'c\"d`{evil}`$({evil});{evil};\n  command = {evil}\n\\ $x é"
    folder.mkdir()
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(folder / "cache"))
    return folder


@pytest.fixture(autouse=True)
def _nothing_is_executed(place: Path, tmp_path: Path) -> object:
    yield
    assert set(tmp_path.iterdir()) - {tmp_path / "tmp"} == {place}


@pytest.fixture(scope="module")
def commands() -> Commands:
    """The C++ compiler without optimization, for speed."""
    found = find_cpp()
    return Commands(
        (*found.command, "-fPIC"), (*found.command, "-shared"), (), found.commands().identity
    )


def like_nvcc(folder: Path, commands: Commands) -> Commands:
    """A compiler that has a shell read where it runs and where its temporary files go."""
    script = folder / "compiler"
    script.write_text(
        '#!/bin/sh\neval "echo \\"$(pwd -P) $TMPDIR\\"" >/dev/null || exit 1\n'
        f'exec {commands.compile[0]} "$@"\n'
    )
    script.chmod(0o755)
    words = (str(script), *commands.compile[1:])
    return dataclasses.replace(commands, compile=words, needs_plain_folder=True)


def one(package: Path) -> int:
    return int(ctypes.CDLL(str(package / "lib" / "cpu.so")).one())


class TestCache:
    def test_builds_where_a_compiler_has_a_shell_read_its_folders(
        self, tmp_path: Path, place: Path, commands: Commands
    ) -> None:
        (tmp_path / "tmp").mkdir()
        library = Library("lib/cpu.so", SOURCES, like_nvcc(tmp_path / "tmp", commands))
        package = build("package", FILES, [library])
        assert package.is_relative_to(place)
        assert one(package) == 1
        assert {path.name for path in package.iterdir()} == {"src", "lib", "build.ninja"}
        assert list((place / "cache" / "tmp").iterdir()) == []

    def test_nvcc_itself_builds_there(
        self, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (place / "tmp").mkdir()
        monkeypatch.setenv("TMPDIR", str(place / "tmp"))
        monkeypatch.setattr("tempfile.tempdir", None)
        try:
            nvcc = find_cuda()
        except ToolchainError as error:
            pytest.skip(str(error))
        shown = '__attribute__((visibility("default")))'
        text = f'__global__ void k() {{}}\nextern "C" {shown} int one() {{ return 1; }}\n'
        files = {"src/cuda/one.cu": text}
        library = Library("lib/cpu.so", tuple(files), nvcc.commands(["80"]))
        steps: list[tuple[int, int]] = []
        package = build("p", files, [library], progress=lambda *step: steps.append(step[:2]))
        assert one(package) == 1
        assert steps == [(0, 3), (1, 3), (2, 3), (3, 3)]

    def test_of_another_library_that_is_linked_in(self, place: Path, commands: Commands) -> None:
        linked = dataclasses.replace(
            commands, link=(*commands.link[:-1], "-r", "-nostdlib"), link_libraries=()
        )
        built = build("inner", FILES, [Library("lib/one.o", SOURCES, linked)]) / "lib/one.o"
        files = {"src/cpu/none.cpp": ""}
        outer = dataclasses.replace(
            commands, link_libraries=("obj/inner.o",), identity=f"{commands.identity}{built}"
        )
        library = Library("lib/cpu.so", tuple(files), outer, (("obj/inner.o", built),))
        assert one(build("outer", files, [library])) == 1


class TestCompilers:
    def test_of_cpp_may_lie_anywhere_but_where_no_ninja_file_can_say(
        self, tmp_path: Path, place: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "tmp").mkdir()
        monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path / "tmp" / "cache"))
        folder = place / place.name.replace("\n", "")
        folder.mkdir()
        for at in (place / "g++", folder / "g++"):
            at.symlink_to(commands.compile[0])
            words = (str(at), *commands.compile[1:])
            library = Library("lib/cpu.so", SOURCES, dataclasses.replace(commands, compile=words))
            if at.parent == place:
                with pytest.raises(BuildError, match="line break"):
                    build("package", FILES, [library])
        shutil.move(folder, tmp_path / "tmp")
        at = tmp_path / "tmp" / folder.name / "g++"
        words = (str(at), *commands.compile[1:])
        library = Library("lib/cpu.so", SOURCES, dataclasses.replace(commands, compile=words))
        assert one(build("package", FILES, [library])) == 1

    def test_of_cuda_are_refused_where_nvcc_would_have_a_shell_read_it(
        self, tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        try:
            found = find_cuda()
        except ToolchainError as error:
            pytest.skip(str(error))
        (place / "g++").symlink_to(found.host)
        (place / "cuda").symlink_to(Path(found.path).parent.parent)
        monkeypatch.setattr(toolchain, "_wheel_roots", list)
        monkeypatch.setattr(toolchain, "_STANDARD_NVCC", "/nowhere")
        monkeypatch.setattr(toolchain, "_STANDARD_FOLDERS", ("/usr/bin", "/bin"))
        monkeypatch.setenv("PATH", "/usr/bin:/bin")
        monkeypatch.delenv("CUDA_PATH", raising=False)
        monkeypatch.setenv("CUDA_HOME", str(place / "cuda"))
        with pytest.raises(ToolchainError, match=r"hands paths to a shell.*that of nvcc"):
            find_cuda()
        monkeypatch.setenv("CUDA_HOME", str(Path(found.path).parent.parent))
        for variable in ("CUDAHOSTCXX", "NVCC_CCBIN", "CXX"):
            with monkeypatch.context() as patch:
                given = str(place / "g++")
                patch.setenv(variable, shlex.quote(given) if variable == "CXX" else given)
                with pytest.raises(ToolchainError, match=r"that of the C\+\+ compiler"):
                    find_cuda()


class TestPackage:
    def test_that_was_moved_is_not_built_where_nvcc_would_have_a_shell_read_it(
        self, tmp_path: Path, place: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "tmp").mkdir()
        library = Library("lib/cpu.so", SOURCES, like_nvcc(tmp_path / "tmp", commands))
        built = build("package", FILES, [library])

        def ninja(folder: Path) -> subprocess.CompletedProcess[str]:
            shutil.copytree(built, folder)
            (folder / SOURCES[0]).write_text('extern "C" int one() { return 11; }\n')
            return subprocess.run([find_ninja(), "-C", folder], capture_output=True, text=True)

        refused = ninja(place / "moved")
        assert refused.returncode != 0
        assert "move it to one without quotes" in refused.stdout
        assert one(place / "moved") == 1
        assert ninja(tmp_path / "tmp" / "in a plain place").returncode == 0
        assert one(tmp_path / "tmp" / "in a plain place") == 11

    def test_sources_of_any_name_compile_or_are_refused(self, commands: Commands) -> None:
        for name in ("a $b.cpp", "a:b.cpp", "$(touch executed).cpp", "a'b\"c;d.cpp", "é #.cpp"):
            files = {f"src/cpu/{name}": FILES[SOURCES[0]]}
            library = Library("lib/cpu.so", tuple(files), commands)
            assert one(build("package", files, [library])) == 1
        for name in ("a\n  command = touch executed.cpp", "a|b.cpp"):
            files = {f"src/cpu/{name}": FILES[SOURCES[0]]}
            with pytest.raises(BuildError, match=r"no ninja file can|no path in a ninja file"):
                build("package", files, [Library("lib/cpu.so", tuple(files), commands)])

    def test_a_path_of_bytes_that_are_no_text_builds(
        self, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "tmp" / os.fsdecode(b"\xff\xfe")
        folder.mkdir(parents=True)
        monkeypatch.setenv("CONVGEN_CACHE_DIR", str(folder / "cache"))
        (folder / "g++").symlink_to(commands.compile[0])
        words = (str(folder / "g++"), *commands.compile[1:])
        library = Library("lib/cpu.so", SOURCES, dataclasses.replace(commands, compile=words))
        assert one(build("package", FILES, [library])) == 1


def test_a_path_is_plain_if_a_shell_leaves_it_as_it_is() -> None:
    for path in ("/a b/(c)&d;e|f*?[g]<h>#~!é", "/plain-1.0_x+y@z,=%:"):
        assert disk.is_plain(path)
        said = subprocess.run(["sh", "-c", f'printf %s "{path}"'], capture_output=True, text=True)
        assert said.stdout == path
    for special in "\"'$`\\\n\t\r\x01\x7f":
        assert not disk.is_plain(f"/a{special}b")


def test_the_interpreter_names_what_it_builds_without_a_packages_path(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convgen.checking import interpret

    names: list[str] = []
    monkeypatch.setattr(interpret, "library", lambda name, *_, **__: names.append(name))
    (place / "src" / "cuda").mkdir(parents=True)
    (place / "src" / "cuda" / "x.cu").touch()
    interpret.package_library(place)
    monkeypatch.chdir(place / "src")
    interpret.package_library(Path(".."))
    assert all(name.isascii() and name.isidentifier() for name in names)
    assert len(set(names)) == 1
