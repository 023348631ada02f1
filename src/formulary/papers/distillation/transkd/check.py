"""Discs, squares, triangles and crosses to be told apart pixel by pixel: what does CSF+PEA bring a small SegFormer that has
never been trained before?

The thresholds are the card's. A class has a shape, about a color and about a direction of stripes. One teacher of two stages,
widths 64 and 128, was trained on 14,400 images; all students have widths 16 and 32, the same start, the same 150 steps on the
same 400 labeled images, and the learning rate at which "labels" alone was best on other seeds. "logits" adds KL to the
teacher's distribution at each pixel, "cwd" the channel-wise KL of each stage's map through its own 1x1 convolution and batch
normalization, "transkd" CSF and PEA. The card asks for a minute of steps an arm and two of the teacher; these are 3 to 10
seconds and about 80.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from formulary import lab
from formulary.contracts import Data, parts
from formulary.evidence import Check, Outcome, all_of, at_least

from .fusion import Norm, channel_wise
from .method import distil
from .stages import reading

SIDE, CLASSES, TRAIN, TEST, GROUPS = 32, 5, 400, 400, 8
STEPS, BATCH, RATE = 150, 16, 1e-2
JITTER = 0.4
PALETTE = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]).float()[..., None, None]
TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE = 900, 16, 2e-3


def shape(kind: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Which pixels (N,H,W) belong to a disc (1), square (2), triangle (3) or cross (4) of about equal area around a center."""
    across = torch.minimum(dx.abs(), dy.abs()) < 0.4 * radius
    inside = [
        dx**2 + dy**2 < radius**2,
        torch.maximum(dx.abs(), dy.abs()) < 0.89 * radius,
        (dy < 0.9 * radius) & (dx.abs() < 0.6 * (dy + 1.3 * radius)),
        across & (torch.maximum(dx.abs(), dy.abs()) < 1.15 * radius),
    ]
    return torch.stack(inside).gather(0, (kind - 1).expand(1, *dx.shape))[0]


def striped(kind: Tensor, draw: torch.Generator) -> Tensor:
    """(N,3,H,W): a color and waves of another; shapes (1 to 4) have about their class's color and direction, the ground (0) any."""
    y, x = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float32)] * 2, indexing="ij")
    n, shaped = len(kind), (kind > 0).float()
    own, pace, phase = torch.rand(3, n, 1, 1, generator=draw)
    angle = torch.pi * (shaped * (kind / 4 + 0.15 * (own - 0.5)) + (1 - shaped) * own)
    wave = torch.sin((0.9 + 0.6 * pace) * (angle.cos() * x + angle.sin() * y) + 6.3 * phase)[:, None]
    colors = torch.randn(2, n, 3, 1, 1, generator=draw)
    return shaped[:, None] * PALETTE[kind[:, 0, 0]] + JITTER * colors[0] + 0.5 * wave * colors[1]


def images(n: int, draw: torch.Generator) -> dict[str, Tensor]:
    """Striped images with three to five striped shapes, later ones in front, and noise."""
    pixels, labels = striped(torch.zeros(n, 1, 1, dtype=torch.long), draw), torch.zeros(n, SIDE, SIDE, dtype=torch.long)
    y, x = torch.meshgrid(*[torch.arange(SIDE, dtype=torch.float32)] * 2, indexing="ij")
    count = torch.randint(3, 6, (n, 1, 1), generator=draw)
    for index in range(5):
        kind = torch.randint(1, CLASSES, (n, 1, 1), generator=draw)
        row, column = SIDE * (0.1 + 0.8 * torch.rand(2, n, 1, 1, generator=draw))
        inside = shape(kind, x - column, y - row, 4 + 3 * torch.rand(n, 1, 1, generator=draw)) & (index < count)
        pixels = torch.where(inside[:, None], striped(kind, draw), pixels)
        labels = torch.where(inside, kind, labels)
    return {"pixel_values": pixels + 0.2 * torch.randn(pixels.shape, generator=draw), "labels": labels}


def segmenter(widths: list[int], depth: int, decoder: int) -> SegformerForSemanticSegmentation:
    """A SegFormer of two stages on maps of half and a quarter of the image's side."""
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2, depths=[depth] * 2, hidden_sizes=widths, num_attention_heads=[2, 4], patch_sizes=[7, 3],
            strides=[2, 2], sr_ratios=[2, 1], mlp_ratios=[2, 2], decoder_hidden_size=decoder, num_labels=CLASSES,
            drop_path_rate=0.0, classifier_dropout_prob=0.0, initializer_range=0.1,
        )  # fmt: skip
    )


def teacher() -> nn.Module:
    def build():
        torch.manual_seed(0)
        model = segmenter([64, 128], 2, 128)
        stream = lambda step: images(TEACHER_BATCH, torch.Generator().manual_seed(10**6 + step))
        lab.train(model, stream, steps=TEACHER_STEPS, lr=TEACHER_RATE, weight_decay=0.01)
        return model

    key = {"steps": TEACHER_STEPS, "batch": TEACHER_BATCH, "rate": TEACHER_RATE, "widths": [64, 128], "task": 1}
    return lab.cached("shapes-segformer", build, key=key)


def prepare(seed: int) -> dict:
    draw = torch.Generator().manual_seed(seed)
    train, test = images(TRAIN, draw), images(TEST, draw)
    items = [{"pixel_values": x, "labels": y} for x, y in zip(*train.values())]
    return {"teacher": teacher(), "data": Data(items, batch_size=BATCH, seed=seed), "test": test, "seed": seed}


def logits_loss(teacher: nn.Module, student: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The labels' cross-entropy and KL to the teacher's distribution, mean over pixels of the logits' map."""
    out = student(**batch)
    with torch.no_grad():
        wanted = teacher(pixel_values=batch["pixel_values"]).logits.log_softmax(1)
    return out.loss + F.kl_div(out.logits.log_softmax(1), wanted, reduction="none", log_target=True).sum(1).mean()


def channel_wise_distilled(teacher: nn.Module, student: nn.Module, options: dict) -> None:
    """Train with CWD alone: each stage's map through a 1x1 convolution and batch normalization."""
    pairs = zip(student.config.hidden_sizes, teacher.config.hidden_sizes)
    pupil = nn.ModuleList([student, *(nn.Sequential(nn.Conv2d(a, b, 1, bias=False), Norm(b)) for a, b in pairs)])
    with reading(teacher, 2) as theirs, reading(student, 2) as ours:

        def loss(pupil: nn.ModuleList, batch: dict[str, Tensor]) -> Tensor:
            out, image = pupil[0](**batch), batch["pixel_values"]
            with torch.no_grad():
                teacher(pixel_values=image)
            found = [lift(x) for lift, x in zip(pupil[1:], ours(image).maps)]
            return out.loss + sum(channel_wise(a, b) for a, b in zip(found, theirs(image).maps))

        lab.train(pupil, loss=loss, **options)


def miou(model: nn.Module, test: dict[str, Tensor]) -> list[float]:
    """The mean over classes of intersection / union, of each group of test images."""
    with torch.no_grad():
        logits = model.eval()(pixel_values=test["pixel_values"]).logits
    found = F.interpolate(logits, size=SIDE, mode="bilinear").argmax(1).view(GROUPS, -1)
    wanted, values = test["labels"].view(GROUPS, -1), []
    for a, b in zip(found, wanted):
        values.append(sum(float(((a == c) & (b == c)).sum() / ((a == c) | (b == c)).sum()) for c in range(CLASSES)) / CLASSES)
    return values


def arm(name: str, context: dict, rate: float = RATE) -> Outcome:
    teacher, data, seed = context["teacher"], context["data"], context["seed"]
    torch.manual_seed(seed)
    student = segmenter([16, 32], 1, 32) if name != "teacher" else teacher
    options = {"batches": data, "steps": STEPS, "lr": rate, "weight_decay": 0.01, "schedule": "linear", "seed": seed}
    if name == "transkd":
        distil(teacher, student, data, stages=2, steps=STEPS, learning_rate=rate, seed=seed)
    elif name == "cwd":
        channel_wise_distilled(teacher, student, options)
    elif name != "teacher":
        lab.train(student, loss=partial(logits_loss, teacher) if name == "logits" else None, **options)
    budget = {"parameters": parts.count_weights(student), "images": STEPS * BATCH} if name != "teacher" else {}
    return Outcome(miou(student, context["test"]), budget=budget)


check = Check(
    claim="A SegFormer of two stages of widths 16 and 32, trained from scratch for 150 steps on 400 images of shapes, is better "
    "by at least 2 points of mIoU with CSF and PEA from a teacher four times as wide than with labels alone, and better than "
    "with channel-wise distillation of each stage's map.",
    setup=prepare,
    arms={name: partial(arm, name) for name in ("transkd", "cwd", "logits", "labels", "teacher")},
    metric="mIoU",
    holds=all_of(at_least("transkd", "labels", plus=0.02), at_least("transkd", "cwd", effect=0.02)),
    items="fresh",
    redraws="the images to train and test on, and the weights at the start",
    seeds=5,
    version=1,
    scope="SegFormers of two stages on images of 32 x 32 with three to five shapes, from one teacher",
)
