"""`python -m eval.dmd2`: sampling side by side, what is kept of it, and what is written."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from eval import dmd2, readme_tables
from eval.clip_values import read_clip_values
from eval.clips import held_out, noise_seed
from eval.formatting import format_interval
from eval.generate import TIMED, Sampler, sample_all, tiny_pipelines
from eval.output import short_names
from eval.puppet_tables import verdict_lines, verdict_note
from eval.puppets import generate
from inference.pipeline import Pipeline
from magihuman import zoo
from magihuman.cli import run as command
from magihuman.codecs.bundle import CodecBundle, load_bundle
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.io.export import ExportConfig, Sampling, save_export

FULL = Sampling("unipc", 2, guidance=Guidance(2.0, 2.0, audio=3.0))
FEW = Sampling("renoise", 1, guidance=Guidance(1.0, 1.0, audio=1.0))


@pytest.fixture(scope="module")
def world() -> CodecBundle:
    return load_bundle("tiny")


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> Path:
    """Untrained networks: run folders `teacher`, and `a` and `b` with the student's sampler."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, (name, sampling) in enumerate({"teacher": FULL, "a": FEW, "b": FEW}.items()):
        denoiser = zoo.build(zoo.arch("tiny"), zoo.pack("tiny"), compute_dtype=torch.float32, seed=seed)
        config = ExportConfig(zoo.arch("tiny"), zoo.pack("tiny"), "tiny", world.contract, sampling=sampling)
        save_export(folder / name / "export", denoiser.model.state_dict(), config)
    made = {"command": ["python", "-m", "magihuman.train", "+recipe=dmd2"], "seed": 5, "code": {"commit": "c"}}
    record = {"recipe": "recipes.dmd2.DMD2", "name": "a", "created": "today", "steps": 20, "provenance": made}
    (folder / "a" / "run.json").write_text(json.dumps({**record, "metrics": {"memory_gb": 1.23041}}))
    (folder / "a" / "checkpoints").mkdir()
    (folder / "a" / "checkpoints" / "last.ckpt").write_bytes(bytes(2_340_000))
    (folder / "a" / "metrics.csv").write_text(
        "step,dm/video,fake_score_error/video,teacher_error/video,monitor/std_video\n10,1,2,4,.9\n20,.5,1,4,1.1\n"
    )
    return folder


@pytest.fixture(scope="module")
def compared(runs, tmp_path_factory) -> tuple[dict, dict, Path]:
    """A comparison of student a on 3 prompts x 2 seeds: what it returns, compare.json, and its cache."""
    cache = tmp_path_factory.mktemp("cache")
    result = dmd2.run(
        str(runs / "a"), str(runs / "teacher"), prompts=3, seeds=2, batch=4, cache=str(cache), keep=2, progress=False
    )  # fmt: skip
    return result, json.loads(Path(result["compare"]).read_text()), cache


COLUMNS = [
    "ground truth", "through codec", "teacher, 2 steps, CFG", "teacher, 1 steps, no CFG",
    "teacher, 1 re-noise steps, no CFG", "student, 1 re-noise steps, no CFG",
]  # fmt: skip


def test_a_run_folder_gets_its_comparison_and_its_page(runs, compared):
    result, values, _ = compared
    folder = runs / "a" / "compare"
    assert Path(result["compare"]) == folder / "compare.json"
    written = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    clips = {f"clips/{who}-{k}.{end}" for who in ("teacher", "student") for k in (0, 1) for end in ("mp4", "txt")}
    assert written == {"compare.json", "compare.md", "compare.png", "sheet.png", "clip_values.json", *clips}
    rows, kept = values["columns"][COLUMNS[-1]]["rows"], read_clip_values(folder / "clip_values.json")
    for key in ("vowels", "sync_skill", "sharpness", "nearest"):
        assert result[key]["value"] == kept.scores[key]["value"] == rows[key]["value"]
        assert np.mean(list(kept.paired[key].values())) == pytest.approx(rows[key]["value"], rel=1e-4, abs=1e-5)
    page = (runs / "a" / "report.md").read_text()
    assert page.startswith("# DMD2: a\n")
    for part in ("| vowels right ↑ |", "![curves and clips](report.png)", "compare/clips/student-1.mp4"):
        assert part in page
    assert str(runs) not in page
    assert list(values["columns"]) == COLUMNS
    assert {"command", "code", "machine", "date"} <= set(values["provenance"])
    assert values["columns"]["ground truth"]["rows"]["vowels"]["value"] == 1
    student = values["columns"][COLUMNS[-1]]
    assert (student["n"], student["calls"], student["checkpoint"]["name"]) == (6, 1, f"{runs.name}/a")
    assert student["trained"] == {
        "command": "python -m magihuman.train +recipe=dmd2", "steps": 20, "seed": 5, "code": {"commit": "c"},
        "process_gb": 1.23, "state_mb": 2.3,
    }  # fmt: skip
    assert values["columns"][COLUMNS[2]]["calls"] == 4
    assert student["rows"]["vowels"]["value"] < 0.75
    claims = values["claims"][COLUMNS[-1]]
    assert [claim["about"] for claim in claims] == [
        *(f"quality against {name}" for name in COLUMNS[2:5]),
        "match with real puppets, through the codec",
        "match with the distillation's target, which its settings do not say",  # this run folder has no config.yaml
        "speed against teacher, 2 steps, CFG",
    ]
    assert result["verdicts"][COLUMNS[-1]] == {claim["about"]: claim["verdict"] for claim in claims}
    assert claims[0]["rows"].keys() | claims[3]["rows"].keys() == {*student["rows"], "skin tones"}
    assert claims[4]["verdict"] == "n/a"
    vowels = claims[0]["rows"]["vowels"]
    assert (vowels["verdict"], vowels["reason"]) == ("n/a", "3 prompts have a value in both, and a verdict needs 5")
    assert (student["shares"]["skin tones"]["w"], student["shares"]["skin tones"]["p"]) == (None, None)
    assert "nothing about other training seeds" in values["scope"][COLUMNS[-1]]
    assert sum(student["shares"]["skin tones"]["counts"].values()) == 6


def test_checkpoints_are_sampled_with_the_bits_of_the_reference(runs, world):
    (pipeline,) = tiny_pipelines("eval.dmd2", str(runs / "teacher"), device="cpu")
    assert pipeline.denoiser.tier == "exact"
    prompts = [puppet.caption for puppet in held_out(2)]
    reference = Pipeline(zoo.load(str(runs / "teacher")), world)
    settings = reference.settings()
    assert settings.guidance.needed
    for own, other in zip(*(one.draft(prompts, [3, 4], settings) for one in (pipeline, reference)), strict=True):
        assert torch.equal(own.video, other.video)
        assert torch.equal(own.audio, other.audio)


def test_pictures_are_not_empty(runs, compared):
    from PIL import Image

    pictures = [runs / "a" / "report.png", *(runs / "a" / "compare").glob("*.png")]
    assert len(pictures) == 3
    for picture in pictures:
        assert len(np.unique(np.asarray(Image.open(picture).convert("L")))) > 50


def test_clips_are_those_of_eval_puppets(runs, world):
    """The same prompt, seed and settings, so that figures of both commands compare."""
    prompts = [p.caption for p in held_out(2)]
    way = Sampler(
        "a", Pipeline(zoo.load(str(runs / "a")), world), Pipeline(zoo.load(str(runs / "a")), world).settings()
    )
    sample_all([way], prompts, [0, 1], batch=3, progress=False)
    for seed in (0, 1):
        clips, _, _ = generate(str(runs / "a"), prompts, seed=seed, progress=False)
        mine = way.clips(prompts, seed * 2, batch=1)
        for a, b in zip(clips.frames, mine.frames, strict=True):
            assert np.abs(a.astype(int) - b).max() <= 1
        for a, b in zip(clips.waves, mine.waves, strict=True):
            assert np.abs(a - b).max() < 1e-3
    assert noise_seed(2, 5) == 2_000_011
    assert len(way.seconds) == 2  # 4 clips in batches of 3
    assert way.facts()["seconds_per_clip"] == pytest.approx(np.mean(way.seconds))


def test_kept_latents_are_used_if_they_are_still_true(runs, world, tmp_path):
    pipeline = Pipeline(zoo.load(str(runs / "a")), world)
    prompts = [p.caption for p in held_out(5)]

    def sampled() -> Sampler:
        way = Sampler("a", pipeline, pipeline.settings(), cache=True)
        sample_all([way], prompts, [0], batch=1, folder=tmp_path, progress=False)
        return way

    new, again = sampled(), sampled()
    assert (new.cached, len(new.seconds)) == (None, 5)
    assert len(again.seconds) == TIMED
    assert set(again.cached) == {"date", "code"}
    assert torch.equal(new.video, again.video)
    assert torch.equal(new.audio, again.audio)
    (file,) = tmp_path.glob("*.safetensors")
    pipeline.denoiser.model.state_dict()["final_linear_video.weight"].add_(0.02)  # other code, same name
    other = sampled()
    assert (other.cached, len(other.seconds)) == (None, 5)
    assert not torch.allclose(other.video, new.video, atol=0.1)
    file.write_bytes(file.read_bytes()[:1000])
    assert sampled().cached is None


def test_only_the_teacher_is_kept_and_changes_nothing(runs, compared):
    _, values, cache = compared
    assert len(list(cache.glob("*.safetensors"))) == 3
    result = dmd2.run(
        f"{runs / 'a'},{runs / 'b'}", str(runs / "teacher"), prompts=3, seeds=2, batch=4, cache=str(cache), keep=1,
        output=str(cache / "out"), progress=False,
    )  # fmt: skip
    again = json.loads(Path(result["compare"]).read_text())
    assert list(again["columns"]) == [
        *COLUMNS[:5],
        "student a, 1 re-noise steps, no CFG",
        "student b, 1 re-noise steps, no CFG",
    ]
    assert result["report"] is None
    for name in COLUMNS[2:5]:
        assert again["columns"][name]["kept"] is not None
        assert again["columns"][name]["rows"] == values["columns"][name]["rows"]
    assert again["columns"]["student a, 1 re-noise steps, no CFG"]["rows"] == values["columns"][COLUMNS[-1]]["rows"]


def test_the_readme_shows_a_committed_comparison(compared, tmp_path, monkeypatch):
    result, values, _ = compared
    monkeypatch.setattr(readme_tables, "REPO", tmp_path)
    (tmp_path / "c.json").write_text(Path(result["compare"]).read_text())
    text = readme_tables.render("<!-- distill c.json attributes sharpness -->\n<!-- end -->")
    lines = text.splitlines()
    header = lines[1].split(" | ")
    assert header[-4:-2] == ["teacher, 2 steps, CFG (4 calls)", "teacher, 1 steps, no CFG (1 calls)"]
    assert header[-1] == "student, 1 re-noise steps, no CFG (1 calls) |"
    assert lines[3].startswith("| face, hair, shirt and wall as prompted ↑ | 1.000 [")
    off = 100 * values["columns"][COLUMNS[2]]["rows"]["sharpness"]["off"]["value"]
    assert f"({off:+.0f}"[:4] in lines[4]
    assert lines[5].startswith("| skin tones, p of the world's shares | light ")
    assert lines[6].startswith("| denoising, s per clip ↓ |  |  | ")
    assert "- speed against teacher, 2 steps, CFG: **" in text
    assert "training process" not in text
    other = COLUMNS[-1].replace("student", "student b")
    values = copy.deepcopy(values)
    for part in ("columns", "claims", "scope"):
        values[part][other] = values[part][COLUMNS[-1]]
    (tmp_path / "c.json").write_text(json.dumps(values))
    lines = readme_tables.render("<!-- distill c.json sharpness -->\n<!-- end -->").splitlines()
    header = ["through codec", "teacher, 2 steps, CFG (4 calls)", "teacher, 1 re-noise steps, no CFG (1 calls)"]
    assert lines[1] == f"|  | {' | '.join([*header, 'student', 'student b'])} |"
    assert "| training state in a checkpoint, MB ↓ |  |  |  | 2 | 2 |" in lines
    assert "| peak memory of the training process, GB ↓ |  |  |  | 1.23 | 1.23 |" in lines
    assert sum(line.startswith("- quality against teacher, 2 steps, CFG: **") for line in lines) == 2
    assert not any(line.startswith("  - ") for line in lines)
    claims, scope = (
        values["claims"][COLUMNS[-1]],
        "the recipe, from 2 training seeds (1 degree of freedom between them)",
    )
    recipe = {**values, "claims": {"recipe, 2 training seeds": claims}, "scope": {"recipe, 2 training seeds": scope}}
    (tmp_path / "c.json").write_text(json.dumps(recipe))
    whole = readme_tables.render("<!-- distill c.json sharpness -->\n<!-- end -->").splitlines()
    assert whole[1].startswith(
        "|  | ground truth | through codec | teacher, 2 steps, CFG (4 calls) | teacher, 1 steps, no"
    )
    assert f"{scope}:" in whole
    assert any(line.startswith("  - ") for line in whole)
    (tmp_path / "c.json").write_text(json.dumps(values))
    only = readme_tables.render("<!-- distill_values c.json sharpness -->\n<!-- end -->")
    assert "quality" not in only
    assert "student b" in only
    with pytest.raises(UserError, match="cannot be rendered"):
        readme_tables.render("<!-- distill c.json no_such_row -->\n<!-- end -->")


@pytest.mark.parametrize(
    ("measure", "text"),
    [
        ({"value": 0.0364, "low": 0.0358, "high": 0.0371}, "0.0364 [0.0358, 0.0371]"),
        ({"value": -0.00001, "low": -0.02, "high": 0.01}, "0.0000 [-0.0200, 0.0100]"),
        ({"value": 2.4, "low": 2.2, "high": 2.61}, "2.40 [2.20, 2.61]"),
        ({"value": None, "low": None, "high": None}, "n/a"),
    ],
)
def test_cells_are_short(measure, text):
    assert format_interval({**measure, "n": 3, "status": "ok", "reason": ""}) == text


def test_verdicts_are_shown_with_their_rows_and_the_rule():
    def row(kind: str, word: str, value: float, margin: float) -> dict:
        ends = {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 9, "status": "ok", "reason": ""}
        return {"kind": kind, **ends, "margin": margin, "p": 0.01, "verdict": word}

    missing = {"kind": "ratio", "value": None, "low": None, "high": None, "margin": None, "p": None, "verdict": "n/a"}
    rows = {"vowels": row("difference", "better", 0.05, 0.05), "onsets": row("difference", "equal", 0.0, 0.05)}
    match = {
        "skin tones": row("shares", "different", 0.25, 0.2),
        "timing": row("ratio", "lower", 0.8, 0.1),
        "pitch": missing,
    }
    values = {
        "scope": {"own": "one checkpoint; says nothing about other training seeds"},
        "claims": {"own": [
            {"about": "quality against full", "verdict": "better", "rows": rows},
            {"about": "match with real puppets", "verdict": "different", "rows": match},
        ]},
    }  # fmt: skip
    assert verdict_lines(values) == [
        "own (one checkpoint; says nothing about other training seeds):",
        "",
        "- quality against full: **BETTER**",
        "  - better: vowels +0.0500 [+0.0400, +0.0600]",
        "  - equal: onsets 0.0000 [-0.0100, +0.0100]",
        "- match with real puppets: **DIFFERENT**",
        "  - lower: timing 0.80 [0.79, 0.81]",
        "  - different: skin tones w 0.25 [0.24, 0.26]",
        "  - n/a: pitch",
    ]
    assert len(verdict_lines(values, rows=False)) == 4
    note = verdict_note(values)
    assert "10 % for ratios, 0.2 for w, vowels 0.05, onsets 0.05" in note
    assert "Holm's correction over the 2 rows" in note


def trained(folder: Path, **settings: object) -> str:
    """A run folder with the settings of a training, and an empty export."""
    (folder / "export").mkdir(parents=True)
    (folder / "export" / "config.json").write_text("{}")
    plain = {
        "seed": 0,
        "data": {"seed": "${seed}"},
        "recipe": {"guidance": None},
        "optim": {"lr": 0.1},
        "folder": str(folder),
    }
    (folder / "config.yaml").write_text(json.dumps({**plain, **settings}))  # JSON is YAML
    return str(folder)


def test_seeds_of_one_recipe_have_the_same_settings(tmp_path):
    names = [trained(tmp_path / f"s{seed}", seed=seed) for seed in (0, 1, 2)]
    dmd2.require_one_recipe(names)
    other = trained(tmp_path / "other", seed=3, optim={"lr": 0.2})
    with pytest.raises(UserError, match=r"differ in optim\.lr"):
        dmd2.require_one_recipe([*names, other])
    for wrong in ([names[0]], [names[0], trained(tmp_path / "again")]):
        with pytest.raises(UserError, match="different seeds"):
            dmd2.require_one_recipe(wrong)
    (tmp_path / "s1" / "config.yaml").unlink()
    with pytest.raises(UserError, match="has no record of its settings"):
        dmd2.require_one_recipe(names)


def test_the_target_is_the_teacher_with_the_guidance_of_the_training(runs, tmp_path):
    """One more column where it is no other column already; the shipped student records what it was trained with."""
    guided = FULL.guidance
    assert dmd2._target_guidance(trained(tmp_path / "null"), guided) == guided
    plain = Guidance(1.0, 1.0, audio=1.0)
    name = trained(tmp_path / "one", recipe={"guidance": plain.to_dict()})
    assert dmd2._target_guidance(name, guided) == plain
    assert dmd2._target_guidance(str(runs / "a"), guided) is None
    assert dmd2._target_guidance("tiny/distill", guided) == Guidance(1.0, 1.0, 500, 1.0)
    samplers, targets = dmd2._samplers(["tiny/distill"], "tiny/base", "cpu")
    assert [sampler.name for sampler in samplers] == [
        "teacher, 32 steps, CFG", "teacher, 32 steps, no CFG", "teacher, 8 steps, no CFG",
        "teacher, 8 re-noise steps, no CFG", "student, 8 re-noise steps, no CFG",
    ]  # fmt: skip
    assert targets == {samplers[-1].name: "teacher, 32 steps, no CFG"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "student is not given"),
        (["student=no/such"], "neither a folder nor a shipped name"),
        (["student=tiny/base,tiny/base"], "each once"),
        (["student=tiny/base", "prompts=1"], "prompts=1 is impossible; give at least 2"),
        (["student=tiny/base", "seeds=0"], "seeds=0 is impossible"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        command(dmd2.run, "python -m eval.dmd2", arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_students_of_different_samplers_are_not_one_table(runs):
    with pytest.raises(UserError, match="is sampled otherwise than"):
        dmd2.run(f"{runs / 'a'},{runs / 'teacher'}", str(runs / "teacher"), cache=None, progress=False)


def test_names_of_columns(runs, world):
    assert short_names(["tiny/base"]) == ["base"]
    assert short_names(["runs/a/", "runs/b"]) == ["a", "b"]
    assert short_names(["x/a", "y/a", "b"]) == ["x/a", "y/a", "b"]
    settings = Pipeline(zoo.load(str(runs / "teacher")), world).settings()
    assert dmd2.sampler_words(settings) == "2 steps, CFG"
    assert dmd2.sampler_words(replace(settings, solver="euler", guidance=FEW.guidance)) == "2 euler steps, no CFG"
