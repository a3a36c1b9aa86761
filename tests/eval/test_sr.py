"""The measures of super-resolution: columns, differences, and what known ways of enlarging score."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval import ablation, sr
from eval.clip_values import read_clip_values
from eval.clips import ground_truth, held_out
from eval.formatting import format_value
from eval.puppet_vision import measure_frames
from eval.readme_tables import sr_table
from magihuman import zoo
from magihuman.codecs.bundle import CodecBundle, load_bundle
from magihuman.errors import UserError


@pytest.fixture(scope="module")
def world() -> CodecBundle:
    return load_bundle("tiny")


@pytest.fixture(scope="module")
def held(world: CodecBundle) -> sr.StageInputs:
    return sr.drawn_clips(4, world, 64, 128)


def values(own: list[float], other: list[float], sharp: list[float]) -> dict[str, np.ndarray]:
    return {"own": np.array(own), "other": np.array(other), "sharpness": np.array(sharp)}


def test_skills_and_differences_of_known_values() -> None:
    bound = values([0.9, 0.9, 0.9, 0.9], [0.4, 0.4, 0.4, 0.4], [4, 4, 4, 4])
    columns = {
        "bicubic": values([0.65] * 4, [0.4] * 4, [1, 1, 1, 1]),
        "sr": values([0.8, 0.8, 0.8, 0.8], [0.1] * 4, [2, 3, 3, 4]),  # the level is the bound's for all
        "bound": bound,
    }
    made = sr.paired_columns(columns, against="sr")
    skill = {name: made["columns"][name]["sync_skill"]["value"] for name in columns}
    assert skill == pytest.approx({"bicubic": 0.5, "sr": 0.8, "bound": 1.0})
    difference = made["differences"]["bicubic"]
    assert difference["sync_skill"]["value"] == pytest.approx(0.3)
    assert difference["sharpness"]["value"] == pytest.approx(2.0)
    assert difference["sharpness"]["low"] >= 1.0
    assert list(made["differences"]) == ["bicubic"]


def test_known_ways_of_enlarging_score_as_they_should(world: CodecBundle, held: sr.StageInputs) -> None:
    assert held.truth is not None
    truth = held.truth
    evaluation = sr.Evaluation(zoo.load("tiny/sr"), world, held, size=128, steps=1)
    coded = evaluation.measure(lambda _, part: sr.encode(world, truth[part]), held)
    assert len(coded.frames) == 4
    assert coded.frames[0].shape == (25, 128, 128, 3)
    bound, small = coded.values, evaluation.measure(evaluation.bicubic, held).values
    latents = evaluation.measure(evaluation.upsampled, held).values
    exact = evaluation.measure(lambda _, part: torch.from_numpy(np.stack(truth[part])), held).values
    assert all((bound[name] == evaluation.bound[name]).all() for name in bound)
    for name in ("psnr", "mouth_psnr", "ssim", "sharpness"):
        assert bound[name].mean() > latents[name].mean(), name
        assert latents[name].mean() > small[name].mean(), name
    assert (bound["psnr"] > np.maximum(latents["psnr"], small["psnr"])).all()
    assert (exact["psnr"] == 99).all()
    assert bound["own"].mean() > 0.95
    assert bound["other"].mean() < 0.8


def test_the_mouth_is_measured_alike_at_both_sizes() -> None:
    puppets = held_out(4)
    for size in (64, 128):
        seen = [measure_frames(frames) for frames in ground_truth(puppets, size).frames]
        if size == 64:
            first = seen
    for small, large in zip(first, seen, strict=True):
        assert float(np.abs(small.openness - large.openness).max()) < 0.004
        assert np.corrcoef(small.openness, large.openness)[0, 1] > 0.999
        assert small.attributes == large.attributes


def test_bicubic_keeps_flat_pictures_and_size() -> None:
    flat = torch.full((2, 3, 8, 8, 3), 77, dtype=torch.uint8)
    assert torch.equal(sr.bicubic(flat, 16), torch.full((2, 3, 16, 16, 3), 77, dtype=torch.uint8))


def test_the_command_writes_tables_and_pictures(world: CodecBundle, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sr, "STEPS", (1, 2))
    monkeypatch.setattr(sr, "COARSE", (1, 8))
    without_truth = replace(sr.drawn_clips(2, world, 64, 128), truth=None)
    monkeypatch.setattr(sr, "sampled_clips", lambda *_: without_truth)
    results = sr.run("tiny/sr", clips=2, steps=1, output=str(tmp_path), progress=False)
    assert {"scores", "table", "audio", "steps"} <= set(results)
    kept = read_clip_values(tmp_path / "clip_values.json")
    refined = results["table"]["clip"]["columns"]["sr"]
    for key in ("psnr", "sync_skill"):
        assert results[key]["value"] == kept.scores[key]["value"] == refined[key]["value"]
        assert np.mean(list(kept.paired[key].values())) == pytest.approx(refined[key]["value"], rel=1e-4)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"{p}.{e}" for p in sr.PARTS[:3] for e in ("json", "md")} | {
        "clips.png", "audio.png", "steps.png", "clip_values.json"
    }  # fmt: skip
    facts = json.loads((tmp_path / "table.json").read_text())
    assert facts["clips"] == 2
    assert list(facts["sets"]["clip"]["columns"]) == ["bicubic", "latents", "sr", "bound"]
    assert facts["sets"]["clip"]["columns"]["bound"]["sync_skill"]["value"] == pytest.approx(1)
    assert "psnr" not in facts["sets"]["base"]["columns"]["sr"]
    assert facts["provenance"]["libraries"]["torch"] == torch.__version__
    audio = json.loads((tmp_path / "audio.json").read_text())["sets"]
    assert list(audio) == ["1", "8"]
    assert list(audio["8"]["columns"]) == ["bicubic", "latents", "sr", "sr, noise for sound", "bound"]
    assert audio["8"]["columns"]["bicubic"]["psnr"]["value"] < audio["1"]["columns"]["bicubic"]["psnr"]["value"]
    heard, unheard = (audio["8"]["columns"][name]["psnr"]["value"] for name in ("sr", "sr, noise for sound"))
    assert heard != unheard
    assert heard < audio["1"]["columns"]["sr"]["psnr"]["value"]
    steps = json.loads((tmp_path / "steps.json").read_text())["sets"]["clip"]["columns"]
    assert steps["1"]["psnr"] == facts["sets"]["clip"]["columns"]["sr"]["psnr"] != steps["2"]["psnr"]
    table = sr_table(str(tmp_path / "table.json"), "clip", "psnr", "sync_skill").splitlines()
    ways = ["frames enlarged bicubically", "latents enlarged", "second stage", "truth through the codec"]
    gains = [f"second stage minus {way}" for way in ways[:2]]
    assert table[0] == f"|  | {' | '.join(ways + gains)} |"
    assert table[2].startswith("| PSNR, dB ↑ | ")
    assert len(table) == 6
    assert table[-1].startswith("2 clips, 1 step, 95 % intervals over clips. From [")
    assert (
        sr_table(str(tmp_path / "steps.json")).splitlines()[-1].startswith("2 clips, 95 % intervals over clips. From [")
    )
    text = (tmp_path / "steps.md").read_text()
    assert text.startswith("### first stage: the clip itself")
    assert "| lip-sync skill (other clips' audio 0, codec bound 1) ↑ |" in text


def test_several_numbers_of_steps_are_columns(world: CodecBundle, tmp_path: Path, monkeypatch: Any) -> None:
    without_truth = replace(sr.drawn_clips(2, world, 64, 128), truth=None)
    monkeypatch.setattr(sr, "sampled_clips", lambda *_: without_truth)
    made = sr.run("tiny/sr", clips=2, parts="table,steps", steps="2,1", output=str(tmp_path), progress=False)
    columns, differences = (made["table"]["clip"][key] for key in ("columns", "differences"))
    assert list(columns) == ["bicubic", "latents", "sr", "sr, 1 step", "bound"]
    steps = made["steps"]["clip"]["columns"]
    assert list(steps) == ["1", "2", "bound"]
    assert (columns["sr"], columns["sr, 1 step"]) == (steps["2"], steps["1"])
    change = columns["sr"]["psnr"]["value"] - columns["sr, 1 step"]["psnr"]["value"]
    assert differences["sr, 1 step"]["psnr"]["value"] == pytest.approx(change)
    assert change != 0
    assert "sr, 1 step" in made["table"]["base"]["columns"]
    table = sr_table(str(tmp_path / "table.json"), "clip", "psnr").splitlines()
    assert table[-1].startswith("2 clips, second stage: 2 steps, 95 % intervals over clips. From [")
    header = table[0]
    assert "| second stage | second stage, 1 step | truth through the codec |" in header
    assert header.endswith("| second stage minus second stage, 1 step |")


def test_each_checkpoint_is_sampled_in_its_own_steps_or_in_the_given_ones(world: CodecBundle, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    shutil.copytree(zoo.find("tiny/sr"), run / "export")
    config = json.loads((run / "export/config.json").read_text())
    config["sampling"]["steps"] = 1
    (run / "export/config.json").write_text(json.dumps(config))
    own = sr.run("tiny/sr", clips=2, parts="others", others=str(run), output=str(tmp_path), progress=False)
    labels = "second stage: 5 steps; one: 1 step"
    assert f"95 % intervals; {labels})" in (tmp_path / "others.md").read_text()
    assert f"2 clips, {labels}, 95 % intervals" in sr_table(str(tmp_path / "others.json"))
    given = sr.run(
        "tiny/sr", clips=2, parts="others", others=str(run), steps="1,2", output=str(tmp_path), progress=False
    )
    columns, both = own["others"]["clip"]["columns"], given["others"]["clip"]["columns"]
    assert list(columns) == ["sr", "one", "bicubic", "latents", "bound"]
    assert list(both) == ["sr, 1 step", "sr, 2 steps", "one, 1 step", "one, 2 steps", "bicubic", "latents", "bound"]
    assert columns["one"] == both["one, 1 step"] == both["sr, 1 step"] != both["sr, 2 steps"] == both["one, 2 steps"]
    assert columns["sr"] not in both.values()
    assert "second stage, 1 step | second stage, 2 steps | one, 1 step" in (tmp_path / "others.md").read_text()
    assert "2 clips, 95 % intervals" in sr_table(str(tmp_path / "others.json"))


def test_other_checkpoints_are_compared_and_their_training_is_told(world: CodecBundle, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "again"
    shutil.copytree(zoo.find("tiny/sr"), run / "export")
    made = {"command": ["python", "-m", "magihuman.train", "name=again"], "code": {"commit": "abc"}}
    (run / "run.json").write_text(json.dumps({"steps": 7, "provenance": made}))
    results = sr.run("tiny/sr", clips=2, parts="others", others=str(run), steps=1, output=str(tmp_path), progress=False)
    columns = results["others"]["clip"]["columns"]
    assert list(columns) == ["sr", "again", "bicubic", "latents", "bound"]
    assert columns["sr"] == columns["again"]  # the same weights on the same noise
    differences = results["others"]["clip"]["differences"]["again"]
    assert all(row["value"] == 0 for row in differences.values())
    told = json.loads((tmp_path / "others.json").read_text())["trained"]
    assert told["sr"] == {}
    assert told["again"] == {
        "command": "python -m magihuman.train name=again",
        "steps": 7,
        "seed": None,
        "code": {"commit": "abc"},
    }


def test_runs_of_one_name_keep_their_columns(tmp_path: Path) -> None:
    runs = [tmp_path / folder / "sr" for folder in "ab"]
    for run in runs:
        shutil.copytree(zoo.find("tiny/sr"), run / "export")
    others = ",".join(map(str, runs))
    results = sr.run("tiny/sr", clips=2, parts="others", others=others, steps=1, output=str(tmp_path), progress=False)
    assert list(results["others"]["clip"]["columns"]) == ["tiny/sr", *map(str, runs), "bicubic", "latents", "bound"]


def test_an_ablation_of_second_stages_has_each_number_of_steps_and_enlarging_without_a_network(
    world: CodecBundle, tmp_path: Path
) -> None:
    """`first_size`: the same second stage on smaller clips of the first one."""
    runs = []
    for number, name in enumerate(("full-s0", "full-s1", "less-s0", "less-s1")):
        run = tmp_path / "runs" / name
        shutil.copytree(zoo.find("tiny/sr"), run / "export")
        (run / "run.json").write_text(json.dumps({"steps": number, "provenance": {"command": [name]}}))
        runs.append(str(run))
    made = sr.run(
        runs[0], clips=2, parts="others", others=",".join(runs[1:]), steps="1,2", first_size=32, output=str(tmp_path),
        progress=False,
    )  # fmt: skip
    compared = json.loads((tmp_path / "others.json").read_text())
    assert compared["first_size"] == 32
    columns = made["others"]["clip"]["columns"]
    assert columns["bicubic"]["psnr"]["value"] < 27 < columns["bound"]["psnr"]["value"]  # 28.8 from 64 pixels
    compared["sets"]["clip"]["columns"]["less-s0, 2 steps"]["psnr"]["value"] += 1.0
    compared["sets"]["clip"]["columns"]["less-s1, 2 steps"]["psnr"]["value"] += 1.5
    (tmp_path / "others.json").write_text(json.dumps(compared))
    ablation.summarise(str(tmp_path / "others.json"), str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "ablation.json").read_text())
    names = [f"{row}, {steps}" for steps in ("1 step", "2 steps") for row in ("psnr", "mouth_psnr", "sharpness")]
    assert list(report["table"]["full"]) == names
    assert report["commands"] == ["full-s0", "full-s1", "less-s0", "less-s1"]
    differences = [report["table"]["less"][name]["difference"] for name in names]
    assert differences == pytest.approx([0, 0, 0, 1.25, 0, 0])
    assert report["table"]["less"]["psnr, 2 steps"]["difference_sd"] == pytest.approx(0.5 / 2**0.5)
    lines = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|  |"))
    assert lines[first].startswith("|  | PSNR, dB ↑, 1 step | PSNR around the mouth, dB ↑, 1 step |")
    bicubic = format_value(columns["bicubic"]["psnr"]["value"], 2)
    assert lines[first + 2].startswith(f"| frames enlarged bicubically | {bicubic} |")
    assert [line.split(" | ")[0] for line in lines[first + 3 : first + 6]] == ["| latents enlarged", "| full", "| less"]


def test_a_second_stage_of_the_scene_has_the_scenes_first_stage(tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "runs" / "scene_sr"
    shutil.copytree(zoo.find("scene/base"), run / "export")
    config = json.loads((run / "export/config.json").read_text())
    config["pack"]["coords_style"] = "v1"
    config["size"] |= {"height": 128, "width": 128}
    config["sampling"] = json.loads((zoo.find("tiny/sr") / "config.json").read_text())["sampling"]
    config["provenance"]["stage"] = "second"
    (run / "export/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"scene_sr is of scene, tiny/base is of tiny; give .*base= of the same world"):
        sr.run(str(run), "tiny/base", clips=2)
    monkeypatch.setattr(sr, "STEPS", (1,))
    made = sr.run(str(run), clips=2, parts="steps", steps=1, output=str(tmp_path), progress=False)
    assert json.loads((tmp_path / "steps.json").read_text())["base"] == "scene/base"
    bound = {key: measure["value"] for key, measure in made["steps"]["clip"]["columns"]["bound"].items()}
    assert 29 < bound["psnr"] < 34  # codecs.json says 31.5
    assert 23 < bound["mouth_psnr"] < bound["psnr"]
    assert bound["sync_r"] > 0.9  # the mouth is found where the puppet is


def test_one_checkpoint_by_two_names_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(zoo.find("tiny/sr"), tmp_path / "runs" / "one" / "export")
    monkeypatch.chdir(tmp_path)
    for others in ("runs/one,runs/one/export", f"runs/one,{tmp_path}/runs/one/"):
        with pytest.raises(UserError, match=f"others={others.split(',')[1]} is the same checkpoint as runs/one; give"):
            sr.run("tiny/sr", clips=2, parts="others", others=others, progress=False)


def test_steps_that_a_part_ignores_are_said(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(sr, "COARSE", (1,))
    for steps, said in (("1,2", True), ("1", False)):
        sr.run("tiny/sr", clips=2, parts="audio", steps=steps, output=str(tmp_path), progress=False)
        line = f"parts=audio is measured in 1 step, the first of steps={steps}; the others are ignored"
        assert (line in capsys.readouterr().out) == said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "tiny/base"}, "tiny/base is a checkpoint, for the first stage"),
        ({"base": "tiny/sr"}, "tiny/sr is a checkpoint, for the second stage"),
        ({"parts": "others", "others": "tiny/sr,tiny/distill"}, "tiny/distill is a checkpoint, for the first"),
        (
            {"first_size": 32},
            "parts=table refines samples of the base at its own size; leave out first_size=32 or table",
        ),
        ({"first_size": 30, "parts": "steps"}, "first_size=30: give a multiple of 4, the codec's stride, up to 128"),
        ({"first_size": 256, "parts": "steps"}, "first_size=256: give a multiple of 4"),
        ({"parts": "tables"}, "choose from table, audio, steps"),
        ({"clips": 1}, "clips=1 is impossible; give at least 2"),
        ({"parts": "others"}, "belong together"),
        (
            {"parts": "others", "others": "tiny/sr"},
            "others=tiny/sr is the same checkpoint as tiny/sr; give each checkpoint once",
        ),
        ({"steps": "5,x"}, "steps=5,x: 'x' is no number of steps; give for example steps=5 or steps=5,2,1"),
        ({"steps": 0}, "steps=0: '0' is no number of steps"),
    ],
)
def test_what_cannot_be_measured_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sr.run(**{"checkpoint": "tiny/sr", "base": "tiny/base", **settings})
