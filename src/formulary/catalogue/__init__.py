"""The catalogue: cards of all papers, and finding them. Imports nothing beyond the standard library.

>>> from formulary import catalogue
>>> catalogue.card("gptq").family
'quantization'
>>> catalogue.find("shift the attention windows between layers", family="backbone")[0].card.slug
'swin'
"""

from formulary.catalogue._card import AREAS, CONTRACTS, FAMILIES, KINDS, TIERS, VERDICTS, Card
from formulary.catalogue._find import Hit, card, cards, find, record, verdict

show = card
search = find

__all__ = [
    "AREAS",
    "CONTRACTS",
    "FAMILIES",
    "KINDS",
    "TIERS",
    "VERDICTS",
    "Card",
    "Hit",
    "card",
    "cards",
    "find",
    "record",
    "search",
    "show",
    "verdict",
]
