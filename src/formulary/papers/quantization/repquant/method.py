"""RepQuant calibrates activations with one scale per channel and a logarithmic softmax grid, then rewrites the model so
that one scale per layer gives the same integers.

Norm outputs x (tokens, d), calibrated with s_c, z_c per channel c; s~ = mean(s_c), z~ = round(mean(z_c)):

    r_c = s_c / s~,  b_c = s~ (z~ - z_c)
    gamma <- gamma / r,  beta <- beta / r - b,  W <- W diag(r),  bias <- bias + W b
    =>  round(x'_c / s~) + z~ = round(x_c / s_c) + z_c,  and W' x' + bias' = W x + bias, exactly

    dual clipping: the range of channel c is [sigmoid(g_c) min x_c, sigmoid(h_c) max x_c], g and h learned on
                   ||(x - Q(x)) W^T||^2
    softmax:       A^ = s 2^(-q/2),  q = round(-2 log2(A / s)), and 0 from q = 2^bits on
    weights:       min ||X W^T - Q(X) V^T||^2 over V on the grid, one scale per output

Source: arXiv:2402.05628 (sections on LayerNorm and softmax activations, dual clipping, weight reconstruction), which
extends arXiv:2212.08254. The released code of the latter does not round z~, without which the integers differ. Where
we could not verify the paper: weights are reconstructed by ridge regression toward W and then column by column as in
GPTQ; s of the softmax minimizes the squared error of the calibration's attention weights.

A norm whose output goes elsewhere too (post-norm blocks, routers) cannot be rewritten; its linears get one range for
the layer, as do all other inputs, with both ends shrunk to the least squared error. A norm without a bias (RMSNorm) has
a symmetric grid and no shift. Rounding is emulated in floating point; integers are stored for the weights alone. The
softmax's grid has steps of a factor of sqrt(2) at any number of bits: from 6 bits on, a uniform one is finer.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from formulary.contracts import Attention, Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.parts import Block, Linear
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError

from .._blockwise import Blockwise
from .._parts import MIN_FEATURES, Grid, PackedLinear, on_grid, round_to_nearest
from ..gptq.method import compensated
from .calibration import Observed, clipped_channels, layer_range, reconstructed, softmax_scale
from .norms import norms_before_linears


class QuantizedLinear(PackedLinear):
    """A linear map with packed weights whose input is rounded to one grid for the layer, fixed in calibration.

    >>> layer = QuantizedLinear(16, 4, bits=4, activation_bits=4)
    >>> layer.store(round_to_nearest(torch.eye(4, 16), layer.grid))
    >>> layer(torch.full((1, 16), 2.4)).tolist()
    [[2.0, 2.0, 2.0, 2.0]]
    """

    slow_because = "packed weights are dequantized and activations rounded in floating point before each product"

    def __init__(self, in_features: int, out_features: int, bits: int, activation_bits: int, bias: bool = False):
        check_range("repquant", "activation_bits", activation_bits, 2, 8)
        super().__init__(in_features, out_features, bits, bias=bias)
        self.activation_bits = activation_bits
        self.register_buffer("input_scale", torch.ones(()))
        self.register_buffer("input_zero", torch.zeros(()))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return super().forward(on_grid(x, self.input_scale, self.input_zero, self.activation_bits))


def log_sqrt2(attention: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Attention weights on the grid scale * 2^(-q/2), q = 0 ... 2^bits - 1, and 0.

    >>> log_sqrt2(torch.tensor([1.0, 0.72, 0.5, 0.3, 0.01, 0.0]), torch.tensor(1.0), 3)
    tensor([1.0000, 0.7071, 0.5000, 0.3536, 0.0000, 0.0000])
    """
    level = (-2 * (attention / scale).log2()).round().clamp(min=0)
    return torch.where(level < 2**bits, scale * torch.exp2(-level / 2), 0.0)


class QuantizedAttention(Attention):
    """Attention whose query, key, value and weights are rounded to fixed grids: uniform, for the weights logarithmic if
    `log_softmax`. It computes in float32; while `observed` is set it computes exactly and gathers statistics.
    """

    equals_sdpa = False

    def __init__(self, activation_bits: int = 4, log_softmax: bool = True):
        super().__init__()
        check_range("repquant", "activation_bits", activation_bits, 2, 8)
        self.activation_bits, self.log_softmax = activation_bits, log_softmax
        self.register_buffer("scale", torch.ones(3))
        self.register_buffer("zero", torch.zeros(3))
        self.register_buffer("softmax_scale", torch.ones(()))
        self.observed: Observed | None = None

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S V"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L V"]:
        """Attention output; queries that may see no key get zeros."""
        given = (query, key, value)
        if self.observed is None:
            given = [on_grid(x, s, z, self.activation_bits) for x, s, z in zip(given, self.scale, self.zero)]
        q, k, v = (x.float() for x in given)
        scores = q @ k.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
        if bias is not None:
            scores = scores + bias
        if causal:
            seen = torch.ones(1, 1, *scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            mask = seen if mask is None else mask & seen
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        if self.observed is not None:
            self.observed.add(query, key, value, weights, mask, bias)
        else:
            weights = self.rounded(weights, self.softmax_scale.float())
        return (weights @ v).to(query.dtype)

    def rounded(self, weights: Tensor, scale: Tensor) -> Tensor:
        """Attention weights on this module's grid, for largest level `scale`."""
        if self.log_softmax:
            return log_sqrt2(weights, scale, self.activation_bits)
        return on_grid(weights, scale / (2**self.activation_bits - 1), torch.zeros_like(scale), self.activation_bits)

    @torch.no_grad()
    def settle(self) -> None:
        """Fix the grids by what was observed, and round from now on."""
        observed, self.observed = self.observed, None
        for place, sample in enumerate(observed.values):
            scale, zero = layer_range(torch.cat(sample), self.activation_bits, self.scale.dtype)
            self.scale[place], self.zero[place] = scale, zero
        self.softmax_scale.copy_(softmax_scale(observed.weights, self.rounded, self.softmax_scale.dtype))


@dataclass(frozen=True, kw_only=True)
class RepQuant(Transform):
    """Weights of linears inside the blocks at `bits` bits, their inputs and attention's at `activation_bits`.

    reparameterize: calibrate norm outputs by channel and rewrite; otherwise one range for the layer. log_softmax: the
    logarithmic grid for attention weights; otherwise a uniform one. clip_steps: steps of Adam that learn the dual
    clipping, 0 for min and max. reconstruct: fit the weights to the rounded inputs; otherwise round to nearest.
    tokens: rows kept of each linear's calibration inputs. damp: of the reconstruction, relative to the mean square.

    `apply(model, data)` needs unlabeled calibration data; the paper takes 32 images for classification. Expert tensors
    and cross-attention's products stay in floating point, and the report says so. Raises UsageError for a parameter out
    of range, and FormularyError when calibration meets NaN.

    >>> from formulary.lab import inputs_for, tiny
    >>> model = tiny("vit")
    >>> data = Data([{"pixel_values": image} for image in inputs_for(model, batch=4)["pixel_values"]])
    >>> model, report = RepQuant(clip_steps=5).apply(model, data)
    >>> report.headline
    'repquant on 12 linear layers, 81 % of the weights; 4 norms rewritten for one scale per layer'
    """

    bits: int = 4
    activation_bits: int = 4
    reparameterize: bool = True
    log_softmax: bool = True
    clip_steps: int = 50
    reconstruct: bool = True
    tokens: int = 4096
    damp: float = 0.01

    needs_data: ClassVar[bool] = True
    shift_invariant: ClassVar[bool] = False
    quick: ClassVar[dict[str, Any]] = {"clip_steps": 3, "tokens": 256}

    def __post_init__(self):
        super().__post_init__()
        check_range("repquant", "bits", self.bits, 2, 8)
        check_range("repquant", "activation_bits", self.activation_bits, 2, 8)
        check_range("repquant", "clip_steps", self.clip_steps, 0, 100_000)
        check_range("repquant", "tokens", self.tokens, 1, 10_000_000)
        check_range("repquant", "damp", self.damp, 1e-6, 1.0)

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        chosen: dict[str, Linear] = {}
        for part in parts.linears(model, self.targets, self.ignore):
            if part.experts:
                report.skipped(part.name, "expert tensors stay in floating point", part.weights)
            elif part.in_features < MIN_FEATURES:
                report.skipped(part.name, f"fewer than {MIN_FEATURES} inputs", part.weights)
            else:
                chosen[part.name] = part
        walk = Blockwise(model, data)
        groups: dict[str, list[str]] = {}
        if self.reparameterize:
            found = norms_before_linears(model, next(data.take([0]).batches()))
            groups = {norm: readers for norm, readers in found.items() if chosen.keys() >= set(readers)}
        rewritten = 0
        for block in walk.blocks:
            inside = [part for name, part in chosen.items() if name.startswith(f"{block.name}.")]
            if inside:
                inputs = self._observe(walk, block, inside, edit, report)
                rewritten += self._quantize(model, inside, groups, inputs, edit, report)
                walk.advance(block)
        for name in set(chosen) - {change.name for change in report.changes} - {skip.name for skip in report.skips}:
            report.skipped(name, "it lies outside the blocks", chosen[name].weights)
        if self.reparameterize:
            plural = "norm" if rewritten == 1 else "norms"
            report.note(f"{rewritten} {plural} rewritten for one scale per layer")
            if not rewritten:
                report.note("no norm's output goes to linears alone")

    def _observe(self, walk: Blockwise, block: Block, inside: list[Linear], edit, report) -> dict[str, Tensor]:
        """A sample of each linear's inputs, (tokens, in) in float32; the block's attention has its grids afterwards."""
        attentions = []
        for mixer in parts.mixers(walk.model):
            if mixer.block.name == block.name and any(part.name.startswith(f"{mixer.name}.") for part in inside):
                given = {"activation_bits": self.activation_bits, "log_softmax": self.log_softmax}
                try:
                    edit.edit(mixer.name, QuantizedAttention, **given)
                except FormularyError as error:
                    report.note(f"products of attention stay in floating point: {error}")
                    continue
                attentions.append(mixer.module.formulary_attention)
        share = -(-self.tokens // -(-len(walk.data) // walk.data.batch_size))
        samples: dict[str, list[Tensor]] = {}

        def see(part, x, expert):
            kept = x if len(x) <= share else x[torch.randperm(len(x))[:share]]
            samples.setdefault(part.name, []).append(kept.float())

        for attention in attentions:
            attention.observed = Observed()
        walk.observe(block, inside, see)
        for attention in attentions:
            attention.settle()
        return {name: torch.cat(sample) for name, sample in samples.items()}

    def _quantize(self, model, inside: list[Linear], groups, inputs: dict[str, Tensor], edit, report: Report) -> int:
        """Rewrite the norms of one block and replace its linears; returns how many norms were rewritten."""
        by_name, done = {part.name: part for part in inside}, 0
        for name, x in inputs.items():
            if not torch.isfinite(x).all():
                raise FormularyError(f"the inputs of {name} overflow or are NaN: try another dtype or data")
        for norm, readers in groups.items():
            if readers[0] in by_name and readers[0] in inputs:
                self._rewrite(model.get_submodule(norm), [by_name.pop(name) for name in readers], inputs, edit, report)
                done += 1
        for name, part in by_name.items():
            if name not in inputs:
                report.skipped(name, "reached by no calibration token", part.weights)
                continue
            scale, zero = layer_range(inputs[name], self.activation_bits, part.raw.dtype)
            bias = None if part.bias is None else part.bias.detach()
            self._replace(part, part.weight().float(), bias, inputs[name], scale, zero, edit, report)
        return done

    def _rewrite(self, norm: nn.Module, readers: list[Linear], inputs: dict[str, Tensor], edit, report: Report) -> None:
        """Fold the channels' scales and zero points into the norm and the linears that read it."""
        x, weights = inputs[readers[0].name], [part.weight().float() for part in readers]
        beta = getattr(norm, "bias", None)
        scales, zeros = clipped_channels(x, torch.cat(weights), self.activation_bits, self.clip_steps, beta is None)
        scale = scales.mean().to(norm.weight.dtype).float()
        zero = zeros.mean().round()
        ratio, shift = scales / scale, scale * (zero - zeros)
        edit.set(norm.weight, norm.weight / ratio)
        if beta is not None:
            edit.set(beta, beta / ratio - shift)
        for part, weight in zip(readers, weights):
            new, bias = weight * ratio, None if part.bias is None else part.bias.detach()
            if bool(shift.any()):
                bias = (0 if bias is None else bias) + new @ shift
            self._replace(part, new, bias, inputs[part.name] / ratio - shift, scale, zero, edit, report)

    def _replace(self, part: Linear, weight: Tensor, bias, x: Tensor, scale, zero, edit, report: Report) -> None:
        """Put a `QuantizedLinear` in the place of `part`, with the weight (out, in) fitted to the rounded inputs."""
        grid, dtype = Grid(self.bits), part.raw.dtype
        rounded_x = on_grid(x, scale, zero, self.activation_bits)
        wanted = x @ weight.mT
        made = nearest = round_to_nearest(weight, grid, dtype)
        if self.reconstruct and bool(rounded_x.any()):
            gram = rounded_x.mT @ rounded_x
            fitted = reconstructed(weight, wanted, rounded_x, gram, self.damp)
            made, damp = compensated(fitted, gram, grid, dtype=dtype, damp=self.damp)
            if damp > self.damp:
                report.note(f"the Gram matrix of {part.name} needed damping of {damp:g} instead of {self.damp:g}")
        energy = float(wanted.square().sum()) + 1e-30
        row: dict[str, Any] = {"layer": part.name, "bits": f"W{self.bits}A{self.activation_bits}"}
        for label, one in (("as stored", made), ("round to nearest", nearest)):
            row[label] = float((wanted - rounded_x @ one.dense(grid).mT).square().sum()) / energy
        report.tables.setdefault("relative squared output error", []).append(row)
        sizes = {"in_features": part.in_features, "out_features": part.out_features, "bias": bias is not None}
        new = edit.edit(part.name, QuantizedLinear, **sizes, bits=self.bits, activation_bits=self.activation_bits)
        new.store(made)
        new.input_scale.copy_(scale)
        new.input_zero.copy_(zero)
        if bias is not None:
            new.bias.data.copy_(bias)
        report.changed(part.name, part.weights, f"W{self.bits}A{self.activation_bits}")
