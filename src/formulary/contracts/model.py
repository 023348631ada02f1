"""The model contract: a backbone or task system that one trains, saves and predicts with."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from formulary.contracts.transform import build, slug_of
from formulary.errors import FormularyError, UsageError, nearest


class Model(nn.Module):
    """Subclass it with a frozen dataclass `Config` (JSON scalars and tuples) and the class attribute `named_sizes`.

    `Sub(config)` builds the network; `loss(batch)` is a scalar to minimize; `predict(inputs)` the answer for new
    inputs. `accepts` names the data it trains on, and with it what a batch holds and what the data decide of the
    config:

    - "images" (a folder with one subfolder a class): `pixel_values` (B, C, H, W) and `labels` (B,) int64; the config
      has `image_size`, `channels` and `classes`; `predict(pixel_values)` is the probability of each class (B, classes).
    - "table" (CSV): `inputs` (B, F) and `labels`; the config has `features`.
    - "pairs" (two CSVs of samples that do not correspond row by row): `x0` (B, D) and `x1` (B, D), drawn independently;
      the config has `dim`; `predict(x0)` is (B, D).
    - "environment": a Gymnasium environment; the model also has `act(history)`.

    Before training, `start(batch)` is called once with a large batch: it initializes what the method initializes from
    data. `training` holds the paper's settings for `lab.train` (`steps`, `lr`, `batch_size`, `weight_decay`, ...), as
    far as a small machine allows. A directory written by `save` holds `config.json` and `model.safetensors`, and
    nothing that can run.
    """

    Config: ClassVar[type]
    named_sizes: ClassVar[dict[str, dict[str, Any]]] = {}
    accepts: ClassVar[str] = "images"
    training: ClassVar[dict[str, Any]] = {"steps": 1000, "lr": 1e-3, "batch_size": 32}

    def __init__(self, config):
        super().__init__()
        self.config = config

    @classmethod
    def build(cls, size: str | None = None, **settings) -> "Model":
        """A model of a size named in the paper, with settings on top."""
        if size is not None and size not in cls.named_sizes:
            known = ", ".join(cls.named_sizes) or "none are named"
            raise UsageError(f"{slug_of(cls)} has no size {size!r}{nearest(size, cls.named_sizes)}; sizes: {known}")
        return cls(build(cls.Config, {**(cls.named_sizes[size] if size else {}), **settings}))

    def start(self, batch: dict[str, Tensor]) -> None:
        """Initialize from data what the method initializes so; by default nothing. Random draws use torch's global
        generator."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Scalar training loss of a batch."""
        raise NotImplementedError

    def predict(self, inputs: Tensor) -> Tensor:
        """The model's answer for a batch of inputs."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `directory`, which is created; FormularyError when that
        fails."""
        from safetensors.torch import save

        from formulary.files import write_atomic, write_json

        path = Path(directory)
        state = {name: value.detach().cpu().contiguous().clone() for name, value in self.state_dict().items()}
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomic(path / "model.safetensors", save(state))
            write_json(path / "config.json", {"method": slug_of(type(self)), "config": asdict(self.config)})
        except OSError as error:
            raise FormularyError(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, directory: str | Path) -> "Model":
        """Read what `save` wrote, in eval mode; a malformed file is a one-line FormularyError naming the directory."""
        from safetensors.torch import load_file

        path = Path(directory)
        try:
            stored = json.loads((path / "config.json").read_text(encoding="utf8"))
            if stored["method"] != slug_of(cls):
                raise ValueError(f"it was saved by {stored['method']}")
            config = {
                name: tuple(value) if isinstance(value, list) else value for name, value in stored["config"].items()
            }
            state = load_file(path / "model.safetensors")
            model = cls(build(cls.Config, config))
            model.load_state_dict(state)
            dtypes = {value.dtype for value in state.values() if value.is_floating_point()}
            if len(dtypes) == 1:
                model.to(dtypes.pop())
                model.load_state_dict(state)
        except Exception as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            raise FormularyError(f"{path} is not a saved {slug_of(cls)} model: {reason[:300]}") from error
        return model.eval()
