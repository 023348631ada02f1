"""Calibration sums: right for every kind of model, each input summed once, and nothing computed that nobody looks at."""

import pytest
import torch

from formulary.contracts import Data, blockwise, parts
from formulary.contracts.blockwise import Blockwise
from formulary.lab import inputs_for, tiny

KINDS = ["llama", "gpt2", "mixtral", "bert", "albert", "t5", "vit"]


def batches_of(model, count: int = 3) -> Data:
    items = []
    for seed in range(count):
        torch.manual_seed(seed)
        batch = inputs_for(model, batch=2)
        items += [{key: value[i] for key, value in batch.items()} for i in range(2)]
    return Data(items, batch_size=2)


def sums_by_hand(model, chosen, data) -> dict:
    found: dict = {}

    def see(part, x, expert):
        key, x = (part.name, expert), x.double()
        found[key] = found.get(key, 0) + x.mT @ x

    with parts.observe(chosen, see) as run:
        for batch in data.batches():
            run(model, batch)
    return found


@pytest.mark.parametrize("frugal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_grams_are_the_sums_of_all_inputs(kind, frugal):
    model = tiny(kind)
    data, walk = batches_of(model), Blockwise(model, batches_of(model), frugal=frugal)
    block = walk.blocks[0]
    chosen = blockwise.inside(parts.linears(model), block)
    wanted, names = sums_by_hand(model, chosen, data), []
    for part, grams in walk.grams(block, chosen):
        names.append(part.name)
        for expert, gram in zip(range(part.experts) or [None], grams):
            by_hand = wanted.get((part.name, expert))
            assert (gram is None) == (by_hand is None)
            if gram is not None:
                torch.testing.assert_close(gram.double(), by_hand, rtol=1e-4, atol=1e-5)
    assert names == [part.name for part in chosen]


def test_an_input_that_linears_share_is_summed_once_and_the_last_product_is_left_out(monkeypatch):
    added, computed = [], []
    add = blockwise.Gram.add
    monkeypatch.setattr(blockwise.Gram, "add", lambda self, x: (added.append(self.features), add(self, x)) and None)
    model = tiny("llama")
    walk = Blockwise(model, batches_of(model))
    block = walk.blocks[0]
    last = model.get_submodule(f"{block.name}.mlp.down_proj")
    last.register_forward_hook(lambda *_: computed.append(1))
    grams = dict((part.name.rpartition(".")[2], grams[0]) for part, grams in walk.grams(block, blockwise.inside(parts.linears(model), block)))
    assert len(added) == 3 * 4  # a batch: queries, keys and values; the output; gate and up; down
    assert len(computed) == 1  # the first batch alone runs past the last linear
    assert grams["q_proj"] is grams["v_proj"] and grams["gate_proj"] is grams["up_proj"] and grams["o_proj"] is not grams["q_proj"]


def test_linears_that_share_an_input_in_some_batches_only_have_sums_of_their_own():
    class Twofold(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)

        def forward(self, x, apart):
            return self.first(x) + self.second(2 * x if apart.any() else x)

    model = Twofold()
    walk = Blockwise.__new__(Blockwise)
    rows = torch.randn(4, 4)
    walk.model, walk.frugal, walk.sequential, walk.blocks, walk.done, walk.device = model, False, False, [], set(), rows.device
    walk.halves = False
    walk.data = Data([{"x": row, "apart": torch.tensor(i == 3)} for i, row in enumerate(rows)], batch_size=2)
    chosen = [parts.Linear(name, getattr(model, name), "linear") for name in ("first", "second")]
    (_, [first]), (_, [second]) = walk.grams(None, chosen)
    scaled = rows * torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None]
    torch.testing.assert_close(first, rows.mT @ rows)
    torch.testing.assert_close(second, scaled.mT @ scaled)
