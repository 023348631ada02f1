"""What a recipe trains: a copy of the model that returns a loss on the data's batches."""

import copy

from torch import nn

from formulary.contracts.heads import with_head
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
    return with_head(model, classes)
