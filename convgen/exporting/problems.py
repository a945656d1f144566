"""Problems as KernelBench states them: a file with ``Model`` and ``get_init_inputs``.

The file is executed, its model constructed, and the model's convolutions are found by their class.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from convgen.exporting.errors import ExportError
from convgen.spec import OPERATORS, ConvSpec, SpecError, documents

if TYPE_CHECKING:
    from torch import nn

_MODULE = "_convgen_problem"


@dataclass(frozen=True)
class Model:
    """What was found in a problem's file."""

    text: str
    """Its source, but for imports from ``__future__``."""
    future: tuple[str, ...]
    layers: tuple[ConvSpec, ...]
    """Of its convolutions; no two with the same constants."""
    left: tuple[str, ...]
    """What is torch's to compute, one line each, with the reason."""
    left_names: tuple[str, ...]
    """The layers among it, by their names in the model."""
    padding_modes: bool
    """Whether a layer pads its input by other numbers than zeros."""


def read(path: Path, fixed_channels: bool = False) -> Model:
    """Executes a problem's file and describes its model.

    Raises:
        ExportError: where the file or its model cannot be used; one line, which says why.
    """
    shown = documents.plain(str(path))
    try:
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
    except OSError as error:
        raise ExportError(f"{shown} cannot be read: {error.strerror}") from error
    except (ValueError, SyntaxError) as error:
        raise ExportError(f"{shown} is no Python: {_first_line(error)}") from error
    module = _execute(path, text, shown)
    for name in ("Model", "get_init_inputs"):
        if not callable(getattr(module, name, None)):
            raise ExportError(f"{shown} has no {name}: a problem has Model and get_init_inputs")
    try:
        model = module.Model(*module.get_init_inputs())
    except Exception as error:
        raise ExportError(
            f"{shown}: Model(*get_init_inputs()) failed: {_first_line(error)}"
        ) from error
    layers, left = _layers(model, fixed_channels)
    functional = tuple(
        f"{name}, line {line}: a function's call, which has no layer"
        for name, line in _functional(tree)
    )
    if not layers:
        others = "; ".join((*(f"{name}: {why}" for name, why in left.items()), *functional))
        raise ExportError(
            f"{shown}: Model has no convolution layer that can be replaced"
            + (f" ({others})" if others else "")
        )
    future = [
        node
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    return Model(
        text=_without(text, future),
        future=tuple(alias.name for node in future for alias in node.names),
        layers=tuple(layers),
        left=(*(f"{name}: {why}" for name, why in left.items()), *functional),
        left_names=tuple(left),
        padding_modes=any(
            layer.padding_mode != "zeros" for _, layer in _convolutions(model) if layer not in left
        ),
    )


def bindings(text: str) -> dict[str, str]:
    """The names that a module's source binds, each with what it imports there: empty for others."""
    found: dict[str, str] = {}
    for node in _statements(ast.parse(text).body):
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                found[name] = alias.name if alias.asname else name
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                found[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = ""
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found[node.id] = ""
    return found


def _statements(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """What a module's statements consist of, functions and classes not entered."""
    pending: list[ast.AST] = list(body)
    while pending:
        node = pending.pop(0)
        yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)


def _execute(path: Path, text: str, shown: str) -> ModuleType:
    spec = importlib.util.spec_from_loader(_MODULE, loader=None, origin=str(path))
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[_MODULE] = module
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except Exception as error:
        raise ExportError(f"{shown} failed: {_first_line(error)}") from error
    finally:
        del sys.modules[_MODULE]
    return module


def _first_line(error: Exception) -> str:
    said = documents.plain(str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def _convolutions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The convolutions of a model, those of derived classes too, each once."""
    from torch import nn

    for name, layer in model.named_modules():
        if isinstance(layer, tuple(getattr(nn, ConvSpec(op, 1).class_name) for op in OPERATORS)):
            yield name, layer


def _layers(model: nn.Module, fixed_channels: bool) -> tuple[list[ConvSpec], dict[str, str]]:
    """The specifications of a model's convolutions, and why others are torch's, by their names."""
    specs: dict[tuple[object, ...], ConvSpec] = {}
    left: dict[str, str] = {}
    for name, layer in _convolutions(model):
        if why := _reason(layer):
            left[name] = why
            continue
        padding = layer.padding
        if layer.padding_mode != "zeros":
            padding = 0  # the input itself is padded
        try:
            spec = ConvSpec(
                _operator(layer),
                layer.kernel_size,
                layer.stride,
                padding,
                layer.output_padding,
                layer.dilation,
                layer.groups,
                layer.in_channels if fixed_channels else None,
                layer.out_channels if fixed_channels else None,
            )
        except SpecError as error:
            left[name] = str(error)
            continue
        # Output padding is a run-time value, and the same zeros have several names.
        constants = (spec.op, spec.kernel_size, spec.stride, spec.padding_begin, spec.padding_end)
        more = (spec.dilation, spec.groups, spec.in_channels, spec.out_channels)
        specs.setdefault((*constants, *more), spec)
    return list(specs.values()), left


def _operator(layer: Any) -> str:
    from torch import nn

    return next(
        op for op in OPERATORS if isinstance(layer, getattr(nn, ConvSpec(op, 1).class_name))
    )


def _reason(layer: Any) -> str:
    """Why a convolution stays torch's; empty if it need not."""
    from torch import nn

    kind = type(layer)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "its channels are not known before it is called"
    if getattr(layer, "weight", None) is not None and layer.weight.is_complex():
        return "its weight is complex"
    torch_class = getattr(nn, ConvSpec(_operator(layer), 1).class_name)
    for derived in kind.__mro__[: kind.__mro__.index(torch_class)]:
        for method in ("forward", "_conv_forward"):
            if method in vars(derived) and not _calls_on(vars(derived)[method]):
                return f"{derived.__name__}.{method} does not call torch's"
    return ""


def _calls_on(method: Any) -> bool:
    """Whether a method uses ``super()``, or another method that the kernels come in by."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return True  # nothing is known, and torch's own parametrizations are of this kind
    return any(
        (isinstance(node, ast.Name) and node.id == "super")
        or (isinstance(node, ast.Attribute) and node.attr in ("_conv_forward", "forward"))
        for node in ast.walk(tree)
    )


def _functional(tree: ast.Module) -> list[tuple[str, int]]:
    """Calls of torch's convolution functions, each as it is written, and its line."""
    roots = {"torch", "F", "functional"}
    direct = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {
                alias.asname for alias in node.names if alias.asname and "torch" in alias.name
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            names = {alias.asname or alias.name: alias.name for alias in node.names}
            direct |= {name for name, real in names.items() if real in OPERATORS}
            roots |= {name for name, real in names.items() if real in ("nn", "functional")}
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Name) and called.id in direct:
            found.append((called.id, node.lineno))
        elif isinstance(called, ast.Attribute) and called.attr in OPERATORS:
            root: ast.expr = called
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in roots:
                found.append((ast.unparse(called), node.lineno))
    return found


def _without(text: str, statements: list[ast.ImportFrom]) -> str:
    """A source without some of its statements, which have lines of their own."""
    lines = text.splitlines(keepends=True)
    for node in reversed(statements):
        del lines[node.lineno - 1 : node.end_lineno]
    return "".join(lines)
