"""Text of users: encodings, line ends, and every kind of faulty table or JSON."""

import csv
import io
import json
import os
import re
from pathlib import Path

import pytest

from magihuman.errors import UserError
from magihuman.io import text
from magihuman.io.text import MAX_DEPTH, TableRow, load_json, parse_json, prompt_rows, prompt_text, read_rows, read_text

FORM = 'A woman stands.\n\nDialogue:\n<Woman>: "Hello."\n\nBackground Sound:\n<Quiet room>'
NEEDED = (("file", "media_path"), ("caption", "text"))


def rows(path: Path, content: str | bytes) -> list[TableRow]:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_rows(path, path.name, NEEDED, ("file", "caption")))


def pairs(path: Path, content: str | bytes) -> list[tuple[str, str, str]]:
    return [(row.where, row.text(NEEDED[0]), row.text(NEEDED[1])) for row in rows(path, content)]


def test_only_the_ends_and_the_line_ends_of_a_prompt_change() -> None:
    assert prompt_text(f"\ufeff \r\n{FORM}\r\n".removeprefix("\ufeff")) == FORM
    assert prompt_text("a\r\nb\rc\u2028d\x0ce  f\u200cg\u200dh") == "a\nb\rc\u2028d\x0ce  f\u200cg\u200dh"
    with pytest.raises(ValueError, match=r"holds half a character \('\\ud83d' at 2\)"):
        prompt_text("a \ud83d")


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    separators = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i"
    (tmp_path / "p.txt").write_bytes(f"{separators}\r\n\n  z \n".encode())
    found = [(row.where, row.text(["prompt"])) for row in prompt_rows(tmp_path / "p.txt", "p.txt")]
    assert found == [("line 1", separators), ("line 3", "z")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings_that_are_read(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.txt").write_bytes("é\r\nb".encode(encoding))
    assert read_text(tmp_path / "a.txt", "a") == "é\nb"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("é".encode("latin-1"), "a.txt is not UTF-8 (byte 0xe9 at 0); save it as UTF-8"),
        (b"\xff\xfe\x00", "a.txt is not UTF-8 (byte 0x00 at 2)"),
        ("ab".encode("utf-16-le"), "a.txt is not text (it holds NUL; UTF-16 needs a byte-order mark)"),
        (b"x" * 11, "a.txt has more than 0 MiB; cut it into parts"),
    ],
)
def test_texts_that_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_text(tmp_path / "a.txt", "a.txt", limit=10)
    assert str(caught.value).startswith(message)


def test_json_with_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    for depth in (MAX_DEPTH + 1, 3000, 100_000):
        for deep in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            with pytest.raises(ValueError, match="nested deeper than 100 levels"):
                parse_json(deep)
    with pytest.raises(ValueError, match="a number has too many digits"):
        parse_json('{"a": ' + "1" * 5000 + "}")
    monkeypatch.setattr(text, "MAX_JSON", 200_000)
    for content in ("[" * 100_000, '{"a": ' + "1" * 5000 + "}", "{", "[" + " " * 200_000 + "]"):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match=r"nested|digits|Expecting|more than") as caught:
            load_json(tmp_path / "a.json")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "file,caption\r\na.mp4,x\r\n\r\nb.mp4,y\r\n"),
        ("t.csv", 'File,Caption\na.mp4,"x"\n,\nb.mp4, "y"'),
        ("t.csv", "\ufefffile;caption\na.mp4;x\n\nb.mp4;y\n"),
        ("t.csv", ",media path,text\n0,a.mp4,x\n\n1,b.mp4,y\n"),
        ("t.csv", " \nfile,caption\r\na.mp4,x\nb.mp4,y\n"),
        ("t.csv", "file,caption\ra.mp4,x\r\rb.mp4,y\r"),
        ("t.TSV", "file\tcaption\na.mp4\tx\n\nb.mp4\ty\n"),
        ("t.jsonl", '{"file": "a.mp4", "text": "x"}\n\n\n{"Media-Path": "b.mp4", "caption": ["y"]}\n'),
    ],
)
def test_tables_as_other_projects_write_them(tmp_path: Path, name: str, content: str) -> None:
    (_, *first), (where, *second) = pairs(tmp_path / name, content)
    assert (first, second, where) == (["a.mp4", "x"], ["b.mp4", "y"], "line 4")


@pytest.mark.parametrize(
    "content",
    [
        [{"file": "a.mp4", "text": "x"}, {"file": "b", "caption": "y"}],
        {"a.mp4": "x", "b": {"caption": "y", "tags": ""}},
    ],
)
def test_json_of_objects_and_of_names(tmp_path: Path, content: object) -> None:
    assert pairs(tmp_path / "t.json", json.dumps(content)) == [("entry 1", "a.mp4", "x"), ("entry 2", "b", "y")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_written_table_is_read_back_with_every_character(tmp_path: Path, delimiter: str) -> None:
    texts = [
        FORM,
        'says "a, b; c"',
        '"quoted"',
        "a\u2028b\x0cc\x85d",
        "می\u200cخواهد",
        '5" disc',
        "one\ntwo, three; four",
    ]
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerows([("file", "caption"), *((f"{i}.mp4", text) for i, text in enumerate(texts))])
    found = pairs(tmp_path / "t.csv", stream.getvalue())
    assert [text for _, _, text in found] == texts


@pytest.mark.parametrize(
    ("name", "content", "where", "problem"),
    [
        ("t.csv", "file,caption\na.mp4,red bar, moving\nb.mp4,y\n", "line 2", "more cells than the header; quote a text that"),
        ("t.csv", "file,caption,\na.mp4,red bar, moving\nb.mp4,y,\n", "line 2", "more cells than the header"),
        ("t.csv", 'file,caption\na.mp4,"hi" she says\nb.mp4,y\n', "line 2", "has a faulty quote"),
        ("t.csv", 'file,caption\na.mp4,"hi\nb.mp4,y\n', "line 2", "has a faulty quote (unexpected end of data)"),
        ("t.csv", "file,caption\na.mp4,one\rtwo\nb.mp4,y\n", "line 2", "has a carriage return outside of quotes"),
        ("t.tsv", 'file\tcaption\na.mp4\t"hi\nb.mp4\ty\n', "line 2", "has a faulty quote"),
        ("t.tsv", 'file\tcaption\na.mp4\t"hi\nb.mp4\ty\nc.mp4\tz"\n', "line 2", "a cell holds the next row"),
        ("t.jsonl", "[" * 100_000 + '\n{"file": "b.mp4", "text": "y"}', "line 1", "nested deeper than 100 levels"),
        ("t.jsonl", '{"a": ' + "1" * 5000 + '}\n{"file": "b.mp4", "text": "y"}', "line 1", "too many digits"),
        ("t.jsonl", '{"text": 1, "text": 2}\n{"file": "b.mp4", "text": "y"}', "line 1", "'text' stands there twice"),
        ("t.jsonl", '{"text": 1, "Text": 2}\n{"file": "b.mp4", "text": "y"}', "line 1", "'text' stands there twice"),
        ("t.json", '[5, {"file": "b.mp4", "text": "y"}]', "entry 1", "is not a JSON object"),
    ],
)  # fmt: skip
def test_a_faulty_row_is_named_and_costs_only_itself(
    tmp_path: Path, name: str, content: str, where: str, problem: str
) -> None:
    found = rows(tmp_path / name, content)
    assert [row.where for row in found if row.problem] == [where]
    assert problem in found[0].problem
    assert "b.mp4" in [row.values.get("file") for row in found if not row.problem]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (["one", "two"], "has a list of 2 as text; give one text"),
        (5, "has 5 as text"),
        (True, "has True as text"),
        ({"en": "x"}, "has {'en': 'x'} as text"),
        ("\ud83d", "holds half a character"),
    ],
)
def test_a_caption_is_one_text(tmp_path: Path, value: object, problem: str) -> None:
    (row,) = rows(tmp_path / "t.jsonl", json.dumps({"file": "a.mp4", "text": value}))
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        row.text(NEEDED[1])


@pytest.mark.parametrize("empty", [None, "", " ", [], [""]])
def test_the_first_column_with_a_value_counts(tmp_path: Path, empty: object) -> None:
    (row,) = rows(tmp_path / "t.jsonl", json.dumps({"file": "a.mp4", "caption": empty, "text": "x"}))
    assert row.text(NEEDED[1]) == "x"


def test_a_quote_is_closed_within_a_bounded_number_of_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "MAX_LINES", 3)
    found = rows(tmp_path / "t.csv", 'file,caption\na.mp4,"1\n2\n3"\nb.mp4,"1\n2\n3\n4"\n')
    assert [(row.where, bool(row.problem)) for row in found][:2] == [("line 2", False), ("line 5", True)]
    (row,) = rows(tmp_path / "t.csv", "file,caption\na.mp4," + "x" * 200_000)
    assert row.problem.startswith("has a cell of more than 131072 characters")


@pytest.mark.timeout(20)
def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UserError, match="a cannot be read: it is no regular file"):
        read_text(tmp_path / "a.json", "a")
    with pytest.raises(OSError, match="it is no regular file"):
        load_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "name,caption\na.mp4,x\n", "t.csv line 1 has no column file or media_path; it has name, caption"),
        ("t.csv", "file,caption,caption\na.mp4,x,y\n", "t.csv line 1 names the column caption twice"),
        ("t.csv", "", "t.csv line 1 has no column file"),
        ("t.json", "[" * 100_000, "t.json is not JSON (it is nested deeper than 100 levels)"),
        ("t.json", "5", "t.json is neither a list of objects nor an object of names and texts"),
        ("t.json", '{"a": "x", "a": "y"}', "t.json is not JSON ('a' stands there twice)"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        rows(tmp_path / name, content)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "1" * 5000 + "}", "[1]"])
def test_files_of_weights_and_runs_with_such_json_are_one_line(tmp_path: Path, content: str) -> None:
    from magihuman.io.export import weight_files
    from magihuman.training.runs import RunFolder
    from magihuman.zoo.lora_files import lora_config
    from magihuman.zoo.names import is_decoder
    from magihuman.zoo.verify import read_manifest

    names = ("model.safetensors.index.json", "adapter_config.json", "manifest.json", "run.json", "config.json")
    for name in names:
        (tmp_path / name).write_text(content)
    assert not is_decoder(tmp_path)
    for read in (weight_files, lora_config, read_manifest, lambda folder: RunFolder(folder).read()):
        with pytest.raises(UserError) as caught:
            read(tmp_path)
        assert "\n" not in str(caught.value)
