"""The model contract: a backbone or task system that one trains, saves and predicts with."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from formulary.contracts.transform import build, slug_of
from formulary.errors import FormularyError, UsageError, nearest


class Model(nn.Module):
    """Subclass it with a frozen dataclass `Config` (JSON scalars and tuples) and the class attribute `named_sizes`.

    `Sub(config)` builds the network; `loss(batch)` is a scalar to minimize; `predict(inputs)` the answer for new inputs.
    `accepts` names the data it trains on: "images" (a folder with one subfolder a class), "table" (CSV), "pairs" (two CSVs of
    samples) or "environment". A directory written by `save` holds `config.json` and `model.safetensors`, and nothing that can run.
    """

    Config: ClassVar[type]
    named_sizes: ClassVar[dict[str, dict[str, Any]]] = {}
    accepts: ClassVar[str] = "images"

    def __init__(self, config):
        super().__init__()
        self.config = config

    @classmethod
    def build(cls, size: str | None = None, **settings) -> "Model":
        """A model of a size named in the paper, with settings on top."""
        if size is not None and size not in cls.named_sizes:
            known = ", ".join(cls.named_sizes)
            raise UsageError(f"{slug_of(cls)} has no size {size!r}{nearest(size, cls.named_sizes)}; sizes: {known}")
        return cls(build(cls.Config, {**(cls.named_sizes[size] if size else {}), **settings}))

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Scalar training loss of a batch."""
        raise NotImplementedError

    def predict(self, inputs: Tensor) -> Tensor:
        """The model's answer for a batch of inputs."""
        raise NotImplementedError

    def save(self, directory: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into `directory`, which is created."""
        from safetensors.torch import save_file

        from formulary.files import write_json

        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / "config.json", {"method": slug_of(type(self)), "config": asdict(self.config)})
        save_file({k: v.contiguous().clone() for k, v in self.state_dict().items()}, path / "model.safetensors")

    @classmethod
    def load(cls, directory: str | Path) -> "Model":
        """Read what `save` wrote; a malformed file is a one-line error naming it."""
        import json

        from safetensors.torch import load_file

        path = Path(directory)
        try:
            stored = json.loads((path / "config.json").read_text(encoding="utf8"))
            config = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["config"].items()}
            model = cls(build(cls.Config, config))
            model.load_state_dict(load_file(path / "model.safetensors"))
        except FormularyError:
            raise
        except Exception as error:
            raise FormularyError(f"{path} is not a saved {slug_of(cls)} model: {error}") from error
        return model.eval()
