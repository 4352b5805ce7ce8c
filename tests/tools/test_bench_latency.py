"""Latency beside peers: that processes take turns, that failures stay their own, and what is made of the figures."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qfx.models import MODELS
from qfx.targets import TARGETS
from qfx.tools import bench_latency, latency_child, latency_run
from qfx.tools.bench_calls import call, tensors
from qfx.tools.bench_figures import at_least, at_most
from qfx.tools.latency_bars import BARS, LatencyBar, judged
from qfx.tools.latency_candidates import CANDIDATES, EAGER, NOT_INSTALLED, PEERS, QFX, Ready, packages
from qfx.tools.latency_child import lowest_sqnr_db, prepared, quiet_environment
from qfx.tools.latency_result import Result, Row, result
from qfx.tools.latency_run import chosen, measured
from qfx.tools.latency_subject import ROWS, Subject, subject
from qfx.tools.latency_table import plain, text
from qfx.tools.latency_turns import Outcome, processes_in_turns

# --- taking turns, with real processes --------------------------------------------------------------------------------

FAKE = """
import json, os, sys, time
name, log, behaviour, at = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])

def note(what):
    with open(log, "a") as file:
        file.write(f"{what} {name} {os.getpid()}\\n")

def act(turn, answer):
    if turn != at:
        return answer
    if behaviour == "fail":
        return {"failed": "no luck"}
    if behaviour == "exit":
        sys.exit("the last word")
    if behaviour == "kill":
        os.kill(os.getpid(), 9)
    if behaviour == "hang":
        time.sleep(600)
    if behaviour == "talk":
        print("Welcome!")
    return answer

note("ready")
print(json.dumps(act(0, {"ready": {"threads": os.environ.get("OMP_NUM_THREADS")}})), flush=True)
for turn, line in enumerate(sys.stdin, 1):
    note("begin")
    time.sleep(0.02)
    note("end")
    print(json.dumps(act(turn, {"ms": [turn, json.loads(line)["seconds"]]})), flush=True)
"""


def fake(name: str, log: Path, behaviour: str = "work", at: int = 0) -> list[str]:
    """A child that does not load torch. ``behaviour`` is shown at its turn ``at``; 0: when it starts."""
    return [sys.executable, "-I", "-S", "-c", FAKE, name, str(log), behaviour, str(at)]


def said(log: Path) -> list[tuple[str, str]]:
    return [(what, name) for what, name, _ in map(str.split, log.read_text().splitlines())]


def test_processes_take_turns_one_at_a_time(tmp_path: Path) -> None:
    log, told = tmp_path / "log", []
    found = processes_in_turns({name: fake(name, log) for name in "abc"}, rounds=3, seconds=0.5, say=told.append)
    assert said(log)[:3] == [("ready", "a"), ("ready", "b"), ("ready", "c")]
    order = [name for what, name in said(log) if what == "begin"]
    assert "".join(order) == "abc" "bca" "cab"
    assert said(log)[3:] == [(what, name) for name in order for what in ("begin", "end")], "two computed at one time"
    assert {name: of.rounds for name, of in found.items()} == {name: ((1, 0.5), (2, 0.5), (3, 0.5)) for name in "abc"}
    assert told[:2] == ["preparing a", "preparing b"] and told[-1] == "round 3 of 3"


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("fail", "no luck"),
        ("exit", "ended with exit status 1: the last word"),
        ("kill", "ended by SIGKILL"),
        ("talk", "not an answer: Welcome!"),
    ],
)
def test_who_fails_leaves_and_the_others_go_on(behaviour: str, at: int, reason: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = {"a": fake("a", log), "bad": fake("bad", log, behaviour, at), "c": fake("c", log)}
    found = processes_in_turns(commands, rounds=3, seconds=0.0)
    assert found["bad"] == Outcome(failed=reason)
    assert [len(found[name].rounds) for name in "ac"] == [3, 3]
    assert list(found) == list(commands)
    assert said(log).count(("begin", "bad")) == at


def test_who_died_between_turns_is_noticed(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def kill_both(what: str) -> None:
        if what == "round 2 of 2":
            for line in log.read_text().splitlines():
                if line.startswith("ready bad"):
                    os.kill(int(line.split()[2]), 9)

    found = processes_in_turns({n: fake(n, log) for n in ("bad", "a")}, rounds=2, seconds=0.0, say=kill_both)
    assert found["bad"].failed == "ended by SIGKILL" and len(found["a"].rounds) == 2


def test_who_is_silent_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    found = processes_in_turns({"a": fake("a", tmp_path / "log", "hang")}, rounds=1, seconds=0.0, patience=0.5)
    assert found["a"].failed == "no answer within 0.5 s"


@pytest.mark.parametrize("stop", [False, True])
def test_no_process_is_left(stop: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"

    def say(what: str) -> None:
        if stop and what.startswith("round"):
            raise KeyboardInterrupt

    commands = {name: fake(name, log) for name in "ab"}
    if stop:
        with pytest.raises(KeyboardInterrupt):
            processes_in_turns(commands, rounds=1, seconds=0.0, say=say)
    else:
        processes_in_turns(commands, rounds=1, seconds=0.0, say=say)
    for line in log.read_text().splitlines():
        with pytest.raises(ProcessLookupError):
            os.kill(int(line.split()[2]), 0)


def test_children_have_the_threads_they_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    given = quiet_environment(3)
    assert "OMP_WAIT_POLICY" not in given, "its threads would spin for ever"
    found = processes_in_turns({"a": fake("a", tmp_path / "log")}, rounds=1, seconds=0.0, environment=given)
    assert found["a"].facts == {"threads": "3"}


# --- the child --------------------------------------------------------------------------------------------------------

CHILD = """
from qfx.tools.latency_child import serve

def prepare():
    print("Welcome to this library!", flush=True)
    left = [[1.5, 2.5]]
    return {"computes": "int8"}, lambda seconds: left.pop()

serve(prepare)
"""


def test_a_child_answers_on_stdout_and_nothing_else_does() -> None:
    turns = json.dumps({"seconds": 0.1}) + "\n"
    done = subprocess.run([sys.executable, "-c", CHILD], input=2 * turns, capture_output=True, text=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == [
        {"ready": {"computes": "int8"}},
        {"ms": [1.5, 2.5]},
        {"failed": "IndexError: pop from empty list"},
    ]
    assert "Welcome" in done.stderr and "Traceback" in done.stderr


def test_a_turn_ends_when_no_thread_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    latency_child._sleep()
    monkeypatch.setattr(latency_child, "IDLE_LIMIT", 0.2)
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        with pytest.raises(RuntimeError, match="threads go on computing"):
            latency_child._sleep()
    finally:
        done.set()
        thread.join()


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"y": x * self.factor, "index": x.argmax(1)}


def test_sqnr_is_that_of_held_out_inputs(tmp_path: Path) -> None:
    used: list[Tensor] = []
    x = torch.arange(6.0).reshape(3, 2) + 1
    of = Subject(Scaled(1.0), (x[:1],), ((x[:1],),), tuple((row,) for row in x.split(1)), tmp_path)

    def make(given: Subject) -> Ready:
        def run(inputs: Any) -> object:
            used.append(inputs[0])
            return call(Scaled(1.1), inputs)

        return Ready(run, "int8", "a note")

    facts, work = prepared(of, make)
    assert facts == {"computes": "int8", "note": "a note", "sqnr_db": pytest.approx(20, abs=1e-3)}
    assert torch.equal(torch.cat(used), x)
    used.clear()
    assert len(work(0.0)) == 3 and all(torch.equal(inputs, x[:1]) for inputs in used)


def test_the_worst_output_counts_in_any_float_type() -> None:
    x = torch.ones(2, 4)
    wanted = [[x, x, x.long()], [x, x, x.long()]]
    found = [[x, (0.9 * x).bfloat16(), x.long()], [x, x, 0 * x.long()]]
    assert lowest_sqnr_db(wanted, found) == pytest.approx(20 + 10 * math.log10(2), abs=0.2)
    assert lowest_sqnr_db(wanted, wanted) == math.inf


@pytest.mark.parametrize(("batch", "items"), [(1, ROWS), (3, 3), (16, 1)])
def test_a_subject_has_one_batch_size(
    batch: int, items: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "images", lambda *, seed=0: (nn.Identity(), (torch.zeros(1, 3, 4, 4),)))
    of = subject("images", batch, tmp_path)
    assert [len(of.calibration), len(of.held_out)] == [2 * items, items]
    assert {tuple(x.shape) for item in (*of.calibration, *of.held_out) for x in item} == {(batch, 3, 4, 4)}
    seen = {float(tensors(item)[0].sum()) for item in (*of.calibration, *of.held_out)}
    assert len(seen) == 3 * items, "no input is there twice"
    again = subject("images", batch, tmp_path)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(of.held_out, again.held_out, strict=True))


def test_a_subject_keeps_keywords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = {"ids": torch.arange(5)[None], "mask": torch.ones(1, 5, dtype=torch.int64)}
    monkeypatch.setitem(MODELS, "words", lambda *, seed=0: (nn.Identity(), example))
    of = subject("words", 2, tmp_path)
    assert {name: list(x.shape) for name, x in of.held_out[0].items()} == {"ids": [2, 5], "mask": [2, 5]}


# --- candidates -------------------------------------------------------------------------------------------------------


def test_candidates_are_chosen_by_target_and_group() -> None:
    assert chosen(["reference"], []) == ["qfx reference", "fp32 eager"]
    assert chosen([], ["openvino", "torch_fx"]) == [
        "fp32 eager",
        "torch_fx onednn",
        "torch_fx x86",
        "openvino float",
        "openvino int8",
    ]
    assert {of.group for of in CANDIDATES.values()} == {QFX, EAGER, *PEERS}
    assert {name for name, of in CANDIDATES.items() if of.group == QFX} == {f"qfx {name}" for name in TARGETS}
    assert set(chosen(list(TARGETS))) == set(CANDIDATES)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packages("json")() is None
    for name in ("openvino", "torchao"):
        monkeypatch.setitem(sys.modules, name, None)  # what Python takes for a package that is not there
    assert packages("json", "openvino")() == NOT_INSTALLED
    assert CANDIDATES["openvino float"].lacks() == CANDIDATES["inductor int8"].lacks() == NOT_INSTALLED


def test_who_lacks_something_is_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}

    def fake_turns(commands: Mapping[str, list[str]], **options: Any) -> dict[str, Outcome]:
        started.update(options, commands=commands)
        facts = {"computes": "f32", "sqnr_db": math.inf, "note": ""}
        return {name: Outcome(facts, ((2.0, 3.0, 4.0),)) for name in commands}

    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(latency_run, "processes_in_turns", fake_turns)
    found = measured("resnet18", 4, ["openvino float", "fp32 eager"], threads=5, rounds=1)
    assert found.reasons == {"openvino float": NOT_INSTALLED}
    assert [row.name for row in found.rows] == ["fp32 eager"] and not found.rows[0].ours
    (command,) = started["commands"].values()
    assert command[3:7] == ["resnet18", "4", "fp32 eager", "5"]
    assert started["environment"]["OMP_NUM_THREADS"] == "5"


def test_a_real_process_measures_a_real_model() -> None:
    found = measured("resnet20", 2, ["fp32 eager"], threads=1, rounds=2, seconds=0.0)
    (row,) = found.rows
    assert (row.name, row.computes, row.sqnr_db) == ("fp32 eager", "f32", math.inf)
    assert len(row.rounds) == 2 and all(ms > 0 for calls in row.rounds for ms in calls)


# --- what is made of the figures --------------------------------------------------------------------------------------


def row(name: str, ms: float | tuple[float, ...], sqnr: float = 30.0, computes: str = "int8", note: str = "") -> Row:
    rounds = tuple((of, of, of) for of in (ms if isinstance(ms, tuple) else (ms,)))
    return Row(name, name.startswith("qfx"), computes, sqnr, rounds, note)


def run(*rows: Row, model: str = "resnet18", **reasons: str) -> Result:
    return Result(model, 1, rows, reasons)


FOUND = run(
    row("qfx native", 1.3, 31.0),
    row("fp32 eager", 20.0, math.inf, "f32"),
    row("openvino float", 2.5, 40.0, "bf16"),
    row("openvino int8", 2.0, 29.5, note="quantized by NNCF"),
    **{"onnxruntime int8": "not installed"},
)


def test_outcomes_become_rows_and_reasons() -> None:
    facts = {"computes": "int8", "sqnr_db": 20.0, "note": "n"}
    outcomes = {"b": Outcome(failed="broken"), "qfx a": Outcome(facts, ((1.0,), (3.0,)))}
    found = result("m", 2, ["qfx a"], outcomes)
    assert found == Result("m", 2, (Row("qfx a", True, "int8", 20.0, ((1.0,), (3.0,)), "n"),), {"b": "broken"})


def test_the_best_peer_is_never_qfx() -> None:
    assert FOUND.best_peer() is FOUND.best_peer("int8") is FOUND.row("openvino int8")
    assert FOUND.best_peer("f32") is FOUND.row("fp32 eager")
    assert run(row("qfx x86", 1.0)).best_peer() is None


def test_the_ratio_is_the_median_of_the_rounds_own() -> None:
    mine, theirs = row("qfx x86", (1.0, 30.0, 1.0)), row("p", (2.0, 60.0, 4.0))
    assert run(mine, theirs).ratio(mine, theirs) == 0.5
    assert run(mine, theirs).times.ms("p") == 4.0


def test_percentiles_are_those_of_all_calls() -> None:
    calls = Row("p", False, "f32", 0.0, (tuple(range(6)), tuple(range(6, 11))))
    assert [calls.percentile(p) for p in (10, 90)] == [1.0, 9.0]


def test_the_table() -> None:
    lines = text(FOUND).splitlines()
    cells = [re.split(r"\s{2,}", line) for line in lines]
    assert cells[0] == ["candidate", "computes", "median ms", "(p10-p90)", "SQNR dB", "ratio to best peer"]
    assert cells[2] == ["qfx native", "int8", "1.300", "(1.300-1.300)", "31.0", "0.65"]
    assert cells[3] == ["fp32 eager", "f32", "20.000", "(20.000-20.000)", "-", "10.00"]
    assert cells[5][-1] == "1.00"
    assert lines[7:] == [
        "best peer: openvino int8 (int8), 2.000 ms",
        "best int8 peer: openvino int8 (int8), 2.000 ms, SQNR 29.5 dB",
        "openvino int8: quantized by NNCF",
        "onnxruntime int8: did not run: not installed",
    ]


def test_the_table_without_peers_and_without_anyone() -> None:
    assert re.search(r"qfx x86 .* -\n", text(run(row("qfx x86", 1.0))))
    assert "best peer: none ran\nbest int8 peer: none ran" in text(run(row("qfx x86", 1.0)))
    assert text(run(**{"a": "gone"})).splitlines()[0] == "no candidate ran"


def test_plain_values_are_json() -> None:
    found = json.loads(json.dumps(plain(FOUND), allow_nan=False))
    assert found["best_peer"] == found["best_int8_peer"] == "openvino int8"
    assert found["candidates"]["qfx native"]["ratio"] == pytest.approx(0.65)
    assert found["candidates"]["fp32 eager"]["sqnr_db"] is None
    assert found["reasons"] == {"onnxruntime int8": "not installed"}


# --- bars -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ms", "sqnr", "verdicts"),
    [(1.3, 31.0, ["met", "met"]), (1.5, 31.0, ["MISSED", "met"]), (1.3, 29.0, ["met", "MISSED"])],
)
def test_a_bar_is_of_time_and_sqnr(ms: float, sqnr: float, verdicts: list[str]) -> None:
    figures = list(judged(run(row("qfx native", ms, sqnr), row("openvino int8", 2.0, 29.5))))
    assert [f.verdict for f in figures] == verdicts
    assert [f.bar for f in figures] == [at_most(0.7), at_least(29.5)]
    assert figures[0].value == pytest.approx(ms / 2.0) and figures[0].note == "openvino int8"


def test_a_faster_peer_than_the_bars_own_counts() -> None:
    figures = list(judged(run(row("qfx native", 1.3), row("openvino int8", 2.0), row("inductor int8", 1.0, 10.0))))
    assert figures[0].note == "inductor int8" and figures[0].verdict == "MISSED"


def test_a_bfloat16_bar_has_the_sqnr_of_the_best_int8_peer() -> None:
    bar = LatencyBar("vit_s16", 1, 0.5, "openvino float", "bf16")
    rows = [row("qfx native", 1.0, 25.0), row("openvino float", 2.5, 40.0, "bf16")]
    (time,) = judged(run(*rows, model="vit_s16"), [bar])
    assert time.verdict == "met"
    time, sqnr = judged(run(*rows, row("openvino int8", 9.0, 26.0), model="vit_s16"), [bar])
    assert [time.verdict, sqnr.verdict] == ["met", "MISSED"] and sqnr.bar == at_least(26.0)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row("openvino float", 2.0, computes="bf16")], "qfx native did not run; the bar is ≤ 0.5"),
        ([row("qfx native", 1.0), row("openvino int8", 2.0)], "openvino float in bf16 did not run"),
        ([row("qfx native", 1.0), row("openvino float", 2.0, computes="f32")], "openvino float in bf16 did not run"),
    ],
)
def test_a_bar_without_its_parties_says_nothing(rows: list[Row], reason: str) -> None:
    (figure,) = judged(run(*rows, model="bert_base"))
    assert figure.verdict == "skipped" and figure.note.startswith(reason)


def test_where_there_is_no_bar() -> None:
    assert not list(judged(run(row("qfx native", 1.0), model="resnet20")))
    assert {bar.model for bar in BARS} <= set(MODELS)
    assert {bar.peer for bar in BARS} <= set(CANDIDATES)
    assert len({(bar.model, bar.batch) for bar in BARS}) == len(BARS)


# --- the program ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resnet19", "1"], "invalid choice: 'resnet19'"),
        (["resnet18"], "required: BATCH"),
        (["resnet18", "0"], "'0' is no whole number above 0"),
        (["resnet18", "1.5"], "'1.5' is no whole number above 0"),
        (["resnet18", "1", "--threads", "-1"], "'-1' is no whole number above 0"),
        (["resnet18", "1", "--rounds", "0"], "'0' is no whole number above 0"),
        (["resnet18", "1", "--against", "tvm"], "'tvm' is none of torch_fx, inductor, onnxruntime, openvino"),
        (["resnet18", "1", "--against", "openvino,"], "'' is none of"),
        (["resnet18", "1", "--targets", "x86,abacus"], "'abacus' is none of"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_latency.main(argv, measure=lambda *_, **__: pytest.fail("it ran"))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def returns(found: Result, calls: list[Any]) -> Callable[..., Result]:
    def measure(*args: Any, **options: Any) -> Result:
        calls.append((args, options))
        return found

    return measure


def test_the_program_prints_and_writes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads, file, calls = str(torch.get_num_threads()), tmp_path / "found.json", []
    argv = ["resnet18", "1", "--threads", threads, "--rounds", "4", "--against", "openvino", "--json", str(file)]
    assert bench_latency.main(argv, measure=returns(FOUND, calls)) == 0
    ((args, options),) = calls
    assert args[:2] == ("resnet18", 1) and options["threads"] == int(threads) and options["rounds"] == 4
    fast = [f"qfx {name}" for name in TARGETS if name != "reference"]
    assert args[2] == [*fast, "fp32 eager", "openvino float", "openvino int8"]
    out = capsys.readouterr().out
    assert re.search(r"peers +torchao \S+, onnxruntime", out) and "features" in out
    assert re.search(r"as a fraction of the best peer +0.65 x +≤ 0.7 +met +openvino int8", out)
    written = json.loads(file.read_text())
    assert written["machine"]["threads"] == threads and written["best_peer"] == "openvino int8"
    assert [bar["verdict"] for bar in written["bars"]] == ["met", "met"]


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (run(row("qfx reference", 9.0), row("fp32 eager", 1.0)), 0),
        (run(row("qfx native", 9.0), row("openvino int8", 1.0)), 1),
        (run(row("fp32 eager", 1.0), **{"qfx reference": "ValueError: no"}), 1),
        (run(row("qfx reference", 9.0), **{"openvino int8": "ValueError: no"}), 0),
    ],
)
def test_exit_status(found: Result, status: int) -> None:
    argv = ["resnet18", "1", "--threads", str(torch.get_num_threads())]
    assert bench_latency.main(argv, measure=returns(found, [])) == status


def test_a_target_that_cannot_run_here_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = CANDIDATES["qfx reference"]
    monkeypatch.setitem(CANDIDATES, "qfx reference", type(lacking)(QFX, lacking.make, lambda: "no such instructions"))
    found = run(row("fp32 eager", 1.0), **{"qfx reference": "no such instructions"})
    argv = ["resnet18", "1", "--threads", str(torch.get_num_threads())]
    assert bench_latency.main(argv, measure=returns(found, [])) == 0


@pytest.mark.slow
def test_everyone_runs_a_small_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    argv = ["resnet20", "2", "--threads", str(torch.get_num_threads()), "--rounds", "2", "--json", str(file)]
    assert bench_latency.main(argv) == 0
    found = json.loads(file.read_text())
    names = chosen([name for name in TARGETS if name != "reference"])
    assert {*found["candidates"], *found["reasons"]} == set(names)
    explained = (NOT_INSTALLED, "this CPU has no", "no quantized engine", "cannot run here", "needs ")
    assert all(any(part in reason for part in explained) for reason in found["reasons"].values()), found["reasons"]
    ran = found["candidates"]
    assert ran[found["best_peer"]]["ratio"] == 1.0
    assert all(of["sqnr_db"] > 10 for name, of in ran.items() if name != "fp32 eager"), ran
    assert {of["computes"] for name, of in ran.items() if name.endswith("int8")} <= {"int8"}
