"""Finding cards: by words, by filters, by likeness to another card."""

from dataclasses import dataclass

from formulary.errors import UsageError, nearest
from formulary.catalogue import _index
from formulary.catalogue._card import AREAS, CONTRACTS, FAMILIES, TIERS, VERDICTS, Card

LIMIT = 10


@dataclass(frozen=True)
class Hit:
    """One card that was found. `score` compares within one search only, 0 where nothing was searched for; `verdict` is one of VERDICTS."""

    card: Card
    score: float
    verdict: str

    def as_dict(self) -> dict:
        """The card's fields with `score` and `verdict`, JSON-ready."""
        return {**self.card.as_dict(), "score": round(self.score, 4), "verdict": self.verdict}


def cards() -> dict[str, Card]:
    """Every card by slug, in alphabetical order."""
    return {table["slug"]: _index.as_card(table) for table in _index.load()["cards"]}


def card(slug: str) -> Card:
    """One card; dashes or underscores. A slug that is not known raises UsageError with the nearest.

    >>> card("llm_int8").arxiv
    '2208.07339'
    """
    return _index.as_card(_index.load()["cards"][_position(slug)])


def record(slug: str) -> dict | None:
    """What was recorded of a paper's check, without the outcomes of each item; None when nothing was."""
    index = _index.load()
    return index["records"].get(index["slugs"][_position(slug)])


def verdict(slug: str) -> str:
    """The recorded verdict as written, with its reason if it has one, or `not checked`."""
    found = record(slug)
    return found["verdict"] if found else "not checked"


def find(
    query: str = "",
    *,
    family: str | list[str] | None = None,
    tier: str | list[str] | None = None,
    area: str | list[str] | None = None,
    contract: str | list[str] | None = None,
    verdict: str | list[str] | None = None,
    similar: str | None = None,
    recent: bool = False,
    semantic: bool = False,
    limit: int | None = LIMIT,
) -> list[Hit]:
    """The cards that answer `query` and pass the filters, best first; without a query, all that pass, by slug.

    A filter takes one value or several, of which any may match. `similar` ranks by the text of another card. `recent` puts the
    newest of what was found first. `semantic` also compares meanings, with the lab's sentence encoder. `limit` None is all.
    Raises UsageError for a value that is not known.

    >>> find("8-bit integer matrix multiplication with outlier features")[0].card.slug
    'llm-int8'
    """
    if query.strip() and similar:
        raise UsageError("give a query or similar, not both")
    if limit is not None and limit < 1:
        raise UsageError(f"limit must be at least 1, not {limit}")
    index = _index.load()
    allowed = _allowed(index, family, tier, area, contract, verdict)
    if similar:
        mine = _position(similar)
        allowed.discard(mine)
        query = own_text(index["cards"][mine])
    ranked = _ranked(query, index, semantic) if query.strip() else [(position, 0.0) for position in range(len(index["cards"]))]
    ranked = [(position, score) for position, score in ranked if position in allowed]
    if recent and not query.strip():
        ranked = _newest_first(index, ranked)
    ranked = ranked[:limit]
    if recent:
        ranked = _newest_first(index, ranked)
    return [_hit(index, position, score) for position, score in ranked]


def own_text(table: dict) -> str:
    """What a card is about, as a query for others like it."""
    return f"{table['title']}. {table['summary']} {table['mechanism']}"


def _ranked(query: str, index: dict, semantic: bool) -> list[tuple[int, float]]:
    from formulary.catalogue._search import rank

    ranked = rank(query, index)
    if semantic:
        from formulary.catalogue._semantic import rerank

        ranked = rerank(query, index, ranked)
    return ranked


def _position(slug: str) -> int:
    slugs = _index.load()["slugs"]
    wanted = slug.strip().lower().replace("_", "-").removeprefix("paper-")
    if wanted not in slugs:
        raise UsageError(f"no paper {slug!r} in the catalogue{nearest(wanted, slugs)}")
    return slugs.index(wanted)


def _verdict_of(index: dict, slug: str) -> str:
    """The verdict without its reason: one of VERDICTS."""
    written = index["records"].get(slug, {}).get("verdict", "not checked")
    return next(known for known in VERDICTS if written.startswith(known))


def _allowed(index: dict, family, tier, area, contract, verdict) -> set[int]:
    families = _choice("family", family, FAMILIES, lambda value: value.lower().replace("-", "_"))
    tiers = _choice("tier", tier, TIERS, str.upper)
    areas = _choice("area", area, AREAS, lambda value: value.lower().replace("_", "-"))
    contracts = _choice("contract", contract, CONTRACTS, str.lower)
    verdicts = _choice("verdict", verdict, VERDICTS, lambda value: value.lower().replace("-", " ").replace("_", " "))
    return {
        position
        for position, table in enumerate(index["cards"])
        if (not families or table["family"] in families)
        and (not tiers or table["tier"] in tiers)
        and (not areas or table["area"] in areas)
        and (not contracts or set(table["contract"]) & contracts)
        and (not verdicts or _verdict_of(index, table["slug"]) in verdicts)
    }


def _choice(name: str, values, known: tuple[str, ...], plain) -> set[str]:
    """The wanted values of one filter; an empty set when it is not used."""
    chosen = set()
    for value in [values] if isinstance(values, str) else values or ():
        if plain(value) not in known:
            raise UsageError(f"unknown {name} {value!r}{nearest(plain(value), known)}; known: {', '.join(known)}")
        chosen.add(plain(value))
    return chosen


def _newest_first(index: dict, ranked: list[tuple[int, float]]) -> list[tuple[int, float]]:
    date = lambda table: table["published"] or str(table["year"])
    return sorted(ranked, key=lambda item: date(index["cards"][item[0]]), reverse=True)


def _hit(index: dict, position: int, score: float) -> Hit:
    table = index["cards"][position]
    return Hit(_index.as_card(table), score, _verdict_of(index, table["slug"]))
