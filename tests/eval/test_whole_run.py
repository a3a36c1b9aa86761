"""The paper's protocol from prompts to tables in one command, with a judge and a recogniser of the real architectures.

Both have random weights of a tiny size, so that only the weights are missing: the judge's answers cannot be parsed, and the
transcripts are nonsense.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_judge import save_tiny_judge
from tiny_recognisers import save_glm

from eval.score_report import read_rows_of

pytestmark = pytest.mark.slow

CAPTION = "round face, ginger hair, blue shirt, green wall, says ma bi so"
WATCHED = """
import atexit, os, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
atexit.register(lambda: open(os.environ["IMPORTED"], "w").write(" ".join(sys.modules)))
"""


def test_suite_to_tables_and_again_without_a_model(tmp_path: Path) -> None:
    judge, recogniser = save_tiny_judge(tmp_path / "judge"), save_glm(tmp_path / "glm")
    rows = [
        {"name": "one", "prompt": CAPTION, "dialogue": "good morning", "language": "English"},
        {"name": "two", "prompt": CAPTION, "dialogue": "你 好 世 界", "language": "Mandarin"},
        {"name": "quiet", "prompt": CAPTION, "dialogue": ""},
    ]
    (tmp_path / "suite.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (tmp_path / "sitecustomize.py").write_text(WATCHED)

    def command() -> subprocess.CompletedProcess[str]:
        words = [
            "suite=suite.jsonl", "checkpoint=tiny/distill", "output=out", "steps=1", "seconds=1", "progress=false",
            "metrics=videoscore2,speech_errors,sound", f"videoscore2.weights={judge}", "videoscore2.device=cpu",
            "videoscore2.max_tokens=8", f"speech_errors.model={recogniser}", "speech_errors.device=cpu",
        ]  # fmt: skip
        paths = f"{tmp_path}:{Path(__file__).parents[2]}"
        environment = {**os.environ, "PYTHONPATH": paths, "IMPORTED": str(tmp_path / "imported"), "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            [sys.executable, "-m", "eval.run", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    first = command()
    # No answer of the judge can be parsed: said, counted, and the exit status is 1.
    assert first.returncode == 1, first.stderr
    assert "videoscore2_visual" in first.stderr
    assert "3 of 3 clips failed" in first.stderr
    results = {row.clip: row for row in read_rows_of(tmp_path / "out")["clips"]}
    assert set(results) == {"one", "two", "quiet"}
    for row in results.values():
        assert (row.values["videoscore2_visual"].value, row.values["videoscore2_visual"].status) == (None, "failed")
        assert row.texts["videoscore2_text"]
        assert row.texts["recogniser_text"].startswith("glm, sha256 ")
        assert row.values["loudness"].status == "ok"
    assert results["one"].values["wer_units"].value == 2
    assert results["two"].values["wer_units"].value == 4  # characters
    assert results["one"].values["wer"].value is not None
    assert results["quiet"].values["wer"].status == "skipped"
    assert results["quiet"].values["hallucinated_speech"].status == "ok"
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["measurements"]["videoscore2"]["identity"]["fingerprint"].startswith("sha256 ")
    assert set(summary["by_language"]) == {"en", "zh"}
    assert summary["columns"]["clips"]["videoscore2_visual"]["failed"] == 3

    before = {name: (tmp_path / "out" / name).read_bytes() for name in ("results.jsonl", "summary.json", "summary.png")}
    again = command()
    assert again.returncode == 1, again.stderr
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before
    imported = (tmp_path / "imported").read_text().split()
    assert "eval.metrics.videoscore2" in imported
    assert not {"torch", "transformers", "matplotlib", "scipy.stats"} & set(imported)
