"""A few hundred handwritten digits: convolutional tokens against patches, at equal parameters and each at its own tuned
learning rate."""

from functools import cache, partial
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from formulary import lab
from formulary.evidence import Check, Outcome, all_of, at_least, no_worse
from formulary.papers.backbone.cct.method import CCT

TRAIN, TEST, STEPS, BATCH = 300, 500, 200, 32
RATES = (5e-4, 1.5e-3, 5e-3)
TUNING_SEED = 987_654
COMMON = {"image_size": 28, "channels": 1, "classes": 10, "layers": 2, "heads": 2, "mlp_ratio": 2.0}
PATCHES = {**COMMON, "tokenizer": "patch", "kernel": 4, "width": 80}


class SmallCNN(nn.Module):
    """Two convolutions, each with ReLU and 2 x 2 pooling, and a linear layer: as many parameters as the others."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 112, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(112 * 49, 10),
        )  # fmt: skip

    def forward(self, pixel_values):
        return self.layers(pixel_values)

    def loss(self, batch):
        return F.cross_entropy(self(batch["pixel_values"]), batch["labels"], label_smoothing=0.1)


MODELS = {
    "cct": partial(CCT.build, **COMMON, kernel=3, convolutions=2, width=64),
    "cvt": partial(CCT.build, **PATCHES),
    "vit-lite": partial(CCT.build, **PATCHES, pool="class"),
    "cnn": SmallCNN,
}


def images(split: str, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` digits drawn by `seed`, their pixels normalized by MNIST's mean and deviation."""
    pixels, labels = (torch.from_numpy(part) for part in lab.mnist5k(split))
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:count]
    return (pixels[chosen].unsqueeze(1) - 0.1307) / 0.3081, labels[chosen]


def prepare(seed: int) -> SimpleNamespace:
    """A new training set and initialization; the same test images for every seed."""
    return SimpleNamespace(seed=seed, train=images("train", TRAIN, seed), test=images("test", TEST, 0))


def trained(name: str, data: tuple[torch.Tensor, torch.Tensor], lr: float, seed: int) -> nn.Module:
    pixels, labels = data

    def batch(step: int) -> dict[str, torch.Tensor]:
        chosen = torch.randint(len(labels), (BATCH,), generator=torch.Generator().manual_seed(seed * 1_000_003 + step))
        return {"pixel_values": pixels[chosen], "labels": labels[chosen]}

    torch.manual_seed(seed)
    model = MODELS[name]()
    lab.train(
        model, batch, steps=STEPS, lr=lr, loss=lambda model, batch: model.loss(batch), weight_decay=0.03, seed=seed
    )
    return model.eval()


@torch.no_grad()
def points(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """100 for each image that is classified rightly, else 0."""
    pixels, labels = data
    return (100.0 * (model(pixels).argmax(1) == labels)).tolist()


@cache
def tuned(name: str) -> float:
    """The learning rate that is best on held-out training images, with a training set that no seed uses."""
    pixels, labels = images("train", TRAIN + TEST, TUNING_SEED)
    train, validation = (pixels[:TRAIN], labels[:TRAIN]), (pixels[TRAIN:], labels[TRAIN:])
    return max(RATES, key=lambda lr: sum(points(trained(name, train, lr, TUNING_SEED), validation)))


def arm(name: str):
    def run(context: SimpleNamespace) -> Outcome:
        model = trained(name, context.train, tuned(name), context.seed)
        budget = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "images": STEPS * BATCH,
            "tuning trials": len(RATES),
        }
        return Outcome(points(model, context.test), budget=budget)

    return run


check = Check(
    claim="With 300 training images and equal parameters, CCT's convolutional tokens are at least 3 points better than "
    "ViT-Lite's patches, better than CVT's, and within a point of a small CNN.",
    setup=prepare,
    arms={name: arm(name) for name in MODELS},
    metric="accuracy, %",
    holds=all_of(
        at_least("cct", "vit-lite", plus=3.0),
        at_least("cct", "cvt", effect=1.0),
        no_worse("cct", "cnn", margin=1.0, higher_is_better=True),
    ),
    items="same",
    redraws="the training images, initialization and batches",
    seeds=5,
    version=1,
    scope="300 training digits of MNIST, models of about 108 thousand parameters, 200 steps without augmentation",
)
