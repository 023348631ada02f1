"""Latent tokens that look at an image through boxes: sampling, mixing, moving, and the edits that put them into a ViT.

Boxes are (x1, y1, x2, y2) in parts of the image, and their geometry is float32 whatever the model's dtype.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import BlockEdit
from formulary.contracts.edits import Replacement
from formulary.errors import FormularyError
from formulary.papers.token_reduction._parts import rows

INNER, OUT_POINTS, HIGHEST_FREQUENCY, HEAD_WIDTH = 128, 32, 128, 64

# ---------------------------------------------------------------- boxes and points


def centers_and_sizes(boxes: Float[Tensor, "*B 4"]) -> tuple[Float[Tensor, "*B 2"], Float[Tensor, "*B 2"]]:
    """(x, y) of the middle, and width and height."""
    return (boxes[..., 2:] + boxes[..., :2]) / 2, boxes[..., 2:] - boxes[..., :2]


def initial_boxes(tokens: int) -> Float[Tensor, "n 4"]:
    """A square grid of boxes half as wide and high as the image, edge to edge; those left over see all of it."""
    side = math.isqrt(tokens)
    boxes = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(tokens, 1)
    if side > 1:
        start = torch.arange(side) / (side - 1) / 2
        corners = torch.stack([start.repeat(side), start.repeat_interleave(side)], dim=-1)
        boxes[: side**2] = torch.cat([corners, corners + 0.5], dim=-1)
    return boxes


def moved(boxes: Float[Tensor, "B n 4"], change: Float[Tensor, "B n 4"]) -> Float[Tensor, "B n 4"]:
    """Boxes moved by `change[..., :2]` of their size, and made exp(`change[..., 2:]`) times as large."""
    center, size = centers_and_sizes(boxes)
    center, size = center + change[..., :2] * size.abs(), size.abs() * change[..., 2:].exp()
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def points_in(boxes: Float[Tensor, "B n 4"], offsets: Float[Tensor, "B n P 2"]) -> Float[Tensor, "B n P 2"]:
    """Points about the middle of each box: the offsets made to have mean 0 and three deviations in a box's size."""
    deviation, mean = torch.std_mean(offsets, dim=2, keepdim=True)
    center, size = centers_and_sizes(boxes)
    return center[:, :, None] + (offsets - mean) / (3 * (deviation + 1e-5)) * size[:, :, None]


def sampled(features: Float[Tensor, "B C h w"], points: Float[Tensor, "B n P 2"]) -> Float[Tensor, "B n P C"]:
    """Features at points (x, y) between 0 and 1, bilinear between the middles of pixels; the border goes on outside."""
    found = F.grid_sample(features.float(), 2 * points - 1, padding_mode="border", align_corners=False)
    return found.permute(0, 2, 3, 1).to(features.dtype)


@torch.no_grad()
def position_code(boxes: Float[Tensor, "B n 4"], width: int) -> Float[Tensor, "B n {width}"]:
    """Sines and cosines of the four coordinates at `width` / 4 frequencies between pi and 128 pi."""
    frequency = torch.linspace(0, math.log(HIGHEST_FREQUENCY), width // 4, device=boxes.device).exp() * math.pi
    angle = boxes[..., None] * frequency
    return torch.cat([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(2)


# ---------------------------------------------------------------- the focusing Transformer


def linear(inputs: int, outputs: int, bias: bool = True, zero: bool = False) -> nn.Linear:
    """A linear of truncated normal weights, deviation 0.4 / sqrt(inputs): the authors' 0.02 at their width of 384."""
    new = nn.Linear(inputs, outputs, bias=bias)
    nn.init.zeros_(new.weight) if zero else nn.init.trunc_normal_(new.weight, std=0.4 * inputs**-0.5)
    if bias:
        nn.init.zeros_(new.bias)
    return new


def unit_norm(width: int) -> nn.LayerNorm:
    """A norm whose outputs have length 1 before training, as each generator's input has."""
    norm = nn.LayerNorm(width)
    nn.init.constant_(norm.weight, width**-0.5)
    return norm


class AdaptiveMixing(nn.Module):
    """GELU(M_p X M_c) through a linear: X (P,C) are a token's samples, M_c (C,C) and M_p (32,P) its own matrices."""

    def __init__(self, width: int, points: int, channels: int):
        super().__init__()
        self.sizes = channels**2, points * OUT_POINTS
        self.points, self.channels = points, channels
        self.generate = nn.Sequential(unit_norm(width), linear(width, INNER), linear(INNER, sum(self.sizes), zero=True))
        by_channel, by_point = self.generate[2].bias.detach().split(self.sizes)
        nn.init.xavier_uniform_(by_channel.view(channels, channels))
        nn.init.xavier_uniform_(by_point.view(OUT_POINTS, points))
        self.out = linear(OUT_POINTS * channels, width)

    def forward(self, samples: Float[Tensor, "B n P C"], tokens: Float[Tensor, "B n W"]) -> Float[Tensor, "B n W"]:
        by_channel, by_point = self.generate(tokens).split(self.sizes, dim=-1)
        by_channel = by_channel.unflatten(-1, (self.channels, self.channels))
        mixed = by_point.unflatten(-1, (OUT_POINTS, self.points)) @ (samples @ by_channel)
        return self.out(F.gelu(mixed).flatten(2))


class Looking(nn.Module):
    """Tokens take in what they see in their boxes, and where these are."""

    def __init__(self, width: int, points: int, channels: int):
        super().__init__()
        self.width, self.points = width, points
        self.offset = nn.Sequential(unit_norm(width), linear(width, 2 * points, bias=False, zero=True))
        self.offset_bias = nn.Parameter(self._spread(points))
        self.mixing = AdaptiveMixing(width, points, channels)
        self.place = nn.Sequential(nn.LayerNorm(width), linear(width, width))

    @staticmethod
    def _spread(points: int) -> Float[Tensor, "two_P"]:
        """A square grid of points where their number is a square, else random ones."""
        side = math.isqrt(points)
        if side**2 != points:
            return torch.rand(2 * points) - 0.5
        steps = (torch.arange(side) + 0.5) / side - 0.5
        return torch.stack([steps.repeat(side), steps.repeat_interleave(side)], dim=-1).flatten()

    def samples(self, tokens: Tensor, boxes: Tensor, features: Tensor) -> Float[Tensor, "B n P C"]:
        offsets = (self.offset(tokens) + self.offset_bias).float().unflatten(-1, (self.points, 2))
        return sampled(features, points_in(boxes, offsets))

    def forward(self, tokens: Tensor, boxes: Tensor, features: Tensor) -> Float[Tensor, "B n W"]:
        tokens = tokens + self.mixing(self.samples(tokens, boxes, features), tokens)
        return tokens + self.place(position_code(boxes, self.width).to(tokens.dtype))


class FocusingBlock(nn.Module):
    """Look, attend to the other tokens, think, and move the box."""

    def __init__(self, width: int, points: int, channels: int):
        super().__init__()
        most = max(1, width // HEAD_WIDTH)
        self.heads = next(heads for heads in range(most, 0, -1) if width % heads == 0)
        self.look = Looking(width, points, channels)
        self.norm_attention, self.norm_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.joined = linear(width, 3 * width), linear(width, width)
        self.feed_forward = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width))
        into, out = linear(width, width), linear(width, 4, bias=False, zero=True)
        self.move = nn.Sequential(unit_norm(width), into, nn.GELU(), out)

    def attention(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.joined(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))

    def moved(self, tokens: Tensor, boxes: Tensor) -> Tensor:
        return moved(boxes, self.move(tokens).float())

    def forward(self, tokens: Tensor, boxes: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.look(tokens, boxes, features)
        tokens = tokens + self.attention(self.norm_attention(tokens))
        tokens = tokens + self.feed_forward(self.norm_feed_forward(tokens))
        return tokens, self.moved(tokens, boxes)


class Stem(nn.Module):
    """Pixels to features at a quarter of their resolution, normalized over channels at each place."""

    def __init__(self, pixel_channels: int, channels: int):
        super().__init__()
        self.projection = nn.Conv2d(pixel_channels, channels, 7, stride=2, padding=3)
        nn.init.kaiming_normal_(self.projection.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, pixel_values: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        features = F.max_pool2d(self.projection(pixel_values).relu(), 3, stride=2, padding=1)
        return F.layer_norm(features.movedim(1, -1), features.shape[1:2]).movedim(-1, 1)


# ---------------------------------------------------------------- edits


class Seen:
    """The boxes (B,n,4) through which the images of the last forward were seen, and their grid of patches."""

    def __init__(self):
        self.boxes, self.grid = None, (0, 0)

    def __deepcopy__(self, memo: dict) -> "Seen":
        return Seen()


class FocusedEmbeddings(Replacement):
    """In the place of a ViT's embeddings: (B,C,H,W) pixels to (B,L,D), the `prefix` (CLS first) and `tokens` latents.

    `patch`: height and width of the original's patches. As there, `patch_embeddings.projection` takes the pixels.
    """

    def __init__(
        self, hidden: int, prefix: int, patch: list[int], pixel_channels: int, tokens: int, width: int,
        iterations: int, points: int, channels: int,
    ):  # fmt: skip
        super().__init__()
        self.tokens, self.patch, self.seen = tokens, patch, Seen()
        self.patch_embeddings = Stem(pixel_channels, channels)
        self.boxes = nn.Parameter(initial_boxes(tokens))
        self.latent = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width)))
        self.stages = nn.Parameter(torch.randn(iterations, width))
        self.focus = FocusingBlock(width, points, channels)
        self.widen = linear(width, hidden)
        self.look = Looking(hidden, points, channels)
        self.cls_token = nn.Parameter(torch.zeros(1, prefix, hidden))

    def forward(
        self, pixel_values: Tensor, bool_masked_pos: Tensor | None = None, interpolate_pos_encoding: bool | None = None
    ) -> Float[Tensor, "B L D"]:
        if bool_masked_pos is not None:
            raise FormularyError("bootstrap-sparseformer has no patches to mask: leave bool_masked_pos out")
        features, count = self.patch_embeddings(pixel_values), len(pixel_values)
        tokens = self.latent.expand(count, self.tokens, -1)
        boxes = self.boxes.float().expand(count, -1, -1)
        for stage in self.stages:
            tokens, boxes = self.focus(tokens + stage, boxes, features)
        height, width = pixel_values.shape[-2:]
        self.seen.boxes, self.seen.grid = boxes.detach(), (height // self.patch[0], width // self.patch[1])
        tokens = self.look(self.widen(tokens), boxes, features)
        return torch.cat([self.cls_token.expand(count, -1, -1), tokens], dim=1)


class Truncated(Replacement):
    """In the place of a block that no token goes through."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        return hidden_states


class LatentBlock(BlockEdit):
    """The first block left refuses masks, which count patches; the last may give patches the states of latents again."""

    def setup(self, model: nn.Module, *, restore: bool) -> None:
        self.latent_embeddings_seen, self.restores_patches = focused(model).seen, restore

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if any(isinstance(value, Tensor) for value in (*args, *kwargs.values())):
            raise FormularyError("bootstrap-sparseformer has no patches to mask: leave attention_mask out")
        return super().forward(hidden_states, *args, **kwargs)

    def after(self, hidden: Tensor) -> Tensor:
        hidden = super().after(hidden)
        return restored(hidden, self.latent_embeddings_seen) if self.restores_patches else hidden


def focused(model: nn.Module) -> FocusedEmbeddings:
    """The embeddings of a bootstrapped model. Raises FormularyError when the model has none."""
    for module in model.modules():
        if isinstance(module, FocusedEmbeddings):
            return module
    raise FormularyError(f"this {type(model).__name__} carries no bootstrap-sparseformer edits")


def restored(hidden: Float[Tensor, "B M D"], seen: Seen) -> Float[Tensor, "B L D"]:
    """The prefix, then for each patch the state of the latent whose box has its middle nearest, of equals the first."""
    height, width = seen.grid
    across, down = (torch.arange(width) + 0.5) / width, (torch.arange(height) + 0.5) / height
    patches = torch.stack([across.repeat(height), down.repeat_interleave(width)], dim=-1).to(hidden.device)
    centers, _ = centers_and_sizes(seen.boxes)
    nearest = (patches[:, None] - centers[:, None]).square().sum(-1).argmin(-1)
    prefix = hidden.shape[1] - centers.shape[1]
    return torch.cat([hidden[:, :prefix], rows(hidden[:, prefix:], nearest)], dim=1)
