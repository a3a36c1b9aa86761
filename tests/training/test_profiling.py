"""Where the time of a training goes: shares, slow loaders and processes, the trace of a few steps."""

import csv
import gzip
import json
import time
from itertools import pairwise
from typing import Any

import pytest
import training_stub
from processes import Launcher

from data.module import Batches
from magihuman.training.checkpoint import Checkpointer
from magihuman.training.profiling import LoaderTimer, Profile, SlowParts, slow_parts, straggler
from recipes.pretrain import Pretrain

WEIGHTS = "export/model-00001-of-00001.safetensors"


def test_a_slow_loader_is_named_with_the_setting_that_helps() -> None:
    assert slow_parts([[10.0, 6.2, 3.0]], ["here"], 2) == [
        "62 % of the time waits for data: raise data.module.num_workers (now 2), or put the shards on a faster disk"
    ]
    assert slow_parts([[10.0, 2.9, 7.0]], ["here"], 2) == []
    (line,) = slow_parts([[10.0, 3.1, 3.0], [10.0, 4.0, 3.0]], ["a", "b"], None)
    assert line.startswith("40 % of the time of process 1 (b) waits for data: raise data.module.num_workers, or")


def test_a_slow_process_is_told_from_the_median() -> None:
    even = [[10.0, 0.5, 4.0]] * 3
    assert straggler([*even, [10.0, 0.3, 6.0]]) == (3, pytest.approx(6.3 / 4.5))
    assert slow_parts([*even, [10.0, 0.3, 6.0]], ["a", "b", "c", "node7"], 2) == [
        "process 3 (node7) takes 1.4 x the median time of a step, mostly in the forward pass; all others wait for it"
    ]
    first, second = slow_parts([*even, [10.0, 5.0, 4.0]], list("abcd"), 2)
    assert "process 3 (d) takes 2.0 x the median time of a step, mostly waiting for its data" in first
    assert "50 % of the time of process 3 (d) waits for data" in second
    assert slow_parts([*even, [10.0, 0.5, 5.2]], list("abcd"), 2) == []  # 1.27 times
    assert slow_parts([[10.0, 0.0, 0.1]] * 3 + [[10.0, 0.0, 0.9]], list("abcd"), 2) == []  # 8 % of the time
    assert slow_parts([[10.0, 0.5, 4.0]], ["a"], 2) == []


def test_slow_parts_are_named_rarely() -> None:
    slow = SlowParts(["here"], 0)
    said = [bool(slow.add([[1.0, 0.9, 0.1]])) for _ in range(1000)]
    assert [second + 1 for second, one in enumerate(said) if one] == [20, 640]
    fast = SlowParts(["here"], 0)
    assert not any(fast.add([[1.0, 0.9 if second < 5 else 0.0, 0.1]]) for second in range(1000))  # only at the start


def test_a_loader_timer_measures_nothing_else() -> None:
    timer = LoaderTimer()
    for name, seconds in (("[_TrainingEpochLoop].train_dataloader_next", 0.03), ("run_training_batch", 0.05)):
        timer.start(name)
        time.sleep(seconds)
        timer.stop(name)
    assert timer.take() == pytest.approx(0.03, abs=0.015)
    assert timer.take() == 0.0


def slower(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, seconds: float) -> list[float]:
    """Make a method sleep first; returns the list of the seconds that its calls take, longer on a busy machine."""
    whole, took = getattr(where, name), []

    def wrapped(*arguments: Any, **named: Any) -> Any:
        start = time.monotonic()
        time.sleep(seconds)
        made = whole(*arguments, **named)
        took.append(time.monotonic() - start)
        return made

    monkeypatch.setattr(where, name, wrapped)
    return took


def test_shares_of_the_time_are_what_was_slept_and_add_up(shards, tmp_path, monkeypatch, capsys) -> None:
    took = slower(monkeypatch, Batches, "__getitem__", 0.3)
    slower(monkeypatch, Checkpointer, "save", 0.3)
    slower(monkeypatch, Pretrain, "validation_metrics", 0.2)
    monkeypatch.setattr(SlowParts, "WINDOW", 0.5)
    folder = training_stub.train_here(
        tmp_path / "run", shards,
        ["+recipe=pretrain", "trainer.max_steps=5", "trainer.log_every=1", "checkpoint.every_steps=2",
         "callbacks.validation.every_steps=2", "data.module.num_workers=0", "trainer.progress=true"],
    )  # fmt: skip
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    names = ("data", "checkpoint", "evaluation", "step")
    for row in rows:
        assert sum(float(row[f"time/{name}"]) for name in names) == pytest.approx(1.0, abs=1e-4)
    walls = [float(b["seconds"]) - float(a["seconds"]) for a, b in pairwise(rows)]

    def seconds(name: str) -> list[float]:
        return [float(row[f"time/{name}"]) * wall for row, wall in zip(rows[1:], walls, strict=True)]

    assert all(0.3 <= waited < max(took) + 0.2 for waited in seconds("data"))
    # The checkpoint of a step is written after its line.
    assert [saved > 0.29 for saved in seconds("checkpoint")] == [False, True, False, True]
    assert [measured > 0.19 for measured in seconds("evaluation")] == [True, False, True, True]
    said = capsys.readouterr().out
    assert "of the time waits for data: raise data.module.num_workers (now 0)" in said
    assert "time: data " in said


@pytest.mark.slow
def test_a_slow_process_of_two_is_named(shards, tmp_path) -> None:
    said = tmp_path / "said.txt"
    world = Launcher(shards)
    slow = f"+callbacks.slow={{_target_: training_stub.SlowForward, rank: 1, seconds: 0.3, said: {said}}}"
    assert world.run(tmp_path / "run", "ddp", 2, slow, "trainer.log_every=1") == [0, 0]
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert all(float(row["straggler"]) > 1.5 for row in rows[1:])
    lines = [line for line in said.read_text().splitlines() if line.startswith("note: process")]
    assert len(lines) == 1
    assert lines[0].startswith("note: process 1 (")
    assert "mostly in the forward pass" in lines[0]


@pytest.mark.slow
def test_a_profile_shows_its_steps_and_changes_no_bit(shards, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Profile, "STEPS", 1)  # its tables take seconds per step
    length = ["+recipe=pretrain", "trainer.max_steps=8"]
    bare = training_stub.train_here(tmp_path / "bare", shards, length)
    full = training_stub.train_here(tmp_path / "full", shards, [*length, "trainer.profile=true"])
    assert (bare / WEIGHTS).read_bytes() == (full / WEIGHTS).read_bytes()
    assert not (bare / "profile").exists()
    assert sorted(file.name for file in (full / "profile").iterdir()) == [
        "memory.txt",
        "operators.txt",
        "trace.json.gz",
    ]
    events = json.loads(gzip.decompress((full / "profile" / "trace.json.gz").read_bytes()))["traceEvents"]
    assert len([event for event in events if event.get("name") == "Optimizer.step#AdamW.step"]) == 1
    assert "aten::" in (full / "profile" / "operators.txt").read_text()
    assert "CPU Mem" in (full / "profile" / "memory.txt").read_text()
    assert f"profile of steps 6 to 6: open {full}/profile/trace.json.gz in" in capsys.readouterr().out


def test_a_training_that_ends_early_still_writes_its_profile(shards, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(Profile, "SKIPPED", 0)
    folder = training_stub.train_here(
        tmp_path / "run", shards,
        ["+recipe=pretrain", "trainer.profile=true", "trainer.max_steps=50", "trainer.max_time=00:00:00"],
    )  # fmt: skip
    assert (folder / "profile" / "trace.json.gz").exists()
    assert "profile of steps 1 to 1:" in capsys.readouterr().out
