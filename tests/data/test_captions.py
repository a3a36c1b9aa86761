"""Captions from text files and tables, and which of two equal files is taken."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from data.captions import Captions, FileNames, NoCaption, Rejected, read_tables
from data.clip_plan import ClipFormats, make_plan
from data.options import PrepareOptions
from data.scan import MediaFile, list_files
from inference.requests import read_requests
from magihuman.media.reading import MediaInfo

FORM = 'A woman stands.\n\nDialogue:\n<Woman, English>: "می\u200cخواهد"\n\nBackground Sound:\n<Quiet room>'
NFC, NFD = "é.mp4", unicodedata.normalize("NFD", "é.mp4")


def captions(folder: Path, **files: str) -> Captions:
    """Captions of a folder with these files, whose names have _ for the dot."""
    for name, content in files.items():
        stem, _, ending = name.rpartition("_")
        (folder / f"{stem}.{ending}").write_bytes(content.encode())
    listing = list_files(folder, folder / "out")
    return read_tables(listing.tables, folder, listing.names, listing.texts)


@pytest.mark.parametrize("name", ["a.txt", "a.mp4.txt", "a.TXT", "A.txt"])
def test_a_text_file_keeps_its_characters_as_infer_does(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(f"{FORM}\n".replace("\n", "\r\n").encode())
    found = captions(tmp_path, a_mp4="").of(str(tmp_path / "a.mp4"))
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": FORM}))
    assert found == FORM == read_requests(tmp_path / "p.jsonl", 0)[0].prompt


def test_the_nearest_text_file_is_used_and_the_others_are_named(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.txt", "a.mp4.txt", "A.TXT", "b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "a.json").write_text('{"prompt": "x"}')
    listing = list_files(tmp_path, tmp_path / "out")
    assert listing.texts == {str(tmp_path / "a.mp4"): tmp_path / "a.txt"}
    assert listing.tables == []
    assert {found.relative: found.problem for found in listing.ignored} == {
        "a.mp4.txt": "another caption for a.mp4; a.txt is used",
        "A.TXT": "another caption for a.mp4; a.txt is used",
        "b.txt": "caption without a media file of its name",
        "a.json": "describes one file; its caption is taken from a .txt or a table",
    }


@pytest.mark.parametrize(
    ("on_disk", "written"),
    [
        ("sub/a.mp4", "sub/a.mp4"),
        ("sub/a.mp4", "./sub/../sub/a.mp4"),
        ("sub/a.mp4", "sub\\a.mp4"),
        ("sub/a.MP4", "sub/A.mp4"),
        ("sub/a.mp4", "sub/a"),
        (NFC, NFD),
        (NFD, NFC),
    ],
)
def test_names_are_found_as_other_systems_write_them(on_disk: str, written: str) -> None:
    assert FileNames([f"/x/{on_disk}", "/x/other.mp4"]).find(f"/x/{written}") == [f"/x/{on_disk}"]


def test_a_name_never_means_another_file_that_is_similar() -> None:
    names = FileNames([f"/x/{NFC}", f"/x/{NFD}", "/x/A.mp4", "/x/a.mp4", "/x/b.mp4", "/x/b.mov"])
    for name in (NFC, NFD, "A.mp4", "a.mp4"):
        assert names.find(f"/x/{name}") == [f"/x/{name}"]
    assert names.find("/x/a.MP4") == []  # two files could be meant
    assert names.find("/x/b") == ["/x/b.mp4", "/x/b.mov"]
    posters = FileNames(["/x/dog.mkv", "/x/dog.mkv.png", "/x/cat", "/x/cat.mp4"])
    assert posters.find("/x/dog.mkv") == posters.find("/x/DOG.mkv") == ["/x/dog.mkv"]
    assert posters.find("/x/dog.mkv.png") == ["/x/dog.mkv.png"]
    assert posters.find("/x/cat") == ["/x/cat", "/x/cat.mp4"]


def test_every_row_that_is_not_used_is_named(tmp_path: Path) -> None:
    lines = [
        "file,caption", "a.mp4,one", "a.mp4,two", "a.mp4,one", "b.mp4,", "gone.mp4,x", ",x", "c.mp4,red, moving",
        'd.mp4,"x', 'e.mp4,y"', "f.mp4,x", "g.mp4,x",
    ]  # fmt: skip
    media = dict.fromkeys(("a_mp4", "b_mp4", "c_mp4", "d_mp4", "e_mp4", "f_mp4", "g_mp4"), "")
    found = captions(tmp_path, t_csv="\n".join(lines), f_txt="x", g_txt="y", **media)

    def reason(name: str) -> str:
        with pytest.raises(Rejected) as caught:
            found.of(str(tmp_path / name))
        return str(caught.value)

    assert found.of(str(tmp_path / "a.mp4")) == "one"
    assert found.of(str(tmp_path / "f.mp4")) == "x"
    assert found.of(str(tmp_path / "g.mp4")) == "y"
    assert reason("b.mp4") == "has no caption: t.csv line 5 has an empty one"
    assert reason("c.mp4").startswith("caption in t.csv line 8 has more cells than the header")
    assert reason("d.mp4") == "caption in t.csv line 9 holds the row of e.mp4: a quote is not closed"
    assert reason("e.mp4").startswith("has no caption: no e.txt next to it and no row in t.csv (7 problems)")
    assert [(path, row.line) for path, row in found.missing] == [(str(tmp_path / "gone.mp4"), "line 6")]
    assert [problem.split(" (")[0] for problem in found.problems["t.csv"]] == [
        "line 3 names a.mp4 again; t.csv line 2 is used",
        "line 4 names a.mp4 again; t.csv line 2 is used",
        "line 5 has no caption",
        "line 7 has no file",
        "line 8 has more cells than the header; quote a text that has commas",
        "line 9 holds the row of e.mp4: a quote is not closed",
        "line 12 has another caption than g.txt, which is used",
    ]


@pytest.mark.parametrize(
    ("value", "caption"),
    [(["one"], "one"), (["one", "two"], "has a list of 2 as caption; give one text"), (5, "has 5 as caption")],
)
def test_lists_and_numbers_are_no_captions(tmp_path: Path, value: object, caption: str) -> None:
    found = captions(tmp_path, a_mp4="", t_jsonl=json.dumps({"video": "a.mp4", "caption": value}))
    if caption == "one":
        assert found.of(str(tmp_path / "a.mp4")) == "one"
    else:
        with pytest.raises(Rejected, match=f"caption in t.jsonl line 1 {caption}"):
            found.of(str(tmp_path / "a.mp4"))


def test_a_caption_is_no_longer_than_infer_takes(tmp_path: Path) -> None:
    found = captions(tmp_path, a_mp4="", b_mp4="", a_txt="x" * 10_001, t_csv="file,caption\nb.mp4," + "x" * 10_001)
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(Rejected, match=r"caption .* has 10001 characters, and 10000 is the most; shorten it"):
            found.of(str(tmp_path / name))


def test_json_of_another_purpose_is_one_problem(tmp_path: Path) -> None:
    found = captions(
        tmp_path, a_mp4="", b_json='{"splits": "x", "version": "1"}', c_json='{"a.mp4": "x"}', d_json='[{"id": 1}]'
    )
    assert found.problems == {"b.json": ["names no media file"], "c.json": [], "d.json": ["names no media file"]}
    assert not found.missing
    assert found.of(str(tmp_path / "a.mp4")) == "x"


def test_the_reason_says_where_captions_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(NoCaption, match=r"has no caption: no a\.txt next to it and no caption table$"):
        captions(tmp_path, a_mp4="").of(str(tmp_path / "a.mp4"))
    with pytest.raises(
        NoCaption, match=r"no a\.txt next to it and no row in t\.csv \(line 1 has no column file or path"
    ):
        captions(tmp_path, t_csv="clip id,caption\n1,x\n").of(str(tmp_path / "a.mp4"))


def test_a_reason_names_three_tables_of_any_number() -> None:
    tables = Captions(problems={f"{i}.json": [] for i in range(4)})
    with pytest.raises(NoCaption, match=r"no row in 0\.json, 1\.json, 2\.json \.\.\.$"):
        tables.of("/x/a.mp4")
    del tables.problems["3.json"]
    with pytest.raises(NoCaption, match=r"no row in 0\.json, 1\.json, 2\.json$"):
        tables.of("/x/a.mp4")


def test_a_sparse_file_that_claims_days_is_refused(tmp_path: Path) -> None:
    options = PrepareOptions(str(tmp_path), str(tmp_path / "out"), captions="optional")
    media = [
        MediaFile(f"/x/{s}", str(s), 10**7, "", str(s), MediaInfo("video", 64, 64, 25.0, s, 16000, 1))
        for s in (86_400.0, 400_000.0)
    ]
    made = make_plan(media, Captions(), options, ClipFormats([(64, 64)], [25], 25.0))
    assert len(made.clips) == 86_400
    assert made.rejected == {"400000.0": "lasts 400000 s, and 86400 s is the most; cut it into parts"}


def plan(folder: Path, files: dict[str, tuple[str, str]], **options: Any) -> tuple[list[str], dict[str, str]]:
    """Files taken and rejected; name -> (content, caption). Content that starts with "short" cannot be used."""
    media, texts = [], {}
    for name, (content, caption) in files.items():
        path = folder / name
        if caption:
            path.with_suffix(".txt").write_text(caption)
            texts[str(path)] = path.with_suffix(".txt")
        info = MediaInfo("video", 64, 64, 25.0, 0.1 if content.startswith("short") else 1.0, 16000, 1)
        media.append(MediaFile(str(path), name, 1000, "", content, info))
    chosen = PrepareOptions(str(folder), str(folder / "out"), **options)
    made = make_plan(media, Captions(texts), chosen, ClipFormats([(64, 64)], [25], 25.0))
    return [clip.relative for clip in made.clips], made.rejected


def test_a_copy_of_a_rejected_file_is_taken(tmp_path: Path) -> None:
    files = {"a.mp4": ("x", ""), "b.mp4": ("x", "b"), "c.mp4": ("x", "b"), "d.mp4": ("x", "other"), "e.mp4": ("y", "")}
    taken, rejected = plan(tmp_path, files)
    assert taken == ["b.mp4"]
    assert rejected["a.mp4"].startswith("has no caption")
    assert rejected["c.mp4"] == "same content as b.mp4 (duplicates=keep takes both)"
    assert rejected["d.mp4"] == "same content as b.mp4 with another caption (duplicates=keep takes both)"
    assert plan(tmp_path, files, duplicates="keep")[0] == ["b.mp4", "c.mp4", "d.mp4"]


def test_of_two_usable_copies_the_captioned_one_is_taken(tmp_path: Path) -> None:
    files = {"a.mp4": ("x", ""), "b.mp4": ("x", "b"), "c.mp4": ("y", ""), "d.mp4": ("y", "")}
    taken, rejected = plan(tmp_path, files, captions="optional")
    assert taken == ["b.mp4", "c.mp4"]
    assert set(rejected) == {"a.mp4", "d.mp4"}


def test_copies_that_cannot_be_used_each_have_their_own_reason(tmp_path: Path) -> None:
    taken, rejected = plan(tmp_path, {"a.mp4": ("short", "a"), "b.mp4": ("short", "b")})
    assert taken == []
    assert [reason.split(":")[0] for reason in rejected.values()] == ["is too short"] * 2
