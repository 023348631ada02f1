"""SPT: fine-tuning with LoRA in which each query sees few keys and each token few blocks of the feed-forward.

    K(q) = the L keys k with most subspaces m in which codeword_m(q) = codeword_m(k)        product quantization
    attention(q) = softmax over K(q) of (q k' scale) times v                                L of n weights are kept
    FFN(x) = sum over the G' largest r_g(x) of 2 sigmoid(r_g(x)) W2_g act(W1_g x)           blocks g of neurons
    W = W_0 + B A, trained on  loss + balance G sum_g f_g p_g                               LoRA; load balancing

Source: arXiv:2312.10365, abstract; L = n/8, 4 blocks with 2 active, the gate 2 sigmoid(r) and rank 16 are the authors'
code's. There codebooks follow by gradient and the router starts at random; here codewords move towards the means of
what they stand for, and the router starts from a ridge regression on how much each block adds, since few steps follow.
Of keys with as many equal codewords the nearest come first; L is fixed when the method is applied, from the length of
the data, so that a query's keys never depend on what follows.

In: a causal model and text. Out: the same model, LoRA merged into its weights, with sparse attention and routed
feed-forwards as edits. Blocks that are not chosen are not computed. Attention saves memory in training (L weights a
query are stored, and their indices, not n), not time: choosing compares all codes. Feed-forwards of Llama's or GPT-2's
form are routed; experts and fc1/fc2 inside a block (OPT) stay dense, which the report says. The memory is compared with
attention that stores its weights, as the paper does; PyTorch's fused attention stores none.

Raises UsageError for bad parameters, FormularyError without data or when nothing is left to do.

>>> from formulary.lab import small
>>> model = small.tiny("llama")
>>> data = Data([{"input_ids": ids} for ids in small.inputs_for(model, batch=8)["input_ids"]])
>>> model, report = SPT(steps=2, share=0.25).apply(model, data)
>>> model.model.layers[0].mlp.router
Linear(in_features=32, out_features=4, bias=True)
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formulary.contracts import Data, Report, Transform, parts
from formulary.contracts.edits import Editor
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError

from ..matformer.method import loss_for
from .attention import PQAttention
from .feed_forward import LoRA, Routed, RoutedFeedForward, imbalance, layout, weight_of

__all__ = ["SPT", "PQAttention", "RoutedFeedForward"]

MOVE = 0.05
"""How far codewords move at a training step towards the means of what they stand for."""


class Tuning:
    """A recipe that trains LoRA factors and routers, with the routers' balance in the loss."""

    def __init__(self, loss, factors: Sequence[Tensor], routed: Sequence[nn.Module], balance: float, rate: float):
        self.task, self.factors, self.routed, self.balance, self.rate = loss, factors, routed, balance, rate

    def optimizer(self, _) -> torch.optim.Optimizer:
        routers = [parameter for module in self.routed for parameter in module.router.parameters()]
        return torch.optim.AdamW([*self.factors, *routers], lr=self.rate, weight_decay=0.0)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        for module in self.routed:
            module.watch = []
        value = self.task(model, batch)
        for module in self.routed:
            uneven = sum(imbalance(*seen) for seen in module.watch) / max(1, len(module.watch))
            value = value + self.balance * uneven / len(self.routed)
            module.watch = None
        return value


@contextmanager
def adapted(linears: Sequence[parts.Linear], inside: set[str], rank: int) -> Iterator[list[Tensor]]:
    """While it lasts, each linear has LoRA; what is yielded are the factors. Those `inside` a routed module are asked by it."""
    swapped, factors = [], []
    try:
        for part in linears:
            module = part.module
            down = torch.randn(rank, part.in_features, device=part.raw.device) / math.sqrt(part.in_features)
            up = torch.zeros(part.out_features, rank, device=part.raw.device)
            module.__dict__["_lora"] = down.requires_grad_(), up.requires_grad_()
            factors += [down, up]
            swapped.append((module, type(module)))
            if part.name not in inside:
                cls = type(module)
                module.__class__ = type(f"LoRA{cls.__name__}", (LoRA, cls), {"__module__": __name__})
        yield factors
    finally:
        for module, cls in swapped:
            module.__class__ = cls
            module.__dict__.pop("_lora", None)


@torch.no_grad()
def merge(linears: Sequence[parts.Linear]) -> None:
    """Add each linear's LoRA to its weight."""
    for part in linears:
        down, up = part.module.__dict__["_lora"]
        part.raw.copy_(part.stored(part.weight().float() + up @ down))


@dataclass(frozen=True, kw_only=True)
class SPT(Transform):
    """Sparse attention and routed feed-forwards, fine-tuned with LoRA; see the module.

    share: of the data's length, how many keys a query sees; 1 leaves attention dense. subspaces, codewords: of product
    quantization. blocks, active: of each feed-forward; as many active as there are leave it dense. rank: of LoRA on all
    linears of the blocks. steps, learning_rate: of AdamW. balance: the weight of the load-balancing loss. `targets` and
    `ignore` choose attentions and feed-forwards by module name; LoRA goes on every linear in either case.
    """

    share: float = 0.125
    subspaces: int = 8
    codewords: int = 16
    blocks: int = 4
    active: int = 2
    rank: int = 16
    steps: int = 20
    learning_rate: float = 1e-3
    balance: float = 0.01

    supports: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs_data: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    unit: ClassVar[str] = "part"
    shift_invariant: ClassVar[bool] = False  # codes are of queries and keys after rotary positions
    quick: ClassVar[dict[str, Any]] = {"steps": 2, "share": 0.5, "rank": 2}

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise UsageError(f"spt: share must be above 0 and at most 1, got {self.share}")
        check_range("spt", "subspaces", self.subspaces, 1, 255)
        check_range("spt", "codewords", self.codewords, 2, 255)
        check_range("spt", "blocks", self.blocks, 1, 1024)
        check_range("spt", "active", self.active, 1, self.blocks)
        check_range("spt", "rank", self.rank, 1, 4096)
        check_range("spt", "steps", self.steps, 1, 10_000_000)
        check_range("spt", "balance", self.balance, 0.0, 1e6)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"spt: learning_rate must be above 0, got {self.learning_rate}")
        if self.share == 1 and self.active == self.blocks:
            raise UsageError("spt: share=1 with all blocks active leaves the model dense: lower one of them")

    def run(self, model: nn.Module, data: Data, edit: Editor, report: Report) -> None:
        batch = {key: value.to(next(model.parameters()).device) for key, value in data.sample(0).items()}
        linears = [part for part in parts.linears(model) if not part.experts]
        edit.keep(*(part.module for part in linears))
        mixers, routed = self._choose(model, report)
        keep = max(1, round(self.share * batch["input_ids"].shape[1]))
        tokens = _inputs(model.eval(), batch, [parts.Linear(f"{p.name}.{n}", m, "linear") for p, n, m in routed])
        for part, name, _ in routed:
            module = edit.edit(part.name, RoutedFeedForward, blocks=self.blocks, active=self.active)
            module.calibrate(tokens[f"{part.name}.{name}"])
            note = f"{self.active} of {self.blocks} blocks a token"
            report.changed(part.name, parts.count_weights(module), note)
        attentions = []
        for part in mixers:
            head = _head_dim(part)
            arguments = {"keep": keep, "head_dim": head, "subspaces": self.subspaces, "codewords": self.codewords}
            edit.edit(part.name, PQAttention, **arguments)
            attentions.append(part.module.formulary_attention)
            report.changed(part.name, parts.count_weights(part.module), f"{keep} keys a query")
        if not report.changes:
            return
        with torch.no_grad(), _learning(attentions, 1.0):
            model(**batch)
        self._tune(model, data, linears, [model.get_submodule(part.name) for part, *_ in routed], attentions, report)
        self._tell(model, batch, linears, mixers, routed, keep, report)

    def _choose(self, model: nn.Module, report: Report) -> tuple[list[parts.Part], list[tuple]]:
        """(attentions to make sparse, feed-forwards to route with the name and module of their up projection)."""
        mixers = parts.mixers(model) if self.share < 1 else []
        found = parts.feed_forwards(model) if self.active < self.blocks else []
        every = [*mixers, *found]
        chosen = {every[i].name for i in parts.select([(p.name, p.module) for p in every], self.targets, self.ignore)}
        kept, routed = [], []
        for part in mixers:
            head = _head_dim(part)
            if part.name in chosen and head % self.subspaces:
                report.skipped(part.name, f"its heads of {head} channels do not divide into {self.subspaces} subspaces")
            elif part.name in chosen:
                kept.append(part)
        for part in found:
            names = layout(part.module)
            if part.name not in chosen:
                continue
            if names is None or isinstance(part.module, Routed):
                report.skipped(part.name, "its feed-forward is no pair or triple of linears in a module of a known form")
            elif weight_of(getattr(part.module, names[2])).shape[1] % self.blocks:
                report.skipped(part.name, f"its neurons do not divide into {self.blocks} blocks")
            else:
                routed.append((part, names[1], getattr(part.module, names[1])))
        if self.active < self.blocks and not found:
            report.note("no feed-forward is a module of its own, so all stay dense")
        return kept, routed

    def _tune(self, model, data: Data, linears, routed: list[nn.Module], attentions, report: Report) -> None:
        from formulary.lab import train

        loss, _ = loss_for(model, data)
        model.requires_grad_(False)
        for module in routed:
            module.router.requires_grad_(True)
        inside = {part.name for part in linears if any(part.module in module.children() for module in routed)}
        with adapted(linears, inside, self.rank) as factors, _learning(attentions, MOVE):
            if not routed:
                model.get_input_embeddings().requires_grad_(True)
            recipe = Tuning(loss, factors, routed, self.balance, self.learning_rate)
            log = train(model, data, steps=self.steps, lr=self.learning_rate, recipe=recipe, seed=data.seed)
            merge(linears)
        model.zero_grad(set_to_none=True)
        words = f"LoRA of rank {self.rank} on {len(linears)} linears, trained for {self.steps} steps and merged"
        report.note(f"{words}: loss {log.losses[0]:.3g} to {log.final:.3g}")

    def _tell(self, model, batch, linears, mixers, routed, keep: int, report: Report) -> None:
        length, heads = batch["input_ids"].shape[1], sum(part.heads for part in mixers)
        if mixers:
            report.figures["stored attention, bytes a sequence: dense, sparse"] = [
                4 * heads * length * length, 6 * heads * length * keep,
            ]  # fmt: skip
            longest = f"{keep} keys a query, {self.share:g} of the data's {length} tokens, whatever the length later"
            report.note(longest)
        if routed:
            neurons = sum(parts.count_weights(part.module) for part, *_ in routed)
            report.figures["feed-forward products a token: dense, routed"] = [neurons, neurons * self.active // self.blocks]


@contextmanager
def _learning(attentions: Sequence[PQAttention], rate: float) -> Iterator[None]:
    """While it lasts, forward passes learn codebooks at `rate`."""
    try:
        for attention in attentions:
            attention.learn = rate
        yield
    finally:
        for attention in attentions:
            attention.__dict__.pop("learn", None)


def _head_dim(part: parts.Part) -> int:
    return getattr(part.module, "head_dim", None) or part.width // part.heads


def _inputs(model: nn.Module, batch: dict[str, Tensor], linears: list[parts.Linear]) -> dict[str, Tensor]:
    """The real tokens of a batch that flow into each linear."""
    seen: dict[str, Tensor] = {}
    with parts.observe(linears, lambda part, inputs, _: seen.update({part.name: inputs})) as run:
        run(model, batch)
    return seen
