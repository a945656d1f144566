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
from convgen.building import cache
from convgen.building.cache import BuildError as BuildError
from convgen.building.toolchain import Commands, build_environment, find_ninja, ptxas_resources

LAYOUT_VERSION = 1
"""Of the published folder; part of the key."""

Progress = Callable[[int, int, str], None]
"""``progress(done, total, what)``: steps finished, steps in all, the step finished last."""

_CONTEXT_LINES = 3
_SHOWN_ERRORS = 3


class BuildWarning(UserWarning):
    """A library was built, but a kernel in it will be slow: ptxas reports spilled registers."""


@dataclass(frozen=True)
class Library:
    """A shared library of the package and how it is made.

    ``path`` and ``sources`` are relative to the package; each source is one translation unit.
    """

    path: str
    sources: tuple[str, ...]
    commands: Commands


def build(
    name: str,
    files: Mapping[str, str],
    libraries: Sequence[Library],
    *,
    progress: Progress | None = None,
) -> Path:
    """The package folder ``<cache>/<key>/<name>``, built unless the cache has it.

    Args:
        name: name of the package folder.
        files: text of every file, by its path in the package.
        libraries: what to compile from them.
        progress: called as steps finish, and with ``what`` starting with "waiting" while another
            process builds the same package; not called on a cache hit.

    Raises:
        BuildError: if a compiler fails (with its command, its message beside the source lines,
            and the log's path), the disk is full, the cache cannot be used, or
            ``CONVGEN_NO_BUILD`` forbids to compile.
        ToolchainError: if ninja is missing.
    """
    report = progress or (lambda done, total, what: None)
    script = ninja_file(name, libraries)
    key = cache_key(name, files, libraries)
    try:
        if published := cache.lookup(key, name):
            return published
        if os.environ.get("CONVGEN_NO_BUILD", "0") not in ("", "0"):
            raise BuildError(_forbidden(name, key, libraries))
        steps = sum(len(library.sources) + 1 for library in libraries)
        with cache.locked(
            key, lambda: report(0, steps, f"waiting for another process that builds {name}")
        ) as lock:
            if published := cache.lookup(key, name):
                return published
            return _build(key, name, {**files, "build.ninja": script}, report, lock, steps)
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
    """The text of ``build.ninja``, which builds the libraries from the package's own folder."""
    lines = [
        f"# Builds the libraries of {name}. Run `ninja` in this folder after editing a source.",
        f"# Written by convgen {__version__}.",
        "",
        "ninja_required_version = 1.5",
        "builddir = obj",
    ]
    for library in libraries:
        rule = PurePosixPath(library.path).stem
        commands = library.commands
        lines += [
            "",
            f"rule compile_{rule}",
            f"  command = {_wrapped(commands.compile)} -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "",
            f"rule link_{rule}",
            f"  command = {_wrapped((*commands.link, '-o', '$out', '$in'))}"
            + (f" {_quoted(commands.link_libraries)}" if commands.link_libraries else "")
            # What the package compares a library with before it loads it.
            + " && sha256sum $out >$out.sha256",
            "  description = link $out",
            "",
        ]
        objects = [_object(source) for source in library.sources]
        for source, target in zip(library.sources, objects, strict=True):
            lines.append(f"build {target}: compile_{rule} {source}")
        lines.append(f"build {library.path} | {library.path}.sha256: link_{rule} $")
        lines.append("    " + " $\n    ".join(objects))
    return "\n".join(lines) + "\n"


def _object(source: str) -> str:
    return f"obj/{PurePosixPath(source).relative_to('src')}.o"


def _quoted(words: Sequence[str]) -> str:
    """Words for the shell that ninja calls; ninja's own variables stay."""
    return " ".join(
        word if word in ("$in", "$out") else shlex.quote(word).replace("$", "$$") for word in words
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
    key: str, name: str, files: Mapping[str, str], report: Progress, lock: int, steps: int
) -> Path:
    """Builds under the key's lock, in a folder that is gone afterwards whatever happens."""
    folder = cache.temporary(key)
    try:
        package = folder / name
        for path, text in files.items():
            file = package / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        # Compilers put their own temporary files where they vanish with the rest.
        scratch = folder / "scratch"
        scratch.mkdir()
        report(0, steps, f"building {name}")
        status, log = _run_ninja(package, scratch, report, lock)
        if status:
            raise BuildError(_failure(key, name, package, status, log))
        shutil.rmtree(scratch)
        shutil.rmtree(package / "obj", ignore_errors=True)
        (folder / "build.log").write_text(log)
        published = cache.commit(key, name, folder, {"convgen": __version__})
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        _log_path(key).unlink(missing_ok=True)
    _warn_of_spills(name, log)
    return published


def _run_ninja(package: Path, scratch: Path, report: Progress, lock: int) -> tuple[int, str]:
    """Runs ninja in a package folder; its exit status and output."""
    command = [find_ninja(), "-j", os.environ.get("CONVGEN_JOBS") or str(processors())]
    environment = build_environment() | {
        "NINJA_STATUS": "[%f/%t] ",
        "TMPDIR": str(scratch),
        "TERM": "dumb",
    }
    log = []
    # Ninja and the compilers inherit the lock. Should this process be killed, the lock is free
    # when the last of them has ended, and nobody deletes a folder that is still written to.
    with subprocess.Popen(
        command,
        cwd=package,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        pass_fds=(lock,),
    ) as process:
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
        path.parent.mkdir(mode=0o700, exist_ok=True)
        cache.write_atomically(path, log)
        kept = f"log: {path}"
    except OSError as error:
        kept = f"the log could not be kept ({error.strerror})"
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
