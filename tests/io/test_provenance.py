"""Identity of files and folders."""

from pathlib import Path

import pytest

from magihuman.io import provenance
from magihuman.io.provenance import fingerprint, portable


@pytest.mark.parametrize("limit", [1 << 30, 1000])
def test_weights_that_replace_others_of_the_same_size_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(provenance, "HASHED_BYTES", limit)
    monkeypatch.setattr(provenance, "SAMPLE_STEP", 5000)
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(20_000))
    (tmp_path / "config.json").write_text("{}" + " " * 6000)
    before = fingerprint(tmp_path)
    assert before["of"] == ("all bytes" if limit > 1000 else "a sample of the bytes")
    assert fingerprint(tmp_path) == before
    for start in (0, 5000, 15_000):  # in every block; a training changes all of them
        file.write_bytes(bytes(start) + b"x" + bytes(19_999 - start))
        assert fingerprint(tmp_path)["sha256"] != before["sha256"]
    file.write_bytes(bytes(20_000))
    (tmp_path / "config.json").write_text("{}" + " " * 5999 + "\n")
    assert fingerprint(tmp_path)["sha256"] != before["sha256"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b ../c ./d s3://e/f hf://g/h and / or", "a/b ../c ./d s3://e/f hf://g/h and / or"),
        ("data=[/home/me/a,/home/me/b]", "data=[a,b]"),
        ("{x:/home/me/a,y:'/home/me/b'}", "{x:a,y:'b'}"),
        ("x=~/a file:///home/me/b", "x=a b"),
        (f"folder={Path.cwd()}/runs/a", "folder=runs/a"),
    ],
)
def test_texts_without_folders_of_this_machine(text: str, expected: str) -> None:
    assert portable(text) == expected
