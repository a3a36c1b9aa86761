"""Training steps as the GPU benchmark times them, in dry mode on the CPU: recipes, FLOPs, tables."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from inference.benchmark.__main__ import collect
from inference.benchmark.budget import BudgetedRun, Step, read_runs
from inference.benchmark.result_tables import training_table
from inference.benchmark.roofline.cases import make
from inference.benchmark.training_steps import TrainingBench, _Timer
from magihuman.models.config import LoraConfig
from magihuman.models.flops import forward_flops, lora_flops
from magihuman.zoo import memory_plan


def test_every_step_runs(dry_training: Path) -> None:
    (run,) = read_runs(dry_training)
    assert {name: line.get("reason") for name, line in run.steps.items() if line["status"] != "done"} == {}
    settings = {
        (line["row"]["recipe"], line["row"]["activation_checkpointing"], line["row"]["compile"], line["row"]["batch"])
        for line in run.steps.values()
        if "row" in line
    }
    assert settings == {
        ("lora", "attention", False, 1), ("lora", "blocks", False, 1), ("lora", "none", False, 1),
        ("lora", "attention", False, 4), ("lora", "attention", True, 1),
        ("dmd2", "attention", False, 1), ("dmd2", "blocks", False, 1), ("dmd2", "attention", True, 1),
    }  # fmt: skip


def test_flops_and_rates_by_hand(dry_training: Path) -> None:
    (run,) = read_runs(dry_training)
    stage = make("tiny", seconds=0.36).stages[0]
    tokens = stage.tokens
    forward = forward_flops(stage.config, tokens.video, tokens.audio, tokens.text)
    adapter = lora_flops(stage.config, LoraConfig(4), tokens.total)
    through = 2 * (forward.products + forward.ends) + 3 * forward.attention
    for name, batch in (("lora attention", 1), ("lora attention batch 4", 4)):
        row = run.steps[name]["row"]
        assert row["model_flops"] == batch * (through + 3 * adapter + forward.ends)
        assert row["tokens_per_second"] == pytest.approx(batch * tokens.total / row["seconds"]["median"], rel=1e-3)
        assert row["tflops"] == pytest.approx(row["model_flops"] / row["seconds"]["median"] / 1e12, rel=0.01, abs=1e-5)
        assert row["mfu"] is None  # no data sheet of a CPU
    # A rollout's eight passes, five updates of the fake score, one of the student; then the teacher with guidance and
    # the fake score.
    passes = forward.total + adapter
    update = through + 3 * adapter + forward.ends
    assert run.steps["dmd2 blocks"]["row"]["model_flops"] == 8 * passes + 6 * update + 2 * forward.total + passes


@pytest.mark.parametrize(
    ("expected", "seconds", "counted"),
    [(45, [50, 1, 1, 1, 1], 4), (6, [3.5, 1.2, 1.2, 1.2, 1.2], 4), (24, [12.5, 10, 10, 10], 2), (6, [9, 9], 1)],
)
def test_the_iteration_that_warms_up_never_counts(
    expected: float, seconds: list[float], counted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compilation and the first choice of kernels take longer than all iterations after them."""
    clock = [0.0]
    run = BudgetedRun(tmp_path, "train", 600, clock=lambda: clock[0])
    monkeypatch.setattr("inference.benchmark.training_steps.time.perf_counter", lambda: clock[0])
    trainer: Any = SimpleNamespace(should_stop=False)

    def fit() -> dict[str, Any]:
        timer = _Timer(run, 4, torch.device("cpu"))
        rest = iter(seconds)
        while not trainer.should_stop:
            timer.on_train_batch_start(trainer)
            clock[0] += next(rest)
            timer.on_train_batch_end(trainer)
        return {"seconds_of": timer.seconds}

    run.run([Step("lora", expected, fit)])
    (line,) = (json.loads(text) for text in run.results.read_text().splitlines() if '"done"' in text)
    assert line["seconds_of"] == pytest.approx(seconds[: 1 + counted])
    kept = [json.loads(text) for text in run.results.read_text().splitlines() if '"run"' in text]
    assert [one["counted"] for one in kept] == [False] + [True] * counted


def test_adapters_are_trained_and_the_base_is_not(tmp_path: Path) -> None:
    bench = TrainingBench(torch.device("cpu"), True)
    bench.run = BudgetedRun(tmp_path, "train", 600)
    seen: dict[str, Any] = {}

    def snapshot(kind: str, when: str) -> None:
        network = bench.recipe.denoiser if kind == "lora" else bench.recipe.networks.shared
        seen[when] = {name: weight.detach().clone() for name, weight in network.named_parameters()}

    for kind in ("lora", "dmd2"):
        bench.build(kind)
        snapshot(kind, "before")
        bench.run.run([step for step in bench.steps() if step.name == "roof"])  # a step's budget for the timer
        bench.measure("none", 1)
        snapshot(kind, "after")
        moved = {name for name, value in seen["before"].items() if not torch.equal(value, seen["after"][name])}
        adapters = {name for name in seen["before"] if "lora" in name}
        assert moved, kind
        assert moved <= adapters, kind


def test_the_table_and_the_plan(dry_training: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in dry_training.read_text().splitlines()]
    lines[0] |= {"dry": False}
    lines[0]["provenance"] |= {"machine": "NVIDIA H100 80GB HBM3", "gpu": {}}
    for line in lines[1:]:
        if "row" in line:
            line["row"] |= {"model": "15b", "mfu": 0.4321, "peak_bytes": 45 * 10**9}
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = collect(str(tmp_path), output=str(tmp_path / "out"))
    assert "8 rows" in told
    table = training_table(str(tmp_path / "out"))
    rows = [line for line in table.splitlines() if "| H100 SXM |" in line]
    assert len(rows) == 8
    assert all("| 43.2% | 45.0 |" in row for row in rows)
    assert sum("LoRA step, rank 4" in row for row in rows) == 5
    computed = [line for line in table.splitlines() if "*computed by `zoo plan`*" in line]
    assert len(computed) == 8

    stage = make("256p").stages[0]
    run = memory_plan.TrainingStep(stage.config, stage.tokens, rank=32)
    # 30.6 GB of weights in bf16, 20 bytes for each number of the adapter.
    count, own = stage.config.parameter_count(), 20 * memory_plan.footprint.lora_count(stage.config, 32)
    assert memory_plan.state_bytes(run, "lora") == 2 * count + own
    assert memory_plan.per_gpu(run, "lora", 1) < 48e9
