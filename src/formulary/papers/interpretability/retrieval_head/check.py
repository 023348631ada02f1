"""Are few heads enough to carry retrieval? Small Llamas trained to copy a needle, with the heads that score best masked, or random others.

What was seen: trained on copying alone, the eight heads of the second layer all learn the same copy, so that three of them are not
missed, while random others hit the heads before them. In one model these heads look three places past the token that they copy,
where an earlier layer has brought it, and score 0. SmolLM2, which has other things to do, has 17 retrieval heads of 270.
"""

import torch
from scipy.stats import spearmanr

from formulary import lab
from formulary.evidence import Check, all_of, at_least, at_most, no_worse
from formulary.papers.interpretability.retrieval_head.method import Needle, greedy, masked_heads, retrieval_scores

MODELS, MASKED, DRAWS, THRESHOLD, SCORED, ASKED = 5, 3, 10, 0.1, 40, 100
ACCURACY, SHARE, RANKS = "needle accuracy", "share of heads", "rank correlation"


def needles(length: int):
    """Noise with a marked needle of 6 tokens, then a cue: copy it."""
    return lab.tasks.Needle(length=length, needle=6, vocabulary=64)


def trained(seed: int):
    """A causal Transformer of 3 layers of 8 heads, width 128, trained on needles in 24, then 48, then 96 tokens."""

    def build():
        from transformers import LlamaConfig, LlamaForCausalLM

        ends = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=needles(96).vocab_size, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=128, tie_word_embeddings=False, **ends,
            )  # fmt: skip
        )
        for stage, (length, batch_size, steps) in enumerate(((24, 32, 400), (48, 16, 150), (96, 16, 150))):
            batches = lab.tasks.stream(needles(length), batch_size, seed=100 * seed + stage)
            lab.train(model, batches, steps=steps, lr=3e-3, seed=seed)
        return model

    return lab.cached("needle-llama", build, key={"seed": seed})


def setup(seed: int):
    """A trained model, scored on some prompts and asked on others. Fresh seeds draw other needles for the same models."""
    model = trained(seed % MODELS)
    task, generator = needles(96), torch.Generator().manual_seed(seed)
    batch = task.batch(SCORED, generator)
    places = task.positions(batch)
    prompts = [Needle(row[:-6], int(at[0]), int(at[-1]) + 1, 96, int(at[0]) / 96) for row, at in zip(batch["input_ids"], places)]
    scores = torch.stack([retrieval_scores(model, prompt, 6)[1] for prompt in prompts])
    return {"model": model, "depths": places[:, 0], "scores": scores, "asked": task.batch(ASKED, generator)["input_ids"]}


def ranking(context) -> list[tuple[int, int]]:
    mean = context["scores"].mean(0)
    return [divmod(i, mean.shape[1]) for i in mean.flatten().argsort(descending=True, stable=True).tolist()]


def accuracy(context, heads) -> torch.Tensor:
    """The share of each asked needle's tokens that the model says with `heads` masked."""
    with masked_heads(context["model"], heads):
        said = greedy(context["model"], context["asked"][:, :-6], 6)
    return (said == context["asked"][:, -6:]).float().mean(1)


def best_masked(context):
    return {ACCURACY: accuracy(context, ranking(context)[:MASKED]).tolist()}


def random_masked(context):
    others = ranking(context)[MASKED:]
    draws = [[others[i] for i in torch.randperm(len(others))[:MASKED].tolist()] for _ in range(DRAWS)]
    return {ACCURACY: torch.stack([accuracy(context, heads) for heads in draws]).mean(0).tolist()}


def scores(context):
    """How many heads retrieve, and whether shallow and deep needles rank the heads alike."""
    early = context["depths"] <= context["depths"].median()
    halves = [context["scores"][half].mean(0).flatten() for half in (early, ~early)]
    return {
        SHARE: [float((context["scores"].mean(0) >= THRESHOLD).float().mean())],
        RANKS: [float(spearmanr(*halves).statistic)],
    }


check = Check(
    claim="In a small Transformer trained to copy needles at most a fifth of the heads score 0.1 or more; masking the best three costs "
    "at least 50 points of accuracy, masking three random others less than 10; shallow and deep needles rank the heads alike (0.8).",
    setup=setup,
    arms={
        "best 3 masked": best_masked,
        "random 3 masked": random_masked,
        "unmasked": lambda context: {ACCURACY: accuracy(context, []).tolist()},
        "retrieval scores": scores,
    },
    holds=all_of(
        at_most("best 3 masked", "unmasked", minus=0.5, metric=ACCURACY),
        no_worse("random 3 masked", "unmasked", margin=0.1, higher_is_better=True, metric=ACCURACY),
        at_most("retrieval scores", 0.2, effect=0.05, metric=SHARE),
        at_least("retrieval scores", 0.8, effect=0.05, metric=RANKS),
    ),
    items="fresh",
    redraws="the trained model and the needles",
    seeds=MODELS,
    version=1,
    scope="five Transformers of 3 layers of 8 heads, trained here on synthetic needles",
)
