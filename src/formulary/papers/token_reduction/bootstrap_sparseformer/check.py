"""Digits pasted at random places: are nine tokens better that look through boxes which move, or that pool a fixed grid?

The thresholds are the card's, but for the comparison with fixed boxes, which is stricter. All students have the same
parameters but for the boxes, sixteen points a look, the last four blocks of the teacher, frozen, its head, and the same
images, steps and learning rate, the best of four for "pooling" on seed 1000. "pooling" has nine boxes that tile the
image and do not move, and in each the mean of its points; "fixed boxes" keeps these boxes and all points, whose offsets
are learned. "from scratch" looks as the method does, but its four blocks start from random weights and are trained too.
"start" are the method's boxes before training.
"""

import copy
from functools import cache, partial

import torch
from transformers import ViTConfig, ViTForImageClassification

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, Outcome, all_of, at_least, at_most, no_worse

from .focusing import FocusingBlock, Looking, centers_and_sizes, focused
from .method import BootstrapSparseFormer, Teacher, align, boxes_of

SIDE, BATCH, STEPS, RATE, TRAIN, TEST = 12, 32, 350, 2e-3, 3200, 1000
RIGHT, DISTANCE = "accuracy", "distance from a box to the digit, pixels"
START = BootstrapSparseFormer(tokens=9, iterations=2, channels=16, truncated=2, tuned=0, steps=0, restore=False)


class Still(FocusingBlock):
    """Boxes stay where they are."""

    def moved(self, tokens, boxes):
        return boxes


class Pooling(Looking):
    """Every sample is the mean of all."""

    def samples(self, tokens, boxes, features):
        found = super().samples(torch.zeros_like(tokens), boxes, features)
        return found.mean(2, keepdim=True).expand_as(found)


def images(split: str, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Digits of 12 x 12 pixels in 32 x 32 under light noise, -1 to 1 in three channels; labels; the digits' middles."""
    digits, labels = (torch.from_numpy(part) for part in lab.digits(split))
    large = torch.nn.functional.interpolate(digits[:, None], size=(SIDE, SIDE), mode="bilinear")[:, 0]
    chosen = torch.randint(len(large), (n,), generator=generator)
    corners = torch.randint(33 - SIDE, (n, 2), generator=generator)
    canvas = 0.1 * torch.randn(n, 32, 32, generator=generator)
    for image, digit, (x, y) in zip(canvas, large[chosen], corners.tolist()):
        image[y : y + SIDE, x : x + SIDE] += digit
    return (2 * canvas - 1)[:, None].repeat(1, 3, 1, 1), labels[chosen], corners + SIDE / 2


@cache
def teacher() -> ViTForImageClassification:
    """A ViT of 64 patches, 6 layers and width 64; the first call trains it."""

    def build():
        config = ViTConfig(
            image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
            intermediate_size=128, num_labels=10, initializer_range=0.1, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ViTForImageClassification(config)

        def batch(step: int):
            pixels, labels, _ = images("train", 64, torch.Generator().manual_seed(step))
            return {"pixel_values": pixels, "labels": labels}

        lab.train(model, batch, steps=1500, lr=2e-3, weight_decay=0.05)
        return model

    return lab.cached("vit-pasted-digits", build, key={"steps": 1500, "side": SIDE, "noise": 0.1})


def prepare(seed: int) -> dict:
    draw = torch.Generator().manual_seed(seed)
    pixels, _, _ = images("train", TRAIN, draw)
    data = Data([{"pixel_values": one} for one in pixels], batch_size=BATCH, seed=seed)
    return {"data": data, "teacher": Teacher(teacher()), "test": images("test", TEST, draw)}


def outcome(model, context: dict) -> Outcome:
    """Whether each test image is classified right, and how far its boxes' middles are from the digit, in the mean."""
    pixels, labels, middles = context["test"]
    with torch.no_grad():
        right = model.eval()(pixel_values=pixels).logits.argmax(-1) == labels
    centers, _ = centers_and_sizes(boxes_of(model))
    far = (32 * centers - middles[:, None]).norm(dim=-1).mean(1)
    budget = {"parameters": parts.count_weights(model), "tokens": 10}
    return Outcome({RIGHT: right.double().tolist(), DISTANCE: far.tolist()}, budget=budget)


def student(
    context: dict, *, still: bool = False, pool: bool = False, scratch: bool = False, rate: float = RATE
) -> Outcome:
    """One trained student: the method without `still`, `pool` and `scratch`."""
    model, _ = START.apply(copy.deepcopy(teacher()), context["data"])
    seeing, blocks = focused(model), []
    if still:
        seeing.focus.__class__ = Still
        starts = torch.arange(3) / 3
        corners = torch.stack([starts.repeat(3), starts.repeat_interleave(3)], dim=-1)
        del seeing.boxes
        seeing.register_buffer("boxes", torch.cat([corners, corners + 1 / 3], dim=-1))
    if pool:
        seeing.look.__class__ = seeing.focus.look.__class__ = Pooling
    if scratch:
        torch.manual_seed(context["data"].seed)
        fresh = ViTForImageClassification(model.config)
        blocks = [block.module for block in parts.blocks(model)]
        for block, new in zip(blocks, parts.blocks(fresh)):
            block.load_state_dict(new.module.state_dict())
    trained = [seeing, *blocks]
    align(model, context["teacher"], context["data"], trained, steps=STEPS, learning_rate=rate)
    return outcome(model, context)


def unchanged(context: dict) -> Outcome:
    pixels, labels, _ = context["test"]
    with torch.no_grad():
        right = teacher()(pixel_values=pixels).logits.argmax(-1) == labels
    return Outcome({RIGHT: right.double().tolist()}, budget={"parameters": parts.count_weights(teacher()), "tokens": 65})


check = Check(
    claim="Nine tokens that look through boxes at digits pasted at random places, before the last four of six blocks of "
    "a frozen ViT, are aligned with its CLS without labels to within 3 points of its accuracy; they are at least 5 "
    "points better than nine that pool a fixed grid and 1 better than fixed boxes, and come a fifth nearer to the digit.",
    setup=prepare,
    arms={
        "sparseformer": student,
        "pooling": partial(student, still=True, pool=True),
        "fixed boxes": partial(student, still=True),
        "from scratch": partial(student, scratch=True),
        "start": lambda context: outcome(START.apply(copy.deepcopy(teacher()), context["data"])[0], context),
        "teacher": unchanged,
    },
    holds=all_of(
        at_least("sparseformer", "pooling", plus=0.05, metric=RIGHT),
        no_worse("sparseformer", "teacher", margin=0.03, higher_is_better=True, metric=RIGHT),
        at_least("sparseformer", "fixed boxes", plus=0.01, metric=RIGHT, null="pooling"),
        at_most("sparseformer", "start", ratio=0.8, metric=DISTANCE),
    ),
    items="fresh",
    redraws="the weights at the start, training and test images",
    seeds=5,
    version=1,
    scope="one ViT of width 64 trained on pasted digits; each student trained for twelve seconds, of the card's 90",
)
