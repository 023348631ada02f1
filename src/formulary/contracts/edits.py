"""Edits: one change to one module of a model, undone together on failure, and replayed from JSON when a directory is loaded.

An edit is `{"name": dotted module name, "cls": "room:Class", "args": JSON scalars}`. Four kinds of class can be named, each with
`attach(model, name, **args)`: a `Replacement` (a module in another's place), a `BlockEdit` (acts inside a block), an
`Attention` (computes the attention of one module) and a `Layer` (a token mixer or feed-forward). Files name classes only among
those that rooms export, so a file can never run code. `transforms` make edits through `editing(model)`, which restores
everything when the body fails.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from formulary.contracts import _seams
from formulary.errors import FormularyError

_REGISTERED: dict[str, type] = {}


def register(key: str, cls: type) -> type:
    """Make a class of this process usable in edits under `key` ("mine:Drop"); the loading process must register it too."""
    _REGISTERED[key] = cls
    return cls


def resolve(key: str) -> type:
    """The class that "room:Class" names, among registered ones and those that the room exports."""
    if key in _REGISTERED:
        return _REGISTERED[key]
    from formulary.catalogue.rooms import load_room

    slug, _, name = str(key).partition(":")
    room = load_room(slug)
    cls = vars(room).get(name)
    if not (isinstance(cls, type) and hasattr(cls, "attach")):
        raise FormularyError(f"edit names {key!r}, but the room {slug!r} exports no such part")
    return cls


def key_of(slug: str, cls: type) -> str:
    """The key under which a loading process will find `cls`; an error for the author when it would not."""
    for key, registered in _REGISTERED.items():
        if registered is cls:
            return key
    key = f"{slug}:{cls.__name__}"
    if resolve(key) is not cls:
        raise FormularyError(f"{cls.__qualname__} is not what {key!r} resolves to: export it from the room's __init__.py")
    return key


# ---------------------------------------------------------------- what can be edited in


class Replacement(nn.Module):
    """A module that takes another's place. The constructor's arguments are JSON scalars and size it without looking at data.

    One that stands for a linear keeps a readable `.weight` (a property will do), and no buffer is non-persistent.
    """

    @classmethod
    def attach(cls, model: nn.Module, name: str, **args) -> nn.Module:
        """Build `cls(**args)` and put it at `name`."""
        new = cls(**args)
        _set_submodule(model, name, new)
        return new


class BlockEdit:
    """A mixin that acts inside a Transformer block by becoming the block's class; with the hooks below left alone, nothing changes.

    Subclass it and override hooks, calling `super()` in each so that several edits stack on one block. `setup(model, **args)`
    runs once on the block after the swap and stores arguments as attributes or adds submodules.

    >>> class Negate(BlockEdit):
    ...     def after(self, hidden):
    ...         return -super().after(hidden)
    """

    @classmethod
    def attach(cls, model: nn.Module, name: str, **args) -> nn.Module:
        """Swap the class of the block `name` for one that derives from `cls` and from the block's own class."""
        block = model.get_submodule(name)
        if _seams.find(type(block)) is None:
            known = ", ".join(_seams.SEAMS)
            raise FormularyError(f"{name} is a {type(block).__name__}, which has no seam to act inside; known blocks: {known}")
        if isinstance(block, cls):
            raise FormularyError(f"{name} already carries {cls.__name__}: it cannot be applied twice to one block")
        block.__class__ = type(f"{cls.__name__}{type(block).__name__}", (cls, type(block)), {"__module__": cls.__module__})
        block.setup(model, **args)
        return block

    def setup(self, model: nn.Module, **args) -> None:
        """Store the edit's arguments on the block; submodules added here are saved with the model."""
        for key, value in args.items():
            setattr(self, key, value)

    def before(self, hidden: Tensor) -> Tensor:
        """(B,L,D) at the block's entry."""
        return hidden

    def middle(self, hidden: Tensor) -> Tensor:
        """(B,L,D) between the attention residual and the feed-forward; may return fewer tokens."""
        return hidden

    def branch(self, hidden: Tensor) -> Tensor | None:
        """(B,L,D) to add beside the feed-forward, computed from its input (before its norm), or None."""
        return None

    def after(self, hidden: Tensor) -> Tensor:
        """(B,L,D) at the block's exit."""
        return hidden

    def forward(self, hidden_states: Tensor, *args, **kwargs):
        seam = _seams.find(type(self))
        hidden, extras = seam.attend(self, self.before(hidden_states), *args, **kwargs)
        hidden = self.middle(hidden)
        hidden = seam.feed_forward(self, hidden, self.branch(hidden))
        return seam.pack(self.after(hidden), extras)


# ---------------------------------------------------------------- making edits


class Editor:
    """Changes to one model that can all be undone. Made by `editing`."""

    def __init__(self, model: nn.Module, slug: str):
        self.model, self.slug = model, slug
        self.made: list[dict[str, Any]] = []
        self._undo: list[Callable[[], None]] = []

    def edit(self, name: str, cls: type, **args) -> nn.Module:
        """Attach `cls` at the module `name`, to be replayed with the same `args` on loading; returns the new or swapped module.

        The new module's tensors take the device and float dtype of what it replaces.
        """
        entry = {"name": name, "cls": key_of(self.slug, cls), "args": args}
        self._remember(name)
        old = self.model.get_submodule(name)
        tensor = next(old.parameters(), None)
        dtype = tensor.dtype if tensor is not None and tensor.is_floating_point() else torch.get_default_dtype()
        tied = self._is_tied(old)
        with _default(dtype, tensor.device if tensor is not None else torch.device("cpu")):
            new = cls.attach(self.model, name, **args)
        if tied and new is not old:
            self._untie()
        new.train(old.training)
        self.made.append(entry)
        return new

    def _is_tied(self, module: nn.Module) -> bool:
        """Whether it is the input embedding or the output head of a model in which these share their weight."""
        if not hasattr(self.model, "get_output_embeddings"):
            return False
        ends = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        weights = [getattr(end, "weight", None) for end in ends]
        return any(module is end for end in ends) and weights[0] is not None and weights[0] is weights[1]

    def _untie(self) -> None:
        """What took the place of an embedding or a head has a weight of its own; loading must not tie it again."""
        for config in {id(config): config for config in (self.model.config, self.model.config.get_text_config())}.values():
            if getattr(config, "tie_word_embeddings", False):
                self.on_failure(lambda config=config: setattr(config, "tie_word_embeddings", True))
                config.tie_word_embeddings = False

    def set(self, parameter: Tensor, value: Tensor) -> None:
        """Overwrite a parameter or buffer in place; the old values come back on failure."""
        old = parameter.detach().clone()
        self._undo.append(lambda: parameter.data.copy_(old))
        parameter.data.copy_(value)

    def keep(self, *modules: nn.Module) -> None:
        """Remember all parameters and buffers of `modules`, to be restored on failure: call it before training them."""
        for module in modules:
            for tensor in [*module.parameters(), *module.buffers()]:
                old = tensor.detach().clone()
                self._undo.append(lambda tensor=tensor, old=old: tensor.data.copy_(old))

    def on_failure(self, undo: Callable[[], None]) -> None:
        """Run `undo` if the method fails after this point."""
        self._undo.append(undo)

    def settle(self) -> None:
        """Let go of what undoing needs: what was done so far will stay."""
        self._undo.clear()

    def _remember(self, name: str) -> None:
        """Everything that an edit at `name` may touch: the parent's child, the module's class, attributes and members."""
        parent_name, _, child = name.rpartition(".")
        parent = self.model.get_submodule(parent_name)
        module = getattr(parent, child) if not child.isdigit() else parent[int(child)]
        before, cls = dict(module.__dict__), type(module)
        members = {key: dict(before[key]) for key in ("_modules", "_parameters", "_buffers")}

        def undo():
            _set_submodule(self.model, name, module)
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(before)
            for key, value in members.items():
                module.__dict__[key] = value

        self._undo.append(undo)

    def undo(self) -> None:
        """Take everything back, last change first."""
        with torch.no_grad():
            for step in reversed(self._undo):
                step()


@contextmanager
def editing(model: nn.Module, slug: str) -> Iterator[Editor]:
    """Edit `model` in place; on any failure, Ctrl-C included, the model is as it was. On success the edits are on record.

    Training modes and `requires_grad` flags of surviving tensors are as they were in either case.
    """
    editor = Editor(model, slug)
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None)
    try:
        yield editor
    except BaseException:
        editor.undo()
        if config is not None and getattr(config, "_attn_implementation", None) != attention:
            model.set_attn_implementation(attention)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    if editor.made:
        record(model, edits_of(model) + editor.made)


def edits_of(model: nn.Module) -> list[dict[str, Any]]:
    """The edits that this model carries, in the order in which they were made."""
    return list(getattr(_holder(model), "edits", []))


def record(model: nn.Module, edits: list[dict[str, Any]]) -> None:
    """Put `edits` on the model, where `save_pretrained` writes them into config.json and loading replays them."""
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        from formulary.contracts._quantizer import FormularyConfig, FormularyQuantizer

        config = FormularyConfig(edits=edits)
        model.config.quantization_config = config
        model.hf_quantizer = FormularyQuantizer(config)
        model.quantization_method = config.quant_method
    else:
        model.formulary_edits = _Edits(edits)


def check_entries(edits: Any) -> None:
    """Refuse what is not a list of `{"name": str, "cls": str, "args": object}`."""
    for entry in edits if isinstance(edits, list) else [edits]:
        kinds = {"name": str, "cls": str, "args": dict}
        if not isinstance(entry, dict) or set(entry) != set(kinds) or any(not isinstance(entry[k], t) for k, t in kinds.items()):
            raise FormularyError(f'config.json: an edit must be {{"name": text, "cls": text, "args": object}}, not {entry!r}')


def replay(model: nn.Module, edits: list[dict[str, Any]]) -> None:
    """Make the edits again on a skeleton (meta device) or a fresh model; a malformed edit is a one-line error."""
    check_entries(edits)
    for entry in edits:
        try:
            resolve(entry["cls"]).attach(model, entry["name"], **entry["args"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            first = str(error).split("\n")[0]
            raise FormularyError(f"edit {entry!r} cannot be made on {type(model).__name__}: {first}") from error


class _Edits:
    """The edits of a model that has no transformers config."""

    def __init__(self, edits):
        self.edits = edits


def _holder(model: nn.Module):
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return config if config is not None else getattr(model, "formulary_edits", None)


def _set_submodule(model: nn.Module, name: str, new: nn.Module) -> None:
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if child.isdigit() and isinstance(parent, (nn.ModuleList, nn.Sequential)):
        parent[int(child)] = new
    else:
        setattr(parent, child, new)


@contextmanager
def _default(dtype: torch.dtype, device: torch.device):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
