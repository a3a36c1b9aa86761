"""A run within a time budget: valuable steps come first, and nothing measured is lost, whatever ends the run."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from inference.benchmark import bench_networks, budget
from inference.benchmark.budget import BudgetedRun, Step, StepTimeout, choose, read_runs
from inference.benchmark.suite import SIZES, SuiteBench
from inference.benchmark.training_steps import TrainingBench
from magihuman.errors import UserError

REPO = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


class Clock:
    """Simulated seconds."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def simulated(steps: list[Step], seconds: float, slow: float, folder: Path) -> tuple[BudgetedRun, dict[str, int]]:
    """The run of a plan whose steps take `slow` times what is expected, one repetition after the other."""
    clock = Clock()
    run = BudgetedRun(folder, "simulated", seconds, clock=clock)
    repetitions: dict[str, int] = {}

    def stand_in(step: Step) -> Step:
        def work() -> dict[str, Any]:
            for _ in run.repeat(5 if step.most is not None else 1):
                clock.now += slow * step.seconds
                repetitions[step.name] = repetitions.get(step.name, 0) + 1
            return {}

        return replace(step, run=work)

    run.header("suite", True, {})
    run.run([stand_in(step) for step in steps])
    assert run.elapsed <= seconds + slow * max(step.longest for step in steps)
    return run, repetitions


@pytest.mark.parametrize(
    ("slow", "rows"),
    [(0.5, ["fast", "fp8", "reference"]), (1.0, ["fast", "fp8", "reference"]), (1.5, ["fast", "reference"])],
)
def test_valuable_rows_come_even_on_a_slow_machine(slow: float, rows: list[str], tmp_path: Path) -> None:
    run, repetitions = simulated(SuiteBench(CPU, dry=True).steps(), 510.0, slow, tmp_path)
    for tier in rows:
        for size in ("256p",) if tier == "reference" else SIZES:
            assert run.status[f"{tier} {size}"] == "done", (tier, size)
    assert run.status["decode 1080p turbo"] == "done"
    # Spare time goes into repetitions, and not into one step at the cost of the others.
    assert repetitions["fast 256p"] == (5 if slow < 1 else 3 if slow == 1 else 2)
    assert repetitions["fast 1080p"] == 1


def test_an_extremely_slow_machine_still_measures_the_smallest_clip(tmp_path: Path) -> None:
    run, _ = simulated(SuiteBench(CPU, dry=True).steps(), 510.0, 4.0, tmp_path)
    assert run.status["fast 256p"] == "done"
    assert run.status["fp8 1080p"] == "skipped"
    (found,) = read_runs(run.results)
    assert "s left, it takes about" in found.steps["fp8 build"]["reason"]
    assert found.steps["fp8 1080p"]["reason"] == "it needs the step 'fp8 256p first'"


def test_the_plans_fit_their_default_budgets(tmp_path: Path) -> None:
    """12 minutes of the 15 that a lent machine has: the start takes up to three."""
    suite, _ = simulated(SuiteBench(CPU, dry=True).steps(), 60 * 8.5, 1.0, tmp_path)
    train, _ = simulated(TrainingBench(CPU, True).steps(), 60 * 3.5, 1.0, tmp_path)
    assert train.status["lora attention"] == train.status["dmd2 attention"] == "done"
    assert train.status["lora attention compiled"] == "done"
    assert suite.status["fp8 1080p"] == suite.status["kernels 1080p"] == "done"
    assert train.status["dmd2 attention compiled"] == "skipped"  # takes longer than all the rest: minutes=7


def test_a_failing_step_is_a_line_and_not_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("cuDNN has no plan\nfor 47386 keys")

    monkeypatch.setattr(budget, "peak_memory", lambda device: {"peak_bytes": 7})
    run = BudgetedRun(tmp_path, "r", 60)
    steps = [
        Step("bad", 1, fail),
        Step("after bad", 1, dict, ("bad",)),
        Step("infinite", 1, lambda: {"seconds_of": float("nan")}),
        Step("good", 1, lambda: {"value": 3}),
        Step("long", 100, dict),
    ]
    run.header("suite", False, {"machine": "X"})
    table = run.run(steps)
    (found,) = read_runs(run.results)
    assert {name: line["status"] for name, line in found.steps.items()} == {
        "bad": "failed", "after bad": "skipped", "infinite": "failed", "good": "done", "long": "skipped",
    }  # fmt: skip
    assert found.steps["bad"]["reason"] == "RuntimeError: cuDNN has no plan\nfor 47386 keys"
    assert "raise RuntimeError" in found.steps["bad"]["trace"]
    assert found.steps["good"]["value"] == 3
    assert found.steps["good"]["peak_bytes"] == 7
    assert "bad        failed" in table
    assert "cuDNN has no plan" in run.log.read_text()
    assert capsys.readouterr().out.splitlines()[0].endswith("r.jsonl")


def test_a_hanging_step_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "_GRACE", 0.1)
    run = BudgetedRun(tmp_path, "r", 60)
    start = time.monotonic()
    run.run([Step("hangs", 0.01, lambda: time.sleep(100) or {}), Step("next", 0.01, dict)])
    assert time.monotonic() - start < 50
    assert run.status == {"hangs": "failed", "next": "done"}
    line = json.loads(run.results.read_text().splitlines()[0])
    assert line["reason"] == "StepTimeout: stopped after 0 s"


def test_a_compilation_that_takes_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row comes without compilation, which it says."""
    bench = SuiteBench(CPU, dry=True)
    bench.build()
    assert bench.reference is not None

    def compiling(*_: Any, **__: Any) -> Any:
        def interrupted(*_: Any) -> Any:
            raise StepTimeout("stopped after 180 s")

        return interrupted

    monkeypatch.setattr("inference.fast.fused_blocks.torch.compile", compiling)
    network = bench_networks.faster(bench.reference, "fast", CPU, False, {"compile": "static"})
    given = bench_networks.draw(bench.stages["256p"], network, CPU)
    velocities, reasons = bench_networks.first_passes(network, [network], given)
    assert {option: reason.splitlines()[0] for option, reason in reasons.items()} == {
        "compile": "StepTimeout: stopped after 180 s"
    }
    assert "in interrupted" in reasons["compile"]  # the traceback is kept: a run on a lent GPU happens once
    assert bool(torch.isfinite(velocities[0]).all())


def test_a_time_limit_is_not_taken_for_a_kernel_that_fails() -> None:
    """Code that falls back when something fails catches exceptions; the end of the time is none of them."""
    caught: list[str] = []

    def falls_back() -> None:
        try:
            time.sleep(5)
        except Exception as error:
            caught.append(str(error))

    def gives_up() -> None:
        try:
            time.sleep(5)
        except StepTimeout:
            caught.append("once")
        time.sleep(5)

    for work, seen in ((falls_back, []), (gives_up, ["once"])):
        with budget._time_limit(0.1), pytest.raises(StepTimeout):
            work()  # one that is caught on purpose is not the last
        assert caught == seen
    start = time.monotonic()
    time.sleep(0.25)
    assert time.monotonic() - start >= 0.25  # and none comes afterwards


def test_a_wanted_step_that_fails_stops_nothing(tmp_path: Path) -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("no memory")

    run = BudgetedRun(tmp_path, "r", 60)
    steps = [Step("truth", 1, fail), Step("row", 1, dict, wants=("truth",))]
    assert choose(steps, "row") == steps
    run.run(steps)
    assert run.status == {"truth": "failed", "row": "done"}


def test_steps_by_name_bring_what_they_need() -> None:
    steps = SuiteBench(CPU, dry=True).steps()
    names = [step.name for step in choose(steps, "fp8 540p, decode 256p b")]
    wanted = ["roof", "build", "truth"]  # for the error column and the shares of what the device reaches
    network = ["fp8 build", "fp8 prepare", "fp8 256p first", "fp8 540p first", "fp8 540p"]
    assert names == [*wanted, "decode 256p b", *network]
    assert choose(steps, None) == steps
    assert len({step.name for step in steps}) == len(steps)
    for wrong in ("fp9", ","):
        with pytest.raises(UserError, match="steps="):
            choose(steps, wrong)


def test_a_second_run_is_appended_after_an_incomplete_line(tmp_path: Path) -> None:
    first = BudgetedRun(tmp_path, "r", 60)
    first.header("suite", False, {"date": "1"})
    first.run([Step("a", 1, dict)])
    text = first.results.read_text()
    first.results.write_text(text + '{"step": "b", "sta')  # as a kill leaves it
    second = BudgetedRun(tmp_path, "r", 60)
    second.header("suite", False, {"date": "2"})
    second.run([Step("c", 1, dict)])
    older, newer = read_runs(first.results)
    assert (list(older.steps), older.whole) == (["a"], False)
    assert (list(newer.steps), newer.whole) == (["c"], True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no run"),
        ('{"step": "a", "status": "done"}\n', "does not begin with the header"),
        ('{"format": "other/1"}\n', "its format is 'other/1'"),
        ('{"x": 1}\n', "line 1: not a line of"),
        ("[1]\n", "line 1: not a line of"),
    ],
)
def test_other_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read_runs(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_runs(tmp_path / "missing.jsonl")


def test_what_is_on_disk_survives_sigkill(tmp_path: Path) -> None:
    """Killed at some moment of the real dry run: every line on disk is whole, and names a step of the plan."""
    command = [sys.executable, "-m", "inference.benchmark", "suite", "dry=true", f"output={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPO, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    file = tmp_path / "suite.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (file.exists() and file.read_text().count("\n") >= 8):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (found,) = read_runs(file)
    assert found.header["dry"] is True
    assert len(found.steps) + sum(map(len, found.runs.values())) >= 7
    assert {line["status"] for line in found.steps.values()} == {"done"}
    assert set(found.steps) <= {step.name for step in SuiteBench(CPU, dry=True).steps()}
