"""The probe contract: reads a model and reports, leaving it exactly as it was."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from formulary.contracts import parts
from formulary.contracts.data import Data
from formulary.contracts.report import Report
from formulary.contracts.transform import slug_of
from formulary.errors import FormularyError

_CAPTURED = "_output_capturing_hooks_installed"
"""transformers' mark on a model whose hooks for `output_attentions` and the like are in place; it goes when they go."""


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Subclass it as a frozen dataclass of parameters and implement `look(model, data, report)`.

    `report.tables` holds named lists of rows; `report.figures` named specifications that the workshop draws:
    `{"kind": "heatmap" | "bars" | "lines", "x": ..., "y": ..., "values": ..., "title": ...}`.
    """

    supports: ClassVar[frozenset[str]] = frozenset(parts.KINDS)
    needs_data: ClassVar[bool] = False
    unit: ClassVar[str] = "head"

    @property
    def slug(self) -> str:
        """The method's name in the catalogue."""
        return slug_of(type(self))

    def parameters(self) -> dict[str, Any]:
        """The probe's parameters as JSON-ready values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def run(self, model: nn.Module, data: Data | None = None) -> Report:
        """Probe the model; afterwards its hooks, modes and attention implementation are what they were."""
        kind = parts.kind(model)
        if kind not in self.supports:
            raise FormularyError(f"{self.slug} does not support {kind} models; it supports: {', '.join(sorted(self.supports))}")
        if self.needs_data and data is None:
            raise FormularyError(f"{self.slug} needs data to look at: give --data")
        report = Report(self.slug, self.parameters(), parts.count_weights(model), self.unit)
        modes = [(module, module.training) for module in model.modules()]
        hooks = [(module, dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
        captured = [module for module in model.modules() if module.__dict__.get(_CAPTURED)]
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
        model.eval()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(data.seed if data is not None else 0)
                self.look(model, data, report)
        finally:
            for module, forward, pre in hooks:
                _restore(module._forward_hooks, forward)
                _restore(module._forward_pre_hooks, pre)
            for module in model.modules():
                if module.__dict__.get(_CAPTURED) and all(module is not before for before in captured):
                    delattr(module, _CAPTURED)
            for module, mode in modes:
                module.training = mode
            if attention and model.config._attn_implementation != attention:
                model.set_attn_implementation(attention)
        return report

    def look(self, model: nn.Module, data: Data | None, report: Report) -> None:
        """The probe itself: fill the report."""
        raise NotImplementedError


def _restore(hooks: dict, before: dict) -> None:
    for key in [key for key in hooks if key not in before]:
        del hooks[key]
