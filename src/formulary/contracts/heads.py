"""A classification head for a model that has none."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn

from formulary.contracts.edits import edits_of, record, replay
from formulary.errors import FormularyError


def with_head(model: nn.Module, classes: Sequence[Any]) -> nn.Module:
    """transformers' image or sequence classifier with this model's backbone (weights copied, edits made again) and a new
    head.

    Raises FormularyError when transformers has none for it, or its backbone does not fit.

    >>> from formulary.lab import tiny
    >>> type(with_head(tiny("vit"), ["cat", "dog"])).__name__
    'ViTForImageClassification'
    """
    from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

    sees = getattr(model, "main_input_name", "") == "pixel_values"
    auto, kind = (AutoModelForImageClassification, "image") if sees else (AutoModelForSequenceClassification, "sequence")
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.num_labels = len(classes)
    config.id2label = {i: str(name) for i, name in enumerate(classes)}
    config.label2id = {str(name): i for i, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    attention = config._attn_implementation if config._attn_implementation != "formulary" else None
    try:
        new = auto.from_config(config, attn_implementation=attention)
    except ValueError as error:
        raise FormularyError(f"transformers has no {kind} classifier around a {type(model).__name__}") from error
    prefix = f"{new.base_model_prefix}."
    old = prefix if model.base_model is not model else ""
    inside = [entry for entry in edits_of(model) if entry["name"].startswith(old)]
    edits = [{**entry, "name": prefix + entry["name"].removeprefix(old)} for entry in inside]
    replay(new, edits)
    state = {key: value.clone() for key, value in model.base_model.state_dict().items()}
    missing, _ = new.base_model.load_state_dict(state, strict=False, assign=True)
    if missing := [name for name in missing if not name.startswith("pooler.")]:
        raise FormularyError(f"this {type(model).__name__}'s backbone lacks {missing[0]}, so no head can be put on it")
    tensor, body = next(model.parameters()), {id(parameter) for parameter in new.base_model.parameters()}
    for parameter in new.parameters():
        if id(parameter) not in body:
            parameter.data = parameter.data.to(tensor.device, tensor.dtype)
    if edits:
        record(new, edits)
    return new.train(model.training)
