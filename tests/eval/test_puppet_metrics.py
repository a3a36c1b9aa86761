"""The puppets' metrics in the registry: a new one is one entry or one file, and every command has it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data.tiny.puppets import FPS, SAMPLE_RATE, draw_puppet, render, synthesise
from eval.clip_file import ClipFile, NotMeasured
from eval.metrics.puppet_clips import CLIP_METRICS
from eval.metrics.registry import measurements, metrics, metrics_of
from eval.puppet_scores import score_clip
from magihuman.media.mp4 import write_mp4

REPO = Path(__file__).resolve().parents[2]
PUPPET = draw_puppet(71, 0)

ENTRY = """    PuppetMetric(
        "vowel_seconds", "length of the vowels", "s", "target",
        of=lambda clip: sum(end - start for start, end in clip.speech.vowel_spans) or None,
        compared=True,
    ),
"""
FILE = '''
"""Mean of all pixels."""

from eval.metrics.registry import Measurement, Metric

METRIC = Metric("pixel_mean", "mean of all pixels", "8-bit levels", "up")
MEASUREMENTS = (Measurement("pixel_mean", (METRIC,), lambda clip, _: {"pixel_mean": float(clip.frames.mean())}),)
'''
USE = """
import json
from eval import clip_values, formatting, puppet_tables
from eval.clips import ground_truth, held_out
from eval.compare_runs.run_differences import paired_differences
from eval.metrics.registry import measurements, metrics
from eval.paired import ROWS
puppets = held_out(2)
scores = ground_truth(puppets).score()
found = {"columns": {"a": {**scores.to_dict(), "n": 2}}}
values = {
    key: clip_values.ClipValues(paired={"vowel_seconds": {str(n): n + x for n in range(9)}, "pixel_mean": {"a": x}})
    for key, x in (("mine", 1.0), ("theirs", 0.0))
}
print(json.dumps({
    "seconds": scores.table["vowel_seconds"].value,
    "spoken": sum(s.vowel_seconds for p in puppets for s in p.syllables) / 2,
    "terminal": puppet_tables.scores_text(found),
    "markdown": puppet_tables.scores(found, ["vowel_seconds"]),
    "glossary": formatting.glossary("puppet_clips", "pixel_mean"),
    "dmd2": [row.name for row in ROWS],
    "puppets": [metric.key for metric in measurements()["puppets"].metrics],
    "differences": paired_differences(values["mine"], values["theirs"]),
}))
"""


def test_a_new_metric_is_one_entry_or_one_file_and_every_table_has_it(tmp_path: Path) -> None:
    shutil.copytree(REPO / "eval", tmp_path / "eval", ignore=shutil.ignore_patterns("results", "__pycache__"))
    puppet_clips = tmp_path / "eval" / "metrics" / "puppet_clips.py"
    before, start, after = puppet_clips.read_text().partition("METRICS: tuple[Metric, ...] = (\n")
    puppet_clips.write_text(before + start + ENTRY + after)
    (tmp_path / "eval" / "metrics" / "pixel_mean.py").write_text(FILE)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPO}"}
    done = subprocess.run(
        [sys.executable, "-c", USE], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds"] == pytest.approx(found["spoken"], rel=0.1)
    assert "length of the vowels, s =" in found["terminal"]
    assert f"| length of the vowels, s = | {found['seconds']:.3f} [" in found["markdown"]
    assert "| `vowel_seconds` | length of the vowels | s | nearer to the target is better |" in found["glossary"]
    assert "| `pixel_mean` | mean of all pixels | 8-bit levels | higher is better |" in found["glossary"]
    assert "vowel_seconds" in found["dmd2"]
    assert "vowel_seconds" in found["puppets"]
    assert found["differences"]["vowel_seconds"]["value"] == pytest.approx(1)
    assert found["differences"]["pixel_mean"]["value"] == pytest.approx(1)


@pytest.fixture
def clip(tmp_path: Path) -> ClipFile:
    file = tmp_path / "a.mp4"
    write_mp4(file, render(PUPPET), FPS, synthesise(PUPPET)[None], SAMPLE_RATE)
    return ClipFile(file, prompt=PUPPET.caption)


def test_a_puppets_file_is_measured_as_the_puppet(clip: ClipFile) -> None:
    found = measurements()["puppets"].measure(clip, None)
    drawn = score_clip(render(PUPPET), synthesise(PUPPET), PUPPET.caption)
    assert list(found) == list(CLIP_METRICS)
    assert (found["attributes"], found["vowels"], found["words_exact"], found["static"]) == (1, 1, 1, 0)
    assert found["sync_r"] == pytest.approx(drawn.sync.r, abs=0.01)
    assert found["amplitude"] == pytest.approx(drawn.vision.amplitude, rel=0.1)


def test_other_clips_are_no_puppets(clip: ClipFile, tmp_path: Path) -> None:
    measure = measurements()["puppets"].measure
    with pytest.raises(NotMeasured, match="no caption of a puppet"):
        measure(ClipFile(clip.path, prompt="A woman speaks."), None)
    with pytest.raises(NotMeasured, match="no caption of a puppet"):
        measure(ClipFile(clip.path, prompt="round face, grey hair, red shirt, blue wall, says"), None)
    wide = tmp_path / "wide.mp4"
    write_mp4(wide, render(PUPPET)[:, :32], FPS, None, SAMPLE_RATE)
    with pytest.raises(NotMeasured, match="64x32 at 25 fps"):
        measure(ClipFile(wide, prompt=PUPPET.caption), None)
    write_mp4(wide, render(PUPPET), 50, None, SAMPLE_RATE)
    with pytest.raises(NotMeasured, match="64x64 at 50 fps"):
        measure(ClipFile(wide, prompt=PUPPET.caption), None)


def test_rows_are_in_the_order_of_the_committed_tables() -> None:
    keys = list(metrics())
    assert keys.index("attributes") < keys.index("sync_r") < keys.index("sharpness") < keys.index("skin_distance")
    assert keys.index("skin_distance") < keys.index("nearest") < keys.index("psnr") < keys.index("parameters")
    assert {metric.key for metric in metrics_of("puppet_clips")} > CLIP_METRICS.keys()
    with pytest.raises(KeyError):
        metrics_of("no_such_module")


def test_a_metric_without_a_value_says_why(tmp_path):
    """A puppet that stands still and says nothing."""
    frames = render(PUPPET)
    path = tmp_path / "still.mp4"
    write_mp4(path, frames[:1].repeat(len(frames), 0), FPS)
    values = measurements()["puppets"].measure(ClipFile(path, prompt=PUPPET.caption), None)
    reasons = {key: str(value) for key, value in values.items() if isinstance(value, NotMeasured)}
    assert reasons == {
        **dict.fromkeys(("sync_lag0", "sync_lag"), "its mouth does not move, or its audio is silent"),
        **dict.fromkeys(("layout", "side", "size", "camera", "voice", "sound"), "its prompt leaves it open"),
        **dict.fromkeys(("layout_error", "recognisable"), "puppets of the world tiny have one layout"),
        "novel_pair": "its pair of shirt and wall is not held out of training",
        "open_recognisable": "its prompt leaves neither side nor size open, or its world has one layout",
        "lip_shape": "no vowel is heard",
        "lips_open": "neither m nor b is heard",
        "pause_hiss": "its audio is silent, or it rains",
        "mains_hum": "its audio is silent",
    }
    assert None not in values.values()
