"""One floor per family, one room per paper. A room is discovered by its `card.toml`; nothing else names it."""
