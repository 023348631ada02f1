import pytest
import torch

from formulary.contracts import Data, parts
from formulary.errors import FormularyError, UsageError
from formulary.lab.small import DECODERS, tiny
from formulary.papers.interpretability.retrieval_head import Needle, RetrievalHeads, copied_positions, masked_heads, retrieval_scores
from formulary.papers.interpretability.retrieval_head.method import greedy


def tokens(count=200, seed=0):
    return Data([{"input_ids": torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed))}], seed=seed)


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 20)[None]).logits


def test_copies_are_counted_as_written_by_hand():
    prompt = Needle(torch.tensor([9, 5, 6, 7, 6, 9, 8]), start=1, end=5, length=3, depth=0.3)
    peaks = torch.tensor([[1, 3, 0], [2, 4, 6], [5, 7, 3]])
    attention = torch.nn.functional.one_hot(peaks, 9).float()
    assert copied_positions(attention, prompt, 6).tolist() == [[-1, -1, -1], [2, 4, -1], [-1, -1, -1]]
    assert copied_positions(attention, prompt, 9).eq(-1).all()
    assert copied_positions(attention, prompt, 7).tolist() == [[-1, 3, -1], [-1, -1, -1], [-1, -1, 3]]


def reference_scores(model, prompt, steps):
    """The score counted in plain loops, without a cache, on "eager" attention."""
    model.set_attn_implementation("eager")
    ids, emitted, hits = prompt.ids.tolist(), [], {}
    for _ in range(steps):
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), output_attentions=True)
        token = int(out.logits[0, -1].argmax())
        for layer, weights in enumerate(out.attentions):
            for head in range(weights.shape[1]):
                at = int(weights[0, head, -1].argmax())
                if prompt.start <= at < prompt.end and ids[at] == token:
                    hits.setdefault((layer, head), set()).add(at)
        ids.append(token)
        emitted.append(token)
    model.set_attn_implementation("sdpa")
    score = torch.zeros(len(parts.mixers(model)), parts.mixers(model)[0].heads)
    for (layer, head), places in hits.items():
        score[layer, head] = len(places) / (prompt.end - prompt.start)
    return emitted, score


def sliding():
    """A tiny Mistral whose layers see the last 12 positions only."""
    from transformers import MistralConfig, MistralForCausalLM

    widths = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(vocab_size=97, intermediate_size=64, sliding_window=12, **widths)).eval()


@pytest.mark.parametrize("kind", [*DECODERS, "sliding"])
def test_scores_are_those_of_plain_loops(kind):
    model, copied = sliding() if kind == "sliding" else tiny(kind), 0.0
    for seed in range(2):
        ids = torch.randint(3, 97, (20,), generator=torch.Generator().manual_seed(seed))
        for _ in range(2):  # put what the model says into the needle, so that there is something to copy
            ids[3:17] = greedy(model, ids[None], 14)[0]
        prompt = Needle(ids, 3, 17, 6, 0.5)
        emitted, score = retrieval_scores(model, prompt, 6)
        expected, counted = reference_scores(model, prompt, 6)
        assert emitted == expected
        assert torch.equal(score, counted)
        copied += float(score.sum())
    assert copied > 0


@pytest.mark.parametrize("kind", DECODERS)
def test_a_masked_head_is_one_whose_output_columns_are_zero(kind):
    model, other = tiny(kind), tiny(kind)
    before = logits(model)
    with masked_heads(model, [(0, 1), (1, 0), (1, 3)]):
        masked = logits(model)
    with torch.no_grad():
        for layer, heads in ((0, [1]), (1, [0, 3])):
            inside = [p for p in parts.linears(other) if p.name.startswith(parts.mixers(other)[layer].name)]
            (last,) = [p for p in inside if p.name.endswith(("o_proj", "c_proj", "out_proj"))]
            for head in heads:
                last.weight()[:, 8 * head : 8 * head + 8] = 0
    assert torch.allclose(masked, logits(other), atol=1e-5) and not torch.allclose(masked, before, atol=1e-5)
    assert torch.equal(logits(model), before)
    with pytest.raises(UsageError, match="no head"), masked_heads(model, [(0, 0), (0, 4)]):
        pass
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_probe_leaves_the_model_as_it_was(kind):
    model = tiny(kind).train()
    before, implementation = logits(model.eval()), model.config._attn_implementation
    probe = RetrievalHeads(lengths=(20,), depths=(0.0, 1.0), needles=2, max_new_tokens=4, recall=0.0, masked=2, draws=2)
    reports = [probe.run(model, tokens()) for _ in range(2)]
    assert torch.equal(logits(model), before) and model.config._attn_implementation == implementation
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert reports[0].as_dict() == reports[1].as_dict()
    assert len(reports[0].tables["prompts"]) == 4


def test_needles_are_found_where_they_were_put():
    probe = RetrievalHeads(lengths=(20, 30), depths=(0.0, 0.5, 1.0), needles=2, max_new_tokens=4)
    report = probe.run(tiny("llama"), tokens())
    prompts = probe.prompts(tiny("llama"), tokens(), report)
    assert len(prompts) == 12 and len({tuple(p.ids.tolist()) for p in prompts}) == 12
    for prompt in prompts:
        ids = prompt.ids.tolist()
        assert prompt.start == round(prompt.depth * prompt.length) + 3 and len(prompt.answer) == 6
        assert ids[prompt.start - 3 : prompt.start] == ids[-3:]
        hay = ids[: prompt.start - 3] + ids[prompt.end : -3]
        whole = tokens().items[0]["input_ids"].tolist()
        assert any(whole[i : i + prompt.length] == hay for i in range(len(whole)))


def test_prompts_unanswered_are_left_out():
    report = RetrievalHeads(lengths=(20,), depths=(0.5,), needles=2, max_new_tokens=4).run(tiny("gpt2"), tokens())
    assert "answered 0 of 2 prompts" in report.headline and "heads" not in report.tables and not report.figures


def test_tables_and_figure():
    probe = RetrievalHeads(lengths=(20,), depths=(0.5,), needles=40, max_new_tokens=6, recall=0.0, masked=1, draws=2)
    report = probe.run(tiny("llama"), tokens())
    answered = [row for row in report.tables["prompts"] if row["recall"] > 0]
    heads, values = report.tables["heads"], report.figures["retrieval score"]["values"]
    assert 0 < len(answered) < 40 and f"answered {len(answered)} of 40 prompts" in report.headline
    assert len(heads) == 8 and [row["score"] for row in heads] == sorted((row["score"] for row in heads), reverse=True)
    assert all(values[row["layer"]][row["head"]] == row["score"] for row in heads)
    masking = {row["masked heads"]: row["recall"] for row in report.tables["masking"]}
    assert masking["none"] == pytest.approx(sum(row["recall"] for row in answered) / len(answered))
    assert list(masking) == ["none", "best 1", "random 1, draw 1", "random 1, draw 2"]


def test_refusals_are_one_line():
    with pytest.raises(FormularyError, match="does not support encoder"):
        RetrievalHeads().run(tiny("bert"), tokens())
    with pytest.raises(FormularyError, match="needs data"):
        RetrievalHeads().run(tiny("llama"))
    with pytest.raises(FormularyError, match="only 200 tokens"):
        RetrievalHeads(lengths=(500,)).run(tiny("llama"), tokens())
    with pytest.raises(FormularyError, match="only 64 positions"):
        RetrievalHeads(lengths=(60,)).run(tiny("gpt2"), tokens())
    report = RetrievalHeads(lengths=(20, 500), needles=1, max_new_tokens=2).run(tiny("llama"), tokens())
    assert report.headline.startswith("retrieval-head; length 500 skipped: the data has only 200 tokens; answered")
    for wrong in ({"lengths": ()}, {"depths": (1.5,)}, {"needles": 0}, {"recall": 2.0}):
        with pytest.raises(UsageError, match=next(iter(wrong))) as told:
            RetrievalHeads(**wrong)
        assert "\n" not in str(told.value)


def test_prompts_in_words():
    from formulary import lab

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(lab.path("minilm"))
    rows = [{"input_ids": torch.tensor(tokenizer(verse)["input_ids"])} for verse in lab.kjv(split="test")[:40]]
    probe = RetrievalHeads(lengths=(100,), depths=(0.0, 0.5), needles=3)
    data = Data(rows, processor=tokenizer, seed=4)
    prompts = probe.prompts(tiny("llama"), data, probe.run(tiny("llama"), tokens()))
    assert len(prompts) == 6
    for prompt in prompts:
        answer, text = tokenizer.decode(prompt.answer), tokenizer.decode(prompt.ids)
        assert answer.count("a ") == 4 and " and a " in answer
        assert text.startswith("[CLS]") and text.count("[SEP]") == 0 and text.count(answer) == 1
        told = text[: text.index(answer)].rstrip().rpartition(".")[2].strip()
        assert text.endswith(told.removeprefix("[CLS]").strip()) and "question :" in text
    assert [p.answer for p in prompts] == [p.answer for p in probe.prompts(tiny("llama"), data, probe.run(tiny("llama"), tokens()))]
