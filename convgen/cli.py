"""The command line: the group of all commands, each of which is a file in ``commands/``."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, TextIO

import click

from convgen import __version__
from convgen.commands import (
    bench,
    clean,
    doctor,
    export,
    generate,
    listing,
    scan,
    show,
    swap,
    tune,
    verify,
)
from convgen.spec import SpecError, documents


class _Failure(click.ClickException):
    """One of convgen's own errors; its message may have several lines."""

    def __init__(self, message: str, command: str, status: int) -> None:
        super().__init__(message)
        self.command = command
        self.status = status


class _Commands(click.Group):
    """Lists commands as defined here; suggests the one that was meant, whatever click's version."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Turns convgen's own errors into click's, so that they name the command."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (ValueError, RuntimeError, OSError) as error:
            status = _status(error)
            if status is None:
                raise
            message = _described(error) if isinstance(error, OSError) else str(error)
            command = f"{ctx.command_path} {ctx.invoked_subcommand}"
            raise _Failure(message, command, status) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            close = difflib.get_close_matches(name, self.commands, n=1)
            hint = (
                f"Did you mean {close[0]!r}?" if close else f"Commands: {', '.join(self.commands)}."
            )
            raise click.UsageError(f"No such command {name!r}. {hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, "-V", "--version", message="convgen %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Kernels for (transposed) convolutions, specialized and handed back as PyTorch modules.

    \b
    Generate a module and use it:
      convgen generate --kernel 3 --stride 2
      python -c "from generated.conv_transpose3d_k3_s2 import ConvTranspose3d"

    Check it against float64 with `convgen verify`; see what this machine can compile with
    `convgen doctor`.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


for module in (
    generate,
    export,
    verify,
    scan,
    swap,
    bench,
    tune,
    listing,
    show,
    clean,
    doctor,
):
    cli.add_command(module.command)


INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""


def main(args: Sequence[str] | None = None, prog_name: str = "convgen") -> int:
    """Runs the command line and returns its exit status.

    A user's mistake is one line on stderr and status 2, a failure of the machine (a compiler,
    the disk, a stream that takes nothing) its message and status 1; neither shows a traceback.
    """
    _open_streams()
    status = _run(args, prog_name)
    try:
        sys.stdout.flush()
    except OSError as error:
        _silence(sys.stdout)
        # Of a pipe that nobody reads any more the reader (head, say) has seen enough.
        if status == 0 and not isinstance(error, BrokenPipeError):
            _say(f"{prog_name}: cannot write to stdout: {error.strerror}")
        return status or 1
    return status


def _run(args: Sequence[str] | None, prog_name: str) -> int:
    """:func:`main`; what was printed may still be on its way."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            status = cli.main(args, prog_name=prog_name, standalone_mode=False)
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        return 1
    except (click.Abort, KeyboardInterrupt):
        _say("Interrupted.")
        return INTERRUPTED
    except _Failure as error:
        _say(f"{error.command}: {error.message}")
        return error.status
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = prog_name if context is None else context.command_path
        # click breaks some messages into lines.
        _say(f"{command}: {' '.join(error.format_message().split())}")
        return error.exit_code
    except OSError as error:  # of help, which click prints outside of any command
        _say(f"{prog_name}: {_described(error)}")
        return 1


def _open_streams() -> None:
    """Opens what the caller closed, so that no other file takes its number.

    Who writes to a stdout that is closed fails; who reports on a stderr that is need not. Text
    that an encoding lacks is escaped.
    """
    for number, (name, mode, flags) in enumerate(
        (("stdin", "r", os.O_RDONLY), ("stdout", "w", os.O_RDONLY), ("stderr", "w", os.O_WRONLY))
    ):
        stream = getattr(sys, name)
        if stream is None:
            descriptor = os.open(os.devnull, flags)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            os.set_inheritable(number, True)
            stream = open(number, mode, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if mode == "w" and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def _say(message: str) -> None:
    """Prints a line on stderr, if that takes it."""
    try:
        click.echo(message, err=True)
    except OSError:
        _silence(sys.stderr)


def _silence(stream: TextIO) -> None:
    """Sends what a stream still holds to nowhere: Python flushes it at its end."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning is a line on stderr, without the place in convgen's source."""
    _say(f"Warning: {message}")


def _described(error: OSError) -> str:
    """An operating system's error in one line, without its number."""
    if error.filename is not None:
        return f"{error.strerror}: {documents.plain(os.fsdecode(error.filename))}"
    try:
        os.getcwd()
    except OSError:
        return "the working folder does not exist any more"
    return error.strerror or str(error)


def _status(error: Exception) -> int | None:
    """Exit status of convgen's own errors; None for those of others, which are bugs."""
    from convgen.building.errors import BuildError
    from convgen.building.toolchain import ToolchainError
    from convgen.commands.catalog import CatalogError
    from convgen.engines.tuned import TunedError
    from convgen.exporting.errors import ExportError
    from convgen.measuring.layers import SuiteError
    from convgen.measuring.plots import PlotError
    from convgen.models.errors import NetworkError

    if isinstance(error, SpecError | CatalogError | SuiteError | ExportError | NetworkError):
        return 2
    ours = BuildError | ToolchainError | PlotError | TunedError | OSError
    return 1 if isinstance(error, ours) else None
