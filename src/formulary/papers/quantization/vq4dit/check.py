"""At 2 bits, does choosing codewords together with the codebook beat training the codebook alone, on a diffusion model
and without data?

The model is a small denoising Transformer of digits (8 x 8 pixels, 16 patches), with the time as further input
channels. Calibration sees what the float model's own sampler passes through from Gaussian noise; no image is used.
Judged by the squared error of the predicted noise against the float model's, on noised held-out digits at ten times.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers import ViTConfig, ViTModel

from formulary import lab
from formulary.contracts import Data
from formulary.evidence import Check, all_of, at_most

from .method import VQ4DiT

TIMES, STEPS, HELD_OUT = 10, 60, 96


class Denoiser(nn.Module):
    """pixel_values (B,6,8,8), a noised digit and five channels of time -> the noise, (B,1,8,8)."""

    main_input_name = "pixel_values"

    def __init__(self):
        super().__init__()
        self.config = ViTConfig(
            image_size=8, patch_size=2, num_channels=6, hidden_size=96, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=192, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        self.vit = ViTModel(self.config, add_pooling_layer=False)
        self.head = nn.Linear(96, 4)

    def forward(self, pixel_values):
        patches = self.head(self.vit(pixel_values=pixel_values).last_hidden_state[:, 1:])
        return nn.functional.pixel_shuffle(patches.mT.unflatten(2, (4, 4)), 2)


def with_time(x, t):
    """Images (B,1,8,8) and times (B,) in 0..1, as the model's input."""
    angle = t[:, None] * torch.pi * torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    return torch.cat([x, angle.cos()[..., None, None].expand(-1, -1, 8, 8)], 1)


def noised(images, noise, t):
    """The signal fades as cos(pi t / 2)."""
    angle = (t * torch.pi / 2)[:, None, None, None]
    return with_time(angle.cos() * images + angle.sin() * noise, t)


def denoiser() -> nn.Module:
    """The float model, trained once and kept."""

    def build():
        images = 2 * torch.from_numpy(lab.digits("train")[0])[:, None] - 1

        def batch(step):
            generator = torch.Generator().manual_seed(step)
            chosen = images[torch.randint(len(images), (48,), generator=generator)]
            noise, t = torch.randn(chosen.shape, generator=generator), torch.rand(48, generator=generator)
            return {"pixel_values": noised(chosen, noise, t), "noise": noise}

        loss = lambda model, batch: (model(batch["pixel_values"]) - batch["noise"]).square().mean()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = Denoiser()
        log = lab.train(model, batch, steps=800, lr=2e-3, loss=loss)
        return model, {"loss": log.final, "cpu_seconds": log.cpu_seconds}

    return lab.cached("digit-denoiser", build, key={"steps": 800, "lr": 2e-3}, make=Denoiser)


@torch.no_grad()
def prepare(seed: int) -> dict:
    model, generator = denoiser(), torch.Generator().manual_seed(seed)
    x, states = torch.randn(32, 1, 8, 8, generator=generator), []
    times = torch.linspace(0.98, 0, TIMES + 1)
    for now, then in zip(times, times[1:]):
        states.append(with_time(x, now.expand(32)))
        noise = model(states[-1])
        clean = ((x - (now * torch.pi / 2).sin() * noise) / (now * torch.pi / 2).cos()).clamp(-1, 1)
        x = (then * torch.pi / 2).cos() * clean + (then * torch.pi / 2).sin() * noise
    calibration = Data([{"pixel_values": state} for state in torch.cat(states)], batch_size=16, seed=seed)
    digits = 2 * torch.from_numpy(lab.digits("test")[0][:HELD_OUT])[:, None] - 1
    fixed = torch.Generator().manual_seed(12345)
    inputs = [
        noised(digits, torch.randn(digits.shape, generator=fixed), t.expand(HELD_OUT))
        for t in torch.linspace(0.05, 0.95, TIMES)
    ]
    return {"model": model, "calibration": calibration, "inputs": inputs, "noise": [model(x) for x in inputs]}


def quantized(**settings):
    """An arm: for each held-out digit, the squared error of the predicted noise, mean over times and pixels."""

    def arm(context: dict) -> list[float]:
        method = VQ4DiT(codewords=16, dim=2, **settings)
        model, _ = method.apply(deepcopy(context["model"]), context["calibration"])
        with torch.no_grad():
            errors = torch.stack([model(x) - y for x, y in zip(context["inputs"], context["noise"])])
        return errors.square().mean((0, 2, 3, 4)).tolist()

    return arm


check = Check(
    claim="At 2 bits per weight, candidates and codebook calibrated together leave at most 0.9 of the squared error"
    " that codebooks alone leave after as many steps, and codebooks alone at most 0.7 of that of k-means.",
    setup=prepare,
    arms={
        "codebook and assignments": quantized(steps=STEPS),
        "codebook alone": quantized(steps=STEPS, candidates=1),
        "k-means": quantized(steps=0),
        "float": lambda context: [0.0] * HELD_OUT,
    },
    metric="squared error of the predicted noise",
    holds=all_of(
        at_most("codebook and assignments", "codebook alone", ratio=0.9, oracle="float"),
        at_most("codebook alone", "k-means", ratio=0.7, oracle="float"),
    ),
    items="same",
    redraws="the noise that calibration starts from, and the start of k-means",
    seeds=8,
    version=1,
    scope="a denoising Transformer of 0.3 M parameters on 8 x 8 digits",
)
