"""Ranked search over the cards: fielded BM25, with neighbouring word pairs deciding among the best.

The index holds, for each term, the cards it occurs in with a weight that already counts fields and their lengths, so that a query
only reads the lines of its own terms.

    score(q, card) = sum over terms t of q:  saturate(count of t in q, K3) * idf(t) * kind(t) * w / (w + K1)
    w(t, card)     = sum over fields f:      FIELDS[f] * count of t in f / (1 - B + B * length of f / mean length of f)

after Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009), eq. 3.15 to 3.18.
"""

import math
from collections import Counter

from formulary.catalogue._text import pairs, terms

FIELDS = {"slug": 4.5, "title": 3.0, "summary": 4.0, "mechanism": 1.5, "claim": 2.5, "use": 0.8, "small_check": 0.3, "facets": 0.75}
K1 = 4.5
K3 = 1.8
B = 0.3
CONCEPT_WEIGHT = 0.35
PAIR_WEIGHT = 0.3
PAIR_DEPTH = 30


def card_text(card: dict, field: str) -> str:
    """The searched text of one field; `facets` is where the card belongs."""
    if field == "facets":
        return " ".join((card["family"], card["area"], card["kind"], *card["contract"])).replace("_", " ")
    return card.get(field) or ""


def postings(cards: list[dict]) -> dict[str, str]:
    """Term -> `"card:weight card:weight ..."`, weights in hundredths. `cards` are as `Card.as_dict` gives them."""
    counts = {field: [Counter(terms(card_text(card, field))) for card in cards] for field in FIELDS}
    weights: dict[str, dict[int, float]] = {}
    for field, weight in FIELDS.items():
        lengths = [sum(counter.values()) for counter in counts[field]]
        mean = max(sum(lengths) / max(len(lengths), 1), 1)
        for position, counter in enumerate(counts[field]):
            norm = weight / (1 - B + B * lengths[position] / mean)
            for term, count in counter.items():
                row = weights.setdefault(term, {})
                row[position] = row.get(position, 0.0) + norm * count
    return {
        term: " ".join(f"{position}:{max(round(100 * weight), 1)}" for position, weight in sorted(row.items()))
        for term, row in sorted(weights.items())
    }


def scores(query: str, index: dict) -> dict[int, float]:
    """The score of every card that shares a term with `query`, by position in the index."""
    total: dict[int, float] = {}
    count = len(index["cards"])
    for term, repeats in Counter(terms(query)).items():
        line = index["postings"].get(term)
        if line is None:
            continue
        row = line.split(" ")
        idf = math.log(1 + (count - len(row) + 0.5) / (len(row) + 0.5))
        gain = idf * repeats * (K3 + 1) / (repeats + K3) * (CONCEPT_WEIGHT if term[0] == "=" else 1.0)
        for entry in row:
            position, _, weight = entry.partition(":")
            saturated = int(weight) / (int(weight) + 100 * K1)
            total[int(position)] = total.get(int(position), 0.0) + gain * saturated
    return total


def with_pairs(query: str, index: dict, total: dict[int, float]) -> dict[int, float]:
    """The best PAIR_DEPTH of `total`, raised for each neighbouring pair of words that they share with the query.

    A pair shared by few of the candidates counts for more, in the way of idf.
    """
    best = sorted(total, key=lambda position: (-total[position], position))[:PAIR_DEPTH]
    wanted = set(pairs(query))
    shared = {position: wanted & set(index["pairs"][position].split("|")) for position in best} if wanted else {}
    spread = Counter(pair for found in shared.values() for pair in found)
    raised = dict(total)
    for position, found in shared.items():
        raised[position] += PAIR_WEIGHT * sum(math.log(1 + PAIR_DEPTH / spread[pair]) for pair in found)
    return raised


def pair_lines(cards: list[dict]) -> list[str]:
    """For each card its distinct word pairs, joined by `|`."""
    fields = ("title", "summary", "mechanism", "claim", "use")
    return ["|".join(sorted({pair for field in fields for pair in pairs(card_text(card, field))})) for card in cards]


def rank(query: str, index: dict) -> list[tuple[int, float]]:
    """(position, score) of the cards that answer `query`, best first; ties in the order of the index."""
    total = with_pairs(query, index, scores(query, index))
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))
