"""The workshop: `use` a method on a model, `compare` several, `load` what they wrote."""

_HOMES = {"use": "using", "Outcome": "using", "compare": "comparing", "Comparison": "comparing", "load": "models"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    from importlib import import_module

    if name in _HOMES:
        return getattr(import_module(f"formulary.workshop.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'formulary.workshop' has no attribute {name!r}")
