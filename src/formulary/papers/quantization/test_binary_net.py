"""The small network that checks of gradient estimators train: its data, its score, its tuning."""

import torch
from torch import nn

from formulary.papers.quantization import _binary_net as net


def test_the_splits_are_apart_and_whole():
    fit, validate, train, test = (net.digits(split)[0] for split in ("fit", "validate", "train", "test"))
    assert torch.equal(torch.cat([validate, fit]), train) and len(validate) == net.VALIDATION
    assert fit.shape[1] == 196 and len(test) and not any(torch.equal(train[0], row) for row in test)


class Knows(net.BinaryNet):
    """Tells the class that it was given for every image, and class 0 for others."""

    def __init__(self, split: str, right: int):
        nn.Module.__init__(self)
        self.answers = net.digits(split)[1].clone()
        self.answers[right:] = (self.answers[right:] + 1) % 10

    def forward(self, pixels):
        return nn.functional.one_hot(self.answers, 10).float()


def test_the_score_counts_right_answers():
    seen = net.right(Knows("test", 7), "test")
    assert seen[:7].tolist() == [1.0] * 7 and not seen[7:].any()


def test_tuning_trains_every_arm_at_every_rate_on_held_out_images(monkeypatch):
    asked = []
    monkeypatch.setattr(net, "right", lambda model, split: torch.tensor([model, 0.0]) if split == "validate" else None)
    table = net.tune(["a", "b"], (0.1, 0.2), lambda name, lr, seed, split: asked.append((name, lr, seed, split)) or lr)
    assert len(asked) == 12 and {split for *_, split in asked} == {"fit"} and min(seed for _, _, seed, _ in asked) >= 1000
    assert abs(table["b"][0.2] - 0.1) < 1e-6 and set(table) == {"a", "b"}


def test_training_learns_and_is_the_same_every_time():
    from formulary.papers.quantization.reste.check import network

    scores = []
    for _ in range(2):
        made = network("ste", 0)
        before = float(net.right(made).mean())
        net.fit(made, 30, 1e-2, seed=0)
        scores.append(float(net.right(made).mean()))
    assert scores[0] == scores[1] > before + 0.2
