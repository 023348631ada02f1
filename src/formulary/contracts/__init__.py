"""What a kind of method takes and gives: one module per contract, and `parts`, `edits` and `data` that they share.

Names are imported on first use, so that `import formulary` stays cheap.
"""

_HOMES = {
    "Attention": "attention",
    "BlockEdit": "edits",
    "BlockTransform": "transform",
    "Data": "data",
    "Estimator": "estimator",
    "Layer": "layer",
    "Model": "model",
    "Probe": "probe",
    "Recipe": "recipe",
    "Replacement": "edits",
    "Report": "report",
    "Study": "study",
    "Transform": "transform",
}
CONTRACTS = ("attention", "layer", "transform", "recipe", "probe", "model", "estimator", "study")
__all__ = [*_HOMES, "CONTRACTS"]


def __getattr__(name: str):
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"formulary.contracts.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'formulary.contracts' has no attribute {name!r}")
