"""Streaming blocks from disk: same outputs, how little memory, and how the slowdown falls as the batch grows.

A random Llama of 12 blocks of width 512, saved once; one copy is loaded to stay in memory, one to stream. Weights that
the kernel takes back are read again from the disk or its cache, which costs the same for one sequence and for 32.
"""

import tempfile
from functools import cache
from pathlib import Path

import torch

from formulary.evidence import Check, Outcome, all_of, at_most, exact, speedup

from .method import DeepSpeedInference
from .streaming import file_pages

DIFFERENCE, RESIDENT = "largest output difference", "resident weights, share of all"
LENGTH, BATCH = 16, 32


@cache
def models():
    """(the model in memory, the same streamed from disk, the directory that it streams from)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1376, num_hidden_layers=12, num_attention_heads=8
    )
    whole, folder = LlamaForCausalLM(config).eval(), tempfile.TemporaryDirectory()
    streamed, _ = DeepSpeedInference(fuse=False, stream=True).apply(whole)
    streamed.save_pretrained(Path(folder.name, "model"), variant="formulary")
    in_memory = LlamaForCausalLM(config).eval()
    in_memory.load_state_dict(streamed.state_dict())
    return in_memory, LlamaForCausalLM.from_pretrained(Path(folder.name, "model")).eval(), folder


def setup(seed: int):
    models()
    return torch.randint(256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def resident(model) -> float:
    """Bytes of the blocks' weights that are in memory, of all of them, from /proc/self/smaps."""
    pages = [span for block in model.model.layers for span in file_pages(block)]
    inside, here = 0, False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            low, high = (int(part, 16) for part in words[0].split("-"))
            here = any(low <= start < high for start, _ in pages)
        elif here and words[0] == "Rss:":
            inside += 1024 * int(words[1])
    return inside / sum(end - start for start, end in pages)


def streamed(rows: int):
    def arm(ids):
        whole, model, _ = models()
        seen, most = [], []
        note = lambda *_: most.append(resident(model))
        hooks = [block.mlp.register_forward_hook(note) for block in model.model.layers]
        for row in range(0, BATCH, rows):
            seen.append(logits(model, ids[row : row + rows]))
            for hook in hooks:
                hook.remove()
        difference = (torch.cat(seen) - logits(whole, ids)).abs().amax((1, 2))
        return Outcome(
            {DIFFERENCE: difference.tolist(), RESIDENT: [max(most)]}, work=lambda: logits(model, ids[:rows])
        )

    return arm


def in_memory(rows: int):
    return lambda ids: Outcome({DIFFERENCE: [0.0] * BATCH}, work=lambda: logits(models()[0], ids[:rows]))


check = Check(
    claim="A model of 12 blocks whose weights stream from disk gives the same outputs with at most 30 % of its blocks' "
    "weights in memory; it is at least 2 times slower for one sequence of 16 tokens and at most 1.3 times for 32.",
    setup=setup,
    arms={
        "streamed, batch 32": streamed(BATCH), "in memory, batch 32": in_memory(BATCH),
        "streamed, batch 1": streamed(1), "in memory, batch 1": in_memory(1),
    },
    holds=all_of(
        exact("streamed, batch 32", tol=1e-5, metric=DIFFERENCE),
        exact("streamed, batch 1", tol=1e-5, metric=DIFFERENCE),
        at_most("streamed, batch 32", 0.3, metric=RESIDENT, effect=0.05),
        speedup("streamed, batch 32", "in memory, batch 32", at_least=1 / 1.3),
        speedup("in memory, batch 1", "streamed, batch 1", at_least=2.0),
    ),
    items="fresh",
    redraws="the tokens",
    seeds=5,
    version=1,
    scope="a random Llama of width 512 whose file is in the page cache or on a local disk",
)  # fmt: skip
