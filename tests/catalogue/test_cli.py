"""`find`, `show` and `new` as a person types them."""

import json
import os
import subprocess
import sys

import pytest

from formulary import cli
from formulary.catalogue import _show, card, cards, find, rooms

HEAVY = ("torch", "transformers", "numpy", "pydantic", "scipy", "sklearn", "matplotlib", "rich", "typer", "jaxtyping")


def run(*args, **options):
    return subprocess.run([sys.executable, "-m", "formulary.cli", *args], capture_output=True, text=True, **options)


def call(capsys, *args) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.mark.parametrize("args", [["find", "long context"], ["show", "gptq"], ["find", "--verdict", "holds here"], ["--help"], ["show", "gtpq"]])
def test_finding_and_showing_import_nothing_heavy(args):
    code = f"import sys; from formulary import cli\ntry: cli.main({args!r})\nexcept SystemExit: pass\nprint([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "[]"


def test_find_prints_ranked_cards(capsys):
    code, out, err = call(capsys, "find", "8-bit", "matrix", "multiplication", "outlier", "features", "--limit", "3")
    assert code == 0 and not err
    assert out.splitlines()[0].split()[:2] == ["1", "llm-int8"] and "\n 3  " in out and "\n 4  " not in out
    assert "\x1b" not in out and max(map(len, out.splitlines())) <= 80


def test_find_takes_words_and_options_in_any_order(capsys):
    first = call(capsys, "find", "window", "--family", "backbone", "attention", "--json")
    second = call(capsys, "find", "--json", "--family=backbone", "window attention")
    assert first == second and json.loads(first[1])["query"] == "window attention"


def test_find_reads_an_abstract_from_standard_input():
    done = run("find", "-", "--json", "--limit", "1", input=card("swin").summary)
    assert done.returncode == 0 and json.loads(done.stdout)["results"][0]["slug"] == "swin"


def test_find_as_json_is_what_the_function_returns(capsys):
    code, out, _ = call(capsys, "find", "pruning", "--tier", "A", "--json")
    said = json.loads(out)
    assert code == 0 and said["count"] == len(said["results"]) == 10
    assert [entry["slug"] for entry in said["results"]] == [hit.card.slug for hit in find("pruning", tier="A")]
    assert said["results"][0]["rank"] == 1 and said["results"][0]["verdict"] in ("not checked", "holds here", "does not hold here", "inconclusive", "not testable here")


def test_nothing_found_is_said_and_is_no_error(capsys):
    assert call(capsys, "find", "zzqx") == (0, "Nothing in the catalogue matches.\n", "")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["fnd", "x"], "error: no verb 'fnd'; did you mean 'find'"),
        (["show", "gtpq"], "error: no paper 'gtpq' in the catalogue; did you mean 'gptq'?"),
        (["show"], "error: the following arguments are required: slug"),
        (["find", "x", "--familly", "y"], "did you mean '--family'"),
        (["find", "x", "--limit", "many"], "invalid int value: 'many'"),
        (["find", "x", "--limit", "0"], "limit must be at least 1"),
        (["find", "--area", "visoin"], "did you mean 'vision'"),
        (["new", "palm-2"], "tier D"),
        (["new", "nothing-known"], "give --family, --title, --contract"),
        (["new", "gptq", "--title", "x"], "has a card already"),
    ],
)
def test_wrong_usage_is_one_line_and_code_two(capsys, args, said):
    code, out, err = call(capsys, *args)
    assert code == 2 and not out and said in err and err.count("\n") == 1
    code, out, err = call(capsys, *args, "--json")
    assert code == 2 and said.removeprefix("error: ") in json.loads(out)["error"]


def test_a_refusal_is_code_one_and_ctrl_c_is_130(capsys, monkeypatch):
    from formulary.errors import FormularyError

    def refuse(args):
        raise FormularyError("no\nroom")

    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.VERBS, "show", (cli.show_arguments, refuse))
    assert call(capsys, "show", "gptq") == (1, "", "error: no room\n")
    monkeypatch.setitem(cli.VERBS, "show", (cli.show_arguments, stop))
    assert call(capsys, "show", "gptq") == (130, "", "stopped\n")


def test_a_defect_keeps_its_traceback(monkeypatch):
    def broken(args):
        raise ZeroDivisionError

    monkeypatch.setitem(cli.VERBS, "show", (cli.show_arguments, broken))
    with pytest.raises(ZeroDivisionError):
        cli.main(["show", "gptq"])


def test_a_closed_pipe_is_silent():
    line = f"{sys.executable} -m formulary.cli find --limit 315 | head -n 1"
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith(" 1  ") and done.stderr == ""


def test_help_lists_every_verb(capsys):
    code, out, _ = call(capsys, "--help")
    assert code == 0 and all(f"  {verb} " in out for verb in cli.VERBS)
    assert call(capsys)[0] == 2
    assert call(capsys, "--version")[1].startswith("formulary ")
    code, out, _ = call(capsys, "find", "--help")
    assert code == 0 and "--semantic" in out


def test_every_page_fits_eighty_columns_and_says_what_the_card_says():
    for slug, one in cards().items():
        page = _show.page(slug)
        plain = " ".join(page.split())
        assert " ".join(one.title.split()) in plain and " ".join(one.summary.split()) in plain and slug in plain
        assert "\x1b" not in page
        for line in page.splitlines():
            code = line.startswith(("  from formulary.papers", "  formulary use", "    "))
            assert len(line) <= 80 or len(line.split()) == 1 or (code and rooms.has_code(slug)), (slug, line)


def test_a_page_in_color_has_the_same_words(capsys):
    import re

    assert re.sub("\x1b\\[[0-9;]*m", "", _show.page("swin", color=True)) == _show.page("swin")


def test_a_page_shows_the_verdict_and_its_numbers(monkeypatch):
    record = {
        "verdict": "does not hold here", "date": "2026-11-21T10:00:00", "seeds": 8, "version": 3, "claim": "Twice as fast.", "reasons": ["underpowered: oracle missed"],
        "predicates": [{"of": "ratio", "estimate": 1.25, "low": 1.1, "high": 1.4, "verdict": "does not hold here"}, {"sentence": "loss 0.1 [0, 0.2]"}],
        "null": {"verdict": "inconclusive"}, "oracle": {"verdict": "holds here"}, "scope": "this one model",
    }  # fmt: skip
    monkeypatch.setattr(_show, "find_record", lambda slug: record)
    page = " ".join(_show.page("swin").split())
    for part in ("does not hold here (2026-11-21, 8 seeds, check version 3)", "ratio 1.25 [1.1, 1.4]", "loss 0.1 [0, 0.2]", "underpowered: oracle missed",
                 "planted null: inconclusive; planted positive: holds here", "this one model", "Twice as fast."):  # fmt: skip
        assert part in page, part


def test_show_as_json_holds_the_card(capsys):
    code, out, _ = call(capsys, "show", "llm_int8", "--json")
    said = json.loads(out)
    assert code == 0 and said["slug"] == "llm-int8" and said["contract"] == ["transform"] and "use_it" in said


def test_colors_only_on_a_terminal_that_wants_them(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert cli.colored()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not cli.colored()
    assert "\x1b" not in run("show", "swin", env=os.environ | {"TERM": "xterm"}).stdout
