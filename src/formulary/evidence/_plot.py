"""One picture of a record: every seed of every arm, and each prediction with its interval, its threshold, its null
and its positive.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from formulary.errors import FormularyError

_METHOD, _BASELINE, _OTHER, _BOUND = "#0072B2", "#D55E00", "#7F7F7F", "#CC79A7"
_MARKS = {"holds here": "holds", "does not hold here": "does not hold", "inconclusive": "inconclusive"}


def draw(record: Mapping, path: str | Path) -> Path:
    """Draw a record's picture to `path` (PNG, SVG or PDF by its ending) and give the path. FormularyError when there
    is nothing to draw.
    """
    inner = record.get("smaller") if record.get("why") is not None else record
    if not inner or not inner.get("arms"):
        raise FormularyError(f"{record.get('slug')} was not measured, so there is nothing to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(
        zip(
            inner["predictions"],
            inner["predicates"],
            inner["null"]["predicates"],
            inner["oracle"]["predicates"],
            strict=True,
        )
    )
    figure = Figure(figsize=(10.5, 1.3 + 2.9 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), 2, squeeze=False, width_ratios=(1, 1.15))
    for (left, right), (prediction, finding, null, oracle) in zip(axes, rows, strict=True):
        _strip(left, inner, prediction)
        _forest(right, inner, prediction, [finding, oracle, null])
    figure.suptitle(
        f"{record['slug']}: {record['verdict']}\n{_wrapped(inner['claim'])}", fontsize=11, ha="left", x=0.01
    )
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise FormularyError(f"the plot cannot be written to {path}: {error}") from None
    return Path(path)


def _wrapped(text: str) -> str:
    from textwrap import fill

    return fill(text, 120)


def _means(table: list) -> np.ndarray:
    """One mean per seed; NaN where a seed failed."""
    return np.array([np.nan if row is None else np.mean(row) for row in table])


def _strip(axis, record: Mapping, prediction: Mapping) -> None:
    """Per-seed means of every arm that has the metric; a line joins a seed's arms."""
    metric = prediction["metric"]
    arms = [arm for arm in record["arms"] if metric in record["arms"][arm]]
    arms.sort(key=lambda arm: (arm != prediction["a"], arm != prediction.get("b")))
    means = np.array([_means(record["arms"][arm][metric]) for arm in arms])
    axis.plot(np.arange(len(arms)), means, color="#CCCCCC", linewidth=0.8, zorder=1)
    for x, (arm, values) in enumerate(zip(arms, means, strict=True)):
        color = _METHOD if arm == prediction["a"] else _BASELINE if arm == prediction.get("b") else _OTHER
        axis.scatter(np.full(len(values), x), values, s=22, color=color, alpha=0.8, zorder=2)
    axis.set_xticks(np.arange(len(arms)), arms, rotation=20 if sum(map(len, arms)) > 40 else 0)
    axis.set_xlim(-0.5, len(arms) - 0.5)
    axis.set_ylabel(metric)
    if means.size and np.nanmin(means) > 0 and np.nanmax(means) > 50 * np.nanmin(means):
        axis.set_yscale("log")
    axis.set_title(f"each dot is one of {means.shape[1]} seeds", fontsize=9, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _per_seed(record: Mapping, prediction: Mapping, finding: Mapping) -> np.ndarray:
    """Each seed's own estimate of what the finding estimates."""
    arms, metric = record["arms"], prediction["metric"]
    table = arms[prediction["a"]][metric]
    if prediction["kind"] == "exact":
        return np.array([np.nan if row is None else np.max(np.abs(row)) for row in table])
    a, other = _means(table), prediction.get("b")
    if other is None:
        return a
    if prediction["kind"] == "speedup":
        return np.array([np.median(np.array(y) / np.array(x)) for x, y in zip(table, arms[other][metric], strict=True)])
    b = _means(arms[other][metric])
    return a / b if " / " in finding["of"] else a - prediction.get("ratio", 1.0) * b


def _forest(axis, record: Mapping, prediction: Mapping, findings: list) -> None:
    """The method, the planted positive and the planted null, each with its interval, against the threshold."""
    labels = ["method", "planted\npositive", "planted\nnull"]
    for y, (finding, color) in enumerate(zip(findings, (_METHOD, _OTHER, _BASELINE), strict=True)):
        if finding["estimate"] is None:
            axis.text(
                0.5, y, "not computed", transform=axis.get_yaxis_transform(), va="center", ha="center", fontsize=9
            )
            continue
        low, high = (finding[k] if finding[k] is not None else finding["estimate"] for k in ("low", "high"))
        axis.plot([low, high], [y, y], color=color, linewidth=2.2, solid_capstyle="butt")
        axis.plot(finding["estimate"], y, "o" if y == 0 else "s", color=color, markersize=6)
        axis.text(1.01, y, _MARKS[finding["verdict"]], transform=axis.get_yaxis_transform(), va="center", fontsize=9)
    if findings[0]["estimate"] is not None:
        seeds = _per_seed(record, prediction, findings[0])
        axis.scatter(seeds, np.full(len(seeds), -0.32), s=12, color=_METHOD, alpha=0.6)
    bound = next((f["bound"] for f in findings if f["estimate"] is not None), None)
    for value in () if bound is None else (-bound, bound) if prediction["kind"] == "within" else (bound,):
        axis.axvline(value, color=_BOUND, linestyle="--", linewidth=1.4)
    if bound is not None:
        said = next(f for f in findings if f["estimate"] is not None)["predicted"]
        axis.set_title(
            f"predicted {said} (dashed){'' if prediction['kind'] == 'exact' else '; bars are 95 % intervals'}",
            fontsize=9,
            loc="left",
        )
    if prediction["kind"] == "exact" and (bound or 0) > 0:
        axis.set_xscale("symlog", linthresh=bound / 10)
    axis.set_yticks(range(3), labels)
    axis.set_ylim(2.5, -0.6)
    axis.set_xlabel(findings[0]["of"])
    axis.spines[["top", "right"]].set_visible(False)
