"""Lists of clips: folders with prompts beside the clips, manifests, references by name, and what is wrong with them."""

import json

import pytest
from toy_metrics import write_clip

from eval.clip_list import read_clips, spoken
from magihuman.errors import UserError

PROMPT = """A man at a desk says, "Good morning."

Dialogue:
<Man, with a hat, English>: "Good morning."

Background Sound:
<Rain>"""


def test_folder_with_prompts_from_records_and_texts(tmp_path):
    for name in ("b/two", "one", "three"):
        write_clip(tmp_path / f"{name}.mp4", frames=3)
    (tmp_path / "one.json").write_text(json.dumps({"format": "magihuman-clip/1", "prompt": PROMPT, "seed": 1}))
    (tmp_path / "b/two.txt").write_text("no dialogue at all\n")
    (tmp_path / "notes.txt").write_text("not a clip")
    two, one, three = read_clips(tmp_path)
    assert [c.name for c in (two, one, three)] == ["b/two", "one", "three"]
    assert (one.prompt, one.dialogue, one.language) == (PROMPT, "Good morning.", "en")
    assert (two.prompt, two.dialogue, two.language, two.group) == (
        "no dialogue at all",
        None,
        None,
        "no dialogue at all",
    )
    assert (three.prompt, three.group) == ("", "three")


def test_manifest_with_everything(tmp_path):
    clip, real = write_clip(tmp_path / "x/a.mp4", frames=3), write_clip(tmp_path / "real.mp4", frames=3)
    rows = [
        {"clip": "x/a.mp4", "prompt": PROMPT, "dialogue": "other words", "language": "German", "reference": "real.mp4"},
        {"clip": "x/a.mp4", "name": "again", "dialogue": "", "group": "g", "voice": "real.mp4"},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, again = read_clips(tmp_path / "m.jsonl")
    assert (first.path, first.name, first.dialogue, first.language) == (clip, "a", "other words", "de")
    assert first.reference is not None
    assert first.reference.path == real
    assert (again.name, again.dialogue, again.group, again.voice) == ("again", "", "g", real)


def test_empty_cells_of_a_csv_say_nothing(tmp_path):
    write_clip(tmp_path / "a.mp4", frames=3)
    (tmp_path / "m.csv").write_text("clip,dialogue,language\na.mp4,,\n")
    (clip,) = read_clips(tmp_path / "m.csv")
    assert (clip.dialogue, clip.language) == (None, None)


def test_references_are_found_by_name(tmp_path):
    for folder in ("made", "real"):
        for name in ("a", "b", "c")[: 3 if folder == "made" else 2]:
            write_clip(tmp_path / folder / f"{name}.mp4", frames=3)
    clips = read_clips(tmp_path / "made", tmp_path / "real")
    assert [c.reference and c.reference.path.name for c in clips] == ["a.mp4", "b.mp4", None]


def test_files_that_macos_adds_are_no_clips(tmp_path):
    write_clip(tmp_path / "a.mp4", frames=3)
    for name in ("._a.mp4", ".Trashes/b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert [clip.name for clip in read_clips(tmp_path)] == ["a"]


def test_of_a_folder_of_eval_run_the_generated_clips_are_taken(tmp_path, capsys):
    """References and the codec bound lie in the same folder."""
    for name in ("clips/a", "clips/left-out", "references/a", "bound/a"):
        write_clip(tmp_path / f"{name}.mp4", frames=3)
    (tmp_path / "suite.json").write_text("{}")
    with pytest.raises(UserError, match=r"folder of eval\.run without manifest\.jsonl: its clips are not finished"):
        read_clips(tmp_path)
    row = {"clip": "clips/a.mp4", "name": "a", "prompt": "x", "reference": "references/a.mp4", "part": "set1"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    (clip,) = read_clips(tmp_path)
    assert (clip.name, clip.prompt, clip.path.parent.name) == ("a", "x", "clips")
    assert clip.reference.path == tmp_path / "references/a.mp4"
    said = f"note: clips={tmp_path} is a folder of eval.run: its manifest.jsonl is read (clips: 1)\n"
    assert capsys.readouterr().err == said


def test_columns_of_a_manifest_are_used_named_or_refused(tmp_path, capsys):
    write_clip(tmp_path / "a.mp4", frames=3)
    file = tmp_path / "m.csv"
    for given, meant in (
        ("dialog", "dialogue"),
        ("lang", "language"),
        ("promt", "prompt"),
        ("references", "reference"),
    ):
        file.write_text(f"clip,{given}\na.mp4,x\n")
        with pytest.raises(UserError, match=f"unknown column '{given}'; did you mean {meant}\\?"):
            read_clips(file)
    file.write_text("clip,prompt,prompt_id,video,seed\na.mp4,x,7,v,3\n")
    assert [clip.prompt for clip in read_clips(file)] == ["x"]
    assert capsys.readouterr().err == f"note: clips={file}: columns that are not used: prompt_id, video, seed\n"


def test_what_a_prompt_lets_people_say():
    assert spoken("A quiet room.\n\nBackground Sound:\n<Rain>") == ("", None)
    assert spoken('A man says "hello".') == (None, None)
    mixed = 'x\nDialogue:\n<A, English>: "Hi."\n<B, Japanese>: "やあ。"'
    assert spoken(mixed) == ("Hi.\nやあ。", None)
    assert spoken('x\nDialogue:\n<Woman, Mandarin>: "你 好"') == ("你 好", "zh")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("clip\nnone.mp4\n", "clip '.*none.mp4' does not exist"),
        ("prompt\nx\n", "has no column clip"),
        ("clip,language\na.mp4,Klingon\n", "line 2: .*Klingon"),
        ("clip,voice\na.mp4,v.wav\n", "voice '.*v.wav' does not exist"),
        ("clip\n", "has no rows"),
        ("clip,prompt\na.mp4,one\na.mp4,two\n", "two clips called 'a'"),
    ],
)
def test_a_wrong_manifest_is_one_line(tmp_path, content, message):
    write_clip(tmp_path / "a.mp4", frames=3)
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_clips(tmp_path / "m.csv")
    assert "\n" not in str(error.value)


def test_wrong_folders_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    write_clip(tmp_path / "made/a.mp4", frames=3)
    write_clip(tmp_path / "real/b.mp4", frames=3)
    for source, reference, message in (
        ("empty", None, "has no media files"),
        ("none", None, "does not exist"),
        ("made", "real", "no clip of the same name"),
    ):
        with pytest.raises(UserError, match=message):
            read_clips(tmp_path / source, tmp_path / reference if reference else None)
