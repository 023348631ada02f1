"""VQ4DiT stores each linear as a codebook and indices, and calibrates codewords and indices together, without data.

A weight (out, in) is cut into sub-vectors w of `dim` numbers. k-means gives a codebook C (k, dim), so that indices take
log2(k) / dim bits a weight. Every sub-vector keeps its n nearest codewords A as candidates, with ratios R = softmax(z):

    w^ = sum_m R_m C[A_m]
    L = sum over blocks of ||block^(x) - block(x)||^2 / ||block(x)||^2 + lambda_r mean(1 - |2R - 1|)

Adam lowers L over C and z; a sub-vector whose largest ratio passes `freeze` takes that candidate for good, and at the
end all do. Nothing else is trained.

Source: arXiv:2408.17131, section 3. Inputs need no data set: without `data`, Gaussian images or random tokens; for a
diffusion model give the states of its own sampler, started from noise. There both networks walk their own trajectories;
here both see the inputs given, while each block of the quantized one reads the quantized blocks before it. Not stated
there, and ours: z starts at minus the squared distances over their mean to the nearest codeword; block errors are
relative, and learning rates are relative to the codebook's size, so that one setting fits all models; Adam decays by a
cosine; a layer with fewer than 4 sub-vectors a codeword is left alone.
"""

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import Data, Replacement, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

from .._parts import pack, unpack
from .._training import block_errors
from .clustering import k_means, nearest


class VQLinear(Replacement):
    """A linear map whose weight is `codebook[codes]`: (..., in_features) to (..., out_features).

    codes: packed indices of log2(codewords) bits. While `soft` is set, the weight is the mix of candidates that is
    being trained.

    >>> layer = VQLinear(16, 4, codewords=4, dim=2)
    >>> layer.codes.shape, layer.weight.shape
    (torch.Size([4, 2]), torch.Size([4, 16]))
    """

    slow_because = "codewords are looked up and joined to a dense weight before each product"

    def __init__(self, in_features: int, out_features: int, codewords: int, dim: int, bias: bool = False):
        super().__init__()
        _check_sizes(codewords, dim)
        if min(in_features, out_features) < 1 or in_features % dim:
            raise UsageError(f"vq4dit: {in_features} inputs cannot be cut into sub-vectors of {dim}")
        self.in_features, self.out_features, self.codewords, self.dim = in_features, out_features, codewords, dim
        columns = -(-in_features // dim // 8) * 8
        self.register_buffer("codes", torch.zeros(out_features, columns * self.bits // 8, dtype=torch.uint8))
        self.codebook = nn.Parameter(torch.zeros(codewords, dim))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.soft: Soft | None = None

    @property
    def bits(self) -> int:
        """Of an index."""
        return self.codewords.bit_length() - 1

    def store(self, codebook: Float[Tensor, "k dim"], codes: Int[Tensor, "subvectors"]) -> None:
        """Take over codewords, and one index for each sub-vector, row by row."""
        self.codebook.data.copy_(codebook)
        rows = codes.view(self.out_features, -1).to(torch.uint8)
        self.codes.copy_(pack(F.pad(rows, (0, -rows.shape[1] % 8)), self.bits))

    @property
    def weight(self) -> Float[Tensor, "out in"]:
        """The dense weight."""
        if self.soft is not None:
            return self.soft.weight().view(self.out_features, -1)
        codes = unpack(self.codes, self.bits)[:, : self.in_features // self.dim]
        return F.embedding(codes.int(), self.codebook).flatten(1)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, codewords={self.codewords}, dim={self.dim}"


class Soft:
    """What is trained of a layer: codebook (k, dim) and logits (subvectors, n), float32, over fixed candidates."""

    def __init__(self, subvectors: Float[Tensor, "subvectors dim"], codebook: Float[Tensor, "k dim"], n: int):
        distance, self.candidates = nearest(subvectors, codebook, n)
        self.codebook = codebook.clone().requires_grad_()
        self.logits = (-distance / distance[:, :1].mean().clamp(min=1e-12)).requires_grad_()
        self.frozen = torch.zeros(len(subvectors), dtype=torch.bool, device=subvectors.device)

    def ratios(self) -> Float[Tensor, "subvectors n"]:
        """R, one-hot where frozen."""
        ratios = self.logits.softmax(-1)
        hard = F.one_hot(self.logits.argmax(-1), self.logits.shape[1]).to(ratios.dtype)
        return torch.where(self.frozen[:, None], hard, ratios)

    def weight(self) -> Float[Tensor, "subvectors dim"]:
        """The sub-vectors that the ratios mix."""
        return (self.ratios()[..., None] * self.codebook[self.candidates]).sum(1)

    def undecided(self) -> Float[Tensor, ""]:
        """mean(1 - |2R - 1|): 0 when every ratio is 0 or 1."""
        return (1 - (2 * self.ratios() - 1).abs()).mean()

    @torch.no_grad()
    def freeze(self, threshold: float) -> None:
        """Take the largest candidate for good where its ratio passes `threshold`."""
        self.frozen |= self.logits.softmax(-1).amax(-1) > threshold

    def codes(self) -> Int[Tensor, "subvectors"]:
        """The index of the largest candidate of each sub-vector."""
        return self.candidates.gather(1, self.logits.argmax(-1, keepdim=True))[:, 0]


@dataclass(frozen=True, kw_only=True)
class VQ4DiT(Transform):
    """Linears inside the blocks as codebooks of `codewords` sub-vectors of `dim` numbers, and indices.

    codewords: a power of 2, 4 to 256; 256 and 4 give the paper's 2 bits, 64 and 2 its 3 bits. candidates: n; 1 leaves
    the assignments of k-means and trains codebooks alone. steps: of Adam; 0 is k-means alone. lr: of codewords,
    relative to their root mean square. ratio_lr: of z. ratio_weight: lambda_r. freeze: the ratio from which a candidate
    is final. samples: random inputs that are drawn when there is no data.

    Raises UsageError for a parameter out of range and FormularyError when the loss is not finite.

    >>> from formulary.lab import tiny
    >>> model, report = VQ4DiT(codewords=16, dim=2, steps=3).apply(tiny("vit"))
    >>> report.headline
    'vq4dit on 12 linear layers, 81 % of the weights; calibrated on 16 random inputs, without data'
    >>> round(report.figures["bits per weight, codebooks counted"], 2)
    2.75
    """

    codewords: int = 256
    dim: int = 4
    candidates: int = 2
    steps: int = 200
    lr: float = 0.03
    ratio_lr: float = 0.2
    ratio_weight: float = 0.1
    freeze: float = 0.99
    samples: int = 16

    quick: ClassVar[dict[str, Any]] = {"codewords": 16, "dim": 2, "steps": 3}

    def __post_init__(self):
        super().__post_init__()
        _check_sizes(self.codewords, self.dim)
        check_range("vq4dit", "candidates", self.candidates, 1, min(16, self.codewords))
        check_range("vq4dit", "steps", self.steps, 0, 10_000_000)
        check_range("vq4dit", "lr", self.lr, 1e-9, 10.0)
        check_range("vq4dit", "ratio_lr", self.ratio_lr, 1e-9, 10.0)
        check_range("vq4dit", "ratio_weight", self.ratio_weight, 0.0, 1e6)
        check_range("vq4dit", "freeze", self.freeze, 0.5, 1.0)
        check_range("vq4dit", "samples", self.samples, 1, 100_000)

    @property
    def trains(self) -> bool:
        """Whether codebooks and assignments are trained after k-means."""
        return self.steps > 0

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> None:
        teacher = copy.deepcopy(model).eval() if self.steps else None
        layers: list[VQLinear] = []
        for part in parts.linears(model, self.targets, self.ignore):
            if part.experts:
                report.skipped(part.name, "expert tensors stay dense", part.weights)
            elif part.in_features % self.dim:
                report.skipped(part.name, f"its inputs do not divide into sub-vectors of {self.dim}", part.weights)
            elif part.weights < 4 * self.codewords * self.dim:
                report.skipped(part.name, f"too small for a codebook of {self.codewords}", part.weights)
            else:
                layers.append(self._replace(part, edit, report))
        if not layers:
            return
        if self.steps:
            if data is None:
                data = random_inputs(model, self.samples)
                report.note(f"calibrated on {len(data)} random inputs, without data")
            self._calibrate(model, teacher, layers, data, report)
        bits = sum(layer.codes.numel() * 8 + layer.codebook.numel() * 32 for layer in layers)
        report.figures["bits per weight, codebooks counted"] = bits / sum(change.weights for change in report.changes)

    def _replace(self, part: parts.Linear, edit: Editor, report: Report) -> VQLinear:
        """k-means of one weight."""
        subvectors = part.weight().float().reshape(-1, self.dim)
        codebook, codes = k_means(subvectors, self.codewords)
        error = (codebook[codes] - subvectors).square().sum() / subvectors.square().sum().clamp(min=1e-30)
        row = {"layer": part.name, "relative squared error of k-means": float(error)}
        report.tables.setdefault("weights", []).append(row)
        sizes = {"in_features": part.in_features, "out_features": part.out_features, "bias": part.bias is not None}
        new = edit.edit(part.name, VQLinear, **sizes, codewords=self.codewords, dim=self.dim)
        new.store(codebook, codes)
        if part.bias is not None:
            new.bias = part.bias
        if self.steps:
            new.soft = Soft(subvectors, codebook, self.candidates)
        report.changed(part.name, part.weights, f"{new.bits / self.dim:g} bits")
        return new

    def _calibrate(self, model, teacher, layers: list[VQLinear], data: Data, report: Report) -> None:
        """Train codebooks and ratios, then keep each sub-vector's largest candidate."""
        model.eval().requires_grad_(False)
        size = lambda codebook: float(codebook.detach().square().mean().sqrt()) or 1.0
        books = [layer.soft.codebook for layer in layers]
        groups = [{"params": [book], "lr": self.lr * size(book)} for book in books]
        groups.append({"params": [layer.soft.logits for layer in layers], "lr": self.ratio_lr})
        adam = torch.optim.Adam(groups)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.steps)
        device, losses = next(model.parameters()).device, []
        for step in range(self.steps):
            batch = {key: value.to(device) for key, value in data.sample(step).items()}
            with torch.enable_grad():
                error = block_error(model, teacher, batch)
                loss = error + self.ratio_weight * torch.stack([layer.soft.undecided() for layer in layers]).mean()
                if not torch.isfinite(loss):
                    raise FormularyError(f"vq4dit: the loss is {float(loss.detach())} at step {step + 1}: lower lr")
                adam.zero_grad()
                loss.backward()
            adam.step()
            schedule.step()
            losses.append(float(error.detach()))
            for layer in layers:
                layer.soft.freeze(self.freeze)
        undecided = torch.cat([~layer.soft.frozen for layer in layers]).float().mean()
        moved = torch.cat([layer.soft.codes() != layer.soft.candidates[:, 0] for layer in layers]).float().mean()
        for layer in layers:
            soft, layer.soft = layer.soft, None
            layer.store(soft.codebook.detach(), soft.codes())
        tail = losses[-max(1, len(losses) // 10) :]
        report.figures["block error, first step and last tenth"] = [losses[0], sum(tail) / len(tail)]
        report.figures["sub-vectors moved to another codeword"] = float(moved)
        report.figures["sub-vectors decided only at the end"] = float(undecided) if self.candidates > 1 else 0.0


def _check_sizes(codewords: int, dim: int) -> None:
    if codewords not in (4, 8, 16, 32, 64, 128, 256):
        raise UsageError(f"vq4dit: codewords must be a power of 2 from 4 to 256, got {codewords}")
    check_range("vq4dit", "dim", dim, 1, 64)


# ---------------------------------------------------------------- calibration


def block_error(model: nn.Module, teacher: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """Sum over blocks of the squared error of the block's output relative to the teacher's, padding left out."""
    return torch.stack(block_errors(model, teacher, batch)[0]).sum()


def random_inputs(model: nn.Module, count: int, length: int = 64) -> Data:
    """`count` Gaussian images of the configured size, or sequences of random tokens; the caller seeds torch."""
    config, dtype = model.config, next(model.parameters()).dtype
    if parts.kind(model) == "vision":
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        items = [{"pixel_values": torch.randn(config.num_channels, side, side).to(dtype)} for _ in range(count)]
        return Data(items, name="random images")
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    ids = torch.randint(config.vocab_size, (count, 2, length))
    items = [{"input_ids": row[0]} for row in ids]
    if config.is_encoder_decoder:
        items = [{**item, "decoder_input_ids": row[1]} for item, row in zip(items, ids)]
    return Data(items, name="random tokens")
