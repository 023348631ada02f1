"""What masking a unit changes later on: relations between tokens in every later layer, and the logits.

Everything is computed on a float32 copy of the model, since one neuron's effect is lost in the rounding of bfloat16.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from formulary.contracts import parts
from formulary.papers.pruning._parts import Sublayer, runs

STACKED = 2048
"""Tokens per forward pass up to which several masked copies of the batch are stacked."""


def relations(states: Float[Tensor, "U N D"], rows: Int[Tensor, "K"]) -> Float[Tensor, "U K K"]:
    """G(F): the cosines between the chosen token rows, for each of U copies.

    >>> relations(torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]]), torch.tensor([0, 2])).tolist()
    [[[1.0, 1.0], [1.0, 1.0]]]
    """
    chosen = F.normalize(states[:, rows].float(), dim=-1)
    return chosen @ chosen.mT


def divergence(
    dense: Float[Tensor, "*#B N C"], masked: Float[Tensor, "*B N C"], temperature: float
) -> Float[Tensor, "*B"]:
    """T^2 KL(softmax(dense / T) || softmax(masked / T)) summed over rows; in float64, since a neuron changes little."""
    p, q = (torch.log_softmax(logits.double() / temperature, dim=-1) for logits in (dense, masked))
    return temperature**2 * (p.exp() * (p - q)).sum((-2, -1))


class _Replayed:
    """A block that notes its output, and gives a stored one instead of running when it has been given one."""

    def forward(self, hidden_states, *args, **kwargs):
        if self.stored is None:
            out = super().forward(hidden_states, *args, **kwargs)
            self.plain = isinstance(out, Tensor)
        else:
            out = self.stored.repeat(len(hidden_states) // len(self.stored), 1, 1)
        self.notes.append((self, out[0] if isinstance(out, tuple) else out))
        return out


class Trajectory:
    """The dense model's hidden states and logits on one batch, and how far a masked unit moves them.

    `rows` bounds the token rows whose relations are compared; padding is never among them. `batch` is without labels.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], *, rows: int, temperature: float, seed: int):
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
        self.size, self.temperature, self.rows, self.seed = len(next(iter(batch.values()))), temperature, rows, seed
        self.notes: list[tuple[nn.Module, Tensor]] = []
        self.blocks = {block.name: block.module for block in parts.blocks(self.model)}
        for block in self.blocks.values():
            block.stored, block.notes = None, self.notes
            block.__class__ = type("Replayed", (_Replayed, type(block)), {})
        with torch.no_grad():
            self.states, self.logits = self._forward(1)
        self.order = [block for block, _ in self.notes]
        self.relations = [relations(state[None], self._rows(state.shape[0])) for state in self.states]
        self.tokens, self.real = len(self.states[0]), self._real(len(self.states[0]))

    def _forward(self, copies: int) -> tuple[list[Tensor], Tensor | None]:
        """(each layer's states as (copies x tokens, width), logits as (copies x rows, classes) or None)."""
        self.notes.clear()
        batch = {key: value.repeat(copies, *[1] * (value.ndim - 1)) for key, value in self.batch.items()}
        logits = self.model(**batch).get("logits")
        states = [state.flatten(0, -2) for _, state in self.notes]
        return states, None if logits is None else logits.flatten(0, -2)

    def _real(self, count: int) -> Int[Tensor, "real"]:
        """Which of `count` rows are no padding: all of them where they are no tokens."""
        mask = self.batch.get("attention_mask")
        return torch.arange(count) if mask is None or mask.numel() != count else mask.flatten().nonzero()[:, 0].cpu()

    def _rows(self, count: int) -> Int[Tensor, "K"]:
        """Up to `rows` of `count` rows, drawn by the seed, the same each time; never padding."""
        real = self._real(count)
        chosen = torch.randperm(len(real), generator=torch.Generator().manual_seed(self.seed))[: self.rows]
        return real[chosen].to(self.states[0].device)

    def _later(self, block: nn.Module) -> range:
        """The layers after the first use of `block`, or the last one when there is none."""
        first = next(i for i, used in enumerate(self.order) if used is block)
        return range(min(first + 1, len(self.order) - 1), len(self.order))

    @torch.no_grad()
    def masked(
        self, sublayer: Sublayer, units: Sequence[int], *, own: bool = False
    ) -> tuple[Float[Tensor, "units"], Float[Tensor, "units"]]:
        """(manifold distortion, logit divergence) of masking each of `units`, one at a time; 0 without logits.

        `own` counts the unit's own layer too.
        """
        block = self.blocks[sublayer.block.name]
        later, distortion, change = self._later(block), [], []
        later = range(self.order.index(block), later.stop) if own else later
        with self._prefix(block):
            for chunk in torch.as_tensor(list(units)).split(max(1, STACKED // self.tokens)):
                keep = torch.ones(len(chunk), sublayer.out.in_features, device=self.states[0].device)
                for row, unit in zip(keep, chunk):
                    row[runs(unit[None], sublayer.span)] = 0
                with self._scaled(sublayer, keep):
                    states, logits = self._forward(len(chunk))
                found = torch.zeros(len(chunk), device=keep.device)
                for k in later:
                    moved = relations(states[k].unflatten(0, (len(chunk), -1)), self._rows(len(self.states[k])))
                    found += (moved - self.relations[k]).square().sum((1, 2))
                distortion.append(found)
                change.append(self._divergence(logits, len(chunk)).to(found))
        return torch.cat(distortion).cpu(), torch.cat(change).cpu()

    def _divergence(self, logits: Tensor | None, copies: int) -> Tensor:
        if logits is None:
            return torch.zeros(copies)
        rows = self._rows(len(self.logits))
        return divergence(self.logits[rows][None], logits.unflatten(0, (copies, -1))[:, rows], self.temperature)

    @contextmanager
    def _prefix(self, block: nn.Module) -> Iterator[None]:
        """While it lasts, blocks that run once and before `block` give what they gave, without running."""
        before = self.order[: self.order.index(block)]
        found = [(b, s) for b, s in zip(before, self.states) if b.plain and self.order.count(b) == 1]
        try:
            for other, state in found:
                other.stored = state.unflatten(0, (self.size, -1))
            yield
        finally:
            for other, _ in found:
                other.stored = None

    @contextmanager
    def _scaled(self, sublayer: Sublayer, factors: Float[Tensor, "U in"]) -> Iterator[None]:
        """While it lasts, what the sublayer's `out` reads is multiplied, each copy of the batch by its row."""

        def hook(module, args):
            x = args[0]
            scaled = x.unflatten(0, (len(factors), -1)) * factors.view(len(factors), *[1] * (x.ndim - 1), -1)
            return (scaled.flatten(0, 1), *args[1:])

        handle = self.model.get_submodule(sublayer.name).register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def estimated(self, sublayers: Sequence[Sublayer], scale: float, probes: int) -> list[Float[Tensor, "_"]]:
        """First-order estimates of distortion (own layer too) + `scale` times divergence, of every unit of these
        sublayers.

        With random signs v, E[(d/dm v . G)^2] = |dG/dm|^2: `probes` backward passes estimate all units at once, each
        with a relative error of sqrt(2 / probes). Likewise 2 KL ~ |S dz|^2, with S_c = sqrt(p_c) (z_c - p . z) over
        the classes.
        """
        generator = torch.Generator().manual_seed(self.seed)
        signs = lambda like: torch.randint(0, 2, like.shape, generator=generator).to(like) * 2 - 1
        device = self.states[0].device
        factors = [torch.ones(1, s.out.in_features, device=device, requires_grad=True) for s in sublayers]
        with torch.enable_grad():
            with ExitStack() as stack:
                for sublayer, factor in zip(sublayers, factors):
                    stack.enter_context(self._scaled(sublayer, factor))
                states, logits = self._forward(1)
            seen = [relations(state[None], self._rows(len(state))) for state in states]
            if logits is not None and scale:
                z = logits[self._rows(len(logits))]
                p = (z / self.temperature).softmax(-1).detach()
                seen.append((scale * p / 2).sqrt() * (z - (p * z).sum(-1, keepdim=True)))
            found = [torch.zeros(s.units) for s in sublayers]
            for _ in range(probes):
                along = sum((signs(part) * part).sum() for part in seen)
                for total, gradient, s in zip(found, torch.autograd.grad(along, factors, retain_graph=True), sublayers):
                    total += gradient[0].view(s.units, s.span).sum(1).square().cpu() / probes
        return found
