"""Two of six blocks leave a denoiser of digits: what do experts inherited from them win over plain distillation?

The model is a small convolutional network that predicts the noise in 8 x 8 digits, six residual blocks between a stem
and a head that also sees the stem. All arms drop the same blocks, by the measured order, and train as many steps on
the same noised training digits, each with its own best of three learning rates and with or without incubation. The gap
is the squared error of the predicted noise to the teacher's on noised held-out digits at ten times. "Recovers at least
30 % more of the gap" is read as: of what plain distillation leaves of the gap, experts leave at most 0.7 (1.3 times
what plain distillation recovers, about 0.95 of it, is more than there is).
"""

from copy import deepcopy
from functools import cache, partial
from itertools import product

import torch
from torch import nn
from torch.nn import functional as F

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, Outcome, all_of, at_most, speedup

from .method import ASDM

WIDTH, BLOCKS, PRETRAINING = 32, 6, 1000
STEPS, BATCH, TIMES, HELD_OUT, TUNING_SEED = 400, 16, 10, 96, 1000
TRIALS = tuple(product((1e-3, 3e-3, 1e-2), (0.0, 0.25)))
GAP, SLICED = "gap to the teacher's noise", "sliced Wasserstein distance of samples"
EXPERTS = {"inherited experts": "inherited", "random experts": "random", "drop and distil": "none"}


class Block(nn.Module):
    """(B,W,8,8) and a code of the time (B,32) -> (B,W,8,8), residual."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(32, width)

    def forward(self, x, code):
        hidden = self.conv1(F.silu(self.norm1(x))) + self.time(code)[..., None, None]
        return x + self.conv2(F.silu(self.norm2(hidden)))


class Denoiser(nn.Module):
    """Noised digits (B,1,8,8) and times (B,) in 0..1 -> the noise, (B,1,8,8)."""

    def __init__(self):
        super().__init__()
        self.code = nn.Sequential(nn.Linear(5, 32), nn.SiLU(), nn.Linear(32, 32), nn.SiLU())
        self.stem = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(BLOCKS))
        self.norm, self.head = nn.GroupNorm(8, 2 * WIDTH), nn.Conv2d(2 * WIDTH, 1, 3, padding=1)

    def forward(self, x, t):
        code = self.code((t[:, None] * torch.pi * t.new_tensor([0.5, 1.0, 2.0, 4.0, 8.0])).cos())
        stem = hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden, code)
        return self.head(F.silu(self.norm(torch.cat([stem, hidden], 1))))


def noised(images, noise, t):
    """The signal fades as cos(pi t / 2)."""
    angle = (t * torch.pi / 2)[:, None, None, None]
    return angle.cos() * images + angle.sin() * noise


@cache
def digits(split: str):
    return 2 * torch.from_numpy(lab.digits(split)[0])[:, None] - 1


def drawn(count: int, seed: int):
    """(noised training digits, their times, the noise)."""
    generator, images = torch.Generator().manual_seed(seed), digits("train")
    chosen = images[torch.randint(len(images), (count,), generator=generator)]
    noise, t = torch.randn(chosen.shape, generator=generator), torch.rand(count, generator=generator)
    return noised(chosen, noise, t), t, noise


@cache
def teacher() -> nn.Module:
    """The whole model, trained once and kept."""

    def build():
        def batch(step):
            return dict(zip(("x", "t", "noise"), drawn(48, step)))

        loss = lambda model, batch: (model(batch["x"], batch["t"]) - batch["noise"]).square().mean()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Denoiser()
        log = lab.train(model, batch, steps=PRETRAINING, lr=2e-3, loss=loss)
        return model, {"loss": log.final, "cpu_seconds": log.cpu_seconds}

    key = {"width": WIDTH, "blocks": BLOCKS, "steps": PRETRAINING}
    return lab.cached("digit-convolutional-denoiser", build, key=key, make=Denoiser)


def prepare(seed: int) -> Data:
    x, t, _ = drawn(STEPS * BATCH, 1_000_003 + seed)
    items = [{"x": one, "t": time.clone()} for one, time in zip(x, t)]
    return Data(items, batch_size=BATCH, seed=seed)


@torch.no_grad()
def gap(model: nn.Module, images: torch.Tensor) -> list[float]:
    """For each digit, the mean over times and pixels."""
    generator, errors = torch.Generator().manual_seed(12345), []
    for t in torch.linspace(0.05, 0.95, TIMES):
        t = t.expand(len(images))
        x = noised(images, torch.randn(images.shape, generator=generator), t)
        errors.append((model(x, t) - teacher()(x, t)).square().mean((1, 2, 3)))
    return torch.stack(errors).mean(0).tolist()


@torch.no_grad()
def sliced(model: nn.Module, seed: int) -> list[float]:
    """Between 96 samples of a sampler of 10 steps and as many test digits, over 64 directions."""
    generator = torch.Generator().manual_seed(seed)
    x, times = torch.randn(HELD_OUT, 1, 8, 8, generator=generator), torch.linspace(0.98, 0, 11)
    for now, then in zip(times * torch.pi / 2, times[1:] * torch.pi / 2):
        noise = model(x, (now / torch.pi * 2).expand(len(x)))
        x = then.cos() * ((x - now.sin() * noise) / now.cos()).clamp(-1, 1) + then.sin() * noise
    directions = F.normalize(torch.randn(64, 64, generator=generator), dim=0)
    ours, theirs = ((images.flatten(1) @ directions).sort(0).values for images in (x, digits("test")[:HELD_OUT]))
    return [float((ours - theirs).square().mean().sqrt())]


def shorter(name: str, data: Data, rate: float = 1e-3, incubation: float = 0.0, steps: int = STEPS) -> nn.Module:
    settings = {"learning_rate": rate, "incubation": incubation, "steps": steps, "experts": EXPERTS[name]}
    return ASDM(drop_rate=1 / 3, calibration=64, **settings).apply(deepcopy(teacher()), data)[0]


@cache
def tuned(name: str) -> tuple[float, float]:
    """Learning rate and incubation that do best on training digits, for data that is not measured."""
    data, images = prepare(TUNING_SEED), digits("train")[:HELD_OUT]
    return min(TRIALS, key=lambda trial: sum(gap(shorter(name, data, *trial), images)))


def measured(model: nn.Module, data: Data, **spent) -> Outcome:
    """On eight noised digits, the time of one denoising step."""
    x, t = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((8,), 0.5)
    values = {GAP: gap(model, digits("test")[:HELD_OUT]), SLICED: sliced(model, data.seed)}
    budget = {"parameters": parts.count_weights(model), **spent}
    return Outcome(values, budget=budget, work=torch.no_grad()(lambda: model(x, t)))


def distilled(name: str, data: Data) -> Outcome:
    return measured(shorter(name, data, *tuned(name)), data, **{"tuning trials": len(TRIALS), "steps": STEPS})


check = Check(
    claim="With two of six blocks dropped, experts inherited from them leave at most 0.7 of the gap to the teacher "
    "that plain distillation leaves after as many steps, and one denoising step is at least 1 / 0.85 times as fast as "
    "the teacher's.",
    setup=prepare,
    arms={
        **{name: partial(distilled, name) for name in EXPERTS},
        "drop": lambda data: measured(shorter("drop and distil", data, steps=0), data),
        "teacher": lambda data: measured(teacher(), data),
    },
    holds=all_of(
        at_most("inherited experts", "drop and distil", ratio=0.7, metric=GAP),
        speedup("inherited experts", "teacher", at_least=1 / 0.85),
    ),
    items="same",
    redraws="the noised digits of distillation, and random experts",
    seeds=6,
    version=1,
    scope=f"a convolutional denoiser of width {WIDTH} on 8 x 8 digits, {STEPS} steps of distillation",
)
