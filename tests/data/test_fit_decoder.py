"""The tiny teacher's training: its record, that it goes on after a stop, and that the shipped one is what it says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.tiny import fit_decoder
from magihuman.codecs.bundle import load_bundle
from magihuman.codecs.wan_decoder import WanDecoder
from magihuman.zoo import decoders

SMALL = {"steps": 3, "clips": 2, "batch": 1, "crop": 4, "width": 4}


def test_a_stopped_training_goes_on_to_the_same_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_decoder, "VALIDATION", range(100_000, 100_002))
    monkeypatch.setattr(fit_decoder, "EVERY", 1)
    through = fit_decoder.train(str(tmp_path / "a"), **SMALL)
    save, saved = torch.save, []

    def stopping(values: dict, path: Path) -> None:
        save(values, path)
        saved.append(values["step"])
        if values["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_decoder.train(str(tmp_path / "b"), **SMALL)
    again = fit_decoder.train(str(tmp_path / "b"), **SMALL)
    assert saved == [1, 2, 3]
    assert again == through
    states = [load_file(tmp_path / name / decoders.MODEL) for name in "ab"]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not (tmp_path / "b.state.pt").exists()
    record = json.loads((tmp_path / "b" / decoders.CONFIG).read_text())["provenance"]
    assert record["steps"] == 3
    assert record["held_out_psnr_db"]["teacher"] == round(through["teacher"], 2)


def test_the_shipped_teacher_is_as_good_as_its_record_says() -> None:
    teacher, world = decoders.load("tiny/teacher"), load_bundle("tiny")
    assert isinstance(teacher, WanDecoder)
    config = decoders.config_of("tiny/teacher")
    assert config is not None
    truth = fit_decoder.puppet_frames(range(100_000, 100_004), 64).float() / 127.5 - 1
    latents = world.video_codec.encode(truth)
    mine = fit_decoder.psnr(teacher.decode(latents), truth)
    codec = fit_decoder.psnr(world.video_codec.decode(latents), truth)
    assert mine > codec + 0.5
    assert mine == pytest.approx(config.provenance["held_out_psnr_db"]["teacher"], abs=1.5)  # of 4 puppets, not 16
