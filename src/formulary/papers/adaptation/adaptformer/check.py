"""A ViT pre-trained on the digits 0 to 4 learns 5 to 9 from 50 images each: which way is most accurate?"""

from copy import deepcopy
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from formulary import lab
from formulary.contracts import BlockEdit, Data, parts
from formulary.contracts.heads import with_head
from formulary.evidence import Check, Outcome, all_of, at_least, no_worse

from .method import AdaptFormer, NormalizedHead

LAYERS, WIDTH, PRETRAINING, PER_CLASS, STEPS, BATCH = 6, 96, 800, 50, 150, 32
BOTTLENECK, PROMPTS = 8, 10
RATES = {
    "adaptformer": (0.03, 0.1, 0.3, 1.0, 3.0),
    "linear probe": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "prompts": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "full fine-tuning": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
}
# The best of RATES by `tune()`, on samples of images that the check does not draw.
CHOSEN = {"adaptformer": 1.0, "linear probe": 0.1, "prompts": 0.1, "full fine-tuning": 3e-3}


class Prompts(BlockEdit):
    """Deep visual prompts (VPT, arXiv:2203.12119): trained tokens after CLS in each block, taken out at its end."""

    def setup(self, model, width):
        self.prompts = nn.Parameter(torch.empty(1, PROMPTS, width).uniform_(-1, 1) * (6 / (49 + width)) ** 0.5)

    def before(self, hidden):
        hidden = super().before(hidden)
        return torch.cat([hidden[:, :1], self.prompts.expand(len(hidden), -1, -1), hidden[:, 1:]], 1)

    def after(self, hidden):
        hidden = super().after(hidden)
        return torch.cat([hidden[:, :1], hidden[:, 1 + PROMPTS :]], 1)


def digits(split: str, low: int) -> Data:
    """MNIST digits `low` to `low + 4` as classes 0 to 4."""
    images, marks = (torch.from_numpy(part) for part in lab.mnist5k(split))
    chosen = [i for i, mark in enumerate(marks.tolist()) if low <= mark < low + 5]
    items = [{"pixel_values": 2 * images[i][None] - 1, "labels": marks[i] - low} for i in chosen]
    return Data(items, batch_size=BATCH, facts={"classes": list(range(low, low + 5))})


def pretrained():
    def build():
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        config = ViTConfig(
            image_size=28, patch_size=7, num_channels=1, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_labels=5,
            num_attention_heads=4, intermediate_size=4 * WIDTH,
        )  # fmt: skip
        model = ViTForImageClassification(config)
        lab.train(model, digits("train", 0), steps=PRETRAINING, lr=1e-3, weight_decay=0.05)
        return model

    key = {"layers": LAYERS, "width": WIDTH, "steps": PRETRAINING, "batch": BATCH}
    return lab.cached("vit-digits-0-4", build, key=key)


def prepare(seed: int):
    """The pre-trained backbone, and a sample of images of the new digits."""
    return pretrained().base_model, replace(digits("train", 5).take(sampled(seed)), seed=seed)


def sampled(seed: int) -> list[int]:
    """PER_CLASS training images of each new digit."""
    marks = torch.stack([item["labels"] for item in digits("train", 5).items])
    order = torch.randperm(len(marks), generator=torch.Generator().manual_seed(seed))
    return [i for mark in range(5) for i in order[marks[order] == mark][:PER_CLASS].tolist()]


def adapted(name: str, lr: float, context):
    """The model that arm `name` trains at learning rate `lr`."""
    backbone, data = context
    if name == "adaptformer":
        return AdaptFormer(bottleneck=BOTTLENECK, steps=STEPS, lr=lr).apply(backbone, data)[0]
    torch.manual_seed(data.seed)
    model = with_head(backbone, data.facts["classes"])
    model.classifier = NormalizedHead(WIDTH, 5)
    if name != "full fine-tuning":
        model.base_model.requires_grad_(False)
    if name == "prompts":
        for block in parts.blocks(model):
            Prompts.attach(model, block.name, width=WIDTH)
    lab.train(model, data, steps=STEPS, lr=lr, seed=data.seed)
    return model


def right(model, data: Data) -> list[float]:
    batch = data.collate(data.items)
    with torch.no_grad():
        logits = model.eval()(batch["pixel_values"]).logits
    return (logits.argmax(-1) == batch["labels"]).float().tolist()


def arm(name: str, context) -> Outcome:
    model = adapted(name, CHOSEN[name], (deepcopy(context[0]), context[1]))
    budget = {"tuning trials": len(RATES[name]), "images": len(context[1])}
    return Outcome(right(model, digits("test", 5)), budget=budget)


def tune(seeds=(1000, 1001)) -> dict[str, dict[float, float]]:
    """For each arm, the mean accuracy of each learning rate on the training digits that were not in the sample."""
    table, every = {}, digits("train", 5)
    for name, rates in RATES.items():
        for lr in rates:
            scores = []
            for seed in seeds:
                rest = sorted(set(range(len(every))) - set(sampled(seed)))
                scores += right(adapted(name, lr, prepare(seed)), every.take(rest))
            table.setdefault(name, {})[lr] = sum(scores) / len(scores)
    return table


check = Check(
    claim="From 50 images per class of five new digits, AdaptFormer (r = 8) is at least 5 points more accurate than a "
    "linear probe, and at most 1 point less than 10 deep prompts per block and than fine-tuning all weights.",
    setup=prepare,
    arms={name: partial(arm, name) for name in RATES},
    metric="accuracy",
    holds=all_of(
        at_least("adaptformer", "linear probe", plus=0.05),
        no_worse("adaptformer", "prompts", margin=0.01, higher_is_better=True),
        no_worse("adaptformer", "full fine-tuning", margin=0.01, higher_is_better=True),
    ),
    items="same",
    redraws="the training images and the initial weights of heads, branches and prompts",
    seeds=5,
    version=1,
    scope="one ViT of width 96, pre-trained on 2,000 MNIST digits",
)
