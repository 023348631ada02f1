"""Synthetic tasks whose right answers are known, each an object with `batch(n, generator) -> dict of tensors`.

Token tasks follow transformers' convention for causal models: `labels` lie at the same place as the token they
name, with -100 where nothing is asked, so `model(**batch).loss` is right and the answer at place t is predicted
from places < t.

>>> import torch
>>> task = Needle(length=16, needle=2, vocabulary=8)
>>> batch = task.batch(2, torch.Generator().manual_seed(0))
>>> batch["input_ids"].shape, (batch["labels"] != -100).sum().item()
(torch.Size([2, 16]), 4)
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from formulary.errors import UsageError

IGNORE = -100


def stream(task, n: int, *, seed: int = 0) -> Callable[[int], dict[str, Tensor]]:
    """`step -> batch` for `lab.train`: `n` items that depend on (seed, step) alone, so a resumed run sees the same.

    >>> batches = stream(Copying(length=4), 2)
    >>> bool((batches(7)["input_ids"] == batches(7)["input_ids"]).all())
    True
    """

    def batch(step: int) -> dict[str, Tensor]:
        return task.batch(n, Generator().manual_seed(seed * 1_000_003 + step))

    return batch


def _choose(n: int, population: int, count: int, generator: Generator) -> Int[Tensor, "n count"]:
    """`n` draws of `count` different numbers below `population`, in random order."""
    return torch.rand(n, population, generator=generator).argsort(dim=1)[:, :count]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


@dataclass(frozen=True)
class AssociativeRecall:
    """Multi-query associative recall (Zoology, arXiv:2312.04927, section 3.1): `k v k v ... noise k v noise k v`.

    `pairs` different keys with random values open the sequence; later `queries` of the keys return at random
    places, each followed by its value, which is the label. Between them stands the noise token 0. Keys and values
    are disjoint sets of `keys` and `values` tokens.
    """

    pairs: int = 8
    queries: int = 4
    length: int = 64
    keys: int = 32
    values: int = 32

    def __post_init__(self):
        _require(self.queries <= self.pairs <= self.keys, "associative recall needs queries <= pairs <= keys")
        _require(self.length >= 2 * (self.pairs + self.queries), "the sequence is too short for its pairs and queries")

    @property
    def vocab_size(self) -> int:
        return 1 + self.keys + self.values

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        keys = 1 + _choose(n, self.keys, self.pairs, generator)
        values = torch.randint(1 + self.keys, self.vocab_size, (n, self.pairs), generator=generator)
        ids = torch.zeros(n, self.length, dtype=torch.long)
        ids[:, 0 : 2 * self.pairs : 2], ids[:, 1 : 2 * self.pairs : 2] = keys, values
        asked = _choose(n, self.pairs, self.queries, generator)
        slots = _choose(n, (self.length - 2 * self.pairs) // 2, self.queries, generator)
        at = 2 * self.pairs + 2 * slots
        answers = values.gather(1, asked)
        ids.scatter_(1, at, keys.gather(1, asked)).scatter_(1, at + 1, answers)
        labels = torch.full_like(ids, IGNORE).scatter_(1, at + 1, answers)
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Copying:
    """`x_1 .. x_n SEP x_1 .. x_n`, n = `length`: repeat what stood before the separator, token 0."""

    length: int = 32
    vocabulary: int = 32

    @property
    def vocab_size(self) -> int:
        return 1 + self.vocabulary

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        text = torch.randint(1, self.vocab_size, (n, self.length), generator=generator)
        ids = torch.cat([text, torch.zeros(n, 1, dtype=torch.long), text], dim=1)
        labels = ids.clone()
        labels[:, : self.length + 1] = IGNORE
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Induction:
    """`... A B ... A -> B` (arXiv:2209.11895): the last but one token occurred once before; the label followed it.

    Tokens are uniform, except that the key A occurs nowhere else.
    """

    length: int = 64
    vocabulary: int = 32

    def __post_init__(self):
        _require(self.length >= 4 and self.vocabulary >= 2, "induction needs 4 places and 2 tokens at least")

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        key = torch.randint(self.vocabulary, (n, 1), generator=generator)
        ids = torch.randint(self.vocabulary - 1, (n, self.length), generator=generator)
        ids = ids + (ids >= key)
        first = torch.randint(self.length - 3, (n, 1), generator=generator)
        ids.scatter_(1, first, key)
        ids[:, -2:-1] = key
        ids[:, -1:] = ids.gather(1, first + 1)
        labels = torch.full_like(ids, IGNORE)
        labels[:, -1] = ids[:, -1]
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class Needle:
    """Noise with a needle in it, then a cue, then the needle again: `noise MARK n_1..n_k noise CUE n_1..n_k`.

    The needle's tokens are drawn like the noise, so only the marker (token 0; the cue is token 1) gives it away.
    It starts at a uniform depth. Labels on the copy. `positions(batch)` finds the needle again.
    """

    length: int = 96
    needle: int = 4
    vocabulary: int = 64

    def __post_init__(self):
        _require(self.length >= 2 * self.needle + 2, "the sequence is too short for marker, needle, cue and copy")

    @property
    def vocab_size(self) -> int:
        return 2 + self.vocabulary

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        ids = torch.randint(2, self.vocab_size, (n, self.length), generator=generator)
        cue = self.length - self.needle - 1
        marker = torch.randint(cue - self.needle, (n, 1), generator=generator)
        ids.scatter_(1, marker, 0)
        ids[:, cue] = 1
        ids[:, cue + 1 :] = ids.gather(1, marker + 1 + torch.arange(self.needle))
        labels = torch.full_like(ids, IGNORE)
        labels[:, cue + 1 :] = ids[:, cue + 1 :]
        return {"input_ids": ids, "labels": labels}

    def positions(self, batch: dict[str, Tensor]) -> Int[Tensor, "n needle"]:
        """Where the needle's tokens stand, not counting their copy."""
        marker = (batch["input_ids"] == 0).int().argmax(dim=1, keepdim=True)
        return marker + 1 + torch.arange(self.needle)


@dataclass(frozen=True)
class InContextRegression:
    """Linear regression in context (arXiv:2208.01066; arXiv:2307.03576 for the anisotropic case).

    Each item draws its own function. `x ~ N(0, S)` with S diagonal, its eigenvalues geometric from 1 down to
    1/condition and scaled to mean 1; `w ~ N(0, I/dim)`; `y = f(x) + noise * N(0, 1)`, where f is `w.x` ("linear"),
    `(w.x)^2` ("quadratic") or `sum_j a_j relu(w_j.x)` over `hidden` units ("relu"). batch: x (n, examples + 1,
    dim), y (n, examples + 1): the last pair is the query, its y the answer.
    """

    dim: int = 8
    examples: int = 16
    noise: float = 0.0
    condition: float = 1.0
    target: str = "linear"
    hidden: int = 8

    def __post_init__(self):
        _require(self.target in ("linear", "quadratic", "relu"), "the target is 'linear', 'quadratic' or 'relu'")
        _require(self.condition >= 1 and self.noise >= 0, "regression needs condition >= 1 and noise >= 0")

    def variances(self) -> Float[Tensor, "dim"]:
        """The diagonal of S."""
        steps = torch.linspace(0, 1, self.dim) if self.dim > 1 else torch.zeros(1)
        eigenvalues = self.condition**-steps
        return eigenvalues / eigenvalues.mean()

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        x = normal(n, self.examples + 1, self.dim) * self.variances().sqrt()
        units = self.hidden if self.target == "relu" else 1
        along = x @ normal(n, self.dim, units) / self.dim**0.5
        if self.target == "relu":
            y = (along.relu() * normal(n, 1, units)).sum(-1) * (2 / units) ** 0.5
        else:
            y = along[..., 0] if self.target == "linear" else along[..., 0] ** 2
        return {"x": x, "y": y + self.noise * normal(n, self.examples + 1)}


@dataclass(frozen=True)
class ListOps:
    """Nested lists of digits under MIN, MAX, MED and SM, sum modulo 10 (arXiv:1804.06028): `[MAX 2 [MIN 7 4 ] 0 ]`.

    Trees of at most `depth` operators above each other, 2 to `arguments` arguments each, at most `length` tokens.
    batch: input_ids and attention_mask (n, length), padded on the right by token 0; labels (n,), the value 0..9.
    """

    depth: int = 4
    arguments: int = 4
    length: int = 64

    TOKENS = ("<pad>", *map(str, range(10)), "[MIN", "[MAX", "[MED", "[SM", "]")

    def __post_init__(self):
        _require(self.depth >= 1 and self.arguments >= 2, "ListOps needs depth >= 1 and 2 arguments or more")
        _require(self.length >= 4, "ListOps needs a length of 4 or more")

    @property
    def vocab_size(self) -> int:
        return len(self.TOKENS)

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        ids = torch.zeros(n, self.length, dtype=torch.long)
        values = []
        for row in ids:
            tokens, value = self._tree(self.depth, self.length, generator)
            row[: len(tokens)] = torch.tensor([self.TOKENS.index(token) for token in tokens])
            values.append(value)
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.tensor(values)}

    def _tree(self, depth: int, room: int, generator: Generator) -> tuple[list[str], int]:
        """An operator whose arguments are digits or smaller trees, in at most `room` >= 4 tokens."""

        def draw(high):
            return int(torch.randint(high, (), generator=generator))

        operator = ("[MIN", "[MAX", "[MED", "[SM")[draw(4)]
        count = min(2 + draw(self.arguments - 1), room - 2)
        tokens, values = [operator], []
        for i in range(count):
            left = room - len(tokens) - 1 - (count - i - 1)
            if depth > 1 and left >= 4 and draw(2):
                part, value = self._tree(depth - 1, left, generator)
            else:
                value = draw(10)
                part = [str(value)]
            tokens += part
            values.append(value)
        return [*tokens, "]"], _listops_value(operator, values)

    def evaluate(self, ids: Int[Tensor, "L"]) -> int:
        """The value of one tree, by a stack over its tokens: independent of how the tree was drawn."""
        stack: list[list] = [[]]
        for token in (self.TOKENS[i] for i in ids.tolist() if i):
            if token.startswith("["):
                stack.append([token])
            elif token == "]":
                operator, *values = stack.pop()
                stack[-1].append(_listops_value(operator, values))
            else:
                stack[-1].append(int(token))
        return stack[0][0]


def _listops_value(operator: str, values: list[int]) -> int:
    """MED of an even number of values is the lower of the middle two."""
    ordered = sorted(values)
    return {
        "[MIN": ordered[0],
        "[MAX": ordered[-1],
        "[MED": ordered[(len(ordered) - 1) // 2],
        "[SM": sum(ordered) % 10,
    }[operator]


@dataclass(frozen=True)
class PlantedImages:
    """A small digit on a large noisy canvas: only `scale * 8` of `size` pixels a side matter.

    batch: pixel_values (n, 3, size, size), gray, noise of deviation `noise` around 0, the digit's strokes up to 1
    added; labels (n,). `sample` gives the top left corners (row, column) too. `split` chooses scikit-learn's
    digits to draw from.
    """

    size: int = 64
    scale: int = 2
    noise: float = 0.3
    split: str = "train"

    def __post_init__(self):
        _require(8 * self.scale <= self.size, "the digit is larger than the canvas")

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        return self.sample(n, generator)[0]

    def sample(self, n: int, generator: Generator) -> tuple[dict[str, Tensor], Int[Tensor, "n 2"]]:
        images, labels = _digit_tensors(self.split)
        chosen = torch.randint(len(images), (n,), generator=generator)
        side = 8 * self.scale
        digits = images[chosen].repeat_interleave(self.scale, 1).repeat_interleave(self.scale, 2)
        corners = torch.randint(self.size - side + 1, (n, 2), generator=generator)
        canvas = self.noise * torch.randn(n, self.size, self.size, generator=generator)
        for image, digit, (row, column) in zip(canvas, digits, corners.tolist()):
            image[row : row + side, column : column + side] += digit
        pixels = canvas.unsqueeze(1).repeat(1, 3, 1, 1)
        return {"pixel_values": pixels, "labels": labels[chosen]}, corners


@cache
def _digit_tensors(split: str) -> tuple[Tensor, Tensor]:
    from .datasets import digits

    images, labels = digits(split)
    return torch.from_numpy(images), torch.from_numpy(labels)


@dataclass(frozen=True)
class PlantedSeries:
    """Series that are a sum of known parts: trend, two seasonal waves, AR(1) noise, and sudden shifts of level.

    batch: past_values (n, past, channels) and future_values (n, future, channels). `parts` gives every part by
    itself over past + future steps. Each channel draws its own slope, amplitudes and phases; a shift comes at each
    step with probability `shift_rate`, of deviation `shift`. With `noise=0` and `shift=0` the future is exactly
    predictable.
    """

    past: int = 96
    future: int = 24
    channels: int = 1
    periods: tuple[float, float] = (24.0, 7.0)
    trend: float = 1.0
    season: float = 1.0
    noise: float = 0.3
    correlation: float = 0.6
    shift: float = 1.0
    shift_rate: float = 0.01

    def __post_init__(self):
        _require(-1 < self.correlation < 1, "the AR(1) correlation lies between -1 and 1")

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        total = sum(self.parts(n, generator).values())
        return {"past_values": total[:, : self.past], "future_values": total[:, self.past :]}

    def parts(self, n: int, generator: Generator) -> dict[str, Float[Tensor, "n L channels"]]:
        length, one = self.past + self.future, (n, 1, self.channels)
        t = torch.arange(length, dtype=torch.float32).view(1, length, 1)
        found = {"trend": self.trend * torch.randn(one, generator=generator) * (t / length - 0.5)}
        for i, period in enumerate(self.periods):
            amplitude = self.season * (0.5 + torch.rand(one, generator=generator))
            phase = 2 * torch.pi * torch.rand(one, generator=generator)
            found[f"season {i + 1}"] = amplitude * torch.sin(2 * torch.pi * t / period + phase)
        found["noise"] = self._noise(n, length, generator)
        jumps = self.shift * torch.randn(n, length, self.channels, generator=generator)
        happens = torch.rand(n, length, self.channels, generator=generator) < self.shift_rate
        found["shifts"] = (jumps * happens).cumsum(dim=1)
        return found

    def _noise(self, n: int, length: int, generator: Generator) -> Float[Tensor, "n L channels"]:
        """AR(1), stationary from its first step with deviation `noise`."""
        fresh = self.noise * torch.randn(n, length, self.channels, generator=generator)
        values = [fresh[:, 0]]
        for step in range(1, length):
            values.append(self.correlation * values[-1] + (1 - self.correlation**2) ** 0.5 * fresh[:, step])
        return torch.stack(values, dim=1)


@dataclass(frozen=True)
class CharText:
    """Windows of `length` characters from the King James Bible: input_ids (n, length), labels the same.

    The verses of the split are joined by line ends. The vocabulary is that of the training text, so it is the same
    for both splits; a character it lacks becomes token 0, as the line end is.
    """

    length: int = 128
    split: str = "train"

    @property
    def vocab_size(self) -> int:
        return len(characters())

    def batch(self, n: int, generator: Generator) -> dict[str, Tensor]:
        ids = _char_ids(self.split)
        starts = torch.randint(len(ids) - self.length + 1, (n, 1), generator=generator)
        window = ids[starts + torch.arange(self.length)].long()
        return {"input_ids": window, "labels": window.clone()}


@cache
def characters() -> str:
    """The characters of `CharText`: place in this string = token id; the line end is 0."""
    from .datasets import kjv

    return "\n" + "".join(sorted(set("".join(kjv("train"))) - {"\n"}))


def encode(text: str) -> Int[Tensor, "L"]:
    """Token ids of `text` under `characters`.

    >>> decode(encode("In the beginning"))
    'In the beginning'
    """
    ids = {character: i for i, character in enumerate(characters())}
    return torch.tensor([ids.get(character, 0) for character in text])


def decode(ids: Int[Tensor, "L"]) -> str:
    """The text of token ids under `characters`."""
    return "".join(characters()[i] for i in ids.tolist())


@cache
def _char_ids(split: str) -> Tensor:
    from .datasets import kjv

    return encode("\n".join(kjv(split))).to(torch.uint8)
