"""The GPU suite's commands at full size on a GPU that is not there: shapes, dtypes, devices and layouts are checked.

Needs a torch that was built for CUDA, as GPU boxes have it; no driver and no GPU.
"""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu
from torch import Tensor

from inference.benchmark import bench_networks, budget, result_files
from inference.benchmark.__main__ import COMMANDS
from inference.benchmark.budget import read_runs
from inference.benchmark.collect import rows_of
from magihuman.cli import run_one

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="needs a torch that was built for CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a real GPU is at hand"),
]
ONCE = "steps=1 sr_steps=1 warm=2 repeat=1 budget=0.001 options=compile=off"


def run(line: str, folder: Path, patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Rows that a command of the suite writes."""
    with fake_gpu(patch):
        run_one(COMMANDS, "x", [*line.split(), f"output={folder}"])
    (values,) = result_files.read(folder)
    assert values["provenance"]["machine"] == "NVIDIA FAKE"
    json.dumps(values)
    return values["rows"]


@pytest.mark.parametrize("tier", ["fast", "fp8", "reference"])
@pytest.mark.parametrize("size", ["256p", "540p"])
def test_a_clip(size: str, tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = run(f"measure size={size} tier={tier} {ONCE}", tmp_path, monkeypatch)
    _check_clip(row)
    if tier != "reference":
        assert row["attention_kernel"] == "cudnn"
        assert (row["options"]["pad"], row["options"]["grouped"], row["options"]["graphs"]) == (True, True, True)


@pytest.mark.parametrize("tier", ["fast", "fp8"])
def test_the_largest_clip(tier: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of frames by cuDNN; the reference's own windows need a compiler, so its velocities are given."""
    monkeypatch.setattr("magihuman.models.attention._flex", lambda q, k, v, layout, window: q)
    monkeypatch.setattr("magihuman.models.attention._block_mask", lambda layout, window: None)
    (row,) = run(f"measure size=1080p tier={tier} {ONCE}", tmp_path, monkeypatch)
    _check_clip(row, text=False)
    # 80 GB: 31 of weights, 19 of the text encoder, and 27 or more while the pictures are decoded.
    assert row["stages"]["text"]["reason"].startswith("86 GB do not hold it together")
    assert row["geometry"]["sr"]["tokens"]["total"] == 65746
    assert row["geometry"]["sr"]["window"] == 11


def _check_clip(row: dict[str, Any], text: bool = True) -> None:
    stages = (*row["geometry"], "video decode", "to host", "audio decode", "image", "sound")
    for stage in (*stages, "text") if text else stages:
        assert "median" in row["stages"][stage], (stage, row["stages"][stage])
    assert row["host_waits"] == {name: [] for name in row["geometry"]}
    assert row["comparable"]["n"] == 1
    assert row["peak_memory_bytes"] > 0
    assert row["rates"]["base"]["mfu"] > 0


@pytest.mark.timeout(900)
def test_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps at full size, but for compilation and the profiler."""
    prepare = bench_networks.faster

    def uncompiled(denoiser: Any, tier: str, device: Any, release: bool, changes: Any) -> Any:
        return prepare(denoiser, tier, device, release, {**changes, "compile": "off"} if changes else {})

    monkeypatch.setattr(bench_networks, "faster", uncompiled)
    monkeypatch.setattr("inference.benchmark.suite.profile_pass", lambda call, device: {"ran": bool(call())})
    monkeypatch.setattr(budget, "_GRACE", 600.0)  # nothing is computed here, but it is a CPU that does not
    with fake_gpu(monkeypatch):
        COMMANDS["suite"](minutes=600.0, output=str(tmp_path))
    (found,) = read_runs(tmp_path / "suite.jsonl")
    missing = {
        name: line["reason"]
        for name, line in found.steps.items()
        if line["status"] != "done" and not name.startswith("fp8_attention")
    }
    assert missing == {}
    assert "FlashAttention-3 is not installed" in found.steps["fp8_attention kernel"]["reason"]
    rows = {(row["tier"], row["size"], row["decoder"]["name"]): row for row in rows_of(found)["measure"]}
    assert len(rows) == 2 * (2 * 3 + 1)
    assert rows["fast", "1080p", "turbo"]["geometry"]["sr"]["tokens"]["total"] == 65746
    assert rows["fast", "1080p", "turbo"]["geometry"]["sr"]["window"] == 11
    assert rows["fp8", "540p", "b"]["attention_kernel"] == "cudnn"
    assert rows["fast", "256p", "turbo"]["rates"]["base"]["tflops"] > 0
    assert rows["fast", "256p", "turbo"]["planned_bytes"] > 30e9
    assert {name: len(runs) for name, runs in found.runs.items()}["fast 256p"] == 6
    kernels = found.steps["kernels 1080p"]["rows"]
    assert {row["form"] for row in kernels if row["what"] == "attention" and "tflops" in row} >= {"cudnn", "flash2"}


@pytest.mark.timeout(900)
def test_training_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LoRA and DMD-2 of 15 B parameters through Lightning, but for compilation, on a CPU without memory or values:
    autograd asks a real driver for its devices."""
    pytest.importorskip("lightning")
    from inference.benchmark.training_steps import TrainingBench

    monkeypatch.setattr("magihuman.training.parallel.compile_blocks", lambda denoiser: None)
    monkeypatch.setattr(
        "magihuman.training.callbacks.Meter.flush", lambda self, device: {}
    )  # every number would be one
    monkeypatch.setattr(budget, "_GRACE", 600.0)
    with fake_gpu(monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        bench = TrainingBench(torch.device("cpu"), False)
        bench.run = budget.BudgetedRun(tmp_path, "train", 36_000)
        bench.run.header("train", False, result_files.provenance(bench.device))
        bench.run.run([step for step in bench.steps() if step.name != "roof"])
    (found,) = read_runs(tmp_path / "train.jsonl")
    assert {name: line.get("reason") for name, line in found.steps.items() if line["status"] != "done"} == {}
    rows = rows_of(found)["train"]
    assert len(rows) == 8
    by_mode = {(row["recipe"], row["activation_checkpointing"], row["batch"]): row for row in rows}
    lora, dmd2 = by_mode["lora", "attention", 1], by_mode["dmd2", "attention", 1]
    assert lora["tokens_per_clip"] == 4050
    # The frozen base and the adapter's own products; with DMD-2 8 + 5 x 2 + 5 F and theirs.
    assert 2.1 < lora["model_flops"] / lora["forward_flops"] < 2.3
    assert 23 < dmd2["model_flops"] / dmd2["forward_flops"] < 26


def test_eight_bit_attention(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention-3's interface, as its users call it."""
    calls = []

    def attend(q: Tensor, k: Tensor, v: Tensor, *, return_attn_probs: bool = False, **scales: Tensor) -> Any:
        assert {x.dtype for x in (q, k, v)} == {torch.float8_e4m3fn}
        assert [scales[f"{name}_descale"].shape for name in "qkv"] == [(1, 8)] * 3
        calls.append(k.shape[1])
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
        return (out, out.new_empty(q.shape[0], q.shape[2], q.shape[1])) if return_attn_probs else out

    module: Any = ModuleType("flash_attn_interface")
    module.__spec__, module.flash_attn_func = ModuleSpec("flash_attn_interface", None), attend
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module)
    (row,) = run(f"measure size=540p tier=fp8_attention {ONCE}", tmp_path, monkeypatch)
    assert row["attention_kernel"] == "fp8"
    assert set(calls) == {4050, 14802}


def test_rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("ladder size=256p repeat=1 options=compile=off", tmp_path, monkeypatch)
    missing = {row["key"]: row["reason"] for row in rows if "status" in row}
    assert list(missing) == ["fp8_attention"]
    assert "FlashAttention-3 is not installed" in missing["fp8_attention"]


def test_kernels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("micro size=256p", tmp_path, monkeypatch)
    missing = {(row["what"], row["name"], row["form"]) for row in rows if "reason" in row}
    # 8-bit products need padded widths only; without FlashAttention-3 its kernels are named as missing.
    assert missing == {("attention", "dense", "fa3")}


def test_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = run("decode size=256p repeat=1", tmp_path, monkeypatch)
    assert {row["decoder"] for row in rows} >= {"turbo", "wan", "b"}
    assert [row["measured"] for row in rows if "to_host_seconds" not in row["measured"]] == []
