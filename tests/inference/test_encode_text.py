"""Files of text features: what the encoder says, of the text that was meant."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from inference import encode_text
from magihuman.codecs.bundle import load_bundle
from magihuman.errors import UserError
from magihuman.io.text_features import read_text_features


def test_a_file_holds_the_features_of_its_text(tmp_path: Path) -> None:
    output, words = tmp_path / "new" / "negative.safetensors", tmp_path / "words.txt"
    words.write_text("grey wall\n")
    bundle = load_bundle("tiny")
    encoder = bundle.text_encoder
    for given, text in (({"text": "pink wall"}, "pink wall"), ({"file": str(words)}, "grey wall")):
        said = encode_text.make(str(output), codecs="tiny", device="cpu", **given)
        expected = encoder.encode([text])[0]
        assert f"{len(expected)} tokens of 9 characters" in said
        found = read_text_features(output, "recipe.negative", "tiny", bundle.contract)
        torch.testing.assert_close(found, expected.half().float(), rtol=0, atol=0)
        with safe_open(output, "pt") as file:
            assert file.metadata()["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    other = replace(bundle.contract, text_encoder="t5")
    remedy = rf'make it with `python -m inference.encode_text output={output} text="\.\.\." codecs=scene`'
    with pytest.raises(
        UserError, match=f"holds features of the text encoder bytes-1, and the network takes those of t5; {remedy}"
    ):
        read_text_features(output, "recipe.negative", "scene", other)


def test_a_text_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAGIHUMAN_RELEASE", raising=False)
    output = str(tmp_path / "negative.safetensors")
    for given, said in (
        ({}, "set MAGIHUMAN_RELEASE to a checkout"),
        ({"text": "a", "file": "b"}, "give text= or file=, not both"),
        ({"file": "nowhere.txt"}, "file=nowhere.txt cannot be read"),
    ):
        with pytest.raises(UserError, match=said):
            encode_text.make(output, codecs="tiny", **given)
    assert not Path(output).exists()
