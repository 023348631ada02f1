"""Needles in words that nobody can have learnt, and how much of one an answer says."""

import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

NAMES = "Arlo Mira Tobin Selma Oskar Petra Lorenz Anneke Bruno Greta Hector Ines Jonas Katya Milo Nadia".split()
THINGS = (
    "lantern anchor violin pumpkin compass blanket teapot ladder feather hammer candle mirror basket trumpet saddle kettle marble "
    "curtain shovel barrel cabbage ribbon whistle magnet pillow bucket walnut helmet carpet needle turnip lemon"
).split()
SENTENCES = (
    ("The wooden box of {0} holds a {1}, a {2}, a {3} and a {4}.", "What does the wooden box of {0} hold?"),
    ("In the garden of {0} there is a {1}, a {2}, a {3} and a {4}.", "What is there in the garden of {0}?"),
    ("The king gave {0} a {1}, a {2}, a {3} and a {4}.", "What did the king give {0}?"),
)
ANSWER = "a {1}, a {2}, a {3} and a {4}"


def plant(hay: Tensor, processor, generator: torch.Generator) -> tuple[Tensor, Tensor, int, int]:
    """(needle ids, ids of the question, where in the needle the answer starts, its length)."""
    if processor is None:
        drawn = hay[torch.randint(len(hay), (9,), generator=generator)]
        return drawn, drawn[:3], 3, 6
    pick = lambda words: words[int(torch.randint(len(words), (1,), generator=generator))]
    things = [THINGS[i] for i in torch.randperm(len(THINGS), generator=generator)[:4].tolist()]
    (told, asked), words = pick(SENTENCES), [pick(NAMES), *things]
    before, _, after = told.partition(ANSWER)
    pieces = [f" {before.strip()}", f" {ANSWER}", after]
    encoded = [encode(processor, piece.format(*words)) for piece in pieces]
    question = f"\n\nQuestion: {asked}\nAnswer: {before.strip()}".format(*words)
    return torch.cat(encoded), encode(processor, question), len(encoded[0]), len(encoded[1])


def encode(processor, text: str) -> Tensor:
    return torch.tensor(processor(text, add_special_tokens=False)["input_ids"], dtype=torch.long)


def beginning(processor) -> Tensor:
    """What the tokenizer puts before any text."""
    if processor is None:
        return torch.empty(0, dtype=torch.long)
    whole, bare = (processor("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return torch.tensor(whole[: whole.index(bare[0])] if bare[0] in whole else [], dtype=torch.long)


def sentence_end(window: Tensor, at: int, processor) -> int:
    """The last end of a sentence up to `at`, or `at` where there is none."""
    if processor is None or at == 0:
        return at
    for place in range(at, 0, -1):
        if processor.decode([int(window[place - 1])]).rstrip().endswith((".", "!", "?")):
            return place
    return at


def answer_ends(processor) -> Callable[[int], bool]:
    """Whether a token ends the answer: the end of text, or a line end."""
    if processor is None:
        return lambda token: False
    return lambda token: token == processor.eos_token_id or "\n" in processor.decode([token])


def say(tokens: list[int], processor) -> str:
    return " ".join(map(str, tokens)) if processor is None else processor.decode(tokens, skip_special_tokens=True).strip()


def recall_of(answer: list[int], emitted: list[int], processor) -> float:
    """ROUGE-1 recall, 0 to 1: the share of the answer's words (tokens, without a tokenizer) that were said."""
    if processor is None:
        wanted, said = Counter(answer), Counter(emitted)
    else:
        wanted, said = (Counter(re.findall(r"\w+", say(tokens, processor).lower())) for tokens in (answer, emitted))
    return (wanted & said).total() / max(1, wanted.total())
