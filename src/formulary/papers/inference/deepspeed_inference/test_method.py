"""What is true of DeepSpeed Inference alone: same outputs, no work on padding, and memory that holds a few blocks."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import formulary
from formulary.contracts import Data, edits, parts
from formulary.errors import FormularyError, UsageError
from formulary.kernels import blocks, encoder, int8, native
from formulary.lab.small import inputs_for, tiny
from formulary.papers.inference.deepspeed_inference import DeepSpeedInference
from formulary.papers.inference.deepspeed_inference.packing import keys_seen, says_padding_alone
from formulary.papers.inference.deepspeed_inference.streaming import advise, file_pages
from formulary.papers.quantization.gptq import GPTQ
from formulary.papers.quantization.llm_int8 import LLMInt8


@pytest.mark.parametrize("kind", ["bert", "albert", "vit", "dinov2", "llama", "gpt2", "opt", "qwen2"])
def test_outputs_stay_those_of_the_model(kind):
    model = tiny(kind)
    fused, _ = DeepSpeedInference().apply(copy.deepcopy(model))
    batch = inputs_for(model)
    with torch.no_grad():
        seen, wanted = fused(**batch)[0], model(**batch)[0]
    if "attention_mask" in batch and wanted.ndim == 3:
        real = batch["attention_mask"].bool()
        assert not real.all()
        seen, wanted = seen[real], wanted[real]
    torch.testing.assert_close(seen, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right", "scattered"])
def test_padding_costs_nothing_and_comes_back_as_zeros(side):
    model = tiny("bert")
    fused, _ = DeepSpeedInference().apply(copy.deepcopy(model))
    ids = torch.randint(3, 90, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(3, 12, dtype=torch.long)
    for row, gaps in enumerate([(), (0, 1, 2, 3, 4), (0,)]):
        places = {"left": gaps, "right": [11 - i for i in gaps], "scattered": [2 * i for i in gaps]}[side]
        mask[row, list(places)] = 0
    with torch.no_grad():
        seen, wanted = (m(input_ids=ids, attention_mask=mask).last_hidden_state for m in (fused, model))
    torch.testing.assert_close(seen[mask.bool()], wanted[mask.bool()], atol=2e-6, rtol=1e-5)
    assert not seen[~mask.bool()].any()
    counted = []
    for one, given in ((fused, mask), (fused, torch.ones_like(mask))):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            one.encoder(one.embeddings(ids), attention_mask=given[:, None, None].bool())
        counted.append(counter.get_flop_counts()["Global"][torch.ops.aten.addmm])
    assert counted[0] / counted[1] == pytest.approx(float(mask.float().mean()))


def test_hidden_states_and_attention_are_given_whole_when_asked_for():
    model = tiny("bert")
    fused, _ = DeepSpeedInference().apply(copy.deepcopy(model))
    batch = inputs_for(model)
    with torch.no_grad():
        seen, wanted = (m(**batch, output_hidden_states=True).hidden_states for m in (fused, model))
    assert [x.shape for x in seen] == [x.shape for x in wanted]


def test_a_mask_that_says_more_than_padding_is_left_alone():
    def padding_of(mask):
        seen = keys_seen(mask, (mask.shape[0], mask.shape[-1]))
        return seen.tolist() if says_padding_alone(mask, seen) else None

    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4)
    assert padding_of(causal) is None and keys_seen(None, (2, 4)) is None
    assert padding_of(torch.ones(2, 1, 4, 4, dtype=torch.bool)) is None
    added = torch.zeros(1, 1, 3, 3).masked_fill(torch.tensor([False, False, True]), torch.finfo(torch.float32).min)
    assert padding_of(added) == [[True, True, False]] == padding_of(added[:, :, :1])
    assert padding_of(added + 0.5) is None
    both = causal & torch.tensor([True, True, True, False])
    assert padding_of(both) is None


def test_the_native_kernel_really_runs(monkeypatch):
    called = []
    real = encoder.attention
    monkeypatch.setattr(encoder, "attention", lambda *a, **k: called.append(a[3].tolist()) or real(*a, **k))
    fused, _ = DeepSpeedInference().apply(tiny("bert"))
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    with torch.no_grad():
        fused(input_ids=torch.full((2, 4), 7), attention_mask=mask)
    assert called == [[0, 3, 5]] * len(parts.blocks(fused))


def test_it_composes_with_int8_in_either_order():
    batch = inputs_for(tiny("bert"))
    orders = ((DeepSpeedInference(), LLMInt8()), (LLMInt8(), DeepSpeedInference()))
    with torch.no_grad():
        states = []
        for first, second in orders:
            model, _ = second.apply(first.apply(tiny("bert"))[0])
            states.append(model(**batch).last_hidden_state)
    torch.testing.assert_close(*states, atol=1e-4, rtol=1e-4)


def int8_pair(kind: str):
    """A model in int8, and the same with fused blocks; weights wide enough to matter."""
    model = tiny(kind)
    with torch.no_grad():
        for part in parts.linears(model):
            part.raw.mul_(4)
    model, _ = LLMInt8().apply(model)
    return model, DeepSpeedInference().apply(copy.deepcopy(model))[0]


def int4_pair(kind: str, dtype: torch.dtype = torch.float32, **settings):
    """The same with weights of few bits in groups."""
    model = tiny(kind)
    with torch.no_grad():
        for part in parts.linears(model):
            part.raw.mul_(4)
    batch = inputs_for(model, batch=8)
    model, _ = GPTQ(**settings).apply(model.to(dtype), Data([{key: x[i] for key, x in batch.items()} for i in range(8)]))
    return model, DeepSpeedInference().apply(copy.deepcopy(model))[0]


def counted(monkeypatch) -> list[str]:
    """Names of the native kernels as they run."""
    calls = []
    for name in ("encode", "decode"):
        real = getattr(blocks.Stack, name)
        monkeypatch.setattr(blocks.Stack, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k))
    return calls


@pytest.fixture
def float32_attention(monkeypatch, request):
    """Attention in float32 on every processor, so that no near-tie falls the other way."""
    monkeypatch.setattr(int8, "level", lambda: 1)
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-mno-avx512bf16"))
    again = lambda: (native.library.cache_clear(), blocks._library.cache_clear())
    request.addfinalizer(again)
    again()
    assert not blocks.in_halves()


native_only = pytest.mark.skipif(not blocks.available(), reason="no native path on this processor")


@native_only
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_int8_blocks_run_in_one_kernel(kind, monkeypatch):
    calls = counted(monkeypatch)
    model, fused = int8_pair(kind)
    batch = inputs_for(model)
    with torch.no_grad():
        seen, wanted = fused(**batch).last_hidden_state, model(**batch).last_hidden_state
    if kind == "bert":
        seen, wanted = (states[batch["attention_mask"].bool()] for states in (seen, wanted))
    assert calls == ["encode"] * (len(parts.blocks(model)) if kind == "vit" else 1)  # whose blocks are the model's own
    assert float((seen - wanted).norm() / wanted.norm()) < 0.02


@native_only
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_int8_generation_runs_in_one_call_a_token(kind, monkeypatch, float32_attention):
    calls = counted(monkeypatch)
    model, fused = int8_pair(kind)
    ids = inputs_for(model)["input_ids"][:1, 4:]
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        seen, wanted = (m.generate(ids, return_dict_in_generate=True, output_logits=True, **settings) for m in (fused, model))
        assert calls == ["decode"] * 12
        assert torch.equal(seen.sequences, wanted.sequences)
        torch.testing.assert_close(torch.stack(seen.logits), torch.stack(wanted.logits), atol=0.05, rtol=0.05)
        uncached = fused.generate(ids, use_cache=False, **settings)
        assert torch.equal(uncached, wanted.sequences)
        beams = [m.generate(ids, num_beams=3, **settings) for m in (fused, model)]
        assert torch.equal(*beams)


FEW_BITS = [
    {"bits": 4, "group_size": 16}, {"bits": 4}, {"bits": 3, "group_size": 8, "symmetric": True},
    {"bits": 4, "group_size": 24, "act_order": True}, {"bits": 2, "group_size": 16, "act_order": True, "static_groups": True},
]  # fmt: skip


@native_only
@pytest.mark.parametrize("settings", FEW_BITS, ids=str)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_blocks_of_few_bits_run_in_one_kernel(kind, settings, monkeypatch):
    calls = counted(monkeypatch)
    model, fused = int4_pair(kind, **settings)
    batch = {"input_ids": inputs_for(model)["input_ids"][:1, 4:]}
    with torch.no_grad():
        seen, wanted = fused(**batch)[0], model(**batch)[0]
    assert calls == ["encode" if kind == "bert" else "decode"]
    assert 0 < float((seen - wanted).norm() / wanted.norm()) < 0.02, "inputs are rounded to 8 bits"


@native_only
def test_generation_with_few_bits_is_the_same_with_a_cache_and_without(monkeypatch, float32_attention):
    calls = counted(monkeypatch)
    model, fused = int4_pair("llama", bits=4, group_size=16)
    model, fused = (LLMInt8(head=True, threshold=1e30).apply(one)[0] for one in (model, fused))
    ids = inputs_for(model)["input_ids"][:1, 4:]
    settings = {"max_new_tokens": 80, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        seen = fused.generate(ids, return_dict_in_generate=True, output_logits=True, **settings)
        assert calls == ["decode"] * 80
        again = fused(seen.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]
        torch.testing.assert_close(torch.stack(seen.logits, 1), again, atol=0.05, rtol=0.05)
        assert float((again - model(seen.sequences[:, :-1]).logits[:, ids.shape[1] - 1 :]).norm() / again.norm()) < 0.03
        settings["max_new_tokens"] = 6
        assert torch.equal(fused.generate(ids, use_cache=False, **settings), seen.sequences[:, : ids.shape[1] + 6])


@native_only
@pytest.mark.parametrize(("settings", "dtype"), [({"bits": 5}, torch.float32), ({"bits": 4}, torch.bfloat16)], ids=str)
def test_more_bits_and_causal_blocks_in_bfloat16_run_as_before(settings, dtype, monkeypatch):
    calls = counted(monkeypatch)
    model, fused = int4_pair("llama", dtype, **settings)
    ids = inputs_for(model)["input_ids"][:1, 4:]
    with torch.no_grad():
        torch.testing.assert_close(fused(ids).logits, model(ids).logits, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=1e-5)
    assert not calls


@native_only
def test_blocks_of_few_bits_in_bfloat16_run_in_one_kernel_where_they_are_not_causal(monkeypatch):
    calls = counted(monkeypatch)
    model, fused = int4_pair("bert", torch.bfloat16, bits=4, group_size=16)
    ids = inputs_for(model)["input_ids"][:1, :5]
    with torch.no_grad():
        seen, wanted = (one(ids).last_hidden_state.float() for one in (fused, model))
    assert calls == ["encode"] and float((seen - wanted).norm() / wanted.norm()) < 0.03


@native_only
def test_a_stack_that_asks_otherwise_gets_what_it_asks_for(monkeypatch):
    calls = counted(monkeypatch)
    model, fused = int8_pair("llama")
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    close = lambda a, b: torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    with torch.no_grad():
        close(fused(ids).logits, model(ids).logits)
        assert calls == ["decode"]
        seen, wanted = (one(ids, output_hidden_states=True) for one in (fused, model))
        assert len(seen.hidden_states) == len(wanted.hidden_states)
        for a, b in zip(seen.hidden_states, wanted.hidden_states):
            close(a, b)
        for one in (fused, model):
            one.config.num_hidden_layers = 1
        seen, wanted = (one(ids, use_cache=True) for one in (fused, model))
        close(seen.logits, wanted.logits)
        assert seen.cache.get_seq_length() == 9
        for one in (fused, model):
            one.config.num_hidden_layers = 2
            one.model.layers = torch.nn.ModuleList([*one.model.layers][::-1])
            one.model.layers[0].self_attn.layer_idx, one.model.layers[1].self_attn.layer_idx = 0, 1
        close(fused(ids).logits, model(ids).logits)
    seen = []
    handle = fused.model.layers[0].register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        fused(ids)
        handle.remove()
        close(seen[0], fused.model.layers[0](fused.model.embed_tokens(ids), position_embeddings=fused.model.rotary_emb(seen[0], torch.arange(9)[None])))
        assert float((seen[0] - fused(ids, output_hidden_states=True).hidden_states[-1]).norm()) > 0.1


@native_only
def test_tokens_that_follow_are_what_the_whole_sequence_gives(monkeypatch):
    """Step by step, with what callers may pass along, until the memory has grown; a changed weight is seen by the next prompt."""
    calls = counted(monkeypatch)
    _, fused = int8_pair("qwen2")
    ids = torch.randint(3, 60, (2, 90), generator=torch.Generator().manual_seed(0))
    close = lambda a, b: torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)
    with torch.no_grad():
        wanted, cache = fused(ids).logits, fused(ids[:, :4]).cache
        for t in range(4, 90):
            more = [
                {}, {"attention_mask": torch.ones(2, t + 1, dtype=torch.long)}, {"position_ids": torch.full((2, 1), t)},
                {"use_cache": True, "return_dict": True},
            ][t % 4]  # fmt: skip
            close(fused(ids[:, t : t + 1], cache=cache, **more).logits[:, 0], wanted[:, t])
        assert calls == ["decode"] * 88 and cache.get_seq_length() == 90
        assert cache.layers[1].keys.shape[2] == 90 and cache.layers[1].keys.dtype == torch.float32
        # other positions, a mask that hides something, and states asked for are not passed over
        turned = [fused(ids[:, :1], cache=copy.deepcopy(cache), position_ids=torch.full((2, 1), p)).logits for p in (90, 3)]
        assert float((turned[0] - turned[1]).norm()) > 0.1
        mask = torch.ones(2, 91, dtype=torch.long)
        mask[:, 20:80] = 0
        assert float((fused(ids[:, :1], cache=copy.deepcopy(cache), attention_mask=mask).logits - turned[0]).norm()) > 0.01
        assert len(fused(ids[:, :1], cache=copy.deepcopy(cache), output_hidden_states=True).hidden_states) == 3
        assert isinstance(fused(ids[:, :1], cache=copy.deepcopy(cache), return_dict=False), tuple)
        norm = fused.model.norm
        norm.weight.mul_(2)
        close(fused(ids[:, :4]).logits, 2 * wanted[:, :4])
        norm.weight.div_(2)
        linear = fused.model.layers[1].mlp.down_proj
        linear.store(-linear.weight)
        assert float((fused(ids).logits - wanted).norm()) > 1
    assert fused(ids[:, :4]).logits.requires_grad


@native_only
def test_a_cache_that_somebody_changed_is_believed():
    _, fused = int8_pair("llama")
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = fused(ids).cache
        twin = copy.deepcopy(cache)
        wanted = fused(ids[:, :1], cache=copy.deepcopy(cache)).logits
        for token in range(3, 6):
            fused(ids[:, token : token + 1], cache=cache)
        assert torch.equal(fused(ids[:, :1], cache=twin).logits, wanted), "a copy has memory of its own"
        cache.crop(-3)
        assert torch.equal(fused(ids[:, :1], cache=cache).logits, wanted), "tokens taken off are forgotten"
        swapped = fused(ids.flip(0)).cache
        swapped.reorder_cache(torch.tensor([1, 0]))
        torch.testing.assert_close(fused(ids[:, :1], cache=swapped).logits, wanted, atol=0.02, rtol=0.02)
        first = fused(ids[:, :5]).cache
        torch.testing.assert_close(fused(ids[:, 5:], cache=first).logits[:, -1], fused(ids).logits[:, -1], atol=0.02, rtol=0.02)


@native_only
def test_padding_in_a_causal_model_is_minded(monkeypatch):
    calls = counted(monkeypatch)
    model, fused = int8_pair("llama")
    batch = inputs_for(model)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        seen, wanted = (m(**batch).logits[real] for m in (fused, model))
    assert not real.all() and not calls
    torch.testing.assert_close(seen, wanted, atol=1e-4, rtol=1e-4)


@native_only
def test_an_encoder_in_one_call_still_shows_what_is_inside(monkeypatch):
    calls = counted(monkeypatch)
    model, fused = int8_pair("bert")
    batch = inputs_for(model)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        whole = fused(**batch).last_hidden_state[real]
        assert calls == ["encode"]
        seen, wanted = (one(**batch, output_hidden_states=True).hidden_states for one in (fused, model))
        assert len(seen) == len(wanted) == len(parts.blocks(model)) + 1
        for a, b in zip(seen, wanted):
            assert float((a[real] - b[real]).norm() / b[real].norm()) < 0.02
        assert float((seen[-1][real] - whole).norm() / whole.norm()) < 0.02
        fused.encoder.layer = torch.nn.ModuleList([*fused.encoder.layer][::-1])
        model.encoder.layer = torch.nn.ModuleList([*model.encoder.layer][::-1])
        seen, wanted = (one(**batch).last_hidden_state[real] for one in (fused, model))
        assert float((seen - wanted).norm() / wanted.norm()) < 0.02 < float((seen - whole).norm() / whole.norm())


def test_embeddings_of_another_kind_or_that_are_ignored_stay():
    own, plain = tiny("bert"), type(tiny("bert").embeddings)
    own.embeddings.__class__ = type("Own", (plain,), {"forward": lambda self, *args, **kwargs: 2 * plain.forward(self, *args, **kwargs)})
    ids = torch.tensor([[5, 6, 7]])
    for model, settings in ((own, {}), (tiny("bert"), {"ignore": ("embeddings",)})):
        fused, report = DeepSpeedInference(**settings).apply(copy.deepcopy(model))
        assert type(fused.embeddings) is type(model.embeddings) and "embeddings" not in {change.name for change in report.changes}
        with torch.no_grad():
            torch.testing.assert_close(fused(ids).last_hidden_state, model(ids).last_hidden_state, atol=1e-5, rtol=1e-5)
    fused, report = DeepSpeedInference().apply(tiny("bert"))
    assert type(fused.embeddings) is not plain and "embeddings" in {change.name for change in report.changes}


def test_embeddings_are_those_of_the_model(monkeypatch):
    calls = []
    real = encoder.embed
    monkeypatch.setattr(encoder, "embed", lambda *args: calls.append(1) or real(*args))
    model = tiny("bert")
    fused, _ = DeepSpeedInference().apply(copy.deepcopy(model))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    close = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for more in ({}, {"token_type_ids": torch.tensor([[0, 1, 1], [0, 0, 1]])}, {"position_ids": torch.tensor([[4, 2, 0]])}):
            close(fused.embeddings(ids, **more), model.embeddings(ids, **more))
        close(fused.embeddings(ids, cache_length=2), model.embeddings(ids, cache_length=2))
        assert len(calls) == 4
        with pytest.raises(IndexError):
            fused.embeddings(torch.tensor([[10**6]]))
        del calls[:]
        ready = torch.randn(1, 3, model.config.hidden_size)
        close(fused.embeddings(inputs_embeds=ready), model.embeddings(inputs_embeds=ready))
        seen = []
        handle = fused.embeddings.LayerNorm.register_forward_hook(lambda module, args, out: seen.append(out))
        close(fused.embeddings(ids), model.embeddings(ids))
        handle.remove()
        assert seen and not calls
    assert fused.embeddings(ids).requires_grad and not calls
    with torch.no_grad():
        fused.train()
        fused.embeddings(ids)
        assert not calls
        fused.eval().bfloat16()
        assert fused.embeddings(ids).dtype == torch.bfloat16 and not calls


@native_only
def test_what_the_kernel_does_not_cover_runs_as_before(monkeypatch):
    calls = counted(monkeypatch)
    model, fused = int8_pair("bert")
    batch = {"input_ids": torch.full((2, 5), 7)}
    with torch.no_grad():
        fused(**batch)
        assert calls == ["encode"]
        del calls[:]
        seen = []
        handle = fused.encoder.layer[0].attention.self.query.register_forward_hook(lambda module, args, out: seen.append(out.shape))
        fused(**batch)
        handle.remove()
        assert seen and len(calls) == len(parts.blocks(model)) - 1
        del calls[:]
        before = fused(**batch)[0]
        del calls[:]
        for one in (fused, model):
            one.encoder.layer[1].output.dense.store(-one.encoder.layer[1].output.dense.weight)
        seen, wanted = fused(**batch)[0], model(**batch)[0]
        assert float((seen - wanted).norm()) < 0.1 * float((seen - before).norm())
        assert calls == ["encode"], "written weights are packed again"
    del calls[:]
    assert fused(inputs_embeds=torch.randn(1, 4, model.config.hidden_size, requires_grad=True))[0].requires_grad and not calls


def test_training_still_works_and_gradients_agree():
    model = tiny("bert")
    fused, _ = DeepSpeedInference().apply(copy.deepcopy(model))
    batch = inputs_for(model)
    gradients = []
    for one in (model, fused):
        out = one(**batch).last_hidden_state
        out[batch["attention_mask"].bool()].square().mean().backward()
        gradients.append(one.encoder.layer[0].attention.self.query.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


# ---------------------------------------------------------------- streaming

PROGRAM = """
import json, sys, torch, formulary
from formulary.papers.inference.deepspeed_inference.streaming import file_pages
def resident():
    fields = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return 1024 * int(fields["RssFile"].split()[0])
torch.set_num_threads(1)
model = formulary.load(sys.argv[1])
with torch.no_grad():
    start, most = resident(), 0
    for block in model.model.layers:
        block.register_forward_hook(lambda *_: globals().update(most=max(most, resident())))
    out = model(torch.arange(6)[None]).logits
weights = sum(end - begin for block in model.model.layers for begin, end in file_pages(block))
print(json.dumps({"out": out.double().sum().item(), "end": resident() - start, "most": most - start, "weights": weights}))
"""


def wide_llama():
    """A Llama of 12 blocks and 38 MB, so that blocks are many pages."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=256, intermediate_size=768, num_hidden_layers=12, num_attention_heads=4)
    ).eval()


def streamed_run(directory) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, directory], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="streaming uses Linux's madvise")
def test_a_streamed_model_gives_its_weights_back_and_the_same_outputs(tmp_path):
    model = wide_llama()
    model.save_pretrained(tmp_path / "whole")
    streamed, _ = DeepSpeedInference(fuse=False, stream=True).apply(copy.deepcopy(model))
    streamed.save_pretrained(tmp_path / "streamed", variant="formulary")
    seen, whole = (streamed_run(str(tmp_path / name)) for name in ("streamed", "whole"))
    assert seen["out"] == whole["out"]
    assert seen["weights"] > 0.95 * sum(p.numel() * 4 for p in model.model.layers.parameters())
    assert seen["end"] < 0.3 * seen["weights"] and seen["most"] < 0.5 * seen["weights"], seen
    assert whole["end"] > 0.8 * whole["weights"], whole


@pytest.mark.skipif(sys.platform != "linux", reason="streaming uses Linux's madvise")
def test_a_changed_weight_is_never_lost(tmp_path):
    streamed, _ = DeepSpeedInference(fuse=False, stream=True).apply(wide_llama())
    streamed.save_pretrained(tmp_path / "streamed", variant="formulary")
    model = formulary.load(tmp_path / "streamed")
    block = model.model.layers[3]
    assert file_pages(block)
    block.mlp.up_proj.weight.data.mul_(-1)
    wanted = block.mlp.up_proj.weight.detach().clone()
    for _ in range(2):
        assert advise(block, "give back") > 0
        with torch.no_grad():
            model(torch.arange(6)[None])
    assert torch.equal(block.mlp.up_proj.weight, wanted)


def test_a_model_in_memory_is_never_advised_and_copies_let_go():
    streamed, _ = DeepSpeedInference(fuse=False, stream=True).apply(tiny("llama"))
    block = streamed.model.layers[0]
    assert file_pages(block) == [] and advise(block, "give back") == 0
    assert block.streamed_ahead.block() is streamed.model.layers[1]
    assert copy.deepcopy(streamed).model.layers[0].streamed_ahead.block() is None
    assert len(edits.edits_of(streamed)) == len(parts.blocks(streamed))


def test_what_cannot_be_done_is_refused_in_one_line():
    with pytest.raises(UsageError, match="nothing to do"):
        DeepSpeedInference(fuse=False, stream=False)
    model, _ = DeepSpeedInference().apply(tiny("bert"))
    with pytest.raises(FormularyError, match="one method can set it, not two"):
        DeepSpeedInference().apply(model)
