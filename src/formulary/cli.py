"""The command line. A verb is two small functions: one declares its arguments, one calls what does the work and prints.

Exit codes: 0 done, 1 a clear refusal, 2 wrong usage, 130 stopped by Ctrl-C. With `--json` a verb prints one JSON value, and an
error is `{"error": "..."}` on standard output beside its one line on standard error. It is built on argparse because typer imports
pydantic for any argument at all, and `find` and `show` must start in a fraction of a second in an environment that has nothing
else installed; for the same reason imports stay inside the functions.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from formulary.errors import FormularyError, UsageError, nearest
from formulary.workshop import command


def find_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("query", nargs="*", help="words, a sentence or a whole abstract; - reads standard input")
    for name, of in (("family", "quantization"), ("tier", "A"), ("area", "vision"), ("contract", "transform"), ("verdict", "'holds here'")):
        parser.add_argument(f"--{name}", action="append", metavar="NAME", help=f"only this {name}, such as {of}; may be repeated")
    parser.add_argument("--similar", metavar="SLUG", help="papers like this one")
    parser.add_argument("--recent", action="store_true", help="newest first")
    parser.add_argument("--semantic", action="store_true", help="also compare meanings, with the lab's sentence encoder")
    parser.add_argument("--limit", type=int, metavar="N", default=10, help="how many at most (10)")


def find(args: argparse.Namespace) -> None:
    """Find papers by words, filters, or likeness to another paper."""
    from formulary.catalogue import find as search
    from formulary.catalogue._show import results

    query = sys.stdin.read() if args.query == ["-"] else " ".join(args.query)
    filters = {name: getattr(args, name) for name in ("family", "tier", "area", "contract", "verdict", "similar", "recent", "semantic")}
    hits = search(query, limit=args.limit, **filters)
    if args.json:
        print_json({"query": query, "count": len(hits), "results": [{"rank": n, **hit.as_dict()} for n, hit in enumerate(hits, 1)]})
    else:
        echo(results(hits, color=colored()) if hits else "Nothing in the catalogue matches.\n")


def show_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slug", help="a paper, such as gptq")


def show(args: argparse.Namespace) -> None:
    """Show one paper: what it does and claims, what was measured, how to use it."""
    from formulary.catalogue import _show

    if args.json:
        print_json(_show.as_dict(args.slug))
    else:
        echo(_show.page(args.slug, color=colored()))


def check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slug", nargs="?", help="a paper, such as gptq")
    parser.add_argument("--all", action="store_true", help="every paper that has a check")
    parser.add_argument("--family", metavar="NAME", help="every paper of this family that has a check")
    parser.add_argument("--record", action="store_true", help="write the record into the paper's room")
    parser.add_argument("--fresh", action="store_true", help="start over instead of going on from an interrupted run")
    parser.add_argument("--seeds", type=int, metavar="N", help="explore with another number of seeds; never recorded")
    parser.add_argument("--out", metavar="PLOT", help="the picture; for several checks, a directory of them")
    parser.add_argument("--no-plot", action="store_true", help="draw no picture")
    parser.add_argument("--workers", type=int, metavar="N", help="how many of several checks run at once (as many as there are cores)")


def check(args: argparse.Namespace) -> int:
    """Run the experiment behind a paper's claim: every seed, an interval, a verdict, a plot."""
    from formulary.evidence.command import check_command

    options = {name: getattr(args, name) for name in ("family", "record", "fresh", "seeds", "out", "workers")}
    options["plot"] = not args.no_plot
    return check_command(args.slug, everything=args.all, as_json=args.json, **options)


def new_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("slug", help="a paper of the catalogue, or the name of one to add")
    for name in ("family", "title", "tier", "area", "arxiv"):
        parser.add_argument(f"--{name}", metavar="TEXT", help=f"the {name} of a paper that has no card yet")
    parser.add_argument("--contract", action="append", metavar="NAME", help="a contract of a paper that has no card yet; may be repeated")


def new(args: argparse.Namespace) -> None:
    """Start a paper's room: files whose tests fail until they are written. Never overwrites."""
    from formulary.catalogue._new import scaffold

    facts = {name: getattr(args, name) for name in ("family", "title", "tier", "area", "arxiv", "contract")}
    made = scaffold(args.slug, **facts)
    if args.json:
        print_json({"room": str(made.room), "written": list(made.written), "kept": list(made.kept)})
    else:
        echo(made.text())


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int | None]]] = {
    "find": (find_arguments, find),
    "show": (show_arguments, show),
    "check": (check_arguments, check),
    "use": (command.use_arguments, command.use),
    "compare": (command.compare_arguments, command.compare),
    "new": (new_arguments, new),
    "doctor": (command.doctor_arguments, command.doctor),
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UsageErrors in one line, with the nearest known option."""

    def error(self, message: str) -> NoReturn:
        options = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        unknown = [word for word in message.split() if word.startswith("--")] if message.startswith("unrecognized") else []
        hint = nearest(unknown[0].partition("=")[0], options) if unknown else ""
        raise UsageError(f"{message}{hint} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> NoReturn:
    """The `formulary` command; always ends by `sys.exit`."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        sys.exit(run(argv) or 0)
    except FormularyError as error:
        fail(f"error: {error}", error.exit_code, "--json" in argv)
    except NotImplementedError as error:
        fail(f"error: not written yet: {error}", 1, "--json" in argv)
    except KeyboardInterrupt:
        fail("stopped", 130, "--json" in argv)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def run(argv: list[str]) -> int | None:
    """Run one verb; returns its exit code, None for done."""
    if not argv or argv[0] in ("-h", "--help"):
        echo(overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        from formulary import __version__

        return echo(f"formulary {__version__}\n")
    if argv[0] not in VERBS:
        raise UsageError(f"no verb {argv[0]!r}{nearest(argv[0], VERBS)}; verbs: {', '.join(VERBS)}")
    declare, verb = VERBS[argv[0]]
    parser = Parser(prog=f"formulary {argv[0]}", description=verb.__doc__, allow_abbrev=False)
    declare(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return verb(parser.parse_intermixed_args(argv[1:]))


def overview() -> str:
    """What `formulary --help` prints: every verb with its first line."""
    rows = [f"  {name:<9}{(verb.__doc__ or '').splitlines()[0]}" for name, (_, verb) in VERBS.items()]
    about = "The Transformer literature as parts that can be used and claims that can be rerun."
    return "\n".join(["usage: formulary VERB ...", "", about, "", *rows, "", "formulary VERB --help says more.", ""])


def fail(line: str, code: int, as_json: bool) -> NoReturn:
    """End with one line on standard error, and the same as JSON on standard output when that was asked for."""
    line = " ".join(line.split())
    if as_json:
        print_json({"error": line.removeprefix("error: ")})
    print(line, file=sys.stderr)
    sys.exit(code)


def echo(text: str) -> None:
    """Write to standard output at once, so that a closed pipe is noticed here."""
    sys.stdout.write(text)
    sys.stdout.flush()


def print_json(value) -> None:
    """Write one readable JSON value."""
    import json

    echo(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def colored() -> bool:
    """Whether standard output is a terminal that wants colors."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


if __name__ == "__main__":
    main()
