"""Compact Transformers: a small vision Transformer whose tokens are made by convolutions and pooled by a learned
weighted average.

    tokens    x_0 = flatten(MaxPool(ReLU(Conv(image))))      CCT: once or twice; CVT and ViT-Lite: cut patches
    blocks    x <- x + MHSA(LN(x)); x <- x + MLP(LN(x))      pre-norm, GELU, stochastic depth
    SeqPool   z = softmax(g(x_L))^T x_L, logits = W z + b    CCT and CVT; ViT-Lite: a class token

Source: arXiv:2104.05704, section 3 (SeqPool, convolutional tokenizer). `CCT.named_sizes`
has ViT-Lite, CVT and CCT of the paper; parameter counts are those of the official code.

Where the official code differs, this follows the paper: there, the first norm of the feed-forward part replaces the
residual stream; here it is an ordinary pre-norm block.

Shapes: pixel_values (B, C, H, W) -> logits (B, classes). H and W may differ from the config's: position embeddings are
then interpolated. Raises UsageError for sizes that do not fit (a patch that does not divide the image, heads that do
not divide the width).

>>> import torch
>>> model = CCT.build("cct-2/3x2", classes=10)
>>> sum(p.numel() for p in model.parameters())
283723
>>> model.eval().predict(torch.rand(4, 3, 32, 32)).shape
torch.Size([4, 10])
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Model
from formulary.contracts.transform import check_range
from formulary.errors import UsageError, nearest

TOKENIZERS, POOLS, POSITIONS = ("conv", "patch"), ("sequence", "class"), ("learnable", "sine", "none")


@dataclass(frozen=True)
class Config:
    """`tokenizer` "conv" has `convolutions` layers of `kernel`; "patch" cuts patches of `kernel`. `pool` "sequence" is
    SeqPool."""

    image_size: int = 32
    channels: int = 3
    classes: int = 10
    tokenizer: str = "conv"
    kernel: int = 3
    convolutions: int = 1
    hidden_channels: int = 64
    pool: str = "sequence"
    positions: str = "learnable"
    layers: int = 7
    heads: int = 4
    width: int = 256
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    attention_dropout: float = 0.1
    stochastic_depth: float = 0.1
    label_smoothing: float = 0.1

    def __post_init__(self):
        for name, known in (("tokenizer", TOKENIZERS), ("pool", POOLS), ("positions", POSITIONS)):
            value = getattr(self, name)
            if value not in known:
                raise UsageError(f"cct: {name} {value!r} is none of {', '.join(known)}{nearest(str(value), known)}")
        for name in (
            "image_size",
            "channels",
            "classes",
            "kernel",
            "convolutions",
            "hidden_channels",
            "layers",
            "heads",
            "width",
        ):
            check_range("cct", name, getattr(self, name), 1, 2**20)
        for name in ("dropout", "attention_dropout", "stochastic_depth", "label_smoothing"):
            check_range("cct", name, getattr(self, name), 0, 0.99)
        check_range("cct", "mlp_ratio", self.mlp_ratio, 0.01, 64)
        if self.width % self.heads:
            raise UsageError(f"cct: {self.heads} heads do not divide the width {self.width}")


class ConvTokenizer(nn.Module):
    """(B, C, H, W) -> (B, n, D) and the grid (h, w) with n = h w: `MaxPool(ReLU(Conv2d))`, `convolutions` times (eq.
    1).

    Convolutions without bias, stride max(1, kernel // 2 - 1) and padding kernel // 2; pooling 3 with stride 2.
    """

    def __init__(self, channels: int, width: int, *, kernel: int, convolutions: int = 1, hidden_channels: int = 64):
        super().__init__()
        sizes = [channels, *[hidden_channels] * (convolutions - 1), width]
        stride = max(1, kernel // 2 - 1)
        self.layers = nn.ModuleList(
            nn.Conv2d(size, following, kernel, stride, max(1, kernel // 2), bias=False)
            for size, following in zip(sizes, sizes[1:])
        )

    def forward(self, pixels: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B n D"], tuple[int, int]]:
        for convolution in self.layers:
            pixels = F.max_pool2d(F.relu(convolution(pixels)), 3, stride=2, padding=1)
        return pixels.flatten(2).transpose(1, 2), (pixels.shape[2], pixels.shape[3])

    def grid(self, size: int) -> int:
        """Tokens a side for an image of `size` pixels a side."""
        for convolution in self.layers:
            size = (size + 2 * convolution.padding[0] - convolution.kernel_size[0]) // convolution.stride[0] + 1
            size = (size - 1) // 2 + 1
        return size


class PatchTokenizer(nn.Module):
    """(B, C, H, W) -> (B, n, D) and the grid: one linear map of each square patch."""

    def __init__(self, channels: int, width: int, *, kernel: int):
        super().__init__()
        self.projection = nn.Conv2d(channels, width, kernel, kernel)

    def forward(self, pixels: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B n D"], tuple[int, int]]:
        grid = self.grid(pixels.shape[2]), self.grid(pixels.shape[3])
        return self.projection(pixels).flatten(2).transpose(1, 2), grid

    def grid(self, size: int) -> int:
        """Tokens a side for an image of `size` pixels a side."""
        patch = self.projection.kernel_size[0]
        if size % patch or size < patch:
            raise UsageError(
                f"cct: patches of {patch} pixels do not divide an image of {size}; the conv tokenizer takes any size"
            )
        return size // patch


class SequencePool(nn.Module):
    """(B, n, D) -> (B, D): the average of the tokens, weighted by a softmax over their scores."""

    def __init__(self, width: int):
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, tokens: Float[Tensor, "B n D"]) -> Float[Tensor, "B D"]:
        weights = self.score(tokens).softmax(dim=1)
        return (weights.transpose(1, 2) @ tokens).squeeze(1)


class Block(nn.Module):
    """One pre-norm Transformer block; in training each branch is left out for a sample with probability `drop`
    (stochastic depth)."""

    def __init__(self, config: Config, drop: float):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads, self.attention_dropout, self.drop = config.heads, config.attention_dropout, drop
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, width),
            nn.Dropout(config.dropout),
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        x = x + self.keep(self.attend(self.norm_attention(x)))
        return x + self.keep(self.mlp(self.norm_mlp(x)))

    def attend(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        drop = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=drop)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))

    def keep(self, branch: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        if not self.training or self.drop == 0:
            return branch
        kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.drop
        return branch * kept.to(branch.dtype) / (1 - self.drop)


def _sizes() -> dict[str, dict[str, Any]]:
    depth = {
        2: {"layers": 2, "heads": 2, "width": 128, "mlp_ratio": 1.0},
        4: {"layers": 4, "heads": 2, "width": 128, "mlp_ratio": 1.0},
        6: {"layers": 6, "heads": 4, "width": 256, "mlp_ratio": 2.0},
        7: {"layers": 7, "heads": 4, "width": 256, "mlp_ratio": 2.0},
        14: {"layers": 14, "heads": 6, "width": 384, "mlp_ratio": 3.0},
    }
    sizes = {f"vit-lite-{n}/4": {**depth[n], "tokenizer": "patch", "kernel": 4, "pool": "class"} for n in (2, 4, 6, 7)}
    sizes |= {f"cvt-{n}/4": {**depth[n], "tokenizer": "patch", "kernel": 4} for n in (2, 4, 6, 7)}
    for n, kernel, convolutions in ((2, 3, 2), (4, 3, 2), (6, 3, 1), (6, 3, 2), (7, 3, 1), (7, 3, 2)):
        sizes[f"cct-{n}/{kernel}x{convolutions}"] = {**depth[n], "kernel": kernel, "convolutions": convolutions}
    large = {"kernel": 7, "convolutions": 2, "image_size": 224}
    sizes["cct-7/7x2"] = {**depth[7], **large, "classes": 102}
    sizes["cct-14/7x2"] = {**depth[14], **large, "classes": 1000}
    return sizes


class CCT(Model):
    """An image classifier: `Config` chooses between CCT, CVT and ViT-Lite."""

    Config = Config
    named_sizes: ClassVar[dict[str, dict[str, Any]]] = _sizes()
    accepts: ClassVar[str] = "images"
    training: ClassVar[dict[str, Any]] = {"steps": 1000, "lr": 5e-4, "batch_size": 32, "weight_decay": 3e-2}
    quick: ClassVar[dict[str, Any]] = {"image_size": 16, "layers": 1, "width": 32, "heads": 2, "hidden_channels": 16}

    def __init__(self, config: Config):
        super().__init__(config)
        width = config.width
        if config.tokenizer == "conv":
            self.tokenizer = ConvTokenizer(
                config.channels,
                width,
                kernel=config.kernel,
                convolutions=config.convolutions,
                hidden_channels=config.hidden_channels,
            )
        else:
            self.tokenizer = PatchTokenizer(config.channels, width, kernel=config.kernel)
        self.side = self.tokenizer.grid(config.image_size)
        if config.pool == "class":
            self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        else:
            self.pool = SequencePool(width)
        tokens = self.side**2 + (config.pool == "class")
        if config.positions == "learnable":
            self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, tokens, width), std=0.2))
        elif config.positions == "sine":
            self.register_buffer("position", sinusoids(tokens, width).unsqueeze(0))
        last = max(1, config.layers - 1)
        self.blocks = nn.ModuleList(Block(config, config.stochastic_depth * i / last) for i in range(config.layers))
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, config.classes)
        self.apply(_initialize)

    def forward(self, pixel_values: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Logits."""
        x, grid = self.tokenizer(pixel_values)
        if self.config.pool == "class":
            x = torch.cat([self.class_token.expand(x.shape[0], -1, -1), x], dim=1)
        if self.config.positions != "none":
            x = x + self._positions(grid)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.head(x[:, 0] if self.config.pool == "class" else self.pool(x))

    def _positions(self, grid: tuple[int, int]) -> Float[Tensor, "1 n D"]:
        if grid == (self.side, self.side):
            return self.position
        extra = self.position.shape[1] - self.side**2
        square = self.position[:, extra:].unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
        return torch.cat([self.position[:, :extra], resized], dim=1)

    def loss(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Cross-entropy with label smoothing, in nats, of `pixel_values` and `labels`."""
        return F.cross_entropy(
            self(batch["pixel_values"]), batch["labels"], label_smoothing=self.config.label_smoothing
        )

    @torch.no_grad()
    def predict(self, inputs: Float[Tensor, "B C H W"]) -> Float[Tensor, "B classes"]:
        """Class probabilities, in the mode (train or eval) that the model is in."""
        return self(inputs).softmax(dim=-1)


def sinusoids(n: int, width: int) -> Float[Tensor, "n width"]:
    """Fixed position embeddings: place 2 i is sin(p / 10000^(2 i / width)), place 2 i + 1 the cosine of the same
    angle."""
    place = torch.arange(width)
    angle = torch.arange(n).unsqueeze(1) / 10000 ** (2 * (place // 2) / width)
    return torch.where(place % 2 == 0, angle.sin(), angle.cos())


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight)
