"""Which rooms each suite runs over: every room with code, by its card's contract; nothing is listed by hand."""

from functools import cache

import torch

from formulary.catalogue import cards
from formulary.catalogue.rooms import has_code
from formulary.contracts import Data
from formulary.lab import small
from formulary.workshop import methods

FAMILIES = {
    "decoder": ("llama", "gpt2", "opt", "mixtral"),
    "encoder": ("bert", "albert"),
    "vision": ("vit", "dinov2"),
    "encoder-decoder": ("t5", "bart"),
}
KIND = {family: kind for kind, families in FAMILIES.items() for family in families}


@cache
def implementing(contract: str) -> list[tuple[str, type]]:
    """(slug, class) of every room that implements `contract`."""
    slugs = [slug for slug, card in sorted(cards().items()) if contract in card.contract and has_code(slug)]
    return [(slug, cls) for slug in slugs for cls in methods.contracts_of(slug)[contract]]


def quick(cls: type) -> dict:
    """Settings with which one run is quick, as the class itself names them."""
    return dict(getattr(cls, "quick", {}))


def tiny(family: str):
    return small.tiny(family).eval()


def data_for(model, *, n: int = 8, length: int = 12, labels: bool = True) -> Data:
    """Seeded items of several lengths that fit the model, labeled in two classes."""
    generator = torch.Generator().manual_seed(1)
    items = []
    for i in range(n):
        one = {k: v[0] for k, v in small.inputs_for(model, batch=1, length=length - i % 3, seed=i, labels=True).items()}
        items.append({k: v for k, v in one.items() if k not in ("attention_mask", "decoder_input_ids")})
    kind = "vision" if "pixel_values" in items[0] else "text"
    marks = torch.randint(2, (n,), generator=generator).tolist() if labels else None
    if kind == "text" and not model.config.is_encoder_decoder and not model.can_generate():
        items = [{k: v for k, v in item.items() if k != "labels"} for item in items]
    return Data(items, batch_size=4, labels=marks, facts={"classes": [0, 1]} if labels else {}, pad_token_id=0)


def outputs(model, batch) -> dict[str, torch.Tensor]:
    """Every tensor that the model returns, by key."""
    with torch.no_grad():
        out = model(**batch)
    return {key: value for key, value in out.items() if isinstance(value, torch.Tensor)}


def main(model, batch) -> torch.Tensor:
    out = outputs(model, batch)
    return out["logits"] if "logits" in out else out["last_hidden_state"]


def state(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}
