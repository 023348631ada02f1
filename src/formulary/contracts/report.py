"""What a transform, a probe or a training run reports: every module it changed, every one it left, and why."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Change:
    """One part that a method changed: its dotted name, its number of weights, and a short note."""

    name: str
    weights: int
    note: str = ""


@dataclass
class Report:
    """The account of one application. Nothing is silent: fallbacks, skips and clamps are entries here and change `headline`.

    >>> report = Report("gptq", {"bits": 3}, weights=200, unit="linear layer")
    >>> report.changed("layers.0.fc", 150, "3 bits"); report.skipped("layers.1.fc", "fewer than 32 inputs")
    >>> report.headline
    'gptq on 1 of 2 linear layers, 75 % of the weights; 1 skipped: fewer than 32 inputs'
    """

    method: str
    parameters: dict[str, Any]
    weights: int
    unit: str = "part"
    changes: list[Change] = field(default_factory=list)
    skips: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def changed(self, name: str, weights: int, note: str = "") -> None:
        """Record that the part `name`, holding `weights` weights, was changed."""
        self.changes.append(Change(name, int(weights), note))

    def skipped(self, name: str, reason: str, weights: int = 0) -> None:
        """Record that a part the method would have treated was left as it was, and why."""
        self.skips.append(Change(name, int(weights), reason))

    def note(self, text: str) -> None:
        """Record a fallback, a clamp or anything else that a reader must know; it joins the headline."""
        if text not in self.notes:
            self.notes.append(text)

    @property
    def coverage(self) -> float:
        """Changed weights as a fraction of the model's weights, 0 to 1."""
        return min(1.0, sum(change.weights for change in self.changes) / max(1, self.weights))

    @property
    def headline(self) -> str:
        """One line: what was done, to how much of the model, and everything that did not go as asked."""
        done, total = len(self.changes), len(self.changes) + len(self.skips)
        if not total:
            return "; ".join([self.method, *self.notes])
        of = f"{done} of {total}" if self.skips else f"{done}"
        line = f"{self.method} on {of} {self.unit}{'s' if total != 1 else ''}, {_percent(self.coverage)} of the weights"
        if self.skips:
            reasons = list(dict.fromkeys(skip.note for skip in self.skips))
            line += f"; {len(self.skips)} skipped: {', '.join(reasons[:3])}{' ...' if len(reasons) > 3 else ''}"
        return "; ".join([line, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return {
            "method": self.method,
            "parameters": self.parameters,
            "headline": self.headline,
            "coverage": self.coverage,
            "changed": [vars(change) for change in self.changes],
            "skipped": [vars(change) for change in self.skips],
            "notes": self.notes,
            "figures": self.figures,
            "tables": self.tables,
        }


def _percent(fraction: float) -> str:
    percent = 100 * fraction
    return f"{percent:.0f} %" if percent >= 1 or percent == 0 else f"{percent:.2g} %"
