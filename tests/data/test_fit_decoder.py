"""Training of a puppet world's teacher decoder: its record, going on after a stop, and that the shipped one is as it says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.tiny import fit_decoder
from magihuman.codecs.bundle import load_bundle
from magihuman.codecs.wan_decoder import WanDecoder
from magihuman.errors import UserError
from magihuman.zoo import decoders

SMALL = {"steps": 3, "clips": 2, "batch": 1, "crop": 4, "width": 4, "world": "tiny"}


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
    with pytest.raises(
        UserError, match=r"b.state.pt is of a training with world=tiny steps=3 .*, not world=scene steps=3 "
    ):
        fit_decoder.train(str(tmp_path / "b"), **{**SMALL, "world": "scene"})
    again = fit_decoder.train(str(tmp_path / "b"), **SMALL)
    assert saved == [1, 2, 3]
    assert again == through
    states = [load_file(tmp_path / name / decoders.MODEL) for name in "ab"]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not (tmp_path / "b.state.pt").exists()
    record = json.loads((tmp_path / "b" / decoders.CONFIG).read_text())["provenance"]
    assert record["steps"] == 3
    assert record["held_out_psnr_db"]["teacher"] == round(through["teacher"], 2)


def test_a_teacher_says_its_world_and_another_world_refuses_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit_decoder, "VALIDATION", range(100_000, 100_002))
    scene, tiny = (load_bundle(name) for name in ("scene", "tiny"))
    found = fit_decoder.train(str(tmp_path / "t"), **{**SMALL, "steps": 2, "world": "scene"})
    config = decoders.config_of(tmp_path / "t")
    assert config is not None
    assert config.latents == decoders.Latents.of(scene.contract)
    assert config.latents.world == "scene"
    assert " world=scene steps=2 " in config.provenance["command"]
    truth = fit_decoder.puppet_frames(range(100_000, 100_002), 64, "scene").float() / 127.5 - 1
    assert truth.shape[2] == 37
    through = scene.video_codec.decode(scene.video_codec.encode(truth))
    assert found["codec"] == pytest.approx(fit_decoder.psnr(through, truth), abs=1e-4)
    with pytest.raises(UserError, match=r"turbo=t takes latents of 'scene-.*, but tiny/base has those of 'tiny-"):
        config.latents.require(decoders.Latents.of(tiny.contract), "turbo=t", "tiny/base")
    with pytest.raises(UserError, match="world=moon is unknown; choose from tiny, scene"):
        fit_decoder.train(str(tmp_path / "m"), world="moon")


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
