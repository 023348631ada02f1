"""Compiles every transformed tiny model (dynamo's own eager backend, no C++) and prints how far its outputs are from before."""

import json

import torch

from formulary.errors import FormularyError
from formulary.lab import small
from tests.conformance import rooms

FIRST = {"decoder": "llama", "encoder": "bert", "vision": "vit", "encoder-decoder": "t5"}


def difference(cls, family: str) -> float:
    """Largest difference between compiled and plain outputs, relative to the largest output."""
    model, _ = cls(**rooms.quick(cls)).apply(rooms.tiny(family), rooms.data_for(rooms.tiny(family)))
    model, batch = model.eval(), small.inputs_for(model)
    expected = rooms.main(model, batch)
    torch._dynamo.reset()
    got = rooms.main(torch.compile(model, backend="eager"), batch)
    return float((got - expected).abs().max() / expected.abs().max())


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for slug, cls in rooms.implementing("transform"):
        for kind in sorted(cls.supports):
            family = next((f for f in rooms.FAMILIES[kind] if _works(cls, f)), FIRST[kind])
            found[f"{slug}-{family}"] = difference(cls, family)
    print(json.dumps(found))


def _works(cls, family: str) -> bool:
    try:
        cls(**rooms.quick(cls)).apply(rooms.tiny(family), rooms.data_for(rooms.tiny(family)))
    except FormularyError:
        return False
    return True


if __name__ == "__main__":
    main()
