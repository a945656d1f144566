"""The command line: the group of all commands, each of which is a file in ``commands/``."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from convgen import __version__
from convgen.commands import bench, clean, doctor, generate, listing, show, tune, verify
from convgen.spec import SpecError


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
        except (ValueError, RuntimeError) as error:
            status = _status(error)
            if status is None:
                raise
            command = f"{ctx.command_path} {ctx.invoked_subcommand}"
            raise _Failure(str(error), command, status) from error

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


for module in (generate, verify, bench, tune, listing, show, clean, doctor):
    cli.add_command(module.command)


def main(args: Sequence[str] | None = None, prog_name: str = "convgen") -> int:
    """Runs the command line and returns its exit status.

    A user's mistake is one line on stderr and status 2, a failure of the machine (a compiler,
    the disk) its message and status 1; neither shows a traceback.
    """
    try:
        status = cli.main(args, prog_name=prog_name, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except BrokenPipeError:
        # The reader (head, say) has seen enough. Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.Abort:
        click.echo("Interrupted.", err=True)
        return 130
    except _Failure as error:
        click.echo(f"{error.command}: {error.message}", err=True)
        return error.status
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        command = prog_name if context is None else context.command_path
        # click breaks some messages into lines.
        click.echo(f"{command}: {' '.join(error.format_message().split())}", err=True)
        return error.exit_code
    except OSError as error:
        # A path that is too long, a full disk, a folder without permission: the machine's failure.
        named = "" if error.filename is None else f": {error.filename}"
        click.echo(f"{prog_name}: {error.strerror or error}{named}", err=True)
        try:
            sys.stdout.flush()
        except OSError:
            # What is left would fail again when Python flushes at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _status(error: Exception) -> int | None:
    """Exit status of convgen's own errors; None for those of others, which are bugs."""
    from convgen.building.errors import BuildError
    from convgen.building.toolchain import ToolchainError
    from convgen.commands.catalog import CatalogError
    from convgen.engines.tuned import TunedError
    from convgen.measuring.layers import SuiteError
    from convgen.measuring.plots import PlotError

    if isinstance(error, SpecError | CatalogError | SuiteError):
        return 2
    ours = BuildError | ToolchainError | PlotError | TunedError
    return 1 if isinstance(error, ours) else None
