"""The small network with binary layers that checks of gradient estimators train: MNIST digits, 14 x 14 pixels.

196 pixels, a float linear to `WIDTH`, two binary linears, a float linear to 10 classes, each but the last with a
batch norm behind it; weights start at random and labels are what is learned.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formulary import lab

from ._training import BinaryLinear

WIDTH, BATCH, VALIDATION = 128, 64, 800
TUNING_SEEDS = (1000, 1001, 1002)


@cache
def digits(split: str) -> tuple[Float[Tensor, "N 196"], Int[Tensor, "N"]]:
    """Standardized images and labels of "train", "test", or the shuffled train's parts: "validate", 800 of them, and
    "fit".
    """
    images, labels = (torch.from_numpy(part) for part in lab.mnist5k("test" if split == "test" else "train"))
    pixels = F.avg_pool2d(images[:, None], 2).flatten(1)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    pixels, labels = (pixels[order] - 0.13) / 0.28, labels[order]
    chosen = {"validate": slice(0, VALIDATION), "fit": slice(VALIDATION, None)}.get(split, slice(None))
    return pixels[chosen], labels[chosen]


class BinaryNet(nn.Module):
    """(B,196) to (B,10); `make(width)` gives a `BinaryLinear` whose weights `begin(layer, weight)` sets up to be
    trained.
    """

    def __init__(self, make: Callable[[int], BinaryLinear], begin: Callable[[BinaryLinear, Tensor], None]):
        super().__init__()
        self.binary = nn.ModuleList([make(WIDTH), make(WIDTH)])
        for layer in self.binary:
            begin(layer, nn.Linear(WIDTH, WIDTH).weight)
        self.first, self.last = nn.Linear(196, WIDTH), nn.Linear(WIDTH, 10)
        self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH) for _ in range(3)])

    def forward(self, pixels: Float[Tensor, "B 196"]) -> Float[Tensor, "B 10"]:
        hidden = self.norms[0](self.first(pixels))
        for layer, norm in zip(self.binary, self.norms[1:]):
            hidden = norm(layer(hidden))
        return self.last(hidden)


def fit(
    net: BinaryNet,
    steps: int,
    lr: float,
    *,
    seed: int,
    split: str = "train",
    progress: Callable[[float], None] | None = None,
    penalty: Callable[[], Tensor] | None = None,
) -> None:
    """Train with Adam and a cosine on random batches of `split`; `progress(done)` is told before each step."""
    images, labels = digits(split)

    def batch(step: int) -> dict[str, Tensor]:
        if progress is not None:
            progress(step / steps)
        chosen = torch.randint(len(images), (BATCH,), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        return {"pixels": images[chosen], "labels": labels[chosen]}

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        value = F.cross_entropy(net(batch["pixels"]), batch["labels"])
        return value if penalty is None else value + penalty()

    lab.train(net, batch, steps=steps, lr=lr, loss=loss, optimizer="adam", seed=seed)


@torch.no_grad()
def right(net: BinaryNet, split: str = "test") -> Float[Tensor, "N"]:
    """1 for each image of `split` that is told right, else 0."""
    images, labels = digits(split)
    return (net.eval()(images).argmax(-1) == labels).float()


def tune(
    names: Iterable[str], rates: Sequence[float], train: Callable[[str, float, int, str], BinaryNet]
) -> dict[str, dict[float, float]]:
    """For each arm, the mean accuracy of each learning rate on training images that were held out, over seeds that no
    check uses.
    """
    one = lambda name, lr, seed: float(right(train(name, lr, seed, "fit"), "validate").mean())
    score = lambda name, lr: sum(one(name, lr, seed) for seed in TUNING_SEEDS) / len(TUNING_SEEDS)
    return {name: {lr: score(name, lr) for lr in rates} for name in names}
