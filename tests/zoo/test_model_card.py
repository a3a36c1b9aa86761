"""Model cards: text, numbers, text of people, conversions, and the cards of a training."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import training_stub
import yaml

from magihuman import zoo
from magihuman.errors import UserError
from magihuman.flow.guidance import Guidance
from magihuman.io.export import Sampling, Size, write_json
from magihuman.io.provenance import fingerprint
from magihuman.zoo.commands import card
from magihuman.zoo.model_card import (
    BEGIN,
    END,
    LATENCY,
    front_matter,
    latency_rows,
    read_facts,
    write_card,
    write_run_cards,
)

GOLDEN = Path(__file__).with_name("model_card.md")
CONFIG = replace(
    zoo.config_of("tiny/base"),
    sampling=Sampling(steps=12, guidance=Guidance(2.0, 1.5, 500, 3.0)),
    size=Size(frames=25, height=64, width=64),
    provenance={"recipe": "recipes.pretrain.Pretrain", "steps": 120, "seed": 3, "averaged": True},
)
RECORD = {
    "format": "magihuman-run/1",
    "recipe": "recipes.pretrain.Pretrain",
    "created": "2026-11-30 10:00:00",
    "steps": 120,
    "config_sha256": "c0" * 32,
    "parents": [
        {"role": "shards", "name": "shards-tiny", "sha256": "5a" * 32, "of": "all bytes"},
        {"role": "init", "name": "tiny/base", "sha256": "1b" * 32, "of": "a sample of the bytes"},
    ],
    "provenance": {
        "command": [
            *["python", "-m", "magihuman.train", "+recipe=pretrain", "folder=/home/me/secret/run"],
            "x=s3://a/b?sig=1",
        ],
        "seed": 3,
        "code": {"commit": "0123456789abcdef", "changed": True},
        "libraries": {"python": "3.11.7", "torch": "2.13.0"},
    },
    "results": {
        "eval": {"scores": "/home/me/secret/run/eval/scores.json", "n": 40},
        "compare": {"verdicts": {"student": {"against teacher": "within noise"}}},
        "report": {"report": "report.md"},
    },
    "export": {"sha256": "e7" * 32, "of": "all bytes"},
}
SETTINGS = {
    "optim": {"algorithm": "adamw", "lr": 0.002, "ema_decay": 0.998, "warmup": None},
    "data": {"module": {"batch_size": 16}},
    "trainer": {"precision": "bf16"},
    "recipe": {
        "_target_": "recipes.pretrain.Pretrain",
        "text_drop": 0.1,
        "tread": None,
        "file": "/home/me/secret/x.bin",
    },
}
VALUES = {
    "format": "magihuman-clip-values/1",
    "scores": {
        "vowels": {"value": 0.91234, "low": 0.88, "high": 0.94, "n": 40, "bound": 0.987},
        "psnr": {"value": None, "low": None, "high": None, "n": None, "bound": None},
        "calls": {"value": 12, "low": None, "high": None, "n": 40, "bound": None},
    },
    "labels": {"vowels": "vowels right ↑"},
    "prompts": [],
    "model": {},
    "bound": {},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose export has a config and no weights: a card needs none."""
    folder = tmp_path / "mine"
    for part in ("export", "eval"):
        (folder / part).mkdir(parents=True)
    write_json(folder / "export" / "config.json", CONFIG.to_dict())
    write_json(folder / "run.json", RECORD)
    write_json(folder / "eval" / "clip_values.json", VALUES)
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS, sort_keys=False))
    return folder


def test_the_card_of_a_small_run(run: Path) -> None:
    assert write_run_cards(run) == []
    text = (run / "export" / "README.md").read_text()
    assert text == GOLDEN.read_text()
    assert "None" not in text
    assert "null" not in text
    assert "secret" not in text
    assert "sig" not in text


def test_every_number_is_in_a_file(run: Path) -> None:
    write_run_cards(run)
    block = (run / "export" / "README.md").read_text().partition(BEGIN)[2]
    sources = [CONFIG.to_dict(), RECORD, SETTINGS, VALUES]
    known = {"95", "256", f"{CONFIG.model.parameter_count():,}"}  # of "95 %" and "sha256"; counted from the config

    def collect(node: object) -> None:
        if isinstance(node, dict | list | tuple):
            for each in node.values() if isinstance(node, dict) else node:
                collect(each)
        elif isinstance(node, int | float):
            known.update((str(node), f"{node:g}", f"{node:.4g}"))
        elif isinstance(node, str):
            known.update(re.findall(r"\d[\d,.]*\d|\d", node))

    collect(sources)
    text = re.sub(r"`[0-9a-f]{64}`|commit [0-9a-f]{12}", "", block)
    found = {number.rstrip(".") for number in re.findall(r"\d[\d,.]*\d|\d", text)}
    assert len(found) > 20
    assert found <= known, found - known


def test_front_matter_is_read_by_the_hub(run: Path) -> None:
    from huggingface_hub import ModelCard

    write_run_cards(run)
    data = ModelCard.load(run / "export" / "README.md").data.to_dict()
    assert data == {
        "license": "apache-2.0",
        "library_name": "magihuman",
        "pipeline_tag": "text-to-video",
        "tags": ["magihuman", "audio-video-generation", "pretrain"],
    }


@pytest.mark.parametrize(
    ("parents", "licence", "base"),
    [
        ([], "unknown", None),
        ([{"role": "init", "name": "runs/pretrain/a", "sha256": "a"}], "unknown", None),
        (
            [{"role": "init", "name": "GAIR/daVinci-MagiHuman/base", "sha256": "a"}],
            "apache-2.0",
            "GAIR/daVinci-MagiHuman",
        ),
        ([{"role": "init", "name": "weights/distill", "sha256": "a"}], "apache-2.0", "GAIR/daVinci-MagiHuman"),
    ],
)
def test_licence_and_base_model_are_said_where_known(run: Path, parents: list, licence: str, base: str | None) -> None:
    write_json(run / "run.json", {**RECORD, "parents": parents})
    matter = yaml.safe_load(front_matter(read_facts(run / "export")).strip("-\n"))
    assert (matter["license"], matter.get("base_model")) == (licence, base)


def test_text_of_people_is_kept_and_said(run: Path) -> None:
    file = run / "export" / "README.md"
    write_card(file.parent)
    assert write_card(file.parent) == []
    mine = file.read_text().replace("license: apache-2.0", "license: mit").replace("# mine", "# my edit")
    file.write_text(mine + "\n## Ethics\n\nBe kind.\n")
    assert "the text outside of it is kept" in write_card(file.parent)[0]
    text = file.read_text()
    assert "license: mit" in text
    assert text.endswith(f"{END}\n\n## Ethics\n\nBe kind.\n")
    assert "# my edit" not in text  # in the block

    file.write_text("# Only mine\n")
    write_card(file.parent)
    text = file.read_text()
    assert text.startswith("---\n")
    assert text.index("# Only mine") < text.index(BEGIN) < text.index("# mine")
    assert write_card(file.parent)
    assert file.read_text() == text

    broken = text.replace(END, "")
    file.write_text(broken)
    with pytest.raises(UserError, match="do not enclose one block"):
        write_card(file.parent)
    assert "do not enclose" in write_run_cards(run)[0]  # a note in a training
    assert file.read_text() == broken


def test_scores_of_a_clip_evaluation(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = {"value": 4.71, "low": 4.5, "high": 4.9, "n": 20, "total": 21, "status": "ok", "reason": ""}
    skipped = {"value": None, "low": None, "high": None, "n": 0, "total": 21, "status": "skipped", "reason": "no audio"}
    columns = {
        "clips": {"quality": measure, "loudness": skipped},
        "reference": {"quality": {**measure, "value": 4.9}},
        "bound": {"quality": {**measure, "value": 4.8}},
    }
    other = run / "versebench"
    other.mkdir()
    summary = {
        "format": "magihuman-clip-scores/1",
        "columns": columns,
        "labels": {"quality": "visual quality ↑"},
        "published": {"LTX 2.3": {"quality": 4.76}},
    }
    write_json(other / "summary.json", summary)
    said = card(str(run), scores=str(other))
    unknown = "the file does not say which weights made the clips"
    assert said == f"written: {run}/export/README.md\nnote: scores={other}: {unknown}; the card says so, too"
    text = (run / "export" / "README.md").read_text()
    row = "| visual quality ↑ | 4.71 | 4.5 to 4.9 | 4.9 | 4.8 | 4.76 | 20 |"
    assert "| metric | value | 95 % interval | reference | bound | LTX 2.3 (published) | n |" in text
    assert row in text
    assert "Without a value: loudness (no audio)." in text
    assert f"From `versebench/summary.json`: {unknown}." in text
    monkeypatch.chdir(other)
    card(str(run), scores="summary.json")
    assert (run / "export" / "README.md").read_text() == text
    write_json(run / "run.json", {**RECORD, "results": {"suite": summary}})  # of eval.run as after_fit
    card(str(run))
    text = (run / "export" / "README.md").read_text()
    assert row in text
    assert "### suite" in text
    write_json(other / "summary.json", {"format": "other/1"})
    for wrong, message in (
        (other, "is of the format 'other/1'"),
        (run, "holds neither"),
        (run / "x", "x does not exist; give a summary.json or a clip_values.json, or a folder"),
    ):
        with pytest.raises(UserError, match=message):
            card(str(run), scores=str(wrong))


def suite_scores(folder: Path, **weights: str) -> Path:
    """summary.json of eval.run: option of generating=sha256 of what it was given."""
    folder.mkdir(exist_ok=True)
    measure = {"value": 4.71, "low": 4.5, "high": 4.9, "n": 6, "total": 6, "status": "ok", "reason": ""}
    suite = {
        **{"suite": "puppets", "items": 200, "limit": 3, "used": 3},
        "generating": {option: f"some/{option}" for option in weights},
        "weights": {option: {"sha256": sha256, "of": "all bytes"} for option, sha256 in weights.items()},
    }
    values = {"format": "magihuman-clip-scores/1", "clips": 6, "columns": {"clips": {"quality": measure}}, "labels": {}}
    write_json(folder / "summary.json", {**values, "suite": suite})
    return folder


def test_scores_of_another_checkpoint_are_refused(run: Path) -> None:
    """By the hash that eval.run records; the card shows it, the suite and how much of it was used."""
    own = fingerprint(run / "export")["sha256"]
    before = write_card(run / "export")
    scores = suite_scores(run / "suite", checkpoint="0c" * 32)
    message = (
        rf"suite are of checkpoint=some/checkpoint \(sha256 0c0c0c0c0c0c\), not of .*export \({own[:12]}\); give those"
    )
    with pytest.raises(UserError, match=message):
        card(str(run), scores=str(scores))
    scores = suite_scores(scores, checkpoint=own, lora="0d" * 32)  # of the checkpoint with a LoRA
    with pytest.raises(UserError, match="are of lora=some/lora"):
        card(str(run), scores=str(scores))
    assert "quality" not in (run / "export" / "README.md").read_text()
    assert before == []
    suite_scores(scores, checkpoint=own)
    assert "note" not in card(str(run), scores=str(scores))
    said = f"6 clips; 3 of the 200 prompts of suite `puppets`; checkpoint `some/checkpoint`, sha256 `{own[:12]}`."
    assert f"\nFrom `suite/summary.json`: {said}\n" in (run / "export" / "README.md").read_text()


def test_scores_of_a_conversion_are_its_own_or_its_sources(tmp_path: Path) -> None:
    target = tmp_path / "copy"
    zoo_convert("tiny/base", target)
    for sha256 in (fingerprint(target)["sha256"], fingerprint(zoo.find("tiny/base"))["sha256"]):
        assert "note" not in card(str(target), scores=str(suite_scores(tmp_path / "suite", checkpoint=sha256)))
    scores = suite_scores(tmp_path / "suite", checkpoint=fingerprint(zoo.find("tiny/distill"))["sha256"])
    with pytest.raises(UserError, match="are of checkpoint=some/checkpoint"):
        card(str(target), scores=str(scores))
    # A LoRA was merged: the source alone is another network.
    record = json.loads((target / "training.json").read_text())
    source = record["converted"]["sha256"]
    record["converted"]["lora"] = {"name": "my/lora", "sha256": "0d" * 32, "of": "all bytes"}
    write_json(target / "training.json", record)
    with pytest.raises(UserError, match="are of checkpoint=some/checkpoint"):
        card(str(target), scores=str(suite_scores(tmp_path / "suite", checkpoint=source)))
    card(str(target), scores=str(suite_scores(tmp_path / "suite", checkpoint=source, lora="0d" * 32)))
    assert f"with the LoRA `my/lora`, sha256 `{'0d' * 32}` merged into it." in (target / "README.md").read_text()


def test_scores_that_go_are_said(run: Path) -> None:
    own = fingerprint(run / "export")["sha256"]
    card(str(run), scores=str(suite_scores(run / "suite", checkpoint=own)))
    assert "note: " + str(run / "export" / "README.md") + ": the scores from suite/summary.json are no longer" in card(
        str(run)
    )
    assert "note" not in card(str(run))


def test_the_bound_is_explained_where_it_is_a_column(run: Path) -> None:
    write_card(run / "export")
    assert "*bound*" in (run / "export" / "README.md").read_text()
    scores = {key: {**measure, "bound": None} for key, measure in VALUES["scores"].items()}
    write_json(run / "eval" / "clip_values.json", {**VALUES, "scores": scores})
    write_card(run / "export")
    assert "bound" not in (run / "export" / "README.md").read_text()


def test_texts_of_others_break_no_table_and_name_no_folder(run: Path) -> None:
    """Settings, reasons and the command are texts that people and programs wrote."""
    record = {
        **RECORD,
        "provenance": {**RECORD["provenance"], "command": ["python", "data=[/home/me/a,~/b]", "x=two words"]},
    }
    record["parents"] = [{"role": "shards", "name": "a|b `c`", "sha256": "5a", "of": "all bytes"}]
    write_json(run / "run.json", record)
    text = "a | b\nwith `ticks`, from '/home/me/secret/list.txt'"
    (run / "config.yaml").write_text(yaml.safe_dump({"recipe": {"prompts": text, "files": ["/home/me/secret/x"]}}))
    reason = {"value": None, "reason": "/home/me/secret/weights.onnx is missing"}
    write_json(run / "eval" / "clip_values.json", {**VALUES, "scores": {**VALUES["scores"], "lse_d": reason}})
    write_card(run / "export")
    card = (run / "export" / "README.md").read_text()
    assert "| `recipe.prompts` | `` a \\| b with `ticks`, from 'list.txt' `` |\n" in card
    assert '| `recipe.files` | `["x"]` |\n' in card
    assert "| shards | `` a\\|b `c` ``, sha256 `5a` |\n" in card
    assert "Without a value: lse_d (weights.onnx is missing)." in card
    assert "\npython 'data=[a,b]' 'x=two words'\n" in card
    assert "/home" not in card


def test_a_readme_that_is_no_text_is_an_error_of_one_line(run: Path) -> None:
    (run / "export" / "README.md").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="is no UTF-8 text"):
        write_card(run / "export")


def test_measured_times_of_the_same_network_and_steps_only() -> None:
    facts = read_facts(zoo.find("tiny/distill"))
    rows = latency_rows(facts)
    file = sorted(LATENCY.glob("*measure-tiny*.json"))[-1]
    newest = json.loads(file.read_text())
    assert [row[1] for row in rows] == [row["tier"] for row in newest["rows"]]
    assert [row[4] for row in rows] == [f"{row['stages']['base']['median']:.4g}" for row in newest["rows"]]
    assert {row[3] for row in rows} == {"8"}
    assert latency_rows(read_facts(zoo.find("tiny/base"))) == []  # 32 steps with guidance
    shorter = replace(facts.config, model=replace(facts.config.model, hidden_size=112))
    assert latency_rows(replace(facts, config=shorter)) == []


def test_a_card_changes_neither_hash_nor_checksums(tmp_path: Path) -> None:
    target = tmp_path / "copy"
    zoo_convert("tiny/base", target)
    text = (target / "README.md").read_text()
    assert f"Converted from `tiny/base`, sha256 `{fingerprint(zoo.find('tiny/base'))['sha256']}`." in text
    assert "# copy\n" in text
    assert "## Scores" not in text  # those of the source are of other weights
    before = fingerprint(target)
    (target / "README.md").write_text(text + "\nmore\n")
    assert fingerprint(target) == before
    assert zoo.load(target).config == zoo.config_of("tiny/base")
    write_card(target)
    assert (target / "README.md").read_text() == text + "\nmore\n"


def zoo_convert(src: str, target: Path) -> None:
    from magihuman.zoo.commands import convert

    convert(src, str(target))


def test_a_training_writes_cards_and_keeps_edits(shards: Path, parent: Path, tmp_path: Path) -> None:
    """Of the export and of the LoRA, with what the evaluation returned; a further export keeps the text of people."""
    overrides = ["+recipe=lora", f"init={parent}", "after_fit={eval: {_target_: training_stub.evaluate_at_once}}"]
    run = training_stub.train_here(tmp_path / "run", shards, overrides)
    for folder, role in (("export", "A transformer"), ("adapter", "A LoRA of")):
        text = (run / folder / "README.md").read_text()
        assert role in text
        assert "| `steps_right` | 0.75 | 0.5 to 1 | 0.9 | 4 |" in text
        assert "| steps | 3 |" in text
    file = run / "export" / "README.md"
    file.write_text(file.read_text() + "\nmine\n")
    training_stub.train_here(run, shards, [*overrides, "trainer.max_steps=4"])
    assert "| steps | 4 |" in file.read_text()
    assert file.read_text().endswith("\nmine\n")
