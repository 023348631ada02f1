"""The token table of a model, which rooms that train at 1 or 2 bits replace where nothing else reads it."""

from torch import nn

from formulary.contracts import Report, parts
from formulary.contracts.edits import Editor

from ._training import LowBit


def replace_table(
    model: nn.Module, cls: type[LowBit], ignore: tuple[str, ...], edit: Editor, report: Report, **args
) -> list[LowBit]:
    """Put `cls(num_embeddings, embedding_dim, padding_idx, **args)` in the place of the token table and start it from the
    table's weights; gives [it], or [] where the table is ignored, tied, or no plain table, which the report says.
    """
    table = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(table, nn.Embedding):
        return []
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is table]
    if parts.matches(names[0], table, ignore):
        return []
    weight = table.weight
    owners = sum(module._parameters.get("weight") is weight for module in model.modules())
    if len(names) > 1 or owners > 1:
        report.skipped(names[0], "a table that is tied stays as it is", weight.numel())
        return []
    if type(table) is not nn.Embedding:
        report.skipped(names[0], "a table that is read in a way of its own", weight.numel())
        return []
    sizes = {"num_embeddings": table.num_embeddings, "embedding_dim": table.embedding_dim}
    new = edit.edit(names[0], cls, **sizes, padding_idx=table.padding_idx, **args)
    new.start(weight)
    report.changed(names[0], weight.numel(), f"{new.bits} bit{'s' if new.bits > 1 else ''}")
    return [new]
