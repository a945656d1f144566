"""The cache folder: who may use it, what counts as whole, what a dead process leaves."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from convgen.building import cache, disk, locks
from convgen.building.errors import BuildError

KEY = "a" * 64
OTHER = "b" * 64


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("CONVGEN_CACHE_DIR", str(folder))
    return folder


def publish(key: str = KEY, name: str = "package", text: str = "library") -> Path:
    with cache.locked(key):
        folder = cache.temporary(key)
        (folder / name / "lib").mkdir(parents=True)
        (folder / name / "lib" / "cpu.so").write_text(text)
        (folder / name / "spec.json").write_text("{}")
        return cache.commit(key, name, folder, {})


@pytest.fixture
def holder(root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of KEY."""
    code = (
        "from convgen.building import cache\n"
        f"with cache.locked({KEY!r}): print('held', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


class TestFolder:
    def test_is_what_the_environment_says(self, root: Path) -> None:
        assert cache.cache_path() == root

    def test_defaults_to_the_xdg_cache_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CONVGEN_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache.cache_path() == tmp_path / "xdg" / "convgen"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache.cache_path() == tmp_path / "home" / ".cache" / "convgen"

    def test_is_created_private_whatever_the_umask(self, root: Path) -> None:
        old = os.umask(0)
        try:
            assert cache.cache_dir() == root
            publish()
        finally:
            os.umask(old)
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert stat.S_IMODE((root / "locks").stat().st_mode) == 0o700
        assert stat.S_IMODE((root / KEY).stat().st_mode) == 0o700

    def test_of_another_user_is_refused(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        cache.cache_dir()
        if os.geteuid() == 0:
            os.chown(root, 12345, -1)
        else:
            uid = os.geteuid()
            monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
        with pytest.raises(BuildError, match=r"belongs to user .* set CONVGEN_CACHE_DIR"):
            cache.cache_dir()

    @pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
    def test_that_others_may_write_is_refused(self, root: Path, mode: int) -> None:
        cache.cache_dir().chmod(mode)
        with pytest.raises(BuildError, match=r"written by others.*chmod go-w"):
            cache.cache_dir()

    def test_that_is_not_writable_is_refused(
        self, root: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.cache_dir().chmod(0o500)
        if os.geteuid() == 0:  # for whom every folder is writable
            monkeypatch.setattr(os, "access", lambda path, mode: False)
        with pytest.raises(BuildError, match="is not writable: set CONVGEN_CACHE_DIR"):
            cache.cache_dir()
        root.chmod(0o700)

    def test_that_is_a_file_is_refused(self, root: Path) -> None:
        root.write_text("")
        with pytest.raises(BuildError, match="is not a folder"):
            cache.cache_dir()

    def test_that_cannot_be_created_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("CONVGEN_CACHE_DIR", str(tmp_path / "file" / "cache"))
        with pytest.raises(BuildError, match=r"cannot create the cache .*Not a directory"):
            cache.cache_dir()

    def test_is_not_created_by_looking(self, root: Path) -> None:
        assert cache.cached_packages() == []
        assert not cache.noted("toolchain", "fact")
        assert not root.exists()


class TestEntries:
    def test_a_published_package_is_found_and_an_unknown_one_is_not(self) -> None:
        package = publish()
        assert cache.lookup(KEY, "package") == package
        assert (package / "lib" / "cpu.so").read_text() == "library"
        assert cache.lookup(KEY, "another") is None
        assert cache.lookup(OTHER, "package") is None

    def test_compiled_modules_that_appear_later_do_no_harm(self) -> None:
        package = publish()
        (package / "__pycache__").mkdir()
        (package / "__pycache__" / "x.pyc").write_text("")
        assert cache.lookup(KEY, "package") == package

    @pytest.mark.parametrize("what", ["spec.cpython-311.so", "lib.py", "spec/__init__.py"])
    def test_what_python_might_import_besides_makes_an_entry_damaged(self, what: str) -> None:
        package = publish()
        (package / what).parent.mkdir(exist_ok=True)
        (package / what).touch()
        assert cache.lookup(KEY, "package") is None

    @pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "marker", "half a marker"])
    def test_a_damaged_entry_is_absent_until_it_is_published_again(
        self, root: Path, damage: str
    ) -> None:
        package = publish()
        library = package / "lib" / "cpu.so"
        marker = root / KEY / cache.MARKER
        if damage == "truncate":
            os.truncate(library, 3)
        elif damage == "flip":
            library.write_text("Library")
        elif damage == "remove":
            library.unlink()
        elif damage == "marker":
            marker.unlink()
        else:
            os.truncate(marker, marker.stat().st_size // 2)
        assert cache.lookup(KEY, "package") is None
        assert publish() == package
        assert cache.lookup(KEY, "package") == package

    def test_a_loaded_file_survives_its_replacement(self) -> None:
        package = publish()
        with open(package / "lib" / "cpu.so") as loaded:
            publish(text="rebuilt")
            assert loaded.read() == "library"

    def test_a_failed_write_leaves_the_old_file_and_nothing_else(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        file = tmp_path / "file"
        disk.write_atomically(file, "old")
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            disk.write_atomically(file, "new")
        assert file.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


class TestLock:
    def test_is_exclusive_between_threads_and_processes(
        self, holder: subprocess.Popen[str]
    ) -> None:
        assert locks.acquire(cache.cache_dir() / "locks" / KEY, blocking=False) is None

    def test_reports_that_it_waits_and_is_free_once_its_holder_is_killed(
        self, holder: subprocess.Popen[str]
    ) -> None:
        def waiting() -> None:
            waits.append(True)
            holder.send_signal(signal.SIGKILL)

        waits: list[bool] = []
        with cache.locked(KEY, waiting):
            assert waits == [True]

    def test_of_a_deleted_file_is_not_taken_for_a_lock(self, root: Path) -> None:
        with cache.locked(KEY):
            (root / "locks" / KEY).unlink()
            with cache.locked(KEY):
                assert (root / "locks" / KEY).exists()


class TestTemporaryFolders:
    def test_of_dead_builders_are_removed_and_of_live_ones_are_not(
        self, root: Path, holder: subprocess.Popen[str]
    ) -> None:
        disk.own_folder(root / "tmp")
        live, dead, own = (root / "tmp" / f"{key}.x" for key in (KEY, OTHER, "c" * 64))
        for folder in (live, dead, own):
            (folder / "package").mkdir(parents=True)
        with cache.locked("c" * 64):
            new = cache.temporary("c" * 64)
        assert sorted((root / "tmp").iterdir()) == sorted([live, new])


class TestTrust:
    INNER = ("", "package", cache.MARKER, "package/lib/cpu.so")

    @pytest.mark.parametrize("inner", INNER)
    def test_inner_entries_must_not_be_for_others_to_write(self, root: Path, inner: str) -> None:
        publish()
        path = root / KEY / inner
        path.chmod(path.stat().st_mode | 0o002)
        assert cache.lookup(KEY, "package") is None
        publish()
        assert cache.lookup(KEY, "package")

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
    @pytest.mark.parametrize("inner", INNER)
    def test_inner_entries_must_be_ones_own_or_of_root(self, root: Path, inner: str) -> None:
        publish()
        os.chown(root / KEY / inner, 12345, -1)
        assert cache.lookup(KEY, "package") is None
        publish()
        assert cache.lookup(KEY, "package")

    def test_a_link_to_elsewhere_is_not_followed(self, root: Path, tmp_path: Path) -> None:
        for inner in ("package", "package/lib", "package/lib/cpu.so", ""):
            publish()
            path = root / KEY / inner
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
            assert cache.lookup(KEY, "package") is None
            disk.remove(tmp_path / "elsewhere")

    def test_a_group_writable_umask_makes_no_entry_untrusted(self) -> None:
        old = os.umask(0o002)
        try:
            publish()
        finally:
            os.umask(old)
        assert cache.lookup(KEY, "package")

    def test_a_read_only_cache_of_root_is_a_hit_without_a_write(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            os.chmod(folder, 0o755)
            root = Path(folder) / "cache"
            monkeypatch.setenv("CONVGEN_CACHE_DIR", str(root))
            package = publish()
            everything = (root, *root.rglob("*"))
            for path in everything:
                path.chmod(0o555 if path.is_dir() else 0o444)
            before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in everything]
            as_root = os.geteuid() == 0
            if as_root:  # becomes another user, who may come back
                os.setresuid(12345, 12345, 0)
            try:
                assert cache.lookup(KEY, "package") == package
                assert cache.lookup(OTHER, "package") is None
                assert len(cache.cached_packages()) == 1
                with pytest.raises(BuildError, match="is not writable: set CONVGEN_CACHE_DIR"):
                    publish(OTHER)
            finally:
                if as_root:
                    os.setresuid(0, 0, 0)
            if as_root:
                after = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in everything]
                assert after == before
            assert set(root.rglob("*")) == set(everything[1:])
            for path in everything:
                path.chmod(0o755)
