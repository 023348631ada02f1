"""Layouts of other projects, in which transformers reads a result without formulary: compressed-tensors.

What a layout can hold is the layer class's business: a method names it as `layer`, and it has `check_compressed_tensors`, called
before any work, and `compressed_tensors`, which gives the tensors.
"""

import copy
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from formulary.contracts import edits, parts
from formulary.errors import FormularyError, UsageError, nearest
from formulary.files import write_json

FORMATS = ("formulary", "compressed-tensors")


def check(name: str | None, plans: list, model: nn.Module | None = None) -> None:
    """Refuse a layout that is unknown or that cannot hold what these methods will make of `model`."""
    if name is None or name == "formulary":
        return
    if name not in FORMATS:
        raise UsageError(f"there is no format {name!r}{nearest(name, FORMATS)}; formats: {', '.join(FORMATS)}")
    for plan in plans:
        layer = getattr(plan.cls, "layer", None)
        if len(plans) > 1 or not hasattr(layer, "check_compressed_tensors"):
            raise FormularyError(f"{'+'.join(p.slug for p in plans)} cannot be saved as {name}: it holds packed weights of one method alone")
        if model is not None:
            method = plan.instance()
            for part in parts.linears(model, plan.targets, plan.ignore):
                layer.check_compressed_tensors(part, method.grid, method.ordered)


def save(model: nn.Module, directory: Path) -> None:
    """`model.safetensors` and `config.json` with packed weights as compressed-tensors names them."""
    state: dict[str, Tensor] = model.state_dict()
    schemes, packed = [], {entry["name"] for entry in edits.edits_of(model)}
    for name in packed:
        module = model.get_submodule(name)
        if not hasattr(module, "compressed_tensors"):
            raise FormularyError(f"compressed-tensors cannot hold {name}: it is a {type(module).__name__}")
        tensors, scheme = module.compressed_tensors()
        for buffer, _ in module.named_buffers():
            del state[f"{name}.{buffer}"]
        state |= {f"{name}.{key}": value.contiguous() for key, value in tensors.items()}
        schemes += [scheme] if scheme not in schemes else []
    if len(schemes) != 1:
        raise FormularyError(f"compressed-tensors is written for one grid, and these weights have {len(schemes)}")
    held, quantizer = model.config, getattr(model, "hf_quantizer", None)
    model.config, model.hf_quantizer = copy.deepcopy(held), None
    try:
        del model.config.quantization_config
        model.save_pretrained(directory, state_dict=state, max_shard_size="1000GB")
    finally:
        model.config, model.hf_quantizer = held, quantizer
    left = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    config = json.loads((directory / "config.json").read_text("utf8"))
    config["quantization_config"] = _config(schemes[0], left)
    write_json(directory / "config.json", config)


def _config(scheme: dict[str, Any], left: list[str]) -> dict[str, Any]:
    """With zero points, the skeleton that compressed-tensors builds does not fit the file: loading then dequantizes at once."""
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "format": "pack-quantized"}},
        "ignore": left,
        "dequantize": not scheme["symmetric"],
    }
