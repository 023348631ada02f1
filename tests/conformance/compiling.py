"""Compiles transformed tiny models (dynamo's own eager backend, no C++) and prints how far their outputs are from before.

    python -m tests.conformance.compiling SLUG ...
"""

import copy
import itertools
import json
import sys

import torch

from formulary.errors import FormularyError
from formulary.lab import small
from tests.conformance import rooms


def one_layer(family: str):
    """A tiny model of one layer: tracing takes as long as the model is deep."""
    config = copy.deepcopy(rooms.tiny(family).config)
    for name in ("num_hidden_layers", "num_decoder_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, 1)
    torch.manual_seed(0)
    return type(rooms.tiny(family))(config).eval()


def transformed(cls, kind: str):
    """(family, changed model) for the first family of the kind that the transform changes, of one layer where that is enough
    for it; None where there is none."""
    for family, tiny in itertools.product(rooms.FAMILIES[kind], (one_layer, rooms.tiny)):
        try:
            return family, cls(**rooms.quick(cls)).apply(tiny(family), rooms.data_for(tiny(family)))[0]
        except FormularyError:
            continue
    return None


def difference(model) -> float:
    """Largest difference between compiled and plain outputs, relative to the largest output."""
    model, batch = model.eval(), small.inputs_for(model)
    expected = rooms.main(model, batch)
    torch._dynamo.reset()
    got = rooms.main(torch.compile(model, backend="eager"), batch)
    return float((got - expected).abs().max() / expected.abs().max())


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for slug, cls in rooms.implementing("transform"):
        for kind in sorted(cls.supports) if slug in sys.argv[1:] else ():
            if (made := transformed(cls, kind)) is not None:
                found[f"{slug}-{made[0]}"] = difference(made[1])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
