"""Every training-free method of the catalogue on three real models: CPU time against quality.

    python benchmarks/pareto.py [minilm smollm2 vit]      # tables and plots in docs/benchmarks

What `formulary compare --training-free` prints and draws, with the methods' own defaults (optin and the like may refuse), beside
`unchanged`, a plain cast to bf16, and what joins well.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

import side_by_side

import formulary
from formulary.workshop import tables

MODELS = {
    "minilm": ("MiniLM, a sentence encoder", ("deepspeed-inference+llm-int8",)),
    "smollm2": ("SmolLM2-135M, a language model", ("deepspeed-inference+llm-int8",)),
    "vit": ("ViT-S/14, a vision encoder", ("gtp-vit+llm-int8", "deepspeed-inference+llm-int8")),
}


def section(name: str, rounds: int) -> str:
    """The comparison of one model as Markdown; its plot goes to docs/benchmarks."""
    title, joined = MODELS[name]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report")
        say = lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True)
        found = formulary.compare(*joined, model=f"lab:{name}", training_free=True, rounds=rounds, out=out, progress=say)
        shutil.copyfile(out / "pareto.png", side_by_side.DOCS / f"pareto-{name}.png")
    front = ", ".join(row.name for row in found.rows if row.name in found.front())
    lines = [f"## {title}", "", f"![](pareto-{name}.png)", "", tables.as_markdown(found.rows), "", f"Beaten by nobody in both time and quality: {front}."]
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
    head = f"# Pareto: {__doc__.splitlines()[0]}\n\n`python benchmarks/pareto.py` on {side_by_side.machine()}.\n\n"
    text = head + "\n".join(section(name, options.rounds) for name in options.models)
    (side_by_side.DOCS / "pareto.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
