"""The data that a method calibrates on, trains on or is judged by: batches ready for `model(**batch)`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from formulary.errors import FormularyError


@dataclass(frozen=True)
class Data:
    """A list of encoded items and how to batch them.

    `items` holds one dict of unbatched tensors per item (`input_ids` of any length, or `pixel_values` (C,H,W), with
    `labels` and others where the model takes them). `batches()` pads token-like tensors on the right (on the left when
    `pad_left`), adds `attention_mask` where lengths differ, and stacks the rest.

    >>> import torch
    >>> data = Data([{"input_ids": torch.arange(3)}, {"input_ids": torch.arange(2)}], batch_size=2)
    >>> next(data.batches())["attention_mask"].tolist()
    [[1, 1, 1], [1, 1, 0]]
    """

    items: Sequence[dict[str, Tensor]]
    batch_size: int = 8
    seed: int = 0
    processor: Any = None
    labels: Sequence[Any] | None = None
    raw: Sequence[Any] | None = None
    name: str = "data"
    pad_token_id: int = 0
    pad_left: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not len(self.items):
            raise FormularyError(f"{self.name} is empty: give at least one text, image or sequence")

    def __len__(self) -> int:
        return len(self.items)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """All items once, in order, in batches of `batch_size`."""
        for start in range(0, len(self.items), self.batch_size):
            yield self.collate(self.items[start : start + self.batch_size])

    def sample(self, step: int) -> dict[str, Tensor]:
        """The batch of training step `step`: items shuffled anew each epoch by `seed`; the same for the same step."""
        per_epoch = -(-len(self.items) // self.batch_size)
        epoch, index = divmod(step, per_epoch)
        order = torch.randperm(len(self.items), generator=torch.Generator().manual_seed(1_000_003 * self.seed + epoch))
        chosen = order[index * self.batch_size : (index + 1) * self.batch_size].tolist()
        return self.collate([self.items[i] for i in chosen])

    def split(self, held_out: float = 0.25) -> tuple["Data", "Data"]:
        """Two parts that share no item: every k-th item is held out, so that both cover the whole."""
        every = max(2, round(1 / held_out))
        second = [i for i in range(len(self.items)) if i % every == every - 1]
        if not second or len(second) == len(self.items):
            raise FormularyError(f"{self.name} has {len(self.items)} item(s), too few to hold some out: give more data")
        first = [i for i in range(len(self.items)) if i % every != every - 1]
        return self.take(first), self.take(second)

    def take(self, indices: Sequence[int]) -> "Data":
        """The items at `indices`, with their labels and raw forms."""
        pick = lambda values: None if values is None else [values[i] for i in indices]
        return replace(self, items=pick(self.items), labels=pick(self.labels), raw=pick(self.raw))

    def collate(self, items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """One batch from unbatched items."""
        batch: dict[str, Tensor] = {}
        for key in items[0]:
            values = [torch.as_tensor(item[key]) for item in items]
            if values[0].ndim == 1 and len({len(v) for v in values}) > 1:
                batch[key] = self._pad(values, self._fill(key))
            else:
                batch[key] = torch.stack(values)
        if "input_ids" in batch and "attention_mask" not in batch:
            lengths = [torch.ones(len(item["input_ids"]), dtype=torch.long) for item in items]
            batch["attention_mask"] = self._pad(lengths, 0)
        return batch

    def _fill(self, key: str) -> int:
        return -100 if "labels" in key else self.pad_token_id if key.endswith("input_ids") else 0

    def _pad(self, values: Sequence[Tensor], fill: int) -> Tensor:
        longest = max(len(v) for v in values)
        out = values[0].new_full((len(values), longest), fill)
        for row, value in zip(out, values):
            if self.pad_left:
                row[longest - len(value) :] = value
            else:
                row[: len(value)] = value
        return out
