"""Result files are only added to; tables and picture come from them and --check proves it; predictions stay apart."""

import json
from pathlib import Path
from typing import Any

import pytest

from inference.benchmark import result_files, result_tables
from inference.benchmark.__main__ import measure
from inference.benchmark.case_options import MeasureOptions
from inference.benchmark.figure import check_figures, draw, values
from inference.benchmark.result_tables import predicted_table
from inference.benchmark.roofline import predict
from magihuman.errors import UserError


def spread(seconds: float) -> dict[str, float]:
    return {"median": seconds, "min": 0.9 * seconds, "max": 1.1 * seconds, "cv": 0.01, "n": 5}


def made(date: str = "2026-01-02T03:04:05+00:00", gpu: bool = True) -> dict[str, Any]:
    machine = {"machine": "NVIDIA H100 80GB HBM3", "gpu": {}} if gpu else {"machine": "2 cores of X"}
    code = {"commit": "0123456789abcdef", "changed": False, "sources": "ffff"}
    return {
        "how": "measured",
        "command": "c",
        "threads": 1,
        "load_average": 2.5,
        "code": code,
        "date": date,
        "libraries": {"torch": "2.11"},
    } | machine


def row(size: str = "1080p", tier: str = "fast", base: float = 1.25, sr: float = 30.5) -> dict[str, Any]:
    tokens = {"video": 1, "audio": 1, "text": 1}
    geometry = {
        "base": {"tokens": {**tokens, "total": 4050}, "steps": 8, "passes": 8},
        "sr": {"tokens": {**tokens, "total": 65746}, "steps": 5, "passes": 5},
    }
    error = {"video_relative_l2": 2e-3, "audio_relative_l2": 5e-3}
    own = {"video_relative_l2": 4e-3, "audio_relative_l2": 3e-3}
    stages = {"base": base, "sr": sr, "video decode": 2.5, "to host": 0.25}
    return {
        "size": size, "model": "15b", "tier": tier, "exactness": "E1", "options": {}, "dtype": "bfloat16",
        "weights": "random, bfloat16, the same for both stages", "decoder": {"name": "turbo", "weights": "random"},
        "geometry": geometry, "steady": True, "comparable": spread(base + sr + 2.75),
        "stages": {name: spread(seconds) for name, seconds in stages.items()},
        "errors": {"sr": {"against_float32_reference": error, "reference_against_float32": own}},
        "processor_time": {"base": spread(5.5), "sr": spread(6.5)},
    }  # fmt: skip


def test_files_are_only_added(tmp_path: Path) -> None:
    first = result_files.write("measure", "1080p fast", [row()], made(), tmp_path)
    assert first.name == "20260102t030405-nvidia-h100-80gb-hbm3-measure-1080p-fast-0123456.json"
    before = first.read_bytes()
    second = result_files.write("measure", "1080p fast", [row(base=9)], made(), tmp_path)
    assert first.read_bytes() == before
    assert second != first
    assert [values["rows"][0]["stages"]["base"]["median"] for values in result_files.read(tmp_path)] == [1.25, 9]
    for damaged in ({**json.loads(before), "format": "x"}, {**json.loads(before), "provenance": {"how": "predicted"}}):
        (tmp_path / "x.json").write_text(json.dumps(damaged))
        with pytest.raises(UserError, match="not a result file"):
            result_files.read(tmp_path)


def test_latency_table_shows_what_was_measured(tmp_path: Path) -> None:
    result_files.write("measure", "a", [row()], made("2026-01-02T00:00:00+00:00"), tmp_path)
    result_files.write("measure", "b", [row(base=1.5)], made("2026-02-02T00:00:00+00:00"), tmp_path)
    result_files.write("measure", "c", [row(tier="fp8", base=0.75)], made(), tmp_path)
    result_files.write("measure", "d", [row("tiny", base=7.77)], made(gpu=False), tmp_path)
    table = result_tables.latency_table(str(tmp_path))
    ours = [line for line in table.splitlines() if line.startswith("| 1080p | H100 SXM |")]
    assert len(ours) == 2  # the newest of equal ones
    cells = [cell.strip() for cell in next(line for line in ours if "fast (E1)" in line).split("|")[1:-1]]
    assert cells == [
        "1080p", "H100 SXM", "fast (E1), turbo", "4050 / 65746", "8 / 5", "1.50 [1.35, 1.65]",
        "30.50 [27.45, 33.55]", "2.750", "34.75", "5.0e-03 of fp32; the reference 4.0e-03", "random",
    ]  # fmt: skip
    assert "| 1080p | H100, published | not said | not said | 8 / 5 | 1.6 | 31.0 | 5.8 | 38.4 |" in table
    assert "7.77" not in table
    cpu = result_tables.cpu_table(str(tmp_path))
    assert "| 5.500; 7.77 [6.99, 8.55] |" in cpu
    assert "load average of the machine at the start up to 2.5" in cpu
    assert "predicted" not in table.lower()


def test_a_newer_row_of_another_network_hides_nothing(tmp_path: Path) -> None:
    result_files.write("measure", "a", [row() | {"peak_memory_bytes": 45 * 10**9}], made(), tmp_path)
    other = row() | {"model": "1b", "peak_memory_bytes": 9 * 10**9}
    result_files.write("measure", "b", [other], made("2026-02-02T00:00:00+00:00"), tmp_path)
    assert "| 1080p fast, H100 SXM | measured peak | 45.0 |" in result_tables.memory_table(str(tmp_path))


def test_gains_stand_beside_predictions(tmp_path: Path) -> None:
    def rung(key: str, seconds: float) -> dict[str, Any]:
        return {
            "key": key,
            "size": "256p",
            "model": "15b",
            "stages": {"base": spread(seconds)},
            "attention_kernel": "cudnn",
        }

    failed = {"key": "fp8_attention", "size": "256p", "model": "15b", "status": "n/a", "reason": "no FlashAttention-3"}
    result_files.write(
        "ladder", "256p", [rung("eager", 0.25), rung("pad", 0.2), rung("attention", 0.1875), failed], made(), tmp_path
    )
    table = result_tables.gains_table(str(tmp_path))
    rows = [[cell.strip() for cell in line.split("|")[1:4]] for line in table.splitlines()[2:] if "|" in line]
    # Predicted and measured figures never share a row.
    assert [row[1:] for row in rows[:5]] == [
        ["*predicted*", "2.10"], ["measured", "2.00"], ["*predicted*", "1.72 (-0.38)"], ["measured", "1.60 (-0.40)"],
        ["*predicted*", "1.45 (-0.27)"],
    ]  # fmt: skip
    assert rows[-2:] == [["FP8 attention", "*predicted*", "0.87 (-0.06)"], ["FP8 attention", "measured", "n/a"]]
    # Attention by cuDNN is measured against what is assumed of cuDNN.
    assert ["windows as dense attention by cuDNN, merged by log-sum-exp", "measured", "1.50 (-0.10)"] in rows
    assert "attention cudnn" in table


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with every table, of a repository with one result."""
    monkeypatch.setattr(result_tables, "PAGE", "README.md")
    result_files.write("measure", "a", [row()], made(), tmp_path / "results")
    blocks = "\n\n".join(
        f"<!-- {kind} {result_tables.REPO / result_tables.SOURCES[kind]} -->\n<!-- end -->"
        if kind in result_tables.SOURCES
        else f"<!-- {kind} results -->\n<!-- end -->"
        for kind in result_tables.TABLES
    )
    monkeypatch.setattr(result_tables, "REPO", tmp_path)
    file = tmp_path / "README.md"
    file.write_text(f"# Title\n\n{blocks}\n\nend\n")
    assert result_tables.render_readme()
    return file


def test_check_finds_every_difference(readme: Path) -> None:
    assert not result_tables.render_readme(check=True)
    right = readme.read_text()
    assert right.count("\n|---") >= len(result_tables.TABLES)
    readme.write_text(right.replace("30.50", "29.50"))
    with pytest.raises(UserError, match="differs from its result files"):
        result_tables.render_readme(check=True)
    assert "29.50" in readme.read_text()
    readme.write_text(right)
    result_files.write("measure", "b", [row(tier="fp8")], made(), readme.parent / "results")
    with pytest.raises(UserError, match="differs from its result files"):
        result_tables.render_readme(check=True)
    readme.write_text("# Title without tables\n")
    with pytest.raises(UserError, match="has no block <!-- latency"):
        result_tables.render_readme(check=True)


def test_eval_readme_renders_the_same_blocks(readme: Path) -> None:
    from eval import readme_tables

    assert readme_tables.render(readme.read_text()) == readme.read_text()


def test_picture_carries_its_values(tmp_path: Path) -> None:
    result_files.write("measure", "a", [row()], made(), tmp_path)
    bars = values(tmp_path)
    ours = [bar for bar in bars["measured"] if bar["name"].startswith("fast")]
    assert ours == [{"size": "1080p", "name": "fast, H100 SXM", "base": 1.25, "sr": 30.5, "decode": 2.75}]
    assert not any(bar["name"] in ("fp8", "attention") for bar in bars["measured"])
    path = draw(tmp_path)
    assert path.stat().st_size > 10_000
    assert check_figures(tmp_path) == ["latency.png"]
    result_files.write("measure", "b", [row("256p")], made(), tmp_path)
    with pytest.raises(UserError, match="does not show the result files"):
        check_figures(tmp_path)


def test_check_is_a_flag_of_the_usual_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from magihuman.cli import settings

    assert settings(MeasureOptions, ["--check"], "x") == {"check": True}
    monkeypatch.setattr(result_tables, "REPO", tmp_path)
    monkeypatch.setattr(result_tables, "PAGE", "README.md")
    (tmp_path / "README.md").write_text("nothing\n")
    with pytest.raises(UserError, match="has no block"):
        measure(MeasureOptions(check=True))


def test_committed_files_are_whole() -> None:
    """The repository's own results can be read and shown."""
    for kind, table in result_tables.TABLES.items():
        argument = result_tables.SOURCES.get(kind, "inference/results/latency")
        assert table(argument).count("\n") > 2, kind
    assert all(found["provenance"]["code"]["sources"] for found in result_files.read())


def test_committed_predictions_are_what_the_code_computes() -> None:
    """Floors, targets and published times among them; the table is labelled."""
    for device, machine in (("h100", predict.H100), ("h200", predict.H200)):
        file = f"inference/results/predictions/{device}.json"
        found = json.loads((result_tables.REPO / file).read_text())
        computed = json.loads(json.dumps(predict.predictions(machine)))
        assert {key: found[key] for key in computed} == computed, (
            "run python -m inference.benchmark.roofline ladder output=..."
        )
        assert found["kind"] == "predicted"
        assert "not measured" in found["provenance"]["how"]
        table = predicted_table(file)
        assert table.startswith("| PREDICTED for one " + machine.name)
        assert "1.6 + 31.0 + 5.8 = **38.4**" in table
        assert "1.03 + 24.25 + 1.51 = **26.78**" in table
        assert "| *target, FP8 linears and attention* | 1 | 4 | 24 |  |" in table
    measured = next((result_tables.REPO / "inference/results/latency").glob("*-measure-*.json"))
    with pytest.raises(ValueError, match="not predicted"):
        predicted_table(str(measured))


def test_the_readme_and_its_figure_come_from_the_files() -> None:
    """What `python -m inference.benchmark --check` proves."""
    assert "tables and figures (1) are those of the result files" in measure(MeasureOptions(check=True))
