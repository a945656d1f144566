"""Exporting and importing package folders; no kernel is compiled."""

from __future__ import annotations

import errno
import json
import os
import pickle
import py_compile
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

from convgen.building import cache, folders, written
from convgen.building.errors import BuildError
from convgen.building.folders import export, is_package, load

KEY = "f" * 64


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(folder))
    return folder


def write_package(folder: Path, code: str = "value = 1\nclass Layer: pass\n") -> Path:
    (folder / "lib").mkdir(parents=True)
    (folder / "__init__.py").write_text(code)
    (folder / "_part.py").write_text("PART = 1\n")
    (folder / "spec.json").write_text(json.dumps({"convgen": "1", "spec": {"op": "conv1d"}}))
    (folder / "lib" / "cpu.so").write_bytes(b"\x7fELF")
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return write_package(tmp_path / "source" / "layer")


def cached_package(key: str, code: str = "value = 1\nclass Layer: pass\n") -> Path:
    with cache.locked(key):
        folder = cache.temporary(key)
        write_package(folder / "layer", code)
        return cache.commit(key, "layer", folder, {})


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and str(path.relative_to(folder)) not in written.RECORDS
    }


def older_package(folder: Path, code: str = "OLD = 1\n") -> Path:
    """One that an earlier export left: records vouch for its files."""
    write_package(folder, code)
    written.record(folder, written.digests(folder))
    return folder


class TestExport:
    def test_copies_the_package_under_its_name_or_another(
        self, tmp_path: Path, package: Path
    ) -> None:
        assert export(package, tmp_path / "deep" / "out") == tmp_path / "deep" / "out" / "layer"
        named = export(package, tmp_path / "deep" / "out", "mine")
        assert content(named) == content(package)
        assert sorted(os.listdir(tmp_path / "deep" / "out")) == ["layer", "mine"]

    def test_leaves_out_what_python_and_ninja_left_in_the_package(
        self, tmp_path: Path, package: Path
    ) -> None:
        expected = content(package)
        for name in ("__pycache__", "obj"):
            (package / name).mkdir()
            (package / name / "x").touch()
        assert content(export(package, tmp_path / "out")) == expected

    def test_replaces_an_older_package_whole(self, tmp_path: Path, package: Path) -> None:
        old = write_package(tmp_path / "out" / "layer", "OLD = 1\n")
        (old / "gone.py").touch()
        written.record(old, written.digests(old))
        with open(old / "__init__.py") as loaded:
            assert content(export(package, tmp_path / "out")) == content(package)
            assert loaded.read() == "OLD = 1\n"
        assert os.listdir(tmp_path / "out") == ["layer"]

    def test_leaves_an_equal_package_untouched(self, tmp_path: Path, package: Path) -> None:
        target = export(package, tmp_path / "out")
        before = target.stat()
        assert export(package, tmp_path / "out") == target
        assert (target.stat().st_ino, target.stat().st_mtime_ns) == (
            before.st_ino,
            before.st_mtime_ns,
        )

    @pytest.mark.parametrize("kind", ["folder", "file", "link", "other metadata", "no code"])
    def test_refuses_to_replace_what_is_no_package(
        self, tmp_path: Path, package: Path, kind: str
    ) -> None:
        target = tmp_path / "out" / "layer"
        if kind == "link":
            target.parent.mkdir()
            target.symlink_to(package)
        elif kind == "file":
            target.parent.mkdir()
            target.write_text("mine")
        else:
            write_package(target)
            if kind == "folder":
                (target / "spec.json").unlink()
            elif kind == "other metadata":
                (target / "spec.json").write_text("[1, 2]")
            else:
                (target / "__init__.py").unlink()
        with pytest.raises(BuildError, match="is no package of convgen: move it away"):
            export(package, tmp_path / "out")
        assert target.is_symlink() == (kind == "link")
        assert target.exists()

    def test_refuses_a_source_that_is_no_package(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="is no package of convgen"):
            export(tmp_path, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        "name",
        [
            *("", "a-b", "1st", "class", "a/b", "..", "a\n", "\udcff", "x" * 300),  # no identifiers
            *("json", "os", "_ctypes", "antigravity", "__init__", "__pycache__"),  # Python's
            *("torch", "numpy", "pytest"),  # installed
            *("\ufb01lter", "\u2115", "\uff41", "e\u0301"),  # other names to Python
        ],
    )
    def test_refuses_a_name_that_cannot_be_imported_or_hides_a_module(
        self, tmp_path: Path, package: Path, name: str
    ) -> None:
        with pytest.raises(BuildError, match=r"^name [^\n]*: give another name$"):
            export(package, tmp_path / "out", name)
        assert not (tmp_path / "out").exists()

    def test_a_package_of_another_specification_stays(self, tmp_path: Path, package: Path) -> None:
        other = write_package(tmp_path / "out" / "layer")
        (other / "spec.json").write_text(json.dumps({"convgen": "1", "spec": {"op": "conv2d"}}))
        written.record(other, written.digests(other))
        before = content(other)
        with pytest.raises(BuildError, match="is of another specification"):
            export(package, tmp_path / "out")
        assert content(other) == before

    def test_failing_half_way_keeps_the_old_package_and_leaves_nothing(
        self, tmp_path: Path, package: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = older_package(tmp_path / "out" / "layer")
        expected = content(old)

        def full(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        rename = os.rename

        def refuse(source: Path, target: Path) -> None:
            if source.name == "new":
                raise OSError(errno.EACCES, "Permission denied")
            rename(source, target)

        for place, name, failing in ((shutil, "copyfile", full), (os, "rename", refuse)):
            with monkeypatch.context() as patch:
                patch.setattr(place, name, failing)
                with pytest.raises(BuildError, match=r"cannot write .*(No space|Permission)"):
                    export(package, tmp_path / "out")
            assert content(old) == expected
            assert os.listdir(tmp_path / "out") == ["layer"]

    def test_a_copy_of_what_is_read_only_is_its_users_to_write(
        self, tmp_path: Path, package: Path
    ) -> None:
        for path in (package, *package.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        target = export(package, tmp_path / "out")
        for path in (target, *target.rglob("*")):
            assert path.stat().st_mode & 0o200
        for path in (package, *package.rglob("*")):
            path.chmod(0o755)

    def test_clears_what_a_killed_process_left(self, tmp_path: Path, package: Path) -> None:
        for leftover in (".layer.abc.convgen", ".other.abc.convgen"):
            write_package(tmp_path / "out" / leftover / "new")
        export(package, tmp_path / "out")
        assert sorted(os.listdir(tmp_path / "out")) == [".other.abc.convgen", "layer"]

    def test_what_a_killed_process_had_moved_away_is_put_back(
        self, tmp_path: Path, package: Path
    ) -> None:
        older_package(tmp_path / "out" / ".layer.abc.convgen" / "old")
        (tmp_path / "out" / ".layer.abc.convgen" / "old" / "mine.txt").write_text("years of work")
        with pytest.raises(BuildError, match=r"\(mine\.txt\): move it away"):
            export(package, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["layer"]
        assert (tmp_path / "out" / "layer" / "mine.txt").read_text() == "years of work"

    def test_from_several_threads_at_once_leaves_one_whole_package(self, tmp_path: Path) -> None:
        packages = [write_package(tmp_path / str(n) / "layer", f"number = {n}\n") for n in range(4)]
        threads = [
            threading.Thread(target=export, args=(package, tmp_path / "out"))
            for package in packages * 5
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert content(tmp_path / "out" / "layer") in map(content, packages)
        assert os.listdir(tmp_path / "out") == ["layer"]


def _edit(old: Path, path: str) -> None:
    (old / path).write_text("years of work")


USERS_WORK = {
    "a changed source": (lambda old: _edit(old, "_part.py"), "_part.py"),
    "a changed description": (
        lambda old: (old / "spec.json").write_text((old / "spec.json").read_text() + "\n"),
        "spec.json",
    ),
    "changed flags": (lambda old: _edit(old, "build.ninja"), "build.ninja"),
    "an added file": (lambda old: _edit(old, "train.py"), "train.py"),
    "one beside the library": (lambda old: _edit(old, "lib/mine.so"), "lib/mine.so"),
    "one beside objects": (lambda old: _edit(old, "obj/notes.txt"), "obj/notes.txt"),
    "one of Python's cache": (
        lambda old: _edit(old, "__pycache__/notes"),
        "__pycache__/notes",
    ),
    "a folder": (lambda old: (old / "empty").mkdir(), "empty/"),
    "a name of two lines": (lambda old: _edit(old, "a\nb"), r"'a\nb'"),
    "a link": (lambda old: (old / "link").symlink_to("_part.py"), "link"),
    "a link in place of a folder": (
        lambda old: ((old / "lib").rename(old.parent / "lib"), (old / "lib").symlink_to("../lib")),
        "lib",
    ),
    "a FIFO in place of a source": (
        lambda old: ((old / "_part.py").unlink(), os.mkfifo(old / "_part.py")),
        "_part.py",
    ),
    "no records": (lambda old: [(old / name).unlink() for name in written.RECORDS], "__init__.py"),
}


class TestUsersWork:
    """Nothing is deleted that was added to a package, or changed in it."""

    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        """A package of an older version, in which ninja and Python have run."""
        folder = write_package(tmp_path / "out" / "layer", "OLD = 1\n")
        (folder / "build.ninja").write_text("rule x\n")
        written.record(folder, written.digests(folder))
        for path in ("obj/.ninja_log", "obj/cpu/x.o", "obj/cpu/x.o.d", "__pycache__/a.pyc"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).touch()
        return folder

    @pytest.mark.parametrize("kind", USERS_WORK)
    def test_is_kept_and_named(self, tmp_path: Path, package: Path, old: Path, kind: str) -> None:
        change, named = USERS_WORK[kind]
        change(old)
        before = sorted((str(path), path.lstat().st_ino) for path in old.rglob("*"))
        assert written.changes(old)
        with pytest.raises(BuildError, match=rf"\({re.escape(named)}.*\): move it away"):
            export(package, tmp_path / "out")
        assert sorted((str(path), path.lstat().st_ino) for path in old.rglob("*")) == before

    def test_what_convgen_wrote_and_tools_left_is_replaced(
        self, tmp_path: Path, package: Path, old: Path
    ) -> None:
        assert written.changes(old) == []
        assert content(export(package, tmp_path / "out")) == content(package)

    def test_a_library_is_made_anew_whatever_became_of_it(
        self, tmp_path: Path, package: Path, old: Path
    ) -> None:
        (old / "lib" / "cpu.so").write_bytes(b"cut short")
        assert content(export(package, tmp_path / "out")) == content(package)

    def test_files_beside_an_equal_package_may_stay(self, tmp_path: Path, package: Path) -> None:
        target = export(package, tmp_path / "out")
        (target / "train.py").write_text("years of work")
        assert export(package, tmp_path / "out") == target
        assert (target / "train.py").read_text() == "years of work"

    def test_an_equal_package_without_records_gets_them(
        self, tmp_path: Path, package: Path
    ) -> None:
        target = write_package(tmp_path / "out" / "layer")
        export(package, tmp_path / "out")
        assert written.changes(target) == []
        newer = write_package(tmp_path / "b" / "layer", "value = 2\n")
        assert content(export(newer, tmp_path / "out")) == content(newer)


class TestLoad:
    def test_imports_a_folder_and_gives_the_same_module_again(self, package: Path) -> None:
        module = load(package)
        assert module.value == 1
        assert load(package) is module
        assert sys.modules[module.__name__] is module
        assert module.__name__.startswith("layer_")

    def test_submodules_import_relatively(self, tmp_path: Path) -> None:
        package = write_package(tmp_path / "relative", "from ._part import PART\n")
        assert load(package).PART == 1

    def test_a_folder_that_changed_is_imported_anew(self, tmp_path: Path, package: Path) -> None:
        target = export(package, tmp_path / "out")
        first = load(target)
        export(write_package(tmp_path / "b" / "layer", "value = 2\n"), tmp_path / "out")
        second = load(target)
        assert (first.value, second.value) == (1, 2)
        assert load(target) is second

    def test_equal_names_in_different_places_do_not_meet(
        self, tmp_path: Path, package: Path
    ) -> None:
        assert load(export(package, tmp_path / "a")) is not load(export(package, tmp_path / "b"))

    def test_a_package_of_the_cache_has_an_importable_home(self) -> None:
        module = load(cached_package(KEY))
        assert module.__name__ == f"convgen.cached.{KEY}.layer"
        assert load(Path(str(module.__file__)).parent) is module

    def test_a_package_of_the_cache_is_imported_from_its_sources_alone(self, root: Path) -> None:
        package = cached_package("c" * 64, "from ._part import PART as value\n")
        stem = f"__pycache__/_part.{sys.implementation.cache_tag}"
        compiled = Path(py_compile.compile(str(package / "_part.py"), doraise=True) or "")
        assert compiled == package / f"{stem}.pyc"
        compiled.write_bytes(compiled.read_bytes()[:-4] + b"\xff\xff\xff\xff")
        assert load(package).value == 1
        assert [path.name for path in compiled.parent.iterdir()] == [compiled.name]

    def test_a_damaged_package_of_the_cache_is_not_imported(self, root: Path) -> None:
        package = cached_package("b" * 64)
        (package / "_part.py").write_text("PART = 2\n")
        with pytest.raises(ModuleNotFoundError):
            load(package)

    def test_what_was_pickled_loads_in_another_process(self) -> None:
        module = load(cached_package("e" * 64))
        result = subprocess.run(
            [sys.executable, "-c", "import pickle, sys; print(pickle.load(sys.stdin.buffer))"],
            input=pickle.dumps(module.Layer),
            capture_output=True,
        )
        assert result.returncode == 0, result.stderr
        assert b"layer.Layer" in result.stdout

    def test_a_cache_that_moved_within_the_process_is_found(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for number in range(2):
            monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path / f"cache{number}"))
            module = load(cached_package(f"{number}" * 64, f"number = {number}\n"))
            assert module.number == number

    def test_an_import_that_fails_leaves_no_module(self, tmp_path: Path) -> None:
        package = write_package(tmp_path / "broken", "raise ValueError('broken')\n")
        with pytest.raises(ValueError, match="broken"):
            load(package)
        assert not any(name.startswith("broken_") for name in sys.modules)

    def test_what_is_no_package_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(BuildError, match="is no package of convgen"):
            load(tmp_path / "missing")

    def test_from_several_threads_gives_one_module(self, tmp_path: Path) -> None:
        slow = "import time; time.sleep(0.05)\n"
        packages = [write_package(tmp_path / "slow", slow), cached_package("d" * 64, slow)]
        for package in packages:
            found: list[ModuleType] = []
            threads = [
                threading.Thread(target=lambda p=package, f=found: f.append(load(p)))  # type: ignore[misc]
                for _ in range(4)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 4
            assert len({id(module) for module in found}) == 1


def test_a_folder_with_a_damaged_description_is_no_package(package: Path) -> None:
    assert is_package(package)
    (package / "spec.json").write_text('{"convgen": "1"')
    assert not is_package(package)
    assert not is_package(package / "missing")
    assert folders.is_package(write_package(package / "inner"))
