"""eval.score, eval.compare_scores and eval.doctor: folders, exit status, messages."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_metrics import metric_file, row, write_clip

from eval.clip_list import read_clips
from eval.score_rows import Value
from eval.scoring import score
from magihuman.errors import UserError


def command(module: str, *words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    path = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-m", f"eval.{module}", *words], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
    )  # fmt: skip


NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def test_a_finished_folder_is_scored_again_at_once_and_without_a_network(tmp_path):
    for number in range(3):
        write_clip(tmp_path / f"clips/{number}.mp4", level=50 * number)
    (tmp_path / "sitecustomize.py").write_text(NO_NETWORK)
    env = {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    words = ("clips=clips", "metrics=cheap", "workers=1", "output=out")
    first = command("score", *words, cwd=tmp_path, env=env)
    assert first.returncode == 0, first.stderr
    before = {path.name: path.read_text() for path in (tmp_path / "out").glob("results*")}
    start = os.times()
    again = command("score", *words, cwd=tmp_path, env=env)
    taken = os.times()
    assert again.returncode == 0, again.stderr
    assert "measuring" not in again.stderr
    assert {path.name: path.read_text() for path in (tmp_path / "out").glob("results*")} == before
    # Processor time, since it hardly depends on other work on the machine: 1.5 s, 5 s under a load of 10.
    assert taken.children_user + taken.children_system - start.children_user - start.children_system < 12
    assert json.loads((tmp_path / "out/summary.json").read_text())["clips"] == 3


def test_wrong_commands_are_one_line(tmp_path, capsys):
    from eval.score import main

    write_clip(tmp_path / "clips/a.mp4")
    clips = f"clips={tmp_path / 'clips'}"
    wrong = {
        "clips=nowhere": "does not exist",
        f"{clips} metrics=pupets": "did you mean",
        f"{clips} metrics=": "metrics= is empty",
        f"{clips} min_coverage=2": "should be between 0 and 1",
        f"{clips} workers=-1": "give at least 0",
        f"{clips} nothing.model=x": "there is no measurement 'nothing'",
        f"{clips} metrics=wer wer.model=x": "wer is a metric of speech_errors; give speech_errors.model=...",
        f"{clips} reference={tmp_path / 'none'}": "does not exist",
        f"{clips} bound=true": "needs reference clips",
        f"clips={__file__}": "neither a folder nor a manifest",
    }
    for words, text in wrong.items():
        with pytest.raises(SystemExit) as ended:
            main([*words.split(" "), "progress=false", f"cache={tmp_path / 'c.sqlite'}", f"output={tmp_path / 'o'}"])
        error = capsys.readouterr().err
        assert ended.value.code == 2, words
        assert text in error, (words, error)
        assert error.strip().count("\n") == 0, error


def test_folders_with_dots_have_results_of_their_own(toy, tmp_path, monkeypatch):
    from eval.score import ScoreOptions, run

    monkeypatch.chdir(tmp_path)
    for name in ("step.100", "step.200"):
        write_clip(tmp_path / name / "a.mp4", frames=3)
        run(ScoreOptions(clips=name, metrics="toy_loud", cache=None, progress=False, workers=1))
    assert sorted(path.name for path in (tmp_path / "runs/scores").iterdir()) == ["step.100", "step.200"]


def test_clips_without_a_reference_are_said(toy, tmp_path, capsys):
    from eval.score import ScoreOptions, run

    for name in ("made/a", "made/b", "real/a"):
        write_clip(tmp_path / f"{name}.mp4", frames=3)
    given = {"clips": str(tmp_path / "made"), "reference": str(tmp_path / "real"), "output": str(tmp_path / "o")}
    run(ScoreOptions(**given, metrics="toy_loud", cache=None, progress=False, workers=1))
    assert "has no clip of the name of 1 of 2 clips, such as 'b'" in capsys.readouterr().err


def test_clips_of_the_bound_are_never_taken_for_the_models(toy, tmp_path):
    from eval.score import ScoreOptions, run

    write_clip(tmp_path / "made/a.mp4", frames=3)
    write_clip(tmp_path / "made/scores/bound/0123-32x32x3.mp4", frames=3)
    given = {"clips": str(tmp_path / "made"), "output": str(tmp_path / "made/scores"), "metrics": "toy_loud"}
    assert run(ScoreOptions(**given, cache=None, progress=False, workers=1))["clips"] == 1


@pytest.fixture
def two_folders(toy, tmp_path):
    """Result folders of the same ten clips; the second is brighter."""
    from eval.score_report import write_scores

    for name, level in (("own", 90), ("other", 59)):
        for n in range(10):
            write_clip(tmp_path / f"{name}-clips/{n}.mp4", level=level + n % 3, frames=4)
        scored = score(read_clips(tmp_path / f"{name}-clips"), ["toy_brightness", "toy_loud"], progress=False)
        write_scores(tmp_path / name, {"clips": scored, "reference": scored} if name == "own" else {"clips": scored})
    return tmp_path / "own", tmp_path / "other"


def test_comparison_of_two_result_folders(two_folders, capsys):
    from eval.compare_scores import run as compare_scores

    own, other = two_folders
    found = compare_scores(str(own), str(other), output=str(own / "compared"))
    brightness = found["metrics"]["toy_brightness"]
    assert brightness["change"] == pytest.approx(28, abs=1.5)
    assert brightness["verdict"] == "better"  # nearer to the reference, which is its own
    assert found["metrics"]["toy_loud"]["verdict"] == "undecided"
    text = (own / "compared/comparison.md").read_text()
    assert "| brightness = |" in text
    assert "10 of 10" in text
    assert (own / "compared/comparison.png").stat().st_size > 5000
    assert "better" in capsys.readouterr().out


def test_distances_of_sets_are_compared_by_their_prompts(tmp_path, capsys):
    """FID of two systems against one reference: values with intervals, a difference, and why there is none."""
    import torch

    from eval.compare_scores import run as compare_scores
    from eval.score import main
    from eval.set_distance import difference

    class Mean(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[:, 0].flatten(1).mean(1), x[:, 0, :8].flatten(1).mean(1)], 1)

    torch.jit.script(Mean()).save(str(tmp_path / "mean.pt"))
    for n in range(6):
        for folder, level in (("real", 60), ("near", 64), ("far", 120)):
            write_clip(tmp_path / folder / f"{n}.mp4", level=level + 7 * n % 13, frames=4 + n % 3)
    common = ["metrics=fid", f"fid.extractor={tmp_path / 'mean.pt'}", "fid.size=16", "fid.frames=2", "progress=false"]
    common += [f"reference={tmp_path / 'real'}", f"cache={tmp_path / 'c.sqlite'}", "workers=1"]
    for folder in ("near", "far"):
        main([f"clips={tmp_path / folder}", f"output={tmp_path / 'o' / folder}", *common])
    found = compare_scores(str(tmp_path / "o/near"), str(tmp_path / "o/far"), output=str(tmp_path / "o/compared"))[
        "metrics"
    ]
    fid = found["fid"]
    assert (fid["verdict"], fid["n"], fid["groups"]) == ("better", 6, 6)
    assert fid["change"] == pytest.approx(fid["value"] - fid["baseline"])
    moved = []
    for folder in ("near", "far"):
        lines = [json.loads(line) for line in (tmp_path / "o" / folder / "results.jsonl").read_text().splitlines()]
        moved.append({line["clip"]: line["influence"]["fid"] for line in lines if line["column"] == "clips"})
    assert fid["high"] - fid["change"] == pytest.approx(difference(*moved)[1])
    line = next(line for line in (tmp_path / "o/compared/comparison.md").read_text().splitlines() if "FID" in line)
    assert line.count("[") == 3
    capsys.readouterr()
    write_clip(tmp_path / "real/5.mp4", level=200, frames=4)
    main([f"clips={tmp_path / 'far'}", f"output={tmp_path / 'o/far'}", *common])
    apart = compare_scores(str(tmp_path / "o/near"), str(tmp_path / "o/far"))["metrics"]["fid"]
    assert (apart["verdict"], apart["change"]) == ("not compared", None)
    assert apart["reason"].startswith("the reference clips are not the same")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FID")]
    assert printed[-1].count("[") == 2  # both values with their intervals, and no difference


def test_comparison_that_cannot_be_made(two_folders, capsys):
    from eval.compare_scores import run as compare_scores

    own, other = two_folders
    summary = json.loads((other / "summary.json").read_text())
    summary["measurements"]["toy_loud"]["version"] = 2
    (other / "summary.json").write_text(json.dumps(summary))
    found = compare_scores(str(own), str(other))
    assert "another version" in found["metrics"]["toy_loud"]["reason"]
    lines = (other / "results.jsonl").read_text().splitlines()
    (other / "results.jsonl").write_text("\n".join(lines[:7]) + "\n")
    with pytest.raises(SystemExit) as ended:
        compare_scores(str(own), str(other))
    assert ended.value.code == 1
    assert "too few clips have a value in both: toy_brightness" in capsys.readouterr().err
    for name, hint in (("fid", "they have toy_"), ("toy_lod", "did you mean toy_loud")):
        with pytest.raises(UserError, match=f"metrics={name} is in neither; {hint}"):
            compare_scores(str(own), str(other), metrics=name, min_coverage=0)
    for content, message in (("{}\n", "line 1 is no result"), ("", "is empty"), ("[1]", "line 1 is no result")):
        (other / "results.jsonl").write_text(content)
        with pytest.raises(UserError, match=message):
            compare_scores(str(own), str(other))


def test_two_frame_rates_are_said(tmp_path, capsys):
    """Clips at 12.5 frames/s, reference at 25: in the table, as a target, and between two folders."""
    from eval.compare_scores import run as compare_scores
    from eval.score import ScoreOptions, run

    for n in range(5):
        for folder, fps in (("slow", 12.5), ("fast", 25.0)):
            write_clip(tmp_path / folder / f"{n}.mp4", level=60 + n, frames=6, fps=fps)
    for folder in ("slow", "fast"):
        given = {
            "clips": str(tmp_path / folder),
            "reference": str(tmp_path / "fast"),
            "output": str(tmp_path / f"of-{folder}"),
        }
        run(ScoreOptions(**given, metrics="motion", cache=str(tmp_path / "c.sqlite"), progress=False, workers=1))
    assert json.loads((tmp_path / "of-slow/summary.json").read_text())["fps"] == {"clips": [12.5], "reference": [25.0]}
    text = (tmp_path / "of-slow/summary.md").read_text()
    assert "Frames per second: clips 12.5; reference 25. Not to be compared between rates: frozen frames, " in text
    assert "Not to be compared" not in (tmp_path / "of-fast/summary.md").read_text()
    found = compare_scores(str(tmp_path / "of-slow"), str(tmp_path / "of-fast"))["metrics"]
    assert found["warping_error"]["reason"].endswith("5 of 5 clips have two: 12.5 and 25")
    assert found["motion"]["verdict"] != "not compared"
    capsys.readouterr()
    assert compare_scores(str(tmp_path / "of-slow"), str(tmp_path / "of-slow"))["metrics"]["motion"]["reason"] == ""
    assert "interpolation_residual: no better side, for the references: it depends" in capsys.readouterr().out


def test_clips_of_other_names_are_paired_by_their_prompts(toy, tmp_path, capsys):
    from eval.compare_scores import run as compare_scores
    from eval.score_report import write_scores
    from eval.scoring import Scored

    def results(name: str, clips: list[str], shift: float) -> str:
        rows = [replace(row(clip, toy_loud=n + shift), prompt=f"p{n % 5}") for n, clip in enumerate(clips)]
        write_scores(tmp_path / name, {"clips": Scored(rows)})
        return str(tmp_path / name)

    own = results("own", [f"{n:02d}" for n in range(10)], 1.0)
    # One clip has the name of another prompt's clip.
    other = results("other", [f"take{n}" if n != 3 else "07" for n in range(10)], 0.0)
    found = compare_scores(own, other, min_coverage=0)
    assert (found["common"], found["metrics"]["toy_loud"]["change"]) == (10, pytest.approx(1.0))
    assert found["metrics"]["toy_loud"]["verdict"] == "better"
    assert "10 clips are paired by their prompts, since their names are not the same." in capsys.readouterr().out
    by_name = compare_scores(own, results("reversed", [f"{9 - n:02d}" for n in range(10)], 0.0), min_coverage=0)
    assert by_name["metrics"]["toy_loud"]["change"] == pytest.approx(1.0)
    assert "8 clips of the same name have two prompts, such as '09'." in capsys.readouterr().out
    shutil.rmtree(tmp_path / "other")
    rows = [row("x", toy_loud=1.0)]
    write_scores(tmp_path / "other", {"clips": Scored(rows)})
    with pytest.raises(UserError, match=r"no clip of the same name .* and none of the same prompt; give prompts"):
        compare_scores(own, other)


def test_sets_with_other_references_have_no_nearer_side(toy, tmp_path, capsys):
    from eval.compare_scores import run as compare_scores
    from eval.score_report import write_scores
    from eval.scoring import Scored

    def results(name: str, level: float, reference: float, sha256: str | None) -> str:
        rows = [row(str(n), toy_brightness=n + level) for n in range(10)]
        real = [replace(row(str(n), toy_brightness=n + reference), sha256=sha256) for n in range(10)]
        write_scores(
            tmp_path / name, {"clips": Scored(rows), "reference": Scored(real)} if sha256 else {"clips": Scored(rows)}
        )
        return str(tmp_path / name)

    own, other = results("own", 1.0, 1.0, "a"), results("other", 0.0, 0.0, "b")
    for pair in ((own, other), (other, own)):
        assert compare_scores(*pair)["metrics"]["toy_brightness"]["verdict"] == "different"
        assert "The two were scored with different reference clips, such as that of '0'" in capsys.readouterr().out
    same = results("other", 0.0, 1.0, "a")
    assert compare_scores(own, same)["metrics"]["toy_brightness"]["verdict"] == "better"
    without = results("other", 0.0, 1.0, None)
    assert compare_scores(own, without)["metrics"]["toy_brightness"]["verdict"] == "better"
    assert compare_scores(without, own)["metrics"]["toy_brightness"]["verdict"] == "worse"
    assert "Of metrics with a target (=) verdict and clips needed are of the distance" in capsys.readouterr().out


def test_parts_of_a_manifest_are_in_the_summary_and_on_request_in_the_table(toy, tmp_path):
    from eval.score import ScoreOptions, run

    parts = {"a": "age/young", "b": "age/old", "c": "set1"}
    lines = [json.dumps({"clip": f"{name}.mp4", "part": part}) for name, part in parts.items()]
    for level, name in enumerate(parts):
        write_clip(tmp_path / f"{name}.mp4", level=60 * level, frames=3)
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    given = {
        "clips": str(tmp_path / "m.jsonl"),
        "metrics": "toy_brightness",
        "cache": None,
        "progress": False,
        "workers": 1,
    }
    found = run(ScoreOptions(**given, output=str(tmp_path / "o")))
    assert list(found["parts"]) == ["age", "age/old", "age/young", "set1"]
    assert found["parts"]["age"]["toy_brightness"]["n"] == 2
    assert "age" not in (tmp_path / "o/summary.md").read_text()
    run(ScoreOptions(**given, output=str(tmp_path / "o"), show_parts=True))
    text = (tmp_path / "o/summary.md").read_text()
    assert "|  | age (2 clips) | set1 (1 clips) |" in text
    assert "|  | age/old (1 clips) | age/young (1 clips) |" in text


def test_results_are_read_as_they_were_written(two_folders):
    from eval.score_report import read_rows_of

    rows = read_rows_of(two_folders[0])["clips"]
    again = score(read_clips(two_folders[0].parent / "own-clips"), ["toy_brightness", "toy_loud"], progress=False).rows
    assert rows == again


def test_doctor_says_what_is_missing_and_how_to_get_it(toy, capsys):
    from eval.doctor import main

    main([])
    text = capsys.readouterr().out
    assert "toy_absent: missing (needs frames)\n  missing: there are no weights\n  remedy:  hf download toy/toy" in text
    assert "toy_words.factor=1" in text
    with pytest.raises(SystemExit) as ended:
        main(["metrics=toy_absent"])
    assert ended.value.code == 1
    main(["metrics=toy_words", "toy_words.factor=2"])
    with pytest.raises(SystemExit) as ended:
        main(["metrics=toy_words", "toy_words.factor=many"])
    assert ended.value.code == 2


def test_too_few_values_end_with_status_1(toy, tmp_path, capsys):
    from eval.score import main

    write_clip(tmp_path / "clips/a.mp4", frames=4)
    (tmp_path / "clips/b.mp4").write_bytes(b"broken")
    words = [f"clips={tmp_path / 'clips'}", f"output={tmp_path / 'o'}", "cache=", "progress=false", "workers=1"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "metrics=toy_loud"])
    assert ended.value.code == 1
    assert "toy_loud: 1 of 2 clips failed" in capsys.readouterr().err
    main([*words, "metrics=toy_loud", "min_coverage=0.5"])
    with pytest.raises(SystemExit):
        main([*words, "metrics=toy_absent"])
    assert "unavailable: there are no weights; hf download toy/toy" in capsys.readouterr().err
    main([*words, "metrics=toy_words"])  # it applies to no clip, the broken one included: said, and not counted


def test_other_metrics_are_added_to_the_results_of_a_folder(toy, tmp_path, capsys):
    """A run with one metric more, or one that fails, replaces nothing of the same clips."""
    from eval.score import main
    from eval.score_report import read_rows_of

    for name in ("clips/a", "clips/b", "real/a"):
        write_clip(tmp_path / f"{name}.mp4", frames=4)
    output = tmp_path / "o"
    words = [f"clips={tmp_path / 'clips'}", f"output={output}", "cache=", "progress=false", "workers=1"]
    main([*words, "metrics=toy_loud,toy_brightness"])
    before = read_rows_of(output)["clips"]
    with pytest.raises(SystemExit):
        main([*words, "metrics=toy_absent"])
    assert "kept 2 metrics of the earlier results" in capsys.readouterr().err
    summary = json.loads((output / "summary.json").read_text())
    assert summary["kept"] == ["toy_loud", "toy_brightness"]
    assert set(summary["measurements"]) == {"toy_loud", "toy_brightness"}
    for old, new in zip(before, read_rows_of(output)["clips"], strict=True):
        assert new.values == {
            **old.values,
            "toy_absent": Value(None, "unavailable", "there are no weights; hf download toy/toy"),
        }
        assert new.texts == {"toy_text": new.clip}

    def changed(*more: str) -> str:
        capsys.readouterr()
        main([*words, "metrics=toy_brightness", *more])
        assert list(read_rows_of(output)["clips"][0].values) == ["toy_brightness"]
        error = capsys.readouterr().err
        main([*words, "metrics=toy_loud,toy_brightness"])
        return error

    assert "are replaced: clips, prompts or references are others" in changed(f"reference={tmp_path / 'real'}")
    write_clip(tmp_path / "clips/b.mp4", level=30, frames=4)
    assert "earlier values of toy_loud in" in changed()
    (tmp_path / "clips/a.txt").write_text("another prompt")
    assert "are replaced: clips, prompts or references" in changed()
    summary = json.loads((output / "summary.json").read_text())
    summary["measurements"]["toy_loud"]["version"] = 0
    (output / "summary.json").write_text(json.dumps(summary))
    assert "they are of another version, or of sets" in changed()


def test_a_run_without_any_value_writes_nothing_over_results(toy, tmp_path, capsys):
    from eval.score import main

    write_clip(tmp_path / "clips/a.mp4", frames=4)
    words = [f"clips={tmp_path / 'clips'}", f"output={tmp_path / 'o'}", "cache=", "progress=false", "workers=1"]
    main([*words, "metrics=toy_loud"])
    before = (tmp_path / "o/results.jsonl").read_text()
    write_clip(tmp_path / "clips/a.mp4", level=20, frames=4)
    with pytest.raises(SystemExit) as ended:
        main([*words, "metrics=toy_absent"])
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert "no metric has a value: the earlier results in" in said.out
    assert "are replaced" not in said.err
    assert (tmp_path / "o/results.jsonl").read_text() == before


def test_the_figure_has_every_metric(tmp_path):
    keys = ", ".join(f"Metric('drawn_{k}', 'm', direction='up')" for k in range(50))
    with metric_file(tmp_path / "m", f"MEASUREMENTS = (Measurement('drawn', ({keys}), None),)", "drawn_metrics"):
        from eval.score_figures import score_panels
        from eval.score_summary import summarise

        rows = [row(f"clip-{n}", **{f"drawn_{k}": n + k for k in range(50)}) for n in range(3)]
        assert len(score_panels({"clips": rows}, {"clips": summarise(rows)}).axes) == 50


@pytest.mark.slow
def test_ten_thousand_clips_are_read_compared_and_plotted_in_20_s(tmp_path):
    """Two folders of 10,000 clips with 40 metrics each."""
    keys = ", ".join(f"Metric('many_{k}', 'm', direction='up')" for k in range(40))
    with metric_file(tmp_path / "m", f"MEASUREMENTS = (Measurement('many', ({keys}), None),)", "many_metrics"):
        from eval.compare_scores import run as compare_scores
        from eval.score_report import write_scores
        from eval.scoring import Scored

        rng = np.random.default_rng(0)
        for name in ("own", "other"):
            values = rng.normal(size=(10_000, 40)).round(4)
            rows = [
                row(f"clip-{n}", f"prompt-{n // 2}", **{f"many_{k}": v for k, v in enumerate(values[n])})
                for n in range(10_000)
            ]
            write_scores(tmp_path / name, {"clips": Scored(rows)})
        start, spent = time.perf_counter(), time.process_time()
        found = compare_scores(str(tmp_path / "own"), str(tmp_path / "other"), output=str(tmp_path / "out"))
        seconds, spent = time.perf_counter() - start, time.process_time() - spent
    assert len(found["metrics"]) == 40
    assert min(seconds, spent) < 20, (seconds, spent)


def test_reference_and_bound_are_scored_beside_the_clips(toy, tmp_path, monkeypatch):
    """The bound is measured against the reference, and has its prompt; the reference has none to be measured against."""
    import eval.codec_bound
    from eval.score import main
    from eval.score_report import read_rows_of

    for folder, level in (("made", 80), ("real", 60), ("coded", 64)):
        write_clip(tmp_path / folder / "a.mp4", level=level, frames=4)
    write_clip(tmp_path / "made/alone.mp4", level=99, frames=4)
    (tmp_path / "made/a.txt").write_text("three words here")
    text = "MEASUREMENTS = (Measurement('toy_error', (Metric('toy_error', 'e', direction='down'),), "
    text += "lambda c, m: {'toy_error': float(c.frames.mean() - c.reference.frames.mean())}, inputs=('frames', 'reference')),)"
    asked = []

    def coded(clips, checkpoint, output, progress):
        asked.extend([(clip.name, clip.reference.path.parent.name) for clip in clips])
        return [replace(clip, path=tmp_path / "coded/a.mp4", media=None) for clip in clips]

    monkeypatch.setattr(eval.codec_bound, "bound_clips", coded)
    words = [f"clips={tmp_path / 'made'}", f"reference={tmp_path / 'real'}", f"output={tmp_path / 'o'}", "bound=true"]
    with metric_file(tmp_path / "m", text, "toy_error"):
        main([*words, "cache=", "progress=false", "workers=1", "metrics=toy_error,toy_brightness,toy_words"])
        columns = read_rows_of(tmp_path / "o")
    assert asked == [("a", "real")]
    assert [row.clip for row in columns["clips"]] == ["a", "alone"]
    (made, _), (bound,), (real,) = columns["clips"], columns["bound"], columns["reference"]
    assert made.values["toy_error"].value == pytest.approx(18, abs=2)  # a tenth of the picture is the square
    assert bound.values["toy_error"].value == pytest.approx(3, abs=2)
    assert real.values["toy_error"].status == "skipped"
    assert real.values["toy_words"] == bound.values["toy_words"] == Value(3.0)
    assert real.values["toy_brightness"].value < bound.values["toy_brightness"].value
