"""Makes transformers' own `from_pretrained` understand edited directories, without importing transformers."""

import sys

_MODULE = "transformers.quantizers.auto"


class _AfterImport:
    """A finder that lets the others find `transformers.quantizers.auto` and registers the quantizer once it has run."""

    def find_spec(self, name, path=None, target=None):
        if name != _MODULE:
            return None
        sys.meta_path.remove(self)
        from importlib.util import find_spec

        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    from formulary.contracts._quantizer import register

    register()


def install() -> None:
    """Register now when transformers is loaded, else as soon as it is."""
    if _MODULE in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
