"""What leaves the cache: by its user's wish, by its limit in size; and that it heals itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convgen import cli
from convgen.building import cache, cleaning, disk, locks
from convgen.building.errors import BuildError

KEY, OTHER, THIRD = "a" * 64, "b" * 64, "c" * 64


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(folder))
    monkeypatch.delenv("CONVGEN_CACHE_BYTES", raising=False)
    return folder


def publish(key: str = KEY, name: str = "package", text: str = "library") -> Path:
    """Puts a package into the cache, unused since 1000 days."""
    with cache.locked(key):
        folder = cache.temporary(key)
        (folder / name / "lib").mkdir(parents=True)
        (folder / name / "lib" / "cpu.so").write_text(text)
        package = cache.commit(key, name, folder, {})
    forget()
    age(key, 1000)
    return package


def forget() -> None:
    """This process uses nothing any more, as if it had ended."""
    for descriptor in locks._descriptors.values():
        os.close(descriptor)
    locks._descriptors.clear()
    locks._held.clear()


def age(key: str, days: float) -> None:
    os.utime(cache.cache_path() / key / cache.MARKER, (time.time() - days * 86400,) * 2)


def kept() -> set[str]:
    return {path.name[0] for path in cache.entries()}


def started(code: str) -> subprocess.Popen[str]:
    """Another process that has said "held" and waits for a line."""
    process = subprocess.Popen(
        [sys.executable, "-c", f"from convgen.building import cache\n{code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def builder(root: Path) -> Iterator[None]:
    """Another process builds KEY."""
    with started(f"with cache.locked({KEY!r}): print('held', flush=True); input()") as process:
        yield
        process.kill()


@pytest.fixture
def user(root: Path) -> Iterator[None]:
    """Another process uses KEY, or rather a fork of it does: the one that found it has ended."""
    publish(KEY)
    code = f"""
import os
assert cache.lookup({KEY!r}, 'package')
if os.fork(): os._exit(0)
print('held', flush=True)
input()
"""
    with started(code) as process:
        process.wait()
        age(KEY, 2000)
        yield
        assert process.stdin is not None
        process.stdin.write("\n")


class TestListingAndCleaning:
    def test_lists_name_size_and_use_the_latest_first(self, root: Path) -> None:
        publish(KEY, "first")
        publish(OTHER, "second", text="x" * 10_000)
        os.utime(root / KEY / cache.MARKER, (1e9, 1e9))
        age(OTHER, 0)
        second, first = cache.cached_packages()
        assert (second.name, first.name) == ("second", "first")
        assert (first.key, first.path) == (KEY, root / KEY / "first")
        assert 10_000 <= second.size_bytes < 12_000
        assert first.last_used == 1e9
        assert time.time() - second.last_used < 60

    def test_a_use_is_noted(self, root: Path) -> None:
        publish()
        cache.lookup(KEY, "package")
        assert time.time() - cache.cached_packages()[0].last_used < 60

    def test_clean_removes_everything_and_counts_it(self, root: Path) -> None:
        publish(KEY)
        publish(OTHER, text="x" * 10_000)
        (root / "tmp" / f"{'c' * 64}.dead").mkdir()
        cache.note("toolchain", "fact")
        cache.note("templates", "fact", b"content")
        removed, freed_bytes = cleaning.clean()
        assert removed == 2
        assert freed_bytes > 10_000
        assert cache.cached_packages() == []
        assert not (root / KEY).exists()
        assert list((root / "tmp").iterdir()) == []
        assert not cache.noted("toolchain", "fact")
        assert cache.recall("templates", "fact") is None

    def test_clean_by_name_and_by_age_spares_the_rest(self, root: Path) -> None:
        publish(KEY, "first")
        publish(OTHER, "second")
        age(KEY, 0)
        age(OTHER, 10)
        assert cleaning.clean(name="third")[0] == 0
        assert cleaning.clean(unused_days=11)[0] == 0
        assert cleaning.clean(name="first", unused_days=9)[0] == 0
        assert cleaning.clean(unused_days=9)[0] == 1
        assert [package.name for package in cache.cached_packages()] == ["first"]
        assert cleaning.clean(name="first")[0] == 1

    def test_clean_removes_an_uncommitted_entry(self, root: Path) -> None:
        publish()
        (root / KEY / cache.MARKER).unlink()
        removed, freed_bytes = cleaning.clean(name="another")
        assert removed == 0
        assert freed_bytes > 0
        assert not (root / KEY).exists()

    def test_clean_spares_what_is_being_built(self, root: Path, builder: None) -> None:
        (root / KEY / "package").mkdir(parents=True)
        (root / KEY / cache.MARKER).write_text(
            json.dumps({"name": "package", "files": {}, "size_bytes": 0})
        )
        assert cleaning.clean()[0] == 0
        assert (root / KEY).exists()

    def test_foreign_files_in_the_folder_are_left_alone(self, root: Path) -> None:
        publish()
        (root / "notes.txt").write_text("mine")
        cleaning.clean()
        assert (root / "notes.txt").read_text() == "mine"

    def test_what_is_used_is_not_unused_but_goes_with_all_of_the_cache(self, user: None) -> None:
        publish(OTHER)
        assert cleaning.clean(unused_days=0)[0] == 1
        assert kept() == {"a"}
        assert cleaning.clean()[0] == 1
        assert kept() == set()

    def test_the_command_line_deletes_by_age(self, capsys: pytest.CaptureFixture[str]) -> None:
        publish(KEY)
        publish(OTHER)
        age(OTHER, 1)
        assert cli.main(["clean", "--unused-days", "nan", "--yes"]) == 2
        assert cli.main(["clean", "--unused-days", "-1", "--yes"]) == 2
        assert kept() == {"a", "b"}
        assert cli.main(["clean", "--unused-days", "30", "--yes"]) == 0
        assert kept() == {"b"}
        assert "Deleted 1 package of the cache" in capsys.readouterr().err


class TestLimit:
    def test_the_least_recently_used_go_until_the_rest_fits(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for key in (KEY, OTHER, THIRD):
            publish(key, text="x" * 10_000)
        age(OTHER, 1)
        (cache.cache_path() / ("d" * 64)).mkdir()  # without a marker: the first to go
        for limit, expected in ((0, "abcd"), (40_000, "abcd"), (25_000, "bc"), (15_000, "b")):
            monkeypatch.setenv("CONVGEN_CACHE_BYTES", str(limit))
            age(THIRD, 2)
            cleaning.make_room()
            assert kept() == set(expected), limit

    def test_what_is_used_stays_also_by_a_fork(
        self, user: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(OTHER)
        monkeypatch.setenv("CONVGEN_CACHE_BYTES", "1")
        cleaning.make_room()
        assert kept() == {"a"}

    def test_what_was_found_or_built_by_this_process_stays_until_it_ends(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(KEY)
        publish(OTHER)
        assert cache.lookup(KEY, "package")
        monkeypatch.setenv("CONVGEN_CACHE_BYTES", "1")
        cleaning.make_room()
        assert kept() == {"a"}
        forget()
        cleaning.make_room()
        assert kept() == set()

    def test_what_is_being_built_stays(
        self, root: Path, builder: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (root / KEY / "package").mkdir(parents=True)
        (root / KEY / "package" / "x").write_text("x" * 100)
        monkeypatch.setenv("CONVGEN_CACHE_BYTES", "1")
        cleaning.make_room()
        assert kept() == {"a"}

    def test_is_five_gibibytes_unless_given_as_a_number(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert cleaning.limit_bytes() == 5 * 2**30
        for given in ("5G", "-1", "1e9", "nan", "9" * 400):
            monkeypatch.setenv("CONVGEN_CACHE_BYTES", given)
            with pytest.raises(BuildError, match="is no number of bytes"):
                cleaning.limit_bytes()


def _file(path: Path) -> None:
    path.write_text("found here")


def _link(path: Path) -> None:
    path.symlink_to("/nowhere")


def _closed(path: Path) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").touch()
    (path / "inner").chmod(0)
    path.chmod(0)


def _nested(path: Path) -> None:
    path.write_text("[" * 100_000)


def _wrong(path: Path) -> None:
    path.write_text(json.dumps({"name": ["package"], "files": [1], "size_bytes": 1e400}))


_KINDS: tuple[Callable[[Path], None], ...] = (_file, _link, os.mkfifo, Path.mkdir, _closed)
_PLACES = {
    "": _KINDS,
    "package": _KINDS,
    "package/lib": _KINDS,
    "package/lib/cpu.so": _KINDS,
    cache.MARKER: (*_KINDS, _nested, _wrong),
    "../locks": _KINDS,
    f"../locks/{KEY}": _KINDS,
    f"../locks/{locks.IN_USE}": _KINDS,
    "../locks/unknown": _KINDS,
    "../tmp": _KINDS,
    f"../tmp/{KEY}.dead": _KINDS,
    "../tmp/unknown": _KINDS,
    "../logs": _KINDS,
    f"../logs/{KEY}.log": _KINDS,
    "../toolchain": _KINDS,
    "../toolchain/fact": _KINDS,
    "../templates": _KINDS,
    "../templates/fact": _KINDS,
}


class TestHealing:
    @pytest.mark.parametrize("place", _PLACES)
    def test_whatever_is_found_is_replaced_by_the_next_build_and_removed_by_clean(
        self, root: Path, place: str
    ) -> None:
        for damage in _PLACES[place]:
            for heal in (True, False):
                publish()
                cache.keep("logs", f"{KEY}.log", "")
                cache.note("toolchain", "fact")
                cache.note("templates", "fact", b"content")
                path = Path(os.path.normpath(root / KEY / place))
                disk.remove(path)
                damage(path)
                if heal:
                    assert cache.lookup(KEY, "package") is None or place.startswith("..")
                    package = publish()
                    assert cache.lookup(KEY, "package") == package
                    cache.keep("logs", f"{KEY}.log", "log")
                    cache.note("toolchain", "fact")
                    assert cache.noted("toolchain", "fact")
                    cache.note("templates", "fact", b"content")
                    assert cache.recall("templates", "fact") == b"content"
                forget()
                cleaning.clean()
                left = {str(path.relative_to(root)) for path in root.rglob("*")}
                assert left <= {"locks", "tmp", *cache.KINDS}, (damage, heal)

    def test_a_file_in_the_place_of_the_cache_is_not_removed(self, root: Path) -> None:
        root.write_text("mine")
        with pytest.raises(BuildError, match="is not a folder"):
            cleaning.clean()
        assert root.read_text() == "mine"

    def test_folders_deeper_than_pythons_stack_are_removed(self, tmp_path: Path) -> None:
        here = os.getcwd()
        (tmp_path / "deep").mkdir()
        try:
            os.chdir(tmp_path / "deep")
            for _ in range(1100):
                os.mkdir("deep")
                os.chdir("deep")
        finally:
            os.chdir(here)
        disk.remove(tmp_path / "deep")
        assert list(tmp_path.iterdir()) == []
