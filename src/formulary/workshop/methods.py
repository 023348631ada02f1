"""From what a person types to a method object: names joined by `+`, contracts, and settings with their types checked."""

import typing
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from formulary.catalogue.rooms import load_room
from formulary.errors import FormularyError, UsageError

ON_MODELS = ("transform", "attention", "layer")


def base(contract: str) -> type:
    """The base class of a contract, its module imported only when it is asked for."""
    from formulary import contracts

    return getattr(contracts, contract.title())


def contracts_of(slug: str) -> dict[str, list[type]]:
    """contract -> the classes that the room exports for it, in the order of its card's `contract`."""
    from formulary.catalogue import card

    room, found = load_room(slug), {}
    exported = [value for value in vars(room).values() if isinstance(value, type)]
    for contract in card(slug).contract:
        known = base(contract)
        found[contract] = [cls for cls in exported if issubclass(cls, known) and cls is not known]
    return {contract: classes for contract, classes in found.items() if classes}


def method_class(slug: str, contract: str | None = None) -> type:
    """The class that implements the method under `contract` (the card's first by default)."""
    found = contracts_of(slug)
    if not found:
        raise FormularyError(f"{slug} exports no class for its contract")
    if contract is not None and contract not in found:
        raise UsageError(f"{slug} is no {contract}; it is: {', '.join(found)}")
    return found[contract or next(iter(found))][0]


def split_names(method: str) -> list[str]:
    """`a+b` as its parts, each a known method with code."""
    names = [name.strip() for name in method.split("+")]
    if not all(names):
        raise UsageError(f"{method!r} is no method: join methods as in gtp-vit+llm-int8")
    return names


def training_free(kind: str) -> list[str]:
    """Every transform and attention that changes a model of this kind without training, with the parameters it has when none
    are given; by name.

    >>> "gptq" in training_free("decoder"), "minilm" in training_free("encoder")
    (True, False)
    """
    from formulary.catalogue import cards
    from formulary.catalogue.rooms import has_code

    found = []
    for slug, card in sorted(cards().items()):
        if {"transform", "attention"} & set(card.contract) and has_code(slug):
            contract, classes = next(iter(contracts_of(slug).items()))
            method = classes[0]() if is_dataclass(classes[0]) else classes[0]
            if contract in ("transform", "attention") and not getattr(method, "trains", False) and kind in getattr(method, "supports", (kind,)):
                found.append(slug)
    return found


# ---------------------------------------------------------------- settings


def parse_settings(pairs: Iterable[str]) -> dict[str, str]:
    """`["bits=3", "act_order=true"]` as a dict of strings; a missing `=` is an error."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise UsageError(f"--set {pair!r} must be NAME=VALUE, for example --set bits=3")
        found[name.strip().replace("-", "_")] = value.strip()
    return found


def typed(cls: type, settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` whose strings are read as the types of the dataclass's fields; other values pass through."""
    if not is_dataclass(cls) and is_dataclass(getattr(cls, "Config", None)):
        cls = cls.Config
    if not is_dataclass(cls):
        return {name: _guess(value) if isinstance(value, str) else value for name, value in settings.items()}
    hints = typing.get_type_hints(cls)
    return {
        name: value if not isinstance(value, str) else _convert(name, value, hints[name]) if name in hints else _guess(value)
        for name, value in settings.items()
    }


def describe(cls: type) -> dict[str, Any]:
    """The parameters of a dataclass method with their defaults."""
    if not is_dataclass(cls):
        return {}
    return {f.name: None if f.default is MISSING else f.default for f in fields(cls) if f.init}


def _convert(name: str, text: str, hint: Any) -> Any:
    options = [a for a in typing.get_args(hint) if a is not type(None)] if _is_union(hint) else [hint]
    if _is_union(hint) and text.lower() in ("none", "null"):
        return None
    for option in options:
        try:
            return _as(text, option)
        except ValueError:
            continue
    wanted = " or ".join(getattr(o, "__name__", str(o)) for o in options)
    raise UsageError(f"{name}={text!r} is not a valid {wanted}")


def _as(text: str, kind: Any) -> Any:
    origin = typing.get_origin(kind) or kind
    if origin is bool:
        if text.lower() in ("true", "yes", "on", "1"):
            return True
        if text.lower() in ("false", "no", "off", "0"):
            return False
        raise ValueError(text)
    if origin in (int, float, str):
        return origin(text)
    if origin is typing.Literal:
        for choice in typing.get_args(kind):
            if str(choice) == text:
                return choice
        raise ValueError(text)
    if origin in (tuple, list):
        inner = (typing.get_args(kind) or (str,))[0]
        return tuple(_as(part.strip(), inner) for part in text.split(",") if part.strip())
    raise ValueError(text)


def _guess(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _is_union(hint: Any) -> bool:
    import types

    return typing.get_origin(hint) in (typing.Union, types.UnionType)
