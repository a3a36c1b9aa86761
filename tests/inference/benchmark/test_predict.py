"""Predictions at measured rates: from microbenchmarks of the same machine and size, labelled, compared with a pass."""

import json
from pathlib import Path
from typing import Any

import pytest

from inference.benchmark import calibrate, result_files
from inference.benchmark.__main__ import predict
from inference.benchmark.result_tables import calibrated_table
from inference.benchmark.roofline.cases import make
from inference.benchmark.roofline.work import forward
from magihuman.errors import UserError
from magihuman.models.flops import pointwise_bytes

MADE = {
    "how": "measured", "command": "c", "code": {"sources": "ffff"}, "date": "2026-01-02T03:04:05+00:00",
    "machine": "2 cores of X", "libraries": {"torch": "2.11"},
}  # fmt: skip


def _micro(rate: float) -> list[dict[str, Any]]:
    """Every product and kernel of the longest sequence at `rate` 10^12 FLOP/s."""
    rows: list[dict[str, Any]] = [{"what": "roof", "tflops": 1.0, "copy_tbps": 0.01}]
    for name in ("qkv", "proj", "up", "down"):
        for tokens, form, own in ((12, "as is", 99.0), (485, "as is", rate), (485, "padded", 77.0)):
            found = {"median": 1.0}
            row = {"what": "product", "name": name, "form": form, "tokens": tokens, "tflops": own}
            rows.append({**row, "seconds": found, "flops": own * 1e12, "size": "tiny"})
    attention = {"what": "attention", "name": "dense", "tokens": 485, "size": "tiny"}
    rows.append({**attention, "form": "sdpa", "tflops": rate, "seconds": {"median": 1.0}})
    rows.append({**attention, "form": "plain", "tflops": rate / 9, "seconds": {"median": 9.0}})
    rows.append({**attention, "form": "cudnn", "status": "n/a", "reason": "no GPU"})
    return rows


def test_a_pass_is_the_sum_of_its_parts(tmp_path: Path) -> None:
    rate = 0.05
    with pytest.raises(UserError, match=r"no microbenchmarks of size=tiny; run `python -m inference\.benchmark"):
        predict(output=str(tmp_path / "p"), results=str(tmp_path))
    path = result_files.write("micro", "tiny", _micro(rate), MADE, tmp_path)
    told = predict(output=str(tmp_path / "p"), results=str(tmp_path))
    (file,) = (tmp_path / "p").glob("*.json")
    values = json.loads(file.read_text())
    assert (values["kind"], values["rates_from"], values["measured"]) == ("predicted", path.name, None)
    assert "not measured itself" in values["provenance"]["how"]
    for stage in make("tiny").stages:
        parts, work = values["stages"][stage.name], forward(stage)
        assert parts["products"] == pytest.approx(work.products / (rate * 1e12), rel=1e-3)
        assert parts["attention"] == pytest.approx(work.attention / (rate * 1e12), rel=1e-3)
        least = pointwise_bytes(stage.config, stage.tokens.total) / 0.01e12
        assert parts["pointwise"] == pytest.approx(least, rel=1e-3)
        assert parts["total"] == pytest.approx(sum(v for k, v in parts.items() if k != "total"), rel=1e-3)
    assert "predicted seconds per pass" in told
    assert "no GPU was available" in calibrated_table(str(file.parent))  # rates of a CPU
    values["provenance"]["machine"] = "NVIDIA H100 80GB HBM3"
    file.write_text(json.dumps(values))
    table = calibrated_table(str(file.parent))
    assert table.count("*PREDICTED at measured rates*") == 2
    assert (
        f"| tiny fast base, H100 SXM | *PREDICTED at measured rates* | {values['stages']['base']['products']:.4f}"
        in table
    )
    assert "| measured" not in table


def test_beside_the_newest_measurement_of_the_same_machine(tmp_path: Path) -> None:
    result_files.write("micro", "tiny", _micro(0.05), MADE, tmp_path)
    totals = {stage.name: {"total": stage.tokens.total} for stage in make("tiny").stages}
    seconds = {"median": 0.8}
    row = {
        "size": "tiny", "model": "tiny", "tier": "fast", "options": {}, "dtype": "float32", "decoder": None,
        "geometry": {name: {"tokens": tokens, "steps": 8, "passes": 8} for name, tokens in totals.items()},
        "stages": {"base": {"median": 99.0}}, "processor_time": {"base": seconds, "sr": seconds},
    }  # fmt: skip
    result_files.write("measure", "tiny", [row], MADE, tmp_path)
    result_files.write("measure", "tiny", [row], {**MADE, "machine": "another"}, tmp_path)
    shorter = {name: {"tokens": {"total": 9}, "steps": 8, "passes": 8} for name in totals}
    later = {**MADE, "date": "2026-01-02T04:00:00+00:00"}
    result_files.write("measure", "tiny", [{**row, "geometry": shorter}], later, tmp_path)
    predict(output=str(tmp_path / "p"), results=str(tmp_path))
    values = json.loads(next((tmp_path / "p").glob("*.json")).read_text())
    assert values["measured"]["of"] == "processor time"
    assert "2-cores-of-x" in values["measured"]["file"]
    base = values["measured"]["stages"]["base"]
    assert base["seconds_per_pass"] == 0.1
    assert base["explained"] == pytest.approx(values["stages"]["base"]["total"] / 0.1, abs=1e-3)


def test_products_and_attention_may_lie_in_a_file_each(tmp_path: Path) -> None:
    """As the GPU suite writes them, one step after another; rates of another machine do not mix with them."""
    rows = _micro(0.05)
    roof, products, attention = rows[0], rows[1:13], rows[13:]
    assert {row["what"] for row in attention} == {"attention"}
    stranger = {**MADE, "machine": "another", "date": "2026-01-03T00:00:00+00:00"}
    older = {**MADE, "date": "2026-01-01T00:00:00+00:00"}
    result_files.write("micro", "tiny", [roof, *products], MADE, tmp_path)
    result_files.write("micro", "tiny", [roof, *attention], stranger, tmp_path)
    with pytest.raises(UserError, match="no microbenchmarks of size=tiny"):
        predict(output=str(tmp_path / "p"), results=str(tmp_path))
    (tmp_path / result_files.read(tmp_path)[-1]["file"]).unlink()
    result_files.write("micro", "tiny", [roof, *attention], older, tmp_path)
    predict(output=str(tmp_path / "p"), results=str(tmp_path))
    values = json.loads(next((tmp_path / "p").glob("*.json")).read_text())
    assert values["rates_from"].count(" and ") == 1
    assert values["provenance"]["date"] == MADE["date"]
    together = tmp_path / "together"
    result_files.write("micro", "tiny", rows, MADE, together)
    predict(output=str(together / "p"), results=str(together))
    assert json.loads(next((together / "p").glob("*.json")).read_text())["stages"] == values["stages"]


def test_experts_stay_in_16_bits_and_layers_without_windows_see_everything() -> None:
    def row(what: str, name: str, form: str, rate: float) -> dict[str, Any]:
        found = {"seconds": {"median": 1.0}, "flops": 1e12 * rate, "tflops": rate, "tokens": 65746}
        return {"what": what, "name": name, "form": form, **found}

    rows: list[dict[str, Any]] = [{"what": "roof", "copy_tbps": 3.0}]
    rows += [row("product", n, f, r) for n in calibrate._MATRICES for f, r in (("padded", 600), ("fp8", 1200))]
    rows += [row("attention", "dense", "cudnn", 500), row("attention", "window 11", "cudnn", 250)]
    stage = make("1080p").stages[-1]
    found = calibrate._one_pass(stage, rows, "fp8", "padded")
    work = forward(stage)
    assert found["products"] == pytest.approx(work.products * (32 / 40 / 1200e12 + 8 / 40 / 600e12), rel=1e-3)
    # perf.md: 8 global layers of 88.5 TFLOP, 32 local ones of 52.7.
    assert found["attention"] == pytest.approx(8 * 88.5 / 500 + 32 * 52.7 / 250, rel=2e-3)
