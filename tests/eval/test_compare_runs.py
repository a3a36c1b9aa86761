"""Comparison of trainings: numbers against closed forms, faults of run folders, a page that a real browser clicks through."""

import csv
import io
import json
import math
import shutil
import struct
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from browser import Browser
from omegaconf import OmegaConf
from PIL import Image

from data.tiny.puppets import FPS, SAMPLE_RATE
from eval.clip_values import FILE, ClipValues, read_clip_values, reported, write_clip_values
from eval.compare_runs.__main__ import arguments, compare_runs
from eval.compare_runs.run_differences import differing_settings, paired_differences
from eval.compare_runs.run_lineage import lineage
from eval.compare_runs.run_page import comparison
from eval.compare_runs.run_records import RunRecord, Series, read_folder, read_metrics, thin
from eval.compare_runs.run_tables import _inert, csv_text, markdown_text
from eval.compare_runs.wandb_runs import BLOCK, DamagedLog, log_records, offline_folders, read_api, read_offline
from eval.paired import weights
from eval.stats import FEWEST, ends_of
from magihuman.config import WandbSettings
from magihuman.errors import UserError
from magihuman.sweep.points import Point, Points
from magihuman.training.callbacks import SampleClip
from magihuman.training.lock import RunLock
from magihuman.training.runs import RunFolder
from magihuman.training.wandb_log import open_wandb

HOSTILE = "</script><script>document.title = 'run'</script> & \"quoted\" 'x' <b> | =1+1"
PROMPTS = [f"prompt {k}" for k in range(12)]
CONFIG: dict[str, Any] = {
    "recipe": {"_target_": "recipes.dmd2.DMD2", "fake_score": {"lr": "${optim.lr}"}},
    "optim": {"lr": 1e-3, "betas": [0.9, 0.99]},
    "seed": 0,
    "data": {"module": {"batch_size": 16, "seed": "${seed}"}},
    "trainer": {"max_steps": 100, "devices": 2, "nodes": 3, "accumulate": 2, "threads": 4},
    "prompts": ["a calm voice", HOSTILE],
    "after_fit": {"compare": {"student": "${folder}"}},
}


def made_run(
    folder: Path, *, record: dict[str, Any] | None = None, rows: int = 10, score: float = 0.5, **changed: Any
) -> Path:
    """A run folder as training writes it; `changed` are settings by dotted name with __ for dots."""
    folder.mkdir(parents=True)
    config = json.loads(json.dumps({**CONFIG, "folder": str(folder), "name": folder.name}))
    for name, value in changed.items():
        *above, last = name.split("__")
        node = config
        for part in above:
            node = node[part]
        node[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    scores = {"vowels": {"value": score, "low": score - 0.1, "high": score + 0.1, "n": 24, "bound": 1.0}}
    results = {"compare": {"compare": str(folder / "compare" / "compare.json"), **reported(scores)}}
    content = {
        "recipe": "recipes.dmd2.DMD2", "name": folder.name, "status": "finished", "steps": 10 * rows, "results": results,
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps({**content, **(record or {})}))
    lines = ["step,loss,val/video,seconds"]
    lines += [f"{10 * k},{1 / k + score:.6g},{'' if k % 2 else 2.0 / k},{36 * k}" for k in range(1, rows + 1)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    hard = np.linspace(0, 0.1, len(PROMPTS))[:, None] + np.array([[0, 0.01]])
    (folder / "compare").mkdir()
    write_clip_values(folder / "compare", PROMPTS, scores, {"vowels": score + hard})
    return folder


# ---- Numbers ----


def values_of(**metrics: np.ndarray) -> ClipValues:
    """ClipValues without a file."""
    return ClipValues({}, {name: dict(zip(PROMPTS, row.tolist(), strict=False)) for name, row in metrics.items()})


def test_a_constant_difference_has_no_width_and_its_sign_is_the_metrics_own() -> None:
    base = np.linspace(0.2, 0.9, 12)
    mine, theirs = values_of(vowels=base + 0.1, syllable_error=base + 0.1), values_of(vowels=base, syllable_error=base)
    found = paired_differences(mine, theirs)
    for metric, verdict in (("vowels", "better"), ("syllable_error", "worse")):
        assert found[metric]["value"] == pytest.approx(0.1)
        assert [found[metric]["low"], found[metric]["high"]] == pytest.approx([0.1, 0.1])
        assert (found[metric]["verdict"], found[metric]["n"]) == (verdict, 12)
    assert paired_differences(theirs, mine)["vowels"]["verdict"] == "worse"


def test_intervals_are_those_of_the_paired_bootstrap_over_prompts() -> None:
    rng = np.random.default_rng(3)
    mine, theirs = rng.normal(0.5, 0.2, (2, 12))
    found = paired_differences(values_of(vowels=mine), values_of(vowels=theirs))["vowels"]
    weight = weights(12)
    draws = weight @ (mine - theirs) / weight.sum(1)
    assert found["value"] == pytest.approx((mine - theirs).mean())
    assert [found["low"], found["high"]] == pytest.approx(list(ends_of(draws[1:])))
    spread = (mine - theirs).std(ddof=1) / math.sqrt(12)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * spread, rel=0.2)  # the normal interval, about
    assert found["verdict"] == "within noise"


def test_only_shared_prompts_count_and_few_give_no_interval() -> None:
    base = np.linspace(0, 1, 12)
    theirs = values_of(vowels=base)
    del theirs.paired["vowels"]["prompt 0"]
    assert paired_differences(values_of(vowels=base), theirs)["vowels"]["n"] == 11
    few = values_of(vowels=base[: FEWEST - 1])
    found = paired_differences(few, theirs)["vowels"]
    assert (found["n"], found["low"], found["verdict"]) == (FEWEST - 2, None, "")
    assert paired_differences(values_of(vowels=base), values_of(syllable_error=base)) == {}


def test_with_a_target_nearer_is_better_from_both_sides() -> None:
    low, high, ones = np.full(12, 0.7), np.full(12, 1.4), np.ones(12)
    assert paired_differences(values_of(seam=low), values_of(seam=high))["seam"]["verdict"] == "better"  # target 1
    mine, theirs = values_of(sharpness=low), values_of(sharpness=high)
    assert paired_differences(mine, theirs)["sharpness"]["verdict"] == ""  # the bound is not known
    mine = values_of(sharpness=low)
    mine.bound = {"sharpness": dict(zip(PROMPTS, ones.tolist(), strict=True))}
    found = paired_differences(mine, theirs)["sharpness"]
    assert (found["verdict"], found["value"]) == ("better", pytest.approx(-0.7))


def test_clips_of_one_prompt_count_as_one(tmp_path: Path) -> None:
    """Twenty copies of a clip leave the interval as it is; with one of them lost the prompt is left out."""
    rng = np.random.default_rng(0)
    mine, theirs = rng.normal(0.5, 0.2, (2, 12, 1))
    found = []
    for copies in (1, 20):
        read = []
        for name, table in (("mine", mine), ("theirs", theirs)):
            folder = tmp_path / f"{name}{copies}"
            folder.mkdir()
            table = np.repeat(table, copies, axis=1)
            if copies == 20 and name == "mine":
                table[3, 7] = np.nan
            write_clip_values(folder, PROMPTS, {}, {"vowels": table})
            read.append(read_clip_values(folder / FILE))
        found.append(paired_differences(*read)["vowels"])
    assert [measure["n"] for measure in found] == [12, 11]
    assert found[1]["high"] - found[1]["low"] == pytest.approx(found[0]["high"] - found[0]["low"], rel=0.4)


def test_only_settings_that_differ_are_shown(tmp_path: Path) -> None:
    runs = [
        read_folder(made_run(tmp_path / "a")),
        read_folder(made_run(tmp_path / "b", optim__lr=2e-3, trainer__threads=8)),
        read_folder(made_run(tmp_path / "c", optim__lr=2e-3, seed=1)),
        read_folder(made_run(tmp_path / "d", record={"recipe": "recipes.pretrain.Pretrain"}, optim__betas=[0.5])),
    ]
    found = differing_settings(runs, runs[:3])
    assert found == {
        "optim.lr, recipe.fake_score.lr": ["0.001", "0.002", "0.002", "0.001"],
        "seed, data.module.seed": ["0", "0", "1", "0"],
    }
    assert runs[0].settings["after_fit.compare.student"] == "${folder}"


def test_metrics_are_read_with_gaps_torn_lines_and_unusual_values(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,a,b,c\n10,1,,\n30,3,nan,inf\n20,2,5,\n40,4,7,8\n50,5")
    found = read_metrics(file)
    assert found["a"].steps.tolist() == [10, 20, 30, 40]
    assert found["a"].values.tolist() == [1, 2, 3, 4]
    assert (found["b"].steps.tolist(), found["b"].values.tolist()) == ([20, 40], [5, 7])
    assert found["c"].values.tolist() == [math.inf, 8]
    file.write_text("step,a\n1,2\nx,y\n3,4,5\n6,7\n")
    assert read_metrics(file)["a"].steps.tolist() == [1, 6]
    file.write_text("step,a\n")
    assert read_metrics(file) == {}
    file.write_text("other,a\n1,2\n")
    with pytest.raises(ValueError, match="no column step"):
        read_metrics(file)


def test_thinned_curves_keep_their_extremes() -> None:
    values = np.sin(np.arange(10_001) / 300)
    values[[4321, 7777]] = 50, -50
    values[100] = np.nan
    series = thin(Series(np.arange(10_001.0), values), 100)
    assert len(series.steps) <= 102
    assert {0, 4321, 7777, 10_000} <= set(series.steps.tolist())
    assert (np.diff(series.steps) > 0).all()
    np.testing.assert_array_equal(series.values, values[series.steps.astype(int)])
    short = Series(np.arange(5.0), np.arange(5.0))
    assert thin(short, 100) is short


def test_cost_is_devices_times_seconds(tmp_path: Path) -> None:
    run = read_folder(made_run(tmp_path / "a", rows=10))
    assert run.hours == pytest.approx(6 * 360 / 3600)  # 2 devices on 3 nodes
    assert (run.samples, run.step, run.max_steps) == (16 * 2 * 100, 100, 100)


# ---- Faults ----


@pytest.mark.parametrize(
    ("damage", "status", "reason"),
    [
        (lambda run: (run / "run.json").write_text('{"a'), "broken", "run.json cannot be read"),
        (lambda run: (run / "run.json").write_text("[]"), "broken", "no JSON object"),
        (lambda run: (run / "run.json").unlink(), "broken", "no run.json"),
        (lambda run: (run / "config.yaml").write_text("a: [&x 1, *x]"), "finished", "config.yaml cannot be read: it holds an"),
        (lambda run: (run / "config.yaml").write_text("!!python/object/apply:os.abort []"), "finished", "config.yaml cannot"),
        (lambda run: (run / "config.yaml").write_text("- a"), "finished", "holds no settings"),
        (lambda run: (run / "metrics.csv").write_bytes(b"\xff\0\n"), "finished", "metrics.csv cannot be read"),
        (lambda run: (run / "compare" / "clip_values.json").write_text("{}"), "finished", "compare/clip_values.json cannot"),
    ],
)  # fmt: skip
def test_a_damaged_run_says_what_is_wrong_and_keeps_the_rest(
    tmp_path: Path, damage: Any, status: str, reason: str
) -> None:
    folder = made_run(tmp_path / "a")
    damage(folder)
    run = read_folder(folder)
    assert run.status == status
    assert reason in run.reason
    assert "\n" not in run.reason
    assert run.metrics or "metrics.csv" in run.reason
    assert run.settings or "config.yaml" in run.reason


def test_statuses_and_their_reasons(tmp_path: Path) -> None:
    def seen(name: str, **record: Any) -> tuple[str, str, int | None]:
        run = read_folder(made_run(tmp_path / name, record=record, rows=3))
        return run.status, run.reason, run.step

    assert seen("f", status="failed", error="UserError: it\ndiverged") == ("failed", "UserError: it diverged", 30)
    assert seen("p", status="preempted", requeue="not under Slurm") == (
        "preempted",
        "not requeued: not under Slurm",
        30,
    )
    assert seen("q", status="queued", steps=0)[0] == "queued"
    assert seen("l", status="running", stage="training", host="n1", job="7_2", steps=None) == (
        "lost", "killed in training on n1 Slurm job 7_2", 30,
    )  # fmt: skip
    with RunLock(made_run(tmp_path / "r", record={"status": "running", "stage": "training"})):
        progress = {"progress": {"step": 31, "seconds_left": 600}}
        record = json.loads((tmp_path / "r" / "run.json").read_text()) | progress
        (tmp_path / "r" / "run.json").write_text(json.dumps(record))
        running = read_folder(tmp_path / "r")
        assert (running.status, running.reason, running.step) == ("running", "in training, about 10 min left", 100)
    nowhere = read_folder(tmp_path / "nowhere")
    assert (nowhere.status, nowhere.reason) == ("missing", "there is no folder yet")


def test_clips_whose_prompts_are_not_known_have_their_number(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "a", prompts={"not": "a list"})
    (folder / "samples" / "step-00000100").mkdir(parents=True)
    (folder / "samples" / "step-00000100" / "03.mp4").touch()
    (found,) = read_folder(folder).clips
    assert (found.kind, found.step, found.prompt, found.seed) == ("step", 100, "prompt 3", 3)


def test_texts_of_runs_are_text_everywhere(tmp_path: Path) -> None:
    made_run(tmp_path / "a")
    made_run(tmp_path / "=1+1 <b>&|", record={"status": "failed", "error": HOSTILE}, recipe__note=HOSTILE)
    runs = [str(path) for path in sorted(tmp_path.iterdir())]
    compare_runs(runs, output=str(tmp_path / "out"))
    page = (tmp_path / "out" / "index.html").read_text()

    found: list[dict[str, str | None]] = []

    class Scripts(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag in ("script", "b"):
                found.append(dict(attrs))

    Scripts().feed(page)
    assert found == [{"type": "application/json", "id": "data"}, {}]
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")  # nothing is loaded from elsewhere
    text = (tmp_path / "out" / "table.md").read_text()
    assert "<b>" not in text.replace("\\<b\\>", "")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text())))
    assert sorted(row["run"] for row in rows) == ["'=1+1 <b>&|", "a"]


@pytest.mark.parametrize("text", ["=1", "+1", "-1+cmd|x", "-1.5e", "@a", "-a"])
def test_a_spreadsheet_takes_no_cell_for_a_formula(text: str) -> None:
    assert _inert(text) == f"'{text}"
    assert [_inert(number) for number in ("-1.5e-05", "-0.25", "1e+06", "-inf", "nan")] == [
        "-1.5e-05", "-0.25", "1e+06", "-inf", "nan",
    ]  # fmt: skip


# ---- The command ----


def test_a_misspelt_setting_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert arguments(["lr=1", "a", "swep=x", "clips=link"]) == ['runs=["lr=1", "a"]', "swep=x", "clips=link"]


def test_wrong_commands_say_what_to_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    made_run(Path("runs/dmd2/a"))
    Path("empty").mkdir()
    for given, message in (
        ({}, "give the runs to compare"),
        ({"runs": ["runs/dmd2/b"]}, "runs/dmd2/b is not there"),
        ({"runs": ["runs/dmd2/a/run.json"]}, "is a file"),
        ({"runs": ["empty"]}, "empty has no run.json and is no run folder"),
        ({"runs": ["runs/dmd2"]}, "it holds 1 runs, give runs/dmd2/*"),
        ({"runs": ["runs/dmd2/a"], "sweep": "x"}, "folders and sweep= are given; give one of them"),
        ({"sweep": "x"}, "runs/sweeps/x holds no sweep"),
        ({"runs": ["runs/dmd2/a"], "baseline": "c"}, "baseline=c is not one of the runs: a"),
        ({"runs": ["runs/dmd2/a"], "clips": "none"}, "choose copy or link"),
        ({"wandb": "entity"}, "not of the form ENTITY/PROJECT"),
    ):
        with pytest.raises(UserError, match=message.replace("*", r"\*")):
            compare_runs(**given)  # type: ignore[arg-type]
    compare_runs(["runs/dmd2/a", "runs/dmd2/a/"], output="out")
    assert "note: runs/dmd2/a/ is given twice" in capsys.readouterr().out
    Path("out/index.html").write_text("mine")
    with pytest.raises(UserError, match="was not made by this command"):
        compare_runs(["runs/dmd2/a"], output="out")


def test_paths_may_stand_alone_on_the_command_line() -> None:
    assert arguments(["runs/a", "runs/lr=1", "baseline=a", "--help"]) == [
        'runs=["runs/a", "runs/lr=1"]',
        "baseline=a",
        "--help",
    ]
    assert arguments([]) == []


def test_a_sweep_shows_its_points_by_its_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    points = []
    for number, score in enumerate((0.5, 0.7, None, 0.6)):
        folder = f"runs/dmd2/s-{number}"
        if score is not None:
            made_run(Path(folder), score=score, optim__lr=score)
        points.append(Point(number, [f"optim.lr={score}"], folder, "id"))
    Points("s", "dmd2", {"name": "results.compare.vowels", "goal": "max"}, points).save(Path("runs/sweeps/s"))
    compare_runs(sweep="s")
    rows = list(csv.DictReader(io.StringIO(Path("runs/sweeps/s/comparison/table.csv").read_text())))
    assert [row["run"] for row in rows] == ["s-1", "s-3", "s-0", "s-2"]
    assert [row["status"] for row in rows] == ["finished", "finished", "finished", "missing"]
    assert [row["optim.lr, recipe.fake_score.lr"] for row in rows] == ["0.7", "0.6", "0.5", "None"]  # of its point
    assert [row["compare: vowels"] for row in rows] == ["0.7", "0.6", "0.5", ""]
    assert float(rows[0]["compare: vowels difference"]) == pytest.approx(0.2)
    assert rows[0]["compare: vowels verdict"] == "better"
    assert Path("runs/sweeps/s/comparison/curves.png").stat().st_size > 10_000
    Path("runs/sweeps/s/points.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="has the format 'other'"):
        compare_runs(sweep="s")


def test_lineage_follows_hashes_from_data_to_student(tmp_path: Path) -> None:
    data = {"role": "shards", "name": "shards-a", "sha256": "d" * 64}
    teacher = RunRecord("teacher", "t", recipe="Pretrain", parents=[data], sha256="e" * 64)
    init = {"role": "init", "name": "runs/pretrain/teacher", "sha256": "e" * 64}
    students = [RunRecord(f"s{k}", "s", recipe="DMD2", parents=[data, init]) for k in range(6)]
    other = RunRecord("other", "o", recipe="DMD2", parents=[data, {**init, "sha256": "f" * 64}])
    graph = lineage([teacher, *students, other])
    named = [(graph.nodes[a].label, graph.nodes[b].label) for a, b in graph.edges]
    assert sorted(named) == sorted(
        [
            ("shards-a", "teacher"), ("shards-a", "6 runs"), ("teacher", "6 runs"),
            ("shards-a", "other"), ("runs/pretrain/teacher", "other"),
        ]
    )  # fmt: skip
    x = {node.label: node.x for node in graph.nodes}
    assert x["shards-a"] < x["teacher"] < x["6 runs"]


def test_the_table_says_what_the_files_say(tmp_path: Path) -> None:
    runs = [read_folder(made_run(tmp_path / name, score=score)) for name, score in (("a", 0.5), ("b", 0.625))]
    found = comparison(runs, 0, "t")
    row = list(csv.DictReader(io.StringIO(csv_text(found))))[1]
    assert (row["step"], row["samples seen"], row["loss"]) == ("100", "3200", "0.725")
    assert float(row["device-hours"]) == pytest.approx(0.6)
    assert [row[f"compare: vowels{end}"] for end in ("", " low", " high", " prompts")] == [
        "0.625",
        "0.525",
        "0.725",
        "12",
    ]
    assert float(row["compare: vowels difference"]) == pytest.approx(0.125, abs=1e-5)
    assert "0.625 [0.525, 0.725]; ▲ +0.125 [+0.125, +0.125]" in markdown_text(found)


# ---- W&B ----


def framed(records: list[bytes]) -> bytes:
    """A .wandb file: LevelDB's log with its blocks, checksums and divided records."""
    data = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for record in records:
        begun, rest = False, record
        while rest or not begun:
            left = BLOCK - len(data) % BLOCK
            if left < 7:
                data += bytes(left)
                continue
            part, rest = rest[: left - 7], rest[left - 7 :]
            kind = (4 if begun else 1) if not rest else (3 if begun else 2)
            data += struct.pack("<IHB", zlib.crc32(part, zlib.crc32(bytes([kind]))), len(part), kind) + part
            begun = True
    return bytes(data)


def test_wandb_logs_with_divided_torn_and_damaged_records() -> None:
    sent = [b"a" * 10, b"b" * 70_000, b"", b"c" * (BLOCK - 300), b"d" * 290, b"e" * 5]
    data = framed(sent)
    assert list(log_records(data)) == sent
    assert list(log_records(data[:-3])) == sent[:-1]  # killed while it wrote
    damaged = bytearray(data)
    damaged[40_000] ^= 1
    read = log_records(bytes(damaged))
    assert next(read) == sent[0]
    with pytest.raises(DamagedLog, match="at byte 32768 is damaged"):
        next(read)
    with pytest.raises(DamagedLog, match="does not begin"):
        list(log_records(b"PK"))


def mirrored(folder: Path) -> Path:
    """W&B's offline folder of a run folder, written as training does, moved away from it."""
    config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"), resolve=True)
    assert isinstance(config, dict)
    logger = open_wandb(RunFolder(folder), WandbSettings(mode="offline"), config)  # type: ignore[arg-type]
    assert logger is not None
    for row in csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())):
        step = int(row.pop("step"))
        logger.log_metrics({name: float(value) for name, value in row.items() if value}, step)
    clips = [SampleClip(str(config["prompts"][0]), 0, clip, None, 0) for clip in folder.glob("samples/*/00.mp4")]
    logger.log_samples(clips, folder / "sheet.png", 100)
    logger.close()
    (offline,) = (folder / "wandb").glob("offline-run-*")
    return Path(shutil.move(offline, folder.parent / offline.name))


def test_offline_folders_of_wandb_give_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    data = {"role": "shards", "name": "shards-a", "sha256": "d" * 64}
    for name, score in (("a", 0.5), ("b", 0.75)):
        run = made_run(tmp_path / name / "dmd2" / name, record={"parents": [data]}, score=score, optim__lr=score / 100)
        Image.new("RGB", (8, 8)).save(run / "sheet.png")
        clip(run / "samples" / "step-00000100" / "00.mp4")
        mirrored(run)
    folders = [tmp_path / name / "dmd2" for name in "ab"]
    here = comparison([read_folder(folder / folder.parent.name) for folder in folders], 0, "t")
    there = comparison([run for folder in folders for run in read_offline(offline_folders(folder))], 0, "t")
    tables = [list(csv.DictReader(io.StringIO(csv_text(found)))) for found in (here, there)]
    # Where it lies, and what needs values per clip, which W&B does not have, are of the folders only.
    kept = [key for key in tables[0][0] if key != "place" and not key.endswith(("difference low", "difference high"))]
    kept = [key for key in kept if not key.endswith(("difference", "prompts", "verdict"))]
    assert {"status", "optim.lr, recipe.fake_score.lr", "loss", "device-hours", "compare: vowels high"} <= set(kept)
    for mine, theirs in zip(*tables, strict=True):
        assert {key: theirs[key] for key in kept} == {key: mine[key] for key in kept}
    for ours, theirs in zip(here.runs, there.runs, strict=True):
        assert theirs.parents == ours.parents == [data]
        assert theirs.metrics.keys() == ours.metrics.keys()
        np.testing.assert_allclose(theirs.metrics["loss"].values, ours.metrics["loss"].values)
        assert [(c.step, c.prompt, c.seed) for c in theirs.clips] == [(100, "a calm voice", 0)]
        assert theirs.clips[0].path.read_bytes() == ours.clips[0].path.read_bytes()


def api_run(name: str, state: str, lr: float) -> SimpleNamespace:
    """What wandb.apis.public.Run has of a run."""
    history = [
        {"_step": k, "_timestamp": 1.0, "trainer/global_step": 10 * k, "loss": 1 / k, "seconds": 36.0 * k,
         "samples/00": {"_type": "video-file"}}
        for k in range(1, 4)
    ]  # fmt: skip
    scores = {"eval/eval/vowels": 0.5, "eval/eval/vowels/low": 0.4, "eval/eval/vowels/high": 0.6}
    parents = [{"role": "init", "name": "x", "sha256": "e" * 64}]
    return SimpleNamespace(
        id=name, name=f"dmd2/{name}", state=state, url=f"https://wandb.ai/e/p/runs/{name}",
        summary={"status": "finished", **scores, "loss": 0.3} if state == "finished" else {},
        config={**CONFIG, "optim": {"lr": lr}, "provenance": {"parents": parents}},
        history=lambda samples, pandas: history,
    )  # fmt: skip


def test_runs_of_wandbs_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stand-in for the API; a server was not at hand."""
    import wandb

    asked = []

    class FakeApi:
        def runs(self, path: str, filters: Any = None) -> list[SimpleNamespace]:
            asked.append((path, filters))
            if path == "e/none":
                raise wandb.errors.CommError("Could not find project none")
            return [api_run("a", "finished", 1e-3), api_run("b", "crashed", 2e-3)] if path == "e/p" else []

    monkeypatch.setattr(wandb, "Api", FakeApi)
    runs = read_api("e/p?group=lr&optim.lr=0.001&state=finished")
    assert asked == [("e/p", {"group": "lr", "config.optim.lr.value": 0.001, "state": "finished"})]
    assert [(run.name, run.status, run.step, run.hours) for run in runs] == [
        ("a", "finished", 30, 6 * 108 / 3600),
        ("b", "lost", 30, 6 * 108 / 3600),
    ]
    assert runs[0].scores["eval: vowels"]["high"] == 0.6
    assert differing_settings(runs, runs) == {"optim.lr, recipe.fake_score.lr": ["0.001", "0.002"]}
    assert runs[0].parents[0]["sha256"] == "e" * 64
    compare_runs(wandb="e/p", output=str(tmp_path / "out"))
    assert "https://wandb.ai/e/p/runs/b" in (tmp_path / "out" / "table.csv").read_text()
    for address, message in (("e/none", "Could not find project"), ("e/empty", "has no runs")):
        with pytest.raises(UserError, match=message):
            read_api(address)


# ---- The page in a browser ----


def clip(path: Path, frames: int = 25) -> None:
    """A playable mp4 with sound."""
    import torch

    from magihuman.media.mp4 import write_mp4

    path.parent.mkdir(parents=True, exist_ok=True)
    movie = torch.zeros(frames, 32, 32, 3, dtype=torch.uint8)
    movie[:, 8:24, 8:24] = 200
    wave = torch.sin(torch.arange(frames * SAMPLE_RATE // FPS) / 10)[None] / 2
    write_mp4(path, movie, FPS, wave, SAMPLE_RATE)


def test_a_real_browser_sorts_filters_chooses_and_plays(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    for name, score in zip(names, (0.6, 0.5, 0.7), strict=True):
        run = made_run(tmp_path / name, score=score, optim__lr=score / 100)
        for step in (50, 100):
            clip(run / "samples" / f"step-{step:08d}" / "00.mp4")
            clip(run / "samples" / f"step-{step:08d}" / "01.mp4")
    (tmp_path / "c" / "samples" / "step-00000100" / "01.mp4").write_bytes(b"no video")
    made_run(tmp_path / HOSTILE.replace("/", "_"), record={"status": "failed", "error": HOSTILE})
    out = tmp_path / "out"
    compare_runs([str(path) for path in sorted(tmp_path.iterdir())], baseline="a", output=str(out))
    with Browser(tmp_path) as browser:
        browser.open(out / "index.html")
        rows = "[...document.querySelectorAll('tbody tr')].map(row => row.dataset.run)"
        assert sorted(browser.evaluate(rows)) == sorted([*names, HOSTILE.replace("/", "_")])
        assert browser.evaluate("document.title").startswith("Runs in ")  # no script of a run has run

        browser.click('thead button[data-key="e:compare: vowels"]')  # higher is better: the best first
        assert browser.evaluate(rows)[0] == "c"
        assert browser.evaluate("document.querySelector('[aria-sort]').ariaSort") == "descending"
        assert browser.evaluate("document.activeElement.dataset.key") == "e:compare: vowels"  # for the keyboard
        browser.click('thead button[data-key="e:compare: vowels"]')
        assert browser.evaluate("document.querySelector('[aria-sort]').ariaSort") == "ascending"

        verdict = "document.querySelector('tr[data-run=c] .diff').dataset.verdict"
        assert browser.evaluate(verdict) == "better"
        assert "+0.100" in browser.evaluate("document.querySelector('tr[data-run=c] .diff').textContent")
        number = browser.evaluate("[...document.querySelector('#baseline').options].find(o => o.text === 'c').value")
        browser.evaluate(
            f"document.querySelector('#baseline').value = '{number}';"
            "document.querySelector('#baseline').dispatchEvent(new Event('change'))"
        )
        assert browser.evaluate("document.querySelector('tr[data-run=a] .diff').dataset.verdict") == "worse"
        assert browser.evaluate("document.querySelector('tr.baseline').dataset.run") == "c"

        browser.click("input[name=axis][value=hours]")
        assert "device-hours" in browser.evaluate("document.querySelector('svg[data-metric=loss]').ariaLabel")
        browser.evaluate("document.querySelector('svg[data-metric=loss]').focus()")
        browser.key("ArrowRight")
        assert browser.evaluate(
            "!document.querySelector('.tip').hidden || [...document.querySelectorAll('.tip')].some(t => !t.hidden)"
        )

        browser.click(".play")
        browser.wait("[...document.querySelectorAll('video')].filter(v => v.currentTime > .1).length >= 3")
        assert browser.evaluate("[...document.querySelectorAll('video')].every(v => v.muted)")
        browser.click(".sound")
        loud = "[...document.querySelectorAll('video')].map(v => !v.muted)"
        browser.wait(f"{loud}[0]")
        assert sum(browser.evaluate(loud)) == 1
        assert browser.evaluate("document.querySelector('.sound').getAttribute('aria-pressed')") == "true"
        browser.click("figure:nth-child(2) .sound")
        browser.wait(f"{loud}[1] && !{loud}[0]")
        assert browser.evaluate(
            "[...document.querySelectorAll('.gap')].filter(g => !g.hidden).map(g => g.textContent)"
        ) == ["cannot be played"]

        browser.open(out / "index.html", "#filter=failed")
        browser.wait("document.querySelectorAll('tbody tr').length === 1")
        assert browser.evaluate("document.querySelector('#count').textContent") == "1 of 4 runs"
        assert browser.errors == []


@pytest.mark.slow
def test_500_runs_take_less_than_20_seconds_of_one_core(tmp_path: Path) -> None:
    for number in range(500):
        made_run(tmp_path / "runs" / f"r{number}", rows=200, score=0.5 + number / 5000, optim__lr=number / 1e5)
    start = time.process_time()
    compare_runs([str(path) for path in (tmp_path / "runs").iterdir()], output=str(tmp_path / "out"))
    assert time.process_time() - start < 20
    assert (tmp_path / "out" / "index.html").stat().st_size < 20 << 20


def test_curves_that_tell_something_come_first() -> None:
    from eval.compare_runs.run_page import curve_order

    names = ["damaged_samples", "lr", "grad_norm", "loss/sigma_0", "dm/video", "loss", "val/sync_gap", "time/data"]
    assert curve_order(names)[:4] == ["val/sync_gap", "loss", "grad_norm", "dm/video"]
    assert curve_order(names)[-1] == "loss/sigma_0"
