"""The before/after table as text, as Markdown for a model card, and the headline above it."""

from formulary.workshop.measuring import Row


def columns(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table; a column that no row fills is left out."""
    names = list(dict.fromkeys(q.name for row in rows for q in row.qualities))
    heads = ["", "CPU time per item", "against unchanged"]
    cells = [[row.name, _seconds(row.seconds), _ratio(row.ratio)] for row in rows]
    if any(row.decode_seconds for row in rows):
        heads += ["CPU time per decoded token", "against unchanged"]
        for row, cell in zip(rows, cells):
            cell += [_seconds(row.decode_seconds), _ratio(row.decode_ratio)]
    heads += ["peak memory", "memory of the run", "weights on disk", *names]
    for row, cell in zip(rows, cells):
        by_name = {q.name: q for q in row.qualities}
        cell += [_bytes(row.memory), _bytes(row.run_memory), _bytes(row.disk), *(_quality(by_name.get(name)) for name in names)]
    keep = [i for i in range(len(heads)) if any(cell[i] != "-" for cell in cells)]
    return [heads[i] for i in keep], [[cell[i] for i in keep] for cell in cells]


def as_text(rows: list[Row]) -> str:
    """The table in plain columns; wide tables are turned so that each model is a column."""
    heads, cells = columns(rows)
    grid = [heads, *cells]
    if sum(max(len(row[i]) for row in grid) + 2 for i in range(len(heads))) > 100:
        grid = [list(column) for column in zip(*grid)]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in grid]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def as_markdown(rows: list[Row]) -> str:
    """The table as Markdown."""
    heads, cells = columns(rows)
    lines = ["| " + " | ".join(head or "model" for head in heads) + " |", "|" + " --- |" * len(heads)]
    return "\n".join(lines + ["| " + " | ".join(cell) + " |" for cell in cells])


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _ratio(ratio) -> str:
    """How many times as fast, with the interval; a tie is shown as one."""
    if ratio is None:
        return "-"
    fast, low, high = ratio.speedup
    text = f"{fast:.2f}x [{low:.2f}, {high:.2f}]"
    return f"tie ({text})" if ratio.verdict == "tie" else f"? ({text})" if ratio.verdict == "inconclusive" else text


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:.1f} MB"


def _quality(q) -> str:
    if q is None:
        return "-"
    estimate, low, high = q.interval()
    digits = 2 if abs(estimate) >= 10 else 4
    return f"{estimate:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def verdict_line(rows: list[Row]) -> str:
    """What the table says of its last row in one sentence: speed against fp32 and against bf16, size, quality."""
    row, by_name = rows[-1], {r.name: r for r in rows}
    said = []
    if row.ratio is not None:
        said.append(f"{_words(row.ratio)} unchanged")
        bf16 = by_name.get("bf16")
        if bf16 is not None and bf16.seconds and row.seconds:
            slower = row.seconds / bf16.seconds
            if slower > 1.03:
                said.append(f"{slower:.2f}x SLOWER than a plain bf16 cast")
            elif slower < 0.97:
                said.append(f"{1 / slower:.2f}x faster than a plain bf16 cast")
            else:
                said.append("as fast as a plain bf16 cast")
    if row.disk and rows[0].disk:
        said.append(f"{row.disk / rows[0].disk:.2f}x the bytes on disk")
    if row.qualities:
        main = row.qualities[0]
        said.append(f"{main.name} {_quality(main)}")
        plain = by_name.get("plain training")
        if plain is not None and plain is not row and plain.qualities:
            said.append(f"plain training {_quality(plain.qualities[0])}")
    return ", ".join(said)


def _words(ratio) -> str:
    fast = ratio.speedup[0]
    if ratio.verdict == "tie":
        return "as fast as"
    if ratio.verdict == "inconclusive":
        return "(timing inconclusive) against"
    return f"{fast:.2f}x faster than" if fast > 1 else f"{1 / fast:.2f}x SLOWER than"
