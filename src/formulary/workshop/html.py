"""Reports that open in a browser with nothing beside them, and the plots in them."""

import base64
from html import escape
from pathlib import Path
from typing import Any

from formulary.files import write_atomic
from formulary.workshop import tables

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .8rem;text-align:left;border-bottom:1px solid #ddd}th{border-bottom:2px solid #888}
img{max-width:100%}code,pre{background:#f4f4f4;padding:.1rem .3rem}.wide{overflow-x:auto}
@media(prefers-color-scheme:dark){body{color:#eee;background:#16181c}th,td{border-color:#444}code,pre{background:#26282e}img{background:#fff}}
"""


def page(title: str, body: str) -> str:
    """A complete HTML page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(heads: list[str], cells: list[list[Any]]) -> str:
    """An HTML table."""
    head = "".join(f"<th>{escape(str(h))}</th>" for h in heads)
    rows = "".join("<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>\n" for row in cells)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>'


def image(path: Path, alt: str) -> str:
    """A PNG inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img src="data:image/png;base64,{data}" alt="{escape(alt)}"></p>'


def report(found, path: Path, plot: Path) -> None:
    """The report of a comparison."""
    heads, cells = tables.columns(found.rows)
    ranked = ["rank by time", *[found.ranks[row.name] for row in found.rows]]
    cells = [[*cell, rank] for cell, rank in zip(cells, ranked[1:])]
    notes = [f"{name}: {line}" for name, line in found.headlines.items()]
    notes += [f"{row.name} is not faster: {row.why_not_faster}" for row in found.rows if row.why_not_faster]
    notes += [f"{name} refused: {why}" for name, why in found.refused.items()] + found.notes
    front = ", ".join(row.name for row in found.rows if row.name in found.front())
    body = (
        f"<p>Data: {escape(found.data)}. CPU time on one thread, medians of paired rounds in random order; brackets are 95 % "
        f"intervals; ties share a rank.</p>\n{table([*heads, ranked[0]], cells)}\n{image(plot, 'time against quality')}\n"
        f"<p>Not beaten in both time and quality: {escape(front)}.</p>\n<ul>"
        + "".join(f"<li>{escape(note)}</li>\n" for note in notes)
        + "</ul>"
    )
    write_atomic(path, page(f"{found.name}: methods compared", body))


def pareto_plot(found, path: Path) -> None:
    """CPU time per item against the main quality, with intervals, on a logarithmic axis where a method multiplies it (perplexity);
    a line joins the rows that nobody beats.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    base = found.rows[0].seconds
    front = found.front()
    points, places = [], {}
    for number, row in enumerate(found.rows):
        estimate, low, high = row.qualities[0].interval()
        x = base / row.seconds
        spread = [[0], [0]]
        if row.ratio is not None:
            fast, slow_end, fast_end = row.ratio.speedup
            spread = [[max(0.0, fast - slow_end)], [max(0.0, fast_end - fast)]]
        axes.errorbar(
            x, estimate, xerr=spread, yerr=[[max(0.0, estimate - low)], [max(0.0, high - estimate)]],
            fmt="o" if row.name in front else "s", ms=8, capsize=3, color=COLORS[number % len(COLORS)], label=row.name,
            mfc=None if row.name in front else "white",
        )  # fmt: skip
        places[row.name] = (x, estimate)
        if row.name in front:
            points.append((x, estimate))
    points.sort()
    heights = [y for _, y in places.values()]
    if min(row.qualities[0].interval()[1] for row in found.rows) > 0 and max(heights) > 10 * min(heights):
        axes.set_yscale("log")
    axes.plot(*zip(*points), color="#999999", lw=1, zorder=0)
    axes.set_xlabel("times as fast as unchanged (CPU time, one thread)")
    axes.set_ylabel(f"{found.rows[0].qualities[0].name} ({found.rows[0].qualities[0].better} is better)")
    axes.set_title(f"{found.name} on {found.data}: filled points are beaten by nobody", fontsize=10)
    axes.grid(alpha=0.25)
    within = axes.transData + axes.transAxes.inverted()
    heights = beside({name: float(within.transform(place)[1]) for name, place in places.items()})
    line = {"arrowstyle": "-", "color": "#bbbbbb", "lw": 0.6, "shrinkA": 0, "shrinkB": 4, "relpos": (0, 0.5)}
    for name, height in heights.items():
        axes.annotate(
            name, places[name], xytext=(1.03, height), textcoords="axes fraction", va="center", fontsize=9, arrowprops=line,
            fontweight="bold" if name in front else "normal",
        )  # fmt: skip
    figure.savefig(path, dpi=150)


def beside(wanted: dict[str, float], step: float = 0.05) -> dict[str, float]:
    """Heights, as parts of the axes, of labels in a column: near those wanted, the highest first, none closer than `step`
    (less where they would not fit).

    >>> beside({"a": 0.9, "b": 0.9, "c": 0.2})
    {'a': 0.9, 'b': 0.85, 'c': 0.2}
    """
    names = sorted(wanted, key=wanted.get, reverse=True)
    step = min(step, 1 / max(1, len(names) - 1))
    heights = [min(1.0, max(0.0, wanted[name])) for name in names]
    for i in range(1, len(names)):
        heights[i] = min(heights[i], heights[i - 1] - step)
    floor = 0.0
    for i in reversed(range(len(names))):  # what was pushed below the axes goes up again
        heights[i] = max(heights[i], floor)
        floor = heights[i] + step
    return {name: round(height, 6) for name, height in zip(names, heights)}


def draw(spec: dict[str, Any], path: Path) -> None:
    """Draw a figure specification of a report: `kind` is "heatmap", "bars", "lines" or "points".

    `values` is a matrix for a heatmap; `x` and `y` are lists, `y` possibly a dict of named lists; `low`/`high` give error bars.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    if spec["kind"] == "heatmap":
        shown = axes.imshow(spec["values"], aspect="auto", cmap="viridis", origin="lower")
        figure.colorbar(shown, label=spec.get("label", ""))
    else:
        series = spec["y"] if isinstance(spec["y"], dict) else {"": spec["y"]}
        for number, (name, values) in enumerate(series.items()):
            color = COLORS[number % len(COLORS)]
            x = spec.get("x") or list(range(len(values)))
            if spec["kind"] == "bars":
                width = 0.8 / len(series)
                axes.bar([i + width * number for i in range(len(values))], values, width=width, color=color, label=name)
                axes.set_xticks(range(len(values)), [str(v) for v in x], rotation=45 if len(values) > 6 else 0)
            else:
                marker = "o" if len(values) < 30 or spec["kind"] == "points" else ""
                axes.plot(x, values, marker=marker, ls="" if spec["kind"] == "points" else "-", color=color, label=name, ms=4)
        if any(series):
            axes.legend(frameon=False)
    axes.set(title=spec.get("title", ""), xlabel=spec.get("xlabel", ""), ylabel=spec.get("ylabel", ""))
    figure.savefig(path, dpi=150)
