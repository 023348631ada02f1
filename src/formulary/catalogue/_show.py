"""The page of one paper, for a terminal: 80 columns, plain unless colors are asked for."""

import textwrap

from formulary.catalogue._card import Card
from formulary.catalogue._find import card as find_card
from formulary.catalogue._find import record as find_record
from formulary.catalogue._index import load
from formulary.catalogue.rooms import exports, has_code, parameters

WIDTH = 80
COMMANDS = {
    "attention": "formulary use {slug} MODEL --data DATA --out DIR",
    "layer": "formulary use {slug} MODEL --data DATA --out DIR",
    "transform": "formulary use {slug} MODEL --data DATA --out DIR",
    "recipe": "formulary use {slug} MODEL --data DATA --out DIR",
    "probe": "formulary use {slug} MODEL --data DATA --out DIR",
    "model": "formulary use {slug} --data DATA --out DIR",
    "estimator": "formulary use {slug} --data TABLE.csv --out DIR",
    "study": "formulary use {slug} --out DIR",
}
DOES = {
    "attention": "sets it on your model in place of its attention, and measures before and after",
    "layer": "swaps it into your model, trains it on your data, and measures before and after",
    "transform": "applies it to your model, measures before and after, and saves the result",
    "recipe": "trains or fine-tunes your model with it",
    "probe": "looks into your model, which stays as it is, and writes tables and figures",
    "model": "trains it on your data, saves it, and predicts",
    "estimator": "fits your table and writes predictions",
    "study": "lists what it builds and draws the paper's figure",
}
BOLD, DIM, GREEN, RED, YELLOW, RESET = "\x1b[1m", "\x1b[2m", "\x1b[32m", "\x1b[31m", "\x1b[33m", "\x1b[0m"
COLORS = {"holds here": GREEN, "does not hold here": RED, "inconclusive": YELLOW}


def as_dict(slug: str) -> dict:
    """All that `show` knows of a paper, JSON-ready: the card's fields, `verdict`, `record` and `use_it`."""
    card, record = find_card(slug), find_record(slug)
    code = has_code(slug)
    usage = {
        "has_code": code,
        "commands": commands(card) if code else [],
        "import": _import_line(card) if code else None,
        "parameters": {name: [vars(p) for p in found] for name, found in parameters(slug).items()} if code else {},
    }
    return {**card.as_dict(), "verdict": record["verdict"] if record else "not checked", "record": record, "use_it": usage}


def commands(card: Card) -> list[str]:
    """The command lines that use a paper, one for each different form that its contracts have."""
    return list(dict.fromkeys(COMMANDS[contract].format(slug=card.slug) for contract in card.contract))


def page(slug: str, *, color: bool = False) -> str:
    """The page as text, no line wider than 80 columns where a word allows it."""
    card, record = find_card(slug), find_record(slug)
    paint = (lambda text, code: f"{code}{text}{RESET}") if color else (lambda text, code: text)
    blocks = [
        "\n".join(paint(line, BOLD) for line in _wrap(card.title).splitlines()),
        "\n".join(_wrap(line) for line in _facts(card)),
        _wrap(card.summary),
        f"{paint('How it works', BOLD)}\n{_wrap(card.mechanism, 2)}",
        f"{paint('What it claims', BOLD)}\n{_wrap(card.claim, 2)}",
        f"{paint('What was measured', BOLD)}\n" + "\n".join(_measured(card, record, paint)),
        f"{paint('How to use it', BOLD)}\n" + "\n".join(_usage(card)),
    ]
    return "\n\n".join(blocks) + "\n"


def results(hits: list, *, color: bool = False) -> str:
    """What `find` prints: a number, the slug and the facts, the title and the start of the summary of each card."""
    paint = (lambda text, code: f"{code}{text}{RESET}") if color else (lambda text, code: text)
    blocks = []
    for number, hit in enumerate(hits, 1):
        facts = f"{hit.card.family}, tier {hit.card.tier}, {'/'.join(hit.card.contract) or 'card only'}, {hit.card.date}"
        lines = [f"{number:>2}  {paint(hit.card.slug, BOLD)}  {paint(hit.verdict, COLORS.get(hit.verdict, DIM))}"]
        lines += [_wrap(hit.card.title, 4), paint(_wrap(facts, 4), DIM), _wrap(_first_sentence(hit.card.summary), 4)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks) + "\n"


def _facts(card: Card) -> list[str]:
    authors = f"{card.authors} author{'s' if card.authors != 1 else ''}, " if card.authors else ""
    arxiv = f", arXiv:{card.arxiv}" if card.arxiv else ""
    contract = f"contract {', '.join(card.contract)}" if card.contract else "card only"
    by = f" ({card.organization})" if card.organization else ""
    return [
        f"{card.slug}: {authors}{card.date}{by}{arxiv}",
        f"family {card.family}, tier {card.tier}, {contract}, {card.kind} for {card.area}",
    ]


def _measured(card: Card, record: dict | None, paint) -> list[str]:
    if not record:
        if not card.contract:
            return ["  Not checked: a card only."]
        return ["  Not checked." + (f" `formulary check {card.slug}` runs the experiment." if has_code(card.slug) else " No code yet."), *_proposal(card)]
    verdict = record["verdict"]
    seeds = f", {record['seeds']} seeds" if record.get("seeds") else ""
    version = f", check version {record['version']}" if record.get("version") is not None else ""
    lines = [f"  {paint(verdict, COLORS.get(verdict, BOLD))}  ({str(record.get('date', 'no date'))[:10]}{seeds}{version})"]
    if record.get("claim"):
        lines.append(_wrap(f"tested: {record['claim']}", 2))
    lines += [_wrap(_numbers(predicate), 4, first=2, mark="- ") for predicate in record["predicates"]]
    lines += [_wrap(reason, 4, first=2, mark="- ") for reason in record["reasons"] if reason != record.get("why")]
    if record.get("why"):
        lines.append(_wrap(f"why: {record['why']}", 2))
    planted = [f"planted {name}: {record[key]['verdict']}" for key, name in (("null", "null"), ("oracle", "positive")) if (record.get(key) or {}).get("verdict")]
    if planted:
        lines.append(_wrap("; ".join(planted), 2))
    if record.get("scope"):
        lines.append(_wrap(f"The verdict is about {record['scope']}.", 2))
    return lines


def _numbers(predicate: dict) -> str:
    verdict = f": {predicate['verdict']}" if predicate.get("verdict") else ""
    if predicate.get("sentence"):
        return f"{predicate['sentence']}{verdict}"
    what = predicate.get("of") or predicate.get("text") or predicate.get("kind") or "prediction"
    if predicate.get("estimate") is None:
        return f"{what}{verdict}"
    return f"{what} {predicate['estimate']} [{predicate.get('low')}, {predicate.get('high')}]{verdict}"


def _proposal(card: Card) -> list[str]:
    return [_wrap(f"Proposed: {card.small_check}", 2)]


def _usage(card: Card) -> list[str]:
    lines = [_wrap(card.use, 2)]
    if has_code(card.slug):
        lines += [f"  {command}" for command in commands(card)]
        lines += [_wrap(f"{contract}: {DOES[contract]}", 6, first=4) for contract in card.contract]
        lines.append(f"  {_import_line(card)}")
        for name, found in parameters(card.slug).items():
            if found:
                lines.append(f"  parameters of {name} (--set NAME=VALUE):")
                lines += [f"    {p.name}{f': {p.type}' if p.type else ''}{'' if p.default is None else f' = {p.default}'}" for p in found]
    elif card.contract:
        lines.append(_wrap(f"No code here yet: `formulary new {card.slug}` starts the room.", 2))
    if card.library:
        lines.append(_wrap(f"also in: {card.library}", 2))
    if card.repo:
        lines.append(_wrap(f"the authors' code: github.com/{card.repo}" if card.repo.count("/") == 1 else f"the authors' code: {card.repo}", 2))
    return lines


def _import_line(card: Card) -> str:
    return f"from formulary.papers.{card.family}.{card.room} import {', '.join(exports(card.slug))}"


def _wrap(text: str, indent: int = 0, *, first: int | None = None, mark: str = "") -> str:
    start = " " * (indent if first is None else first) + mark
    return textwrap.fill(" ".join(text.split()), WIDTH, initial_indent=start, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _first_sentence(text: str) -> str:
    import re

    return re.split(r"(?<=[.!?])\s+(?=[A-Z])", text.strip(), maxsplit=1)[0]


def known() -> list[str]:
    """Every slug, for completion on the command line."""
    return load()["slugs"]
