"""Formulary: the Transformer literature as parts that can be used and claims that can be rerun.

The verbs of the command line are functions here, imported on first use: `find`, `show`, `check`, `use`, `compare`, `load`.
After `import formulary`, transformers' own `from_pretrained` also loads the directories that `use` writes.
"""

from formulary import _register

__version__ = "0.1.0"

_HOMES = {
    "find": "formulary.catalogue",
    "show": "formulary.catalogue",
    "check": "formulary.evidence",
    "use": "formulary.workshop",
    "compare": "formulary.workshop",
    "load": "formulary.workshop",
    "FormularyError": "formulary.errors",
    "UsageError": "formulary.errors",
}
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'formulary' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)


_register.install()
