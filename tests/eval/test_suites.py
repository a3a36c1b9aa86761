"""Suites from small local copies in their published layouts: items, prompts, what is missing, and what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.tiny.puppets import draw_puppet
from eval.clip_file import ClipFile
from eval.clips import HELD_OUT_SEED, held_out
from eval.generate import require_tiny
from eval.suites.suite_catalog import read_suite
from eval.suites.suite_items import SuiteOptions, language_of, prompt_of
from inference.prompting.format import check_form, spoken_text
from magihuman.errors import UserError
from magihuman.io.files import WEIGHTS
from magihuman.media.mp4 import write_mp4
from magihuman.media.reading import probe


def text(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def clip(path: Path, level: int = 90) -> Path:
    """Two frames of a grey level, the first darker."""
    frames = np.full((2, 16, 16, 3), level, np.uint8)
    frames[0] //= 2
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, frames, 25)
    return path


# ---- Prompts ----

SPEECH = {
    "en": "It's late, isn't it? He said \"go\" twice.",
    "zh": "今天天气很好，我们走吧。",
    "ja": "きょうはいい天気ですね。",
    "ko": "오늘은 날씨가 좋네요.",
    "fr": "L'été, c'est “fini”.",
    "de": "Guten Tag, „wie“ geht es Ihnen?",
}


@pytest.mark.parametrize(("language", "words"), SPEECH.items())
def test_a_prompt_of_blocks_has_the_form_of_the_release_and_says_the_words(language: str, words: str) -> None:
    prompt = prompt_of('A man in a suit sits\non a "yellow" couch.', words, "Man", language, "rain, traffic")
    assert check_form(prompt).faults == ()

    def letters(said: str) -> str:
        return "".join(c for c in said.casefold() if c.isalnum())

    assert letters(spoken_text(prompt)) == letters(words)
    assert re.search(r"Background Sound:\n<rain, traffic>$", prompt)
    assert ", Chinese>:" in prompt or language != "zh"


def test_a_prompt_without_speech_or_sound_says_so() -> None:
    silent = prompt_of('A dog under the sign "Open".', "", sound="")
    assert check_form(silent).faults == ()
    assert "Dialogue" not in silent
    assert silent.endswith("<No prominent background sound>")
    assert "Background" not in prompt_of("A dog.", None, sound=None)
    assert prompt_of("A\ndog.", "hello", template="description") == "A dog."


def test_speech_that_the_description_quotes_is_not_quoted_again() -> None:
    prompt = prompt_of('She says "Good morning." and smiles.', "Good morning.", "Woman")
    assert prompt.count("Good morning.") == 2  # there and in the block


@pytest.mark.parametrize(
    ("words", "code"),
    [("hello", "it"), ("", "it"), ("你好", "zh"), ("東京は", "ja"), ("안녕", "ko"), ("OK，好", "zh"), ("привет", "it")],
)
def test_the_script_tells_the_language(words: str, code: str) -> None:
    assert language_of(words, "it") == code


# ---- Verse-Bench ----


def record(words: str = "", sounds: Any = ("",), speaker: str = "Man", video: str = "A man sits.") -> dict[str, Any]:
    return {
        "video_prompt": video,
        "audio_prompt": list(sounds) if isinstance(sounds, tuple) else sounds,
        "speech_prompt": {"speaker": speaker, "text": words},
    }


@pytest.fixture
def versebench(tmp_path: Path) -> Path:
    """Two items in set1, one each in set2 and set3, as the public code reads them."""
    folder = tmp_path / "verse_bench"
    text(folder / "set1" / "303.json", record("They speak English.", ("",)))
    text(folder / "set1" / "321.json", record("", ("Guitar music, singing", "birds")))
    text(folder / "set2" / "00023.json", record("我们走吧", ("None",), "Young woman"))
    text(folder / "set3" / "00041.json", record("Good evening.", ("There is no ambient sound",)))
    for name in ("set1/303", "set1/321", "set2/00023"):
        Image.new("RGB", (32, 24), "red").save(folder / f"{name}.jpg")
    (folder / "set2" / "00023.wav").write_bytes(b"RIFF")
    (folder / "README.md").write_text("Verse-Bench")
    return folder


def options(suite: str, path: Path | None = None, **more: Any) -> SuiteOptions:
    return SuiteOptions(suite=suite, suite_path=None if path is None else str(path), **more)


def test_verse_bench(versebench: Path) -> None:
    suite = read_suite(options("versebench", versebench))
    assert [(item.name, item.part) for item in suite.items] == [
        ("303", "set1"), ("321", "set1"), ("00023", "set2"), ("00041", "set3")
    ]  # fmt: skip
    first, guitar, chinese, talk = suite.items
    assert (first.dialogue, first.language, first.image) == ("They speak English.", "en", versebench / "set1/303.jpg")
    assert '<Man, English>: "They speak English."' in first.prompt
    assert first.prompt.endswith("<No prominent background sound>")
    assert (guitar.dialogue, guitar.language) == ("", None)
    assert guitar.prompt.endswith("<Guitar music, singing, birds>")
    assert (chinese.dialogue, chinese.language, chinese.reference) == ("我们走吧", "zh", versebench / "set2/00023.wav")
    assert '<Young woman, Chinese>: "我 们 走 吧"' in chinese.prompt
    assert (talk.image, talk.reference) == (None, None)
    assert talk.prompt.endswith("<No prominent background sound>")
    assert suite.facts["parts"] == ["set1", "set2", "set3"]
    assert any("4 image-text pairs; 600 are published" in note for note in suite.notes)
    assert any("1 of 4 items" in note for note in suite.notes)


def test_parts_and_pictures_of_verse_bench_can_be_left_out(versebench: Path) -> None:
    suite = read_suite(options("versebench", versebench, parts="set3, set1", first_frame=False, template="description"))
    assert [item.name for item in suite.items] == ["303", "321", "00041"]
    assert {item.image for item in suite.items} == {None}
    assert {item.prompt for item in suite.items} == {"A man sits."}
    assert suite.notes == ()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ([], "list indices"), ({}, "no 'video_prompt'"), ("x", "string indices"),
        (record(video=" "), "video_prompt is no text"),
        (record(sounds=3), "audio_prompt is no list"), (record(words=3), "speech_prompt.text is no text"),
        ({**record(), "speech_prompt": None}, "NoneType"),
    ],
)  # fmt: skip
def test_a_damaged_record_of_verse_bench_is_named(versebench: Path, content: Any, what: str) -> None:
    text(versebench / "set2" / "00023.json", content)
    with pytest.raises(UserError, match=r"00023\.json is no record of Verse-Bench") as caught:
        read_suite(options("versebench", versebench))
    assert what in str(caught.value)


def test_names_of_verse_bench_are_unique_over_its_sets(versebench: Path) -> None:
    text(versebench / "set3" / "303.json", record())
    with pytest.raises(UserError, match=r"303\.json in set1 and in set3"):
        read_suite(options("versebench", versebench))


# ---- TalkVid-Bench ----


def talk(name: str, **info: str) -> dict[str, Any]:
    """A record in the form of the dataset's README."""
    about = {"Person ID": "597", "Ethnicity": "White", "Age Group": "60+", "Gender": "Male", "Language": "English"}
    return {
        "id": name, "height": 1080, "width": 1920, "fps": 24.0, "start-time": 0.1, "end-time": 5.14, "durations": "5.042s",
        "info": {**about, **info}, "description": "An older man in a suit is interviewed.", "dover_scores": 8.9,
    }  # fmt: skip


@pytest.fixture
def talkvid(tmp_path: Path) -> Path:
    folder = tmp_path / "talkvid_bench"
    clip(folder / "age" / "60+" / "video-a-scene1.mp4", 200)
    clip(folder / "language" / "Chinese" / "video-b-scene2.mp4")
    clip(folder / "video-c.mp4")
    clip(folder / "without-a-record.mp4")
    for added in ("._video-c.mp4", "._bench.json"):  # by macOS
        (folder / added).write_bytes(b"\0\5\x16\7")
    records = [
        talk("video-a-scene1"), talk("video-b-scene2", Language="Chinese", Gender="Female"),
        talk("video-c", Language="Other languages"), talk("not-here"),
    ]  # fmt: skip
    text(folder / "bench.json", records)
    return folder


def test_talkvid_bench_without_transcripts_has_no_dialogue(talkvid: Path) -> None:
    suite = read_suite(options("talkvid", talkvid))
    assert [(item.name, item.part, item.language) for item in suite.items] == [
        ("video-a-scene1", "age/60+", "en"), ("video-b-scene2", "language/Chinese", "zh"), ("video-c", "", None),
    ]  # fmt: skip
    assert {item.dialogue for item in suite.items} == {None}
    assert {item.prompt for item in suite.items} == {"An older man in a suit is interviewed."}
    assert [item.reference for item in suite.items][2] == talkvid / "video-c.mp4"
    notes = " ".join(suite.notes)
    assert "1 of 4 clips" in notes
    assert "3 clips with records; 500 are published" in notes
    assert "no WER; give transcripts=FILE" in notes


def test_talkvid_bench_with_transcripts(talkvid: Path, tmp_path: Path) -> None:
    table = tmp_path / "said.csv"
    table.write_text("name,text\nvideo-a-scene1,I was there.\nvideo-b-scene2.mp4,你好\n", encoding="utf-8")
    suite = read_suite(options("talkvid", talkvid, transcripts=str(table), parts="age"))
    assert [item.name for item in suite.items] == ["video-a-scene1", "video-c"]  # the second is of no known part
    assert suite.items[0].dialogue == "I was there."
    assert '<Man, English>: "I was there."' in suite.items[0].prompt
    assert any("1 of 2 clips have no text" in note for note in suite.notes)
    (chinese,) = (
        item
        for item in read_suite(options("talkvid", talkvid, transcripts=str(table))).items
        if item.dialogue == "你好"
    )
    assert '<Woman, Chinese>: "你 好"' in chinese.prompt


def test_the_first_frame_of_a_talkvid_clip_becomes_a_picture(talkvid: Path, tmp_path: Path) -> None:
    suite = read_suite(options("talkvid", talkvid))
    item = suite.prepare(suite.items[0], tmp_path / "made")
    assert item.image == tmp_path / "made" / "video-a-scene1.png"
    level = np.asarray(Image.open(item.image)).mean()
    assert level == pytest.approx(100, abs=6)  # the first frame's, not the second's 200
    before = item.image.stat().st_mtime_ns
    suite.prepare(suite.items[0], tmp_path / "made")
    assert item.image.stat().st_mtime_ns == before


def test_what_is_no_talkvid_bench(talkvid: Path, tmp_path: Path) -> None:
    clip(talkvid / "other" / "video-c.mp4")
    with pytest.raises(UserError, match=r"two clips called video-c\.mp4"):
        read_suite(options("talkvid", talkvid))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"0 \.mp4 and 0 records.*--revision bench"):
        read_suite(options("talkvid", empty))


# ---- Puppets ----


def test_puppets_are_the_held_out_ones_with_their_true_clips(tmp_path: Path) -> None:
    suite = read_suite(options("puppets"))
    puppet = draw_puppet(HELD_OUT_SEED, 7, "scene", novel=True)
    assert (len(suite.items), suite.items[7].prompt, suite.items[7].dialogue) == (
        200,
        puppet.caption,
        " ".join(puppet.words),
    )
    item = suite.prepare(suite.items[7], tmp_path)
    assert item.reference is not None
    assert probe(item.reference).audio_rate == 16000
    from data.tiny.puppets import render

    assert np.abs(ClipFile(item.reference).frames.astype(int) - render(puppet)).mean() < 2


def test_puppets_are_of_the_checkpoints_world(tmp_path: Path) -> None:
    trained = tmp_path / "model"
    trained.mkdir()
    config = json.loads((WEIGHTS / "tiny" / "base" / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps({**config, "world": "scene"}))
    suite = read_suite(options("puppets", checkpoint=str(trained)))
    assert [item.prompt for item in suite.items] == [puppet.caption for puppet in held_out(200, "scene")]
    assert suite.facts["world"] == "scene"
    reference = suite.prepare(suite.items[0], tmp_path).reference
    assert reference is not None
    assert len(ClipFile(reference).frames) == 37
    with pytest.raises(
        UserError, match=r"tiny/base is of tiny, .* is of scene; give teacher= or base= of the same world"
    ):
        require_tiny("eval.dmd2", "tiny/base", str(trained))
    (trained / "config.json").write_text(json.dumps({**config, "world": "released"}))
    with pytest.raises(UserError, match=r"suite=puppets measures puppets \(tiny, scene\), and .* is of 'released'"):
        read_suite(options("puppets", checkpoint=str(trained)))


# ---- Files ----


def test_a_file_of_prompts(tmp_path: Path) -> None:
    clip(tmp_path / "real.mp4")
    rows = [
        {
            "prompt": "A dog.",
            "name": "dog",
            "reference": "real.mp4",
            "seed": 5,
            "seconds": 2,
            "group": "animals",
            "part": "pets/large",
        },
        {"caption": "A cat.", "dialogue": "", "language": "fr"},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dog, cat = read_suite(options(str(file))).items
    assert (dog.name, dog.reference, dog.seed, dog.seconds, dog.group) == (
        "dog",
        tmp_path / "real.mp4",
        5,
        2.0,
        "animals",
    )
    assert dog.dialogue is None
    assert (dog.part, cat.part) == ("pets/large", "")
    assert (cat.name, cat.dialogue, cat.language) == ("0001-a-cat", "", "fr")
    lines = tmp_path / "mine.txt"
    lines.write_text("A dog.\n\nA cat.\n")
    assert [item.prompt for item in read_suite(options(str(lines))).items] == ["A dog.", "A cat."]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "a", "image": "no.png"}, r"image .*no\.png does not exist"), ({"name": "a"}, "the prompt is missing"),
        ({"prompt": "a", "colour": "red"}, "unknown field 'colour'"), ({"prompt": "a", "seed": -1}, "seed must be"),
        ({"prompt": "a", "name": "b/c"}, r"mine\.json entry 1: 'b/c' cannot be a file name"),
        ({"prompt": "a " * 3000}, r"mine\.json entry 1: the prompt has 3000 words"),
        ({"prompt": ["a", "b"]}, "has a list of 2"), ({"prompt": "a", "language": "Klingon"}, r"entry 1: language 'Klingon'"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(tmp_path: Path, row: dict[str, Any], what: str) -> None:
    file = text(tmp_path / "mine.json", [row])
    with pytest.raises(UserError, match=what):
        read_suite(options(str(file)))


# ---- Refusals ----


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"suite": "versebench"}, r"needs suite_path=.*hf download dorni/Verse-Bench --repo-type dataset"),
        ({"suite": "talkvid", "suite_path": "/nowhere"}, r"suite_path=/nowhere is no folder.*--revision bench"),
        ({"suite": "verse"}, "suite=verse is unknown; choose versebench, talkvid or puppets"),
        ({"suite": "puppets", "template": "poem"}, "template=poem is unknown"),
        ({"suite": "puppets", "parts": "set1"}, "parts=set1 is not for suite=puppets"),
        ({"suite": "nowhere.csv"}, "cannot be read"),
        ({"suite": "puppets", "speech_language": "Klingon"}, "language 'Klingon' is not known"),
    ],
)
def test_refusals_are_one_line_with_a_remedy(given: dict[str, Any], what: str) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read_suite(SuiteOptions(**given))
    assert "\n" not in str(caught.value)


def test_an_unknown_part_and_a_missing_set(versebench: Path) -> None:
    with pytest.raises(UserError, match="parts=set4 is unknown; suite=versebench has set1, set2, set3"):
        read_suite(options("versebench", versebench, parts="set1,set4"))
    (versebench / "set3" / "00041.json").unlink()
    with pytest.raises(UserError, match=r"has no set3/\*\.json; fetch"):
        read_suite(options("versebench", versebench))
