"""From sources to a published package: key, lock, ninja, atomic publish. Knows no convolution."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from convgen import __version__
from convgen.building import cache, cleaning, disk, processes
from convgen.building.errors import BuildError
from convgen.building.toolchain import Commands, build_environment, find_ninja, ptxas_resources

LAYOUT_VERSION = 1
"""Of the published folder; part of the key."""

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: steps finished, steps in all, the step finished last.

Of long kernels also while sources are rendered, when ``total`` is not known yet: 0.
"""

_CONTEXT_LINES = 3
_SHOWN_ERRORS = 3


class BuildWarning(UserWarning):
    """What a user should know of a build: a kernel in it is slow, or it was not called for."""


@dataclass(frozen=True)
class Library:
    """A shared library of the package and how it is made.

    ``path`` and ``sources`` are relative to the package; each source is one translation unit.
    ``links`` are there while it is built: a path below ``obj``, which commands may name, and the
    file that it leads to. The commands' identity says what that file is.
    """

    path: str
    sources: tuple[str, ...]
    commands: Commands
    links: tuple[tuple[str, Path], ...] = ()


def build(
    name: str,
    files: Mapping[str, str],
    libraries: Sequence[Library],
    *,
    progress: Progress | None = None,
    jobs: int | None = None,
) -> Path:
    """The package folder ``<cache>/<key>/<name>``, built unless the cache has it.

    Args:
        name: name of the package folder.
        files: text of every file, by its path in the package.
        libraries: what to compile from them.
        progress: called as steps finish, and with ``what`` starting with "waiting" while another
            process builds the same package; not called on a cache hit.
        jobs: compilers that run side by side; by default ``CONVGEN_JOBS``, or one for each
            processor.

    Raises:
        BuildError: if a compiler fails (with its command, its message beside the source lines,
            and the log's path), the disk is full, the cache cannot be used, or
            ``CONVGEN_NO_BUILD`` forbids to compile.
        ToolchainError: if ninja is missing.
    """
    report = progress or (lambda done, total, what: None)
    key = cache_key(name, files, libraries)
    try:
        if published := cache.lookup(key, name):
            return published
        if os.environ.get("CONVGEN_NO_BUILD", "0") not in ("", "0"):
            raise BuildError(_forbidden(name, key, libraries))
        cleaning.limit_bytes()  # a mistake in it is better said before minutes of compiling
        try:
            cache.cache_dir()
        except BuildError as error:
            raise BuildError(f"{name} is not in the cache, and cannot be built: {error}") from error
        steps = _steps(libraries)
        with (
            processes.ended_by_signals(),
            cache.locked(
                key, lambda: report(0, steps, f"waiting for another process that builds {name}")
            ) as lock,
        ):
            if published := cache.lookup(key, name):
                return published
            published = _build(key, name, files, libraries, report, lock, jobs)
        with contextlib.suppress(OSError, BuildError):  # the package is there in any case
            cleaning.make_room()
        return published
    except BrokenPipeError:
        raise  # of the progress callback: nobody reads any more
    except OSError as error:
        raise BuildError(
            f"cannot build {name} in the cache {cache.cache_path()}: {error}. "
            + ("Free some space there, or " if error.errno in _FULL else "Mend that, or ")
            + "set CONVGEN_CACHE_DIR to another folder"
        ) from error


_FULL = (errno.ENOSPC, errno.EDQUOT)


def cache_key(name: str, files: Mapping[str, str], libraries: Sequence[Library]) -> str:
    """SHA-256, in hex, of everything that decides what is built.

    That is: every file's text, the commands word for word (in ``build.ninja``), the compilers'
    versions and native target, convgen's version and the layout's.
    """
    facts = {
        "layout": LAYOUT_VERSION,
        "convgen": __version__,
        "name": name,
        "files": {path: hashlib.sha256(text.encode()).hexdigest() for path, text in files.items()},
        "build": ninja_file(name, libraries),
        "identities": {library.path: library.commands.identity for library in libraries},
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def ninja_file(name: str, libraries: Sequence[Library]) -> str:
    """The text of ``build.ninja``, which builds the libraries from the package's own folder.

    Raises:
        BuildError: for a name, path or word of a command that no ninja file can hold.
    """
    lines = [
        f"# Builds the libraries of {_one_line(name)}. Run `ninja` here after editing a source.",
        f"# Written by convgen {__version__}.",
        "",
        "ninja_required_version = 1.5",
        "builddir = obj",
    ]
    if any(library.commands.needs_plain_folder for library in libraries):
        lines += ["", "rule check_folder", *_CHECK_FOLDER, "", "build obj/folder: check_folder"]
    for library in libraries:
        rule = PurePosixPath(library.path).stem
        commands = library.commands
        # Relative, so that nvcc gives a shell no part of a path that is not convgen's.
        before = ("TMPDIR=obj",) if commands.needs_plain_folder else ()
        after = " || obj/folder" if commands.needs_plain_folder else ""
        lines += [
            "",
            f"rule compile_{rule}",
            f"  command = {_wrapped((*before, *commands.compile))} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "",
            f"rule link_{rule}",
            f"  command = {_wrapped((*before, *commands.link, '-o', '$out', '$in'))}"
            + (f" {_quoted(commands.link_libraries)}" if commands.link_libraries else "")
            # What the package compares a library with before it loads it.
            + " && sha256sum $out >$out.sha256",
            "  description = link $out",
            "",
        ]
        objects = [_object(source) for source in library.sources]
        for source, target in zip(library.sources, objects, strict=True):
            lines.append(f"build {_path(target)}: compile_{rule} {_path(source)}{after}")
        digest = _path(f"{library.path}.sha256")
        lines.append(f"build {_path(library.path)} | {digest}: link_{rule} $")
        lines.append("    " + " $\n    ".join(map(_path, objects)))
    return "\n".join(lines) + "\n"


# Counts what is special in the folder's path (see disk.is_plain), in octal; pwd ends with one.
_CHECK_FOLDER = (
    "  command = test $",
    r"""      "$$(pwd -P | tr -dc '\001-\037\042\044\047\134\140\177' | wc -c)" -eq 1 || { $""",
    '      echo >&2 "nvcc would have a shell execute what stands in the path of this folder: $',
    '      move it to one without quotes, dollars, backslashes and line breaks"; exit 1; }',
    "  description = check the path of this folder",
)


def _steps(libraries: Sequence[Library]) -> int:
    """How many steps ninja has to take."""
    checks = any(library.commands.needs_plain_folder for library in libraries)
    return sum(len(library.sources) + 1 for library in libraries) + checks


def _object(source: str) -> str:
    return f"obj/{PurePosixPath(source).relative_to('src')}.o"


def _one_line(text: str) -> str:
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f]", text):
        raise BuildError(
            f"{text!r} holds a line break or another character that no ninja file can hold: "
            f"move, link or rename it"
        )
    return text


def _path(path: str) -> str:
    """A path as ninja reads it in a build statement; it quotes for the shell by itself."""
    if "|" in path:
        raise BuildError(f"{path!r} holds a |, which no path in a ninja file can: rename it")
    return re.sub(r"([$ :])", r"$\1", _one_line(path))


def _quoted(words: Sequence[str]) -> str:
    """Words for the shell that ninja calls; ninja's own variables stay."""
    return " ".join(
        word if word in ("$in", "$out") else shlex.quote(_one_line(word)).replace("$", "$$")
        for word in words
    )


def _wrapped(words: Sequence[str]) -> str:
    """The same, in lines of readable length."""
    lines = [""]
    for word in words:
        text = _quoted((word,))
        if len(lines[-1]) + len(text) > 84:
            lines.append("")
        lines[-1] += f"{text} "
    return "$\n      ".join(lines).rstrip()


def _build(
    key: str,
    name: str,
    files: Mapping[str, str],
    libraries: Sequence[Library],
    report: Progress,
    lock: int,
    jobs: int | None,
) -> Path:
    """Builds under the key's lock, in a folder that is gone afterwards whatever happens."""
    steps = _steps(libraries)
    folder = cache.temporary(key)
    try:
        with _workplace(folder) as place:
            package, scratch = place / name, place / "scratch"
            for path, text in {**files, "build.ninja": ninja_file(name, libraries)}.items():
                file = package / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8", errors="surrogateescape")
            for link, target in (link for library in libraries for link in library.links):
                (package / link).parent.mkdir(parents=True, exist_ok=True)
                (package / link).symlink_to(target)
            scratch.mkdir()
            report(0, steps, f"building {name}")
            status, log = _run_ninja(package, scratch, report, lock, jobs)
            if status:
                raise BuildError(_failure(key, name, package, status, log))
            shutil.rmtree(scratch)
            shutil.rmtree(package / "obj", ignore_errors=True)
            if place != folder:
                shutil.copytree(package, folder / name)
        (folder / "build.log").write_text(log, encoding="utf-8", errors="surrogateescape")
        published = cache.commit(key, name, folder, {"convgen": __version__})
    finally:
        with contextlib.suppress(OSError):
            disk.remove(folder)
    with contextlib.suppress(OSError):
        disk.remove(_log_path(key))
    _warn_of_spills(name, log)
    return published


@contextlib.contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """Where a build for a folder of the cache happens: there, unless its path is not plain.

    nvcc has a shell read the paths of its sources and temporary files.
    """
    if disk.is_plain(os.path.realpath(folder)):
        yield folder
        return
    with disk.plain_temporary() as place:
        yield place


def _run_ninja(
    package: Path, scratch: Path, report: Progress, lock: int, jobs: int | None
) -> tuple[int, str]:
    """Runs ninja in a package folder; its exit status and output."""
    side_by_side = str(jobs or os.environ.get("CONVGEN_JOBS") or processors())
    command = [find_ninja(), "-j", side_by_side]
    environment = build_environment() | {
        "NINJA_STATUS": "[%f/%t] ",
        # Compilers put their own temporary files where they vanish with the rest.
        "TMPDIR": str(scratch),
        "TERM": "dumb",
    }
    log = []
    # Ninja and the compilers inherit the lock. Should this process be killed, the lock is free
    # when the last of them has ended, and nobody deletes a folder that is still written to.
    with processes.start(command, package, environment, (lock,)) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.append(line)
                if match := re.match(r"\[(\d+)/(\d+)\] (.+)", line):
                    report(int(match[1]), int(match[2]), match[3])
        except BaseException:
            # Ninja passes the signal on to the compilers and waits for them. Not SIGINT, which a
            # shell that is about to become a compiler can lose.
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            raise
    return process.returncode, "".join(log)


def processors() -> int:
    """Processors that this process may use.

    Compilers wait for nothing, so the one or two jobs more that ninja would start only make each
    of them slower, and the last one run alone.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):
        # A container's quota, in microseconds of each period: "200000 100000", or "max 100000".
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count or 1, -(-quota // period))
    return max(count or 1, 1)


def _forbidden(name: str, key: str, libraries: Sequence[Library]) -> str:
    units = ", ".join(source for library in libraries for source in library.sources)
    return (
        f"{name} is not in the cache {cache.cache_path()} and CONVGEN_NO_BUILD forbids to compile "
        f"it ({units}; key {key}): unset CONVGEN_NO_BUILD, or build it first"
    )


def _log_path(key: str) -> Path:
    return cache.cache_path() / "logs" / f"{key}.log"


def _failure(key: str, name: str, package: Path, status: int, log: str) -> str:
    """What to say about a failed build: command, messages beside the source lines, log."""
    path = _log_path(key)
    try:
        path = cache.keep("logs", path.name, log)
        kept = f"log: {path}"
    except (OSError, BuildError) as error:
        kept = f"the log could not be kept ({error})"
    target, command, said = _failed_step(log)
    if status < 0:
        what = f"ninja was ended by signal {-status}"
    elif target:
        what = f"{target} did not compile" if target.endswith(".o") else f"{target} did not link"
    else:
        what = f"ninja failed with status {status}"
    parts = [f"building {name} failed: {what}"]
    if "No space left on device" in log or "Disk quota exceeded" in log:
        parts.append(
            f"the disk is full: free some space at {cache.cache_path()}, "
            f"or set CONVGEN_CACHE_DIR to another folder"
        )
    if "Killed signal terminated program" in log:
        parts.append("the compiler was killed, perhaps for want of memory: try CONVGEN_JOBS=1")
    if command:
        parts.append(f"command: {command}")
    parts += list(_in_context(package, said)) or [said.strip() or log.strip()[-2000:]]
    parts.append(kept)
    return "\n".join(parts)


def _failed_step(log: str) -> tuple[str, str, str]:
    """Target, command and output of the first step that failed; empty strings if none is named."""
    match = re.search(
        r"^FAILED: (?:\[code=\d+\] )?(?P<target>\S+).*\n(?P<command>.*)\n"
        r"(?P<said>(?:(?!\[\d+/\d+\] |ninja: build stopped|FAILED: ).*\n?)*)",
        log,
        re.MULTILINE,
    )
    return (match["target"], match["command"], match["said"]) if match else ("", "", "")


def _in_context(package: Path, said: str) -> Iterator[str]:
    """The first errors, each with the lines of the package around it."""
    # gcc and clang: path:line:column: error: ...; nvcc: path(line): error: ... or error #20: ...
    pattern = re.compile(
        r"^(?P<path>[^\s:(]+)(?::(?P<line>\d+)(?::\d+)?:|\((?P<nvline>\d+)\):) "
        r"(?P<message>(?:fatal |catastrophic )?error.*)$",
        re.MULTILINE,
    )
    errors = list(pattern.finditer(said))
    for match in errors[:_SHOWN_ERRORS]:
        number = int(match["line"] or match["nvline"])
        shown = [f"{match['path']}:{number}: {match['message']}"]
        with contextlib.suppress(OSError, UnicodeDecodeError):
            lines = (package / match["path"]).read_text().splitlines()
            first = max(number - _CONTEXT_LINES, 1)
            for at in range(first, min(number + _CONTEXT_LINES, len(lines)) + 1):
                shown.append(f"{'>' if at == number else ' '}{at:5} | {lines[at - 1]}")
        yield "\n".join(shown)
    if len(errors) > _SHOWN_ERRORS:
        yield f"and {len(errors) - _SHOWN_ERRORS} more errors"


def _warn_of_spills(name: str, log: str) -> None:
    for kernel in ptxas_resources(log):
        if kernel.spills:
            warnings.warn(
                f"{name}: {kernel.kernel} for {kernel.architecture} uses local memory: "
                f"{kernel.stack_bytes} bytes of stack, {kernel.spill_store_bytes} bytes of spill "
                f"stores, {kernel.spill_load_bytes} bytes of spill loads",
                BuildWarning,
                stacklevel=4,
            )
