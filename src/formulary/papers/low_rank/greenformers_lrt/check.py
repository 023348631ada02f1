"""Do half the weights suffice when factors start from the SVD, and are they faster at short sequences?

Quality: a small ViT trained on digits, factorized to half the weights of every linear, then fine-tuned for a short while; the same
fine-tuning from random factors and of the dense model. Speed: the forward pass of a BERT of width 512 on 4 x 128 tokens, dense and
with rank width / 4, on one thread.
"""

import copy
from functools import cache

import torch

from formulary import lab
from formulary.evidence import Check, Outcome, all_of, at_least, no_worse, speedup

from .method import LowRankTransformer

ACCURACY, STEPS, WIDTH = "accuracy", 60, 512


def setup(seed: int):
    model = lab.trained_digit_vit(layers=2, width=48, heads=4, steps=300, seed=seed)
    images, labels = (torch.from_numpy(part) for part in lab.digits("train"))
    test, marks = (torch.from_numpy(part) for part in lab.digits("test"))
    return {
        "seed": seed, "model": model, "train": (lab.digit_pixels(images), labels), "test": (lab.digit_pixels(test), marks),
    }  # fmt: skip


def fine_tuned(context, model):
    """One outcome per test digit: 1 where it is recognized after the short fine-tuning."""
    pixels, labels = context["train"]

    def batch(step):
        generator = torch.Generator().manual_seed(1_000_003 * context["seed"] + step)
        chosen = torch.randint(len(pixels), (64,), generator=generator)
        return {"pixel_values": pixels[chosen], "labels": labels[chosen]}

    lab.train(model, batch, steps=STEPS, lr=5e-4, seed=context["seed"])
    test, marks = context["test"]
    with torch.no_grad():
        return (model.eval()(pixel_values=test).logits.argmax(-1) == marks).float().tolist()


def quality(start: str | None):
    def arm(context):
        model = copy.deepcopy(context["model"])
        if start is not None:
            model, _ = LowRankTransformer(ratio=0.5, start=start).apply(model)
        weights = sum(p.numel() for p in model.parameters())
        return Outcome({ACCURACY: fine_tuned(context, model)}, budget={"parameters": weights, "steps": STEPS})

    return arm


@cache
def wide(rank: int | None):
    """A random BERT of two layers, width 512: speed does not depend on the weights' values."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=8, intermediate_size=4 * WIDTH
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    return model if rank is None else LowRankTransformer(rank=rank).apply(model)[0].eval()


def timed(rank: int | None):
    def arm(context):
        model, ids = wide(rank), torch.arange(4 * 128).view(4, 128)

        @torch.inference_mode()
        def work():
            model(input_ids=ids)

        return Outcome({}, work=work)

    return arm


check = Check(
    claim="With half the weights of every linear layer, factors from the SVD stay within 1 point of the dense model after a short "
    "fine-tuning and at least 2 points above random factors; with rank width / 4 a BERT of width 512 runs at least 1.3 times as fast "
    "at 128 tokens.",
    setup=setup,
    arms={"svd": quality("svd"), "dense": quality(None), "random": quality("random"), "fast": timed(WIDTH // 4), "slow": timed(None)},
    holds=all_of(
        no_worse("svd", "dense", margin=0.01, higher_is_better=True, metric=ACCURACY),
        at_least("svd", "random", plus=0.02, metric=ACCURACY, oracle="dense"),
        speedup("fast", "slow", at_least=1.3),
    ),
    items="same",
    redraws="the ViT's training and the fine-tuning batches",
    seeds=5,
    version=1,
    scope="a ViT of two layers on 8 x 8 digits, and the speed of a random BERT of width 512",
)
