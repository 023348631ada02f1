"""Retrieval heads: the attention heads that copy a planted needle out of a long context, found by watching the model copy it.

While the model answers greedily, a head copies a token when the position it attends to most lies in the needle and holds the very
token that is emitted. Its score on one prompt is the share of the needle that it copied,

    score(h) = |needle positions copied by h| / |needle|,

averaged over lengths, depths and needles, of the prompts that the model answered (ROUGE-1 recall above a half). Heads of score 0.1
or more are retrieval heads. Masking them should destroy retrieval, and masking as many others should not.

Source: arXiv:2404.15574, section 2 and eq. 1; masking as in section 4. The released code counts a needle token again each time it is copied;
here, as in the paper, once. Decoding watches one token at a time with attention weights exposed ("eager"); the prompt itself is
read with the model's own attention. Needles are made of drawn words, so that nobody can have learnt them. Unlike the paper's prompt,
ours begins the answer ("Answer: The wooden box of Mira holds"): a small model asked the question alone often says nothing.

Without a tokenizer the needle is drawn tokens, its first third the cue that is said again at the end of the prompt.

>>> from formulary import lab
>>> from formulary.contracts import Data
>>> data = Data([{"input_ids": torch.arange(3, 90)}])
>>> report = RetrievalHeads(lengths=(30,), depths=(0.5,), needles=2, recall=0.0).run(lab.tiny("llama"), data)
>>> len(report.tables["prompts"])
2
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from formulary.contracts import parts
from formulary.contracts.data import Data
from formulary.contracts.probe import Probe
from formulary.contracts.report import Report
from formulary.contracts.transform import check_range
from formulary.errors import FormularyError, UsageError
from formulary.papers.interpretability.retrieval_head.prompts import answer_ends, beginning, plant, recall_of, say, sentence_end

OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense", "wo", "o")


@dataclass(frozen=True)
class Needle:
    """One prompt: its token ids, and the span [start, end) of them that the model is to say again."""

    ids: Int[Tensor, "L"]
    start: int
    end: int
    length: int
    depth: float

    @property
    def answer(self) -> list[int]:
        """The tokens of the span."""
        return self.ids[self.start : self.end].tolist()


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(Probe):
    """Scores every head by how much of a planted needle it copies; see the module.

    lengths: tokens of haystack. depths: where the needle is put, 0 (first) to 1 (last). needles: how many, each planted at every length
    and depth. max_new_tokens: the longest answer. recall: a prompt counts if more than this share of the needle's words is in the
    answer. threshold: the score that makes a retrieval head. masked: if above 0, the prompts answered are asked again with so many
    of the best heads masked, and `draws` times with as many random others.

    Tables: `heads` (layer, head, module, score; best first), `prompts` (length, depth, recall, answer), `masking`.
    Raises UsageError for parameters out of range, FormularyError when no length fits the model or the data.
    """

    lengths: tuple[int, ...] = (256, 512)
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    needles: int = 2
    max_new_tokens: int = 24
    recall: float = 0.5
    threshold: float = 0.1
    masked: int = 0
    draws: int = 3

    supports: ClassVar[frozenset[str]] = frozenset({"decoder"})
    needs_data: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("lengths", "depths"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, (list, tuple)) else (value,))
            if not getattr(self, name):
                raise UsageError(f"retrieval-head: {name} is empty; give at least one")
        for length in self.lengths:
            check_range("retrieval-head", "lengths", length, 8, 1 << 20)
        for depth in self.depths:
            check_range("retrieval-head", "depths", depth, 0, 1)
        check_range("retrieval-head", "needles", self.needles, 1, 1000)
        check_range("retrieval-head", "max_new_tokens", self.max_new_tokens, 1, 4096)
        check_range("retrieval-head", "recall", self.recall, 0, 1)
        check_range("retrieval-head", "threshold", self.threshold, 0, 1)
        check_range("retrieval-head", "masked", self.masked, 0, 1 << 16)
        check_range("retrieval-head", "draws", self.draws, 1, 1000)

    def look(self, model: nn.Module, data: Data, report: Report) -> None:
        """Fill the report."""
        prompts = self.prompts(model, data, report)
        rows, scores = [], []
        for prompt in prompts:
            emitted, score = retrieval_scores(model, prompt, self.max_new_tokens, answer_ends(data.processor))
            recall = recall_of(prompt.answer, emitted, data.processor)
            rows.append({"length": prompt.length, "depth": prompt.depth, "recall": recall, "answer": say(emitted, data.processor)})
            scores.append(score)
        report.tables["prompts"] = rows
        answered = [i for i, row in enumerate(rows) if row["recall"] > self.recall]
        report.note(f"answered {len(answered)} of {len(rows)} prompts")
        if not answered:
            report.note("no head can be scored: the model retrieved no needle")
            return
        mean = torch.stack([scores[i] for i in answered]).mean(0)
        ranking = self._tabulate(model, mean, report)
        if self.masked:
            self._mask(model, data, [prompts[i] for i in answered], ranking, report)

    def _tabulate(self, model: nn.Module, score: Float[Tensor, "layers heads"], report: Report) -> list[tuple[int, int]]:
        names = [part.name for part in parts.mixers(model)]
        ranking = [divmod(i, score.shape[1]) for i in score.flatten().argsort(descending=True, stable=True).tolist()]
        report.tables["heads"] = [
            {"layer": layer, "head": head, "module": names[layer], "score": float(score[layer, head])} for layer, head in ranking
        ]
        found = int((score >= self.threshold).sum())
        report.note(f"{found} of {score.numel()} heads ({100 * found / score.numel():.1f} %) score {self.threshold} or more")
        report.figures["retrieval score"] = {
            "kind": "heatmap", "values": score.tolist(), "x": list(range(score.shape[1])), "y": list(range(len(names))),
            "xlabel": "head", "ylabel": "layer", "label": "share of the needle copied", "title": "Retrieval score of every head",
        }  # fmt: skip
        return ranking

    def _mask(self, model, data: Data, prompts: list[Needle], ranking: list[tuple[int, int]], report: Report) -> None:
        """Ask again with the best heads masked, and with random others."""
        if 2 * self.masked > len(ranking):
            raise UsageError(f"retrieval-head: masked={self.masked} is more than half of the model's {len(ranking)} heads")
        arms = {"none": [], f"best {self.masked}": ranking[: self.masked]}
        generator = torch.Generator().manual_seed(data.seed)
        for draw in range(self.draws):
            order = torch.randperm(len(ranking) - self.masked, generator=generator)[: self.masked]
            arms[f"random {self.masked}, draw {draw + 1}"] = [ranking[self.masked + i] for i in order.tolist()]
        rows = []
        for name, heads in arms.items():
            with masked_heads(model, heads):
                said = [greedy(model, p.ids[None], self.max_new_tokens, ends=answer_ends(data.processor))[0].tolist() for p in prompts]
            recalls = [recall_of(prompt.answer, emitted, data.processor) for prompt, emitted in zip(prompts, said)]
            rows.append({"masked heads": name, "recall": sum(recalls) / len(recalls)})
        report.tables["masking"] = rows

    def prompts(self, model: nn.Module, data: Data, report: Report) -> list[Needle]:
        """The prompts, seeded by `data.seed`; lengths that do not fit the model or the data are skipped, with the reason in the report."""
        generator = torch.Generator().manual_seed(data.seed)
        special = set(getattr(data.processor, "all_special_ids", ()))
        hay = torch.tensor([t for item in data.items for t in item["input_ids"].tolist() if t not in special])
        longest = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        made = []
        for length in sorted(self.lengths):
            if len(hay) < length:
                report.note(f"length {length} skipped: the data has only {len(hay)} tokens")
                continue
            for _ in range(self.needles):
                needle, question, start, size = plant(hay, data.processor, generator)
                if length + len(needle) + len(question) + self.max_new_tokens > longest:
                    report.note(f"length {length} skipped: the model reads only {longest} positions")
                    break
                first = int(torch.randint(len(hay) - length + 1, (1,), generator=generator))
                window = hay[first : first + length]
                for depth in self.depths:
                    at = sentence_end(window, round(depth * length), data.processor)
                    begin = beginning(data.processor)
                    ids = torch.cat([begin, window[:at], needle, window[at:], question])
                    offset = len(begin) + at + start
                    made.append(Needle(ids, offset, offset + size, length, depth))
        if not made:
            raise FormularyError(f"retrieval-head: no prompt can be made: {report.notes[0]}; give more data or smaller lengths")
        return made


def retrieval_scores(
    model: nn.Module, prompt: Needle, max_new_tokens: int, ends: Callable[[int], bool] = lambda token: False
) -> tuple[list[int], Float[Tensor, "layers heads"]]:
    """(tokens that the model says, each head's share of the needle copied meanwhile)."""
    copied = []
    emitted = greedy(
        model,
        prompt.ids[None],
        max_new_tokens,
        watch=lambda attention, token: copied.append(copied_positions(attention[0], prompt, int(token))),
        ends=ends,
    )[0]
    hits = torch.stack(copied)
    spot = torch.arange(prompt.start, prompt.end).view(-1, 1, 1, 1)
    return emitted.tolist(), (hits == spot).any(1).float().mean(0)


def copied_positions(attention: Float[Tensor, "layers heads S"], prompt: Needle, emitted: int) -> Int[Tensor, "layers heads"]:
    """The needle position that each head attends to most, if it holds the token emitted; -1 elsewhere."""
    at = attention.argmax(-1)
    inside = (at >= prompt.start) & (at < prompt.end)
    return torch.where(inside & (prompt.ids[at.clamp(max=len(prompt.ids) - 1)] == emitted), at, -1)


@torch.no_grad()
def greedy(
    model: nn.Module,
    ids: Int[Tensor, "N L"],
    max_new_tokens: int,
    *,
    watch: Callable[[Float[Tensor, "N layers heads S"], Int[Tensor, "N"]], None] | None = None,
    ends: Callable[[int], bool] = lambda token: False,
) -> Int[Tensor, "N new"]:
    """Greedy continuation of N prompts of one length, until `ends` is true of a token when N is 1.

    `watch(attention, tokens)` receives, at each step, what the last position attends to, and the tokens then emitted.
    """
    cache = model.base_model(input_ids=ids[:, :-1], use_cache=True).cache
    token, said = ids[:, -1:], []
    with _watching(model) if watch else nullcontext() as weights:
        for step in range(max_new_tokens):
            out = model(input_ids=token, cache=cache, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            said.append(token)
            if watch:
                watch(_stacked(weights, ids.shape[1] + step), token[:, 0])
            if len(ids) == 1 and ends(int(token)):
                break
    return torch.cat(said, dim=1)


@contextmanager
def _watching(model: nn.Module) -> Iterator[list[Tensor]]:
    """Within the context, each call of the model leaves every layer's attention weights, (N,heads,L,S), in the list yielded."""
    weights: list[Tensor] = []
    mixers = parts.mixers(model)

    def keep(module, args, output):
        if module is mixers[0].module:
            weights.clear()
        if output[1] is None:
            raise FormularyError(f"retrieval-head: {type(module).__name__} does not give its attention weights")
        weights.append(output[1])

    implementation = model.config._attn_implementation
    handles = [part.module.register_forward_hook(keep) for part in mixers]
    try:
        model.set_attn_implementation("eager")
        yield weights
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(implementation)


def _stacked(weights: list[Tensor], seen: int) -> Float[Tensor, "N layers heads S"]:
    """The last position's weights over all `seen` positions; a layer with a sliding window sees the last of them."""
    rows = [layer[:, :, -1].float() for layer in weights]
    return torch.stack([nn.functional.pad(row, (seen - row.shape[-1], 0)) for row in rows], dim=1)


@contextmanager
def masked_heads(model: nn.Module, heads: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Within the context, the (layer, head) pairs add nothing: their part of the output projection's input is zero.

    Raises UsageError for a head that the model does not have, FormularyError when a layer's output projection is not found.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)
    mixers, handles = parts.mixers(model), []
    try:
        for layer, chosen in by_layer.items():
            if not 0 <= layer < len(mixers) or not all(0 <= head < mixers[layer].heads for head in chosen):
                raise UsageError(f"there is no head {chosen} in layer {layer}: the model has {len(mixers)} layers of {mixers[0].heads} heads")
            handles.append(_output(mixers[layer]).register_forward_pre_hook(_zero(chosen, mixers[layer].heads)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output(mixer: parts.Part) -> nn.Module:
    named = dict(mixer.module.named_children())
    for name in OUTPUTS:
        if name in named:
            return named[name]
    raise FormularyError(f"the output projection of {mixer.name} is not known; it has {', '.join(named)}")


def _zero(chosen: list[int], heads: int):
    def hook(module, args):
        split = args[0].unflatten(-1, (heads, -1))
        keep = torch.ones(heads, 1, dtype=split.dtype, device=split.device)
        keep[chosen] = 0
        return ((split * keep).flatten(-2), *args[1:])

    return hook
