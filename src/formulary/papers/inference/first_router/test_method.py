"""What is true of FiRST alone: votes and skips by hand, caches without holes, the price of blocks, merged adapters."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab import small
from formulary.papers.inference.first_router import FiRST, RoutedBlock
from formulary.papers.inference.first_router.method import RouterLoss, Tuned, pieces, text_loss
from formulary.papers.inference.first_router.routing import Votes, routing_of, softly

LAYERS, PROMPT = 5, 6


def deep(family: str = "llama", layers: int = LAYERS):
    config = copy.deepcopy(small.tiny(family).config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * layers
    torch.manual_seed(0)
    model = type(small.tiny(family))(config).eval()
    for part in parts.linears(model):
        part.raw.data.mul_(6)
    return model


def texts(n: int = 8, length: int = 14, seed: int = 0, **options) -> Data:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 97, (length - i % 3,), generator=generator) for i in range(n)]
    return Data([{"input_ids": row} for row in rows], batch_size=4, **options)


def routed(model, seed: int = 0):
    """Routers that say different things of different sequences."""
    settings = {"prompt": PROMPT, "router_steps": 1, "tune_steps": 0}
    model, _ = FiRST(**settings).apply(model, texts())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in parts.blocks(model)[1:-1]:
            block.module.router.weight.normal_(0, 0.5, generator=generator)
            block.module.router.bias.zero_()
    return model


def logits(model, **batch):
    with torch.no_grad():
        return model(**batch).logits


def decisions(model, ids):
    """(blocks,) of one sequence: the votes of its first tokens by hand, on a copy that has no edits."""
    found = []
    with torch.no_grad():
        states = plain(model)(input_ids=ids[None, :PROMPT], output_hidden_states=True).hidden_states
    for i, block in enumerate(parts.blocks(model)):
        if not isinstance(block.module, RoutedBlock):
            found.append(True)
            continue
        x = states[i][0]
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        r = (x @ block.module.router.weight + block.module.router.bias).sigmoid()
        found.append(bool(r.sum() / PROMPT > 0.5))
    return found


def plain(model):
    """transformers' own model with these weights."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    new = type(model)(config).eval()
    known = new.state_dict().keys()
    new.load_state_dict({key: value for key, value in model.state_dict().items() if key in known})
    return new


def test_votes_and_skips_are_those_of_a_loop_over_blocks():
    model = routed(deep())
    rows = torch.randint(3, 97, (8, 14), generator=torch.Generator().manual_seed(5))
    found, base, seen = logits(model, input_ids=rows), plain(model).model, set()
    for row, one in zip(rows, found):
        keep = decisions(model, row)
        seen.add(tuple(keep))
        with torch.no_grad():
            x = base.embed_tokens(row[None])
            angles = base.rotary_emb(x, torch.arange(14)[None])
            for block, kept in zip(base.layers, keep):
                y = block(x, position_embeddings=angles)
                x = y if kept else torch.cat([y[:, :PROMPT], x[:, PROMPT:]], 1)
            expected = model.lm_head(base.norm(x))[0]
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-3)
    assert len(seen) > 2 and any(not all(keep) for keep in seen)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "mixtral"])
@pytest.mark.parametrize("beams,length", [(1, 12), (1, 4), (3, 12), (3, 4)])
def test_generation_with_a_cache_is_as_without(family, beams, length):
    """Prompts longer than the tokens that vote, and shorter, so that what was generated votes too; one is padded."""
    model = routed(deep(family))
    inputs = small.inputs_for(model, batch=3, length=length)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, use_cache=False, **options))


def test_a_sequence_alone_is_as_in_a_batch_and_as_padded():
    model = routed(deep())
    rows = [item["input_ids"] for item in texts(n=6).items]
    batch = Data([{"input_ids": row} for row in rows], pad_left=True).collate([{"input_ids": row} for row in rows])
    together = logits(model, **batch)
    for row, one in zip(rows, together):
        torch.testing.assert_close(one[-len(row) :], logits(model, input_ids=row[None])[0], rtol=1e-3, atol=1e-3)


def test_skipped_blocks_are_not_computed_and_keep_no_keys():
    model = routed(deep())
    ids = next(row for row in torch.randint(3, 97, (20, 12)) if not all(decisions(model, row)))
    keep, rows = decisions(model, ids), [0] * LAYERS
    for i, block in enumerate(parts.blocks(model)):
        count = lambda module, args, out, i=i: rows.__setitem__(i, rows[i] + out.shape[1])
        block.module.mlp.register_forward_hook(count)
    cache = DynamicCache(config=model.config)
    logits(model, input_ids=ids[None], cache=cache, use_cache=True)
    assert rows == [12 if kept else PROMPT for kept in keep]
    for token in (5, 6, 7):
        logits(model, input_ids=torch.tensor([[token]]), cache=cache, use_cache=True)
    assert rows == [15 if kept else PROMPT for kept in keep]
    assert [layer.get_seq_length() for layer in cache.layers] == rows
    assert isinstance(cache.layers[1], Votes) and not isinstance(cache.layers[0], Votes)


def test_votes_do_not_fit_into_other_caches():
    model = routed(deep())
    ids = torch.arange(3, 9)[None]
    with pytest.raises(FormularyError, match="default dynamic cache"):
        logits(model, input_ids=ids, cache=StaticCache(config=model.config, max_cache_len=32), use_cache=True)
    with pytest.raises(FormularyError, match="assisted"):
        Votes().crop(1)


def test_training_mixes_each_token_and_the_loss_is_its_terms():
    model, data = routed(deep()), texts(n=4)
    batch = data.collate(data.items)
    base = plain(model)
    seen = []
    with torch.no_grad(), softly(model):
        mixed = model(**batch).logits
    with torch.no_grad():
        for item in data.items:
            ids = item["input_ids"][None]
            x = base.model.embed_tokens(ids)
            angles = base.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
            rates = []
            for block, changed in zip(base.model.layers, parts.blocks(model)):
                y = block(x, position_embeddings=angles)
                if isinstance(changed.module, RoutedBlock):
                    router = changed.module.router
                    r = (x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ router.weight + router.bias).sigmoid()
                    rates.append(r[0])
                    y = r[..., None] * y + (1 - r[..., None]) * x
                x = y
            seen.append((base.lm_head(base.model.norm(x))[0], torch.stack(rates)))
    for one, (expected, _) in zip(mixed, seen):
        torch.testing.assert_close(one[: len(expected)], expected, rtol=1e-3, atol=1e-3)
    r = torch.cat([rates for _, rates in seen], 1)
    pairs = [(out[:-1], item["input_ids"][1:]) for (out, _), item in zip(seen, data.items)]
    text = sum(float(F.cross_entropy(*pair, reduction="sum")) for pair in pairs) / sum(len(ids) for _, ids in pairs)
    loss = RouterLoss(wanted=0.3, sharpness=0.7)
    loss.price = 2.0
    expected = text + 2.0 * float(r.mean()) + 0.7 * float((r * (1 - r)).mean())
    assert float(loss(model, batch).detach()) == pytest.approx(expected, rel=1e-3)
    assert loss.price == pytest.approx(2.0 + float(r.mean()) - 0.3, rel=1e-3)
    assert routing_of(model).answers == [] and not routing_of(model).soft


@pytest.mark.parametrize("skip,out", [(0.2, 8), (0.4, 16), (0.6, 24), (0.0, 0)])
def test_the_wanted_share_of_blocks_is_skipped_on_the_training_texts(skip, out):
    """Of 5 blocks 3 have a router: among 8 texts, skip of all 5 is `out` of 24 choices."""
    model, report = FiRST(skip=skip, prompt=PROMPT, router_steps=3, tune_steps=0).apply(deep(), texts())
    assert report.figures["blocks skipped by a sequence"] == pytest.approx(out / 8)
    skipped = sum(not kept for item in texts().items for kept in decisions(model, item["input_ids"]))
    assert skipped == out


def test_a_block_that_does_nothing_is_what_is_skipped():
    model = deep()
    idle = parts.blocks(model)[2].module
    with torch.no_grad():
        idle.self_attn.o_proj.weight.zero_()
        idle.mlp.down_proj.weight.zero_()
        model.lm_head.weight.mul_(20)
    settings = {"skip": 0.2, "prompt": PROMPT, "router_steps": 60, "tune_steps": 0}
    data = texts(n=16)
    with torch.no_grad():
        rows = [model.generate(item["input_ids"][None, :3], max_new_tokens=11, do_sample=False)[0] for item in data.items]
    _, report = FiRST(**settings).apply(model, Data([{"input_ids": row} for row in rows], batch_size=4))
    before, idle, after = (row["skipped by"] for row in report.tables["routers"])
    assert idle > 0.8 and before < 0.15 and after < 0.15


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_adapters_are_the_unmerged(family):
    model, batch = deep(family), small.inputs_for(small.tiny(family))
    before = logits(model, **batch)
    tuned = Tuned(model, parts.linears(model), rank=3)
    with tuned.adding():
        torch.testing.assert_close(logits(model, **batch), before)
    for up in tuned.up:
        up.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    with tuned.adding():
        added = logits(model, **batch)
    tuned.merge()
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(model, **batch)[real], added[real], rtol=1e-3, atol=1e-3)
    assert (added - before).abs().max() > 0.1
    assert not any(part.module._forward_hooks for part in parts.linears(model))


def test_tuning_lowers_the_loss_of_the_model_that_skips():
    data, found = texts(n=8), {}
    batch = data.collate(data.items)
    for steps in (0, 20):
        settings = {"skip": 0.4, "prompt": PROMPT, "router_steps": 4, "tune_steps": steps, "learning_rate": 1e-2}
        model, report = FiRST(**settings).apply(deep(), data)
        found[steps] = float(text_loss(model, batch).detach())
    assert found[20] < found[0] - 0.1 and "merged" in report.headline


def test_texts_are_cut_into_pieces_with_their_labels():
    items = [{"input_ids": torch.arange(n), "labels": torch.arange(n) + 50} for n in (7, 4)]
    data = Data(items)
    cut = pieces(data, 3).items
    assert [item["input_ids"].tolist() for item in cut] == [[0, 1, 2], [3, 4, 5], [0, 1, 2]]
    assert cut[1]["labels"].tolist() == [53, 54, 55]


WRONG = {"skip": 1.5, "prompt": 0, "first": 0, "last": -1, "router_steps": 0, "rank": 0, "router_rate": 0.0, "length": 1}


@pytest.mark.parametrize("wrong", [{name: value} for name, value in WRONG.items()])
def test_wrong_parameters_are_refused(wrong):
    with pytest.raises(UsageError, match=f"first-router: {next(iter(wrong))}"):
        FiRST(**wrong)


def test_models_with_too_few_blocks_are_refused():
    with pytest.raises(FormularyError, match="of 2 blocks none"):
        FiRST().apply(small.tiny("llama"), texts())
    with pytest.raises(FormularyError, match="less than skip=0.9"):
        FiRST(skip=0.9).apply(deep(), texts())
