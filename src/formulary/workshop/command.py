"""`use`, `compare` and `doctor` on the command line: declared here, imported heavily only when they run."""

import argparse
import sys
from typing import Any

from formulary.errors import UsageError


def _shared_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the method; may be repeated")
    parser.add_argument("--targets", action="append", default=[], metavar="GLOB", help="only parts with this dotted name or class; may be repeated")
    parser.add_argument("--ignore", action="append", default=[], metavar="GLOB", help="leave these parts alone; may be repeated")
    parser.add_argument("--data", help="text, JSONL, CSV, a folder of images, or lab:NAME")
    parser.add_argument("--labels", metavar="FIELD", help="the field of a CSV or JSONL that holds labels")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16; as stored when not given")
    parser.add_argument("--device", help="cpu, or cuda where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-length", type=int, help="tokens per sequence")
    parser.add_argument("--samples", type=int, help="how many items to calibrate or train on")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of paired timing (15)")
    parser.add_argument("--revision", help="of a hub model")


def _shared(args: argparse.Namespace) -> dict[str, Any]:
    from formulary.workshop.methods import parse_settings

    names = ("data", "labels", "dtype", "device", "seed", "batch_size", "max_length", "samples", "rounds", "revision")
    found = {name: getattr(args, name) for name in names}
    return {**found, "settings": parse_settings(args.set), "targets": tuple(args.targets), "ignore": tuple(args.ignore)}


def use_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("method", help="a method, or several joined by +")
    parser.add_argument("model", nargs="?", help="a directory, a hub id, or lab:minilm, lab:smollm2, lab:vit, lab:rxn")
    _shared_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="where to write the result; must not exist")
    parser.add_argument("--format", metavar="NAME", help="layout of the result: formulary, or compressed-tensors, which transformers reads alone")
    parser.add_argument("--max-loss", metavar="PERCENT", help="refuse a result that loses more of the main quality, such as 1%%")
    parser.add_argument("--stream", action="store_true", help="from disk to disk, one block at a time; done unasked if the model does not fit into memory")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, from headers alone")


def use(args: argparse.Namespace) -> None:
    """Apply a method to a model and measure it before and after."""
    from formulary.workshop.using import use as run

    outcome = run(
        args.method, args.model, out=args.out, format=args.format, max_loss=_percent(args.max_loss), dry_run=args.dry_run,
        stream=args.stream or None, **_shared(args),
    )  # fmt: skip
    _print(outcome, args.json)


def compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("methods", nargs="*", help="methods, each one or several joined by +")
    parser.add_argument("--model", required=True, help="a directory, a hub id, or lab:NAME")
    parser.add_argument("--training-free", action="store_true", help="every method that changes such a model without training")
    _shared_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="where to write the HTML report, the Pareto plot and the JSON; must not exist")


def compare(args: argparse.Namespace) -> None:
    """Measure several methods side by side on the same model and data."""
    from formulary.workshop.comparing import compare as run

    progress = None if args.json else lambda text: print(f"{text} ...", file=sys.stderr, flush=True)
    found = run(
        *args.methods, model=args.model, training_free=args.training_free, out=args.out, progress=progress, **_shared(args)
    )
    _print(found, args.json)


def doctor_arguments(parser: argparse.ArgumentParser) -> None:
    """Doctor takes nothing but --json."""


def doctor(args: argparse.Namespace) -> None:
    """Say what this machine offers and what that means for speed."""
    from formulary.workshop.doctor import examine

    _print(examine(), args.json)


def _print(result: Any, as_json: bool) -> None:
    import json

    text = json.dumps(_finite(result.as_dict()), indent=1, ensure_ascii=False, allow_nan=False) if as_json else str(result)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    """JSON has no NaN: such numbers become null."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _percent(text: str | None) -> float | None:
    """"1%" and "0.01" are both one per cent."""
    if text is None:
        return None
    try:
        value = float(text.rstrip("% ")) / (100 if text.rstrip().endswith("%") else 1)
    except ValueError:
        raise UsageError(f"--max-loss {text!r} must be a share such as 1% or 0.01") from None
    if not 0 <= value < 1:
        raise UsageError(f"--max-loss {text!r} must be between 0% and 100%")
    return value
