"""`python -m eval.puppets`: bounds, a folder of clips, a checkpoint, and what it writes."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from data.tiny.dataset import make_clips
from data.tiny.puppets import draw_puppet
from eval import figures
from eval import puppets as program
from eval.clip_values import read_clip_values
from eval.clips import HELD_OUT_SEED, SheetColumn, ground_truth, held_out, through_codec
from eval.puppets import bounds
from magihuman.cli import run as command
from magihuman.codecs.bundle import CodecBundle, load_bundle
from magihuman.codecs.tiny_captions import FORMS
from magihuman.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def world() -> CodecBundle:
    return load_bundle("tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    make_clips(str(path), 24, seed=80, workers=1, world="tiny", progress=False)
    return path


def value(report, column, name):
    return report["columns"][column]["table"][name]["value"]


def test_the_bound_through_the_codec_is_near_perfect(world):
    """What no model of these latents can beat has to leave room for a good one."""
    truth, coded = bounds(60, world).values()
    for name in ("attributes", "face", "hair", "shirt", "wall", "vowels", "vowels_exact"):
        assert truth.table[name].value == 1
        assert coded.table[name].value == 1
    assert coded.table["syllable_error"].value < 0.03
    assert coded.table["sync_r"].value > 0.93
    assert coded.table["sync_skill"].value == pytest.approx(1)
    assert coded.table["sync_lag0"].value > 0.95
    assert 0.95 < truth.table["sync_skill"].value < 1.3
    assert [c.vision.attributes["skin"] for c in coded.clips] == [p.skin for p in held_out(60)]


def test_held_out_puppets_are_of_a_world_of_their_own():
    from eval.puppet_speech import RECOGNISER_SEED

    assert HELD_OUT_SEED not in (0, RECOGNISER_SEED)
    trained = {make.caption for make in (draw_puppet(0, i) for i in range(2000))}
    assert not trained & {p.caption for p in held_out(200)}


def test_the_codec_takes_a_batch_as_it_takes_one(world):
    truth = ground_truth(held_out(3))
    together, alone = through_codec(truth, world, 3), through_codec(truth, world, 1)
    for a, b in zip(together.frames, alone.frames, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
    for a, b in zip(together.waves, alone.waves, strict=True):
        assert np.abs(a - b).max() < 1e-3


def test_real_clips_in_a_folder_score_like_the_truth(folder, tmp_path, capsys):
    result = program.run(clips=str(folder), output=str(tmp_path / "out"), keep=2, progress=False)
    name = folder.name
    report = json.loads(Path(result["scores"]).read_text())
    assert result["n"] == 24
    assert result["vowels"] == {"value": 1.0, "low": pytest.approx(0.862, abs=1e-3), "high": 1.0, "bound": 1.0}
    assert list(report["columns"]) == ["ground truth", "through codec", name]
    for row in ("attributes", "vowels", "vowels_exact", "words_exact"):
        assert value(report, name, row) == 1
    assert value(report, name, "sync_r") > 0.97
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert written == {
        "scores.json", "scores.md", "scores.png", "clips.json", "clips.png", "clip_values.json",
        "clips/clip-000000.mp4", "clips/clip-000000.txt", "clips/clip-000001.mp4", "clips/clip-000001.txt",
    }  # fmt: skip
    assert {"command", "code", "machine", "date", "libraries"} <= set(report["provenance"])
    printed = capsys.readouterr().out
    for row in ("vowels right ↑", "lip-sync skill", "skin tones"):
        assert f"\n{row}" in printed
    from PIL import Image

    for picture in ("scores.png", "clips.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / "out" / picture).convert("L")))) > 50


def test_bad_clips_of_a_folder_are_named_and_skipped(folder, tmp_path, capsys):
    for name in ("clip-000000", "clip-000001", "clip-000002"):
        for ending in (".mp4", ".txt"):
            (tmp_path / (name + ending)).write_bytes((folder / (name + ending)).read_bytes())
    (tmp_path / "clip-000001.txt").unlink()
    (tmp_path / "clip-000002.txt").write_text("a man speaks")
    (tmp_path / "clip-000003.mp4").write_bytes(b"no video")
    (tmp_path / "clip-000003.txt").write_bytes((folder / "clip-000000.txt").read_bytes())
    result = program.run(clips=str(tmp_path), output=str(tmp_path / "out"), keep=0, progress=False)
    report = json.loads(Path(result["scores"]).read_text())
    column = report["columns"][tmp_path.name]
    assert column["n"] == 1
    assert set(column["refused"]) == {"clip-000001.mp4", "clip-000002.mp4", "clip-000003.mp4"}
    assert "not a puppet's caption" in column["refused"]["clip-000002.mp4"]
    assert "clip-000003.mp4" in capsys.readouterr().out
    assert column["table"]["sync_retrieval"]["status"] == "unavailable"


def test_a_folder_with_clips_of_two_worlds_is_refused(folder, tmp_path):
    for number, caption in enumerate([(folder / "clip-000000.txt").read_text(), FORMS["scene"].example]):
        (tmp_path / f"{number}.mp4").write_bytes((folder / "clip-000000.mp4").read_bytes())
        (tmp_path / f"{number}.txt").write_text(caption)
    with pytest.raises(UserError, match=r"several worlds: 1\.mp4 is of scene and 0\.mp4 is of tiny"):
        program.read_folder(tmp_path, 2, progress=False)


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        (
            (96, 96),
            "puppets of the world scene are measured at multiples of 64 pixels, not 96; scale the clip, for example to 64x64",
        ),
        ((64, 48), "puppets are square, at least 16 pixels and 2 frames; this clip has 64x48 pixels and 3 frames"),
    ],
)
def test_a_clip_of_a_size_that_is_not_measured_is_named_in_one_line(size, reason, tmp_path, capsys):
    from magihuman.media.mp4 import write_mp4

    width, height = size
    write_mp4(tmp_path / "a.mp4", np.full((3, height, width, 3), 128, np.uint8), 25)
    (tmp_path / "a.txt").write_text(FORMS["scene"].example)
    with pytest.raises(SystemExit):
        command(program.run, "python -m eval.puppets", [f"clips={tmp_path}", "progress=false"])
    error = capsys.readouterr().err
    assert f"none of 1 files can be used; the first, a.mp4: {reason}" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either checkpoint=NAME_OR_FOLDER or clips=FOLDER"),
        (["checkpoint=a", "clips=b"], "give either"),
        (["checkpoint=no/such"], "neither a folder nor a shipped name"),
        (["clips=no/such"], "holds no .mp4"),
        (["clips=.", "prompts=0"], "prompts=0 is impossible"),
        (["clips=.", "batch=0"], "batch=0 is impossible"),
        (["clips=.", "keep=-1"], "keep=-1 is impossible"),
        (["clips=.", "prompts=many"], "prompts='many' should be an integer"),
        (["clip=."], "did you mean 'clips'"),
    ],
)
def test_bad_settings_are_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        command(program.run, "python -m eval.puppets", arguments)
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_one_usable_clip_is_an_error(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"none of 1 files can be used; the first, a\.mp4"):
        program.run(clips=str(tmp_path), progress=False)


@pytest.fixture(scope="module")
def untrained(world, tmp_path_factory) -> Path:
    """An exported tiny checkpoint with fresh weights."""
    from magihuman import zoo
    from magihuman.io.export import ExportConfig, save_export

    denoiser = zoo.build(zoo.arch("tiny"), zoo.pack("tiny"), compute_dtype=torch.float32, seed=0)
    config = ExportConfig(zoo.arch("tiny"), zoo.pack("tiny"), "tiny", world.contract)
    return save_export(tmp_path_factory.mktemp("run") / "export", denoiser.model.state_dict(), config).parent


def test_a_run_folder_is_sampled_scored_and_gets_its_eval_folder(untrained):
    program.run(checkpoint=str(untrained), prompts=3, steps=1, cfg=1, batch=2, keep=1, progress=False)
    report = json.loads((untrained / "eval" / "scores.json").read_text())
    column = report["columns"][untrained.name]
    assert column["n"] == 3
    assert column["sampling"]["steps"] == 1
    assert column["seconds"] > 0
    assert report["held_out_seed"] == HELD_OUT_SEED
    assert column["table"]["vowels_exact"]["value"] == 0
    captions = [clip["caption"] for clip in json.loads((untrained / "eval" / "clips.json").read_text())[untrained.name]]
    assert captions == [p.caption for p in held_out(3)]
    kept = read_clip_values(untrained / "eval" / "clip_values.json")
    assert list(kept.paired["sync_r"]) == captions
    for key, of in (("vowels", column), ("sync_r", column), ("sharpness", column)):
        assert np.mean(list(kept.paired[key].values())) == pytest.approx(of["table"][key]["value"], rel=1e-5)
    bound = report["columns"]["through codec"]["table"]
    assert np.mean(list(kept.bound["sync_skill"].values())) == pytest.approx(1)
    assert kept.scores["sharpness"]["bound"] == bound["sharpness"]["value"]


def test_a_shipped_name_stays_whole_and_a_folder_gives_its_last_part():
    assert program._name_of("tiny/base", None) == "tiny/base"
    assert program._name_of("runs/pretrain/first/", None) == "first"
    assert program._name_of(None, "tiny/base") == "base"


def test_the_sheet_says_what_is_wrong_apart_from_what_is_heard():
    from eval import figures

    puppets = held_out(2)
    clips = ground_truth(puppets)
    scores = clips.score()
    clip = scores.clips[0]
    clip.stated.update(face="another", shirt="another")
    sheet = figures.contact_sheet([SheetColumn("t", "model", clips, scores.clips)])
    face, shirt, heard = (clip.vision.attributes["face"], clip.vision.attributes["shirt"], " ".join(clip.speech.words))
    title = sheet.axes[0].get_title(loc="left")
    assert title == f"{puppets[0].caption}\nt | recognised: {heard} | wrong: face {face}, shirt {shirt}"
    assert "wrong" not in sheet.axes[2].get_title(loc="left")
    assert (sheet.axes[3].get_xlabel(), sheet.axes[3].get_ylabel()) == ("frame", "opening")


def test_the_legend_of_the_bars_overlaps_no_panel():
    from eval import figures

    scores = ground_truth(held_out(2)).score().to_dict()
    picture = figures.score_bars({"columns": {"a": scores, "b": scores}})
    picture.draw_without_rendering()
    legend = picture.legends[0].get_window_extent()
    assert all(not legend.overlaps(axes.get_tightbbox()) for axes in picture.axes)


def test_a_clip_depends_on_its_prompt_and_the_seed_only(untrained):
    prompts = [p.caption for p in held_out(3)]
    settings = {"steps": 1, "cfg": 1.0, "progress": False}
    together, _, _ = program.generate(str(untrained), prompts, batch=3, **settings)
    alone, _, _ = program.generate(str(untrained), prompts[:1], batch=1, **settings)
    other, _, _ = program.generate(str(untrained), prompts[:1], batch=1, seed=1, **settings)
    assert np.abs(together.frames[0].astype(int) - alone.frames[0]).max() <= 1
    assert np.abs(other.frames[0].astype(int) - alone.frames[0]).max() > 10


def test_no_title_meets_another_and_no_legend_hides_points() -> None:
    results = ROOT / "eval" / "results"
    for name in ("tiny_turbo/ablation", "tiny_turbo/ablation_align", "tiny_sr/ablation", "dmd2/ablation"):
        figure = figures.ablation_bars(json.loads((results / name / "ablation.json").read_text()))
        figure.draw_without_rendering()
        boxes = [axes.title.get_window_extent() for axes in figure.axes if axes.axison]
        assert len(boxes) > 4
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert max(box.x1 for box in boxes) < figure.bbox.x1
        names = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(names))
        assert min(box.x0 for box in names) > 0
    figure = Figure(figsize=(15, 3.1), layout="constrained")
    figures._training_curves(figure, ROOT / "magihuman" / "zoo" / "weights" / "tiny" / "distill" / "metrics.csv")
    figure.draw_without_rendering()
    for axes in figure.axes:
        legend = axes.get_legend()
        assert legend is not None
        assert not legend.get_window_extent().overlaps(axes.bbox)
        assert legend.get_window_extent().y0 >= 0
