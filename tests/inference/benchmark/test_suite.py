"""The GPU suite in dry mode on the CPU, and what becomes of its lines: result files, tables, the picture."""

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from inference.benchmark import calibrate, result_files, result_tables, suite
from inference.benchmark import collect as collecting
from inference.benchmark.__main__ import collect, runs_folder
from inference.benchmark.__main__ import suite as run_suite
from inference.benchmark.budget import BudgetedRun, choose, read_runs
from inference.benchmark.collect import rows_of
from inference.benchmark.figure import draw, values
from inference.benchmark.result_tables import memory_table, profile_table, training_table
from inference.benchmark.roofline import predict
from inference.benchmark.roofline.cases import make
from inference.benchmark.timers import kind_of, profile_pass
from magihuman.errors import UserError
from magihuman.zoo import memory_plan

H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def as_if(dry: Path, folder: Path, machine: str, model: str = "15b", **changes: Any) -> Path:
    """The dry run as a run on a GPU would have written it."""
    lines = [json.loads(line) for line in dry.read_text().splitlines()]
    header = lines[0]
    header["dry"] = False
    header["provenance"] |= {"machine": machine, "gpu": {"power.limit": "700 W"}} | changes
    for line in lines[1:]:
        line["peak_bytes"] = 40 * 10**9
        if "first_pass" in line and "row" in line:
            line["row"]["model"] = model
            stages = make(line["size"]).stages
            for stage in stages:
                line["row"]["geometry"][stage.name]["tokens"]["total"] = stage.tokens.total
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "suite.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_every_step_runs(dry_suite: Path) -> None:
    (run,) = read_runs(dry_suite)
    failed = {name: line.get("reason") for name, line in run.steps.items() if line["status"] != "done"}
    assert failed == {}
    planned = [step.name for step in suite.SuiteBench(torch.device("cpu"), dry=True).steps()]
    assert list(run.steps) == planned
    # As the issue of this benchmark orders them: correctness before times, exact before approximate.
    order = ["roof", "truth", "reference 256p", "fast 256p", "fast 540p", "fast 1080p", "decode 1080p turbo"]
    order += ["fp8 256p", "fp8 540p", "fp8 1080p", "kernels 256p", "decode 256p turbo search", "fp8_attention 256p"]
    assert [name for name in planned if name in order] == order
    assert run.header["provenance"]["code"]["sources"]
    log = dry_suite.with_suffix(".log").read_text()
    assert all(f"{name}: done" in log for name in planned)


def test_errors_are_those_of_the_tiers(dry_suite: Path) -> None:
    (run,) = read_runs(dry_suite)
    for name in ("256p", "windows", "540p"):
        fast = run.steps[f"fast {name} first"]["errors"]["against_float32_reference"]
        fp8 = run.steps[f"fp8 {name} first"]["errors"]["against_float32_reference"]
        assert fast["video_relative_l2"] < 1e-5 < 1e-3 < fp8["video_relative_l2"] < 0.3
    assert run.steps["reference 256p first"]["errors"]["against_float32_reference"]["video_relative_l2"] == 0
    # The tiny network of the dry run has the structure of the real one: local layers and windows at 1080p.
    assert run.steps["fast 1080p first"]["row"]["geometry"]["sr"]["window"] == 1
    assert run.steps["fast 540p first"]["row"]["geometry"]["sr"]["window"] is None


def test_a_row_is_put_together_from_the_steps_that_measured_its_parts(dry_suite: Path) -> None:
    (run,) = read_runs(dry_suite)
    rows = {(row["tier"], row["size"], row["decoder"]["name"]): row for row in rows_of(run)["measure"]}
    assert {(tier, size) for tier, size, _ in rows} == {
        *((tier, size) for tier in ("fast", "fp8", "fp8_attention") for size in suite.SIZES), ("reference", "256p"),
    }  # fmt: skip
    row = rows["fast", "540p", "b"]
    counted = [line for line in run.runs["fast 540p"] if line["counted"]]
    assert len(run.runs["fast 540p"]) > len(counted) >= 1
    base = median(line["times"]["base"] for line in counted)
    sr = median(line["times"]["sr"] for line in counted)
    names = ("decode 540p b", "decode 540p b search")
    decoded = [run.steps[name]["row"]["measured"]["to_host_seconds"]["median"] for name in names]
    assert row["stages"]["sr"]["median"] == sr
    assert row["comparable"]["median"] == pytest.approx(base + sr + min(decoded))
    assert row["rates"]["sr"]["tflops"] == pytest.approx(
        row["geometry"]["sr"]["passes"] * row["geometry"]["sr"]["flops_per_pass"] / sr / 1e12, abs=1e-5
    )
    assert set(row["errors"]) == {"base", "sr"}
    assert set(rows["fast", "1080p", "turbo"]["errors"]) == {"base", "windows"}
    # Each pass is timed inside of its loop.
    for line in counted:
        assert [len(line["passes"][name]) for name in ("base", "sr")] == [2, 1]
        assert sum(line["passes"]["base"]) <= line["times"]["base"]


@pytest.mark.parametrize("share", [0.03, 0.2, 0.37, 0.5, 0.73, 0.9, 0.999])
def test_any_beginning_of_the_file_can_be_collected(dry_suite: Path, share: float, tmp_path: Path) -> None:
    """A run that was killed: what was measured before counts, an incomplete line does not."""
    text = as_if(dry_suite, tmp_path, H100).read_bytes()
    size = max(text.index(b"\n") + 1, int(share * len(text)))
    size -= text[size : size + 1] == b"\n"  # with no more than its end missing a line is still whole
    cut = text[:size]
    (tmp_path / "cut.jsonl").write_bytes(cut)
    told = collect(str(tmp_path / "cut.jsonl"), output=str(tmp_path / "out"))
    (run,) = read_runs(tmp_path / "cut.jsonl")
    assert run.whole == cut.endswith(b"\n")
    assert ("is incomplete" in told) == (not run.whole)
    assert len(run.steps) + sum(map(len, run.runs.values())) == cut.count(b"\n") - 1
    table = result_tables.latency_table(str(tmp_path / "out"))
    rows = {line.split("|")[1].strip() for line in table.splitlines() if "| H100 SXM | fast (E1)" in line}
    counted = {name for name, lines in run.runs.items() if any(line["counted"] for line in lines)}
    assert rows == {size for size in suite.SIZES if f"fast {size}" in counted}


def test_cards_stay_apart_and_the_published_one_comes_first(dry_suite: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    collect(str(as_if(dry_suite, tmp_path / "a", H200, date="2026-11-01T00:00:00+00:00")), output=str(out))
    collect(str(as_if(dry_suite, tmp_path / "b", H100, date="2026-11-02T00:00:00+00:00")), output=str(out))
    table = result_tables.latency_table(str(out))
    first, _, second = table.partition("H200 SXM, another card than the published one:")
    assert "| H100 SXM |" in first
    assert "H200 SXM |" not in first
    assert "| H200 SXM |" in second
    assert "H100" not in second.partition("H100 SXM, base loop")[0]
    assert len(re.findall(r"\| 1080p \| H100 SXM \| fast \(E1\), auto, (turbo|b) ", first)) == 2
    error = next(line for line in first.splitlines() if "fp8 (approximate), auto, b" in line).split("|")[-3]
    assert 1e-3 < float(error) < 0.3
    measured = [row for row in result_files.measured(out) if row["size"] == "256p" and row["decoder"]["name"] == "b"]
    seconds = {row["tier"]: row["stages"]["base"]["median"] for row in measured}
    ratio = f"fast {seconds['reference'] / seconds['fast']:.2f}x"
    line = next(line for line in table.splitlines() if "network as written, eager" in line and "H100" in line)
    assert ratio in line
    bars = values(out)["measured"]
    names = [bar["name"] for bar in bars if bar["size"] == "1080p"]
    assert names[0] == "published"
    assert "H100" in names[1]
    assert "H200" in names[-1]
    assert draw(out).stat().st_size > 10_000


def test_where_the_time_goes_beside_the_prediction(dry_suite: Path, tmp_path: Path) -> None:
    collect(str(as_if(dry_suite, tmp_path / "a", H100)), output=str(tmp_path / "out"))
    lines = profile_table(str(tmp_path / "out")).splitlines()
    measured = next(line for line in lines if "1080p fast" in line and "| measured" in line)
    kinds = [float(cell) for cell in measured.split("|")[3:-1]]
    assert sum(kinds[:-1]) == pytest.approx(kinds[-1], rel=0.02, abs=1e-3)
    predicted = next(line for line in lines if "1080p fast" in line and "predicted" in line)
    # No FlashAttention-3 ran, so the rates are those assumed of cuDNN.
    parts = predict.one_pass(make("1080p").stages[-1], predict.rates_of("fast", "cudnn"), predict.H100)
    assert f"{parts.attention:.4f}" in predicted
    assert predict.rates_of("fast", "fa3").attention > predict.rates_of("fast", "cudnn").attention
    memory = memory_table(str(tmp_path / "out"))
    assert "| 256p fast, H100 SXM | measured peak | 40.0 |" in memory
    assert "computed by `zoo plan`" in memory


def test_one_command_makes_everything_that_is_committed(
    dry_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result files, predictions at the measured rates, the picture, and the tables of every page."""
    results, predictions = tmp_path / "results", tmp_path / "predictions"
    results.mkdir()
    blocks = [f"<!-- latency {results} -->", f"<!-- calibrated {predictions} -->", f"<!-- profile {results} -->"]
    (tmp_path / "PAGE.md").write_text("".join(f"{block}\n<!-- end -->\n" for block in blocks))
    monkeypatch.setattr(result_files, "FOLDER", results)
    monkeypatch.setattr(calibrate, "FOLDER", predictions)
    monkeypatch.setattr(result_tables, "REPO", tmp_path)
    monkeypatch.setattr(result_tables, "PAGE", "PAGE.md")
    told = collect(str(as_if(dry_suite, tmp_path / "a", H100)))
    assert "rendered: PAGE.md" in told
    assert f"drawn: {results / 'latency.png'}" in told
    assert len(list(predictions.glob("*.json"))) == 2 * len(suite.SIZES)
    page = (tmp_path / "PAGE.md").read_text()
    assert "| 1080p | H100 SXM | fast (E1), auto, turbo | 4050 / 65746 |" in page
    values = json.loads(next(predictions.glob("256p-fp8-*.json")).read_text())
    measured = values["measured"]["stages"]["base"]
    assert measured["explained"] == pytest.approx(
        values["stages"]["base"]["total"] / measured["seconds_per_pass"], rel=0.02, abs=1e-3
    )
    shown = f"{measured['seconds_per_pass']:.4f}; {measured['explained']:.0%} explained"
    assert any("256p fp8" in line and shown in line for line in page.splitlines())
    assert "predicted" not in "".join(line.lower() for line in page.splitlines() if "| measured" in line)


def test_a_row_takes_what_its_own_run_lacks_from_another_one(dry_suite: Path, tmp_path: Path) -> None:
    """The decoder of an earlier run on the same machine; and the peak of the pass that was recorded as a graph."""
    file = as_if(dry_suite, tmp_path, H100)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[1:]:
        line["peak_bytes"] = 45 * 10**9 if line["step"].endswith("first") else 31 * 10**9
    header, *rest = lines
    later = {**header, "provenance": {**header["provenance"], "date": "2027-01-01T00:00:00+00:00"}}
    without = [line for line in rest if not line["step"].startswith("decode")]
    only = [line for line in rest if line["step"].startswith("decode")]

    def table(runs: list[Any]) -> list[Any]:
        file.write_text("".join(json.dumps(line) + "\n" for line in runs))
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        collect(str(file), output=str(out))
        return [row for found in result_files.read(out) if found["kind"] == "measure" for row in found["rows"]]

    together = table([header, *only, later, *without])
    assert {row["decoder"]["name"] for row in together} == {"turbo", "b"}
    assert {row["peak_memory_bytes"] for row in together} == {45 * 10**9}
    elsewhere = {**later, "provenance": {**later["provenance"], "machine": H200}}
    assert [row["decoder"] for row in table([header, *only, elsewhere, *without])] == [None] * 10


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "products"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel>>", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_128x128x128_4x1x1_kernel0_0", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64>>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", "attention"),
        ("triton_red_fused_add_mean_mul_pow_rsqrt_3", "pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "pointwise"),
        ("Memset (Device)", "other"),
    ],
)
def test_kernels_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_a_profiler_that_sees_nothing_is_no_idle_device() -> None:
    with pytest.raises(RuntimeError, match="the profiler saw no kernel"):
        profile_pass(lambda: None, torch.device("cpu"))
    found = profile_pass(lambda: torch.ones(64, 64) @ torch.ones(64, 64), torch.device("cpu"))
    assert found["kinds"]["products"] > 0
    assert sum(found["kinds"].values()) == pytest.approx(found["wall"], rel=0.2, abs=1e-3)


def test_planned_memory_is_the_plan_command_s() -> None:
    found = suite.planned_bytes(make("1080p"))
    request = memory_plan.ClipRequest(
        make("1080p").stages[0].config, 2, (4, 16, 16), True, 125, 126, 256, 448,
        second=make("1080p").stages[1].config, enlarged=(1088, 1920), turbo=True,
    )  # fmt: skip
    by_name = {need.stage: need.alone for need in memory_plan.stage_memory(request)}
    assert found == by_name["refine"]
    assert suite.planned_bytes(make("256p")) == by_name["sample"]


def test_where_the_host_waited_is_of_the_run_that_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Looked:
        def __init__(self, *_: Any) -> None:
            self.waits: dict[str, list[str]] = {}
            self.worked: dict[str, float] = {}

        def run(self, look_for_waits: bool) -> dict[str, float]:
            self.waits = {"base": ["b.py:2", "a.py:1", "b.py:2"] if look_for_waits else []}
            return {"base": 0.5, "request": 0.5}

    monkeypatch.setattr(suite, "TimedRequest", Looked)
    bench = suite.SuiteBench(torch.device("cpu"), dry=True)
    bench.run = BudgetedRun(tmp_path, "suite", 600)
    steps = choose(bench.steps(), "fast 256p")
    bench.run.header("suite", True, {})
    bench.run.run(steps)
    (found,) = read_runs(bench.run.results)
    assert found.steps["fast 256p"]["host_waits"] == {"base": ["a.py:1", "b.py:2"]}
    assert [line["counted"] for line in found.runs["fast 256p"]] == [False, True]


def test_collecting_refuses_what_is_no_result(dry_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="holds dry runs only, none of it is a result"):
        collect(str(dry_suite))
    assert runs_folder(None, True) != runs_folder(None, False) == Path("runs/latency")
    with pytest.raises(UserError, match=r"holds no \.jsonl file"):
        collect(str(tmp_path))
    for wrong in ({"dry": True, "minutes": 0.0}, {"minutes": -1.0}):
        with pytest.raises(UserError, match="minutes="):
            run_suite(**wrong)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch finds no GPU; `suite dry=true`"):
            run_suite()


def test_a_run_is_collected_once_and_knows_its_commit(
    dry_suite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lent machine has no git: the commit follows from the hash of the sources, where it can."""
    monkeypatch.setattr(collecting, "sources_hash", lambda: "abcd")
    monkeypatch.setattr(collecting, "code_version", lambda: {"commit": "f" * 40, "changed": False})
    out = tmp_path / "out"
    known = as_if(dry_suite, tmp_path / "a", H100, code={"sources": "abcd"})
    told = collect(str(known), output=str(out))
    assert "commit is unknown" not in told
    assert {found["provenance"]["code"]["commit"] for found in result_files.read(out)} == {"f" * 40}
    count = len(list(out.glob("*.json")))
    assert "is there already" in collect(str(known), output=str(out))
    assert len(list(out.glob("*.json"))) == count
    other = as_if(dry_suite, tmp_path / "b", H100, code={"sources": "changed"}, date="2026-01-01T00:00:00+00:00")
    assert "the commit is unknown" in collect(str(other), output=str(out))


def test_the_committed_tables_have_no_row_of_a_gpu_that_was_not_there() -> None:
    if any("gpu" in found["provenance"] for found in result_files.read()):
        pytest.skip("a GPU has been measured")
    folder = "inference/results/latency"
    for table in (profile_table, memory_table, training_table):
        assert table(folder).endswith("Nothing measured yet: no GPU was available.")
    assert "No row of ours: no H100 was available yet." in result_tables.latency_table(folder)
