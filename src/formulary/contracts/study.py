"""The study contract: functions that build or search what a paper analyzes, listed by name, and the paper's figure."""

import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from formulary.contracts.report import Report
from formulary.contracts.transform import slug_of


@dataclass(frozen=True, kw_only=True)
class Study:
    """Subclass it as a frozen dataclass of parameters; `functions()` lists what it offers, `figure(report)` redoes the figure.

    Figures are specifications as in `contracts.probe`, so that studies draw nothing themselves.
    """

    @property
    def slug(self) -> str:
        """The method's name in the catalogue."""
        return slug_of(type(self))

    def parameters(self) -> dict[str, Any]:
        """The study's parameters as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def functions(cls) -> dict[str, Callable]:
        """The public functions of the paper's analysis, by name."""
        raise NotImplementedError

    @classmethod
    def listing(cls) -> list[dict[str, str]]:
        """One row a function: name, signature, first line of its docstring."""
        return [
            {"function": name, "signature": str(inspect.signature(f)), "does": (inspect.getdoc(f) or "").split("\n")[0]}
            for name, f in cls.functions().items()
        ]

    def run(self) -> Report:
        """Compute the paper's figure; the report holds its tables and figure specifications."""
        report = Report(self.slug, self.parameters(), 0, "figure")
        self.figure(report)
        return report

    def figure(self, report: Report) -> None:
        """Fill `report.tables` and `report.figures`."""
        raise NotImplementedError
