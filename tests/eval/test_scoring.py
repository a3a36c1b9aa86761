"""Scoring: a value or a status with a reason for every clip and metric, the cache, distances of sets."""

import os
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from toy_metrics import NAMES, calls, metric_file, write_clip

from eval.clip_file import ClipFile
from eval.clip_list import read_clips
from eval.metrics.registry import measurements, metrics
from eval.score_cache import ScoreCache
from eval.score_rows import Value
from eval.scoring import score, select
from magihuman.errors import UserError

# ---- Status of every clip ----


def test_a_file_in_the_folder_is_all_that_a_new_metric_needs(toy):
    assert metrics()["toy_loud"].heading == "loudness, dB ↑"
    assert measurements()["toy_words"].options is not None
    assert "toy_absent" not in select(["cheap"])
    assert "toy_absent" in select(["all"])
    assert select(["toy_units"]) == ["toy_words"]


def test_every_clip_has_a_value_or_the_reason(toy, tmp_path):
    whole = write_clip(tmp_path / "clips/a.mp4")
    silent = write_clip(tmp_path / "clips/b.mp4", audio=False)
    cut = tmp_path / "clips/c.mp4"
    cut.write_bytes(whole.read_bytes()[:300])
    (tmp_path / "clips/d.mp4").touch()
    write_clip(tmp_path / "clips/e.mp4", frames=1, audio=False)
    prompts = {"a": "two words", "b": "nan here", "c": "never read", "d": "never read", "e": "crash"}
    for name, text in prompts.items():
        (tmp_path / f"clips/{name}.txt").write_text(text)
    scored = score(read_clips(tmp_path / "clips"), [*NAMES, "toy_absent"], progress=False)
    found = {r.clip: r.values for r in scored.rows}
    assert found["a"]["toy_words"] == Value(2.0)
    assert found["a"]["toy_brightness"].value == pytest.approx(ClipFile(whole).frames.mean())
    assert found["b"]["toy_loud"] == Value(None, "skipped", "the file has no audio")
    assert found["b"]["toy_words"] == Value(None, "failed", "toy_words is nan")
    assert found["c"]["toy_brightness"].status == "failed"
    assert found["d"]["toy_brightness"].status == "failed"
    assert "empty" in found["d"]["toy_brightness"].reason
    assert found["e"]["toy_brightness"] == Value(None, "skipped", "the file has one frame")
    assert found["e"]["toy_words"] == Value(None, "failed", "ZeroDivisionError: of nothing")
    assert {v["toy_absent"] for v in found.values()} == {
        Value(None, "unavailable", "there are no weights; hf download toy/toy")
    }
    summary = scored.summary()
    assert summary["toy_absent"]["value"] is None
    assert summary["toy_absent"]["unavailable"] == 5
    assert (summary["toy_brightness"]["n"], summary["toy_brightness"]["failed"]) == (2, 2)
    assert scored.rows[0].texts == {"toy_text": "a"}
    assert silent.exists()


def test_cheap_has_the_puppets_metrics_where_a_prompt_is_a_caption(toy, tmp_path):
    from magihuman.codecs.tiny_captions import FORMS

    assert "puppets" in select(["cheap"])
    path = write_clip(tmp_path / "a.mp4")
    clips = [
        ClipFile(path, name, prompt=prompt) for name, prompt in (("a", "A woman speaks."), ("b", FORMS["tiny"].example))
    ]
    assert "puppets" not in select(["cheap"], ["A woman speaks.", ""])
    assert "puppets" in select(["cheap", "puppets"], [""])
    assert "puppets" not in score(clips[:1], ["cheap"], progress=False).used
    assert "puppets" in score(clips, ["cheap"], progress=False).used


def test_a_measurement_sees_only_what_it_declares(toy, tmp_path):
    text = "def peek(clip, _):\n    return {'peek': float(clip.reference is not None) + len(clip.prompt)}\n"
    text += "MEASUREMENTS = (Measurement('peek', (Metric('peek', 'peek'),), peek, optional=('reference',)),)"
    clip = ClipFile(write_clip(tmp_path / "a.mp4"), prompt="words")
    clip.reference = ClipFile(clip.path)
    with metric_file(tmp_path / "peeking", text, "peeking"):
        assert score([clip], ["peek"], progress=False).rows[0].values["peek"].value == 1.0


def test_a_missing_value_without_a_reason_is_a_failure_that_names_it(tmp_path):
    text = "MEASUREMENTS = (Measurement('vague', (Metric('vague', 'v'), Metric('absent', 'a'), Metric('told', 't')), "
    text += (
        "lambda c, m: {'vague': 1.0, 'told': NotMeasured('nobody speaks'), **({'absent': 2.0} if c.prompt else {})},"
    )
    text += "inputs=(), optional=('prompt',)),)"
    path = write_clip(tmp_path / "a.mp4", frames=3)
    with metric_file(tmp_path / "m", text, "vaguely"):
        clips = [ClipFile(path, "a", prompt="x"), ClipFile(path, "b")]
        good, bad = (r.values for r in score(clips, ["vague"], progress=False).rows)
    assert good == {"vague": Value(1.0), "absent": Value(2.0), "told": Value(None, "skipped", "nobody speaks")}
    reason = "vague gives neither a value of absent nor NotMeasured with a reason"
    assert set(bad.values()) == {Value(None, "failed", reason)}


def test_what_a_measurement_does_not_declare_is_a_mistake_in_it(tmp_path):
    text = "MEASUREMENTS = (Measurement('wrong', (Metric('wrong', 'w'),), lambda c, m: {'other': 1.0}),)"
    with (
        metric_file(tmp_path / "m", text, "wrongly"),
        pytest.raises(ValueError, match="'other', which it does not declare"),
    ):
        score([ClipFile(write_clip(tmp_path / "a.mp4"))], ["wrong"], progress=False)


def test_two_files_cannot_give_one_metric(tmp_path):
    text = "MEASUREMENTS = (Measurement('{0}', (Metric('same', 's'),), None),)"
    with metric_file(tmp_path / "m", text.format("one"), "first_of_two"):
        with (
            metric_file(tmp_path / "n", text.format("two"), "second_of_two"),
            pytest.raises(ValueError, match="'same'"),
        ):
            metrics()


def test_limits_are_checked_before_memory_is_taken(tmp_path, monkeypatch, toy):
    clip = ClipFile(write_clip(tmp_path / "a.mp4", frames=20))
    monkeypatch.setattr("eval.clip_file.MAX_BYTES", 1000)
    value = score([clip], ["toy_brightness"], progress=False).rows[0].values["toy_brightness"]
    assert value.status == "failed"
    assert "is the most" in value.reason
    monkeypatch.setattr("eval.clip_file.MAX_SECONDS", 0.5)
    value = score([ClipFile(clip.path)], ["toy_brightness"], progress=False).rows[0].values["toy_brightness"]
    assert value.reason == "it lasts 1 s, and 0 s is the most"


# ---- Cache ----


def test_scoring_again_measures_nothing(toy, tmp_path):
    for number in range(3):
        write_clip(tmp_path / f"clips/{number}.mp4", level=60 + number, audio=number > 0)
        (tmp_path / f"clips/{number}.txt").write_text("parse" if number == 2 else "some words")
    cache = tmp_path / "cache.sqlite"
    first = score(read_clips(tmp_path / "clips"), NAMES, cache=cache, progress=False)
    assert sorted(calls(toy)) == ["toy_brightness"] * 3 + ["toy_loud"] * 2 + ["toy_words"] * 3
    again = score(read_clips(tmp_path / "clips"), NAMES, cache=cache, progress=False)
    assert calls(toy) == []
    assert again.measured == 0
    assert again.rows == first.rows
    assert first.rows[2].values["toy_words"] == Value(None, "failed", "the answer has no digit")


def test_a_copy_is_known_and_a_change_is_not(toy, tmp_path):
    cache, clip = tmp_path / "cache.sqlite", ClipFile(write_clip(tmp_path / "a.mp4"), prompt="some words")
    score([clip], NAMES, cache=cache, progress=False)
    calls(toy)
    copy = shutil.copy(clip.path, tmp_path / "copy.mp4")
    score([ClipFile(Path(copy), prompt="some words")], NAMES, cache=cache, progress=False)
    assert calls(toy) == []
    score([ClipFile(clip.path, prompt="other words now")], NAMES, cache=cache, progress=False)
    assert calls(toy) == ["toy_words"]
    score([clip], NAMES, {"toy_words": {"factor": "3"}}, cache, False)
    assert calls(toy) == ["toy_words"]
    write_clip(clip.path, level=30)
    score([ClipFile(clip.path, prompt="some words")], NAMES, cache=cache, progress=False)
    assert sorted(calls(toy)) == sorted(NAMES)


def test_an_unexpected_error_is_tried_again(toy, tmp_path):
    clip, cache = ClipFile(write_clip(tmp_path / "a.mp4"), prompt="crash"), tmp_path / "cache.sqlite"
    score([clip], ["toy_words"], cache=cache, progress=False)
    score([clip], ["toy_words"], cache=cache, progress=False)
    assert calls(toy) == ["toy_words", "toy_words"]


def test_a_model_is_loaded_once_and_only_when_a_value_is_missing(tmp_path):
    text = """
def load(options):
    note("load")
    return 5.0
MEASUREMENTS = (Measurement("toy_model", (Metric("toy_model", "m"),), lambda c, m: {"toy_model": m}, load=load, costly=True),)
"""
    folder = tmp_path / "m"
    clips = [ClipFile(write_clip(tmp_path / f"{n}.mp4", level=n)) for n in range(3)]
    with metric_file(folder, text, "toy_model"):
        first = score(clips, ["all", "toy_model"][1:], cache=tmp_path / "c.sqlite", progress=False)
        assert calls(folder) == ["load"]
        assert [r.values["toy_model"].value for r in first.rows] == [5.0] * 3
        score(clips, ["toy_model"], cache=tmp_path / "c.sqlite", progress=False)
        assert calls(folder) == []


def test_a_model_that_cannot_be_loaded_is_unavailable(tmp_path):
    text = """
def load(options):
    raise OSError("weights.bin is cut off")
MEASUREMENTS = (Measurement("toy_model", (Metric("toy_model", "m"),), lambda c, m: {"toy_model": m}, load=load, costly=True),)
"""
    with metric_file(tmp_path / "m", text, "toy_model"):
        clip = ClipFile(write_clip(tmp_path / "a.mp4"))
        value = score([clip], ["toy_model"], cache=tmp_path / "c", progress=False).rows[0].values["toy_model"]
    assert value.status == "unavailable"
    assert "weights.bin is cut off" in value.reason


def test_several_processes_give_the_same(tmp_path):
    clips = [ClipFile(write_clip(tmp_path / f"{n}.mp4", level=20 * n, audio=n != 1), prompt="x y") for n in range(4)]
    names = [name for name, one in measurements().items() if not one.costly]
    alone = score(clips, names, progress=False)
    together = score([ClipFile(c.path, prompt="x y") for c in clips], names, progress=False, workers=2)
    assert together.rows == alone.rows


def test_a_damaged_cache_is_put_aside(toy, tmp_path, capsys):
    cache = tmp_path / "cache.sqlite"
    cache.write_bytes(b"no database at all, but long enough to have a header" * 100)
    scored = score([ClipFile(write_clip(tmp_path / "a.mp4"))], ["toy_loud"], cache=cache, progress=False)
    assert scored.measured == 1
    assert "is damaged" in capsys.readouterr().err
    with sqlite3.connect(cache) as data:
        assert data.execute("select count(*) from results").fetchone() == (2,)  # the value and the frame rate


def test_a_process_that_hashes_keeps_no_other_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr("eval.score_cache.WAIT", 0.05)
    (tmp_path / "a").write_bytes(b"a")
    with ScoreCache(tmp_path / "c.sqlite") as one, ScoreCache(tmp_path / "c.sqlite") as other:
        one.sha256(tmp_path / "a")
        other.put({"key": b"value"})
        assert one.get(["key"]) == {"key": b"value"}
        one._data.execute("begin immediate")
        with pytest.raises(UserError, match="cannot be written"):
            other.put({"key": b"other"})


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be opened .* give another with cache=FILE"):
        ScoreCache(tmp_path / "file" / "c.sqlite")


def _dies(job):
    os._exit(9)


@pytest.mark.parametrize("fps", [0.0, 0.01, 90000.0, float("nan")])
def test_an_impossible_frame_rate_is_a_reason(toy, tmp_path, monkeypatch, fps):
    from dataclasses import replace

    from magihuman.media import reading

    clip = ClipFile(write_clip(tmp_path / "a.mp4", frames=3))
    known = reading.probe(clip.path)
    monkeypatch.setattr(reading, "probe", lambda path: replace(known, fps=fps))
    row = score([clip], ["toy_loud", "toy_brightness"], progress=False).rows[0]
    for value in row.values.values():
        assert value.status == "failed"
        assert value.reason.startswith(f"its container says {fps:g} frames per second, and 1 to 240 are read")
    assert row.fps is None


def test_a_written_rate_of_a_thousand_is_refused(toy, tmp_path):
    clip = ClipFile(write_clip(tmp_path / "a.mp4", frames=50, fps=1000.0, audio=False))
    assert (
        "says 1000 frames per second"
        in score([clip], ["toy_brightness"], progress=False).rows[0].values["toy_brightness"].reason
    )


def test_channels_that_cancel_are_a_failure_with_its_reason(toy, tmp_path):
    """What needs one channel would have called this clip silent."""
    from magihuman.media.mp4 import write_mp4

    wave = 0.3 * np.sin(2 * np.pi * 220 * np.arange(6400) / 16000).astype(np.float32)
    write_mp4(tmp_path / "a.mp4", np.zeros((10, 32, 32, 3), np.uint8), 25, np.stack([wave, -wave]), 16000)
    value = score([ClipFile(tmp_path / "a.mp4")], ["toy_loud"], progress=False).rows[0].values["toy_loud"]
    assert (value.status, value.value) == ("failed", None)
    assert value.reason.startswith("its channels cancel: their mean has 0.")


def test_a_killed_process_is_one_line(toy, tmp_path, monkeypatch):
    monkeypatch.setattr("eval.scoring._measure_in_worker", _dies)
    clips = [ClipFile(write_clip(tmp_path / f"{n}.mp4", frames=3)) for n in range(2)]
    with pytest.raises(UserError, match="was killed, perhaps for want of memory; run again with workers=1"):
        score(clips, ["toy_loud"], progress=False, workers=2)


# ---- Sets ----


def test_distance_of_sets_and_its_reasons(tmp_path):
    text = """
import numpy as np
def features(clip, _):
    note("features")
    return np.array([clip.frames.mean()])
def apart(own, real, groups, of_real):
    if len(own) < 2:
        raise NotMeasured("needs two clips")
    return {"toy_apart": float(np.mean(own) - np.mean(real))}
MEASUREMENTS = (SetMeasurement("toy_apart", (Metric("toy_apart", "apart"),), features, apart, costly=False),)
"""
    folder, cache = tmp_path / "m", tmp_path / "c.sqlite"
    real = ClipFile(write_clip(tmp_path / "real.mp4", level=50))
    clips = [ClipFile(write_clip(tmp_path / f"{n}.mp4", level=60 + n), reference=real) for n in range(2)]
    with metric_file(folder, text, "toy_sets"):
        scored = score(clips, ["toy_apart"], cache=cache, progress=False)
        expected = np.mean([clip.frames.mean() for clip in clips]) - real.frames.mean()
        assert scored.sets["toy_apart"]["value"] == pytest.approx(expected, abs=1e-4)
        assert calls(folder) == ["features"] * 3
        score(clips, ["toy_apart"], cache=cache, progress=False)
        assert calls(folder) == []
        assert score(clips[:1], ["toy_apart"], progress=False).sets["toy_apart"]["reason"] == "needs two clips"
        alone = score([ClipFile(clips[0].path)], ["toy_apart"], progress=False).sets["toy_apart"]
        (tmp_path / "broken.mp4").write_bytes(b"broken")
        lost = score([*clips, ClipFile(tmp_path / "broken.mp4")], ["toy_apart"], progress=False).sets["toy_apart"]
        bad = ClipFile(tmp_path / "broken.mp4")
        half = [clips[0], ClipFile(clips[1].path, reference=bad)]
        unread = score(half, ["toy_apart"], progress=False).sets["toy_apart"]
        calls(folder)
        shared = [ClipFile(clip.path, reference=ClipFile(real.path)) for clip in clips]
        score(shared, ["toy_apart"], progress=False)
        assert calls(folder) == ["features"] * 3, "one reference of two clips is measured and counted once"
    assert (alone["status"], alone["value"]) == ("skipped", None)
    assert (lost["n"], lost["failed"], lost["value"]) == (2, 1, pytest.approx(expected, abs=1e-4))
    assert lost["reason"].startswith("broken: ")
    assert unread["reason"].startswith("1 of 2 reference clips are left out (broken: ")
