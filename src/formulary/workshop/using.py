"""The verb `use`: a method applied to one's own model, with a measured before/after table."""

import platform
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formulary import __version__
from formulary.contracts import parts
from formulary.contracts.data import Data
from formulary.contracts.report import Report
from formulary.errors import FormularyError, UsageError
from formulary.evidence.memory import high_water_mark
from formulary.evidence.timing import FEWEST_ROUNDS
from formulary.workshop import applying, formats, inputs, measuring, models, quality, saving, streaming, tables
from formulary.workshop.disk import DiskModel
from formulary.workshop.journal import facts_of, unfinished
from formulary.workshop.measuring import Row


@dataclass
class Outcome:
    """What `use` returns: the changed model, the reports, the table's rows, and where it was saved (or None)."""

    method: str
    contract: str
    model: Any = None
    reports: list[Report] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    out: Path | None = None
    notes: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    @property
    def headline(self) -> str:
        """What was done and what it brought, in a line or two."""
        said = [report.headline for report in self.reports]
        if self.rows:
            said.append(tables.verdict_line(self.rows))
        return "\n".join(said)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values: what `--json` prints and `formulary.json` keeps."""
        return {
            "method": self.method,
            "contract": self.contract,
            "headline": self.headline,
            "reports": [report.as_dict() for report in self.reports],
            "table": [row.as_dict() for row in self.rows],
            "notes": self.notes,
            "out": str(self.out) if self.out else None,
            "files": [str(f) for f in self.files],
        }

    def __str__(self) -> str:
        pieces = [self.headline]
        if self.rows:
            pieces += ["", tables.as_text(self.rows)]
            if self.rows[-1].why_not_faster:
                pieces += ["", f"Why it is not faster: {self.rows[-1].why_not_faster}."]
        pieces += [f"Note: {note}" for note in self.notes]
        pieces += [f"Wrote {file}" for file in self.files]
        if self.out:
            pieces.append(f"Saved to {self.out}; load it with formulary.load({str(self.out)!r})")
        return "\n".join(pieces)


@dataclass(frozen=True)
class Options:
    """What every verb that works on a model takes; see `use`."""

    data: Any = None
    labels: str | None = None
    dtype: str | None = None
    device: str | None = None
    seed: int = 0
    batch_size: int | None = None
    max_length: int | None = None
    samples: int | None = None
    revision: str | None = None
    rounds: int = measuring.ROUNDS

    def __post_init__(self):
        for name in ("batch_size", "samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if self.rounds < FEWEST_ROUNDS:
            raise UsageError(f"rounds must be at least {FEWEST_ROUNDS}, for the interval of a median, got {self.rounds}")


def use(
    method: str,
    model: Any = None,
    *,
    data: Any = None,
    out: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    targets: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    labels: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    max_length: int | None = None,
    samples: int | None = None,
    revision: str | None = None,
    rounds: int = measuring.ROUNDS,
    max_loss: float | None = None,
    measure: bool = True,
    dry_run: bool = False,
    stream: bool | None = None,
    format: str | None = None,
    **parameters: Any,
) -> Outcome:
    """Apply a method (or several joined by `+`) to a model and measure it before and after.

    `model` is a directory, a hub id, `lab:NAME` or an `nn.Module`, which stays as it is; `data` a path, `lab:NAME` or an
    iterable of texts or images. `settings` and further keywords are the method's parameters. `max_loss` (0.01 = 1 %) refuses a
    result that loses more of the main quality. With `out` the result is written there, complete or not at all, and with
    `format="compressed-tensors"` so that transformers reads it without formulary, where that layout can hold it.

    `stream` works from disk to disk, one block at a time, with methods that look at one block at a time; None does so where the
    model would not fit into memory. What a stopped run has done is in `OUT.partial`, and the same call goes on with it.

    >>> from formulary.lab import tiny
    >>> outcome = use("llm-int8", tiny("vit"), measure=False)
    >>> outcome.reports[0].headline
    'llm-int8 on 12 linear layers, 81 % of the weights'
    """
    plans = applying.plan(method, {**(settings or {}), **parameters}, targets, ignore)
    options = Options(data, labels, dtype, device, seed, batch_size, max_length, samples, revision, rounds)
    contract = plans[0].contract
    formats.check(format, plans)
    if contract in ("transform", "attention", "layer"):
        return _use_on_model(plans, model, options, out, max_loss, measure, dry_run, stream, format)
    if stream:
        raise UsageError(f"--stream: {plans[0].slug} is a {contract}, not a method that works on one block at a time")
    from formulary.workshop import others

    return others.VERBS[contract](plans[0], model, options, out, dry_run)


def _use_on_model(plans, model, options: Options, out, max_loss, measure, dry_run, stream, format) -> Outcome:
    name = "+".join(plan.slug for plan in plans)
    if model is None:
        raise UsageError(f"{name} needs a model: a directory, a hub id or lab:NAME")
    if format is not None and out is None:
        raise UsageError("--format says how the result is written: give --out too")
    path = None if isinstance(model, nn.Module) else models.locate(model, options.revision)
    size = models.count_from_headers(models.weight_files(path))[1] if path else 0
    target = saving.check_out(out, size) if out is not None else None
    if format is not None:
        formats.check(format, plans, models.skeleton(path) if path else model)
    why = streaming.reason(plans, path, size, stream, target, format)
    if dry_run:
        return _dry_run(name, plans, path, model, options, size, target, why)
    if why:
        return _use_streamed(plans[0], model, path, options, size, target, max_loss, measure, why)
    session = open_session(model, options, plans)
    session.notes += streaming.warnings(plans, path, size, target)
    changed, reports = applying.apply_all(plans, session.loaded.model, session.train if session.for_method else None)
    outcome = Outcome(name, plans[0].contract, changed, reports, notes=session.notes)
    if measure:
        with tempfile.TemporaryDirectory() as scratch:
            outcome.rows = session.measure({name: changed}, Path(scratch))
        outcome.rows[-1].headline = reports[-1].headline
        _explain(outcome, changed, session)
        _enforce(max_loss, outcome.rows[-1], target)
    if target is not None:
        _write(outcome, plans, session, target, format)
    return outcome


def _explain(outcome: Outcome, changed: nn.Module, session: "Session") -> None:
    """Say why the last row is not faster where it is not."""
    row = outcome.rows[-1]
    if row.ratio is not None and row.ratio.estimate > 0.97:
        row.why_not_faster = measuring.why_not_faster(changed, session.loaded.model, session.kind, session.held_out)


def _use_streamed(plan, model, path: Path, options: Options, size: int, target: Path, max_loss, measure, why: str) -> Outcome:
    """From disk to disk, block by block. What varies from run to run is said but not written, so that the result does not."""
    fits = streaming.FITS * size <= streaming.available_memory()
    if max_loss is not None and not (measure and fits):
        raise UsageError("max_loss needs the quality measured, and the model does not fit into memory for that" if measure else
                         "max_loss needs the quality measured")  # fmt: skip
    disk = DiskModel(path, dtype=options.dtype, device=options.device)
    name = str(model) if str(model).startswith("lab:") else path.name
    loaded = models.Loaded(disk.model, models.load_processor(path, parts.kind(disk.model)), path, name)
    session = open_session(model, options, [plan], loaded)
    method, data = plan.instance(), session.train if session.for_method else None
    method.admit(disk.model, data)
    saving.check_out(target, size + streaming.activation_bytes(disk.model, method, data))
    with unfinished(target, facts_of(disk, method, data)) as (folder, journal):
        before, blocks = len(journal.blocks()), len(disk.blocks)
        run = streaming.Run(disk, method, data, folder, journal)
        report = run.go()
        run.describe()
        notes = [*session.notes, f"streamed block by block from disk, {blocks} blocks"]
        outcome = Outcome(plan.slug, plan.contract, disk.model, [report], notes=notes)
        memory = high_water_mark()
        changed = _measure_streamed(outcome, plan, session, disk, run.result, memory, fits, max_loss) if measure else None
        facts = {**outcome.as_dict(), **provenance([plan], session)}
        saving.write_facts(run.result, facts, model_card(outcome, [plan], session))
    outcome.model, outcome.out = changed, target
    outcome.notes.append(f"streamed {why}; the run took at most {memory / 1e6:.0f} MB of memory")
    if before:
        outcome.notes.append(f"{before} of {blocks} blocks had been finished by an earlier run")
    return outcome


def _measure_streamed(outcome, plan, session, disk, directory: Path, memory: int, fits: bool, max_loss) -> nn.Module | None:
    """The usual table if the model fits into memory, and the changed model; else what files say, and a note."""
    if fits:
        loaded, options = session.loaded, session.options
        loaded.model = models.load_directory(loaded.path, dtype=options.dtype, device=options.device)
        changed = models.load_directory(directory, device=options.device)
        with tempfile.TemporaryDirectory() as scratch:
            outcome.rows = session.measure({plan.slug: changed}, Path(scratch))
        _explain(outcome, changed, session)
        _enforce(max_loss, outcome.rows[-1], directory)
    else:
        weights = models.count_from_headers(disk.files)[0]
        outcome.rows = [Row("unchanged", disk=measuring.disk_bytes(disk.path)), Row("bf16", disk=2 * weights), Row(plan.slug)]
        outcome.notes.append("time, memory in use and quality were not measured: the model does not fit into memory for that")
        changed = None
    row = outcome.rows[-1]
    row.headline, row.disk, row.run_memory = outcome.reports[-1].headline, measuring.disk_bytes(directory), memory
    return changed


def _enforce(max_loss: float | None, row: Row, target) -> None:
    if max_loss is not None and row.qualities and row.qualities[0].loss() > max_loss:
        main = row.qualities[0]
        raise FormularyError(
            f"the result loses {100 * main.loss():.2g} % of {main.name}, more than --max-loss {100 * max_loss:g} %; "
            + ("nothing was written" if target else "it was not accepted")
        )


def _write(outcome: Outcome, plans, session: "Session", target: Path, format: str | None = None) -> None:
    with saving.staged(target) as stage:
        saving.save_model(outcome.model, stage, session.loaded.path, session.loaded.processor, format)
        if outcome.rows:
            row = outcome.rows[-1]
            row.disk = measuring.disk_bytes(stage)
            row.memory = measuring.measure_memory(stage, session.kind, session.held_out)
        facts = {**outcome.as_dict(), "out": None, **provenance(plans, session)}
        saving.write_facts(stage, facts, model_card(outcome, plans, session, format))
    outcome.out = target


def provenance(plans, session) -> dict[str, Any]:
    """What made a result: versions, machine, source model, data and seed."""
    import transformers

    return {
        "parameters": {plan.slug: plan.shown() for plan in plans},
        "source": session.loaded.name,
        "data": session.train.name,
        "seed": session.options.seed,
        "versions": {
            "formulary": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": platform.machine(),
    }


def model_card(outcome: Outcome, plans, session, format: str | None = None) -> str:
    """README.md of an output directory: what was done, the measured table, and how to load it."""
    from formulary.catalogue import card

    papers = "".join(
        f"- {card(p.slug).title}" + (f" ([arXiv:{card(p.slug).arxiv}](https://arxiv.org/abs/{card(p.slug).arxiv}))" if card(p.slug).arxiv else "") + "\n"
        for p in plans
    )
    edited = bool(session.edits_of(outcome.model))
    load = "import formulary  # lets transformers read the changed layers\n" if edited else ""
    if format == "compressed-tensors":
        load = "# needs compressed-tensors>=0.19\n"
    cls = type(session.loaded.model).__name__
    table = tables.as_markdown(outcome.rows) if outcome.rows else "Not measured."
    return (
        f"# {session.loaded.name} with {outcome.method}\n\n{outcome.headline}\n\n## Measured\n\n{table}\n\n"
        f"CPU time on one thread of {platform.machine()}; quality on held-out items of {session.train.name}, with 95 % intervals.\n\n"
        f"## Load\n\n```python\n{load}from transformers import {cls}\n\nmodel = {cls}.from_pretrained(\"path/to/this/directory\")\n```\n\n"
        f"## Method\n\n{papers}\nMade by formulary {__version__}; all facts are in `formulary.json`.\n"
    )


# ---------------------------------------------------------------- a session: one model, its data, its baselines


@dataclass
class Session:
    """A loaded model with its data, and what is measured once for all methods compared on it."""

    loaded: models.Loaded
    kind: str
    train: Data
    held_out: Data
    options: Options
    for_method: bool
    notes: list[str]

    @staticmethod
    def edits_of(model):
        from formulary.contracts.edits import edits_of

        return edits_of(model)

    def measure(self, changed: dict[str, nn.Module], scratch: Path) -> list[Row]:
        """Rows `unchanged`, `bf16` and one for each changed model, all timed in the same rounds."""
        before = self.loaded.model
        every = {"unchanged": before, "bf16": measuring.bf16_copy(before), **changed}
        reference = quality.reference_outputs(before, self.kind, self.held_out, self.train)
        rows = {name: Row(name) for name in every}
        for name, model in every.items():
            rows[name].qualities = quality.measure(model, self.kind, self.held_out, reference, self.train)
        timing, decode = measuring.time_models(every, self.kind, self.held_out, rounds=self.options.rounds)
        per = measuring.TIMED_ITEMS[self.kind]
        for name, row in rows.items():
            row.seconds, row.ratio = timing.seconds(name) / per, None if name == "unchanged" else timing.ratio(name)
            if decode is not None:
                row.decode_seconds = decode.seconds(name) / measuring.DECODED
                row.decode_ratio = None if name == "unchanged" else decode.ratio(name)
        self.timing = timing
        for name, model in every.items():
            self._weigh(rows[name], model, scratch)
        return list(rows.values())

    def _weigh(self, row: Row, model: nn.Module, scratch: Path) -> None:
        """Bytes on disk and peak memory, from a directory: the model's own, or a scratch copy that is removed again."""
        directory = self.loaded.path if row.name == "unchanged" else None
        if directory is None:
            directory = scratch / row.name.replace("/", "_")
            saving.save_model(model, directory, None, None)
        row.disk = measuring.disk_bytes(directory)
        row.memory = measuring.measure_memory(directory, self.kind, self.held_out)
        if directory != self.loaded.path:
            import shutil

            shutil.rmtree(directory)


def open_session(model: Any, options: Options, plans: list, loaded: models.Loaded | None = None) -> Session:
    """Load the model, unless it is there, and its data. Without `data`, lab models are measured on lab data; a method that must
    learn from data needs it given, except on lab models."""
    loaded = loaded or models.load_model(model, dtype=options.dtype, device=options.device, revision=options.revision)
    kind = loaded.kind
    if kind == "module":
        raise FormularyError(f"{loaded.name} has no Transformer blocks that formulary knows: use a transformers model")
    if kind == "decoder" and not hasattr(loaded.model, "lm_head") and loaded.model.get_output_embeddings() is None:
        raise FormularyError(f"{loaded.name} is a {type(loaded.model).__name__} without a language-model head: load the causal-LM model")
    spec, notes, given = options.data, list(loaded.notes), options.data is not None
    if not given:
        spec = inputs.DEFAULTS.get(loaded.name, "lab:photographs" if kind == "vision" else "lab:kjv")
        needy = [plan.slug for plan in plans if plan.needs_data]
        if needy and loaded.name not in inputs.DEFAULTS:
            raise FormularyError(f"{needy[0]} needs data of yours to calibrate or train on: give --data")
        notes.append(f"no data was given: measured on {spec}")
    train, held_out = inputs.prepare(
        spec, loaded.model, kind, loaded.processor, labels=options.labels, seed=options.seed,
        batch_size=options.batch_size, max_length=options.max_length, samples=options.samples,
    )  # fmt: skip
    return Session(loaded, kind, train, held_out, options, given or loaded.name in inputs.DEFAULTS, notes)


def _dry_run(name, plans, path, model, options: Options, size: int, target, why: str | None) -> Outcome:
    """What would be done, from headers and a weightless skeleton alone."""
    skeleton = model if path is None else models.skeleton(path)
    kind = parts.kind(skeleton)
    for plan in plans:
        supports = getattr(plan.cls, "supports", None)
        if supports is not None and kind not in supports:
            raise FormularyError(f"{plan.slug} does not support {kind} models; it supports: {', '.join(sorted(supports))}")
    chosen = parts.linears(skeleton, plans[0].targets, plans[0].ignore)
    total = parts.count_weights(skeleton)
    covered = sum(part.weights for part in chosen)
    notes = [
        "dry run: nothing was computed or written",
        f"{type(skeleton).__name__}, {kind}, {total / 1e6:.1f} M weights, {size / 1e6:.1f} MB on disk, {len(parts.blocks(skeleton))} blocks",
        f"{len(chosen)} linear layers within reach, {100 * covered / max(1, total):.0f} % of the weights",
        *(f"{plan.slug} with {', '.join(f'{k}={v}' for k, v in plan.shown().items() if v not in ((), [])) or 'no parameters'}" for plan in plans),
        *([_streamed_sizes(plans[0], skeleton, path, kind, options, why)] if why else []),
        *([] if why else [f"about {3 * size / 1e6:.0f} MB of memory for the model, its copy and the bf16 baseline"]),
    ]
    if target is not None:
        notes.append(f"would write {target}, at most about {size / 1e6:.0f} MB")
    if options.data is not None:
        raw = inputs.read(options.data, labels=options.labels)
        notes.append(f"data {raw.name}: {len(raw.items)} {raw.kind}")
    return Outcome(name, plans[0].contract, notes=notes)


def _streamed_sizes(plan, skeleton: nn.Module, path: Path, kind: str, options: Options, why: str) -> str:
    """What a streamed run would take of the disk, beside the result, and of memory."""
    method = plan.instance()
    if options.data is None and method.observes:
        return f"would be streamed {why}; give --data to see how much memory and disk that takes"
    if options.dtype is not None:
        skeleton = skeleton.to(models._dtype(options.dtype))
    data = None
    if method.observes:
        data, _ = inputs.prepare(
            options.data, skeleton, kind, models.load_processor(path, kind), labels=options.labels, seed=options.seed,
            batch_size=options.batch_size, max_length=options.max_length, samples=options.samples,
        )  # fmt: skip
    kept, peak = streaming.activation_bytes(skeleton, method, data), streaming.peak_bytes(skeleton, method, data)
    return (
        f"would be streamed {why}: about {peak / 1e6:.0f} MB of memory,"
        f" and {kept / 1e6:.1f} MB of activations in memory-mapped files beside the result"
    )
