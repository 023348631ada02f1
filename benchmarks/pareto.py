"""Every training-free method of the catalogue on three real models: CPU time against quality.

    python benchmarks/pareto.py [minilm vit smollm2]      # a page and a plot for each in docs/benchmarks, as soon as it is done

What `formulary compare --training-free` prints and draws, with the methods' own defaults (those that need labels may refuse), beside
`unchanged`, a plain cast to bf16, and what joins well. On SmolLM2, axformer tries whole attentions and feed-forwards alone, and judges
them by 8 texts: at its defaults it makes some 700 passes over 32, which takes hours.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path

import side_by_side

import formulary
from formulary.workshop import tables

MODELS = {
    "minilm": ("MiniLM, a sentence encoder", ("deepspeed-inference+llm-int8",), {}),
    "vit": ("ViT-S/14, a vision encoder", ("gtp-vit+llm-int8", "deepspeed-inference+llm-int8"), {}),
    "smollm2": ("SmolLM2-135M, a language model", ("deepspeed-inference+llm-int8",), {"axformer.items": 8, "axformer.inspect": 1.0}),
}


def page(name: str, rounds: int) -> str:
    """The comparison of one model as Markdown; its plot goes to docs/benchmarks."""
    title, joined, settings = MODELS[name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report")
        say = lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True)
        found = formulary.compare(*joined, model=f"lab:{name}", training_free=True, rounds=rounds, settings=settings, out=out, progress=say)
        shutil.copyfile(out / "pareto.png", side_by_side.DOCS / f"pareto-{name}.png")
    front = ", ".join(row.name for row in found.rows if row.name in found.front())
    minutes = (time.monotonic() - started) / 60
    made = f"`python benchmarks/pareto.py {name} --rounds {rounds}` on {side_by_side.machine()}, in {minutes:.0f} minutes."
    made += f" Settings: {', '.join(f'{key}={value}' for key, value in settings.items())}." if settings else ""
    lines = [f"# Pareto: every training-free method on {title}", "", made, "", f"![](pareto-{name}.png)", "", tables.as_markdown(found.rows), "", f"Beaten by nobody in both time and quality: {front}."]
    said = [f"- {row.name} is not faster: {row.why_not_faster}" for row in found.rows if row.why_not_faster]
    said += [f"- {method} refused: {why}" for method, why in found.refused.items()]
    said += [f"- {method}: {line}" for method, line in found.headlines.items()]
    return "\n".join([*lines, "", *said, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    side_by_side.DOCS.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        text = page(name, options.rounds)
        (side_by_side.DOCS / f"pareto-{name}.md").write_text(text)
        print(text, flush=True)


if __name__ == "__main__":
    main()
