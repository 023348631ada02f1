"""What stands between student and teacher while TransKD trains, and is thrown away afterwards: CSF, PEA, GL-Mixer, EA."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MIDDLE, SQUEEZED = 64, 32
"""Channels inside CSF, and inside its attention: max(MIDDLE / 16, 32)."""


def channel_wise(
    student: Float[Tensor, "B C H W"], teacher: Float[Tensor, "B C H W"], temperature: float = 1.0
) -> Float[Tensor, ""]:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) over the positions of each channel, mean over images and channels.

    >>> x = torch.arange(8.0).view(1, 2, 2, 2)
    >>> float(channel_wise(x + 3, x))
    0.0
    """
    ours, theirs = ((maps.flatten(2) / temperature).log_softmax(-1) for maps in (student, teacher))
    return temperature**2 * (theirs.exp() * (theirs - ours)).sum(-1).mean()


class Norm(nn.BatchNorm2d):
    """Batch normalization; in training, one single value a channel (one image, one position) passes as it is."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x if self.training and x.numel() == x.shape[1] else super().forward(x)


class SelectiveKernel(nn.Module):
    """a x + b y with (a, b) = softmax over the two branches of fc_branch(ReLU(BN(fc(mean over positions of x + y))))."""

    def __init__(self, channels: int, squeezed: int):
        super().__init__()
        self.squeeze = nn.Sequential(nn.Conv2d(channels, squeezed, 1, bias=False), Norm(squeezed), nn.ReLU())
        self.branches = nn.ModuleList(nn.Conv2d(squeezed, channels, 1) for _ in range(2))

    def weights(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B C H W"]) -> Float[Tensor, "2 B C 1 1"]:
        """One weight for each branch, image and channel."""
        code = self.squeeze((x + y).mean((2, 3), keepdim=True))
        return torch.stack([branch(code) for branch in self.branches]).softmax(0)

    def forward(self, x: Float[Tensor, "B C H W"], y: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        a, b = self.weights(x, y)
        return a * x + b * y


class CrossSelectiveFusion(nn.Module):
    """CSF: from the deepest stage to the shallowest, each stage's map is fused with what came down from deeper ones.

    `widths` and `wanted` are the channels of the student's and the teacher's stages, shallow first.
    """

    def __init__(self, widths: Sequence[int], wanted: Sequence[int], middle: int = MIDDLE, squeezed: int = SQUEEZED):
        super().__init__()
        self.enter = nn.ModuleList(nn.Sequential(nn.Conv2d(w, middle, 1, bias=False), Norm(middle)) for w in widths)
        self.fuse = nn.ModuleList(SelectiveKernel(middle, squeezed) for _ in widths[1:])
        self.leave = nn.ModuleList(
            nn.Sequential(nn.Conv2d(middle, t, 3, padding=1, bias=False), Norm(t)) for t in wanted
        )
        for convolution, _ in (*self.enter, *self.leave):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps (B, width, H, W) of all stages, shallow first -> maps (B, wanted, H, W)."""
        found, running = [], None
        for stage in reversed(range(len(maps))):
            x = self.enter[stage](maps[stage])
            if running is not None:
                x = self.fuse[stage](x, F.interpolate(running, x.shape[-2:], mode="nearest"))
            running = x
            found.append(self.leave[stage](x))
        return found[::-1]


class GlobalLocalMixer(nn.Module):
    """GL-Mixer: w_a Attention(e) + w_c (Conv(e) * sigmoid(Conv'(e))), convolutions of size 3 along the tokens.

    The authors' code leaves w_a and w_c at what memory held; here both start at 1.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query_key_value, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.local, self.gate = (nn.Conv1d(width, width, 3, padding=1) for _ in range(2))
        self.weights = nn.Parameter(torch.ones(2))

    def forward(self, e: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        heads = self.query_key_value(e).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        everywhere = self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        nearby = (self.local(e.mT) * self.gate(e.mT).sigmoid()).mT
        return self.weights[0] * everywhere + self.weights[1] * nearby


class Assistant(nn.Module):
    """EA: another patch embedding of a stage, with the teacher's width, on what the student's own embeds."""

    def __init__(self, projection: nn.Conv2d, wanted: int):
        super().__init__()
        options = {"stride": projection.stride, "padding": projection.padding}
        self.project = nn.Conv2d(projection.in_channels, wanted, projection.kernel_size, **options)
        self.norm = nn.LayerNorm(wanted)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        return self.norm(self.project(x).flatten(2).mT)


class PatchEmbeddingAlignment(nn.Module):
    """PEA: a linear map for each stage from the student's embedding to the teacher's width.

    With `heads`, GL-Mixer refines the last stage's embedding before. With `projections`, the student's own patch
    projections, EA adds its embeddings, weighted by learned scalars that start as in the authors' code.
    """

    def __init__(
        self, widths: Sequence[int], wanted: Sequence[int], heads: int = 0, projections: Sequence[nn.Conv2d] = ()
    ):
        super().__init__()
        self.lift = nn.ModuleList(nn.Linear(w, t) for w, t in zip(widths, wanted))
        self.mixer = GlobalLocalMixer(widths[-1], heads) if heads else nn.Identity()
        self.assistants = nn.ModuleList(Assistant(p, t) for p, t in zip(projections, wanted))
        if projections:
            self.shares = nn.Parameter(0.1 * torch.arange(1, 2 * len(widths) + 1).float().view(2, -1))

    def forward(self, embeddings: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings (B, N, width), and what each stage embeds (B, C, H, W) -> embeddings (B, N, wanted)."""
        lifted = [lift(e) for lift, e in zip(self.lift, [*embeddings[:-1], self.mixer(embeddings[-1])])]
        if not self.assistants:
            return lifted
        helped = [assistant(x) for assistant, x in zip(self.assistants, inputs)]
        return [a * x + b * y for a, b, x, y in zip(*self.shares, lifted, helped)]
