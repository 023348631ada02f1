"""Starting a room: files for each contract that import cleanly and whose tests fail until they are written."""

import os
from dataclasses import dataclass
from pathlib import Path

from formulary.errors import FormularyError, UsageError, nearest
from formulary.catalogue import _index
from formulary.catalogue._card import CONTRACTS, FAMILIES, PAPERS, Card, parse_card, room_name
from formulary.catalogue._find import card as find_card

UNWRITTEN = "To write:"


@dataclass(frozen=True)
class Scaffold:
    """What `scaffold` did: the room's folder, the files it wrote and the files that were there and stayed as they were."""

    slug: str
    room: Path
    written: tuple[str, ...]
    kept: tuple[str, ...]

    def text(self) -> str:
        """What the command line prints."""
        lines = [f"{self.slug}: {self.room}"]
        lines += [f"  written  {name}" for name in self.written] + [f"  kept     {name}" for name in self.kept]
        lines += [
            "Next:",
            f"  write {'card.toml, ' if 'card.toml' in self.written else ''}method.py, check.py and test_method.py",
            f"  python -m pytest {os.path.relpath(self.room)}",
            f"  formulary check {self.slug}, and with --record when the code is final",
        ]
        return "\n".join(lines) + "\n"


def scaffold(
    slug: str,
    *,
    family: str | None = None,
    title: str | None = None,
    contract: list[str] | None = None,
    tier: str | None = None,
    area: str | None = None,
    arxiv: str | None = None,
    papers: Path = PAPERS,
) -> Scaffold:
    """Write the files of a room that are not there yet, for a paper that has a card, or with a new card from the given facts.

    Raises UsageError for a paper that is a card alone, for facts about a paper that has its card already, and for a new paper
    without family, title and contract.
    """
    facts = {"family": family, "title": title, "contract": contract, "tier": tier, "area": area, "arxiv": arxiv}
    card, is_new = _card_of(slug, {key: value for key, value in facts.items() if value is not None}, papers)
    room = papers / card.family / card.room
    files = {"card.toml": card_toml(card)} if is_new else {}
    files |= room_files(card, is_new)
    try:
        room.mkdir(parents=True, exist_ok=True)
        if not (family_file := room.parent / "__init__.py").exists():
            _write_new(family_file, f'"""What the {card.family.replace("_", " ")} family shares."""\n')
        written = [name for name, text in files.items() if _write_new(room / name, text)]
    except OSError as error:
        raise FormularyError(f"cannot write the room of {card.slug} in {room}: {error.strerror}") from None
    _index.load.cache_clear()
    return Scaffold(card.slug, room, tuple(written), tuple(name for name in files if name not in written))


def _write_new(path: Path, text: str) -> bool:
    """Create `path`; False when it exists, which is then untouched."""
    try:
        with open(path, "x", encoding="utf8") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def _card_of(slug: str, facts: dict, papers: Path) -> tuple[Card, bool]:
    plain = slug.strip().lower().replace("_", "-")
    try:
        card = find_card(plain)
    except UsageError:
        return _new_card(plain, facts), True
    if facts:
        raise UsageError(f"{card.slug} has a card already: edit {papers / card.family / card.room / 'card.toml'} instead of giving --{next(iter(facts))}")
    if card.tier == "D":
        raise UsageError(f"{card.slug} is tier D: a card alone, with nothing to run")
    if not card.contract:
        raise UsageError(f"the card of {card.slug} names no contract: choose one ({', '.join(CONTRACTS)}) in its card.toml first")
    return card, False


def _new_card(slug: str, facts: dict) -> Card:
    missing = [f"--{name}" for name in ("family", "title", "contract") if name not in facts]
    if missing:
        raise UsageError(f"no paper {slug!r} in the catalogue{nearest(slug, _index.load()['slugs'])}; to add it, give {', '.join(missing)}")
    family = facts["family"].replace("-", "_")
    if family not in FAMILIES:
        raise UsageError(f"unknown family {family!r}{nearest(family, FAMILIES)}; known: {', '.join(FAMILIES)}")
    table = {
        "slug": slug,
        "title": facts["title"],
        "kind": "method",
        "area": facts.get("area", "text"),
        "family": family,
        "tier": facts.get("tier", "A").upper(),
        "contract": facts["contract"],
        "summary": f"{UNWRITTEN} two or three sentences for a reader.",
        "mechanism": f"{UNWRITTEN} how it works, precisely enough to implement it.",
        "claim": f"{UNWRITTEN} what the paper says that it reaches.",
        "small_check": f"{UNWRITTEN} an experiment of a minute or two on a CPU that can fail.",
        "use": f"{UNWRITTEN} what goes in and what comes out.",
        "loc": 0,
    }
    return parse_card({**table, **_dates(facts.get("arxiv"))}, slug)


def _dates(arxiv: str | None) -> dict:
    """Year and month from a new-style arXiv id; this year without one."""
    if arxiv is None:
        from datetime import date

        return {"year": date.today().year}
    if len(arxiv) < 4 or not arxiv[:4].isdigit():
        raise UsageError(f"{arxiv!r} is not an arXiv id such as 2210.17323")
    return {"arxiv": arxiv, "year": 2000 + int(arxiv[:2]), "published": f"20{arxiv[:2]}-{arxiv[2:4]}"}


def card_toml(card: Card) -> str:
    """The card as the text of a `card.toml`, optional facts that are not known left out.

    JSON's strings, numbers and arrays of strings are TOML's as well.
    """
    import json

    facts = {key: value for key, value in card.as_dict().items() if value is not None}
    return "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in facts.items())


def room_files(card: Card, is_new: bool = False) -> dict[str, str]:
    """File name -> text of a room's code, from the templates of the card's contracts."""
    name = class_name(card.slug)
    classes = [name if n == 0 else f"{name}{contract.title()}" for n, contract in enumerate(card.contract)]
    fill = lambda text: text.replace("SLUG", card.slug).replace("MODULE", f"formulary.papers.{card.family}.{card.room}")
    bodies = [METHODS[contract][1].replace("CLASS", cls) for contract, cls in zip(card.contract, classes)]
    imports = _imports([line for contract in card.contract for line in METHODS[contract][0]])
    source = f"arXiv:{card.arxiv}, eq. N" if card.arxiv else "the paper, eq. N"
    head = f'"""{card.title.strip()}.\n\nSource: {source}. Replace this by one sentence, the equation, and how its symbols map to the names below.\n"""\n\n'
    tests = TEST.replace("CLASSES", ", ".join(classes)).replace("FIRST", classes[0]) + (CARD_TEST if is_new else "")
    if is_new:
        tests = tests.replace("from MODULE", "from formulary.catalogue import card\nfrom MODULE", 1)
    return {
        "__init__.py": f"from .method import {', '.join(classes)}\n",
        "method.py": fill(head + imports + "\n\n" + "\n\n".join(bodies)),
        "check.py": fill(CHECK),
        "test_method.py": fill(tests),
    }


def class_name(slug: str) -> str:
    """
    >>> class_name("llm-int8"), class_name("3mt")
    ('LlmInt8', 'Paper3mt')
    """
    return "".join(part.capitalize() for part in room_name(slug).split("_"))


def _imports(lines: list[str]) -> str:
    """Import lines, each module once, in the three groups of the house: standard library, packages, formulary."""
    merged: dict[str, set[str]] = {}
    for line in lines:
        module, _, names = line.partition(": ")
        merged.setdefault(module, set()).update(names.split(", "))
    groups: list[list[str]] = [[], [], []]
    for module, names in sorted(merged.items()):
        group = 2 if module.startswith("formulary") else 0 if module in ("dataclasses", "typing", "collections.abc") else 1
        groups[group].append(f"from {module} import {', '.join(sorted(names))}")
    return "\n\n".join("\n".join(group) for group in groups if group) + "\n"


PARAMETERS = "dataclasses: dataclass"
METHODS: dict[str, tuple[list[str], str]] = {
    "transform": (
        [PARAMETERS, "typing: ClassVar", "torch: nn", "formulary.contracts: Data, Report, Transform", "formulary.contracts.edits: Editor"],
        '''@dataclass(frozen=True, kw_only=True)
class CLASS(Transform):
    """Parameters with the paper's defaults, one line each. Raises UsageError for a value that is not allowed."""

    supports: ClassVar[frozenset[str]] = frozenset({"encoder", "decoder", "encoder-decoder", "vision"})

    def run(self, model: nn.Module, data: Data | None, edit: Editor, report: Report) -> nn.Module | None:
        """Change `model` through `edit`, and tell `report` every part that was changed or skipped."""
        raise NotImplementedError("SLUG: write CLASS.run in method.py")
''',
    ),
    "attention": (
        ["typing: Any", "jaxtyping: Bool, Float", "torch: Tensor", "formulary.contracts: Attention"],
        '''class CLASS(Attention):
    """Constructor arguments are the paper's parameters, with its defaults."""

    def attend(
        self,
        query: Float[Tensor, "B H L K"],
        key: Float[Tensor, "B H S K"],
        value: Float[Tensor, "B H S K"],
        *,
        mask: Bool[Tensor, "#B #H L S"] | None = None,
        bias: Float[Tensor, "#B #H L S"] | None = None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Float[Tensor, "B H L K"]:
        """Attention output; no weight on a later or a padded key."""
        raise NotImplementedError("SLUG: write CLASS.attend in method.py")

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """Arguments with which `attend` equals scaled dot-product attention."""
        raise NotImplementedError("SLUG: write CLASS.full_budget in method.py")
''',
    ),
    "layer": (
        ["typing: Any, ClassVar", "jaxtyping: Bool, Float", "torch: Tensor", "formulary.contracts: Layer"],
        '''class CLASS(Layer):
    """Constructor arguments are JSON scalars. A recurrent mixer implements `initial_state`, `scan` and `step` instead of `forward`."""

    replaces: ClassVar[str] = "token mixer"

    @classmethod
    def arguments(cls, part, **settings) -> dict[str, Any]:
        """Constructor arguments that fit `part`."""
        raise NotImplementedError("SLUG: write CLASS.arguments in method.py")

    def forward(self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"] | None = None) -> Float[Tensor, "B L D"]:
        """`mask` is True at real tokens."""
        raise NotImplementedError("SLUG: write CLASS.forward in method.py")
''',
    ),
    "recipe": (
        [PARAMETERS, "torch: Tensor, nn", "formulary.contracts: Recipe"],
        '''@dataclass(frozen=True, kw_only=True)
class CLASS(Recipe):
    """Parameters with the paper's defaults. Keep the hooks that the paper changes, and delete the others."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The scalar to minimize."""
        raise NotImplementedError("SLUG: write CLASS.loss in method.py")
''',
    ),
    "probe": (
        [PARAMETERS, "torch: nn", "formulary.contracts: Data, Probe, Report"],
        '''@dataclass(frozen=True, kw_only=True)
class CLASS(Probe):
    """Parameters with the paper's defaults."""

    def look(self, model: nn.Module, data: Data | None, report: Report) -> None:
        """Fill `report.tables` and `report.figures`; the model stays as it is."""
        raise NotImplementedError("SLUG: write CLASS.look in method.py")
''',
    ),
    "model": (
        [PARAMETERS, "torch: Tensor", "formulary.contracts: Model"],
        '''class CLASS(Model):
    """The network; `named_sizes` holds the sizes that the paper names."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Sizes and options, with the paper's defaults."""

        width: int = 64

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Scalar training loss of a batch."""
        raise NotImplementedError("SLUG: write CLASS.loss in method.py")

    def predict(self, inputs: Tensor) -> Tensor:
        """The answer for new inputs."""
        raise NotImplementedError("SLUG: write CLASS.predict in method.py")
''',
    ),
    "estimator": (
        ["sklearn.base: BaseEstimator, RegressorMixin"],
        '''class CLASS(RegressorMixin, BaseEstimator):
    """A scikit-learn estimator: `__init__` stores its parameters untouched."""

    def fit(self, X, y):
        """X (n, features), y (n,); returns self."""
        raise NotImplementedError("SLUG: write CLASS.fit in method.py")

    def predict(self, X):
        """(n,) predictions for X (n, features)."""
        raise NotImplementedError("SLUG: write CLASS.predict in method.py")
''',
    ),
    "study": (
        [PARAMETERS, "collections.abc: Callable", "formulary.contracts: Report, Study"],
        '''@dataclass(frozen=True, kw_only=True)
class CLASS(Study):
    """Parameters of the paper's figure."""

    @classmethod
    def functions(cls) -> dict[str, Callable]:
        """The functions of the paper's analysis, by name."""
        raise NotImplementedError("SLUG: write CLASS.functions in method.py")

    def figure(self, report: Report) -> None:
        """Fill `report.tables` and `report.figures`."""
        raise NotImplementedError("SLUG: write CLASS.figure in method.py")
''',
    ),
}

CHECK = '''"""The experiment: what is predicted, against which baseline, on what."""

from formulary.evidence import Check, at_most


def prepare(seed: int):
    """The context of one seed: the model, the data and the items that all arms share."""
    raise NotImplementedError("SLUG: write prepare in check.py")


def method(context) -> list[float]:
    """One outcome an item with the method."""
    raise NotImplementedError("SLUG: write method in check.py")


def baseline(context) -> list[float]:
    """One outcome an item with the strongest simple alternative."""
    raise NotImplementedError("SLUG: write baseline in check.py")


check = Check(
    claim="SLUG: state the prediction here, with its direction and size, before the first run.",
    setup=prepare,
    arms={"method": method, "baseline": baseline},
    metric="loss, nats",
    holds=at_most("method", "baseline", ratio=0.9),
    items="fresh",
    redraws="everything",
    seeds=8,
    version=1,
)
'''

TEST = '''from MODULE import CLASSES


def test_against_something_independent():
    """Another implementation, brute force at tiny size, or an identity that must hold."""
    raise AssertionError(f"SLUG: {FIRST.__name__} is not tested yet; write test_method.py")
'''

CARD_TEST = '''

def test_the_card_is_written():
    unwritten = [key for key, value in card("SLUG").as_dict().items() if str(value).startswith("To write:")]
    assert not unwritten, f"SLUG: write {', '.join(unwritten)} in card.toml"
'''
