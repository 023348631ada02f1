"""Finding, checking and loading a model: a Hugging Face directory, a hub id, `lab:NAME`, or a module in memory.

A directory is checked before anything is loaded: JSON that parses, no remote code, safetensors only, and files whose headers
agree with their sizes. Nothing here can run code from a file.
"""

import copy
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from formulary.contracts import parts
from formulary.errors import FormularyError, UsageError, nearest

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Loaded:
    """A model ready for use: the module in eval mode, its processor (or None), the directory it came from (or None)."""

    model: nn.Module
    processor: Any
    path: Path | None
    name: str
    notes: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return parts.kind(self.model)


def locate(spec: str | Path, revision: str | None = None) -> Path:
    """The directory that a model specification names; a one-line error says what was looked for."""
    text = str(spec)
    if text.startswith("lab:"):
        from formulary import lab

        known = ("minilm", "smollm2", "vit", "rxn")
        name = text.removeprefix("lab:")
        if name not in known:
            raise UsageError(f"no lab model {name!r}{nearest(name, known)}; lab models: {', '.join(known)}")
        return Path(lab.path(name))
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise FormularyError(f"{path} is a file; a model is a directory with config.json and safetensors weights")
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        return _download(text, revision)
    raise FormularyError(f"no model directory at {path}")


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "LICENSE*", "1_Pooling/*"]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise FormularyError(f"{repo} is no directory here and cannot be fetched from the hub: {first}") from error


# ---------------------------------------------------------------- checks that read headers only


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dict; remote code is refused."""
    file = path / "config.json"
    if not file.exists():
        raise FormularyError(f"{path} has no config.json: it is not a Hugging Face model directory")
    try:
        config = json.loads(file.read_text(encoding="utf8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise FormularyError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise FormularyError(f"{file} must hold a JSON object")
    if _has_key(config, "auto_map"):
        raise FormularyError(f"{file} asks for remote code (auto_map), which is never run: use a model that transformers has itself")
    return config


def _has_key(value: Any, key: str) -> bool:
    if isinstance(value, dict):
        return key in value or any(_has_key(v, key) for v in value.values())
    return isinstance(value, list) and any(_has_key(v, key) for v in value)


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make up the model, each one's header checked against its size."""
    indexes = sorted(path.glob("model*.safetensors.index.json"))
    if indexes:
        files = _shards(path, indexes[0])
    else:
        files = sorted(path.glob("model*.safetensors"))
    if not files:
        pickled = [p.name for p in path.iterdir() if p.suffix in PICKLES]
        if pickled:
            raise FormularyError(
                f"{path} has pickled weights ({pickled[0]}) and no safetensors; pickles can run code and are not read: "
                "convert them with save_pretrained in a place you trust"
            )
        raise FormularyError(f"{path} has no safetensors weights (model.safetensors)")
    for file in files:
        read_header(file)
    return files


def _shards(path: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise FormularyError(f"{index} is not a valid shard index: {error}") from error
    for name in names:
        if Path(name).name != name:
            raise FormularyError(f"{index} names a file outside the model directory: {name!r}")
        if not (path / name).exists():
            raise FormularyError(f"{index} names {name}, which is missing")
    return [path / name for name in names]


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, offsets. Truncated or corrupt files are refused."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            if length > size - 8:
                raise ValueError(f"header of {length} bytes in a file of {size}")
            header = json.loads(stream.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormularyError(f"{file} is truncated or corrupt: {error}") from error
    if 8 + length + end != size:
        raise FormularyError(f"{file} is truncated or corrupt: {size} bytes where its header says {8 + length + end}")
    return tensors


def count_from_headers(files: list[Path]) -> tuple[int, int]:
    """(weights, bytes) of safetensors files, from their headers alone."""
    weights = bytes_ = 0
    for file in files:
        for entry in read_header(file).values():
            n = 1
            for dim in entry["shape"]:
                n *= dim
            weights += n
            bytes_ += entry["data_offsets"][1] - entry["data_offsets"][0]
    return weights, bytes_


# ---------------------------------------------------------------- loading


def model_class(config: dict[str, Any], path: Path) -> type:
    """transformers' class for the architecture that the config names; a bare backbone where it names none."""
    import transformers

    quiet()
    for name in config.get("architectures") or []:
        cls = getattr(transformers, str(name), None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
        raise FormularyError(f"{path}: architecture {name!r} is not one that transformers {transformers.__version__} has")
    return transformers.AutoModel


def load_directory(path: Path, *, dtype: str | torch.dtype | None = None, device: str | None = None) -> nn.Module:
    """The model in `path`, in eval mode and in its stored dtype unless one is given."""
    config = read_config(path)
    weight_files(path)
    kind = (config.get("quantization_config") or {}).get("quant_method")
    if kind not in (None, "formulary"):
        raise FormularyError(f"{path} is already quantized with {kind}: give the unquantized model")
    cls = model_class(config, path)
    try:
        model, info = cls.from_pretrained(
            path, dtype=_dtype(dtype), local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except FormularyError:
        raise
    except Exception as error:
        raise FormularyError(f"{path} cannot be loaded as {cls.__name__}: {str(error).strip().splitlines()[0]}") from error
    problem = {k: info[k] for k in ("missing_keys", "mismatched_keys") if info.get(k)}
    if problem and kind == "formulary":
        raise FormularyError(f"{path} is incomplete: {problem}")
    return model.to(device or "cpu").eval()


def load_processor(path: Path, kind: str) -> Any:
    """The tokenizer or image processor stored with the model, or None where there is none."""
    import transformers

    names = {p.name for p in path.iterdir()}
    try:
        if kind == "vision":
            if "preprocessor_config.json" not in names:
                return None
            return transformers.AutoImageProcessor.from_pretrained(path, local_files_only=True)
        if names & {"tokenizer.json", "tokenizer_config.json", "vocab.txt", "spiece.model", "tokenizer.model", "vocab.json"}:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
            if tokenizer.pad_token is None:
                tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
            return tokenizer
    except Exception as error:
        raise FormularyError(f"{path}: its tokenizer or processor cannot be read: {str(error).splitlines()[0]}") from error
    return None


def load_model(spec, *, dtype=None, device=None, revision=None, processor=None) -> Loaded:
    """What `spec` names, loaded: a directory, hub id, `lab:NAME`, or an `nn.Module` in memory."""
    if isinstance(spec, nn.Module):
        module = copy.deepcopy(spec) if dtype is not None or spec.training else spec
        module = module if dtype is None else module.to(_dtype(dtype))
        return Loaded(module.eval(), processor, None, type(spec).__name__)
    path = locate(spec, revision)
    model = load_directory(path, dtype=dtype, device=device)
    found = processor or load_processor(path, parts.kind(model))
    return Loaded(model, found, path, str(spec) if str(spec).startswith("lab:") else path.name)


def skeleton(path: Path) -> nn.Module:
    """The model without weights, on the meta device: enough to see its parts."""
    import transformers

    config = read_config(path)
    cls = model_class(config, path)
    built = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    with torch.device("meta"):
        return cls._from_config(built) if cls is not transformers.AutoModel else cls.from_config(built)


def load(directory: str | Path) -> nn.Module:
    """Load what `use` wrote, in eval mode: a model directory of transformers, or a trained model or estimator of a room.

    Outputs are bit-identical to the model that was saved. transformers' own `from_pretrained` reads the same directories once
    formulary is imported.
    """
    path = Path(directory)
    if not path.is_dir():
        raise FormularyError(f"no directory at {path}")
    stored = path / "formulary.json"
    if stored.exists():
        try:
            facts = json.loads(stored.read_text(encoding="utf8"))
            contract, method = facts.get("contract"), facts["method"]
        except (ValueError, KeyError, AttributeError) as error:
            raise FormularyError(f"{stored} is not valid: {error}") from error
        if contract in ("model", "estimator"):
            from formulary.workshop.methods import method_class

            return method_class(method, contract).load(path)
    return load_directory(path)


def quiet() -> None:
    """transformers' progress bars and advice stay off the screen; formulary says what matters itself."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def _dtype(dtype) -> Any:
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known{nearest(dtype, DTYPES)}; dtypes: {', '.join(DTYPES)}")
    return DTYPES[dtype]
