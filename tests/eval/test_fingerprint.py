"""Weights of metrics: identity by commit or bytes, models found in the local cache only, incomplete ones noticed."""

import hashlib
import json
import socket
from pathlib import Path

import pytest

from eval.fingerprint import PIECE, fingerprint, local_model, missing_file, missing_model
from magihuman.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, no connection allowed."""

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


def snapshot(cache: Path, files: dict[str, str]) -> Path:
    repo = cache / "models--owner--name"
    folder = repo / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_of_a_file_is_the_hash_of_its_name_size_and_three_pieces(tmp_path: Path) -> None:
    file = tmp_path / "a.bin"
    data = bytes(range(256)) * 2048  # 512 KiB
    file.write_bytes(data)
    middle = (len(data) - PIECE) // 2
    pieces = data[:PIECE] + data[middle : middle + PIECE] + data[-PIECE:]
    expected = hashlib.sha256(f"a.bin {len(data)}\n".encode() + pieces).hexdigest()
    assert fingerprint(file) == f"sha256 {expected}"


@pytest.mark.parametrize("place", [0, 256 * 1024, -1])
def test_other_bytes_in_a_piece_are_another_identity(tmp_path: Path, place: int) -> None:
    (tmp_path / "w").mkdir()
    file = tmp_path / "w" / "model.safetensors"
    data = bytearray(512 * 1024)
    file.write_bytes(data)
    before = fingerprint(tmp_path / "w")
    assert fingerprint(tmp_path / "w") == before
    data[place] = 1
    file.write_bytes(data)
    assert fingerprint(tmp_path / "w") != before


def test_renaming_and_appending_are_another_identity(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "a").write_bytes(b"x")
    before = fingerprint(tmp_path / "w")
    (tmp_path / "w" / "a").rename(tmp_path / "w" / "b")
    renamed = fingerprint(tmp_path / "w")
    (tmp_path / "w" / "b").write_bytes(b"xx")
    assert len({before, renamed, fingerprint(tmp_path / "w")}) == 3


def test_of_a_snapshot_is_its_commit(hub: Path) -> None:
    folder = snapshot(hub, {"config.json": "{}", "model.safetensors": "x"})
    assert fingerprint(folder) == f"commit {COMMIT}"


def test_missing_weights_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.bin cannot be read: No such file"):
        fingerprint(tmp_path / "gone.bin")


def test_a_model_of_the_cache_is_found_without_a_connection(hub: Path) -> None:
    folder = snapshot(hub, {"config.json": "{}", "model.safetensors": "x"})
    assert local_model("owner/name") == folder
    assert missing_model("owner/name") is None


def test_a_model_that_is_not_there_names_the_command(hub: Path) -> None:
    with pytest.raises(UserError, match=r"^owner/name is not in the local Hugging Face cache; hf download owner/name$"):
        local_model("owner/name")
    assert missing_model("owner/name").remedy == "hf download owner/name"


def test_a_broken_download_is_noticed(hub: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    snapshot(hub, {"config.json": "{}", "model.safetensors.index.json": index, "model-1.safetensors": "x"})
    missing = missing_model("owner/name")
    assert str(missing) == "owner/name is incomplete here: model-2.safetensors missing; hf download owner/name"


@pytest.mark.parametrize(
    ("files", "lost"),
    [
        ({}, "config.json, *.safetensors"),
        ({"config.json": "{}"}, "*.safetensors"),
        ({"config.json": "{}", "model.safetensors.index.json": "[]"}, "a readable model.safetensors.index.json"),
    ],
)
def test_a_folder_without_weights_is_incomplete(tmp_path: Path, files: dict[str, str], lost: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert missing_model(tmp_path).what == f"{tmp_path} is incomplete here: {lost} missing"


def test_neither_folder_nor_hub_name() -> None:
    assert str(missing_model("./gone")).startswith("there is no folder ./gone; give a folder with config.json")


def test_missing_files_name_the_option(tmp_path: Path) -> None:
    file = tmp_path / "w.onnx"
    assert str(missing_file(None, "x.weights", "weights of X")) == "no weights of X; x.weights=FILE"
    assert (
        str(missing_file(file, "x.weights", "weights of X"))
        == f"x.weights={file} is no file; x.weights=FILE, weights of X"
    )
    file.write_bytes(b"x")
    assert missing_file(file, "x.weights", "weights of X") is None
