"""`use` for contracts that are not a change to one's model: recipes train, probes and studies report, models and estimators fit."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from formulary.contracts.report import Report
from formulary.errors import UsageError
from formulary.workshop import fitting, heads, html, saving, using


def _use_recipe(plan, model, options, out, dry_run):
    """Fine-tune with the recipe and, as the fair baseline, without it: same steps, same data, same learning rate."""
    from formulary.lab import train

    if model is None:
        raise UsageError(f"{plan.slug} is a recipe and needs a model to train: a directory, a hub id or lab:NAME")
    target = saving.check_out(out) if out is not None else None
    session = using.open_session(model, options, [plan])
    classes = session.train.facts.get("classes")
    steps, lr = plan.training["steps"], plan.training["learning_rate"]
    base = heads.trainable_copy(session.loaded.model, session.kind, classes)
    data = _with_labels(session.train, classes)
    outcome = using.Outcome(plan.slug, plan.contract, notes=session.notes)
    if dry_run:
        outcome.notes.append(f"dry run: would train {type(base).__name__} for {steps} steps at learning rate {lr:g} on {len(data)} items")
        return outcome
    import copy

    trained = {}
    for name, recipe in (("plain training", None), (plan.slug, plan.instance())):
        trained[name] = copy.deepcopy(base)
        log = train(trained[name], data.sample, steps=steps, lr=lr, recipe=recipe, seed=options.seed)
        trained[name].eval()
    report = Report(plan.slug, plan.shown(), using.parts.count_weights(base), "model")
    report.changed(type(base).__name__, report.weights)
    report.note(f"trained for {steps} steps at learning rate {lr:g}, loss {log.losses[0]:.3g} to {log.final:.3g}")
    outcome.model, outcome.reports = trained[plan.slug], [report]
    with tempfile.TemporaryDirectory() as scratch:
        outcome.rows = session.measure(trained, Path(scratch))
    if target is not None:
        using._write(outcome, [plan], session, target)
    return outcome


def _with_labels(data, classes):
    """Items that carry their class as `labels`, for a head that was just added."""
    if classes is None or "labels" in data.items[0]:
        return data
    from dataclasses import replace

    return replace(data, items=[dict(item, labels=torch.tensor(label)) for item, label in zip(data.items, data.labels)])


def _use_probe(plan, model, options, out, dry_run):
    """Run the probe and write its tables and figures."""
    if model is None:
        raise UsageError(f"{plan.slug} is a probe and needs a model to look at: a directory, a hub id or lab:NAME")
    target = saving.check_out(out) if out is not None else None
    session = using.open_session(model, options, [plan])
    outcome = using.Outcome(plan.slug, plan.contract, notes=session.notes)
    if dry_run:
        outcome.notes.append(f"dry run: would probe {session.loaded.name} on {len(session.train)} items of {session.train.name}")
        return outcome
    outcome.reports = [plan.instance().run(session.loaded.model, session.train)]
    outcome.notes += table_lines(outcome.reports[0])
    _publish(outcome, target, f"{plan.slug} on {session.loaded.name}", {**using.provenance([plan], session)})
    return outcome


def _use_study(plan, model, options, out, dry_run):
    """Redo the paper's figure and list the functions of its analysis."""
    if model is not None:
        raise UsageError(f"{plan.slug} is a study and takes no model")
    target = saving.check_out(out) if out is not None else None
    study = plan.instance()
    outcome = using.Outcome(plan.slug, plan.contract)
    outcome.notes += [f"{row['function']}{row['signature']}: {row['does']}" for row in study.listing()]
    if dry_run:
        return outcome
    outcome.reports = [study.run()]
    outcome.reports[0].tables["functions"] = study.listing()
    outcome.notes += table_lines(outcome.reports[0], skip="functions")
    _publish(outcome, target, plan.slug, {"parameters": {plan.slug: plan.shown()}})
    return outcome


def table_lines(report: Report, skip: str = "", most: int = 12) -> list[str]:
    """The first rows of each table of a report as plain lines."""
    lines = []
    for name, rows in report.tables.items():
        if name == skip or not rows:
            continue
        lines.append(f"{name}: {', '.join(rows[0])}")
        lines += ["  " + ", ".join(_shown(value) for value in row.values()) for row in rows[:most]]
        if len(rows) > most:
            lines.append(f"  ... {len(rows) - most} more rows")
    return lines


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _publish(outcome, target: Path | None, title: str, facts: dict[str, Any]) -> None:
    """Write a report's tables and figures as one HTML page, PNGs and JSON."""
    if target is None:
        return
    report = outcome.reports[0]
    with saving.staged(target) as stage:
        body = [f"<p>{html.escape(outcome.headline)}</p>"]
        for name, spec in report.figures.items():
            file = stage / f"{name.replace(' ', '-')}.png"
            html.draw(spec, file)
            body.append(html.image(file, name))
        for name, rows in report.tables.items():
            if rows:
                body.append(f"<h2>{html.escape(name)}</h2>" + html.table(list(rows[0]), [[_shown(v) for v in r.values()] for r in rows]))
        html.write_atomic(stage / "report.html", html.page(title, "\n".join(body)))
        saving.write_facts(stage, {**outcome.as_dict(), **facts}, f"# {title}\n\n{outcome.headline}\n\nOpen `report.html`.\n")
        names = sorted(file.name for file in stage.iterdir())
    outcome.out, outcome.files = None, [target / name for name in names]


VERBS: dict[str, Callable] = {
    "recipe": _use_recipe,
    "probe": _use_probe,
    "study": _use_study,
    "model": fitting.use_model,
    "estimator": fitting.use_estimator,
}
