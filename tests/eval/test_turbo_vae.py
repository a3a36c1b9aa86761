"""eval.turbo_vae and eval.ablation: the whole table from a small student, and what differences between seeds are."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from eval import ablation, readme_tables, turbo_vae
from eval.clip_values import read_clip_values
from magihuman.codecs.bundle import load_bundle
from magihuman.errors import NotApplicable, UserError
from magihuman.zoo import decoders as zoo


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    network, latents = zoo.arch("tiny")["network"], zoo.Latents.of(load_bundle("tiny").contract)
    config = zoo.DecoderConfig("causal", network, latents)
    state = zoo.build(config, seed=0).state_dict()
    return zoo.save(tmp_path_factory.mktemp("student") / "export", state, config)


def test_the_table_of_a_student_beside_its_codec(student: Path, tmp_path: Path) -> None:
    result = turbo_vae.run(student=str(student), teacher=None, clips=2, output=str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "scores.json").read_text())
    codec, mine = report["columns"]["codec"], report["columns"]["student"]
    assert 29 < codec["table"]["psnr"]["value"] < 35  # codecs.json says 31.9
    assert codec["table"]["ssim"]["value"] > 0.9
    assert mine["table"]["psnr"]["value"] < 20  # it has learned nothing
    assert 0 <= mine["cost"]["streaming"] < 1e-4
    assert mine["table"]["seam"]["value"] == pytest.approx(1, abs=1e-3)
    assert codec["table"]["seam"]["value"] is None
    assert 0.1 < codec["cost"]["flops"] < 1
    assert 2 < mine["cost"]["flops"] < 5
    kept = read_clip_values(tmp_path / "out" / "clip_values.json")
    assert result["sharpness_ratio"]["value"] == mine["table"]["sharpness"]["value"]
    assert np.mean(list(kept.paired["psnr"].values())) == pytest.approx(mine["table"]["psnr"]["value"], rel=1e-5)
    assert kept.scores["flops"]["value"] == mine["cost"]["flops"]
    for name in ("scores.md", "scores.png", "clips.png", "clips.json"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    with pytest.raises(UserError, match="student=nothing is not a decoder"):
        turbo_vae.run(student="nothing", teacher=None)


def _untrained(folder: Path, latents: zoo.Latents) -> str:
    config = zoo.DecoderConfig("causal", zoo.arch("tiny")["network"], latents)
    return str(zoo.save(folder, zoo.build(config, seed=0).state_dict(), config))


def test_a_student_is_measured_in_its_own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _untrained(tmp_path / "scene", zoo.Latents.of(load_bundle("scene").contract))
    with pytest.raises(UserError, match=r"teacher=tiny/teacher takes latents of 'tiny-.*, but student=.* of 'scene-"):
        turbo_vae.run(student=folder, teacher="tiny/teacher")
    monkeypatch.setattr(zoo, "teacher_of", lambda world: str(tmp_path / world))
    report = turbo_vae.run(student=folder, clips=2)
    assert report["settings"]["world"] == "scene"
    assert report["settings"]["teacher"] == folder
    assert report["columns"]["student, teacher as truth"]["table"]["psnr"]["value"] == 99
    assert 27 < report["columns"]["codec"]["table"]["psnr"]["value"] < 32  # codecs.json says 29.3
    other = _untrained(tmp_path / "other", zoo.Latents("another-0123", 12, (4, 4, 4)))
    with pytest.raises(NotApplicable, match=r"puppet worlds \(tiny, scene\), and student=.* is of 'another-0123'"):
        turbo_vae.run(student=other)


def test_the_shipped_student_is_what_its_table_says() -> None:
    """scene/turbo: far better than the linear codec, no seam, and no worse than its teacher where it was measured."""
    table = json.loads((Path(turbo_vae.__file__).with_name("results") / "scene_turbo" / "scores.json").read_text())
    told = {name: column["table"]["psnr"]["value"] for name, column in table["columns"].items()}
    assert told["student"] > told["teacher"] > told["codec"] + 0.5
    assert table["columns"]["student"]["cost"]["streaming"] < 1e-5
    report = turbo_vae.run(student="scene/turbo", teacher=None, clips=3)
    found = {name: column["table"]["psnr"]["value"] for name, column in report["columns"].items()}
    assert found["student"] > found["codec"] + 1.5
    assert found["student"] == pytest.approx(told["student"], abs=2)  # of 3 clips, not 24
    assert report["columns"]["student"]["cost"]["streaming"] < 1e-5


def test_the_readme_shows_the_rows_that_it_asks_for() -> None:
    folder = "eval/results/scene_turbo"
    shown = readme_tables.render(f"<!-- decoding {folder}/scores.json psnr seconds -->\n<!-- end -->").splitlines()
    values = json.loads((readme_tables.REPO / folder / "scores.json").read_text())["columns"]["student"]
    assert [line.split(" | ")[0] for line in shown[3:5]] == ["| PSNR, dB ↑", "| processor seconds per clip ↓"]
    assert f"{values['table']['psnr']['value']:.2f} [" in shown[3]
    assert f"| {values['cost']['seconds']:.3g} |" in shown[4]
    folder = "eval/results/tiny_turbo"
    table = json.loads((readme_tables.REPO / folder / "ablation_align" / "ablation.json").read_text())["table"]
    shown = readme_tables.render(f"<!-- ablation {folder}/ablation_align/ablation.json -->\n<!-- end -->").splitlines()
    assert f"| no_align | {table['no_align']['student: psnr']['mean']:.2f} (**+0.34" in "\n".join(shown)


def test_a_perfect_decoder_is_perfect() -> None:
    truth = torch.randint(0, 256, (1, 5, 16, 16, 3), dtype=torch.uint8)
    frames = truth.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    judged, made = turbo_vae.score_decoder("same", lambda _: frames, torch.zeros(1, 3, 2, 4, 4), truth.numpy())
    assert (made == truth.numpy()).all()
    table = judged.to_dict()["table"]
    assert table["psnr"]["value"] == 99
    assert table["change"]["value"] == 0
    assert table["seam"]["reason"] == "no clip has it"


def test_every_sampled_clip_is_judged_once(tmp_path: Path) -> None:
    """50 of them: 29 / 50 * 50 is less than 29."""
    marks = torch.arange(50).view(50, 1, 1, 1, 1)
    video = marks.expand(50, 3, 2, 4, 4).half().contiguous()
    frames = marks.expand(50, 3, 5, 16, 16).byte().contiguous()
    save_file({"video": video, "frames": frames}, tmp_path / "sampled.safetensors")
    seen: list[float] = []

    class Codec:
        channels = 3

        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(float(latents[0, 0, 0, 0, 0]))
            return (latents[:, :, :1, :1, :1] / 127.5 - 1).expand(1, 3, 5, 16, 16)

    columns = turbo_vae._on_sampled(str(tmp_path / "sampled.safetensors"), {"codec": Codec(), "student": Codec()}, "")
    assert seen == [*range(50), *range(50)]
    assert columns["student, sampled latents, teacher as truth"].to_dict()["table"]["psnr"]["value"] == 99


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    def write(name: str, psnr: float) -> None:
        folder = tmp_path / name
        (folder / "eval").mkdir(parents=True)
        values = {row: {"value": psnr} for row in turbo_vae.ROWS}
        (folder / "eval" / "scores.json").write_text(json.dumps({"columns": {"student": {"table": values}}}))
        (folder / "run.json").write_text(json.dumps({"provenance": {"command": ["train", name]}}))

    with pytest.raises(UserError, match="no evaluated run named full-s0"):
        ablation.summarise(str(tmp_path))
    for seed, level in enumerate((20.0, 25.0, 33.0)):  # seeds differ by much, the variant by one
        write(f"full-s{seed}", level)
        write(f"no_align-s{seed}", level - 1)
    ablation.summarise(str(tmp_path), str(tmp_path / "out"))
    table = json.loads((tmp_path / "out" / "ablation.json").read_text())["table"]
    cell = table["no_align"]["student: psnr"]
    assert cell["difference"] == pytest.approx(-1)
    assert cell["difference_sd"] == pytest.approx(0)
    assert cell["sd"] > 5
    scores = tmp_path / "no_align-s1" / "eval" / "scores.json"
    report = json.loads(scores.read_text())
    report["columns"]["student"]["table"]["flicker"]["value"] = None
    scores.write_text(json.dumps(report))
    with pytest.raises(UserError, match=r"no_align-s1 was evaluated otherwise .* has student: flicker"):
        ablation.summarise(str(tmp_path))
    (tmp_path / "no_align-s2" / "eval" / "scores.json").unlink()
    with pytest.raises(UserError, match=r"no_align was run with seeds \[0, 1\]"):
        ablation.summarise(str(tmp_path))


def test_second_stages_are_read_from_their_comparison(tmp_path: Path) -> None:
    columns = {
        f"{variant}-s{seed}": {row: {"value": 20 + 5 * seed + more} for row in ablation.SHOWN_SR}
        for seed in (0, 1)
        for variant, more in (("full", 0), ("plain_flow", -1 - seed))
    }
    columns["bound"] = columns["full-s0"]
    trained = {name: {"command": f"train name={name}"} for name in columns if name != "bound"}
    file = tmp_path / "others.json"
    file.write_text(json.dumps({"sets": {"clip": {"columns": columns}}, "trained": trained}))
    assert ablation.summarise(str(file), str(tmp_path))["full"]["psnr"] == 22.5
    made = json.loads((tmp_path / "ablation.json").read_text())
    assert made["table"]["plain_flow"]["psnr"]["difference"] == -1.5
    assert "train name=plain_flow-s1" in made["commands"]
    with pytest.raises(UserError, match="no file"):
        ablation.summarise(str(tmp_path / "none.json"))


def test_students_are_named_by_the_recipe_words_of_their_commands(tmp_path: Path) -> None:
    guidance = "recipe.guidance={video_high: 1.0, video_low: 1.0}"
    columns: dict[str, Any] = {"teacher": {"role": "teacher", "rows": {}}}
    for seed, level in enumerate((0.7, 0.8, 0.9)):
        for words, more in (("", 0.0), (guidance, -0.1), ("recipe.gan.weight=0.0 recipe.steps=4", 0.001 * seed)):
            rows = {row: {"value": level + more} for row in ablation.SHOWN_DMD2}
            trained = {"command": f"train +recipe=dmd2 name=x{seed} {words}", "seed": seed}
            columns[f"student {len(columns)}"] = {"role": "student", "rows": rows, "trained": trained}
    file = tmp_path / "compare.json"
    file.write_text(json.dumps({"columns": columns}))
    ablation.summarise(str(file), str(tmp_path))
    made = json.loads((tmp_path / "ablation.json").read_text())
    assert set(made["table"]) == {"full", guidance.removeprefix("recipe."), "gan.weight=0.0 steps=4"}
    assert made["table"][guidance.removeprefix("recipe.")]["vowels"]["difference"] == pytest.approx(-0.1)
    # Deviations of the two variants' differences are 0 and .001: pooled .001 / sqrt(2),
    # the mean's over sqrt(3); t of 4 degrees of freedom is 2.776, and 2.776 x .00041 = .0011.
    lines = (tmp_path / "ablation.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| guidance")).count("(**-0.1000 ± 0.0011**)") == 15
    assert next(line for line in lines if line.startswith("| gan.weight")).count("(+0.0010 ± 0.0011)") == 15
    again = {**columns, "student z": columns["student 1"]}
    file.write_text(json.dumps({"columns": again}))
    with pytest.raises(UserError, match=r"two students of variant full have seed 0: student z"):
        ablation.summarise(str(file))
    columns["student 1"]["trained"] = {}
    file.write_text(json.dumps({"columns": columns}))
    with pytest.raises(UserError, match="student 1 has no record of its training; compare run folders"):
        ablation.summarise(str(file))
