"""`use` for models and estimators: train on the user's images, tables, samples or series, judge on what was held out, save.

`formulary use cct --data IMAGES --out DIR` trains; `formulary.load(DIR).predict(...)` answers. An estimator also writes its
predictions for the held-out rows, or the forecast that follows the series, as CSV.
"""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formulary.contracts.report import Report
from formulary.errors import FormularyError, UsageError
from formulary.workshop import inputs, saving, using
from formulary.workshop.applying import TRAINING, Plan

HELD_OUT = 0.25


# ---------------------------------------------------------------- models


def use_model(plan: Plan, model: Any, options, out, dry_run) -> "using.Outcome":
    """Train a model of the paper from scratch and judge it on held-out data."""
    from formulary.lab import train

    if model is not None:
        raise UsageError(f"{plan.slug} is a model that is trained from scratch: it takes no model, only --data")
    if options.data is None:
        raise UsageError(f"{plan.slug} needs --data: {_WANTED[plan.cls.accepts]}")
    target = saving.check_out(out) if out is not None else None
    settings = {k: v for k, v in plan.settings.items() if k not in TRAINING}
    size = settings.pop("size", None)
    read = {"images": _read_images, "pairs": _read_pairs, "table": _read_table}.get(plan.cls.accepts)
    if read is None:
        raise FormularyError(f"{plan.slug} trains on an {plan.cls.accepts}, which `use` cannot make from --data")
    train_part, test_part, decided = read(plan, options, settings)
    torch.manual_seed(options.seed)
    built = plan.cls.build(size, **{**decided, **settings})
    recipe = {**plan.cls.training, **({"batch_size": options.batch_size} if options.batch_size else {})}
    batch_size = recipe.pop("batch_size")
    recipe.update({own: plan.training[name] for name, own in (("steps", "steps"), ("learning_rate", "lr")) if name in plan.settings})
    outcome = using.Outcome(plan.slug, plan.contract, built)
    n = len(next(iter(train_part.values())))
    weights = sum(p.numel() for p in built.parameters())
    if dry_run:
        outcome.notes.append(f"dry run: would train {weights:,} weights on {n} items for {recipe['steps']} steps of {batch_size}")
        return outcome
    sample = _sampler(train_part, batch_size, options.seed, plan.cls.accepts)
    built.start(_first(train_part, 4096))
    log = train(built, sample, loss=lambda m, b: m.loss(b), seed=options.seed, **recipe)
    built.eval()
    report = Report(plan.slug, {**settings, "size": size, **recipe, "batch_size": batch_size}, weights, "model")
    report.changed(type(built).__name__, weights)
    report.note(f"trained on {n} items for {len(log.losses)} steps, loss {log.losses[0]:.3g} to {log.final:.3g}")
    outcome.reports = [report]
    outcome.notes += _judge_model(plan, built, test_part)
    if target is not None:
        with saving.staged(target) as stage:
            built.save(stage)
            _facts(stage, outcome, plan, options)
        outcome.out = target
    return outcome


_WANTED = {
    "images": "a folder of images with one subfolder a class, or lab:mnist5k",
    "pairs": "two CSVs of samples joined by a comma, FROM.csv,TO.csv",
    "table": "a CSV with a column of labels (--labels NAME)",
    "series": "a CSV with one row a time step, or lab:sea-temperature",
    "environment": "the name of a Gymnasium environment",
}


def _read_images(plan: Plan, options, settings) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    raw = inputs.read(options.data, labels=options.labels)
    if raw.kind != "images" or raw.labels is None:
        raise FormularyError(f"{raw.name} holds no labeled images; {plan.slug} needs {_WANTED['images']}")
    classes = sorted(set(raw.labels) | set(raw.test_labels or []), key=lambda v: (str(type(v)), v))
    size = settings.get("image_size") or min(min(image.size) for image in raw.items[:64])
    items, marks = inputs._shuffle(raw.items, raw.labels, options.seed)
    if raw.test is None:
        cut = len(items) - max(1, int(HELD_OUT * len(items)))
        test, test_marks, items, marks = items[cut:], marks[cut:], items[:cut], marks[:cut]
    else:
        test, test_marks = raw.test, raw.test_labels
    if options.samples:
        items, marks = items[: options.samples], marks[: options.samples]
    channels = settings.get("channels") or (1 if all(_is_gray(image) for image in items[:32]) else 3)
    index = {value: i for i, value in enumerate(classes)}
    pixels = _pixels(items, size, channels)
    mean, std = pixels.mean((0, 2, 3), keepdim=True), pixels.std((0, 2, 3), keepdim=True).clamp_min(1e-3)
    part = lambda images, of: {"pixel_values": (images - mean) / std, "labels": torch.tensor([index[m] for m in of])}
    decided = {"image_size": size, "channels": channels, "classes": len(classes)}
    return part(pixels, marks), part(_pixels(test, size, channels), test_marks), decided


def _is_gray(image) -> bool:
    values = np.asarray(image)
    return values.ndim == 2 or bool((values[..., 0] == values[..., 1]).all() and (values[..., 0] == values[..., 2]).all())


def _pixels(images, size: int, channels: int) -> Tensor:
    """(N, channels, size, size) in 0..1."""
    mode = "L" if channels == 1 else "RGB"
    arrays = [np.asarray(image.convert(mode).resize((size, size)), dtype=np.float32) / 255 for image in images]
    stacked = torch.from_numpy(np.stack(arrays))
    return stacked[:, None] if channels == 1 else stacked.permute(0, 3, 1, 2).contiguous()


def _read_pairs(plan: Plan, options, settings):
    paths = str(options.data).split(",")
    if len(paths) != 2:
        raise UsageError(f"{plan.slug} needs --data {_WANTED['pairs']}")
    x0, x1 = (torch.from_numpy(_matrix(Path(path))[0]).float() for path in paths)
    if x0.shape[1] != x1.shape[1]:
        raise FormularyError(f"{paths[0]} has {x0.shape[1]} columns and {paths[1]} has {x1.shape[1]}: they must be equal")
    cut0, cut1 = (len(x) - max(1, int(HELD_OUT * len(x))) for x in (x0, x1))
    return {"x0": x0[:cut0], "x1": x1[:cut1]}, {"x0": x0[cut0:], "x1": x1[cut1:]}, {"dim": x0.shape[1]}


def _read_table(plan: Plan, options, settings):
    X, y, _ = _shuffled(*_table(Path(options.data), options.labels), options.seed)
    cut = len(X) - max(1, int(HELD_OUT * len(X)))
    to = lambda a, b: {"inputs": torch.from_numpy(X[a:b]).float(), "labels": torch.as_tensor(y[a:b])}
    return to(0, cut), to(cut, None), {"features": X.shape[1]}


def _sampler(part: dict[str, Tensor], batch_size: int, seed: int, accepts: str):
    """`step -> batch`; samples of pairs are drawn independently, rows of anything else together."""

    def sample(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        draw = lambda n: torch.randint(n, (batch_size,), generator=generator)
        if accepts == "pairs":
            return {key: value[draw(len(value))] for key, value in part.items()}
        chosen = draw(len(next(iter(part.values()))))
        return {key: value[chosen] for key, value in part.items()}

    return sample


def _first(part: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    return {key: value[:n] for key, value in part.items()}


@torch.no_grad()
def _judge_model(plan: Plan, model, test: dict[str, Tensor]) -> list[str]:
    """What the held-out part says, with a 95 % interval."""
    if plan.cls.accepts == "images":
        right = torch.cat(
            [(model.predict(p).argmax(-1) == y).double() for p, y in zip(test["pixel_values"].split(64), test["labels"].split(64))]
        )
        most = test["labels"].bincount().max() / len(right)
        return [f"held-out accuracy {_mean(right)} over {len(right)} images (always the commonest class: {most:.3f})"]
    if plan.cls.accepts == "pairs":
        moved = model.predict(test["x0"])
        gap = (moved.mean(0) - test["x1"].mean(0)).norm() / test["x1"].std(0).norm()
        before = (test["x0"].mean(0) - test["x1"].mean(0)).norm() / test["x1"].std(0).norm()
        return [f"held-out samples moved to the target: means differ by {gap:.3f} of its spread (before: {before:.3f})"]
    return [f"held-out loss {float(model.loss(test)):.4g}"]


def _mean(values: Tensor) -> str:
    half = 1.96 * float(values.std()) / len(values) ** 0.5
    return f"{float(values.mean()):.3f} [{float(values.mean()) - half:.3f}, {float(values.mean()) + half:.3f}]"


# ---------------------------------------------------------------- estimators


def use_estimator(plan: Plan, model: Any, options, out, dry_run) -> "using.Outcome":
    """Fit an estimator on a CSV or a lab series and write its predictions."""
    if model is not None:
        raise UsageError(f"{plan.slug} is an estimator: it takes no model, only --data")
    if options.data is None:
        raise UsageError(f"{plan.slug} needs --data: {_WANTED[plan.cls.accepts]}")
    target = saving.check_out(out) if out is not None else None
    settings = {k: v for k, v in plan.settings.items() if k not in TRAINING or k in plan.cls._get_param_names()}
    estimator = plan.cls.build(**settings)
    outcome = using.Outcome(plan.slug, plan.contract, estimator)
    fit = _fit_series if plan.cls.accepts == "series" else _fit_table
    try:
        table, report = fit(plan, estimator, options, dry_run)
    except ValueError as error:
        raise FormularyError(f"{plan.slug}: {' '.join(str(error).split())}") from error
    outcome.reports = [report]
    if dry_run:
        outcome.notes.append("dry run: nothing was fitted or written")
        return outcome
    if target is not None:
        with saving.staged(target) as stage:
            estimator.save(stage)
            saving.write_atomic(stage / "predictions.csv", _csv(*table))
            _facts(stage, outcome, plan, options)
        outcome.out, outcome.files = target, [target / "predictions.csv"]
    return outcome


def _fit_series(plan: Plan, estimator, options, dry_run):
    """Fit on the first part of a series, judge one-window forecasts on the rest against repeating the last value, then fit on all."""
    series, names = _series(options.data)
    cut = int(len(series) * (1 - HELD_OUT))
    report = Report(plan.slug, estimator.parameters(), series.size, "series")
    if dry_run:
        return None, report
    estimator.fit_series(series[:cut])
    horizon = np.atleast_2d(estimator.forecast(series[:cut]).T).T.shape[0]
    starts = range(cut, len(series) - horizon, max(1, (len(series) - horizon - cut) // 50))
    errors = {plan.slug: [], "repeat the last value": []}
    for at in starts:
        future = series[at : at + horizon]
        guess = np.asarray(estimator.forecast(series[:at])).reshape(future.shape)
        errors[plan.slug].append(float(np.abs(guess - future).mean()))
        errors["repeat the last value"].append(float(np.abs(series[at - 1] - future).mean()))
    if not errors[plan.slug]:
        raise FormularyError(f"the series has {len(series)} steps, too few to hold out a window of {horizon}: give more")
    report.changed("forecast", series.size)
    rows = [dict(method=name, **_interval(values)) for name, values in errors.items()]
    report.tables["held-out mean absolute error"] = rows
    ours, naive = (np.mean(v) for v in errors.values())
    report.note(f"held-out mean absolute error {ours:.4g} over {len(starts)} windows of {horizon} steps, repeating the last value {naive:.4g}")
    estimator.fit_series(series)
    future = np.asarray(estimator.forecast(series)).reshape(horizon, -1)
    return (["step", *names], [[i + 1, *row] for i, row in enumerate(future)]), report


def _interval(values: list[float]) -> dict[str, float]:
    x = np.asarray(values)
    half = 1.96 * x.std(ddof=1) / len(x) ** 0.5 if len(x) > 1 else float("nan")
    return {"mean": float(x.mean()), "low": float(x.mean() - half), "high": float(x.mean() + half)}


def _fit_table(plan: Plan, estimator, options, dry_run):
    X, y, order = _shuffled(*_table(Path(options.data), options.labels), options.seed)
    cut = len(X) - max(1, int(HELD_OUT * len(X)))
    report = Report(plan.slug, estimator.parameters(), X.size, "table")
    if dry_run:
        return None, report
    estimator.fit(X[:cut], y[:cut])
    guess = estimator.predict(X[cut:])
    report.changed("fit", X.size)
    report.note(f"held-out score {estimator.score(X[cut:], y[cut:]):.4g} on {len(guess)} rows")
    return (["row", "target", "prediction"], [[i + 1, t, g] for i, t, g in zip(order[cut:], y[cut:], guess)]), report


def _series(spec: Any) -> tuple[np.ndarray, list[str]]:
    """(T, C) in time order, with column names."""
    if isinstance(spec, str) and spec.startswith("lab:"):
        from formulary import lab

        found = lab.data(spec.removeprefix("lab:"))
        if found["kind"] != "series":
            raise FormularyError(f"{spec} holds {found['kind']}, not a series")
        values = np.concatenate([found["train"], found["test"]]).astype(float)
        return values.reshape(len(values), -1), [spec.removeprefix("lab:")]
    if isinstance(spec, np.ndarray):
        return spec.reshape(len(spec), -1).astype(float), [f"channel {i}" for i in range(spec.reshape(len(spec), -1).shape[1])]
    return _matrix(Path(spec))


def _matrix(path: Path) -> tuple[np.ndarray, list[str]]:
    """The numeric columns of a CSV as (rows, columns); a cell that is no number is a one-line error."""
    rows = _csv_rows(path)
    heads, body = (rows[0], rows[1:]) if not _numeric(rows[0]) else ([f"column {i}" for i in range(len(rows[0]))], rows)
    if not body:
        raise FormularyError(f"{path} has no rows of numbers")
    keep = [i for i in range(len(heads)) if _numeric([body[0][i]])]
    if not keep:
        raise FormularyError(f"{path} has no numeric column; columns: {', '.join(heads)}")
    values = np.empty((len(body), len(keep)))
    for r, row in enumerate(body):
        for c, i in enumerate(keep):
            try:
                values[r, c] = float(row[i])
            except (ValueError, IndexError):
                cell = row[i] if i < len(row) else "(missing)"
                raise FormularyError(f"{path}, row {r + 1}, column {heads[i]!r}: {cell!r} is not a number") from None
    return values, [heads[i] for i in keep]


def _table(path: Path, labels: str | None) -> tuple[np.ndarray, np.ndarray]:
    values, names = _matrix(path)
    target = labels or names[-1]
    if target not in names:
        raise UsageError(f"{path} has no numeric column {target!r}; columns: {', '.join(names)}")
    at = names.index(target)
    others = [i for i in range(len(names)) if i != at]
    return values[:, others], values[:, at]


def _shuffled(X: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows in a drawn order, and which rows of the file they are, so that a sorted file is judged fairly."""
    order = np.random.default_rng(seed).permutation(len(X))
    return X[order], y[order], order


def _csv_rows(path: Path) -> list[list[str]]:
    if not path.exists():
        raise FormularyError(f"no data at {path}")
    rows = [row for row in csv.reader(inputs._decode(path).splitlines()) if row]
    if not rows:
        raise FormularyError(f"{path} is empty")
    return rows


def _numeric(cells: list[str]) -> bool:
    try:
        [float(cell) for cell in cells]
    except ValueError:
        return False
    return True


def _csv(heads: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([heads, *rows])
    return text.getvalue()


def _facts(stage: Path, outcome, plan: Plan, options) -> None:
    """formulary.json, which `formulary.load` reads, and a README."""
    named = replace(outcome, model=None)
    facts = {**named.as_dict(), "data": str(options.data), "seed": options.seed}
    text = "\n".join(f"- {note}" for note in outcome.notes)
    saving.write_facts(stage, facts, f"# {plan.slug}\n\n{outcome.headline}\n\n{text}\n\nLoad with `formulary.load(directory)`.\n")
