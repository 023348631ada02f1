"""A card: the facts of one paper, read from `papers/<family>/<room>/card.toml` and validated where it is read.

Every way in which a card can be wrong is one `UsageError` line that begins with the card's name.
"""

import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from formulary.errors import UsageError, nearest

FAMILIES = tuple(
    "sequence_mixing feed_forward embedding memory backbone quantization pruning low_rank distillation token_reduction inference "
    "adaptation pretraining training growth in_context_learning interpretability robustness retrieval generation detection "
    "forecasting decision application literature".split()
)
TIERS = ("A", "B", "C", "D")
CONTRACTS = ("attention", "layer", "transform", "recipe", "probe", "model", "estimator", "study")
KINDS = ("method", "architecture", "study", "application", "survey", "dataset", "benchmark", "report", "library")
AREAS = tuple(
    "text vision theory medical multimodal image-generation audio-music security biology-chemistry time-series 3d systems "
    "video-generation tabular code rl".split()
)
VERDICTS = ("holds here", "does not hold here", "inconclusive", "not testable here", "not checked")

PAPERS = Path(__file__).resolve().parent.parent / "papers"


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of one paper. `contract` is empty for a card alone; optional facts are None where not known.

    `authors` is their number, `comments` as the feed showed, `loc` a guess at the lines of a faithful core,
    `published` a date (`2022-10-31`) or a year and month (`2022-10`).
    """

    slug: str
    title: str
    year: int
    kind: str
    area: str
    family: str
    tier: str
    contract: tuple[str, ...]
    summary: str
    mechanism: str
    claim: str
    small_check: str
    use: str
    loc: int
    arxiv: str | None = None
    published: str | None = None
    authors: int | None = None
    organization: str | None = None
    comments: int | None = None
    library: str | None = None
    repo: str | None = None

    @property
    def room(self) -> str:
        """The name of the paper's folder: `3mt` lives in `paper_3mt`."""
        return room_name(self.slug)

    @property
    def date(self) -> str:
        """`published` where known, else the year; sorts as text."""
        return self.published or str(self.year)

    def as_dict(self) -> dict:
        """The card as JSON-ready data, `contract` as a list."""
        return {**asdict(self), "contract": list(self.contract)}


def room_name(slug: str) -> str:
    """
    >>> room_name("llm-int8"), room_name("3mt")
    ('llm_int8', 'paper_3mt')
    """
    room = slug.replace("-", "_")
    return f"paper_{room}" if room[:1].isdigit() else room


def parse_card(table: dict, name: str) -> Card:
    """The validated card of a TOML table; `name` begins every error. Raises UsageError in one line.

    >>> parse_card({"slug": "gptq"}, "gptq")
    Traceback (most recent call last):
    formulary.errors.UsageError: card gptq: missing title, year, kind, area, family, tier, contract, summary, mechanism, claim, small_check, use, loc
    """
    known = {field.name: field for field in fields(Card)}
    for key in table:
        if key not in known:
            raise UsageError(f"card {name}: unknown field {key!r}{nearest(key, known)}")
    missing = [key for key, field in known.items() if field.default is MISSING and key not in table]
    if missing:
        raise UsageError(f"card {name}: missing {', '.join(missing)}")
    for key, value in table.items():
        _check_type(name, key, value, known[key].type)
    card = Card(**{**table, "contract": tuple(table["contract"])})
    _check_names(name, card)
    _check_dates(name, card)
    return card


def _check_type(name: str, key: str, value, declared) -> None:
    if key == "contract":
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"card {name}: contract must be an array of strings, not {value!r}")
        return
    wanted = int if declared in (int, int | None) else str
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise UsageError(f"card {name}: {key} must be {'a whole number' if wanted is int else 'text'}, not {value!r}")
    if wanted is int and value < 0:
        raise UsageError(f"card {name}: {key} must not be negative, not {value}")
    if wanted is str and not value.strip():
        raise UsageError(f"card {name}: {key} is empty; leave an optional field out when it is not known")


def _check_names(name: str, card: Card) -> None:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", card.slug):
        raise UsageError(f"card {name}: slug {card.slug!r} must be lower-case letters and digits joined by single dashes")
    for key, value, known in (
        ("family", card.family, FAMILIES),
        ("tier", card.tier, TIERS),
        ("area", card.area, AREAS),
        ("kind", card.kind, KINDS),
        *(("contract", contract, CONTRACTS) for contract in card.contract),
    ):
        if value not in known:
            raise UsageError(f"card {name}: unknown {key} {value!r}{nearest(value, known) or '; known: ' + ', '.join(known)}")
    if len(set(card.contract)) != len(card.contract):
        raise UsageError(f"card {name}: a contract is named twice in {list(card.contract)}")
    if card.tier == "D" and card.contract:
        raise UsageError(f"card {name}: tier D is a card alone, so contract must be empty, not {list(card.contract)}")
    if card.arxiv is not None and not re.fullmatch(r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}", card.arxiv):
        raise UsageError(f"card {name}: {card.arxiv!r} is not an arXiv id such as 2210.17323")


def _check_dates(name: str, card: Card) -> None:
    if not 1950 <= card.year <= 2100:
        raise UsageError(f"card {name}: bad year {card.year}")
    if card.published is None:
        return
    matched = re.fullmatch(r"(\d{4})-(\d\d)(?:-(\d\d))?", card.published)
    if not matched or not _is_date(*(int(part or 1) for part in matched.groups())):
        raise UsageError(f"card {name}: bad date {card.published!r}; published is YYYY-MM or YYYY-MM-DD")
    if int(matched[1]) != card.year:
        raise UsageError(f"card {name}: published {card.published} is not in the year {card.year}")


def _is_date(year: int, month: int, day: int) -> bool:
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    days = (31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
    return 1 <= month <= 12 and 1 <= day <= days[month - 1]


def read_card(path: Path) -> Card:
    """The card in one file. Its folder must be the slug's room, and the folder above it the family."""
    import tomllib

    name = path.parent.name
    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"card {name}: {path.name} is not valid TOML: {error}") from None
    card = parse_card(table, name)
    if card.room != name:
        raise UsageError(f"card {name}: the folder of slug {card.slug!r} must be named {card.room}")
    if card.family != path.parent.parent.name:
        raise UsageError(f"card {name}: family {card.family!r} but the folder is in {path.parent.parent.name}")
    return card


def read_cards(papers: Path = PAPERS) -> dict[str, Card]:
    """Every card under `papers`, by slug in alphabetical order. Raises UsageError at the first that is wrong."""
    found: dict[str, Card] = {}
    for path in sorted(papers.glob("*/*/card.toml")):
        card = read_card(path)
        if card.slug in found:
            raise UsageError(f"card {card.slug}: the slug is used twice, in {found[card.slug].family} and in {card.family}")
        found[card.slug] = card
    return dict(sorted(found.items()))
