"""What reducers of image tokens share: the tokens of the forward under way, and the edits that follow and restore them.

`PatchGrid` makes the patch embedding note the grid and hold one `ImageTokens` for the model; `TokenBlock` starts them
in the first block and gives the outputs all tokens again after the last. A room exports both and derives its own block.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from formulary.contracts import BlockEdit, Data, parts
from formulary.contracts.attention import ATTRIBUTE
from formulary.errors import FormularyError

PREFIX_TOKENS = ("cls_token", "distillation_token", "register_tokens")


def rows(x: Float[Tensor, "B N D"], index: Int[Tensor, "B n"]) -> Float[Tensor, "B n D"]:
    """The rows of each image at `index`."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def grid_distances(height: int, width: int, device: torch.device) -> Float[Tensor, "N N"]:
    """Squared distances between the patches of a grid, in patches."""
    down = torch.arange(height, device=device).repeat_interleave(width)
    across = torch.arange(width, device=device).repeat(height)
    return ((down[:, None] - down) ** 2 + (across[:, None] - across) ** 2).float()


class ImageTokens:
    """The image tokens of the forward under way, shared by the edited parts of one model and of no copy of it.

    `kept` (B,n): which patches are left, ascending. `real` (B,n): which of them are tokens and not padding, or None
    when all are. `choice`: what an attention leaves for its block, (index, real) as `select` takes them, or None.
    """

    def __init__(self, owner: str):
        self.owner = owner
        self.height = self.width = self.prefix = 0
        self.kept = self.real = self.choice = None

    def __deepcopy__(self, memo: dict) -> "ImageTokens":
        return ImageTokens(self.owner)

    def start(self, embeddings: Float[Tensor, "B L D"]) -> None:
        """Forget the last images."""
        count = self.height * self.width
        self.prefix = embeddings.shape[1] - count
        if self.prefix < 0 or not count:
            grid = f"{self.height} x {self.width}"
            raise FormularyError(f"{self.owner}: {embeddings.shape[1]} tokens do not hold a grid of {grid} patches")
        self.kept = torch.arange(count, device=embeddings.device).expand(len(embeddings), -1)
        self.real = self.choice = None

    def select(
        self, hidden: Float[Tensor, "B L D"], index: Int[Tensor, "B n"], real: Bool[Tensor, "B n"] | None = None
    ) -> Float[Tensor, "B M D"]:
        """Keep the prefix and the image tokens at `index`, counted among those left; `real` marks those not padding."""
        self.kept, self.real = self.kept.gather(1, index), real
        return torch.cat([hidden[:, : self.prefix], rows(hidden[:, self.prefix :], index)], dim=1)

    def restore(self, hidden: Float[Tensor, "B M D"]) -> Float[Tensor, "B L D"]:
        """All tokens again: each patch gets the state of the kept one nearest in the grid, of equals the first."""
        count = self.height * self.width
        if self.kept.shape[1] == count and self.real is None:
            return hidden
        apart = grid_distances(self.height, self.width, hidden.device).expand(len(hidden), -1, -1)
        apart = apart.gather(2, self.kept[:, None].expand(-1, count, -1))
        if self.real is not None:
            apart = apart.masked_fill(~self.real[:, None], torch.inf)
        return torch.cat([hidden[:, : self.prefix], rows(hidden[:, self.prefix :], apart.argmin(-1))], dim=1)


def shared_tokens(model: nn.Module) -> ImageTokens:
    """The `ImageTokens` of an edited model. Raises FormularyError when the model has none."""
    for module in model.modules():
        if isinstance(module, PatchGrid):
            return module.image_tokens
    raise FormularyError(f"this {type(model).__name__} carries no edits that reduce tokens")


def kept_index(model: nn.Module) -> list[Int[Tensor, "n"]]:
    """For each image of the last forward, the positions of what was kept to the end, CLS first."""
    tokens = shared_tokens(model)
    if tokens.kept is None:
        raise FormularyError("no tokens were kept yet: run the model first")
    prefix = torch.arange(tokens.prefix, device=tokens.kept.device)
    real = torch.ones_like(tokens.kept, dtype=torch.bool) if tokens.real is None else tokens.real
    return [torch.cat([prefix, kept[mine] + tokens.prefix]) for kept, mine in zip(tokens.kept, real)]


def grid(projection: nn.Conv2d, pixels: Float[Tensor, "*B C H W"]) -> tuple[int, int]:
    """Height and width in patches, as the convolution that embeds them gives."""
    sides = zip(pixels.shape[-2:], projection.kernel_size, projection.stride)
    height, width = ((side - size) // stride + 1 for side, size, stride in sides)
    return height, width


class PatchGrid:
    """Makes the patch embedding note the grid's height and width, and hold the model's `ImageTokens`."""

    @classmethod
    def attach(cls, model: nn.Module, name: str, *, owner: str) -> nn.Module:
        module = model.get_submodule(name)
        bases = (cls, type(module))
        module.__class__ = type("".join(base.__name__ for base in bases), bases, {"__module__": cls.__module__})
        module.image_tokens = ImageTokens(owner)
        return module

    def forward(self, pixel_values: Tensor, *args, **kwargs) -> Tensor:
        self.image_tokens.height, self.image_tokens.width = grid(self.projection, pixel_values)
        return super().forward(pixel_values, *args, **kwargs)


class TokenBlock(BlockEdit):
    """A block that starts the tokens when it is the `first`, and when it is the `last` may restore them all."""

    def setup(self, model: nn.Module, *, first: bool, last: bool, restore: bool) -> None:
        self.image_tokens, self.first_of_all, self.last_of_all = shared_tokens(model), first, last
        self.restores_tokens = restore

    def before(self, hidden: Tensor) -> Tensor:
        if getattr(self, "gradient_checkpointing", False) and self.training:
            raise FormularyError(
                f"{self.image_tokens.owner} cannot replay a block's token choice: train without gradient checkpointing"
            )
        if self.first_of_all:
            self.image_tokens.start(hidden)
        return super().before(hidden)

    def chosen(self, hidden: Tensor) -> Tensor:
        """The tokens that the block's attention chose, if it chose any; each choice is used once."""
        choice, self.image_tokens.choice = self.image_tokens.choice, None
        return hidden if choice is None else self.image_tokens.select(hidden, *choice)

    def after(self, hidden: Tensor) -> Tensor:
        hidden = super().after(hidden)
        return self.image_tokens.restore(hidden) if self.last_of_all and self.restores_tokens else hidden


def refuse_masks(owner: str, mask: Tensor | None, bias: Tensor | None, causal: bool) -> None:
    """Tokens leave in an order of their own, which no mask given from outside could follow."""
    if mask is not None or bias is not None or causal:
        raise FormularyError(f"{owner} cannot drop tokens under an attention mask: leave attention_mask out")


def patches(owner: str, model: nn.Module, data: Data | None) -> tuple[str, int]:
    """The patch embedding's name, and the patches of an image of `data`, else of the configured size.

    Raises FormularyError for a model whose tokens cannot be reduced: no seam, several stacks, inner blocks that are
    read, an attention method set already, or no grid of patches.
    """
    who, blocks = type(model).__name__, parts.blocks(model)
    if seamless := [block for block in blocks if not block.has_seam]:
        kind = type(seamless[0].module).__name__
        raise FormularyError(f"{owner} cannot act inside the {kind}s of this {who}: no seam is known")
    if len({block.stack for block in blocks}) > 1:
        raise FormularyError(f"{owner} needs a model with one stack of blocks; this {who} has several")
    stages = getattr(model, "stage_names", None)
    if stages and set(model.out_features) != {stages[-1]}:
        read = ", ".join(model.out_features)
        raise FormularyError(f"{owner} drops tokens that this {who} reads from inner blocks: {read}")
    if any(hasattr(part.module, ATTRIBUTE) for part in parts.mixers(model)):
        raise FormularyError(f"{owner} sets attention of its own; this {who} carries a method that did: apply one")
    for name, module in model.named_modules():
        if isinstance(getattr(module, "projection", None), nn.Conv2d) and hasattr(module, "num_patches"):
            if data is None or "pixel_values" not in data.items[0]:
                return name, module.num_patches
            height, width = grid(module.projection, data.items[0]["pixel_values"])
            return name, height * width
    raise FormularyError(f"{owner} needs a grid of patches; this {who} has no convolution that embeds patches")


def multiply_adds(model: nn.Module, counts: Sequence[tuple[int, int] | tuple[float, float]]) -> float:
    """The blocks' multiply-adds for `counts`, the image tokens that each block's attention and feed-forward see."""
    prefix = sum(value.shape[1] for name, value in model.named_parameters() if name.endswith(PREFIX_TOKENS))
    linears, width, total = parts.linears(model), model.config.hidden_size, 0.0
    mixers = {part.block.name: f"{part.name}." for part in parts.mixers(model)}
    for block, (attended, fed) in zip(parts.blocks(model), counts):
        of_block = [part for part in linears if part.name.startswith(f"{block.name}.")]
        mixing = sum(part.weights for part in of_block if part.name.startswith(mixers[block.name]))
        feeding = sum(part.weights for part in of_block) - mixing
        length = prefix + attended
        total += length * mixing + 2 * width * length**2 + (prefix + fed) * feeding
    return total


def framed_digits(
    n: int, generator: torch.Generator, split: str
) -> tuple[dict[str, Float[Tensor, "..."] | Int[Tensor, "n"]], Int[Tensor, "n"]]:
    """A batch of scikit-learn's digits, 20 x 20 pixels about the middle of a noisy 32 x 32 image, and its clutter: how
    many of the 28 patches of 4 x 4 pixels at the border hold a piece of another digit, 0 to 8."""
    from formulary import lab

    images, labels = (torch.from_numpy(part) for part in lab.digits(split))
    large = nn.functional.interpolate(images[:, None], size=(20, 20), mode="bilinear", align_corners=False)[:, 0]
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)
    chosen, corners, clutter = draw(len(large), n), 4 + draw(5, n, 2), draw(9, n)
    canvas = 0.15 * torch.randn(n, 32, 32, generator=generator)
    border = [(i, j) for i in range(8) for j in range(8) if i in (0, 7) or j in (0, 7)]
    for image, digit, (y, x), pieces in zip(canvas, large[chosen], corners.tolist(), clutter.tolist()):
        image[y : y + 20, x : x + 20] += digit
        for place in torch.randperm(len(border), generator=generator)[:pieces].tolist():
            (i, j), (down, across), other = border[place], (4 + draw(9, 2)).tolist(), int(draw(len(large), 1))
            image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4] += large[other, down : down + 4, across : across + 4]
    return {"pixel_values": (2 * canvas - 1)[:, None].repeat(1, 3, 1, 1), "labels": labels[chosen]}, clutter


def framed_vit() -> nn.Module:
    """A ViT classifier of `framed_digits`: 64 patches, 6 layers of width 64. The first call trains for two minutes."""
    from formulary import lab

    def build():
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(
            image_size=32, patch_size=4, hidden_size=64, num_hidden_layers=6, num_attention_heads=4,
            intermediate_size=128, num_labels=10, initializer_range=0.1, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ViTForImageClassification(config)
        batches = lambda step: framed_digits(64, torch.Generator().manual_seed(step), "train")[0]
        lab.train(model, batches, steps=700, lr=2e-3, weight_decay=0.05)
        return model

    return lab.cached("vit-framed-digits", build, key={"steps": 700, "digits": "20 px in 32, clutter 0 to 8"})
