"""The transform contract: a frozen dataclass that changes a model (quantize, prune, factorize, merge, distil, adapt) and reports."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import nn

from formulary.contracts import parts
from formulary.contracts.blockwise import Blockwise, inside, outside
from formulary.contracts.data import Data
from formulary.contracts.edits import Editor, editing, edits_of
from formulary.contracts.parts import Block, Linear
from formulary.contracts.report import Report
from formulary.errors import FormularyError, UsageError, nearest
from formulary.kernels.memory import keeping_freed


@dataclass(frozen=True, kw_only=True)
class Transform:
    """Subclass it as a frozen dataclass whose fields are the method's parameters with the paper's defaults.

    Implement `run(model, data, edit, report)`: change `model` through `edit` (so that failure undoes it), tell `report` every
    part changed or skipped, and return None, or a new model when the method makes one. Validate parameters in `__post_init__`
    (call `super().__post_init__()`), raising `UsageError` with the value and what is allowed.

    `shift_invariant` is False for a method that rounds after rotary positions were applied: the result of a model with relative
    positions then depends, by a rounding step, on where padding puts a text, unless `position_ids` are given (`generate` does).

    `targets` and `ignore` choose parts by globs over dotted names or by class names.

    A method that looks at one block at a time is a `BlockTransform` instead, which `use` can stream.
    """

    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    supports: ClassVar[frozenset[str]] = frozenset(parts.KINDS)
    needs_data: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    adapter: ClassVar[bool] = False
    unit: ClassVar[str] = "linear layer"
    shift_invariant: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("targets", "ignore"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

    @property
    def slug(self) -> str:
        """The method's name in the catalogue."""
        return slug_of(type(self))

    def parameters(self) -> dict[str, Any]:
        """The method's parameters as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def apply(self, model: nn.Module, data: Data | None = None) -> tuple[nn.Module, Report]:
        """Apply the method; returns the model (the same object where it was changed in place) and what was done.

        Raises FormularyError when the model's kind is not supported, data is missing, or nothing could be changed; the model is
        then as it was.
        """
        self.admit(model, data)
        report = Report(self.slug, self.parameters(), parts.count_weights(model), self.unit)
        devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
        with torch.random.fork_rng(devices=devices), keeping_freed(), editing(model, self.slug) as edit:
            torch.manual_seed(data.seed if data is not None else 0)
            refuse_nan(model)
            changed = self.run(model, data, edit, report)
            refuse_unchanged(model, report)
        return (model if changed is None else changed), report

    def admit(self, model: nn.Module, data: Data | None) -> None:
        """Refuse a model of a kind that is not supported, and missing data."""
        kind = parts.kind(model)
        if kind not in self.supports:
            raise FormularyError(
                f"{self.slug} does not support {_a(kind)} ({type(model).__name__}); it supports: {', '.join(sorted(self.supports))}"
            )
        if self.needs_data and data is None:
            raise FormularyError(f"{self.slug} needs data to {'train' if self.trains else 'calibrate'} on: give --data")

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> nn.Module | None:
        """The method itself."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BlockTransform(Transform):
    """A transform that works on one block after the other, so that `use` can stream a model that is larger than memory.

    Implement `run_block(block, linears, walk, edit, report)` in place of `run`: change the `linears` of this block through
    `edit`, looking at nothing but the block and, through `walk` (`contracts.blockwise.Blockwise`), at what flows into it.
    `run` does that for a model in memory; `formulary use --stream` does it for one on disk, whose other blocks have no
    weights at the time, and both give the same bits. `block` is None for linears outside all blocks, which come last.

    `observes` is False where no block looks at data: `walk` is then None. `halves` is True where calibration is as good with
    products in bfloat16 (`Blockwise`).
    """

    observes: ClassVar[bool] = True
    halves: ClassVar[bool] = False

    @property
    def streams(self) -> bool:
        """Whether the whole method works block by block with these settings."""
        return True

    @property
    def beyond(self) -> bool:
        """Whether `conclude` changes what lies outside the blocks with these settings."""
        return False

    def choose(self, model: nn.Module, report: Report) -> list[Linear]:
        """The linears to change, from names and shapes alone; those left out are skips of the report."""
        return parts.linears(model, self.targets, self.ignore)

    def run_block(
        self, block: Block | None, linears: list[Linear], walk: Blockwise | None, edit: Editor, report: Report
    ) -> None:
        """The method itself, on one block."""
        raise NotImplementedError

    def conclude(self, model: nn.Module, edit: Editor, report: Report) -> None:
        """What is left once all blocks are done: notes, and changes outside the blocks where `beyond` says so."""

    def working_bytes(self, linears: list[Linear]) -> int:
        """About how many bytes `run_block` takes for a block of these linears, beside the block and its changed twin."""
        return max((16 * part.weights for part in linears), default=0)  # float32 copies of one weight

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        chosen = self.choose(model, report)
        walk = Blockwise(model, data, halves=self.halves) if self.observes else None
        left = len(chosen)
        for block in parts.blocks(model):
            here = inside(chosen, block)
            if here:
                self.run_block(block, here, walk, edit, report)
            left -= len(here)
            if not left:
                break
            if walk is not None:
                walk.advance(block)
        if left:
            self.run_block(None, outside(chosen, model), walk, edit, report)
        self.conclude(model, edit, report)


def why_nothing(model: nn.Module, report: Report) -> str:
    """Why a method found nothing to change: what it skipped, or what methods before it replaced; empty when neither."""
    if report.skips:
        return f": {report.skips[0].note}"
    before = list(dict.fromkeys(entry["cls"].partition(":")[0] for entry in edits_of(model)))
    if not before:
        return ""
    return f", whose parts {' and '.join(before)} has already replaced: give the methods in another order, or one of them alone"


def refuse_unchanged(model: nn.Module, report: Report) -> None:
    """Raise when a method changed nothing."""
    if not report.changes:
        raise FormularyError(f"{report.method} found nothing to change in this {type(model).__name__}{why_nothing(model, report)}")


def refuse_nan(model: nn.Module, within: str = "") -> None:
    """Raise when a weight is NaN or infinite, naming it; `within` is the dotted name of `model` in a larger one."""
    for name, value in model.named_parameters(prefix=within):
        seen = value.is_floating_point() and value.device.type != "meta" and value.numel()
        if seen and not all(bool(torch.isfinite(end)) for end in value.detach().aminmax()):  # both are NaN where any value is
            raise FormularyError(f"weight {name} has NaN or infinite values: the model file is damaged or training diverged")


def slug_of(cls: type) -> str:
    """The catalogue name of the room in which `cls` is defined, or the class's own name outside a room."""
    path = cls.__module__.split(".")
    if path[:2] == ["formulary", "papers"] and len(path) > 3:
        return path[3].removeprefix("paper_").replace("_", "-")
    return cls.__name__.lower()


def build(cls: type, settings: dict[str, Any]) -> Any:
    """`cls(**settings)` for a dataclass, with unknown names refused by the nearest known one.

    >>> from formulary.papers.quantization.gptq import GPTQ
    >>> build(GPTQ, {"bist": 3})
    Traceback (most recent call last):
    formulary.errors.UsageError: gptq has no parameter 'bist'; did you mean 'bits'?; parameters: targets, ...
    """
    known = [field.name for field in fields(cls) if field.init]
    for name in settings:
        if name not in known:
            raise UsageError(
                f"{slug_of(cls)} has no parameter {name!r}{nearest(name, known)}; parameters: {', '.join(known)}"
            )
    return cls(**settings)


def check_range(owner: str, name: str, value: int | float, low: int | float, high: int | float) -> None:
    """Refuse a parameter outside [low, high], saying what is allowed."""
    if not low <= value <= high:
        raise UsageError(f"{owner}: {name} must be between {low} and {high}, got {value}")


def _a(noun: str) -> str:
    return f"an {noun} model" if noun[0] in "aeiou" else f"a {noun} model"


@contextmanager
def in_float32(*models: nn.Module) -> Iterator[None]:
    """Within the context all floats of the models are float32, in which small steps are not lost to rounding; afterwards
    each has its own dtype again.

    >>> model = nn.Linear(2, 2).bfloat16()
    >>> with in_float32(model):
    ...     model.weight.dtype
    torch.float32
    >>> model.weight.dtype
    torch.bfloat16
    """
    kept = [(t, t.dtype) for model in models for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    for tensor, _ in kept:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in kept:
            tensor.data = tensor.data.to(dtype)
