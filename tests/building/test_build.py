"""Builds of small libraries: what is published, what fails how, what a dead process leaves."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from convgen.building import build as building
from convgen.building import cache, disk
from convgen.building.build import BuildWarning, Library, build, cache_key, ninja_file
from convgen.building.errors import BuildError
from convgen.building.toolchain import Commands, ToolchainError, find_cpp

FILES = {
    "src/cpu/answer.cpp": '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n',
    "src/cpu/twice.cpp": 'extern "C" int twice(int x) {\n  return 2 * x;\n}\n',
    "src/cpu/answer.h": "#define ANSWER 42\n",
    "__init__.py": "",
}
SOURCES = ("src/cpu/answer.cpp", "src/cpu/twice.cpp")

# What another process runs: `files` and `library` are those of this test.
BUILDER = """
import json, sys
from convgen.building.build import Library, build
from convgen.building.toolchain import Commands
name, files, path, sources, commands = json.load(sys.stdin)
library = Library(path, tuple(sources), Commands(*(tuple(c) if isinstance(c, list) else c
                                                   for c in commands)))
def progress(done, total, what):
    print(done, total, what, flush=True)
print("published", build(name, files, [library], progress=progress), flush=True)
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(folder))
    monkeypatch.delenv("CONVGEN_NO_BUILD", raising=False)
    monkeypatch.delenv("CONVGEN_JOBS", raising=False)
    return folder


@pytest.fixture(scope="module")
def commands() -> Commands:
    """The C++ compiler without optimization, for speed."""
    found = find_cpp()
    return Commands(
        (*found.command, "-fPIC"), (*found.command, "-shared"), (), found.commands().identity
    )


@pytest.fixture
def library(commands: Commands) -> Library:
    return Library("lib/cpu.so", SOURCES, commands)


@pytest.fixture
def wrapped(tmp_path: Path, library: Library) -> Callable[[str], Library]:
    """A library whose compiler is a shell script; ``$REAL "$@"`` in it calls the true one."""

    def wrap(script: str) -> Library:
        compiler = tmp_path / "compiler"
        compiler.write_text(f"#!/bin/sh\nREAL={library.commands.compile[0]}\n{script}\n")
        compiler.chmod(0o755)
        return dataclasses.replace(
            library,
            commands=dataclasses.replace(
                library.commands, compile=(str(compiler), *library.commands.compile[1:])
            ),
        )

    return wrap


def start_builder(library: Library) -> subprocess.Popen[str]:
    """Builds FILES in another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background jobs ignore the interrupts that a test sends, and so would theirs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    commands = dataclasses.astuple(library.commands)
    assert process.stdin is not None
    process.stdin.write(
        json.dumps(["package", FILES, library.path, list(library.sources), commands])
    )
    process.stdin.close()
    process.stdin = None  # communicate() would flush it
    return process


def wait_for(condition: Callable[[], object], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def runs(pid: str) -> bool:
    """Whether a process is alive: neither gone nor dead and only not yet waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def leftovers(root: Path) -> list[Path]:
    """What should not outlive a build: temporary folders and uncommitted entries."""
    entries = [path for path in root.iterdir() if len(path.name) == cache.KEY_DIGITS]
    temporary = list((root / "tmp").iterdir()) if (root / "tmp").exists() else []
    return temporary + [path for path in entries if not (path / cache.MARKER).exists()]


def answer(package: Path) -> int:
    return int(ctypes.CDLL(str(package / "lib" / "cpu.so")).answer())


class TestPublishing:
    def test_builds_a_library_that_works(self, root: Path, library: Library) -> None:
        package = build("package", FILES, [library])
        assert package == root / cache_key("package", FILES, [library]) / "package"
        assert answer(package) == 42
        assert ctypes.CDLL(str(package / "lib" / "cpu.so")).twice(21) == 42
        assert leftovers(root) == []

    def test_publishes_sources_and_library_and_nothing_else(self, library: Library) -> None:
        package = build("package", FILES, [library])
        found = {str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()}
        assert found == {*FILES, "build.ninja", "lib/cpu.so", "lib/cpu.so.sha256"}
        assert {name: (package / name).read_text() for name in FILES} == FILES

    def test_compiles_once(
        self, tmp_path: Path, wrapped: Callable[[str], Library], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        library = wrapped(f'echo >> {tmp_path}/calls; exec $REAL "$@"')
        first = build("package", FILES, [library])
        monkeypatch.setenv("CONVGEN_NO_BUILD", "1")
        assert build("package", FILES, [library]) == first
        assert len((tmp_path / "calls").read_text()) == len(SOURCES)

    def test_several_libraries_side_by_side(self, library: Library) -> None:
        one = dataclasses.replace(library, path="lib/one.so", sources=SOURCES[:1])
        two = dataclasses.replace(library, path="lib/two.so", sources=SOURCES[1:])
        package = build("package", FILES, [one, two])
        assert ctypes.CDLL(str(package / "lib" / "one.so")).answer() == 42
        assert ctypes.CDLL(str(package / "lib" / "two.so")).twice(2) == 4

    def test_reports_each_step(self, library: Library) -> None:
        steps: list[tuple[int, int, str]] = []
        build("package", FILES, [library], progress=lambda *step: steps.append(step))
        assert steps[0] == (0, 3, "building package")
        assert [(done, total) for done, total, _ in steps[1:]] == [(1, 3), (2, 3), (3, 3)]
        assert {what for _, _, what in steps[1:3]} == {f"compile {source}" for source in SOURCES}
        assert steps[3][2] == "link lib/cpu.so"
        steps.clear()
        build("package", FILES, [library], progress=lambda *step: steps.append(step))
        assert steps == []

    def test_runs_as_many_compilers_as_it_may(
        self, monkeypatch: pytest.MonkeyPatch, library: Library
    ) -> None:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4, 5})
        monkeypatch.setattr(Path, "read_text", lambda _: "250000 100000\n")
        assert building.processors() == 3
        monkeypatch.setattr(Path, "read_text", lambda _: "max 100000\n")
        assert building.processors() == 6
        monkeypatch.undo()
        monkeypatch.setenv("CONVGEN_JOBS", "none")
        with pytest.raises(BuildError, match="invalid -j parameter"):
            build("package", FILES, [library])

    def test_the_package_builds_again_with_ninja_alone(
        self, tmp_path: Path, library: Library
    ) -> None:
        copy = tmp_path / "a copy"
        shutil.copytree(build("package", FILES, [library]), copy)
        (copy / "src/cpu/answer.h").write_text("#define ANSWER 43\n")
        ninja = building.find_ninja()
        subprocess.run([ninja, "-C", str(copy)], check=True, capture_output=True)
        assert answer(copy) == 43
        (copy / "src/cpu/answer.h").write_text("#define ANSWER 44\n")
        again = subprocess.run([ninja, "-C", str(copy)], check=True, capture_output=True, text=True)
        assert "answer.cpp" in again.stdout
        assert "twice.cpp" not in again.stdout

    def test_words_that_the_shell_or_ninja_would_change_arrive_unchanged(
        self, library: Library
    ) -> None:
        text = "a $HOME b$$c 'd' [e]"
        quoted = text.replace("'", "\\'")
        commands = dataclasses.replace(
            library.commands, compile=(*library.commands.compile, f'-DTEXT="{quoted}"')
        )
        files = {"src/cpu/text.cpp": 'extern "C" const char* text() { return TEXT; }\n'}
        package = build("package", files, [Library("lib/x.so", tuple(files), commands)])
        function = ctypes.CDLL(str(package / "lib" / "x.so")).text
        function.restype = ctypes.c_char_p
        assert function().decode() == text

    def test_the_ninja_file_is_short_and_relative(self, root: Path, library: Library) -> None:
        text = ninja_file("package", [library])
        assert max(map(len, text.splitlines())) <= 100
        assert str(root) not in text
        assert "build obj/cpu/twice.cpp.o: compile_cpu src/cpu/twice.cpp" in text


class TestKey:
    def test_is_a_whole_sha256(self, library: Library) -> None:
        assert len(cache_key("package", FILES, [library])) == 64

    def test_is_stable(self, library: Library) -> None:
        shuffled = dict(reversed(FILES.items()))
        assert cache_key("package", shuffled, [library]) == cache_key("package", FILES, [library])

    def test_moves_with_everything_that_decides_the_result(
        self, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def key(name: str = "package", files: dict[str, str] = FILES, **changed: object) -> str:
            return cache_key(name, files, [dataclasses.replace(library, **changed)])  # type: ignore[arg-type]

        commands = library.commands
        keys = {
            "nothing": key(),
            "name": key(name="other"),
            "source": key(files={**FILES, SOURCES[0]: "// changed"}),
            "header": key(files={**FILES, "src/cpu/answer.h": "#define ANSWER 43\n"}),
            "python": key(files={**FILES, "__init__.py": "x = 1"}),
            "file": key(files={**FILES, "new.py": ""}),
            "path": key(path="lib/cuda.so"),
            "sources": key(sources=SOURCES[:1]),
            "libraries": cache_key("package", FILES, [library, library]),
        }
        for field in dataclasses.fields(Commands):
            value = getattr(commands, field.name)
            more = {str: f"{value} ", bool: not value}.get(type(value), (*SOURCES, "-DMORE"))
            keys[field.name] = key(commands=dataclasses.replace(commands, **{field.name: more}))
        with monkeypatch.context() as patch:
            patch.setattr(building, "__version__", "99")
            keys["version"] = key()
        with monkeypatch.context() as patch:
            patch.setattr(building, "LAYOUT_VERSION", 99)
            keys["layout"] = key()
        assert len(set(keys.values())) == len(keys)


class TestFailures:
    def test_a_compile_error_names_command_lines_and_log(
        self, root: Path, library: Library
    ) -> None:
        text = "// one\n// two\nint f() {\n  return undeclared;\n}\n// six\n// seven\n// eight\n"
        with pytest.raises(BuildError) as caught:
            build("package", {**FILES, SOURCES[1]: text}, [library])
        said = str(caught.value)
        assert "obj/cpu/twice.cpp.o did not compile" in said
        assert f"command: {library.commands.compile[0]}" in said
        assert "-c src/cpu/twice.cpp" in said
        assert "src/cpu/twice.cpp:4: error: 'undeclared' was not declared" in said
        assert ">    4 |   return undeclared;" in said
        assert "     1 | // one" in said
        assert "     7 | // seven" in said
        assert "// eight" not in said
        log = Path(said.rpartition("log: ")[2])
        assert log.parent == root / "logs"
        assert "undeclared" in log.read_text()
        assert leftovers(root) == []

    def test_an_error_of_nvcc_is_shown_in_context(self, wrapped: Callable[[str], Library]) -> None:
        library = wrapped(
            "echo 'src/cpu/twice.cpp(2): error: identifier \"y\" is undefined'; exit 2"
        )
        with pytest.raises(BuildError) as caught:
            build("package", FILES, [dataclasses.replace(library, sources=SOURCES[1:])])
        assert 'src/cpu/twice.cpp:2: error: identifier "y" is undefined' in str(caught.value)
        assert ">    2 |   return 2 * x;" in str(caught.value)

    def test_a_failure_without_a_place_shows_what_was_said(
        self, wrapped: Callable[[str], Library]
    ) -> None:
        library = wrapped("echo 'internal compiler trouble'; exit 4")
        with pytest.raises(BuildError, match="internal compiler trouble"):
            build("package", FILES, [library])

    def test_a_link_error_says_so(self, library: Library) -> None:
        commands = dataclasses.replace(library.commands, link_libraries=("-lno_such_library",))
        with pytest.raises(BuildError, match=r"lib/cpu\.so did not link(.|\n)*no_such_library"):
            build("package", FILES, [dataclasses.replace(library, commands=commands)])

    def test_after_a_failure_a_good_source_builds_and_the_log_goes(
        self, root: Path, tmp_path: Path, wrapped: Callable[[str], Library]
    ) -> None:
        library = wrapped(f'test -e {tmp_path}/mended && exec $REAL "$@"; exit 1')
        with pytest.raises(BuildError):
            build("package", FILES, [library])
        assert len(list((root / "logs").iterdir())) == 1
        (tmp_path / "mended").touch()
        assert answer(build("package", FILES, [library])) == 42
        assert list((root / "logs").iterdir()) == []

    def test_no_build_forbids_and_says_what(
        self, root: Path, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CONVGEN_NO_BUILD", "1")
        with pytest.raises(BuildError) as caught:
            build("package", FILES, [library])
        for told in ("package", "CONVGEN_NO_BUILD", *SOURCES, str(root)):
            assert told in str(caught.value)
        assert not root.exists()
        monkeypatch.setenv("CONVGEN_NO_BUILD", "0")
        assert answer(build("package", FILES, [library])) == 42

    def test_a_miss_in_a_cache_that_is_read_only_says_so(
        self, root: Path, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        root.mkdir(mode=0o700)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(BuildError, match=r"package is not in the cache.*is not writable: set"):
            build("package", FILES, [library])

    def test_a_missing_ninja_says_what_to_install(
        self, root: Path, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def missing() -> str:
            raise ToolchainError("ninja was not found: pip install ninja")

        monkeypatch.setattr(building, "find_ninja", missing)
        with pytest.raises(ToolchainError, match="pip install ninja"):
            build("package", FILES, [library])
        assert leftovers(root) == []

    def test_spilled_registers_are_warned_of_once(self, wrapped: Callable[[str], Library]) -> None:
        library = wrapped(
            "echo \"ptxas info    : Compiling entry function '_Z5twicePf' for 'sm_90a'\n"
            "ptxas info    : Function properties for _Z5twicePf\n"
            "    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
            'ptxas info    : Used 255 registers, used 1 barriers"\n'
            'exec $REAL "$@"'
        )
        library = dataclasses.replace(library, sources=SOURCES[1:])
        with pytest.warns(BuildWarning, match="twice for sm_90a uses local memory: 16 bytes"):
            build("package", FILES, [library])
        build("package", FILES, [library])  # a hit: warnings are errors in a test that fails here


class TestFullDisk:
    def test_of_the_compiler_is_named(self, root: Path, wrapped: Callable[[str], Library]) -> None:
        library = wrapped(
            "echo 'Fatal error: cannot write /tmp/cc.s: No space left on device'; exit 1"
        )
        with pytest.raises(BuildError, match="the disk is full: free some space at"):
            build("package", FILES, [library])
        assert leftovers(root) == []

    @pytest.mark.parametrize("size", ["16k", "40k"], ids=["sources do not fit", "library"])
    def test_of_the_cache_is_named_and_leaves_nothing(
        self, root: Path, library: Library, size: str
    ) -> None:
        # A cache on a small file system of its own, in a mount namespace that ends with the
        # process.
        root.mkdir(mode=0o700)
        script = (
            f"mount -t tmpfs -o size={size},mode=700,uid=0 tmpfs {root} && {sys.executable} -c "
            f"'{BUILDER}'; echo LEFT:; ls -A {root}/tmp; find {root} -name {cache.MARKER}"
        )
        unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
        if subprocess.run(
            [*unshare, f"mount -t tmpfs tmpfs {root}"], capture_output=True
        ).returncode:
            pytest.skip("this machine lets nobody mount a file system in a namespace")
        commands = dataclasses.astuple(library.commands)
        big = {**FILES, "src/cpu/answer.h": "#define ANSWER 42\n" + "// filler\n" * 2500}
        result = subprocess.run(
            [*unshare, script],
            input=json.dumps(["package", big, library.path, list(library.sources), commands]),
            capture_output=True,
            text=True,
        )
        assert "BuildError" in result.stderr
        assert "No space left on device" in result.stderr or "the disk is full" in result.stderr
        assert "set CONVGEN_CACHE_DIR to another folder" in result.stderr
        assert "published" not in result.stdout
        assert result.stdout.endswith("LEFT:\n")

    def test_while_writing_sources_is_named_and_leaves_nothing(
        self, root: Path, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object, **__: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            with pytest.raises(BuildError, match=r"No space left on device.*CONVGEN_CACHE_DIR"):
                build("package", FILES, [library])
        assert leftovers(root) == []
        assert answer(build("package", FILES, [library])) == 42


class TestSeveralProcesses:
    def test_two_at_once_build_once_and_both_succeed(
        self, root: Path, tmp_path: Path, wrapped: Callable[[str], Library]
    ) -> None:
        library = wrapped(f'echo >> {tmp_path}/calls; sleep 0.5; exec $REAL "$@"')
        builders = [start_builder(library) for _ in range(2)]
        said = [builder.communicate()[0].splitlines() for builder in builders]
        assert [builder.returncode for builder in builders] == [0, 0], said
        package = root / cache_key("package", FILES, [library]) / "package"
        assert [lines[-1] for lines in said] == [f"published {package}"] * 2
        assert len((tmp_path / "calls").read_text()) == len(SOURCES)
        assert any("waiting for another process" in line for lines in said for line in lines)
        assert answer(package) == 42
        assert leftovers(root) == []

    def test_killed_during_a_build_leaves_what_the_next_run_clears(
        self, root: Path, tmp_path: Path, wrapped: Callable[[str], Library]
    ) -> None:
        library = wrapped(
            f'echo >> {tmp_path}/calls; test -e {tmp_path}/go || sleep 1; exec $REAL "$@"'
        )
        builder = start_builder(library)
        wait_for((tmp_path / "calls").exists)
        builder.send_signal(signal.SIGKILL)
        builder.communicate()
        assert leftovers(root) != []
        assert cache.cached_packages() == []
        (tmp_path / "go").touch()
        # The orphaned compilers inherited the lock: this waits for them, then clears and builds.
        package = build("package", FILES, [library])
        assert answer(package) == 42
        assert leftovers(root) == []

    def test_killed_between_rename_and_marker_leaves_an_entry_that_is_built_again(
        self, root: Path, library: Library, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Killed(BaseException):
            pass

        def die(path: Path, text: str) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(disk, "write_atomically", die)
            with pytest.raises(Killed):
                build("package", FILES, [library])
        assert [path.name for path in leftovers(root)] == [cache_key("package", FILES, [library])]
        assert answer(build("package", FILES, [library])) == 42
        assert leftovers(root) == []

    def test_interrupted_leaves_nothing_and_no_compiler_runs_on(
        self, root: Path, tmp_path: Path, wrapped: Callable[[str], Library]
    ) -> None:
        library = wrapped(f"echo $$ >> {tmp_path}/pids; exec sleep 60")
        builder = start_builder(library)
        wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text())
        started = time.monotonic()
        builder.send_signal(signal.SIGINT)
        said, _ = builder.communicate(timeout=30)
        assert time.monotonic() - started < 5
        assert "KeyboardInterrupt" in said
        assert leftovers(root) == []
        for pid in (tmp_path / "pids").read_text().split():
            wait_for(lambda pid=pid: not runs(pid), seconds=5)

    def test_an_exception_of_the_progress_callback_ends_the_build(
        self, root: Path, library: Library
    ) -> None:
        def progress(done: int, total: int, what: str) -> None:
            if done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build("package", FILES, [library], progress=progress)
        assert leftovers(root) == []

    @pytest.mark.parametrize("damage", ["truncated", "altered", "removed"])
    def test_a_damaged_library_is_built_again(
        self, root: Path, library: Library, damage: str
    ) -> None:
        file = build("package", FILES, [library]) / "lib" / "cpu.so"
        content = file.read_bytes()
        file.unlink()
        if damage != "removed":
            file.write_bytes(content[:1000] if damage == "truncated" else content[:-1] + b"x")
        assert answer(build("package", FILES, [library])) == 42
        assert leftovers(root) == []
