"""A ViT pre-trained by masking on the digits 0 to 4 is to tell 5 to 9 apart from 50 labels: what does further pre-training on
300 images of these do before, alone for long, and with self-distillation?

All arms end in the same fine-tuning, three times, each on 50 labels of its own among the 300 images; the images that were not
drawn are tested on. The learning rate is the best of `RATES` for fine-tuning alone, by `tune()`, on other seeds. "further" and
"self-distilled" take the same settings, those of the pre-training, and the teacher of the second is the model of the first; the
second has twice the steps, as in the paper.
"""

from copy import deepcopy
from functools import partial

import torch

from formulary import lab
from formulary.contracts import Data
from formulary.contracts.heads import with_head
from formulary.evidence import Check, Outcome, all_of, at_least, at_most

from .masking import Pixels
from .method import SelfDistillation, adamw

LAYERS, WIDTH, PRETRAINING, PRETRAINING_RATE = 4, 64, 3000, 1e-3
UNLABELED, PER_CLASS, BATCH, STEPS, HEAD_STEPS = 300, 10, 64, 360, 60
TUNED_STEPS, TUNED_BATCH, DRAWS = 120, 25, 3
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
CHOSEN = 1e-3
ACCURACY, DISTANCE = "accuracy", "distance from the start"


def digits(low: int) -> Data:
    """All of scikit-learn's digits `low` to `low + 4`, as 8 x 8 pixels in -1..1 and classes 0 to 4."""
    images, marks = (torch.from_numpy(part) for part in lab.digits())
    chosen = [i for i, mark in enumerate(marks.tolist()) if low <= mark < low + 5]
    items = [{"pixel_values": 2 * images[i][None] - 1, "labels": marks[i] - low} for i in chosen]
    return Data(items, batch_size=BATCH)


def pretrained():
    """The ViT that learned to fill in the digits 0 to 4, without its decoder."""

    def build():
        from transformers import ViTConfig, ViTModel

        torch.manual_seed(0)
        config = ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
            intermediate_size=2 * WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model, data = ViTModel(config), digits(0)
        task = Pixels(model, data.sample(0)["pixel_values"], 0.75, 64, 1)
        method = SelfDistillation(learning_rate=PRETRAINING_RATE)
        method.learn(torch.nn.ModuleDict({"model": model, "task": task}), partial(method.loss, teacher=None), data, PRETRAINING)
        return model

    key = {"layers": LAYERS, "width": WIDTH, "steps": PRETRAINING, "rate": PRETRAINING_RATE, "batch": BATCH}
    return lab.cached("mae-digits-0-4", build, key=key)


def prepare(seed: int):
    """The pre-trained model, 300 images of the new digits, DRAWS times 50 of them with labels, and all others to test on."""
    every = digits(5)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn, rest = order[:UNLABELED], order[UNLABELED:]
    marks = [int(item["labels"]) for item in every.items]
    pick = lambda indices, batch: Data([every.items[i] for i in indices], batch_size=batch, seed=seed)
    labeled = []
    for draw in range(DRAWS):
        of_class = ([i for i in drawn if marks[i] == mark] for mark in range(5))
        labeled.append(pick([i for ids in of_class for i in ids[draw * PER_CLASS : (draw + 1) * PER_CLASS]], TUNED_BATCH))
    return {"start": pretrained(), "unlabeled": pick(drawn, BATCH), "labeled": labeled, "test": pick(rest, BATCH)}


def further(rounds: int, context):
    """The model after further pre-training and so many rounds of self-distillation, and how far it went."""
    method = SelfDistillation(
        steps=STEPS, head_steps=HEAD_STEPS, rounds=rounds, decoder_width=64, learning_rate=PRETRAINING_RATE
    )
    model, report = method.apply(deepcopy(context["start"]), context["unlabeled"])
    return model, list(report.figures.values())[-1]


def tuned(start, context, rate: float = CHOSEN) -> list[float]:
    """Of each test image, how many of DRAWS models tell its class, each fine-tuned from `start` on 50 labels of its own."""
    test, right = context["test"].collate(context["test"].items), []
    for labeled in context["labeled"]:
        torch.manual_seed(labeled.seed)
        model = with_head(start, range(5))
        optimizer = partial(adamw, learning_rate=rate, weight_decay=0.01)
        lab.train(model, labeled, steps=TUNED_STEPS, lr=rate, optimizer=optimizer, schedule="linear", seed=labeled.seed)
        with torch.no_grad():
            right.append(model.eval()(test["pixel_values"]).logits.argmax(-1) == test["labels"])
    return torch.stack(right).float().mean(0).tolist()


def arm(rounds: int | None, context) -> Outcome:
    """Fine-tuning after so many rounds of self-distillation; None: without further pre-training."""
    if rounds is None:
        return Outcome({ACCURACY: tuned(context["start"], context)}, budget={"steps": TUNED_STEPS})
    model, far = further(rounds, context)
    budget = {"steps": STEPS * (rounds + 1) + TUNED_STEPS}
    return Outcome({ACCURACY: tuned(model, context), DISTANCE: [far]}, budget=budget)


def tune(seeds=(1000, 1001, 1002, 1003)) -> dict[float, list[float]]:
    """Accuracies of fine-tuning alone at each learning rate."""
    contexts = [prepare(seed) for seed in seeds]
    accuracy = lambda values: sum(values) / len(values)
    return {rate: [accuracy(tuned(context["start"], context, rate)) for context in contexts] for rate in RATES}


check = Check(
    claim="Further pre-training for 360 steps on 300 images of five new digits makes a small MAE ViT, fine-tuned on 50 labels, "
    "less accurate than fine-tuning alone does; with self-distillation it is at least 1 point more accurate than with further "
    "pre-training alone, and moves less from the pre-trained weights.",
    setup=prepare,
    arms={"self-distilled": partial(arm, 1), "further": partial(arm, 0), "fine-tuned": partial(arm, None)},
    holds=all_of(
        at_least("self-distilled", "further", plus=0.01, metric=ACCURACY),
        at_most("self-distilled", "further", metric=DISTANCE),
        at_most("further", "fine-tuned", metric=ACCURACY, effect=0.02),
    ),
    items="fresh",
    redraws="the unlabeled and labeled images, those tested on, and the heads' initial weights",
    seeds=5,
    version=1,
    scope="one ViT of width 64, pre-trained on 900 digits of 8 x 8 pixels",
)
