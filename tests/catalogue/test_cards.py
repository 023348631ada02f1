"""Every card is valid, and every way of being wrong is one line with the card's name."""

import tomllib

import pytest

from formulary.catalogue import _card, _new
from formulary.errors import UsageError

GOOD = _new._new_card("some-paper", {"family": "pruning", "title": "Some paper", "contract": ["transform"], "arxiv": "2401.12345"})


def table(**changes):
    facts = {key: value for key, value in GOOD.as_dict().items() if value is not None} | changes
    return {key: value for key, value in facts.items() if value != "DELETE"}


def put(papers, text=None, family="pruning", room="some_paper", **changes):
    folder = papers / family / room
    folder.mkdir(parents=True)
    if text is None:
        text = _new.card_toml(_card.Card(**{**table(**changes), "contract": tuple(changes.get("contract", ("transform",)))}))
    (folder / "card.toml").write_text(text, encoding="utf8")


def test_every_card_is_valid_and_in_its_place():
    found = _card.read_cards()
    assert len(found) >= 315
    for slug, card in found.items():
        path = _card.PAPERS / card.family / card.room / "card.toml"
        assert tomllib.loads(path.read_text("utf8"))["slug"] == slug
    assert {card.tier for card in found.values() if card.contract} <= {"A", "B", "C"}


def test_every_family_with_a_card_is_a_package():
    families = {card.family for card in _card.read_cards().values()}
    assert all((_card.PAPERS / family / "__init__.py").is_file() for family in families)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"summry": "x"}, "unknown field 'summry'; did you mean 'summary'"),
        ({"title": "DELETE"}, "missing title"),
        ({"claim": "DELETE", "loc": "DELETE"}, "missing claim, loc"),
        ({"year": "2024"}, "year must be a whole number"),
        ({"year": True}, "year must be a whole number"),
        ({"loc": -1}, "loc must not be negative"),
        ({"title": " "}, "title is empty"),
        ({"contract": "transform"}, "contract must be an array of strings"),
        ({"contract": ["transfrom"]}, "unknown contract 'transfrom'; did you mean 'transform'"),
        ({"contract": ["layer", "layer"]}, "named twice"),
        ({"family": "prunning"}, "unknown family 'prunning'; did you mean 'pruning'"),
        ({"tier": "E"}, "unknown tier 'E'"),
        ({"area": "txt"}, "unknown area 'txt'; did you mean 'text'"),
        ({"kind": "methods"}, "unknown kind 'methods'; did you mean 'method'"),
        ({"published": "2024-1"}, "bad date '2024-1'"),
        ({"published": "2024-13"}, "bad date '2024-13'"),
        ({"published": "2023-02-29"}, "bad date '2023-02-29'"),
        ({"published": "2023-12"}, "published 2023-12 is not in the year 2024"),
        ({"arxiv": "2401-12345"}, "is not an arXiv id"),
        ({"slug": "Some_Paper"}, "slug 'Some_Paper' must be"),
        ({"tier": "D"}, "tier D is a card alone"),
    ],
)
def test_a_wrong_card_is_one_line_with_its_name(changes, said):
    with pytest.raises(UsageError) as caught:
        _card.parse_card(table(**changes), "some-paper")
    assert str(caught.value).startswith("card some-paper: ") and said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_leap_day_is_a_date():
    assert _card.parse_card(table(published="2024-02-29"), "some-paper").published == "2024-02-29"


def test_a_card_survives_being_written_as_toml(tmp_path):
    odd = GOOD.as_dict() | {"title": 'A "quoted" \\ title\nof Schrödinger', "contract": ("layer", "attention")}
    card = _card.Card(**odd)
    again = tomllib.loads(_new.card_toml(card))
    assert _card.parse_card(again, "some-paper") == card


def test_a_folder_must_match_its_slug_and_family(tmp_path):
    put(tmp_path / "a", room="other_paper")
    with pytest.raises(UsageError, match="card other_paper: the folder of slug 'some-paper' must be named some_paper"):
        _card.read_cards(tmp_path / "a")
    put(tmp_path / "b", family="backbone")
    with pytest.raises(UsageError, match="card some_paper: family 'pruning' but the folder is in backbone"):
        _card.read_cards(tmp_path / "b")


def test_a_slug_may_be_used_once(tmp_path):
    put(tmp_path)
    put(tmp_path, family="quantization", text=_new.card_toml(_card.Card(**table(family="quantization", contract=("transform",)))))
    with pytest.raises(UsageError, match="card some-paper: the slug is used twice, in pruning and in quantization"):
        _card.read_cards(tmp_path)


def test_broken_toml_names_the_card(tmp_path):
    put(tmp_path, text="slug = \n")
    with pytest.raises(UsageError, match="card some_paper: card.toml is not valid TOML"):
        _card.read_cards(tmp_path)


def test_a_slug_that_starts_with_a_digit_lives_in_a_paper_folder():
    assert _card.read_cards()["3mt"].room == "paper_3mt"
