"""Applying methods to a model in memory: transforms, attentions and layers, one after the other when joined by `+`."""

import copy
import inspect
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import nn

from formulary.contracts import parts
from formulary.contracts.data import Data
from formulary.contracts.edits import editing
from formulary.contracts.report import Report
from formulary.contracts.transform import build, refuse_nan, why_nothing
from formulary.errors import FormularyError, UsageError, nearest
from formulary.workshop import methods

TRAINING = {"steps": 200, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Plan:
    """One method with its contract, class and checked settings, ready to be applied."""

    slug: str
    contract: str
    cls: type
    settings: dict[str, Any] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Whether the method must see data, with these settings."""
        if self.contract in ("layer", "recipe"):
            return True
        return bool(getattr(self.instance() if is_dataclass(self.cls) else self.cls, "needs_data", False))

    @property
    def training(self) -> dict[str, Any]:
        """`steps` and `learning_rate` where the verb itself trains (layers and recipes)."""
        return {name: type(default)(self.settings.get(name, default)) for name, default in TRAINING.items()}

    def instance(self) -> Any:
        """The method object; for transforms it carries `targets` and `ignore`."""
        own = {k: v for k, v in self.settings.items() if not (self.contract == "recipe" and k in TRAINING)}
        extra = {"targets": self.targets, "ignore": self.ignore} if self.contract == "transform" else {}
        return build(self.cls, {**own, **{k: v for k, v in extra.items() if v}})

    def shown(self) -> dict[str, Any]:
        """Parameters for the record, JSON-ready."""
        if is_dataclass(self.cls):
            return self.instance().parameters()
        return dict(self.settings)


def plan(method: str, settings: dict[str, Any], targets=(), ignore=()) -> list[Plan]:
    """The plans of `a+b`. A setting `a.bits=3` goes to `a` alone, `bits=3` to every part that has it; a setting that no part
    has is an error that names the nearest."""
    names = methods.split_names(method)
    from formulary.catalogue import card

    slugs = [card(name).slug for name in names]
    if len(slugs) > 1 and len(set(slugs)) < len(slugs):
        raise UsageError(f"{method}: the same method twice")
    classes = {slug: _class_for(slug, len(slugs) > 1) for slug in slugs}
    given: dict[str, dict[str, Any]] = {slug: {} for slug in slugs}
    for name, value in settings.items():
        owner, dot, rest = name.partition(".")
        takers = [card(owner).slug] if dot else [s for s in slugs if name in _known(*classes[s])]
        if dot and takers[0] not in given:
            raise UsageError(f"--set {name}: {owner} is not among the methods {', '.join(slugs)}")
        if not takers:
            known = sorted({n for s in slugs for n in _known(*classes[s])})
            raise UsageError(f"{method} has no parameter {name!r}{nearest(name, known)}; parameters: {', '.join(known)}")
        for slug in takers:
            given[slug][rest if dot else name] = value
    plans = []
    for slug in slugs:
        contract, cls = classes[slug]
        one = Plan(slug, contract, cls, methods.typed(cls, given[slug]), tuple(targets), tuple(ignore))
        _validate(one)
        plans.append(one)
    return plans


def _class_for(slug: str, joined: bool) -> tuple[str, type]:
    found = methods.contracts_of(slug)
    contract = next((c for c in found if c in methods.ON_MODELS), next(iter(found), None))
    if contract is None:
        raise FormularyError(f"{slug} exports no class for its contract")
    if joined and contract not in methods.ON_MODELS:
        raise UsageError(f"{slug} is a {contract}, which cannot be joined with + (only {', '.join(methods.ON_MODELS)} can)")
    return contract, found[contract][0]


def _known(contract: str, cls: type) -> list[str]:
    """The names that `--set` may give for a method."""
    if contract == "model":
        return [*methods.describe(cls.Config), "size", *TRAINING]
    if is_dataclass(cls):
        names = [name for name in methods.describe(cls) if name not in ("targets", "ignore")]
        return names + [name for name in TRAINING if contract == "recipe" and name not in names]
    names = [n for n in inspect.signature(cls.__init__).parameters if n not in ("self", "width")]
    return [*names, *TRAINING] if contract == "layer" else names


def _validate(one: Plan) -> None:
    """Make the object (or check names) so that a bad setting fails before any work."""
    if any(value <= 0 for value in one.training.values()):
        raise UsageError(f"{one.slug}: steps and learning_rate must be above 0")
    if is_dataclass(one.cls):
        one.instance()
        return
    known = _known(one.contract, one.cls)
    for name in one.settings:
        if name not in known:
            raise UsageError(f"{one.slug} has no parameter {name!r}{nearest(name, known)}; parameters: {', '.join(known)}")
    if one.contract == "attention":
        _construct(one)


def _construct(one: Plan) -> nn.Module:
    try:
        return one.cls(**one.settings)
    except TypeError as error:
        raise UsageError(f"{one.slug}: {error}") from error


def apply_all(plans: list[Plan], model: nn.Module, data: Data | None) -> tuple[nn.Module, list[Report]]:
    """A changed copy of `model` and the report of each method; `model` itself stays as it is."""
    changed, reports = copy.deepcopy(model), []
    for one in plans:
        apply_one = {"transform": _apply_transform, "attention": _apply_attention, "layer": _apply_layer}[one.contract]
        changed, report = apply_one(one, changed, data)
        reports.append(report)
    return changed.eval(), reports


def _apply_transform(one: Plan, model: nn.Module, data: Data | None) -> tuple[nn.Module, Report]:
    return one.instance().apply(model, data)


def _apply_attention(one: Plan, model: nn.Module, data: Data | None) -> tuple[nn.Module, Report]:
    report = Report(one.slug, one.settings, parts.count_weights(model), "attention module")
    refuse_nan(model)
    with editing(model, one.slug) as edit:
        for part in parts.mixers(model, one.targets, one.ignore):
            edit.edit(part.name, one.cls, **one.settings)
            report.changed(part.name, sum(p.numel() for p in part.module.parameters()))
        if not report.changes:
            raise FormularyError(f"{one.slug} found no attention module in this {type(model).__name__}")
    return model, report


def _apply_layer(one: Plan, model: nn.Module, data: Data | None) -> tuple[nn.Module, Report]:
    """Swap the chosen parts, take over what fits, then train the new parts to reproduce the old model on the data."""
    if data is None:
        raise FormularyError(f"{one.slug} needs data to learn to stand in for what it replaces: give --data")
    report = Report(one.slug, one.settings, parts.count_weights(model), one.cls.replaces)
    refuse_nan(model)
    teacher = copy.deepcopy(model).eval()
    settings = {name: value for name, value in one.settings.items() if name not in TRAINING}
    with torch.random.fork_rng(devices=[]), editing(model, one.slug) as edit:
        torch.manual_seed(data.seed)
        slots = one.cls.swap(model, edit, report, targets=one.targets, ignore=one.ignore, **settings)
        if not report.changes:
            raise FormularyError(f"{one.slug} found nothing to replace in this {type(model).__name__}{why_nothing(model, report)}")
        _distil(model, teacher, slots, data, one.training, report)
    return model, report


def _distil(model, teacher, new: list[nn.Module], data: Data, training: dict, report: Report) -> None:
    from formulary.lab import train

    model.requires_grad_(False)
    for module in new:
        module.requires_grad_(True)
    log = train(
        model, data.sample, steps=training["steps"], lr=training["learning_rate"], loss=_agreement_loss(teacher), seed=data.seed
    )
    report.figures["training loss"] = {
        "kind": "lines", "x": list(range(len(log.losses))), "y": [float(v) for v in log.losses],
        "title": "disagreement with the unchanged model",
    }  # fmt: skip
    report.note(f"distilled for {training['steps']} steps, loss {log.losses[0]:.3g} to {log.losses[-1]:.3g}")


def _agreement_loss(teacher: nn.Module):
    """KL divergence of the logits where there are any, else squared error of the last hidden state relative to its size."""

    def loss(model, batch):
        model.eval()  # dropout would be noise in what is to be reproduced
        with torch.no_grad():
            wanted = teacher(**batch)
        ours = model(**batch)
        real = batch.get("attention_mask")
        if getattr(wanted, "logits", None) is not None and wanted.logits.ndim == 3:
            divergence = nn.functional.kl_div(
                ours.logits.float().log_softmax(-1), wanted.logits.float().log_softmax(-1), log_target=True, reduction="none"
            ).sum(-1)
            keep = real.bool() if real is not None and real.shape == divergence.shape else torch.ones_like(divergence).bool()
            return divergence[keep].mean()
        a, b = ours.last_hidden_state.float(), wanted.last_hidden_state.float()
        keep = real.bool() if real is not None and real.shape == a.shape[:2] else torch.ones(a.shape[:2]).bool()
        return (a - b)[keep].pow(2).mean() / b[keep].pow(2).mean()

    return loss
