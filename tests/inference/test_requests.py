"""Prompt files: what is read, and what each mistake gets."""

import json
from pathlib import Path

import pytest

from inference.requests import MAX_SEED, Request, read_requests, slug
from magihuman.errors import UserError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_txt_gives_each_line_its_own_seed_and_name(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "round face, says ma\n\n  Square / face!  \n")
    assert read_requests(path, 7) == [
        Request("0000-round-face-says-ma", "round face, says ma", 7),
        Request("0001-square-face", "Square / face!", 8),
    ]


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfround face\r\nsquare face\r\n")
    assert [r.prompt for r in read_requests(path, 0)] == ["round face", "square face"]


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "says ma\u2028bi so\r\nother\x0cpage\n")
    assert [r.prompt for r in read_requests(path, 0)] == ["says ma\u2028bi so", "other\x0cpage"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.TSV", "prompt\tseed\nx, y\t3\n"),
        ("p.csv", "text;seed\n x, y ;3\n"),
        ("p.json", '[{"caption": "x, y", "seed": 3}]'),
        ("p.json", '{"0000-x-y": {"prompt": "x, y", "seed": 3}}'),
    ],
)
def test_tables_of_captions_serve_as_prompts(tmp_path: Path, name: str, text: str) -> None:
    assert read_requests(write(tmp_path / name, text), 0) == [Request("0000-x-y", "x, y", 3)]


def test_jsonl_fields_and_paths_from_the_file_s_folder(tmp_path: Path) -> None:
    (tmp_path / "first.png").touch()
    lines = [
        {"prompt": "a\u2028b", "seed": 3, "name": "one", "seconds": 2, "image": "first.png"},
        {"prompt": "c", "negative_prompt": "grey", "seed": None},
    ]
    path = write(tmp_path / "p.jsonl", "\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    first, second = read_requests(path, 10)
    assert first == Request("one", "a\u2028b", 3, image=str(tmp_path / "first.png"), seconds=2.0)
    assert second == Request("0001-c", "c", 11, negative_prompt="grey")


def test_csv_with_quoted_commas_and_empty_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "p.csv", 'name,prompt,seed\nx,"round, red",5\n,plain,\n')
    assert read_requests(path, 1) == [Request("x", "round, red", 5), Request("0001-plain", "plain", 2)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.yaml", "x", "cannot tell the format"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not JSON"),
        ("p.jsonl", '["a"]', "is not a JSON object"),
        ("p.jsonl", '{"promt": "a"}', "unknown field 'promt'"),
        ("p.jsonl", '{"prompt": " "}', "prompt is missing or empty"),
        ("p.jsonl", '{"prompt": 5}', "has 5 as prompt; give one text"),
        ("p.jsonl", '{"prompt": ["a", "b"]}', "has a list of 2 as prompt; give one text"),
        ("p.jsonl", '{"prompt": "a", "seconds": 1' + "0" * 400 + "}", "seconds must be a positive number"),
        ("p.jsonl", "[" * 100_000, "nested deeper than 100 levels"),
        ("p.jsonl", '{"prompt": "a", "seed": 1' + "0" * 5000 + "}", "a number has too many digits"),
        ("p.csv", "prompt,seed\na,1" + "0" * 5000, "seed must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": -1}', "seed must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": true}', "seed must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', "seed must be a whole number"),
        ("p.jsonl", '{"prompt": "a", "seconds": 0}', "seconds must be a positive number"),
        ("p.jsonl", '{"prompt": "a", "seconds": true}', "seconds must be a positive number"),
        ("p.jsonl", '{"prompt": "a", "seconds": "inf"}', "seconds must be a positive number"),
        ("p.jsonl", '{"prompt": "a", "name": "../x"}', "cannot be a file name"),
        ("p.jsonl", '{"prompt": "a", "image": "nowhere.png"}', "does not exist"),
        ("p.jsonl", '{"prompt": "a", "name": "x"}\n{"prompt": "b", "name": "x"}', "in line 1 and again in line 2"),
        ("p.csv", "words\na\n", "has no column caption or text or prompt"),
        ("p.csv", "prompt\nround, red\n", "more cells than the header"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_requests(write(tmp_path / name, text), 0)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_values_are_not_given(tmp_path: Path) -> None:
    line = {"prompt": "", "text": "real", "name": "", "image": "", "audio": [], "negative_prompt": ""}
    assert read_requests(write(tmp_path / "p.jsonl", json.dumps(line)), 7) == [
        Request("0000-real", "real", 7, negative_prompt="")
    ]


def test_a_counted_seed_is_within_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "p.txt", "a\nb\n")
    assert read_requests(path, MAX_SEED - 1)[1].seed == MAX_SEED
    with pytest.raises(UserError, match="line 2: seed must be a whole number from 0 to"):
        read_requests(path, MAX_SEED)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_requests(tmp_path / "none.txt", 0)
    binary = tmp_path / "b.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        read_requests(binary, 0)


def test_slug_is_short_plain_and_never_empty() -> None:
    assert slug("Round face/../etc, GINGER hair; says ma bi so and more") == "round-face-etc-ginger-hair-says-ma-bi-so"
    assert slug("彼女は話す") == "clip"
    assert slug("x" * 99) == "x" * 40
