"""Where the code of a paper lives, and loading it. Reading a room's exports and parameters imports nothing of it."""

import ast
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from formulary.errors import UsageError
from formulary.catalogue._card import PAPERS, Card
from formulary.catalogue._find import card as _card


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its name, type and default as they are written in the code; `default` None when it is required."""

    name: str
    type: str
    default: str | None


def family_of(slug: str) -> str:
    """
    >>> family_of("gptq")
    'quantization'
    """
    return _card(slug).family


def room_path(slug: str) -> Path:
    """The folder of a paper, whether or not it has code."""
    return _folder(_card(slug))


def has_code(slug: str) -> bool:
    """Whether the room has a method, so that it can be checked and used."""
    return (room_path(slug) / "method.py").is_file()


def load_room(slug: str) -> ModuleType:
    """The imported package of a room. Raises UsageError when the paper is a card only."""
    from importlib import import_module

    card = _card(slug)
    if not (_folder(card) / "method.py").is_file():
        hint = "it has nothing to run" if not card.contract else f"`formulary new {card.slug}` starts its code"
        raise UsageError(f"{card.slug} is a card only: {hint}")
    return import_module(f"formulary.papers.{card.family}.{card.room}")


def exports(slug: str) -> list[str]:
    """The names that a room's `__init__.py` imports, in order; empty for a card only.

    >>> exports("palm-2")
    []
    """
    path = room_path(slug) / "__init__.py"
    if not path.is_file():
        return []
    imports = [node for node in _parse(path).body if isinstance(node, ast.ImportFrom)]
    return [alias.asname or alias.name for node in imports for alias in node.names]


def parameters(slug: str) -> dict[str, list[Parameter]]:
    """For each class that a room exports from `method.py`: its parameters with their defaults, read without importing it.

    A dataclass gives its fields, any other class the arguments of its `__init__`.
    """
    path = room_path(slug) / "method.py"
    if not path.is_file():
        return {}
    wanted = exports(slug)
    classes = [node for node in _parse(path).body if isinstance(node, ast.ClassDef) and node.name in wanted]
    return {node.name: _fields(node) if _is_dataclass(node) else _arguments(node) for node in sorted(classes, key=lambda c: wanted.index(c.name))}


def _folder(card: Card) -> Path:
    return PAPERS / card.family / card.room


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text("utf8"))
    except SyntaxError as error:
        raise UsageError(f"room {path.parent.name}: {path.name} line {error.lineno} is not valid Python: {error.msg}") from None


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _fields(node: ast.ClassDef) -> list[Parameter]:
    found = []
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            declared = ast.unparse(line.annotation)
            if not declared.startswith(("ClassVar", "typing.ClassVar")) and not line.target.id.startswith("_"):
                found.append(Parameter(line.target.id, declared, None if line.value is None else ast.unparse(line.value)))
    return found


def _arguments(node: ast.ClassDef) -> list[Parameter]:
    makers = [line for line in node.body if isinstance(line, ast.FunctionDef) and line.name == "__init__"]
    if not makers:
        return []
    spec = makers[0].args
    positional = spec.posonlyargs + spec.args
    defaults = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
    pairs = list(zip(positional, defaults))[1:] + list(zip(spec.kwonlyargs, spec.kw_defaults))
    return [
        Parameter(arg.arg, ast.unparse(arg.annotation) if arg.annotation else "", None if value is None else ast.unparse(value))
        for arg, value in pairs
    ]
