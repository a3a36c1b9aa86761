"""`python -m eval.run`: from a suite to clips and scores; continued, shared by processes, and refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from toy_metrics import calls, metric_file, write_clip

from eval import run as program
from eval.published import JUDGE_SCORES, TABLE, ComparedMetrics, published_rows
from eval.run import help_text, main
from eval.suites.suite_items import Suite, SuiteItem
from inference.requests import InferOptions
from magihuman.errors import UserError
from magihuman.io.provenance import file_hash

REPO = Path(__file__).resolve().parents[2]
TOY = """
def brightness(clip, _):
    note(clip.name)
    return {"toy_brightness": float(clip.frames.mean())}

def words(clip, _):
    return {"toy_words": len(clip.dialogue.split())}

MEASUREMENTS = (
    Measurement("toy_brightness", (Metric("toy_brightness", "brightness", direction="target"),), brightness),
    Measurement("toy_words", (Metric("toy_words", "words asked for"),), words, inputs=("dialogue",)),
    Measurement("toy_judge", (Metric("toy_judge", "judged"),), brightness, costly=True,
                missing=lambda options: MissingDependency("no weights", "hf download toy/judge")),
)
"""
pytestmark = pytest.mark.usefixtures("with_fake_codecs")


@pytest.fixture
def toy(tmp_path: Path) -> Any:
    with metric_file(tmp_path / "metric_files", TOY):
        yield tmp_path / "metric_files"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    """Three prompts; the first has a reference and spoken words."""
    write_clip(tmp_path / "real.mp4", level=150, frames=20)
    rows = [
        {"prompt": "first", "name": "a", "dialogue": "two words", "reference": "real.mp4", "language": "en"},
        {"prompt": "second", "name": "b", "seed": 9},
        {"prompt": "third", "name": "c"},
    ]
    path = tmp_path / "suite.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Command:
    """The command with the settings that all tests share."""

    def __init__(self, suite: Path, checkpoint: Path, folder: Path) -> None:
        self.output = folder / "out"
        self.words = [
            f"suite={suite}", f"checkpoint={checkpoint}", f"output={self.output}", f"cache={folder / 'cache.sqlite'}",
            "metrics=toy_brightness,toy_words", "device=cpu", "progress=false", "workers=1",
        ]  # fmt: skip

    def __call__(self, *more: str) -> dict[str, Any]:
        given = {word.partition("=")[0] for word in more}
        main([word for word in self.words if word.partition("=")[0] not in given] + list(more))
        return json.loads((self.output / "summary.json").read_text())

    def made(self) -> dict[str, int]:
        return {path.stem: path.stat().st_mtime_ns for path in sorted((self.output / "clips").glob("*.mp4"))}


@pytest.fixture
def command(toy: Path, suite: Path, checkpoint: Path, tmp_path: Path) -> Command:
    return Command(suite, checkpoint, tmp_path)


def test_a_suite_is_generated_and_scored_with_its_bound_and_settings(command: Command, toy: Path) -> None:
    summary = command("steps=3", "bound=true", "seed=2")
    assert list(command.made()) == ["a", "b", "c"]
    records = {name: json.loads((command.output / "clips" / f"{name}.json").read_text()) for name in "abc"}
    assert {record["settings"]["steps"] for record in records.values()} == {3}
    assert [records[name]["seed"] for name in "abc"] == [2_000_006, 9, 2_000_008]
    columns = summary["columns"]
    assert {name: column["toy_brightness"]["n"] for name, column in columns.items()} == {
        "clips": 3,
        "bound": 1,
        "reference": 1,
    }
    assert columns["bound"]["toy_brightness"]["value"] == pytest.approx(
        columns["reference"]["toy_brightness"]["value"], abs=4
    )
    assert columns["clips"]["toy_words"]["value"] == 2
    assert columns["clips"]["toy_words"]["skipped"] == 2
    found = summary["suite"]
    assert (found["suite"], found["items"], found["used"], found["seed"]) == ("suite", 3, 3, 2)
    assert (found["template"], found["first_frame"], found["generating"]["steps"]) == ("blocks", True, 3)
    assert len(found["weights"]["checkpoint"]["sha256"]) == 64
    rows = [json.loads(line) for line in (command.output / "manifest.jsonl").read_text().splitlines()]
    assert rows[0] == {
        "clip": "clips/a.mp4", "name": "a", "prompt": "first", "dialogue": "two words", "language": "en",
        "group": "first",
        "reference": str(command.output.parent / "real.mp4"),
    }  # fmt: skip


def test_a_second_run_makes_and_measures_nothing(
    command: Command, toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = command("bound=true")
    before, measured = command.made(), calls(toy)
    assert sorted(measured) == ["a", "a", "a", "b", "c"]  # a: also its reference and its bound

    def never(*_: object, **__: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr("inference.infer_command.run", never)
    monkeypatch.setattr("magihuman.codecs.bundle.load_media_codecs", never)
    second = command("bound=true")
    assert calls(toy) == []
    assert command.made() == before
    assert second["columns"] == first["columns"]
    assert "all 3 clips are there" in capsys.readouterr().err
    (command.output / "clips" / "b.mp4").write_bytes(b"damaged")
    with pytest.raises(AssertionError, match="made again"):
        command("bound=true")


def test_more_prompts_and_clips_keep_those_that_are_there(command: Command, toy: Path) -> None:
    command("limit=1")
    first = command.made()
    assert list(first) == ["a"]
    calls(toy)
    summary = command("limit=2", "clips_per_prompt=2")
    made = command.made()
    assert list(made) == ["a", "a_s1", "b", "b_s1"]
    assert made["a"] == first["a"]
    assert sorted(calls(toy)) == ["a_s1", "b", "b_s1"]
    seeds = {name: json.loads((command.output / "clips" / f"{name}.json").read_text())["seed"] for name in made}
    assert seeds == {"a": 0, "a_s1": 1_000_003, "b": 9, "b_s1": 10}
    rows = [json.loads(line) for line in (command.output / "results.jsonl").read_text().splitlines()]
    assert {(row["clip"], row["group"]) for row in rows if row.get("column", "clips") == "clips"} == {
        ("a", "first"), ("a_s1", "first"), ("b", "second"), ("b_s1", "second")
    }  # fmt: skip
    assert (summary["suite"]["used"], summary["suite"]["clips_per_prompt"]) == (2, 2)
    assert command("limit=1")["clips"] == 1


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["steps=4"], "steps=none there, 4 here"),
        (["seed=1"], "seed=0 there, 1 here"),
        (["first_frame=false"], "first_frame=True there, False here"),
        (["template=description", "cfg=1"], "cfg=none there, 1 here; template=blocks there, description here"),
    ],
)
def test_clips_of_other_settings_are_refused_by_name(
    command: Command, words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command("limit=1")
    before = command.made()
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        command("limit=1", *words)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert f"holds clips of other settings ({what}); give another output=" in error
    assert error.count("\n") == 1
    assert command.made() == before


def test_another_checkpoint_of_the_same_name_is_refused(
    command: Command, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fake_bundle import fake_checkpoint

    own = tmp_path / "trained"
    fake_checkpoint(own / "export", seed=1)
    command("limit=1", f"checkpoint={own}")
    fake_checkpoint(own / "export", seed=2)
    with pytest.raises(SystemExit):
        command("limit=1", f"checkpoint={own}")
    assert "weights.checkpoint=sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["prompt=x"], "prompt= is decided by the suite"),
        (["stepps=3"], "'stepps=3' is no option"),
        (["limit=0"], "limit=0 is impossible"),
        (["clips_per_prompt=0"], "clips_per_prompt=0 is impossible"),
        (["metrics=toy_brigthness"], "did you mean toy_brightness"),
        (["toy_words.speed=3"], "toy_words"),
        (["judge_score=best"], "judge_score=best is unknown"),
        (["checkpoint=nowhere"], "nowhere"),
        (["suite=versebench"], "needs suite_path="),
        (["min_coverage=2"], "min_coverage=2"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    command: Command, words: list[str], what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        command(*words)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert what in error
    assert error.count("\n") == 1
    assert not command.output.exists()


def test_published_values_stand_beside_ours_also_where_ours_are_missing(
    command: Command, monkeypatch: pytest.MonkeyPatch, suite: Path
) -> None:
    monkeypatch.setattr(ComparedMetrics, "key", lambda self, metric: "toy_judge")
    monkeypatch.setattr(
        "eval.suites.suite_catalog.read_suite",
        lambda options: Suite("mine", (SuiteItem("a", "first"),), published=("visual_quality",)),
    )
    with pytest.raises(SystemExit) as left:  # it was named and is unavailable; all is written before
        command("metrics=toy_brightness,toy_judge")
    assert left.value.code == 1
    summary = json.loads((command.output / "summary.json").read_text())
    assert summary["published"] == {name: {"toy_judge": value} for name, value in TABLE["visual_quality"].items()}
    assert "form only" in summary["published_source"]
    table = (command.output / "summary.md").read_text()
    assert "LTX 2.3 (published)" in table
    assert "4.76" in table
    assert "hf download toy/judge" in table


def test_the_papers_rows() -> None:
    rows = published_rows(TABLE, ComparedMetrics("soft", "mean"))
    assert set(rows) == {"Ovi 1.1", "LTX 2.3", "daVinci-MagiHuman"}
    assert rows["daVinci-MagiHuman"] == {
        "videoscore2_visual_soft": 4.80, "videoscore2_alignment_soft": 4.18, "videoscore2_physics_soft": 4.52,
        "wer_clip_mean": 0.1460,
    }  # fmt: skip
    assert published_rows(["word_error_rate"])["Ovi 1.1"] == {"wer": 0.4045}
    with pytest.raises(UserError, match="wer_average=median is unknown; choose pooled, mean"):
        ComparedMetrics(wer_average="median")


def test_compared_metrics_are_in_the_registry() -> None:
    from eval.metrics.registry import metrics

    for score in JUDGE_SCORES:
        for average in ("pooled", "mean"):
            for row in published_rows(TABLE, ComparedMetrics(score, average)).values():
                assert set(row) <= set(metrics())


def test_rows_of_one_prompt_are_one_group(command: Command, suite: Path) -> None:
    """Six seeds of a prompt are no six prompts: there is an interval of none."""
    suite.write_text("".join(json.dumps({"prompt": "same", "name": f"n{k}", "seed": k}) + "\n" for k in range(6)))
    measure = command("metrics=toy_brightness")["columns"]["clips"]["toy_brightness"]
    assert (measure["n"], measure["low"], measure["high"]) == (6, None, None)


def test_a_bound_needs_references(command: Command, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suite.write_text('{"prompt": "first"}\n')
    with pytest.raises(SystemExit):
        command("bound=true")
    assert "bound=true needs reference clips" in capsys.readouterr().err
    assert not command.made()


def test_scoring_the_manifest_gives_the_same_columns_without_measuring(
    command: Command, toy: Path, tmp_path: Path
) -> None:
    """Clip and reference have different file names there."""
    from eval import score

    made = command("bound=true", "limit=1")
    calls(toy)
    score.main(
        [
            f"clips={command.output / 'manifest.jsonl'}", f"output={tmp_path / 'again'}", "metrics=toy_brightness,toy_words",
            "bound=true", command.words[1].replace("checkpoint", "codecs"), command.words[3], "workers=1", "progress=false",
        ]
    )  # fmt: skip
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["columns"] == made["columns"]
    assert set(again["columns"]) == {"clips", "bound", "reference"}
    assert calls(toy) == []


def test_the_picture_of_a_suite_is_the_first_frame(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "verse_bench" / "set1"
    folder.mkdir(parents=True)
    record = {
        "video_prompt": "A man.",
        "audio_prompt": ["rain"],
        "speech_prompt": {"speaker": "Man", "text": "Hello there."},
    }
    (folder / "303.json").write_text(json.dumps(record))
    picture = folder / "303.jpg"
    Image.new("RGB", (48, 32), "red").save(picture)
    words = ["suite=versebench", f"suite_path={folder.parent}", "parts=set1"]
    summary = command(*words)
    made = json.loads((command.output / "clips" / "303.json").read_text())
    assert made["image"] == {"path": str(picture), "sha256": file_hash(picture)}
    assert made["prompt"].startswith('A man. Man says, "Hello there."')
    assert summary["columns"]["clips"]["toy_words"]["value"] == 2
    assert (summary["suite"]["parts"], summary["suite"]["published_items"]) == (["set1"], 600)
    assert "LTX 2.3" in summary["published"]
    line = json.loads((command.output / "manifest.jsonl").read_text())
    assert (line["image"], line["language"], line["part"]) == (str(picture), "en", "set1")
    before = command.made()
    Image.new("RGB", (48, 32), "blue").save(picture)  # another picture of the same name: another clip
    command(*words)
    assert command.made() != before


def test_help_has_the_options_of_all_three_parts() -> None:
    text = help_text()
    for word in ("suite_path", "clips_per_prompt", "resolution", "sr_cfg", "MEASUREMENT.OPTION=VALUE"):
        assert word in text
    assert "negative_prompt_file" in text


def test_every_setting_of_generating_is_passed_or_decided() -> None:
    """No option of infer is lost between the two commands."""
    from dataclasses import fields

    own = {f.name for f in fields(program.SuiteRunOptions)}
    both = {f.name for f in fields(InferOptions)} & own
    assert both == {"checkpoint", "output", "seed", "progress"}


# ---- Kills and several processes ----

CHILD = """
import sys, time
sys.path.append({tests!r})
import magihuman.codecs.bundle, fake_bundle
magihuman.codecs.bundle.load_bundle = fake_bundle.fake_bundle
from pathlib import Path
from PIL import Image
from toy_metrics import metric_file
import inference.jobs
line = inference.jobs.append_line
def slowly(path, text):
    line(path, text)
    time.sleep({wait})
inference.jobs.append_line = slowly
from eval.run import main
with metric_file(Path({metrics!r}), {toy!r}, {name!r}):
    main(sys.argv[1:])
"""


def child(folder: Path, wait: float = 0.0) -> Path:
    """A script that runs the command in a process of its own, with `wait` seconds after every clip."""
    script = folder / "child.py"
    tests = str(REPO / "tests" / "support")
    fill = {"tests": tests, "wait": wait, "metrics": str(folder / "child_metrics"), "toy": TOY, "name": "toy_of_child"}
    script.write_text(CHILD.format(**fill))
    return script


@pytest.mark.slow
def test_a_killed_run_continues(command: Command, toy: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, str(child(tmp_path, 60)), *command.words, "batch=1"], cwd=REPO)
    end = time.monotonic() + 100
    while not (command.output / "clips" / "a.json").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = command.made()
    assert list(first) == ["a"]
    assert not (command.output / "summary.json").exists()
    summary = command("batch=1")
    assert command.made()["a"] == first["a"]
    assert list(command.made()) == ["a", "b", "c"]
    assert summary["clips"] == 3


@pytest.mark.slow
def test_processes_share_generating_and_scoring(command: Command, toy: Path, tmp_path: Path) -> None:
    script = child(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *command.words, "batch=1", "bound=true"],
        cwd=REPO,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "process 0 of 2: 2 made" in done.stderr
    assert "process 1 of 2: 1 made" in done.stderr
    assert done.stdout.count("written to") == 1
    shared = json.loads((command.output / "summary.json").read_text())
    assert sorted(calls(tmp_path / "child_metrics")) == ["a", "a", "a", "b", "c"]  # every one once
    calls(toy)
    alone = command("bound=true", "batch=1")
    assert alone["columns"] == shared["columns"]
    assert calls(toy) == []


def test_weights_of_a_run_are_those_of_its_export(tmp_path: Path) -> None:
    """Later commands write into the run folder, and the identity stays."""
    for folder, kind in (("trained", "export"), ("lora", "adapter")):
        (tmp_path / folder / kind).mkdir(parents=True)
        (tmp_path / folder / kind / "model.safetensors").write_bytes(kind.encode())
        (tmp_path / folder / "run.json").write_text("{}")
    given = InferOptions(checkpoint="tiny/base", lora=str(tmp_path / "lora"), sr=str(tmp_path / "trained"))
    before = program._weights(given)
    for folder in ("trained", "lora"):
        (tmp_path / folder / "run.json").write_text('{"state": "finished"}')
    assert program._weights(given) == before
    assert before["lora"]["sha256"] != before["sr"]["sha256"]
    (tmp_path / "lora/adapter/model.safetensors").write_bytes(b"trained on")
    assert program._weights(given)["lora"] != before["lora"]
