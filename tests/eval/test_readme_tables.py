"""The README's figures come from committed files, and what a command costs is measured as said."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from eval import cost, readme_tables
from magihuman.errors import UserError
from magihuman.io import markdown
from magihuman.zoo.commands import PeaksOptions, peaks


def test_all_readmes_are_rendered_from_their_files() -> None:
    readme_tables.update(check=True)


def test_tables_of_a_package_page_are_rendered_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cost_file = Path("eval/results/readme_run.json")
    for page in ("README.md", "eval/README.md", "inference/benchmark/README.md"):
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text("# Page without tables\n")
    (tmp_path / "eval" / "results").mkdir()
    (tmp_path / cost_file).write_text((readme_tables.REPO / cost_file).read_text())
    monkeypatch.setattr(readme_tables, "REPO", tmp_path)
    stale = f"<!-- cost {cost_file} -->\n| old |\n<!-- end -->\n"
    for page in ("eval/README.md", "inference/benchmark/README.md"):
        (tmp_path / page).write_text(stale)
        with pytest.raises(UserError, match=f"{page} differs"):
            readme_tables.update(check=True)
        readme_tables.update()
        text = (tmp_path / page).read_text()
        assert "| old |" not in text
        link = text.rpartition("](")[2].partition(")")[0]
        assert ((tmp_path / page).parent / link).resolve() == tmp_path / cost_file
        readme_tables.update(check=True)


def test_the_metrics_of_the_glossary_are_those_of_the_tables(tmp_path: Path) -> None:
    text = readme_tables.render("<!-- metrics puppet_clips true_frames -->\n<!-- end -->")
    assert "| `sharpness` | sharpness (variance of the Laplacian) |  | nearer to the target is better |" in text
    assert "| `psnr` | PSNR | dB | higher is better |" in text


def test_a_changed_figure_is_noticed() -> None:
    text = (readme_tables.REPO / "README.md").read_text()
    block = markdown.block_pattern(readme_tables.KINDS).search(text)
    assert block is not None
    tampered = text.replace(block[0], block[0].replace("0.", "0.9", 1).replace(" min", "0 min", 1))
    assert tampered != text
    assert readme_tables.render(tampered) == text


def test_block_without_file_says_which() -> None:
    with pytest.raises(UserError, match=r"no/such\.json"):
        readme_tables.render("<!-- scores no/such.json -->\n<!-- end -->")


def test_peaks_are_shown_by_mode_and_only_if_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme_tables, "REPO", tmp_path)
    file = tmp_path / "peaks.json"
    peaks(PeaksOptions("15b", output=str(file)))
    values = json.loads(file.read_text())
    table = readme_tables.peaks_table("peaks.json").splitlines()
    assert table[0] == (
        "| computed, GB | wan, fast | wan, balanced | wan, low | turbo, fast | turbo, balanced | turbo, low |"
    )
    assert len(table) == 2 + 9 + 2
    largest = [row["bytes"] for row in values["peaks"] if (row["resolution"], row["weights"]) == ("1080p", "int4")]
    assert table[10] == f"| 1080p, int4 | {' | '.join(f'{size / 1e9:.1f}' for size in largest)} |"
    values["peaks"][0]["how"] = "measured"
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match="cannot be rendered"):
        readme_tables.render("<!-- peaks peaks.json -->\n<!-- end -->")


def test_cost_counts_children_and_time(tmp_path: Path) -> None:
    allocated = 120_000_000
    child = f"import time; allocated = b'x' * {allocated}; time.sleep(1.2)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
    figures = cost.measure_cost(shlex.join([sys.executable, "-c", parent]), str(tmp_path / "cost.json"))
    assert allocated < figures["peak_memory_bytes"] < allocated + 100_000_000
    assert 1.2 < figures["seconds"] < 15
    assert json.loads((tmp_path / "cost.json").read_text()) == figures


def test_failed_command_records_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="status 3"):
        cost.measure_cost(f'{sys.executable} -c "raise SystemExit(3)"', str(tmp_path / "cost.json"))
    assert not (tmp_path / "cost.json").exists()
