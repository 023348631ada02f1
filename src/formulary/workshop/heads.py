"""A classification head for a model that has none, so that a recipe can train on labels."""

import copy

from torch import nn

from formulary.errors import FormularyError


def trainable_copy(model: nn.Module, kind: str, classes: list | None) -> nn.Module:
    """A copy of `model` that returns a loss on labeled batches.

    Language models are copied as they are. With `classes`, a model whose head has that many outputs is copied; any other becomes
    transformers' classification model around the same backbone, with a new head. Raises FormularyError where there is none.
    """
    if kind in ("decoder", "encoder-decoder") and classes is None:
        return copy.deepcopy(model)
    if classes is None:
        raise FormularyError(f"training this {kind} model needs labels: a folder with one subfolder a class, or --labels FIELD")
    if "Classification" in type(model).__name__ and model.config.num_labels == len(classes):
        return copy.deepcopy(model)
    return _with_head(model, kind, classes)


def _with_head(model: nn.Module, kind: str, classes: list) -> nn.Module:
    import transformers

    auto = transformers.AutoModelForImageClassification if kind == "vision" else transformers.AutoModelForSequenceClassification
    config = copy.deepcopy(model.config)
    config.num_labels = len(classes)
    config.id2label = {i: str(value) for i, value in enumerate(classes)}
    config.label2id = {str(value): i for i, value in enumerate(classes)}
    try:
        new = auto.from_config(config)
    except ValueError as error:
        raise FormularyError(f"transformers has no classification model around a {type(model).__name__}") from error
    old = model.base_model.state_dict()
    new.base_model.load_state_dict({k: v.clone() for k, v in old.items() if k in new.base_model.state_dict()}, strict=False)
    return new.to(next(model.parameters()).dtype).eval()
