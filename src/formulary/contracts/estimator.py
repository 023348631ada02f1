"""The estimator contract: a scikit-learn estimator that is saved as JSON and safetensors instead of a pickle."""

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from formulary.contracts.transform import slug_of
from formulary.errors import FormularyError, UsageError, nearest
from formulary.files import write_atomic, write_json

ACCEPTS = ("series", "table")


class Estimator(BaseEstimator):
    """Subclass it (after scikit-learn's mixins) with parameters as arguments of `__init__`, stored untouched, and `fit`
    and `predict`.

    `accepts` names the data. "table": a CSV with one row an item, `fit(X (n, F), y)` and `predict(X)`. "series": a CSV
    with one row a time step and one column a channel; beside `fit` and `predict` on windows it has `fit_series(series)`
    and `forecast(series, steps)`. What `fit` learns lies in attributes that end in an underscore: arrays, numbers,
    text, or lists of those.

    A directory written by `save` holds `estimator.json` and `arrays.safetensors`, and nothing that can run. Data that
    cannot be used (NaN, wrong widths) raises ValueError as scikit-learn asks; a wrong parameter raises UsageError when
    `fit` is called.

    >>> class Mean(Estimator):
    ...     def fit(self, X, y):
    ...         self.mean_ = np.asarray(y).mean()
    ...         return self
    ...     def predict(self, X):
    ...         return np.full(len(X), self.mean_)
    >>> import tempfile
    >>> directory = tempfile.mkdtemp()
    >>> Mean().fit([[0.0], [1.0]], [2.0, 4.0]).save(directory)
    >>> Mean.load(directory).predict([[5.0]])
    array([3.])
    """

    accepts: ClassVar[str] = "table"

    @classmethod
    def build(cls, **settings) -> "Estimator":
        """`cls(**settings)`, with unknown names refused by the nearest known one."""
        known = cls._get_param_names()
        for name in settings:
            if name not in known:
                hint = f"{nearest(name, known)}; parameters: {', '.join(known) or 'none'}"
                raise UsageError(f"{slug_of(cls)} has no parameter {name!r}{hint}")
        return cls(**settings)

    def parameters(self) -> dict[str, Any]:
        """The parameters as JSON-ready values."""
        return {name: _plain(value) for name, value in self.get_params(deep=False).items()}

    def fit_series(self, series: np.ndarray) -> "Estimator":
        """Fit on a whole series (T, C) or (T,), in time order; only where `accepts` is "series"."""
        raise NotImplementedError(f"{slug_of(type(self))} does not forecast series")

    def forecast(self, series: np.ndarray, steps: int | None = None) -> np.ndarray:
        """The `steps` values (steps, C), or (steps,), that follow a series; only where `accepts` is "series"."""
        raise NotImplementedError(f"{slug_of(type(self))} does not forecast series")

    def check_fitted(self) -> None:
        """Raise ValueError when the fitted attributes do not fit each other; called on what `load` read."""

    def save(self, directory: str | Path) -> None:
        """Write the fitted estimator into `directory`, which is created; FormularyError when it is not fitted or cannot
        be written."""
        from safetensors.numpy import save

        try:
            check_is_fitted(self)
        except NotFittedError:
            raise FormularyError(
                f"{slug_of(type(self))} is not fitted, so there is nothing to save: call fit first"
            ) from None
        fitted = {name: value for name, value in vars(self).items() if name.endswith("_") and not name.startswith("_")}
        arrays = {
            name: value
            for name, value in fitted.items()
            if isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
        }
        content = save({name: np.asarray(value, order="C") for name, value in arrays.items()})
        path = Path(directory)
        try:
            path.mkdir(parents=True, exist_ok=True)
            record = {
                "method": slug_of(type(self)),
                "class": type(self).__name__,
                "parameters": self.parameters(),
                "fitted": {name: _plain(value) for name, value in fitted.items() if name not in arrays},
                "text": sorted(
                    name for name, value in fitted.items() if isinstance(value, np.ndarray) and name not in arrays
                ),
                "arrays_sha256": hashlib.sha256(content).hexdigest(),
            }
            write_atomic(path / "arrays.safetensors", content)
            write_json(path / "estimator.json", record)
        except OSError as error:
            raise FormularyError(f"cannot write {path}: {error.strerror or error}") from error
        except (TypeError, ValueError) as error:
            raise FormularyError(f"{slug_of(type(self))} cannot be saved as JSON: {error}") from error

    @classmethod
    def load(cls, directory: str | Path) -> "Estimator":
        """Read what `save` wrote; a malformed file is a one-line FormularyError naming the directory."""
        from safetensors.numpy import load

        path = Path(directory)
        try:
            record = json.loads((path / "estimator.json").read_text(encoding="utf8"))
            if not isinstance(record, dict):
                raise ValueError("estimator.json holds no object")
            if (record["method"], record["class"]) != (slug_of(cls), cls.__name__):
                raise ValueError(f"it was saved by {record['method']} ({record['class']})")
            content = (path / "arrays.safetensors").read_bytes()
            if hashlib.sha256(content).hexdigest() != record["arrays_sha256"]:
                raise ValueError("arrays.safetensors is damaged, or of another estimator.json")
            estimator = cls.build(**record["parameters"])
            text = {name: np.array(record["fitted"][name], dtype=object) for name in record["text"]}
            for name, value in {**record["fitted"], **text, **load(content)}.items():
                if not name.endswith("_") or name.startswith("_") or not name.isidentifier():
                    raise ValueError(f"{name!r} is no fitted attribute")
                setattr(estimator, name, value)
            check_is_fitted(estimator)
            estimator.check_fitted()
        except Exception as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
            raise FormularyError(f"{path} is not a saved {slug_of(cls)} estimator: {reason}") from error
        return estimator


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays, tuples and sets as JSON values; anything else as it is."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    if value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(f"{type(value).__name__} is not a number, text, None or a list of those")
    return value
