"""What `convgen scan` and `convgen swap` share: the network that is meant, and what it is given."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from convgen.commands import options
from convgen.commands.options import Command
from convgen.engines.backends import BACKENDS
from convgen.spec import documents

if TYPE_CHECKING:
    import torch
    from torch import nn

    from convgen.models.report import SwapReport


def network(command: Command) -> Command:
    """The options that say which network is run, on what, and how."""
    return options.decorated(
        command,
        click.argument("network", metavar="MODULE:FACTORY"),
        click.option(
            "--input",
            "shapes",
            type=options.extents(),
            multiple=True,
            required=True,
            metavar="N,C,D,H,W",
            help="Shape of an input; repeat it for several arguments.",
        ),
        click.option(
            "--dtype",
            type=click.Choice(("f32", "f64", "f16", "bf16")),
            default="f32",
            show_default=True,
            help="Of parameters and inputs.",
        ),
        click.option(
            "--amp", type=click.Choice(("f16", "bf16")), help="Run under autocast to this dtype."
        ),
        click.option(
            "--device",
            type=click.Choice(BACKENDS),
            help="Where to run.  [default: a GPU if there is one, else cpu]",
        ),
        click.option(
            "--channels-last", is_flag=True, help="Network and inputs lie in channels_last."
        ),
        click.option(
            "--inference", is_flag=True, help="In eval mode and without gradients; else to train."
        ),
        click.option(
            "--tf32/--no-tf32",
            default=True,
            show_default=True,
            help="Torch's switch for rounding fp32 to TF32 on a GPU.",
        ),
        click.option(
            "--only",
            multiple=True,
            callback=options.split,
            metavar="NAMES",
            help="Only layers of these names, as in decoder.*,head; repeat it or separate by "
            "commas.",
        ),
        click.option(
            "--fixed-channels",
            is_flag=True,
            help="Generate kernels for the layers' channels alone.",
        ),
    )


@contextlib.contextmanager
def prepared(
    network: str,
    shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    amp: str | None,
    device: str | None,
    channels_last: bool,
    inference: bool,
    tf32: bool,
) -> Iterator[tuple[nn.Module, tuple[torch.Tensor, ...]]]:
    """The network and its inputs, in the context that the options ask for.

    Raises:
        NetworkError: if there is no such network, or it cannot be made.
    """
    import torch

    from convgen.measuring import bench, machine
    from convgen.spec.dtypes import DTYPES

    where = bench.device_for(device)
    if where is None:
        raise click.UsageError("--device cuda: there is no GPU that torch can use.")
    torch.manual_seed(0)
    model = made(network).to(where, getattr(torch, DTYPES[dtype].torch_name))
    model.train(not inference)
    inputs = [torch.randn(s, device=where, dtype=_torch(dtype)) for s in shapes]
    if channels_last:
        for ndim, format_ in ((4, torch.channels_last), (5, torch.channels_last_3d)):
            tensors = [*model.parameters(), *model.buffers()]
            for tensor in tensors:
                if tensor.dim() == ndim:
                    tensor.data = tensor.data.contiguous(memory_format=format_)
            inputs = [x.contiguous(memory_format=format_) if x.dim() == ndim else x for x in inputs]
    with (
        machine.settings(tf32),
        torch.set_grad_enabled(not inference),
        torch.autocast(where.type, dtype=_torch(amp) if amp else None, enabled=amp is not None),
    ):
        yield model, tuple(inputs)


def made(network: str) -> nn.Module:
    """The network that ``package.module:factory`` or ``...:factory(2, width=8)`` names.

    A factory is a function or class that makes a module, or a module itself; its arguments are
    literals. Modules are looked for in the working folder, too.

    Raises:
        NetworkError: in one line, if there is none or it cannot be made.
    """
    from torch import nn

    from convgen.models.errors import NetworkError

    module_name, _, expression = network.partition(":")
    shown = documents.plain(network)
    try:
        tree = ast.parse(expression.strip(), mode="eval").body
        called = isinstance(tree, ast.Call)
        name = tree.func if isinstance(tree, ast.Call) else tree
        path = ast.unparse(name).split(".")
        arguments = [ast.literal_eval(each) for each in getattr(tree, "args", ())]
        keywords = {k.arg or "": ast.literal_eval(k.value) for k in getattr(tree, "keywords", ())}
    except (SyntaxError, ValueError) as error:
        raise NetworkError(
            f"{shown} is no network: give MODULE:FACTORY, or MODULE:FACTORY(...) with literals"
        ) from error
    if not all(part.isidentifier() for part in (*module_name.split("."), *path)) or "" in keywords:
        raise NetworkError(
            f"{shown} is no network: give MODULE:FACTORY, as in package.networks:unet"
        )
    sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ImportError as error:
        missing = getattr(error, "name", None)
        if missing and (module_name == missing or module_name.startswith(f"{missing}.")):
            raise NetworkError(f"there is no module {missing!r} to import") from error
        raise NetworkError(f"{module_name} cannot be imported: {error}") from error
    except Exception as error:  # a user's module may raise anything
        raise NetworkError(f"{module_name} cannot be imported: {_line(error)}") from error
    where = module_name
    for part in path:
        if not hasattr(found, part):
            names = {name.lower(): name for name in dir(found)}
            close = difflib.get_close_matches(part.lower(), names, n=1)
            hint = f": did you mean {names[close[0]]!r}?" if close else ""
            raise NetworkError(f"{where} has no {part!r}{hint}")
        found, where = getattr(found, part), f"{where}.{part}"
    if isinstance(found, nn.Module) and not called:
        return found
    if not callable(found):
        raise NetworkError(f"{where} is a {type(found).__name__}, which makes no network")
    try:
        model = found(*arguments, **keywords)
    except Exception as error:  # a user's function may raise anything
        raise NetworkError(f"{where} makes no network: {_line(error)}") from error
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise NetworkError(f"{where} makes a {kind}, which is no torch.nn.Module")
    return model


def show(found: SwapReport) -> None:
    """Prints a report of `convgen scan` or `convgen swap`."""
    from convgen.commands import report
    from convgen.models import report as tables

    narrow = sys.stdout.isatty()
    if isinstance(found, tables.ScanReport):
        report.print_table(*tables.scan_table(found, narrow))
    else:
        report.print_table(*tables.swap_table(found.rows, narrow))
        for row in found.fused:
            click.echo(str(row))
    click.echo(tables.summary(found))


def _torch(dtype: str) -> Any:
    import torch

    from convgen.spec.dtypes import DTYPES

    return getattr(torch, DTYPES[dtype].torch_name)


def _line(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return documents.plain(first)
