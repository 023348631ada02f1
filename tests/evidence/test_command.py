"""The verb `check`: what it prints, draws, refuses and returns."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from formulary.errors import FormularyError, UsageError
from formulary.evidence import Check, Outcome, all_of, at_most, draw, exact, no_worse, run_check, speedup
from formulary.evidence import _turns
from formulary.evidence import command as module
from formulary.evidence._run import checked_slugs, find_room
from formulary.evidence.command import _plots, check_command, report

CHECK = Check(
    claim="half is at most 0.7 of whole",
    setup=lambda seed: [3.0 + 0.1 * seed + i for i in range(5)],
    arms={
        "half": lambda c: Outcome({"loss, nats": [v / 2 for v in c], "error": [1e-7]}, budget={"parameters": 10}),
        "whole": lambda c: Outcome({"loss, nats": c}, budget={"parameters": 10}),
    },
    holds=all_of(at_most("half", "whole", ratio=0.7, metric="loss, nats"), exact("half", tol=1e-6, metric="error")),
    items="same",
    redraws="an offset",
    seeds=5,
)


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.setenv("FORMULARY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    room = tmp_path / "room"
    room.mkdir()
    (room / "check.py").write_text("")
    return partial(check_command, run=lambda slug, **options: run_check(CHECK, slug=slug, room=room, **options))


def test_one_check_prints_its_report_draws_its_picture_and_records(command, capsys):
    assert command("gptq", record=True) == 0
    text = capsys.readouterr().out
    assert text.startswith("gptq: holds here\n  claim: half is at most 0.7 of whole\n")
    assert "half / whole loss 0.5 [0.5, 0.5], predicted <= 0.7: holds here" in text
    assert "planted null: does not hold here" in text and "planted positive: holds here" in text
    assert "smallest effect it could have seen (80 % power)" in text
    assert "plot: formulary-check-gptq.png" in text
    assert Path("formulary-check-gptq.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(Path("room/record.json").read_text())["verdict"] == "holds here"


def test_every_seed_is_in_the_report(command):
    text = report(run_check(CHECK, slug="gptq"))
    rows = [line.split() for line in text.splitlines()]
    assert ["seed", "0", "1", "2", "3", "4"] in rows
    assert ["half", "2.5", "2.55", "2.6", "2.65", "2.7"] in rows
    assert "parameters" in text and "within 5 % of each other" in text


def test_json_is_the_record_alone(command, capsys):
    assert command("gptq", as_json=True, out="other.svg") == 0
    out = capsys.readouterr()
    assert json.loads(out.out)["verdict"] == "holds here"
    assert Path("other.svg").read_text().lstrip().startswith("<?xml")


def test_exploring_says_so_and_is_not_recorded(command, capsys):
    command("gptq", seeds=3)
    assert "exploratory, not recorded: holds here" in capsys.readouterr().out
    with pytest.raises(UsageError, match="--seeds explores"):
        command("gptq", seeds=3, record=True)
    assert not Path("room/record.json").exists()


def test_several_checks_go_on_past_one_that_is_refused(capsys):
    slugs, made = checked_slugs(), run_check(CHECK, slug="made-up")
    assert slugs

    def run(slug, **options):
        if slug == slugs[0]:
            raise FormularyError("not today")
        return {**made, "slug": slug}

    assert check_command(everything=True, run=run) == 1
    out = capsys.readouterr()
    assert f"{slugs[0]}: error: not today" in out.err
    assert "error: not today" in out.out
    assert out.out.count("planted null:") == len(slugs) - 1


def test_several_checks_run_in_processes_of_their_own_two_at_once(tmp_path, monkeypatch, capsys):
    made, log = run_check(CHECK, slug="made-up"), tmp_path / "log"
    slugs = ["one", "two", "broken"]
    body = f"""
import json, os, pathlib, sys, time
slug, log = sys.argv[2], pathlib.Path({str(log)!r})
with log.open("a") as file: file.write(f"start {{slug}}\\n")
for _ in range(1000):
    if log.read_text().count("start") > 1: break
    time.sleep(0.02)
with log.open("a") as file: file.write(f"end {{slug}}\\n")
if slug == "broken" or not os.path.isdir(os.environ["FORMULARY_TURNS"]): sys.exit(3)
print(json.dumps({{**json.loads({json.dumps(json.dumps(made))}), "slug": slug}}))
"""
    monkeypatch.setattr(module, "PROGRAM", (sys.executable, "-c", body, "check"))
    monkeypatch.setattr("formulary.evidence._run.checked_slugs", lambda family=None: slugs)
    assert check_command(everything=True, workers=2) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()[-4:]
    assert all(line.startswith(slug) for line, slug in zip(lines, slugs)) and lines[0].split()[1:4] == ["holds", "here", "0"]
    assert "exit code 3" in lines[2] and lines[3].startswith("3 checks")
    assert log.read_text().splitlines()[:2] in (["start one", "start two"], ["start two", "start one"]), "two at once"


def test_checks_that_run_at_once_compute_together_and_time_alone(tmp_path):
    body = """
import sys, time
from formulary.evidence import _turns
step = {"compute": _turns.computing, "time": _turns.timing}[sys.argv[1]]
print("ready", flush=True)
input()
for _ in range(8):
    with step():
        start = time.monotonic()
        time.sleep(0.03)
        print(start, time.monotonic(), flush=True)
"""
    kinds = ["compute", "compute", "time", "time"]
    start = lambda kind: subprocess.Popen(
        [sys.executable, "-c", body, kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **_turns.environment(str(tmp_path))},
    )  # fmt: skip
    processes = [start(kind) for kind in kinds]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    spans = [[tuple(map(float, line.split())) for line in process.communicate()[0].splitlines()] for process in processes]
    overlap = lambda a, b: max(a[0], b[0]) < min(a[1], b[1])
    assert [len(one) for one in spans] == [8] * 4
    assert any(overlap(a, b) for a in spans[0] for b in spans[1]), "computing goes on side by side"
    for index, kind in enumerate(kinds):
        if kind == "time":
            others = [span for other, one in enumerate(spans) if other != index for span in one]
            assert not any(overlap(a, b) for a in spans[index] for b in others)


def test_ctrl_c_stops_every_process_of_several(tmp_path, monkeypatch):
    body = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler); print(1, flush=True); time.sleep(60)"
    processes = module._Processes({})
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(processes.output, [sys.executable, "-c", body]) for _ in range(2)]
        while len(processes.running) < 2:
            time.sleep(0.01)
        time.sleep(0.5)
        processes.stop()
        assert [future.result()[1] != 0 for future in futures] == [True, True]
    assert processes.output([sys.executable, "-c", "print(1)"])[0] == "", "nothing starts afterwards"


def test_a_check_whose_parent_was_killed_stops_before_its_next_step(tmp_path):
    child = """
import os, pathlib, sys, time
from formulary.evidence import _turns
for _ in range(600):
    with _turns.computing():
        pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
        time.sleep(0.05)
"""
    parent = """
import sys
from formulary.evidence import _turns, command
command._Processes(_turns.environment(sys.argv[1])).output([sys.executable, "-c", sys.argv[2], sys.argv[1] + "/pid"])
"""
    started = subprocess.Popen([sys.executable, "-c", parent, str(tmp_path), child], stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    started.kill()
    started.wait()
    deadline = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    went_on = _alive(pid)
    if went_on:
        os.kill(pid, signal.SIGKILL)
    assert not went_on


def _alive(pid: int) -> bool:
    """Whether a process runs, and is not merely waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("options", [{"slug": "gptq", "workers": 2}, {"everything": True, "workers": 0}])
def test_workers_belong_to_several_checks(options):
    with pytest.raises(UsageError, match="--workers"):
        check_command(**options)


def test_several_checks_draw_into_a_directory(tmp_path):
    assert _plots(["a", "b"], True, tmp_path / "new") == {
        n: tmp_path / "new" / f"formulary-check-{n}.png" for n in "ab"
    }
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        _plots(["a", "b"], True, tmp_path / "file")


def test_ctrl_c_says_that_the_finished_part_is_kept(capsys):
    def run(slug, **options):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_command("gptq", run=run, out="x.png")
    assert "the same command goes on from there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "name one paper"),
        ({"slug": "gptq", "everything": True}, "name one paper"),
        ({"slug": "gptq", "out": "x.doc"}, "must end in"),
        ({"family": "quantisation"}, "did you mean 'quantization'"),
        ({"slug": "gtpq"}, "did you mean 'gptq'"),
    ],
)
def test_wrong_usage(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=said):
        check_command(**options)


def test_a_picture_that_cannot_be_written_is_refused_before_the_run(tmp_path):
    with pytest.raises(FormularyError, match="not writable"):
        check_command("gptq", out=tmp_path / "nowhere" / "x.png", run=lambda *a, **k: pytest.fail("it ran"))


def test_a_room_is_found_by_either_spelling():
    assert find_room("llm-int8") == find_room("llm_int8")
    assert find_room("llm-int8").name == "llm_int8"


@pytest.mark.parametrize(
    "check",
    [
        CHECK,
        Check(
            claim="noisy",
            setup=lambda seed: seed,
            arms={"a": lambda s: [float("nan")] if s == 1 else [1.0], "b": lambda s: [2.0 + s]},
            holds=no_worse("a", "b", margin=1),
            seeds=5,
        ),
        Check(
            claim="quick",
            setup=lambda seed: seed,
            arms={
                "a": lambda s: {"CPU seconds": [1.0 + 0.01 * i for i in range(15)]},
                "b": lambda s: {"CPU seconds": [2.0] * 15},
            },
            holds=speedup("a", "b"),
            seeds=5,
        ),
        Check.not_testable("too big", claim="large", smaller=CHECK),
    ],
    ids=["several", "failed", "speedup", "smaller"],
)
def test_every_kind_of_record_can_be_drawn_and_told(check, tmp_path):
    record = run_check(check, slug="made-up")
    assert draw(record, tmp_path / "p.png").stat().st_size > 10_000
    assert record["verdict"] in report(record)


def test_nothing_measured_is_not_drawn(tmp_path):
    with pytest.raises(FormularyError, match="nothing to draw"):
        draw(run_check(Check.not_testable("too big", claim="large"), slug="made-up"), tmp_path / "p.png")


def test_importing_evidence_loads_nothing_heavy():
    heavy = {"torch", "scipy", "matplotlib", "rich", "transformers"}
    code = f"import sys, formulary.evidence; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout == "[]\n"
