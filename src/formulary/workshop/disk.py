"""A model on disk of which one block at a time is in memory.

Notable here: the skeleton comes from transformers' own loader, which is given stand-ins for the tensors that are not to be
read yet, so that dtypes, ties and buffers that no file holds are what it makes them; blocks are then filled by name, renamed
and converted as it would.
"""

import ctypes
import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formulary.contracts import edits, parts
from formulary.contracts.transform import refuse_nan
from formulary.errors import FormularyError
from formulary.workshop import models

MAPPED = 1 << 20


class _Later:
    """Stands for a tensor that is not read yet: transformers' loader makes of it a parameter without values."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype):
        self.shape, self.dtype = tuple(shape), dtype

    def __getitem__(self, _):
        return self

    def to(self, device=None, dtype=None) -> Tensor:
        return torch.empty(self.shape, dtype=dtype or self.dtype, device="meta")


class _Tensors:
    """The tensors of safetensors files by name; each is read when it is asked for, into memory of its own.

    That memory begins where torch's own would, at a multiple of 64 bytes, since bits of a product may depend on that; where it
    is large it is mapped, so that it goes back to the system as soon as it is let go.
    """

    def __init__(self, files: Sequence[Path]):
        self._places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in files:
            header = models.read_header(file)
            start = file.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
            self._places.update({name: (file, start, entry) for name, entry in header.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def later(self, name: str) -> _Later:
        """Shape and dtype of a tensor."""
        from transformers.modeling_utils import str_to_torch_dtype

        entry = self._places[name][2]
        return _Later(entry["shape"], str_to_torch_dtype[entry["dtype"]])

    def read(self, name: str) -> Tensor:
        """The tensor."""
        file, start, entry = self._places[name]
        begin, end = entry["data_offsets"]
        values = _room(end - begin)
        with file.open("rb", buffering=0) as stream:
            stream.seek(start + begin)
            view = memoryview(values.numpy())
            while view:
                count = stream.readinto(view)
                if not count:
                    raise FormularyError(f"{file} is truncated: it ends within {name}")
                view = view[count:]
        known = self.later(name)
        return values.view(known.dtype).view(known.shape)


def _room(size: int) -> Tensor:
    """Bytes to read into; see `_Tensors`."""
    if size < MAPPED:
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)


class DiskModel:
    """A transformers model of which only what lies outside the blocks is in memory, an untied output head left out too;
    `load` gives one block, or the head, its weights, and `drop` takes them away. `model` is in eval mode.
    """

    def __init__(self, path: Path, *, dtype: str | None = None, device: str | None = None):
        import transformers

        self.path, self.device = path, torch.device(device or "cpu")
        config = models.read_config(path)
        kind = (config.get("quantization_config") or {}).get("quant_method")
        if kind not in (None, "formulary"):
            raise FormularyError(f"{path} is already quantized with {kind}: give the unquantized model")
        self.files = models.weight_files(path)
        self._tensors = _Tensors(self.files)
        self._held: dict[str, list[nn.Module]] = {}
        cls = models.model_class(config, path)
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        if cls is transformers.AutoModel:
            cls = transformers.AutoModel._model_mapping[type(config)]
        self._dtype = models._dtype(dtype)
        if self._dtype == "auto":
            dtypes = (self._tensors.later(name).dtype for name in self._tensors)
            self._dtype = config.dtype or next((d for d in dtypes if d.is_floating_point), torch.float32)
        self.head: str | None = None
        self._homes = self._find_homes(self._build(cls, set()))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = self._build(cls, {name for name, home in self._homes.items() if home == ""})
        _move(self.model, self.device)
        self.blocks = parts.blocks(self.model)
        self._load_generation_config()

    def _build(self, cls: type, read: set[str]) -> nn.Module:
        """The model as transformers' own loader makes it, with the tensors `read` alone."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.path, local_files_only=True)
        state = {name: self._tensors.read(name) if name in read else self._tensors.later(name) for name in self._tensors}
        try:
            model, info = cls.from_pretrained(
                None, config=config, state_dict=state, dtype=self._dtype, output_loading_info=True
            )
        except FormularyError:
            raise
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise FormularyError(f"{self.path} cannot be loaded as {cls.__name__}: {first}") from error
        names = tuple(f"{block.name}." for block in parts.blocks(model))
        lacking = [key for key in info["missing_keys"] if key.startswith(names) or edits.edits_of(model)]
        if lacking:
            raise FormularyError(f"{self.path} is incomplete: it has no weights for {lacking[0]}")
        return model.eval()

    def _find_homes(self, model: nn.Module) -> dict[str, str | None]:
        """Where each stored tensor belongs: a block's name, the untied output head's, "" for the rest, None for nowhere."""
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        homes = [block.name for block in parts.blocks(model)]
        home = lambda name: next((home for home in homes if name.startswith(f"{home}.")), "")
        for pair in model.all_tied_weights_keys.items():
            if home(pair[0]) != home(pair[1]):
                raise FormularyError(f"{type(model).__name__} shares {pair[0]} with another block and cannot be streamed")
        head = model.get_output_embeddings()
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        self.head = next((name for name, module in model.named_modules() if head is not None and module is head), None)
        self.head = None if f"{self.head}.weight" in tied else self.head
        homes += [self.head] if self.head else []
        renamings = [one for one in model._weight_conversions if isinstance(one, WeightRenaming)]
        converters = [one for one in model._weight_conversions if isinstance(one, WeightConverter)]
        state, found = model.state_dict(), {}
        for name in self._tensors:
            target, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            if target not in state and name in state:
                target, _ = rename_source_key(name, [], [], model.base_model_prefix, state)
            found[name] = home(target) if target in state else None
        return found

    def _load_generation_config(self) -> None:
        """From its own file or else from the model's config, as transformers' loader does."""
        from transformers import GenerationConfig

        if self.model.can_generate():
            try:
                made = GenerationConfig.from_pretrained(self.path, local_files_only=True)
            except OSError:
                options = {"config_file_name": "config.json", "_from_model_config": True, "local_files_only": True}
                made = GenerationConfig.from_pretrained(self.path, **options)
            self.model.generation_config = made

    def load(self, name: str, shard: Path | None = None) -> None:
        """Give the block or head `name` its weights: the source's, or the changed ones in a finished `shard`."""
        from formulary.contracts._quantizer import FormularyConfig, FormularyQuantizer

        module = self.model.get_submodule(name)
        self._held[name] = list(module.modules())
        if shard is None:
            wanted = [key for key, home in self._homes.items() if home == name]
            self._fill({key: self._tensors.read(key) for key in wanted}, getattr(self.model, "hf_quantizer", None))
        else:
            tensors = _Tensors([shard])
            self._fill({key: tensors.read(key) for key in tensors}, FormularyQuantizer(FormularyConfig()))
        lacking = [key for key, value in module.state_dict().items() if value.device.type == "meta"]
        if lacking:
            raise FormularyError(f"{shard or self.path} is incomplete: it has no weights for {name}.{lacking[0]}")
        _move(module, self.device)
        refuse_nan(module, name)
        give_back()

    def _fill(self, state: dict[str, Any], quantizer) -> None:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        conversions = self.model._weight_conversions
        config = LoadStateDictConfig(weight_mapping=conversions, hf_quantizer=quantizer)
        info, _ = convert_and_load_state_dict_in_model(self.model, state, config)
        self.model._weight_conversions = conversions
        wrong = [*info.mismatched_keys, *info.conversion_errors]
        if wrong:
            raise FormularyError(f"{self.path} has weights that do not fit the model, such as {wrong[0]}")

    def drop(self, name: str) -> None:
        """Take the weights of `name` from memory, those of modules that were replaced since too."""
        _empty([*self._held.pop(name, []), *self.model.get_submodule(name).modules()])
        give_back()

    def drop_rest(self) -> None:
        """Take all weights that are still there from memory."""
        _empty(self.model.modules())
        give_back()

    def state(self, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
        """The tensors whose names are `wanted`, as transformers would save them."""
        from transformers.core_model_loading import revert_weight_conversion
        from transformers.modeling_utils import remove_tied_weights_from_state_dict

        ignored = self.model._keys_to_ignore_on_save or ()
        found = {name: value for name, value in self.model.state_dict().items() if wanted(name) and name not in ignored}
        found = revert_weight_conversion(self.model, remove_tied_weights_from_state_dict(found, self.model))
        return {name: value.contiguous() for name, value in found.items()}


def _move(module: nn.Module, device: torch.device) -> None:
    for value in [*module.parameters(), *module.buffers()]:
        if value.device.type not in ("meta", device.type):
            value.data = value.data.to(device)


def _empty(modules: Iterable[nn.Module]) -> None:
    for module in modules:
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(value, device="meta")


def give_back() -> None:
    """Return freed memory to the system: glibc keeps some for itself, more with every block. Elsewhere this does nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        pass
